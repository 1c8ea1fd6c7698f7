"""The NumPy definition of grouped_matmul against torch, JAX and finite differences."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from grouped_problems import OPERANDS, Problem
from oracles import assert_equal_in_float64, assert_within, finite_differences

from crosstile.kernels.grouped_matmul import reference
from crosstile.kernels.grouped_matmul.spec import ACTIVATIONS, GroupedMatmulSpec, output_shapes, saving

GATES = (None, *ACTIVATIONS)


def by_definition(problem: Problem, arrays: dict) -> dict:
    """out and the gradients by the reference."""
    inputs = problem.inputs(arrays)
    spec = replace(problem.spec, dtype=arrays["lhs"].dtype.name)
    outputs = reference.forward(spec, *inputs)
    gradients = dict(zip(OPERANDS, reference.backward(spec, inputs, outputs, (arrays["dout"], None)), strict=True))
    assert gradients["group_sizes"] is None
    return {"out": outputs[0], **{f"d{name}": gradients[name] for name in problem.differentiated}}


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_torch_in_float64(activation, batch):
    problem = Problem(activation=activation, batch=batch)
    assert_equal_in_float64(by_definition(problem, problem.exact_arrays), problem.answers())


@pytest.mark.parametrize("activation", [None, "silu"])
def test_is_within_the_rounding_of_ragged_dot(activation):
    """JAX's own op, on rows that are all somebody's."""
    problem = Problem(sizes=(5, 0, 20, 12), activation=activation)
    arrays = {name: array.astype(np.float32) for name, array in problem.exact_arrays.items() if name != "group_sizes"}
    sizes = jnp.asarray(problem.group_sizes[0])

    def loss(lhs, rhs, rhs_up):
        found = jax.lax.ragged_dot(lhs, rhs, sizes, precision="highest")
        if activation:
            found = jax.nn.silu(found) * jax.lax.ragged_dot(lhs, rhs_up, sizes, precision="highest")
        return (found * arrays["dout"][0]).sum()

    theirs = jax.grad(loss, (0, 1, 2))(*(jnp.asarray(arrays[name][0]) for name in OPERANDS[:3]))
    ours = by_definition(problem, {**arrays, "group_sizes": problem.group_sizes})
    for name, gradient in zip(OPERANDS[:3], theirs, strict=True):
        if name in problem.names:
            np.testing.assert_allclose(ours[f"d{name}"][0], gradient, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("activation", GATES)
def test_gradients_by_finite_differences(activation):
    problem = Problem(sizes=(1, 0, 2), tokens=4, k=3, n=2, activation=activation)
    arrays = {name: np.nan_to_num(problem.exact_arrays[name]) for name in problem.names}
    ours = by_definition(problem, problem.exact_arrays)
    dout = np.nan_to_num(problem.exact_arrays["dout"])

    def loss(**arrays):
        spec = GroupedMatmulSpec("float64", activation)
        out = reference.forward(spec, arrays["lhs"], arrays["rhs"], arrays.get("rhs_up"), problem.group_sizes)[0]
        return float((out * dout).sum())

    for name in problem.names:
        differences = finite_differences(loss, arrays, name)
        np.testing.assert_allclose(ours[f"d{name}"], differences, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(sizes=(), tokens=3),
        Problem(sizes=(0, 0), tokens=0),
        Problem(sizes=(0, 0), tokens=4),
        Problem(sizes=(4,), tokens=4, k=0),
        Problem(sizes=(4,), tokens=4, n=0),
        Problem(batch=0),
    ],
    ids=["no groups", "no rows", "nobody's rows", "k 0", "n 0", "no batch"],
)
def test_empty(problem):
    """What nobody sums is 0."""
    for activation in (None, "silu"):
        each = replace(problem, activation=activation)
        assert_equal_in_float64(by_definition(each, each.exact_arrays), each.answers())


def test_sizes_that_cannot_be_are_cut():
    """Below 0 is 0, and rows that lhs does not have are nobody's."""
    lhs, rhs = np.ones((1, 5, 1)), np.arange(1, 5, dtype=float).reshape(1, 4, 1, 1)
    sizes = np.array([[2, -3, 9, 1]])
    out, _ = reference.forward(GroupedMatmulSpec("float64"), lhs, rhs, None, sizes)
    assert out.ravel().tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_narrow_inputs_are_computed_in_float32(activation, dtype):
    problem = Problem(activation=activation, dtype=dtype)
    native = np.dtype(getattr(ml_dtypes, dtype, dtype))
    arrays = {name: array.astype(native) for name, array in problem.exact_arrays.items() if name != "group_sizes"}
    ours = by_definition(problem, {**arrays, "group_sizes": problem.group_sizes})
    assert {result.dtype for result in ours.values()} == {native}
    assert_within(ours, problem.answers(dtype), problem.answers(), dtype)


def test_shapes_are_those_that_the_spec_says():
    problem = Problem(activation="relu")
    inputs = problem.inputs(problem.exact_arrays)
    spec = GroupedMatmulSpec("float64", "relu")
    out, kept = output_shapes(saving(spec), *inputs)
    outputs = reference.forward(saving(spec), *inputs)
    assert [(array.shape, array.dtype.name) for array in outputs] == [out, kept]
    assert output_shapes(spec, *inputs) == (out, None)
    assert reference.forward(spec, *inputs)[1] is None
    plain = GroupedMatmulSpec("float64")
    assert saving(plain) == plain
