"""Cross-entropy of a linear layer's logits, which are never built whole: the last layer of a language model."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
