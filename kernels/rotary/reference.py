"""Rotary position embedding (Su et al., "RoFormer", arXiv:2104.09864) in NumPy: the definition for every kernel.

Pair j of a head at position p turns by the angle `p * frequencies[j]`, a float32 product whatever the inputs are:
models are trained on its rounding. float64 inputs are computed in float64 from there on, all others in float32.
"""

from __future__ import annotations

import numpy as np

from .spec import RotarySpec


def forward(
    spec: RotarySpec, q: np.ndarray, k: np.ndarray | None, positions: np.ndarray, frequencies: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """q and k, rotated."""
    return _rotate(spec, q, positions, frequencies, 1), (
        None if k is None else _rotate(spec, k, positions, frequencies, 1)
    )


def backward(
    spec: RotarySpec,
    inputs: tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray],
    outputs: tuple[np.ndarray, np.ndarray | None],
    gradients: tuple[np.ndarray, np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray | None, None, None]:
    """dq, dk (None where there is no k), and nothing of positions and frequencies."""
    _, k, positions, frequencies = inputs
    dq = _rotate(spec, gradients[0], positions, frequencies, -1)
    if k is None:
        return dq, None, None, None
    if gradients[1] is None:
        return dq, np.zeros_like(k), None, None
    return dq, _rotate(spec, gradients[1], positions, frequencies, -1), None, None


def _rotate(
    spec: RotarySpec, x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, direction: int
) -> np.ndarray:
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    angles = (positions[:, :, None].astype(np.float32) * frequencies[:, None]).astype(dtype)
    cos, sin = (spec.factor * part[:, :, None].astype(dtype) for part in (np.cos(angles), direction * np.sin(angles)))
    half = spec.rotary_dim // 2
    if spec.interleaved:
        first, second = slice(0, spec.rotary_dim, 2), slice(1, spec.rotary_dim, 2)
    else:
        first, second = slice(0, half), slice(half, spec.rotary_dim)
    wide = x.astype(dtype)
    out = wide.copy()
    out[..., first] = wide[..., first] * cos - wide[..., second] * sin
    out[..., second] = wide[..., second] * cos + wide[..., first] * sin
    return out.astype(x.dtype)
