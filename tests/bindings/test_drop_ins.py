"""Each drop-in gives what the original gives: results and gradients, by the two-times rule.

The originals are torch's and JAX's own functions. flash_attn is not installable on a CPU: its documented semantics are
written out in torch here.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles import assert_within

import crosstile
from crosstile import drop_ins, mods
from crosstile.kernels.tiles.expressions import evaluate, functions_of
from crosstile.torch_mods import recorded

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

Arrays = dict[str, Any]
BOTH = pytest.mark.parametrize("implementation", ["library", "numpy"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Values that float32 holds exactly, so that both precisions are given the same problem."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32).astype(np.float64)


def by_torch(function: Callable[..., Any], arrays: Arrays, dtype: str) -> Arrays:
    """The function's results, and the gradients of all its arrays under random weights of the results."""
    leaves = {name: torch.tensor(array, dtype=getattr(torch, dtype)).requires_grad_() for name, array in arrays.items()}
    results = function(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(
        (torch.where(result.isfinite(), result, 0) * torch.tensor(normal(*result.shape, seed=9 + at))).sum()
        for at, result in enumerate(results)
    )
    gradients = torch.autograd.grad(loss, leaves.values(), allow_unused=True, materialize_grads=True)
    named = dict(zip(("out", "lse"), results, strict=False))
    named |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: array.detach().double().numpy() for name, array in named.items()}


def agree(ours: Callable[..., Any], theirs: Callable[..., Any], arrays: Arrays) -> None:
    exact = by_torch(theirs, arrays, "float64")
    assert_within(by_torch(ours, arrays, "float32"), by_torch(theirs, arrays, "float32"), exact, "float32")


# ---- torch.nn.functional.scaled_dot_product_attention


def sdpa_pair(**options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v, **masks: function(q, k, v, **masks, **options)

    return call(drop_ins.scaled_dot_product_attention), call(torch.nn.functional.scaled_dot_product_attention)


@pytest.mark.parametrize(
    ("q", "kv", "options"),
    [
        ((2, 4, 5, 8), (2, 4, 7, 8), {}),
        ((2, 4, 5, 8), (2, 4, 5, 8), {"is_causal": True, "scale": 0.3}),
        ((2, 4, 5, 8), (2, 4, 9, 8), {"is_causal": True}),  # top-left: the last keys are seen by nobody
        ((2, 4, 9, 8), (2, 4, 5, 8), {"is_causal": True}),
        ((2, 4, 5, 8), (2, 2, 7, 8), {"enable_gqa": True}),
        ((5, 8), (7, 8), {}),
        ((4, 5, 8), (2, 7, 8), {"enable_gqa": True, "is_causal": True}),
        ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), {"is_causal": True}),
        ((2, 4, 5, 8), (1, 4, 7, 8), {}),  # broadcast, in the batch and in the heads
        ((2, 4, 5, 8), (4, 7, 8), {}),
        ((2, 4, 5, 8), (2, 1, 7, 8), {}),
    ],
)
def test_sdpa(q, kv, options):
    agree(*sdpa_pair(**options), {"q": normal(*q), "k": normal(*kv), "v": normal(*kv, seed=1)})


@pytest.mark.parametrize(
    ("lead", "mask"), [((2, 4), (5, 7)), ((2, 4), (2, 1, 5, 7)), ((4,), (4, 1, 7)), ((3, 2, 4), (3, 1, 1, 5, 7))]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_sdpa_with_a_mask(lead, mask, kind):
    arrays = {"q": normal(*lead, 5, 8), "k": normal(*lead, 7, 8), "v": normal(*lead, 7, 6)}
    if kind == "float":
        agree(*sdpa_pair(), {**arrays, "attn_mask": normal(*mask)})
    else:  # with one query that sees nothing
        seen = normal(*mask) > -0.3
        if mask[-2] > 1:
            seen[..., 1, :] = False
        agree(*sdpa_pair(attn_mask=torch.tensor(seen)), arrays)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(1)}])
def test_sdpa_by_the_definition(options):
    arrays = {"q": normal(2, 4, 5, 8), "k": normal(2, 2, 7, 8), "v": normal(2, 2, 7, 8, seed=1)}
    with crosstile.use("numpy"):
        agree(*sdpa_pair(enable_gqa=True, **options), arrays)


def test_dropout_of_a_share_by_the_generator():
    """With scores of 0 and values that are unit vectors the result shows the weights: 0, or made larger."""
    size, share = 96, 0.25
    q, v = torch.zeros(2, 3, size, size), torch.eye(size).expand(2, 3, size, size)

    def weights(seed: int, attend) -> torch.Tensor:
        torch.manual_seed(seed)
        return attend()

    calls = [
        lambda: drop_ins.scaled_dot_product_attention(q, q, v, dropout_p=share),
        lambda: drop_ins.flash_attn_func(q.transpose(1, 2), q.transpose(1, 2), v.transpose(1, 2), share),
    ]
    for attend in calls:
        found = weights(0, attend)
        assert abs((found == 0).float().mean() - share) < 0.01
        torch.testing.assert_close(found[found != 0], torch.full_like(found[found != 0], 1 / (size * (1 - share))))
        assert torch.equal(found, weights(0, attend))
        assert not torch.equal(found, weights(1, attend))


def test_sdpa_refuses():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"attn_mask: got one beside is_causal"):
        drop_ins.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"key: heads are 2 where query has 4; enable_gqa=True"):
        drop_ins.scaled_dot_product_attention(torch.zeros(1, 4, 3, 4), x, x)


def test_sdpa_compiles():
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in "qkv")
    compiled = torch.compile(drop_ins.scaled_dot_product_attention, fullgraph=True, backend="eager")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(compiled(q, k, v, is_causal=True), expected)


# ---- torch.nn.attention.flex_attention


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TABLE = torch.tensor(normal(4, 17), dtype=torch.float32)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]])
LENGTHS = torch.tensor([6, 9])

SCORE_MODS: dict[str, Callable[..., Any]] = {
    "none": lambda score, b, h, i, j: score,
    "alibi": lambda score, b, h, i, j: score - SLOPES[h] * (i - j).abs(),
    "relative": lambda score, b, h, i, j: score + TABLE[h, i - j + 8],
    "softcap": lambda score, b, h, i, j: 2.0 * torch.tanh(score / 2.0),
    "causal": lambda score, b, h, i, j: torch.where(i >= j, score, -float("inf")),
    "casts": lambda score, b, h, i, j: (
        score + (i >= j).to(torch.float32) * torch.clamp((i - j).float(), max=3) ** 2 / 9
    ),
    "chained": lambda score, b, h, i, j: score + TABLE[h][torch.abs(i - j)] * torch.sigmoid(score),
}
MASK_MODS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, i, j: i >= j,
    "window": lambda b, h, i, j: torch.logical_and(i - j <= 3, i >= j),
    "document": lambda b, h, i, j: (DOCUMENTS[b, i] == DOCUMENTS[b, j]) & (j <= i),
    "lengths": lambda b, h, i, j: (j < LENGTHS[b]) & (i < LENGTHS[b]),  # queries past the length see nothing
    "heads": lambda b, h, i, j: (h % 2 == 0) | ((i // 3) == (j // 3)),
}


WRITTEN_IN_TORCH: list[Callable[..., Any]] = [
    lambda s, i, j: torch.add(s, torch.mul(2.0, torch.sub(i, j))),
    lambda s, i, j: torch.div(s, torch.tensor(3.0)) + torch.true_divide(i, 4) - torch.rsub(s, 1.0),
    lambda s, i, j: torch.div(i - j, 3, rounding_mode="floor") + torch.floor_divide(i - j, 2),
    lambda s, i, j: torch.remainder(i - j, 3) + (j - i) % 4 + s,
    lambda s, i, j: 1 - s + 2 / (1 + s * s) + torch.tensor(7) // (i + 1),
    lambda s, i, j: torch.neg(s).abs() + s.square() + torch.pow(s, 3) + (s * s) ** 0.5,
    lambda s, i, j: (
        torch.exp(s).log() + torch.exp2(s) + torch.log2(1 + s * s) + torch.sqrt(s * s) + (1 + s * s).rsqrt()
    ),
    lambda s, i, j: torch.tanh(s) + torch.sigmoid(s) + torch.relu(s),
    lambda s, i, j: torch.maximum(s, j) + torch.minimum(s, torch.tensor(0.5)) + torch.max(i, j) - torch.min(i, j),
    lambda s, i, j: s.clamp(-0.5, 0.5) + torch.clip(s, max=0.1) + torch.clamp(i - j, min=2),
    lambda s, i, j: torch.where(torch.eq(i, j) | torch.ne(i % 2, 0), s, torch.zeros_like(s)),
    lambda s, i, j: torch.where(torch.lt(i, j) & torch.ge(j, 3), s, torch.full_like(s, 2.0)),
    lambda s, i, j: torch.where(torch.le(i, j) & torch.gt(j, 3), torch.ones_like(s), s),
    lambda s, i, j: torch.where(torch.logical_or(i > j, ~(i < 4)), s, 0.0),
    lambda s, i, j: torch.where(torch.bitwise_and(i > j, torch.logical_not(i < 4)), s, 1.0),
    lambda s, i, j: torch.where(torch.bitwise_or(i > j, torch.bitwise_not(j < 4)), s, 1.0),
    lambda s, i, j: s.masked_fill(i < j, -1.0) + (i > j).float() + (i > j).int() * 2 + (i - j).to(s.device).long(),
    lambda s, i, j: torch.where((i % 2).bool() & i.new_ones((), dtype=torch.bool), s, (i > j).type_as(i).double()),
    lambda s, i, j: torch.where((i >= j) | i.new_zeros(size=(), dtype=torch.bool), s + i.new_ones(()), s),
    lambda s, i, j: TABLE[2][torch.abs(i - j)] + TABLE[1, i] * TABLE[1, 16 - j] + torch.tensor(2.0).add(s),
]


@pytest.mark.parametrize("number", range(len(WRITTEN_IN_TORCH)))
def test_torch_functions_are_recorded(number):
    """What is recorded computes what torch computes."""
    mod = WRITTEN_IN_TORCH[number]
    score, at = torch.tensor(normal(9, 9)), torch.arange(9, dtype=torch.int32)
    expected = mod(score, at[:, None], at[None]).expand(9, 9)
    expression = recorded(lambda score, b, h, i, j: mod(score, i, j), "score_mod")
    values = {("score",): score.numpy(), ("i",): at.numpy()[:, None], ("j",): at.numpy()[None]}
    for load in mods.loads(expression):
        indices = [evaluate(index, values, functions_of(np)) for index in load[2:]]
        values[load] = load[1].held.numpy()[tuple(indices)]
    np.testing.assert_allclose(evaluate(expression, values, functions_of(np)), expected.numpy(), rtol=1e-6)


def test_a_tensor_that_is_read_twice_is_one_look_up():
    expression = recorded(lambda score, b, h, i, j: score * SLOPES[h] + SLOPES[h] * TABLE[h][i], "score_mod")
    assert len(mods.loads(expression)) == 2


def flex_pair(score: str | None, mask: str | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The drop-in, and torch's eager definition of the op, which unlike the op itself is differentiable on a CPU."""
    from torch._higher_order_ops.flex_attention import math_attention
    from torch.nn.attention.flex_attention import create_block_mask, noop_mask

    block = create_block_mask(MASK_MODS[mask] if mask else noop_mask, 2, 4, 9, 9, device="cpu")
    mod = SCORE_MODS[score] if score else None

    def ours(q: Any, k: Any, v: Any) -> Any:
        return drop_ins.flex_attention(q, k, v, mod, block if mask else None, enable_gqa=True, return_lse=True)

    def theirs(q: Any, k: Any, v: Any) -> Any:
        score_mod = mod or SCORE_MODS["none"]
        out, lse, _ = math_attention(q, k, v, score_mod, block.as_tuple(), q.shape[3] ** -0.5, {})
        return out, lse * math.log(2)

    return ours, theirs


def flex_arrays() -> Arrays:
    return {"q": normal(2, 4, 9, 8), "k": normal(2, 2, 9, 8), "v": normal(2, 2, 9, 6, seed=1)}


@pytest.mark.parametrize("score", SCORE_MODS)
def test_flex_score_mods(score):
    agree(*flex_pair(score, None), flex_arrays())


@pytest.mark.parametrize("mask", MASK_MODS)
def test_flex_mask_mods(mask):
    agree(*flex_pair("alibi", mask), flex_arrays())


@pytest.mark.parametrize(("score", "mask"), [("relative", "document"), ("causal", None)])
def test_flex_by_the_definition(score, mask):
    with crosstile.use("numpy"):
        agree(*flex_pair(score, mask), flex_arrays())


def test_flex_gives_captured_tensors_their_gradient():
    from torch._higher_order_ops.flex_attention import math_attention
    from torch.nn.attention.flex_attention import create_block_mask, noop_mask

    block = create_block_mask(noop_mask, 2, 4, 9, 9, device="cpu").as_tuple()

    def ours(q: Any, k: Any, v: Any, slopes: Any, bias: Any) -> Any:
        mod = lambda score, b, h, i, j: score * slopes[h] + bias[b, h, i, j]  # noqa: E731
        return drop_ins.flex_attention(q, k, v, mod, enable_gqa=True)

    def theirs(q: Any, k: Any, v: Any, slopes: Any, bias: Any) -> Any:
        mod = lambda score, b, h, i, j, slopes, bias: score * slopes[h] + bias[b, h, i, j]  # noqa: E731
        return math_attention(q, k, v, mod, block, 8**-0.5, {}, (slopes, bias))[0]

    agree(ours, theirs, {**flex_arrays(), "slopes": normal(4), "bias": normal(2, 4, 9, 9)})


def test_flex_has_the_original_conventions(monkeypatch):
    """Against the public function itself: the logsumexp is a natural logarithm, and an AuxOutput where asked for."""
    from torch.nn.attention import flex_attention as original

    monkeypatch.setattr(original, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # else it compiles itself
    q, k, v = (torch.tensor(array, dtype=torch.float32) for array in flex_arrays().values())
    block = original.create_block_mask(
        original.and_masks(MASK_MODS["document"], MASK_MODS["lengths"]), 2, None, 9, 9, device="cpu"
    )
    options = {"block_mask": block, "scale": 0.2, "enable_gqa": True, "return_aux": original.AuxRequest(lse=True)}
    theirs, their_aux = original.flex_attention(q, k, v, SCORE_MODS["softcap"], **options)
    ours, our_aux = drop_ins.flex_attention(
        q, k, v, SCORE_MODS["softcap"], kernel_options={"BLOCK_M": 64, "fwd_num_stages": 1}, **options
    )
    assert type(our_aux) is type(their_aux)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_aux.lse.double(), their_aux.lse.double(), rtol=1e-6, atol=1e-6)
    shared = drop_ins.flex_attention(q, k[:1], v[:1], **options)[0]  # one batch item of keys for all queries
    torch.testing.assert_close(shared, original.flex_attention(q, k[:1], v[:1], **options)[0])


def test_flex_refuses():
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask

    x = torch.zeros(1, 2, 256, 8)
    causal = create_block_mask(MASK_MODS["causal"], None, None, 256, 256, device="cpu")
    blocks_only = BlockMask.from_kv_blocks(
        causal.kv_num_blocks, causal.kv_indices, causal.full_kv_num_blocks, causal.full_kv_indices, 128
    )
    with pytest.raises(crosstile.UnsupportedError, match=r"block_mask: .* blocks only"):
        drop_ins.flex_attention(x, x, x, block_mask=blocks_only)
    with pytest.raises(ValueError, match=r"block_mask: it was made for lengths \[256, 256\]"):
        drop_ins.flex_attention(x[:, :, :5], x, x, block_mask=causal)
    with pytest.raises(crosstile.UnsupportedError, match=r"score_mod: crosstile cannot record it. torch.cumsum"):
        drop_ins.flex_attention(x, x, x, lambda score, b, h, i, j: torch.cumsum(score, 0))
    with pytest.raises(crosstile.UnsupportedError, match=r"score_mod: .* round a float"):
        drop_ins.flex_attention(x, x, x, lambda score, b, h, i, j: score.int())
    with pytest.raises(crosstile.UnsupportedError, match=r"return_aux: .* max_scores"):
        drop_ins.flex_attention(x, x, x, return_aux=AuxRequest(max_scores=True))
    with pytest.raises(crosstile.UnsupportedError, match=r"kernel_options: FAST_MATH"):
        drop_ins.flex_attention(x, x, x, kernel_options={"FAST_MATH": True})
    with pytest.raises(ValueError, match=r"key: heads are 1 where query has 2; enable_gqa"):
        drop_ins.flex_attention(x, x[:, :1], x[:, :1])
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        drop_ins.flex_attention(x, x, x, block_mask=causal[:, :, :1])


# ---- flash_attn


def flash_written_out(
    q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None, **others
):
    """flash_attn_func, by the words of its docstring: (out, lse)."""
    q_len, kv_len, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    distance = torch.zeros(q_len, kv_len)
    for i in range(q_len):
        for j in range(kv_len):
            at = i + kv_len - q_len
            distance[i, j] = abs(at - j)
            seen[i, j] = (
                (not causal or j <= at)
                and (window_size[0] == -1 or j >= at - window_size[0])
                and (window_size[1] == -1 or j <= at + window_size[1])
            )
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        scores = scores - slopes[:, :, None, None] * distance.to(scores.dtype)
    scores = scores.masked_fill(~seen, float("-inf"))
    blind = ~seen.any(1)
    lse = torch.logsumexp(scores.masked_fill(blind[:, None], 0.0), 3).masked_fill(blind, float("-inf"))
    weights = torch.where(blind[:, None], 0.0, torch.softmax(scores.masked_fill(blind[:, None], 0.0), 3))
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


FLASH_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"softmax_scale": 0.3, "deterministic": True},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (3, -1), "causal": True},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": SLOPES, "causal": True, "softcap": 2.0},
}


def flash_both(function, **options):
    def call(q, k, v):
        out, lse, probabilities = function(q, k, v, return_attn_probs=True, **options)
        assert probabilities is None
        return out, lse

    return call


@pytest.mark.parametrize("name", FLASH_OPTIONS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 9), (9, 5)])
def test_flash(name, q_len, kv_len):
    options = FLASH_OPTIONS[name]
    arrays = {"q": normal(2, q_len, 4, 8), "k": normal(2, kv_len, 2, 8), "v": normal(2, kv_len, 2, 8, seed=1)}
    agree(flash_both(drop_ins.flash_attn_func, **options), lambda **x: flash_written_out(**x, **options), arrays)


@BOTH
def test_flash_slopes_of_each_batch_item(implementation):
    options = {"alibi_slopes": torch.stack((SLOPES, 2 * SLOPES)), "window_size": (4, 0)}
    arrays = {"q": normal(2, 5, 4, 8), "k": normal(2, 7, 4, 8), "v": normal(2, 7, 4, 8, seed=1)}
    with crosstile.use(implementation):
        agree(flash_both(drop_ins.flash_attn_func, **options), lambda **x: flash_written_out(**x, **options), arrays)


VARLEN_Q, VARLEN_K = [0, 3, 3, 7, 12], [0, 5, 7, 9, 14]  # one sequence has no queries, one more queries than keys


@BOTH
@pytest.mark.parametrize("name", FLASH_OPTIONS)
def test_flash_varlen(name, implementation):
    options = FLASH_OPTIONS[name]

    def theirs(q, k, v):
        spans = zip(VARLEN_Q[:-1], VARLEN_Q[1:], VARLEN_K[:-1], VARLEN_K[1:], strict=True)
        parts = [flash_written_out(q[None, a:b], k[None, c:d], v[None, c:d], **options) for a, b, c, d in spans]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)

    starts = [torch.tensor(cu, dtype=torch.int32) for cu in (VARLEN_Q, VARLEN_K)]
    ours = flash_both(
        lambda q, k, v, **rest: drop_ins.flash_attn_varlen_func(q, k, v, *starts, 5, 5, **rest), **options
    )
    arrays = {"q": normal(12, 4, 8), "k": normal(14, 2, 8), "v": normal(14, 2, 8, seed=1)}
    with crosstile.use(implementation):
        agree(ours, theirs, arrays)


def test_flash_refuses():
    x, starts = torch.zeros(1, 3, 2, 8), torch.tensor([0, 3])
    with pytest.raises(crosstile.UnsupportedError, match=r"block_table: .*paged_attention"):
        drop_ins.flash_attn_varlen_func(x[0], x[0], x[0], starts, starts, 3, 3, block_table=torch.zeros(1, 1))


# ---- jax.nn.dot_product_attention


def by_jax(function: Callable[..., Any], arrays: Arrays, dtype: str) -> Arrays:
    """The results of jitted `function(**arrays)`, and the gradients of the first under random weights."""
    inputs = {name: jax.numpy.asarray(array, dtype) for name, array in arrays.items()}

    def loss(inputs: Arrays) -> Any:
        results = function(**inputs)
        out = results[0] if isinstance(results, tuple) else results
        return (out * normal(*out.shape, seed=9).astype(out.dtype)).sum(), results

    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(inputs).compile(quickly)
    (_, results), gradients = compiled(inputs)
    named = dict(zip(("out", "lse"), results if isinstance(results, tuple) else (results,), strict=False))
    named |= {f"d{name}": gradient for name, gradient in gradients.items()}
    return {name: np.asarray(array, np.float64) for name, array in named.items()}


def agree_in_jax(arrays: Arrays, **options: Any) -> None:
    ours = by_jax(lambda **x: drop_ins.dot_product_attention(**x, **options), arrays, "float32")
    theirs = by_jax(lambda **x: jax.nn.dot_product_attention(**x, **options), arrays, "float32")
    with jax.enable_x64(True):
        exact = by_jax(lambda **x: jax.nn.dot_product_attention(**x, **options), arrays, "float64")
    assert_within(ours, theirs, exact, "float32")


def jax_arrays(q_len: int = 6, kv_len: int = 6) -> Arrays:
    return {"query": normal(2, q_len, 4, 8), "key": normal(2, kv_len, 2, 8), "value": normal(2, kv_len, 2, 8, seed=1)}


JAX_OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True, "return_residual": True},
    "window": {"local_window_size": 3, "scale": 0.3},
    "causal window": {"local_window_size": (2, 1), "is_causal": True, "implementation": "xla"},
    "keys": {"key_value_seq_lengths": np.array([5, 3], np.int32), "is_causal": True},
    "queries": {"query_seq_lengths": np.array([5, 3], np.int32)},
    "both": {
        "query_seq_lengths": np.array([5, 2], np.int32),
        "key_value_seq_lengths": np.array([3, 6], np.int32),
        "is_causal": True,
    },
}


@pytest.mark.parametrize(
    ("name", "q_len", "kv_len"),
    [
        ("causal", 6, 6),
        ("causal", 8, 6),
        ("window", 6, 6),
        ("causal window", 6, 8),
        ("keys", 6, 6),
        ("queries", 6, 6),
        ("both", 8, 6),
    ],
)
def test_jax(name, q_len, kv_len):
    agree_in_jax(jax_arrays(q_len, kv_len), **JAX_OPTIONS[name])


def test_jax_masks():
    mask = normal(2, 1, 6, 6) > -0.5
    mask[..., 0] = True
    agree_in_jax({**jax_arrays(), "bias": normal(1, 4, 6, 6)}, mask=mask, is_causal=True)


def test_jax_without_a_batch():
    arrays = {name: array[0] for name, array in jax_arrays().items()}
    agree_in_jax({**arrays, "bias": normal(4, 1, 6)}, is_causal=True, return_residual=True)


@pytest.mark.parametrize("name", ["causal window", "both"])
def test_jax_by_the_definition(name):
    with crosstile.use("numpy"):
        agree_in_jax({**jax_arrays(), "bias": normal(1, 4, 1, 6)}, **JAX_OPTIONS[name])


def test_jax_same_lengths_are_the_kernels_own_causality():
    """The same array for both lengths keeps the alignment, with no mask to compute."""
    lengths = np.array([5, 3], np.int32)
    agree_in_jax(jax_arrays(), query_seq_lengths=lengths, key_value_seq_lengths=lengths, is_causal=True)


def test_jax_refuses():
    x = jax.numpy.zeros((1, 3, 2, 8))
    with pytest.raises(ValueError, match=r"implementation: got 'mosaic'"):
        drop_ins.dot_product_attention(x, x, x, implementation="mosaic")


# ---- all


def test_signatures_are_the_originals():
    from inspect import signature

    from torch.nn.attention.flex_attention import flex_attention

    for ours, theirs in (
        (drop_ins.flex_attention, flex_attention),
        (drop_ins.dot_product_attention, jax.nn.dot_product_attention),
    ):
        want = [(p.name, p.kind, p.default) for p in signature(theirs).parameters.values()]
        assert [(p.name, p.kind, p.default) for p in signature(ours).parameters.values()] == want


def test_importing_loads_no_framework():
    check = "import sys, crosstile.drop_ins; assert not {'torch', 'jax', 'triton', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
