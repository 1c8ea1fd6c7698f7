"""Formats of quantised weights: what codes stand for, how far they are from what they were, and how they are packed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from crosstile.kernels.tiles.formats import (
    FORMATS,
    MX_GROUP,
    code_values,
    dequantized,
    dequantized_rows,
    e8m0_value,
    error_bound,
    packed_pairs,
    packed_rows,
    quantized,
    quantized_rows,
    stored,
    stored_shapes,
    swapped,
    unpacked_pairs,
    unpacked_rows,
    weights,
)

CASES = [
    *[("int8", group, zeros) for group in (0, 32, 128) for zeros in (False, True)],
    *[("int4", group, zeros) for group in (0, 32, 64) for zeros in (False, True)],
    ("float8_e4m3fn", 0, False),
    ("float8_e4m3fn", 64, False),
    ("mxfp8", 32, False),
    ("mxfp4", 32, False),
]


def spread_weight(rng, k, n, lead=()):
    """Columns of very different sizes."""
    return rng.standard_normal((*lead, k, n)) * np.exp(3 * rng.standard_normal((*lead, 1, n)))


@pytest.mark.parametrize(("name", "group_size", "zeros"), CASES)
@pytest.mark.parametrize(("k", "n"), [(300, 33), (1, 5), (33, 1), (64, 8)])
def test_a_weight_is_off_by_the_bound_at_most(name, group_size, zeros, k, n, rng):
    form, w = FORMATS[name], spread_weight(rng, k, n, (2,))
    codes, scales, zero = quantized(np, w, form, group_size, zeros)
    found = dequantized(np, codes, scales, zero, form, group_size, "float64")
    bound = error_bound(np, w, scales, form, group_size)
    assert (np.abs(found - w) <= bound).all()
    if k == 300:  # and nearly reaches it, so that no tighter bound would hold
        assert (np.abs(found - w) / bound).max() > 0.9


@pytest.mark.parametrize(("name", "group_size", "zeros"), CASES)
def test_a_product_is_off_by_the_bound_at_most(name, group_size, zeros, rng):
    form, w, a = FORMATS[name], spread_weight(rng, 200, 9), rng.standard_normal((7, 200))
    codes, scales, zero = quantized(np, w, form, group_size, zeros)
    found = a @ dequantized(np, codes, scales, zero, form, group_size, "float64")
    assert (np.abs(found - a @ w) <= np.abs(a) @ error_bound(np, w, scales, form, group_size)).all()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "mxfp8"])
def test_activations_have_the_same_bounds(kind, rng):
    a, form = swapped(spread_weight(rng, 100, 7)), FORMATS[kind]
    codes, scales = quantized_rows(np, a, kind)
    assert codes.shape == a.shape
    group_size = MX_GROUP if form.block_scales else 0
    bound = swapped(error_bound(np, swapped(a), swapped(scales), form, group_size))
    assert (np.abs(dequantized_rows(np, codes, scales, kind, "float64") - a) <= bound).all()


def test_every_code_of_four_bits_survives_packing(rng):
    for k in (0, 1, 2, 127, 128, 129, 255, 256, 257, 600):
        codes = rng.integers(0, 16, (2, k, 5)).astype(np.uint8)
        rows = packed_rows(np, codes)
        assert rows.shape == (2, -(-k // 256) * 128, 5)
        np.testing.assert_array_equal(unpacked_rows(np, rows, k), codes)
        pairs = packed_pairs(np, swapped(codes))
        assert pairs.shape == (2, 5, -(-k // 2))
        np.testing.assert_array_equal(unpacked_pairs(np, pairs, k), swapped(codes))
    every = np.arange(16, dtype=np.uint8).repeat(16)[:, None] | np.zeros((1, 3), np.uint8)
    np.testing.assert_array_equal(unpacked_rows(np, packed_rows(np, every), 256), every)


def test_where_codes_of_four_bits_lie():
    codes = np.arange(256, dtype=np.uint8)[:, None] % 16
    rows = packed_rows(np, codes)
    assert rows[5, 0] == 5 | (133 % 16) << 4
    assert packed_pairs(np, swapped(codes))[0, 3] == 6 | 7 << 4


@pytest.mark.parametrize(("name", "group_size", "zeros"), CASES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("k", "n"), [(0, 3), (1, 1), (100, 3), (257, 5)])
def test_what_is_stored_is_what_was_quantised(name, group_size, zeros, turned, k, n, rng):
    if turned and (zeros or (group_size and not FORMATS[name].block_scales)):
        pytest.skip("activations have a scale a column")
    form, w = FORMATS[name], spread_weight(rng, k, n, (2,))
    arrays = stored(np, w, form, group_size, zeros, turned)
    shapes = stored_shapes(form, group_size, k, n, turned)
    assert (arrays[0].shape[1:], arrays[1].shape[1:]) == shapes
    assert arrays[0].dtype.name == form.storage
    assert (arrays[0] if turned else swapped(arrays[0])).flags.c_contiguous  # k innermost
    again = weights(np, arrays, form, group_size, k, turned, "float64")
    np.testing.assert_array_equal(
        again, dequantized(np, *quantized(np, w, form, group_size, zeros), form, group_size, "float64")
    )


def test_floats_are_those_of_ml_dtypes():
    bytes_ = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(e8m0_value(np, bytes_), bytes_.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    four = np.arange(16, dtype=np.uint8)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # the specification's table
    expected = np.array([*positive, *(-value for value in positive)], np.float32)
    np.testing.assert_array_equal(code_values(np, four, FORMATS["mxfp4"]), expected)


@pytest.mark.parametrize(("name", "kind"), [("mxfp8", "float8_e4m3fn"), ("mxfp4", "float4_e2m1fn")])
def test_codes_are_rounded_to_the_nearest_even(name, kind, rng):
    """Against ml_dtypes, on all midpoints too: a group whose largest is that of the format has the scale 1."""
    form = FORMATS[name]
    kind = np.dtype(getattr(ml_dtypes, kind))
    values = np.unique(np.abs(np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)))
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) if name == "mxfp4" else values[np.isfinite(values)]
    middles = (values[1:] + values[:-1]) / 2
    tried = np.concatenate([values, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9), -middles])
    tried = np.concatenate([tried, rng.uniform(-form.largest, form.largest, 500)]).astype(np.float32)
    w = np.stack([tried, *[np.full_like(tried, form.largest)] * 31])
    codes, scales, _ = quantized(np, w, form, 32)
    assert (scales == 127).all()
    found = dequantized(np, codes, scales, None, form, 32)[0]
    np.testing.assert_array_equal(found, tried.astype(kind).astype(np.float32))


@pytest.mark.parametrize(("name", "group_size", "zeros"), CASES)
@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_group_alone(name, group_size, zeros, spoilt, rng):
    form, w = FORMATS[name], rng.standard_normal((150, 4))
    w[70, 2] = spoilt
    found = dequantized(np, *quantized(np, w, form, group_size, zeros), form, group_size)
    group = slice(70 // group_size * group_size, (70 // group_size + 1) * group_size) if group_size else slice(None)
    bad = np.zeros(w.shape, bool)
    bad[group, 2] = True
    np.testing.assert_array_equal(np.isnan(found), bad)


@pytest.mark.parametrize(("name", "group_size", "zeros"), CASES)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e30])
def test_zeros_and_the_ends_of_float32(name, group_size, zeros, size):
    form, w = FORMATS[name], np.full((40, 2), size, np.float32)
    w[1] *= -1
    codes, scales, zero = quantized(np, w, form, group_size, zeros)
    found = dequantized(np, codes, scales, zero, form, group_size, "float64")
    assert (np.abs(found - w) <= error_bound(np, w, scales, form, group_size)).all()
    if not size:
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("name", "group_size", "zeros"), [CASES[3], CASES[8], CASES[9], *CASES[13:]])
def test_frameworks_agree_to_the_bit(framework, name, group_size, zeros, rng):
    if framework == "torch":
        xp = pytest.importorskip("torch")
        there, back = xp.from_numpy, lambda array: array.float().numpy()
    else:
        xp = pytest.importorskip("jax").numpy
        there, back = xp.asarray, lambda array: np.asarray(array.astype("float32"))
    form, w = FORMATS[name], spread_weight(rng, 290, 6).astype(np.float32)
    ours, theirs = stored(xp, there(w), form, group_size, zeros), stored(np, w, form, group_size, zeros)
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(back(x), y.astype(np.float32))
    k = w.shape[0]
    np.testing.assert_array_equal(
        back(weights(xp, ours, form, group_size, k, False, "float32")),
        weights(np, theirs, form, group_size, k, False, "float32"),
    )
