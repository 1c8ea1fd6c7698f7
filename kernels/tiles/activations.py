"""Activations and their derivatives in NumPy, in the precision of the array: what the kernels' are held to.

GELU is Hendrycks & Gimpel (arXiv:1606.08415), exact (`gelu`) and by tanh (`gelu_tanh`); SiLU is `x * sigmoid(x)`.
"""

from __future__ import annotations

from math import erf, pi, sqrt

import numpy as np

_erf = np.vectorize(erf, otypes=[np.float64])


def activate(name: str | None, x: np.ndarray) -> np.ndarray:
    """The activation of x, elementwise."""
    if name is None:
        return x
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return x * _normal_cdf(x)
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(_tanh_argument(x)))
    return x * _sigmoid(x)


def derivative(name: str | None, x: np.ndarray) -> np.ndarray:
    """The derivative of the activation at x, elementwise; relu's is 0 at 0."""
    if name is None:
        return np.ones_like(x)
    if name == "relu":
        return (x > 0).astype(x.dtype)
    if name == "gelu":
        return _normal_cdf(x) + x * np.exp(-0.5 * x * x) / sqrt(2 * pi)
    if name == "gelu_tanh":
        tanh = np.tanh(_tanh_argument(x))
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x)
    sigmoid = _sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return (0.5 * (1 + _erf(x / sqrt(2)))).astype(x.dtype)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _tanh_argument(x: np.ndarray) -> np.ndarray:
    return sqrt(2 / pi) * (x + 0.044715 * x**3)
