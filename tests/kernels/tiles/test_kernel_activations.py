"""The activations of the kernels and their derivatives, number by number: errors at most twice those of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from oracles import ACTIVATIONS as OF_TORCH

from crosstile.kernels.matmul.spec import ACTIVATIONS
from crosstile.kernels.tiles import pallas_activations, triton_activations
from crosstile.kernels.tiles.launch import Launch, Plan, contiguous
from crosstile.kernels.tiles.triton_interpreter import run

X = np.linspace(-6, 6, 4096, dtype=np.float32)
FLOOR = 2.0**-23


@triton.jit
def _kernel(x, value, slope, NAME: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    given = tl.load(x + at)
    tl.store(value + at, triton_activations.activate(given, NAME))
    tl.store(slope + at, triton_activations.derivative(given, NAME))


def by_triton(name: str) -> tuple[np.ndarray, np.ndarray]:
    array = contiguous(X.shape, "float32")
    launch = Launch(_kernel, (1,), ("x",), ("value", "slope"), {}, {"NAME": name, "COUNT": X.size})
    value, slope = run(Plan((launch,), {"x": array}, {"value": array, "slope": array}), {"x": X})
    return value, slope


def by_pallas(name: str) -> tuple[np.ndarray, np.ndarray]:
    import jax.numpy as jnp

    x = jnp.asarray(X)
    found = pallas_activations.activate(name, x), pallas_activations.derivative(name, x)
    return np.asarray(found[0]), np.asarray(found[1])


def by_torch(name: str, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    x = torch.tensor(X, dtype=dtype, requires_grad=True)
    value = OF_TORCH[name](x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach().double().numpy(), slope.double().numpy()


@pytest.mark.parametrize("by", [by_triton, by_pallas])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_are_as_exact_as_torch(by, name):
    exact, own = by_torch(name, torch.float64), by_torch(name, torch.float32)
    for ours, theirs, true in zip(by(name), own, exact, strict=True):
        allowed = 2 * np.abs(theirs - true).max() + FLOOR * np.abs(true).max()
        assert np.abs(ours - true).max() <= allowed


@pytest.mark.parametrize("by", [by_triton, by_pallas])
def test_the_derivative_of_gelu_tanh_does_not_cancel(by):
    (_, slope), (_, exact) = by("gelu_tanh"), by_torch("gelu_tanh", torch.float64)
    assert np.abs(slope - exact).max() < 4 * FLOOR
