"""Scaled dot-product attention, fused: the scores never reach memory."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
