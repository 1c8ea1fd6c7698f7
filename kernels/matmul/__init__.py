"""Matrix multiplication with its epilogue inside: `activation(a @ b + bias) + residual`."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
