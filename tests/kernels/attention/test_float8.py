"""float8_e4m3fn queries, keys and values: their scales, and weights that are rounded to as few bits.

The exact answer is the definition's in float64, of the quantised values times their scales. A kernel rounds weights to
float8, whose error is at most 1/16 of a weight, half of the last place; beyond that it has float32's error alone, so
that it is held to the same computed in NumPy with rounded weights.
"""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import crosstile
from crosstile.kernels.attention.spec import AttentionSpec

FLOAT8 = ml_dtypes.float8_e4m3fn
GREATEST = float(ml_dtypes.finfo(FLOAT8).max)
KERNELS = pytest.mark.parametrize("kernel", ["triton", "pallas"])


def quantised(array: np.ndarray, block: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values in float8, their scales, and what both stand for."""
    batch, length, heads, dim = array.shape
    block, per_head = block or length, block is None
    blocks = -(-length // block)
    padded = np.pad(array, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    scale = abs(padded.reshape(batch, blocks, block, heads, dim)).max(axis=(2, 4)).transpose(0, 2, 1) / GREATEST
    scale = scale.astype(np.float32)
    by_token = np.repeat(scale, block, axis=2)[:, :, :length].transpose(0, 2, 1)[..., None].astype(np.float64)
    values = (array / by_token).astype(FLOAT8)
    return values, scale[..., 0] if per_head else scale, values.astype(np.float64) * by_token


def problem(block: int | None, q_len: int = 70, kv_len: int = 90, dims: tuple[int, int] = (32, 24)):
    draw = np.random.default_rng(0).standard_normal
    growing = 1 + np.arange(kv_len)[:, None, None] / 30  # blocks of keys and values that differ in size
    arrays = (
        draw((2, q_len, 4, dims[0])),
        draw((2, kv_len, 2, dims[0])) * growing,
        draw((2, kv_len, 2, dims[1])) * growing,
    )
    (q, qs, q_exact), (k, ks, k_exact), (v, vs, v_exact) = (quantised(array, block) for array in arrays)
    scales = {"q_scale": qs, "k_scale": ks, "v_scale": vs, "scale_block": block}
    return (q, k, v), scales, (q_exact, k_exact, v_exact)


def with_rounded_weights(exact: tuple[np.ndarray, ...], v_scale: np.ndarray, block: int | None) -> np.ndarray:
    """Causal attention in float64, but for weights: each is rounded to float8 as the kernels round them, except that
    they know the largest score only from the tiles before."""
    q, k, v = exact
    k, v = (np.repeat(array, 2, axis=2) for array in (k, v))
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[3])
    offset = k.shape[1] - q.shape[1]
    scores = np.where(np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None] + offset, scores, -np.inf)
    weights = 256 * np.exp(scores - scores.max(axis=3, keepdims=True))
    factor: float | np.ndarray = 1.0
    if block is not None:
        shares = v_scale / v_scale.max(axis=2, keepdims=True)
        factor = np.repeat(np.repeat(shares, block, axis=2)[:, :, : k.shape[1]], 2, axis=1)[:, :, None]
    rounded = (weights * factor).astype(np.float32).astype(FLOAT8).astype(np.float64) / factor
    return np.einsum("bhij,bjhd->bihd", rounded / weights.sum(axis=3, keepdims=True), v)


@KERNELS
@pytest.mark.parametrize("block", [None, 32])
def test_error_is_that_of_rounded_weights(kernel, block):
    (q, k, v), scales, exact = problem(block)
    truth, lse = crosstile.attention(*exact, causal=True, return_lse=True)
    allowed = 2 * abs(with_rounded_weights(exact, scales["v_scale"], block) - truth).max()
    options = {**scales, "causal": True, "out_dtype": "float32", "return_lse": True}
    out, found_lse = crosstile.attention(q, k, v, **options, implementation=kernel)
    assert abs(out - truth).max() <= allowed < 0.1 * abs(truth).max()
    np.testing.assert_allclose(found_lse, lse, rtol=1e-6, atol=1e-5)  # weights are summed before they are rounded


@pytest.mark.parametrize("block", [None, 32, 100])
def test_the_definition_and_the_library_round_no_weights(block):
    (q, k, v), scales, exact = problem(block)
    truth = crosstile.attention(*exact, causal=True)
    ours = crosstile.attention(q, k, v, causal=True, **scales, out_dtype="float32")
    np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-5)

    def tensors(*arrays):
        return [torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn) for array in arrays]

    for make, each in ((tensors, torch.from_numpy), (lambda *arrays: map(jnp.asarray, arrays), jnp.asarray)):
        kwargs = {name: each(x) if isinstance(x, np.ndarray) else x for name, x in scales.items()}
        out = crosstile.attention(*make(q, k, v), causal=True, **kwargs, out_dtype="float32")
        np.testing.assert_allclose(np.asarray(out), truth, rtol=1e-5, atol=1e-5)


@KERNELS
def test_beside_other_features(kernel):
    (q, k, v), scales, exact = problem(32)
    options = {"softcap": 4.0, "sinks": np.array([0.5, -1.0, 2.0, 0.0]), "window": (40, 3), "dropout": 0.2}
    options |= {"kv_lengths": np.array([90, 40]), "dropout_seed": 5}
    truth = crosstile.attention(*exact, **options)
    out = crosstile.attention(q, k, v, **scales, **options, out_dtype="float32", implementation=kernel)
    assert abs(out - truth).max() < 0.04 * abs(truth).max()
    without = crosstile.attention(*exact, **{**options, "dropout": 0.0})
    assert abs(out - without).max() > 0.2 * abs(truth).max()


def test_results_are_bfloat16_unless_asked_for():
    (q, k, v), scales, _ = problem(None)
    assert crosstile.attention(q, k, v, **scales).dtype == ml_dtypes.bfloat16
    assert crosstile.attention(q, k, v, **scales, out_dtype=np.float16).dtype == np.float16


def test_chips_that_have_it():
    spec = AttentionSpec("float8_e4m3fn", 64, 64)
    for implementation, able in {"triton": ("sm_90", "sm_100", "gfx950"), "pallas": ("v7x",)}.items():
        chips = {
            "triton": ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950"),
            "pallas": ("v4", "v5e", "v5p", "v6e", "v7x"),
        }
        for chip in chips[implementation]:
            reasons = crosstile.supports("attention", implementation, spec, chip)
            assert (reasons == ()) == (chip in able), chip
            assert all(chip in reason and "bfloat16" in reason for reason in reasons)
            assert "no backward" in " ".join(crosstile.supports("attention", implementation, spec, chip, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_scale": np.ones((2, 3), np.float32)}, r"q_scale: got \[2, 3\]; it must be \[batch, heads\] = \[2, 4\]"),
        ({"k_scale": np.ones((2, 2, 4)), "scale_block": 32}, r"k_scale: got \[2, 2, 4\]; it must be .* = \[2, 2, 3\]"),
        ({"scale_block": 0}, r"scale_block: got 0; it must be at least 1 token"),
        ({"out_dtype": "int8"}, r"out_dtype: got int8; it must be bfloat16, float16 or float32"),
    ],
)
def test_errors(change, message):
    (q, k, v), _, _ = problem(None)
    with pytest.raises(ValueError, match=message):
        crosstile.attention(q, k, v, **change)


def test_scales_are_for_float8_alone():
    x = np.ones((1, 2, 1, 4), np.float32)
    with pytest.raises(ValueError, match=r"k_scale: it is for float8_e4m3fn arrays, and q is float32; leave it out"):
        crosstile.attention(x, x, x, k_scale=np.ones((1, 1), np.float32))
    with pytest.raises(TypeError, match=r"a: dtype is float8_e4m3fn; it must be one of float32"):
        crosstile.matmul(np.ones((2, 3), FLOAT8), np.ones((3, 4), FLOAT8))
    tokens, starts = np.ones((3, 1, 4), FLOAT8), np.array([0, 3])
    with pytest.raises(ValueError, match=r"packed sequences cannot be yet"):
        crosstile.varlen_attention(tokens, tokens, tokens, starts, starts, max_seqlen_q=3, max_seqlen_k=3)
