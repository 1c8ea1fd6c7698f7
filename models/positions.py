"""Rotary positions of queries and keys: crosstile's op, and LongRoPE, whose frequencies it does not have."""

from __future__ import annotations

import numpy as np

import crosstile

from .arrays import Array, cast, dtype_name, like, namespace
from .config import LongRopeScaling, Rotary


def turn(x: tuple[Array, Array], positions: Array, rotary: Rotary, long: bool) -> tuple[Array, Array]:
    """Queries and keys `[batch, seq, heads, dim]` turned by their positions `[seq]`.

    `long` takes LongRoPE's factors for sequences longer than those of the first training.
    """
    scaling = rotary.scaling
    if isinstance(scaling, LongRopeScaling):
        q, k = x
        return _turn_long(q, positions, rotary, scaling, long), _turn_long(k, positions, rotary, scaling, long)
    return crosstile.rotary(
        x,
        positions,
        base=rotary.theta,
        scaling=scaling,
        interleaved=rotary.interleaved,
        rotary_dim=rotary.dim,
    )


def _turn_long(x: Array, positions: Array, rotary: Rotary, scaling: LongRopeScaling, long: bool) -> Array:
    """Pair j of a head turned by `position * frequency(j) / factor(j)`, in float32."""
    xp, dim = namespace(x), rotary.dim or x.shape[-1]
    factors = np.array(scaling.long_factor if long else scaling.short_factor, np.float32)
    powers = np.float32(rotary.theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    angles = cast(positions, "float32")[:, None, None] * like(1 / (factors * powers), x)
    cos, sin = xp.cos(angles) * scaling.attention_factor, xp.sin(angles) * scaling.attention_factor
    first, second = (cast(part, "float32") for part in (x[..., : dim // 2], x[..., dim // 2 : dim]))
    turned = (first * cos - second * sin, second * cos + first * sin)
    return xp.concatenate([*(cast(part, dtype_name(x)) for part in turned), x[..., dim:]], -1)
