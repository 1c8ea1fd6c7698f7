"""The NumPy activations and their derivatives, against their formulas one number at a time."""

from __future__ import annotations

from math import erf, exp, pi, sqrt, tanh

import numpy as np
import pytest

from crosstile.kernels.matmul.spec import ACTIVATIONS
from crosstile.kernels.tiles.activations import activate, derivative

FORMULAS = {
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "gelu": (
        lambda x: x * (1 + erf(x / sqrt(2))) / 2,
        lambda x: (1 + erf(x / sqrt(2))) / 2 + x * exp(-x * x / 2) / sqrt(2 * pi),
    ),
    "gelu_tanh": (lambda x: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), None),
    "silu": (lambda x: x / (1 + exp(-x)), lambda x: 1 / (1 + exp(-x)) + x * exp(-x) / (1 + exp(-x)) ** 2),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_by_their_formulas(activation):
    x = np.linspace(-6, 6, 96)
    value, slope = FORMULAS[activation]
    np.testing.assert_allclose(activate(activation, x), [value(each) for each in x], rtol=1e-12, atol=1e-15)
    if slope is not None:
        np.testing.assert_allclose(derivative(activation, x), [slope(each) for each in x], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_by_differences(activation):
    x, step = np.linspace(-6, 6, 96), 1e-6
    difference = (activate(activation, x + step) - activate(activation, x - step)) / (2 * step)
    np.testing.assert_allclose(derivative(activation, x), difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_far_out_they_are_the_limit(activation, value):
    x = np.array([value])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(activate(activation, x), max(value, 0.0))
        np.testing.assert_array_equal(derivative(activation, x), float(value > 0))


def test_relu_at_zero_has_the_gradient_zero():
    np.testing.assert_array_equal(derivative("relu", np.zeros(3)), 0)


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
def test_the_precision_is_that_of_the_array(name):
    x = np.linspace(-2, 2, 5, dtype=np.float32)
    assert activate(name, x).dtype == derivative(name, x).dtype == np.float32
