"""The NumPy definition of glu_matmul against torch, JAX, finite differences and the formulas."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from glu_problems import OPERANDS, Problem
from oracles import assert_equal_in_float64, assert_within, finite_differences

from crosstile.kernels.glu_matmul import reference
from crosstile.kernels.glu_matmul.spec import ACTIVATIONS, GluMatmulSpec, output_shapes, saving


def by_definition(problem: Problem, arrays: dict) -> dict:
    """out and the gradients by the reference."""
    inputs = tuple(arrays[name] for name in OPERANDS)
    spec = replace(problem.spec, dtype=arrays["x"].dtype.name)
    outputs = reference.forward(spec, *inputs)
    gradients = reference.backward(spec, inputs, outputs, (arrays["dout"], None))
    return {"out": outputs[0], **{f"d{name}": result for name, result in zip(OPERANDS, gradients, strict=True)}}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_torch_in_float64(activation):
    problem = Problem(activation=activation)
    assert_equal_in_float64(by_definition(problem, problem.exact_arrays), problem.answers())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_within_the_rounding_of_jax(activation):
    """JAX in float32, whose own activations and derivatives these are."""
    bend = {"gelu": lambda z: jax.nn.gelu(z, approximate=False), "gelu_tanh": jax.nn.gelu}
    act = bend.get(activation) or getattr(jax.nn, activation)
    problem = Problem(activation=activation)
    arrays = {name: array.astype(np.float32) for name, array in problem.exact_arrays.items()}

    def loss(x, w_gate, w_up):
        return (act(x @ w_gate) * (x @ w_up) * arrays["dout"]).sum()

    with jax.default_matmul_precision("highest"):
        theirs = jax.grad(loss, (0, 1, 2))(*(jnp.asarray(arrays[name]) for name in OPERANDS))
    ours = by_definition(problem, arrays)
    for name, gradient in zip(OPERANDS, theirs, strict=True):
        np.testing.assert_allclose(ours[f"d{name}"], gradient, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", OPERANDS)
def test_gradients_by_finite_differences(activation, name):
    problem = Problem(m=2, k=3, n=2, activation=activation)
    arrays = dict(problem.exact_arrays)
    dout = arrays.pop("dout")

    def loss(x, w_gate, w_up):
        return float((reference.forward(GluMatmulSpec("float64", activation), x, w_gate, w_up)[0] * dout).sum())

    ours = by_definition(problem, problem.exact_arrays)[f"d{name}"]
    np.testing.assert_allclose(ours, finite_differences(loss, arrays, name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sizes", [(2, 0, 3, 1), (0, 4, 3, 1), (2, 4, 0, 1), (2, 4, 3, 0)], ids=str)
def test_empty(sizes):
    """An empty sum is 0, and so is what it gates."""
    problem = Problem(*sizes)
    assert_equal_in_float64(by_definition(problem, problem.exact_arrays), problem.answers())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_narrow_inputs_are_computed_in_float32(activation, dtype):
    problem = Problem(12, 20, 9, activation=activation, dtype=dtype)
    native = np.dtype(getattr(ml_dtypes, dtype, dtype))
    ours = by_definition(problem, {name: array.astype(native) for name, array in problem.exact_arrays.items()})
    assert {result.dtype for result in ours.values()} == {native}
    assert_within(ours, problem.answers(dtype), problem.answers(), dtype)


def test_shapes_are_those_that_the_spec_says():
    problem = Problem(m=3, k=4, n=5)
    inputs = tuple(problem.exact_arrays[name] for name in OPERANDS)
    spec = GluMatmulSpec("float64", "silu")
    out, kept = output_shapes(saving(spec), *inputs)
    outputs = reference.forward(saving(spec), *inputs)
    assert [(array.shape, array.dtype.name) for array in outputs] == [out, kept]
    assert output_shapes(spec, *inputs) == (out, None)
    assert reference.forward(spec, *inputs)[1] is None
