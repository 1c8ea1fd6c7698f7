"""GLU variants (Shazeer, arXiv:2002.05202) in NumPy, forward and backward: the definition of glu_matmul.

float64 inputs are computed in float64, all others in float32.
"""

from __future__ import annotations

import numpy as np

from ..tiles.activations import activate, derivative
from .spec import GluMatmulSpec


def forward(
    spec: GluMatmulSpec, x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """out, and the preactivations where the spec asks for them."""
    wide = _widened(x, w_gate, w_up)
    gate, up = wide[0] @ wide[1], wide[0] @ wide[2]
    out = activate(spec.activation, gate) * up
    kept = np.stack((gate, up), axis=1).astype(x.dtype) if spec.save_preactivations else None
    return out.astype(x.dtype), kept


def backward(
    spec: GluMatmulSpec,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    outputs: tuple[np.ndarray, np.ndarray | None],
    gradients: tuple[np.ndarray, None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dw_gate, dw_up."""
    assert outputs[1] is not None, "a backward reads the saved preactivations"
    x, w_gate, w_up, dout, preactivations = _widened(*inputs, gradients[0], outputs[1])
    gate, up = preactivations.swapaxes(0, 1)
    dz_gate = dout * up * derivative(spec.activation, gate)
    dz_up = dout * activate(spec.activation, gate)
    dx = dz_gate @ w_gate.swapaxes(1, 2) + dz_up @ w_up.swapaxes(1, 2)
    dw_gate, dw_up = x.swapaxes(1, 2) @ dz_gate, x.swapaxes(1, 2) @ dz_up
    narrow = inputs[0].dtype
    return dx.astype(narrow), dw_gate.astype(narrow), dw_up.astype(narrow)


def _widened(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays in the dtype that they are computed in."""
    dtype = np.float64 if arrays[0].dtype == np.float64 else np.float32
    return [array.astype(dtype) for array in arrays]
