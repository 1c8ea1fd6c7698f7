"""Matmul with a quantised weight in NumPy, forward and backward: the definition that every kernel is held to.

The weight is what its codes and scales say, exactly; a is rounded to its own format first where it has one. float64
inputs are then multiplied in float64, all others in float32. The gradient passes the rounding of a as if it were not
there (the straight-through estimator, Bengio et al., arXiv:1308.3432), and the weight has none.
"""

from __future__ import annotations

import numpy as np

from ..tiles.activations import activate, derivative
from ..tiles.formats import FORMATS, dequantized_rows, quantized_rows, weights
from .spec import QuantizedMatmulSpec


def forward(
    spec: QuantizedMatmulSpec,
    a: np.ndarray,
    values: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """out, and the preactivation where the spec asks for it."""
    dtype = _compute_dtype(a)
    w = _weight(spec, (values, scales, zeros), a.shape[2], dtype)
    x = a.astype(dtype)
    if spec.a_format is not None:
        x = dequantized_rows(np, *quantized_rows(np, a, spec.a_format), spec.a_format, dtype)
    z: np.ndarray = x @ w
    if bias is not None:
        z = z + bias.astype(dtype)[:, None, :]
    out = activate(spec.activation, z)
    if residual is not None:
        out = out + residual.astype(dtype)
    return out.astype(spec.out_dtype), (z.astype(a.dtype) if spec.save_preactivation else None)


def backward(
    spec: QuantizedMatmulSpec,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None],
    outputs: tuple[np.ndarray, np.ndarray | None],
    gradients: tuple[np.ndarray, None],
) -> tuple[np.ndarray, None, None, None, np.ndarray | None, np.ndarray | None]:
    """da, nothing for the weight's three arrays, dbias, dresidual; the last two are None where the input was."""
    a, values, scales, zeros, bias, residual = inputs
    dtype = _compute_dtype(a)
    dout = dz = gradients[0].astype(dtype)
    if spec.activation is not None:
        assert outputs[1] is not None, "the backward of an activation reads the saved preactivation"
        dz = dout * derivative(spec.activation, outputs[1].astype(dtype))
    w = _weight(spec, (values, scales, zeros), a.shape[2], dtype)
    da = dz @ w.swapaxes(1, 2)
    return (
        da.astype(a.dtype),
        None,
        None,
        None,
        None if bias is None else dz.sum(axis=1).astype(bias.dtype),
        None if residual is None else dout.astype(residual.dtype),
    )


def _weight(
    spec: QuantizedMatmulSpec, arrays: tuple[np.ndarray, np.ndarray, np.ndarray | None], k: int, dtype: str
) -> np.ndarray:
    w: np.ndarray = weights(
        np, arrays, FORMATS[spec.format], spec.group_size, k, turned=spec.a_format is not None, dtype=dtype
    )
    return w


def _compute_dtype(a: np.ndarray) -> str:
    return "float64" if a.dtype == np.float64 else "float32"
