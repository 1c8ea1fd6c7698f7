"""Matmul with its epilogue in NumPy, forward and backward: the definition that every kernel is held to.

float64 inputs are computed in float64, all others in float32. GELU is Hendrycks & Gimpel (arXiv:1606.08415), exact
(`gelu`) and by tanh (`gelu_tanh`); SiLU is `x * sigmoid(x)`.
"""

from __future__ import annotations

from math import erf, pi, sqrt

import numpy as np

from .spec import MatmulSpec

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


def forward(
    spec: MatmulSpec, a: np.ndarray, b: np.ndarray, bias: np.ndarray | None, residual: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """out, and the preactivation where the spec asks for it."""
    dtype = _compute_dtype(a)
    z: np.ndarray = a.astype(dtype) @ b.astype(dtype)
    if bias is not None:
        z = z + bias.astype(dtype)[:, None, :]
    out = activate(spec.activation, z)
    if residual is not None:
        out = out + residual.astype(dtype)
    return out.astype(spec.out_dtype), (z.astype(a.dtype) if spec.save_preactivation else None)


def backward(
    spec: MatmulSpec,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None],
    outputs: tuple[np.ndarray, np.ndarray | None],
    gradients: tuple[np.ndarray, None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """da, db, dbias, dresidual; the last two are None where the input was."""
    a, b, bias, residual = inputs
    dtype = _compute_dtype(a)
    dout: np.ndarray = gradients[0].astype(dtype)
    dz = dout
    if spec.activation is not None:
        assert outputs[1] is not None, "the backward of an activation reads the saved preactivation"
        dz = dout * derivative(spec.activation, outputs[1].astype(dtype))
    da = dz @ b.astype(dtype).swapaxes(1, 2)
    db = a.astype(dtype).swapaxes(1, 2) @ dz
    return (
        da.astype(a.dtype),
        db.astype(b.dtype),
        None if bias is None else dz.sum(axis=1).astype(bias.dtype),
        None if residual is None else dout.astype(residual.dtype),
    )


def _compute_dtype(a: np.ndarray) -> type:
    return np.float64 if a.dtype == np.float64 else np.float32


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return (0.5 * (1 + _erf(x / sqrt(2)))).astype(x.dtype)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _tanh_argument(x: np.ndarray) -> np.ndarray:
    return sqrt(2 / pi) * (x + 0.044715 * x**3)
