"""RMS norm and layer norm over the last dimension, with the residual sum before it inside."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
