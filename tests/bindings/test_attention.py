"""The arguments of attention beyond q, k and v: errors, transforms of both frameworks, and mods of the user's own."""

import numpy as np
import pytest
from sweeps import one_in

import crosstile
from crosstile import mods

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

MAKERS = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def inputs(make=np.asarray, batch=2, q_len=5, kv_len=7, q_heads=4, kv_heads=2, dim=8):
    rng = np.random.default_rng(0)
    shapes = ((batch, q_len, q_heads, dim), (batch, kv_len, kv_heads, dim), (batch, kv_len, kv_heads, dim))
    return [make(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 3}, TypeError, r"window: got 3; it must be a pair \(left, right\)"),
        ({"window": (3, -1)}, ValueError, r"window, right: got -1; it must not be negative"),
        ({"window": (1.5, 0)}, TypeError, r"window, left: got float; it must be an integer"),
        ({"softcap": 0.0}, ValueError, r"softcap: got 0.0; it must be finite and greater than 0"),
        ({"softcap": "5"}, TypeError, r"softcap: got str; it must be a number"),
        ({"score_mod": lambda s, b, h, i, j: "s"}, TypeError, r"score_mod: it returned str"),
        ({"score_mod": lambda s, b, h, i, j: i < j}, TypeError, r"score_mod: it returned a truth value"),
        ({"mask_mod": lambda b, h, i, j: i - j}, TypeError, r"mask_mod: it returned a number; it must return a truth"),
        ({"mask_mod": lambda b, h, i, j: i if i < j else j}, TypeError, r"a mod is recorded, not run"),
        ({"score_mod": lambda s, b, h, i, j: s + np.ones(3)}, TypeError, r"a mod met ndarray; it takes numbers"),
    ],
)
def test_options(make, options, error, message):
    with pytest.raises(error, match=message):
        crosstile.attention(*inputs(make), **options)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        (
            {"bias": np.zeros((3, 1, 1), np.float32)},
            ValueError,
            r"bias: got \[3, 1, 1\]; .* \[2, 4, 5, 7\]",
        ),
        ({"bias": np.zeros(7, np.int32)}, TypeError, r"bias: dtype is int32; it must be a float"),
        ({"mask": np.zeros(7, np.float32)}, TypeError, r"mask: dtype is float32; it must be bool"),
        ({"mask": np.zeros((2, 2, 5, 7), bool)}, ValueError, r"mask: got \[2, 2, 5, 7\]; it must broadcast"),
        ({"segment_ids": np.zeros((2, 5), np.int32)}, ValueError, r"segment_ids: got \[2, 5\]; it must be .* \[2, 7\]"),
        ({"segment_ids": np.zeros((2, 7), np.float32)}, TypeError, r"segment_ids: dtype is float32; it must be an int"),
        ({"kv_lengths": np.zeros(3, np.int32)}, ValueError, r"kv_lengths: got \[3\]; it must be \[batch\] = \[2\]"),
        ({"q_lengths": np.zeros(2, np.float32)}, TypeError, r"q_lengths: dtype is float32; it must be an integer"),
        ({"sinks": np.zeros(2, np.float32)}, ValueError, r"sinks: got \[2\]; it must be \[q_heads\] = \[4\]"),
        ({"sinks": np.zeros(4, bool)}, TypeError, r"sinks: dtype is bool; it must be a float"),
    ],
)
def test_arrays(make, arrays, error, message):
    with pytest.raises(error, match=message):
        crosstile.attention(*inputs(make), **{name: make(array) for name, array in arrays.items()})


def test_arrays_of_another_framework_are_named():
    with pytest.raises(TypeError, match=r"bias: got torch.Tensor where q is numpy.ndarray"):
        crosstile.attention(*inputs(), bias=torch.zeros(7))


def test_too_many_arrays_beside_the_scores():
    tables = [mods.array(np.zeros(4, np.float32)) for _ in range(7)]
    with pytest.raises(ValueError, match=r"score_mod: one array too many beside the scores"):
        crosstile.attention(*inputs(), score_mod=lambda s, b, h, i, j: s + sum(table[h] for table in tables))


def test_an_array_cannot_be_indexed_by_the_score():
    table = mods.array(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"score_mod: an array is indexed by the score"):
        crosstile.attention(*inputs(), score_mod=lambda s, b, h, i, j: s + table[s])
    with pytest.raises(ValueError, match=r"an array of rank 1 with 2 indices; it must give 1"):
        crosstile.attention(*inputs(), score_mod=lambda s, b, h, i, j: s + table[h, i])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": np.zeros((2, 2), np.int32)}, ValueError, r"cu_seqlens_q: got rank 2"),
        ({"cu_seqlens_q": np.zeros(3)}, TypeError, r"cu_seqlens_q: dtype is float\d\d; it must be an integer"),
        ({"cu_seqlens_k": np.zeros(4, np.int32)}, ValueError, r"cu_seqlens_k: got \[4\] where cu_seqlens_q is \[3\]"),
        ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q: got -1"),
        ({"max_seqlen_k": 2.5}, TypeError, r"max_seqlen_k: got float"),
        ({"q": np.zeros((1, 5, 4, 8), np.float32)}, ValueError, r"q: got rank 4.*it must have rank 3"),
    ],
)
def test_packed_arguments(make, change, error, message):
    q, k, v = (array[0] for array in inputs())
    starts = np.array([0, 2, 5], np.int32)
    call = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
    }
    call |= change
    with pytest.raises(error, match=message):
        crosstile.varlen_attention(**{name: make(x) if isinstance(x, np.ndarray) else x for name, x in call.items()})


# ---- What the arguments mean, by hand


def test_the_order_of_the_changes_of_a_score():
    """Scale, softcap, score_mod, bias; against the same written out."""
    q, k, v = (array.astype(np.float64) for array in inputs(kv_heads=4))
    bias = np.random.default_rng(1).standard_normal((4, 5, 7))
    out = crosstile.attention(q, k, v, scale=0.5, softcap=2.0, score_mod=lambda s, b, h, i, j: s * (h + 1), bias=bias)
    scores = 2.0 * np.tanh(np.einsum("bihd,bjhd->bhij", q, k) * 0.5 / 2.0)
    scores = scores * np.arange(1, 5)[:, None, None] + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=64 * 2.0**-52)


def test_an_index_past_an_end_reads_the_end(make):
    q, k, v = inputs(make)
    table = np.arange(3, dtype=np.float32)
    near = crosstile.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + mods.array(make(table))[j - 2])
    wide = np.take(np.arange(3, dtype=np.float32), np.clip(np.arange(7) - 2, 0, 2))
    far = crosstile.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + mods.array(make(wide))[j])
    np.testing.assert_array_equal(np.asarray(near), np.asarray(far))


def test_an_index_may_be_looked_up_itself(make):
    """`table[ids[j]]`: one look-up inside another."""
    q, k, v = inputs(make)
    ids, table = np.array([0, 1, 1, 2, 0, 2, 2]), np.array([0.5, -1.0, 2.0], np.float32)
    held_ids, held_table = mods.array(make(ids)), mods.array(make(table))
    nested = crosstile.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + held_table[held_ids[j]])
    np.testing.assert_array_equal(np.asarray(nested), np.asarray(crosstile.attention(q, k, v, bias=make(table[ids]))))


@pytest.mark.parametrize(
    ("mask_mod", "expected"),
    [
        (mods.causal(2), lambda i, j: j <= i + 2),
        (mods.sliding_window(2, 1), lambda i, j: (j >= i - 2) & (j <= i + 1)),
        (mods.dilated(3), lambda i, j: (i - j) % 3 == 0),
        (mods.prefix(2), lambda i, j: (j < 2) | (j <= i)),
        (mods.all_of(mods.causal(), mods.dilated(2)), lambda i, j: (j <= i) & ((i - j) % 2 == 0)),
        (mods.any_of(mods.causal(), mods.prefix(4)), lambda i, j: (j <= i) | (j < 4)),
        (mods.document(np.array([0, 0, 0, 1, 1, 1, 1])), lambda i, j: (i < 3) == (j < 3)),
    ],
)  # fmt: skip
def test_masks_to_use_as_they_are(make, mask_mod, expected):
    q, k, v = inputs(make)
    seen = np.broadcast_to(expected(np.arange(5)[:, None], np.arange(7)[None, :]), (5, 7))
    out = crosstile.attention(q, k, v, mask_mod=mask_mod)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(crosstile.attention(q, k, v, mask=make(seen.copy()))))


def test_visible_tiles_of_a_public_mask():
    """Every pair of the hidden tiles is hidden, every pair of the full ones is seen."""
    from crosstile.scores import visible_tiles

    ids = np.sort(np.random.default_rng(0).integers(0, 5, 70))
    runs = visible_tiles(mods.document(ids), 70, 70, causal=True, window=(40, None), block_q=16, block_kv=8)
    i, j = np.arange(70)[:, None], np.arange(70)[None, :]
    seen = (ids[i] == ids[j]) & (j <= i) & (j >= i - 40)
    for tile in range(runs.row_tiles):
        rows = seen[16 * tile : 16 * tile + 16]
        shown = np.zeros(70, bool)
        for first, end, full in runs.of(tile):
            shown[8 * first : 8 * end] = True
            assert not full or rows[:, 8 * first : 8 * end].all()
        assert not rows[:, ~shown].any()
    assert 0 < runs.visited < runs.row_tiles * runs.column_tiles


# ---- Transforms


def everything(framework, arrays, implementation):
    """A loss that uses every differentiable argument, and some masks."""
    q, k, v, bias, sinks, slopes = arrays
    lengths = framework.asarray([7, 4])
    options = {"causal": True, "window": (4, None), "softcap": 3.0, "kv_lengths": lengths, "bias": bias, "sinks": sinks}
    out, lse = crosstile.attention(
        q, k, v, **options, score_mod=mods.alibi(slopes), return_lse=True, implementation=implementation
    )
    return (out * out).sum() + framework.where(lse < -1e30, framework.zeros_like(lse), lse).sum()


def leaves(make):
    rng = np.random.default_rng(2)
    shapes = ((4, 1, 7), (4,), (4,))
    return (*inputs(make), *(make(rng.standard_normal(shape).astype(np.float32)) for shape in shapes))


def torch_leaves():
    return tuple(leaf.requires_grad_() for leaf in leaves(torch.as_tensor))


@pytest.mark.parametrize("kernel", ["numpy", "triton", "pallas"])
def test_compile_without_a_graph_break(kernel):
    torch._dynamo.reset()
    arrays = torch_leaves()
    compiled = torch.compile(lambda *args: everything(torch, args, kernel), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(everything(torch, arrays, kernel), arrays)
    for ours, theirs in zip(torch.autograd.grad(compiled(*arrays), arrays), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kernel", ["numpy", "pallas", pytest.param("triton", marks=pytest.mark.sweep)])
def test_vmap_of_torch_lets_the_batch_grow(kernel):
    stacked = tuple(torch.stack([leaf.detach(), 2 * leaf.detach(), -leaf.detach()]) for leaf in torch_leaves())
    gradient = torch.func.grad(lambda *args: everything(torch, args, kernel), tuple(range(6)))
    mapped = torch.vmap(gradient)(*stacked)
    for index in range(3):
        alone = gradient(*(array[index] for array in stacked))
        for ours, theirs in zip(mapped, alone, strict=True):
            torch.testing.assert_close(ours[index], theirs, rtol=2e-5, atol=2e-5)


def test_vmap_over_packed_sequences_is_a_clear_error():
    q, k, v = (array[0] for array in inputs(torch.as_tensor))
    starts = torch.tensor([0, 2, 5])

    def call(q):
        lengths = {"max_seqlen_q": 5, "max_seqlen_k": 5}
        return crosstile.varlen_attention(q, k, v, starts, starts, **lengths, implementation="numpy")

    with pytest.raises(crosstile.UnsupportedError, match=r"cu_seqlens_q: attention cannot be mapped by torch.vmap"):
        torch.vmap(call)(q[None])


@pytest.mark.parametrize("kernel", one_in(2, ["pallas", "triton", "numpy"]))
def test_jax_transforms(kernel):
    arrays = leaves(jnp.asarray)
    gradient = jax.grad(lambda args: everything(jnp, args, kernel))
    eager, jitted = gradient(arrays), jax.jit(gradient)(arrays)
    by_torch = torch.autograd.grad(everything(torch, args := torch_leaves(), kernel), args)
    for ours, compiled, theirs in zip(eager, jitted, by_torch, strict=True):
        np.testing.assert_allclose(ours, compiled, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=2e-5)


def test_explain_shows_the_expressions():
    told = str(crosstile.explain("attention", *inputs(), softcap=4.0, bias=np.zeros(7, np.float32)))
    assert "score ((tanh((score * 0.25)) * 4.0) + plane0)" in told
    starts = np.array([0, 5])
    packed = (array[0] for array in inputs())
    told = str(crosstile.explain("varlen_attention", *packed, starts, starts, max_seqlen_q=5, max_seqlen_k=7))
    assert "max_seqlen_q 5" in told
