"""Matrix products of groups of rows, each group with a matrix of its own, and their gate: the experts of an MoE."""

from ..tiles.lazy import files_of

__getattr__ = files_of(__name__)
