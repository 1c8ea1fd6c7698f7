"""The NumPy definition of a matmul with a quantised weight, in float64, against torch's autograd."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import assert_equal_in_float64, finite_differences
from quantized_problems import KINDS, WEIGHT, Problem, named_gradients

from crosstile.kernels.matmul import reference as matmul
from crosstile.kernels.matmul.spec import MatmulSpec
from crosstile.kernels.quantized_matmul import reference
from crosstile.kernels.quantized_matmul.spec import ACTIVATIONS, INPUTS


def defined(problem: Problem) -> dict:
    arrays = {**problem.exact_arrays, **problem.weight}
    inputs = tuple(arrays.get(name) for name in INPUTS)
    outputs = reference.forward(problem.spec, *inputs)
    gradients = reference.backward(problem.spec, inputs, outputs, (arrays["dout"], None))
    return {"out": outputs[0], **named_gradients(gradients)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    problem = Problem(kind, dtype="float64")
    assert_equal_in_float64(defined(problem), problem.answers())


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_epilogues(activation, bias, residual):
    problem = Problem(k=64, bias=bias, residual=residual, activation=activation, dtype="float64")
    assert_equal_in_float64(defined(problem), problem.answers())


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (0, 33, 5), (3, 0, 5), (3, 33, 0), (5, 257, 2)])
@pytest.mark.parametrize("kind", ["int4-128-zeros", "mxfp4", "int8-int8", "mxfp4-mxfp8"])
def test_sizes(kind, m, k, n):
    problem = Problem(kind, m, k, n, dtype="float64")
    assert_equal_in_float64(defined(problem), problem.answers())


def test_it_is_matmul_of_what_the_weight_stands_for():
    problem = Problem("int8-64-zeros", dtype="float64")
    arrays = problem.exact_arrays
    spec = MatmulSpec("float64", "float64", problem.activation)
    out, _ = matmul.forward(spec, arrays["a"], problem.exact_weight, arrays["bias"], arrays["residual"])
    np.testing.assert_allclose(defined(problem)["out"], out, rtol=1e-13)


def test_da_by_finite_differences():
    problem = Problem("int4-32", m=2, k=40, n=3, batch=1, dtype="float64")
    arrays = problem.exact_arrays

    def loss(**arrays: np.ndarray) -> float:
        inputs = tuple({**arrays, **problem.weight}.get(name) for name in INPUTS)
        return float((reference.forward(problem.spec, *inputs)[0] * arrays["dout"]).sum())

    found = finite_differences(loss, arrays, "a")
    np.testing.assert_allclose(defined(problem)["da"], found, rtol=1e-6, atol=1e-8 * np.abs(found).max())


def test_the_weight_has_no_gradient():
    assert not {f"d{name}" for name in WEIGHT} & set(defined(Problem(k=33, dtype="float64")))
