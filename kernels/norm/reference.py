"""RMS norm (Zhang & Sennrich, arXiv:1910.07467) and layer norm (Ba et al., arXiv:1607.06450) in NumPy.

This is the definition that every kernel is held to. float64 inputs are computed in float64, all others in float32;
the sum with the residual is rounded to x's dtype before it is normalised, as a model that adds first does.
"""

from __future__ import annotations

import numpy as np

from .spec import NormSpec


def forward(
    spec: NormSpec, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, residual: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """y, and the sum that it normalises where there is a residual."""
    dtype = _compute_dtype(x)
    summed = x if residual is None else (x.astype(dtype) + residual.astype(dtype)).astype(x.dtype)
    normalised, _ = _normalise(spec, summed.astype(dtype))
    y = normalised * _scale(spec, weight)
    if bias is not None:
        y = y + bias.astype(dtype)[:, None]
    return y.astype(x.dtype), (None if residual is None else summed)


def backward(
    spec: NormSpec,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None],
    outputs: tuple[np.ndarray, np.ndarray | None],
    gradients: tuple[np.ndarray, np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """dx, dweight, dbias, dresidual; the last two are None where the input was. dresidual equals dx."""
    x, weight, bias, residual = inputs
    dy, dsummed = gradients
    dtype = _compute_dtype(x)
    summed = x if residual is None else outputs[1]
    assert summed is not None, "a forward with a residual returns the sum"
    normalised, factor = _normalise(spec, summed.astype(dtype))
    wide: np.ndarray = dy.astype(dtype)
    g = wide * _scale(spec, weight)
    dx = g - normalised * _mean(g * normalised)
    if spec.centers:
        dx = dx - _mean(g)
    dx = dx * factor
    if dsummed is not None:
        dx = dx + dsummed.astype(dtype)
    return (
        dx.astype(x.dtype),
        (wide * normalised).sum(axis=1).astype(weight.dtype),
        None if bias is None else wide.sum(axis=1).astype(bias.dtype),
        None if residual is None else dx.astype(residual.dtype),
    )


def _normalise(spec: NormSpec, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows with a mean square (or a variance) of 1, and the factor [batch, rows, 1] that does it."""
    if spec.centers:
        rows = rows - _mean(rows)
    factor = 1 / np.sqrt(_mean(rows * rows) + rows.dtype.type(spec.eps))
    return rows * factor, factor


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows.sum(axis=-1, keepdims=True) / rows.dtype.type(max(1, rows.shape[-1]))


def _scale(spec: NormSpec, weight: np.ndarray) -> np.ndarray:
    """What normalised rows are multiplied by, [batch, 1, hidden]."""
    scale: np.ndarray = weight.astype(_compute_dtype(weight))[:, None]
    return 1 + scale if spec.zero_centered else scale


def _compute_dtype(array: np.ndarray) -> type:
    return np.float64 if array.dtype == np.float64 else np.float32
