"""Which tokens are predicted: each from those before it, in its own document."""

from __future__ import annotations

from .arrays import Array, namespace

IGNORED = -100  # a target that is not counted


def is_predicted(segments: Array) -> Array:
    """Of segments `[batch, seq + 1]`, bool `[batch, seq]`: whether what follows is of the same document, no padding."""
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)


def within_documents(targets: Array, segments: Array) -> Array:
    """The targets `[batch, seq]`, `IGNORED` where the segments `[batch, seq + 1]` say that they are not predicted."""
    return namespace(targets).where(is_predicted(segments), targets, IGNORED)
