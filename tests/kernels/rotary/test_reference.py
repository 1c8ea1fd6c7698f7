"""The NumPy definition of rotary against products of complex numbers, finite differences and what it is for."""

from __future__ import annotations

from math import cos, sin

import ml_dtypes
import numpy as np
import pytest
from oracles import assert_equal_in_float64, assert_within, finite_differences
from rotary_problems import FLOATS, OPERANDS, Problem

from crosstile.kernels.rotary import reference
from crosstile.kernels.rotary.spec import RotarySpec

OPTIONS = [{}, {"interleaved": True}, {"rotary_dim": 6}, {"rotary_dim": 6, "interleaved": True, "factor": 1.25}]


def by_definition(problem, arrays):
    """The results and the gradients, of arrays already in the problem's dtype."""
    inputs = tuple(arrays.get(name) for name in OPERANDS)
    outputs = reference.forward(problem.spec, *inputs)
    arriving = tuple(arrays.get(name) for name in ("drotated_q", "drotated_k"))
    gradients = reference.backward(problem.spec, inputs, outputs, arriving)
    results = dict(zip(("rotated_q", "rotated_k", "dq", "dk"), (*outputs, *gradients[:2]), strict=True))
    return {name: result for name, result in results.items() if result is not None}


@pytest.mark.parametrize("k_heads", [0, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "half")
def test_equals_products_of_complex_numbers(options, k_heads):
    problem = Problem(dtype="float64", k_heads=k_heads, **options)
    assert_equal_in_float64(by_definition(problem, problem.exact_arrays), problem.answers())


@pytest.mark.parametrize(("interleaved", "first", "second"), [(False, 1, 3), (True, 2, 3)])
def test_one_pair_by_its_formula(interleaved, first, second):
    x = np.arange(1.0, 6.0)
    spec = RotarySpec("float64", 5, 1, 4, interleaved)
    frequencies = np.array([[1.0, 0.25]], np.float32)
    out, _ = reference.forward(spec, x.reshape(1, 1, 1, 5), None, np.array([[8]]), frequencies)
    angle = 8 * 0.25
    np.testing.assert_allclose(out[0, 0, 0, first], x[first] * cos(angle) - x[second] * sin(angle), rtol=1e-14)
    np.testing.assert_allclose(out[0, 0, 0, second], x[second] * cos(angle) + x[first] * sin(angle), rtol=1e-14)
    assert out[0, 0, 0, 4] == 5


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(rng, interleaved):
    """What rotary is for: q at p times k at p + d is the same wherever p is."""
    spec = RotarySpec("float64", 8, 2, 8, interleaved)
    frequencies = np.array([[1.0, 0.5, 0.25, 0.125]], np.float32)  # of which products with integers are exact
    q, k = (np.tile(rng.standard_normal(8), (1, 1, 1, 1)) for _ in range(2))
    products = []
    for place in (0, 1, 100):
        (rotated_q, _), (rotated_k, _) = (
            reference.forward(spec, x, None, np.array([[at]]), frequencies) for x, at in ((q, place), (k, place + 7))
        )
        products.append((rotated_q * rotated_k).sum())
    np.testing.assert_allclose(products, products[0], rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "half")
def test_gradients_by_finite_differences(options):
    problem = Problem(length=2, batch=1, q_heads=1, k_heads=1, head_dim=8, dtype="float64", **options)
    arrays = problem.exact_arrays
    dq, dk = arrays["drotated_q"], arrays["drotated_k"]

    def loss(q, k):
        found = reference.forward(problem.spec, q, k, arrays["positions"], arrays["frequencies"])
        return float((found[0] * dq).sum() + (found[1] * dk).sum())

    ours = by_definition(problem, arrays)
    inputs = {"q": arrays["q"], "k": arrays["k"]}
    for name in inputs:
        np.testing.assert_allclose(ours[f"d{name}"], finite_differences(loss, inputs, name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "half")
def test_narrow_inputs_are_computed_in_float32(options, dtype):
    problem = Problem(dtype=dtype, **options)
    native = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    arrays = {name: x.astype(native) if name in FLOATS else x for name, x in problem.exact_arrays.items()}
    ours = by_definition(problem, arrays)
    assert {result.dtype for result in ours.values()} == {np.dtype(native)}
    assert_within(ours, problem.answers(dtype), problem.answers(), dtype)


def test_without_a_gradient_of_k():
    problem = Problem(dtype="float64")
    arrays = {name: array for name, array in problem.exact_arrays.items() if name != "drotated_k"}
    np.testing.assert_array_equal(by_definition(problem, arrays)["dk"], np.zeros_like(arrays["k"]))


@pytest.mark.parametrize(("batch", "length", "q_heads"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_empty(batch, length, q_heads):
    problem = Problem(batch=batch, length=length, q_heads=q_heads, dtype="float64")
    assert_equal_in_float64(by_definition(problem, problem.exact_arrays), problem.answers())
