"""GLU variants (Shazeer, arXiv:2002.05202) in NumPy, forward and backward: the definition of glu_matmul.

float64 inputs are computed in float64, all others in float32. GELU is Hendrycks & Gimpel (arXiv:1606.08415), exact
(`gelu`) and by tanh (`gelu_tanh`); SiLU is `x * sigmoid(x)`.
"""

from __future__ import annotations

from math import erf, pi, sqrt

import numpy as np

from .spec import GluMatmulSpec

_erf = np.vectorize(erf, otypes=[np.float64])


def bend(activation: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The activation of x and its derivative there, elementwise; relu's derivative is 0 at 0."""
    if activation == "relu":
        return np.maximum(x, 0), (x > 0).astype(x.dtype)
    if activation == "gelu":
        share = (0.5 * (1 + _erf(x / sqrt(2)))).astype(x.dtype)
        slope_of_share = np.exp(-0.5 * x * x) / sqrt(2 * pi)
    elif activation == "gelu_tanh":
        tanh = np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))
        share = 0.5 * (1 + tanh)
        slope_of_share = 0.5 * (1 - tanh * tanh) * sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x)
    else:
        share = 0.5 * (1 + np.tanh(0.5 * x))  # the sigmoid
        slope_of_share = share * (1 - share)
    return x * share, share + x * slope_of_share


def forward(
    spec: GluMatmulSpec, x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """out, and the preactivations where the spec asks for them."""
    wide = _widened(x, w_gate, w_up)
    gate, up = wide[0] @ wide[1], wide[0] @ wide[2]
    out = bend(spec.activation, gate)[0] * up
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
    bent, slope = bend(spec.activation, gate)
    dz_gate, dz_up = dout * up * slope, dout * bent
    dx = dz_gate @ w_gate.swapaxes(1, 2) + dz_up @ w_up.swapaxes(1, 2)
    dw_gate, dw_up = x.swapaxes(1, 2) @ dz_gate, x.swapaxes(1, 2) @ dz_up
    narrow = inputs[0].dtype
    return dx.astype(narrow), dw_gate.astype(narrow), dw_up.astype(narrow)


def _widened(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays in the dtype that they are computed in."""
    dtype = np.float64 if arrays[0].dtype == np.float64 else np.float32
    return [array.astype(dtype) for array in arrays]
