"""Rotary position embedding of queries and keys, with the frequencies of the models that scale them."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
