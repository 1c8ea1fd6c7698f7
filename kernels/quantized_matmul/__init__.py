"""Matmul with a quantised weight, dequantised on the way to the matrix units: `activation(a @ w + bias) + residual`."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
