"""The NumPy definition of matmul against torch and finite differences."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracles import assert_equal_in_float64, assert_within, finite_differences, matmul_by_torch, rounded

from crosstile.kernels.matmul import reference
from crosstile.kernels.matmul.spec import ACTIVATIONS, MatmulSpec

ALL_ACTIVATIONS = (None, *ACTIVATIONS)
OPERANDS = ("a", "b", "bias", "residual")


def make(rng, batch=2, m=4, k=5, n=3, bias=True, residual=True):
    """float64 arrays by name in canonical form, with the gradient of out."""
    shapes = {"a": (batch, m, k), "b": (batch, k, n), "bias": (batch, n), "residual": (batch, m, n)}
    absent = {name for name, there in (("bias", bias), ("residual", residual)) if not there}
    shapes = {name: shape for name, shape in shapes.items() if name not in absent}
    return {name: rng.standard_normal(shape) for name, shape in {**shapes, "dout": (batch, m, n)}.items()}


def by_definition(arrays, activation=None, dtype="float64", out_dtype=None):
    """out and the gradients by the reference, of arrays already in `dtype`."""
    spec = MatmulSpec(dtype, out_dtype or dtype, activation, save_preactivation=activation is not None)
    inputs = tuple(arrays.get(name) for name in OPERANDS)
    outputs = reference.forward(spec, *inputs)
    gradients = reference.backward(spec, inputs, outputs, (arrays["dout"], None))
    named = {f"d{name}": gradient for name, gradient in zip(OPERANDS, gradients, strict=True)}
    return {"out": outputs[0], **{name: result for name, result in named.items() if result is not None}}


def by_torch(arrays, activation, dtype="float64"):
    arrays = {**arrays, "bias": arrays["bias"][:, None]} if "bias" in arrays else arrays
    results = matmul_by_torch(**arrays, activation=activation, dtype=dtype)
    return {**results, "dbias": results["dbias"][:, 0]} if "bias" in arrays else results


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_equals_torch_in_float64(rng, activation, bias, residual):
    arrays = make(rng, bias=bias, residual=residual)
    assert_equal_in_float64(by_definition(arrays, activation), by_torch(arrays, activation))


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
@pytest.mark.parametrize("name", OPERANDS)
def test_gradients_by_finite_differences(rng, activation, name):
    arrays = make(rng, batch=2, m=2, k=3, n=2)
    dout = arrays.pop("dout")

    def loss(a, b, bias, residual):
        return float(
            (reference.forward(MatmulSpec("float64", "float64", activation), a, b, bias, residual)[0] * dout).sum()
        )

    ours = by_definition({**arrays, "dout": dout}, activation)[f"d{name}"]
    np.testing.assert_allclose(ours, finite_differences(loss, arrays, name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("batch", "m", "k", "n"), [(1, 2, 0, 3), (1, 0, 4, 3), (1, 2, 4, 0), (0, 2, 4, 3)])
def test_empty(rng, batch, m, k, n):
    """An empty sum is 0, so that with k = 0 the bias and the residual remain."""
    arrays = make(rng, batch, m, k, n)
    assert_equal_in_float64(by_definition(arrays, "silu"), by_torch(arrays, "silu"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
def test_narrow_inputs_are_computed_in_float32(rng, activation, dtype):
    arrays = {name: rounded(array, dtype) for name, array in make(rng, 1, 12, 20, 9).items()}
    native = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    ours = by_definition({name: array.astype(native) for name, array in arrays.items()}, activation, dtype)
    assert {result.dtype for result in ours.values()} == {np.dtype(native)}
    assert_within(ours, by_torch(arrays, activation, dtype), by_torch(arrays, activation), dtype)


def test_out_dtype_is_not_rounded_through_the_inputs_dtype(rng):
    arrays = {name: rounded(array, "float16") for name, array in make(rng, 1, 6, 7, 5).items()}
    ours = by_definition(
        {name: array.astype(np.float16) for name, array in arrays.items()}, dtype="float16", out_dtype="float32"
    )
    assert ours["out"].dtype == np.float32
    exact = by_torch(arrays, None)
    assert_within({"out": ours["out"]}, by_torch(arrays, None, "float32"), exact, "float32")
