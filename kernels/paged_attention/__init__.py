"""Attention of a few queries to a cache of keys and values in pages: decoding and chunked prefill."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
