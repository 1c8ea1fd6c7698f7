"""Matmul with its epilogue in NumPy, forward and backward: the definition that every kernel is held to.

float64 inputs are computed in float64, all others in float32.
"""

from __future__ import annotations

import numpy as np

from ..tiles.activations import activate, derivative
from .spec import MatmulSpec


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
