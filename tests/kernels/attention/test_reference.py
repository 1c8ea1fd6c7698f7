"""The NumPy definition of attention against torch, JAX, a loop over scalars, and finite differences."""

from __future__ import annotations

from math import exp, inf, log

import ml_dtypes
import numpy as np
import pytest
import torch
from attention_problems import FEATURES, MORE_QUERIES, PACKED, SHAPE, SPOILT, PackedProblem, Problem
from oracles import (
    assert_equal_in_float64,
    assert_within,
    attention_by_torch,
    finite_differences,
    packed_attention_by_torch,
    rounded,
    visible_by_loop,
)

from crosstile.kernels.attention import reference
from crosstile.kernels.attention.spec import INPUTS, AttentionSpec
from crosstile.kernels.tiles.expressions import SCORE, const, plane

# batch, q_len, kv_len, q_heads, kv_heads, head_dim, v_dim
SHAPES = [
    pytest.param((2, 5, 5, 2, 2, 4, 4), id="square"),
    pytest.param((1, 3, 7, 4, 2, 5, 3), id="grouped, more keys"),
    pytest.param((2, 7, 4, 3, 1, 4, 6), id="multi-query, more queries"),
    pytest.param((1, 1, 9, 2, 2, 8, 8), id="one query"),
    pytest.param((1, 6, 1, 2, 1, 3, 3), id="one key"),
]
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])


def make(rng, shape):
    """float64 arrays by name, with the gradients of out and lse."""
    batch, q_len, kv_len, q_heads, kv_heads, head_dim, v_dim = shape
    shapes = {
        "q": (batch, q_len, q_heads, head_dim),
        "k": (batch, kv_len, kv_heads, head_dim),
        "v": (batch, kv_len, kv_heads, v_dim),
        "dout": (batch, q_len, q_heads, v_dim),
        "dlse": (batch, q_heads, q_len),
    }
    return {name: rng.standard_normal(size) for name, size in shapes.items()}


def by_definition(arrays, *, causal=False, scale=None, dtype="float64"):
    """out, lse and the gradients by the reference, of arrays already in `dtype`."""
    q, k, v = (arrays[name] for name in "qkv")
    spec = AttentionSpec(dtype, q.shape[-1], v.shape[-1], causal=causal, scale=scale, return_lse=True)
    outputs = reference.forward(spec, q, k, v)
    gradients = reference.backward(spec, (q, k, v), outputs, (arrays["dout"], arrays.get("dlse")))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*outputs, *gradients[:3]), strict=True))


@CAUSAL
@pytest.mark.parametrize("scale", [None, 0.7, -0.4, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_in_float64(rng, shape, scale, causal):
    arrays = make(rng, shape)
    expected = attention_by_torch(**arrays, causal=causal, scale=scale)
    assert_equal_in_float64(by_definition(arrays, causal=causal, scale=scale), expected)


@CAUSAL
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_without_a_gradient_of_lse(rng, shape, causal):
    arrays = make(rng, shape)
    del arrays["dlse"]
    assert_equal_in_float64(by_definition(arrays, causal=causal), attention_by_torch(**arrays, causal=causal))


@CAUSAL
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_jax_in_float64(rng, shape, causal):
    jax = pytest.importorskip("jax")
    arrays = make(rng, (*shape[:6], shape[5]))  # JAX wants v_dim to be head_dim
    mask = visible_by_loop(shape[1], shape[2], causal)
    sees = mask.any(axis=1)[None, :, None, None]

    @jax.jit
    def own(q, k, v, dout):
        def attention(q, k, v):
            out = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None] | ~sees.reshape(1, 1, -1, 1))
            return jax.numpy.where(sees, out, 0)

        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(dout)

    with jax.enable_x64(True):
        results = own(*(arrays[name] for name in ("q", "k", "v", "dout")))
        assert results[0].dtype == np.float64
    del arrays["dlse"]
    ours = by_definition(arrays, causal=causal)
    del ours["lse"]
    expected = dict(zip(("out", "dq", "dk", "dv"), map(np.asarray, results), strict=True))
    # JAX takes the softmax in float32 whatever the inputs are
    for name, result in ours.items():
        largest = max(np.abs(expected[name]).max(), 1e-3)
        assert np.abs(result - expected[name]).max() <= 16 * 2.0**-23 * largest, name


@CAUSAL
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_by_a_loop_over_scalars(rng, shape, causal):
    """Bottom-right alignment, grouping and the logsumexp, by the words of design.md and no array code."""
    arrays = make(rng, shape)
    q, k, v = (arrays[name] for name in "qkv")
    batch, q_len, kv_len, q_heads, kv_heads, head_dim, v_dim = shape
    out, lse = np.zeros((batch, q_len, q_heads, v_dim)), np.full((batch, q_heads, q_len), -inf)
    for b, i, h in np.ndindex(batch, q_len, q_heads):
        group = h // (q_heads // kv_heads)
        seen = [j for j in range(kv_len) if not causal or j <= i + kv_len - q_len]
        weights = {
            j: exp(sum(q[b, i, h, d] * k[b, j, group, d] for d in range(head_dim)) / head_dim**0.5) for j in seen
        }
        total = sum(weights.values())
        if seen:
            lse[b, h, i] = log(total)
        for d in range(v_dim):
            out[b, i, h, d] = sum(weight / total * v[b, j, group, d] for j, weight in weights.items())
    ours = by_definition(arrays, causal=causal)
    assert_equal_in_float64({"out": ours["out"], "lse": ours["lse"]}, {"out": out, "lse": lse})


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 2, 1, 3, 2), (1, 4, 2, 2, 2, 2, 3)], ids=["more keys", "more queries"])
def test_gradients_by_finite_differences(rng, shape, through, name):
    arrays = make(rng, shape)
    dout = arrays["dout"] * (through != "lse")
    dlse = arrays["dlse"] * (through != "out")

    def loss(q, k, v):
        spec = AttentionSpec("float64", q.shape[-1], v.shape[-1], causal=True, scale=0.8)
        out, lse = reference.forward(spec, q, k, v)
        return float((out * dout).sum() + (np.where(np.isneginf(lse), 0, lse) * dlse).sum())

    ours = by_definition({**arrays, "dout": dout, "dlse": dlse}, causal=True, scale=0.8)[f"d{name}"]
    numeric = finite_differences(loss, {key: arrays[key] for key in "qkv"}, name)
    np.testing.assert_allclose(ours, numeric, rtol=1e-7, atol=1e-9)  # step**2 = 1e-10 of the third derivative


def test_lse_is_torch_logsumexp(rng):
    arrays = make(rng, (2, 4, 6, 4, 2, 5, 5))
    scores = np.einsum("bihd,bjhd->bhij", arrays["q"], arrays["k"].repeat(2, axis=2)) * 0.3
    expected = torch.logsumexp(torch.from_numpy(scores), dim=-1).numpy()
    assert_equal_in_float64({"lse": by_definition(arrays, scale=0.3)["lse"]}, {"lse": expected})


def test_queries_before_the_first_key_see_nothing(rng):
    arrays = make(rng, (1, 7, 3, 2, 1, 4, 5))
    arrays["dlse"][:, :, :4] = np.nan  # the gradient of a constant: it must not count
    ours = by_definition(arrays, causal=True)
    blind, seeing = slice(None, 4), slice(4, None)
    assert (ours["out"][:, blind] == 0).all()
    assert np.isneginf(ours["lse"][..., blind]).all()
    assert (ours["dq"][:, blind] == 0).all()
    assert not any(np.isnan(result).any() for result in ours.values())

    rest = {
        name: arrays[name][:, seeing] if name in ("q", "dout") else arrays[name] for name in ("q", "k", "v", "dout")
    }
    alone = by_definition({**rest, "dlse": arrays["dlse"][..., seeing]}, causal=True)
    assert_equal_in_float64({"dk": ours["dk"], "dv": ours["dv"]}, alone)


@CAUSAL
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(1, 3, 0), (1, 0, 3), (0, 3, 3), (1, 0, 0)])
def test_empty(rng, batch, q_len, kv_len, causal):
    arrays = make(rng, (batch, q_len, kv_len, 2, 1, 4, 5))
    ours = by_definition(arrays, causal=causal)
    assert ours["out"].shape == (batch, q_len, 2, 5)
    assert (ours["out"] == 0).all() or kv_len
    assert np.isneginf(ours["lse"]).all() or kv_len
    for name in "qkv":
        assert ours[f"d{name}"].shape == arrays[name].shape
        assert (ours[f"d{name}"] == 0).all()


def test_large_scores_do_not_overflow(rng):
    arrays = make(rng, (1, 3, 5, 1, 1, 4, 4))
    arrays["q"] *= 1e4
    ours = by_definition(arrays)
    assert all(np.isfinite(result).all() for result in ours.values())
    assert_equal_in_float64({"out": ours["out"], "lse": ours["lse"]}, attention_by_torch(**arrays))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_narrow_inputs_are_computed_in_float32(rng, dtype):
    arrays = {name: rounded(array, dtype) for name, array in make(rng, (2, 9, 12, 4, 2, 8, 8)).items()}
    native = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    ours = by_definition({name: array.astype(native) for name, array in arrays.items()}, causal=True, dtype=dtype)
    assert {name: result.dtype for name, result in ours.items()} == {
        **dict.fromkeys(("out", "dq", "dk", "dv"), np.dtype(native)),
        "lse": np.dtype(np.float32),
    }
    own = attention_by_torch(**arrays, causal=True, dtype=dtype)
    assert_within(ours, own, attention_by_torch(**arrays, causal=True), dtype)


# ---- Windows, lengths, masks, biases, sinks, expressions and packed sequences

B, H, QUERY, KEY = ("b",), ("h",), ("i",), ("j",)


def by_features(problem, dtype="float64"):
    """out, lse and the gradients of a problem by the reference; that of the bias as dbias."""
    spec = problem.spec(dtype)
    outputs = reference.forward(spec, *problem.inputs())
    gradients = dict(zip(INPUTS, reference.backward(spec, problem.inputs(), outputs, problem.gradients), strict=True))
    assert all(gradients[name] is None for name in INPUTS if name not in problem.differentiable())
    names = {name: "dbias" if name.startswith("plane") else f"d{name}" for name in problem.differentiable()}
    return dict(zip(("out", "lse"), outputs, strict=True)) | {names[name]: gradients[name] for name in names}


def by_torch(problem, **options):
    arrays = (*(problem.arrays[name] for name in "qkv"), *problem.gradients)
    if isinstance(problem, PackedProblem):
        return packed_attention_by_torch(*arrays, *problem.starts, **problem.oracle, **options)
    return attention_by_torch(*arrays, **problem.oracle, **options)


@pytest.mark.parametrize("feature", FEATURES | PACKED)
def test_features_equal_torch_in_float64(rng, feature):
    problem = (FEATURES | PACKED)[feature](rng)
    ours = by_features(problem)
    assert_equal_in_float64(ours, by_torch(problem))
    blind = np.isneginf(ours["lse"]).transpose(0, 2, 1)
    assert (ours["out"][blind] == 0).all()
    assert (ours["dq"][blind] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("feature", ["softcap, bias, mask", "lengths, window, sinks", "packed, bias"])
def test_features_of_narrow_inputs_are_computed_in_float32(rng, feature, dtype):
    problem = (FEATURES | PACKED)[feature](rng)
    floats = {name: rounded(array, dtype) for name, array in problem.arrays.items() if array.dtype == np.float64}
    problem.arrays |= floats
    problem.oracle |= {"bias": floats["plane0"]} if "bias" in problem.oracle else {}
    problem.oracle |= {"sinks": floats["sinks"]} if "sinks" in floats else {}
    problem.gradients = rounded(problem.gradients[0], dtype), rounded(problem.gradients[1], "float32")
    exact, own = by_torch(problem), by_torch(problem, dtype=dtype)

    native = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    problem.arrays |= {name: array.astype(np.float32 if name == "sinks" else native) for name, array in floats.items()}
    ours = by_features(problem, dtype)
    assert ours["out"].dtype == ours["dq"].dtype == native
    assert_within(ours, own, exact, dtype)


@pytest.mark.parametrize("name", ["mask", "bias", "window", "lengths"])
def test_features_equal_jax(rng, name):
    """Where jax aligns as crosstile does: a window over a square, lengths without one. Its softmax is in float32."""
    jax = pytest.importorskip("jax")
    problem = Problem(rng, (2, 7, 7, 4, 2, 5, 5))
    arrays = problem.arrays
    theirs = {}
    if name == "mask":
        problem.has_mask((2, 4, 7, 7), 0.5)
        theirs = {"mask": arrays["plane0"] | ~arrays["plane0"].any(axis=3, keepdims=True)}
    elif name == "bias":
        problem.adds_bias((1, 4, 7, 7))
        theirs = {"bias": arrays["plane0"]}
    elif name == "window":
        problem.has_window(2, 1)
        theirs = {"local_window_size": (2, 1)}
    else:
        problem.has_lengths([4, 7], [3, 6])
        theirs = {"query_seq_lengths": arrays["q_lengths"], "key_value_seq_lengths": arrays["kv_lengths"]}
    ours = by_features(problem)

    @jax.jit
    def own(arrays, theirs, dout):
        def attend(arrays, bias):
            options = theirs if bias is None else {"bias": bias}
            options = options if name != "window" else {"local_window_size": (2, 1)}
            return jax.nn.dot_product_attention(**dict(zip(("query", "key", "value"), arrays, strict=True)), **options)

        out, pull_back = jax.vjp(attend, arrays, theirs.get("bias"))
        return out, *pull_back(dout)

    blind = np.isneginf(ours["lse"]).transpose(0, 2, 1)[..., None]
    with jax.enable_x64(True):
        results = own([arrays[name] for name in "qkv"], theirs, np.where(blind, 0, problem.gradients[0]))
        out, gradients, dbias = jax.tree.map(np.asarray, results)
    problem.gradients = problem.gradients[0], None
    ours = by_features(problem)
    expected = dict(zip(("dq", "dk", "dv", "dbias"), (*gradients, dbias), strict=True))
    expected["out"] = np.where(blind, 0, out)
    for key in ours.keys() - {"lse"}:
        largest = max(np.abs(expected[key]).max(), 1e-3)
        assert np.abs(ours[key] - expected[key]).max() <= 16 * 2.0**-23 * largest, key


# what a mod says to crosstile's tracer and to flex_attention, with the planes that its arrays become
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])
TABLE = np.random.default_rng(1).standard_normal((4, 32))
FLEX_SCORES = {
    "alibi": (
        ("add", SCORE, ("mul", plane(0), ("sub", KEY, QUERY))),
        {"plane0": SLOPES.reshape(1, 4, 1, 1)},
        lambda score, b, h, i, j: score + torch.from_numpy(SLOPES)[h] * (j - i),
    ),
    "relative": (
        ("add", SCORE, plane(0)),
        {"plane0": TABLE[None][:, :, np.arange(9)[None] - np.arange(6)[:, None] + 10]},
        lambda score, b, h, i, j: score + torch.from_numpy(TABLE)[h, j - i + 10],
    ),
    "softcap": (
        ("mul", ("tanh", ("div", SCORE, const(0.8))), const(0.8)),
        {},
        lambda score, b, h, i, j: 0.8 * torch.tanh(score / 0.8),
    ),
    "where": (
        ("where", ("and", ("le", KEY, QUERY), ("not", ("eq", B, const(1)))), ("mul", SCORE, const(2.0)), const(-inf)),
        {},
        lambda score, b, h, i, j: torch.where((j <= i) & ~(b == 1), score * 2.0, -inf),
    ),
    "smooth": (
        ("sub", ("log", ("add", ("exp", SCORE), const(1.0))), ("sqrt", ("add", ("abs", SCORE), ("neg", const(-0.5))))),
        {},
        lambda score, b, h, i, j: torch.log(torch.exp(score) + 1.0) - torch.sqrt(torch.abs(score) + 0.5),
    ),
    "integers": (
        (
            "add",
            ("min", SCORE, ("floordiv", ("sub", QUERY, KEY), const(4))),
            ("max", ("mod", ("sub", QUERY, KEY), const(3)), H),
        ),
        {},
        lambda score, b, h, i, j: torch.minimum(score, (i - j) // 4 + 0.0 * score) + torch.maximum((i - j) % 3, h),
    ),
}
IDS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3], np.int32)
FLEX_MASKS = {
    "sliding, causal": (
        ("and", ("le", KEY, ("add", QUERY, const(3))), ("gt", KEY, ("sub", QUERY, const(2)))),
        {},
        lambda b, h, i, j: (j <= i + 3) & (j > i - 2),
    ),
    "document": (
        ("eq", plane(0), plane(1)),
        {"plane0": IDS[:6].reshape(1, 1, 6, 1), "plane1": IDS.reshape(1, 1, 1, 9)},
        lambda b, h, i, j: torch.from_numpy(IDS)[i] == torch.from_numpy(IDS)[j],
    ),
    "dilated or prefix, but not of one head": (
        (
            "and",
            ("or", ("eq", ("mod", ("sub", QUERY, KEY), const(3)), const(0)), ("lt", KEY, const(2))),
            ("ne", H, const(2)),
        ),
        {},
        lambda b, h, i, j: (((i - j) % 3 == 0) | (j < 2)) & (h != 2),
    ),
}


def by_flex(problem, score_mod=None, mask_mod=None):
    """out and lse by torch's flex_attention, uncompiled."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    batch, q_len, kv_len, q_heads = problem.shape[:4]
    blocks = None
    if mask_mod is not None:
        blocks = create_block_mask(mask_mod, batch, q_heads, q_len, kv_len, device="cpu")
    q, k, v = (torch.from_numpy(problem.arrays[name]).transpose(1, 2) for name in "qkv")
    out, beside = flex_attention(q, k, v, score_mod, blocks, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return {"out": out.transpose(1, 2).numpy(), "lse": beside.lse.numpy()}


def assert_equals_flex(problem, expected):
    spec = problem.spec("float64")
    out, lse = reference.forward(spec, *problem.inputs())
    assert_equal_in_float64({"out": out}, expected)
    # flex makes the lse float32, and the log of its sum loses what cancels
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected["lse"]))
    np.testing.assert_allclose(lse, expected["lse"], rtol=4 * 2.0**-23, atol=4 * 2.0**-23)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX_SCORES)
def test_score_expressions_equal_flex_attention(rng, name):
    expression, planes, mod = FLEX_SCORES[name]
    problem = Problem(rng, SHAPE)
    problem.arrays |= planes
    problem.changes_score(expression)
    assert_equals_flex(problem, by_flex(problem, score_mod=mod))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX_MASKS)
def test_mask_expressions_equal_flex_attention(rng, name):
    expression, planes, mod = FLEX_MASKS[name]
    problem = Problem(rng, SHAPE)
    problem.arrays |= planes
    problem.options["mask"] = expression
    assert_equals_flex(problem, by_flex(problem, mask_mod=mod))


def with_an_expression(rng, score):
    """Causal with sinks; two planes of one query head each, the second of one key head too."""
    problem = Problem(rng, (2, 3, 4, 2, 1, 3, 2))
    problem.arrays |= {"plane0": rng.random((1, 2, 1, 1)) + 0.5, "plane1": rng.random((2, 1, 3, 4)) + 0.5}
    problem.changes_score(score)
    problem.options["plane_gradients"] = (0, 1)
    problem.has_sinks()
    problem.is_causal()
    return problem


SCORES = {
    "sums and products": ("add", ("mul", SCORE, plane(0)), ("div", plane(1), ("neg", plane(0)))),
    "functions": ("sub", ("tanh", ("mul", SCORE, plane(1))), ("log", ("exp", ("sqrt", plane(0))))),
    "choices": (
        "max",
        ("where", ("lt", KEY, QUERY), ("abs", SCORE), ("min", SCORE, plane(0))),
        ("mul", plane(1), const(-1.5)),
    ),
    "undefined where hidden": ("mul", SCORE, ("log", ("add", ("sub", QUERY, KEY), ("add", plane(1), const(1.0))))),
}


@pytest.mark.parametrize("score", SCORES)
def test_gradients_through_expressions_by_finite_differences(rng, score):
    problem = with_an_expression(rng, SCORES[score])
    spec = problem.spec("float64")
    dout, dlse = problem.gradients

    def loss(**moved):
        out, lse = reference.forward(spec, *({**problem.arrays, **moved}.get(name) for name in INPUTS))
        return float((out * dout).sum() + (lse * dlse).sum())

    outputs = reference.forward(spec, *problem.inputs())
    gradients = dict(zip(INPUTS, reference.backward(spec, problem.inputs(), outputs, (dout, dlse)), strict=True))
    assert np.abs(gradients["q"]).max() > 1e-3
    for name in problem.differentiable():
        numeric = finite_differences(loss, problem.arrays, name)
        np.testing.assert_allclose(gradients[name], numeric, rtol=1e-7, atol=1e-9, err_msg=name)


def test_a_sink_on_a_row_without_keys_is_its_lse(rng):
    problem = FEATURES["sinks on rows without keys"](rng)
    problem.gradients = problem.gradients[0], np.zeros_like(problem.gradients[1])
    ours = by_features(problem)
    blind = slice(None, MORE_QUERIES[1] - MORE_QUERIES[2])
    np.testing.assert_array_equal(ours["lse"][..., blind], np.repeat(problem.arrays["sinks"][..., None], 5, axis=2))
    assert (ours["out"][:, blind] == 0).all()
    assert (ours["dq"][:, blind] == 0).all()
    assert ours["dsinks"].any()


@pytest.mark.parametrize("planes", ["bias", "mask", "bias and sinks"])
@pytest.mark.parametrize("kv_len", [0, 1])
def test_lengths_of_nothing(rng, kv_len, planes):
    problem = Problem(rng, (2, 3, kv_len, 2, 1, 4, 5))
    if "bias" in planes:
        problem.adds_bias((2, 1, 3, kv_len))
    if "mask" in planes:
        problem.has_mask((2, 2, 3, kv_len), 0.5)
    if "sinks" in planes:
        problem.has_sinks()
    assert_equal_in_float64(by_features(problem), by_torch(problem))


@pytest.mark.parametrize(
    "lengths", [((0, 0), (0, 3)), ((), ()), ((2,), (0,))], ids=["no query", "no sequence", "no key"]
)
def test_packed_sequences_of_nothing(rng, lengths):
    problem = PackedProblem(rng, SHAPE, q_lens=lengths[0] or (0,), kv_lens=lengths[1] or (0,))
    if not lengths[0]:
        problem.starts = [np.zeros(1, np.int32)] * 2
        problem.arrays |= {"cu_seqlens_q": problem.starts[0], "cu_seqlens_k": problem.starts[1]}
    ours = by_features(problem)
    assert all((result == (-inf if name == "lse" else 0)).all() for name, result in ours.items())


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_hidden_reaches_nothing(rng, name):
    clean, spoilt = SPOILT[name](rng)
    ours = by_features(spoilt)
    assert not any(np.isnan(result).any() for result in ours.values())
    assert_equal_in_float64(ours, by_features(clean))
