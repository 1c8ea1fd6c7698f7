"""The NumPy definition of attention against torch, JAX, a loop over scalars, and finite differences."""

from __future__ import annotations

from math import exp, inf, log

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import (
    assert_equal_in_float64,
    assert_within,
    attention_by_torch,
    finite_differences,
    rounded,
    visible_by_loop,
)

from crosstile.kernels.attention import reference
from crosstile.kernels.attention.spec import AttentionSpec

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
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*outputs, *gradients), strict=True))


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
