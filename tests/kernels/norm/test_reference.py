"""The NumPy definition of the norms against torch, JAX and finite differences."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from norm_problems import OPERANDS, Problem
from oracles import assert_equal_in_float64, assert_within, finite_differences

from crosstile.kernels.norm import reference

OPTIONS = [
    {},
    {"residual": True},
    {"zero_centered": True},
    {"kind": "layer"},
    {"kind": "layer", "bias": True, "residual": True},
]


def by_definition(problem, arrays):
    """The results and the gradients, of arrays already in the problem's dtype."""
    inputs = tuple(arrays.get(name) for name in OPERANDS)
    outputs = reference.forward(problem.spec, *inputs)
    gradients = reference.backward(problem.spec, inputs, outputs, (arrays["dy"], arrays.get("dsummed")))
    results = dict(zip(("y", "summed"), outputs, strict=True))
    results |= {f"d{name}": gradient for name, gradient in zip(OPERANDS, gradients, strict=True)}
    return {name: result for name, result in results.items() if result is not None}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "rms")
def test_equals_torch_in_float64(options):
    problem = Problem(rows=5, dtype="float64", **options)
    assert_equal_in_float64(by_definition(problem, problem.exact_arrays), problem.answers())


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_equals_jax_standardize(kind):
    """jax.nn.standardize is layer norm without weight and bias; the root mean square is written out."""
    jax = pytest.importorskip("jax")
    problem = Problem(kind=kind, rows=5, batch=1, residual=False)
    x, weight = (problem.exact_arrays[name].astype("float32") for name in ("x", "weight"))
    y, _ = reference.forward(problem.spec, x, weight, None, None)
    if kind == "layer":
        expected = jax.nn.standardize(x, axis=-1, epsilon=problem.eps) * weight[:, None]
    else:
        expected = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + problem.eps) * weight[:, None]
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "rms")
def test_gradients_by_finite_differences(options):
    problem = Problem(rows=2, hidden=5, batch=2, dtype="float64", **options)
    arrays = problem.exact_arrays
    dy, dsummed = arrays["dy"], arrays.get("dsummed")
    inputs = {name: arrays[name] for name in OPERANDS if name in arrays}

    def loss(**inputs):
        y, summed = reference.forward(problem.spec, *(inputs.get(name) for name in OPERANDS))
        return float((y * dy).sum() + (0 if summed is None else (summed * dsummed).sum()))

    ours = by_definition(problem, arrays)
    for name in inputs:
        np.testing.assert_allclose(ours[f"d{name}"], finite_differences(loss, inputs, name), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "rms")
def test_narrow_inputs_are_computed_in_float32(options, dtype):
    problem = Problem(dtype=dtype, **options)
    native = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    ours = by_definition(problem, {name: array.astype(native) for name, array in problem.exact_arrays.items()})
    assert {result.dtype for result in ours.values()} == {np.dtype(native)}
    assert_within(ours, problem.answers(dtype), problem.answers(), dtype)


def test_what_is_normalised_is_the_rounded_sum():
    """2048 + 1 is 2048 in float16."""
    problem = Problem(rows=1, hidden=2, batch=1, dtype="float16", eps=0.0, residual=True)
    x, residual = np.array([[[2048, 1]]], np.float16), np.array([[[1, 1]]], np.float16)
    y, summed = reference.forward(problem.spec, x, np.ones((1, 2), np.float16), None, residual)
    np.testing.assert_array_equal(summed, [[[2048, 2]]])
    np.testing.assert_array_equal(y, (summed / np.sqrt((2048**2 + 2**2) / 2)).astype(np.float16))


@pytest.mark.parametrize(("batch", "rows", "hidden"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(batch, rows, hidden):
    problem = Problem("layer", rows, hidden, batch, bias=True, residual=True, dtype="float64")
    assert_equal_in_float64(by_definition(problem, problem.exact_arrays), problem.answers())


def test_a_row_of_zeros_gives_the_bias_and_finite_gradients():
    problem = Problem("layer", rows=1, hidden=4, batch=1, bias=True)
    arrays = {name: array.astype("float32") for name, array in problem.exact_arrays.items()}
    ours = by_definition(problem, arrays | {"x": np.zeros((1, 1, 4), np.float32)})
    np.testing.assert_array_equal(ours["y"][:, 0], arrays["bias"])
    assert all(np.isfinite(result).all() for result in ours.values())
