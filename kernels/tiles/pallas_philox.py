"""The bits of `philox.py` inside TPU kernels, for tiles that are transposed and folded: [keys / 8, 8, queries]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .pallas_tiles import SUBLANES
from .philox import ROUNDS, philox_round, threshold

_BLOCK = 32  # keys that share their counters by fours


def kept(seed: Any, dropout: float, place: tuple[Any, Any, Any, Any], shape: tuple[int, ...]) -> jax.Array:
    """Which weights of a tile of that shape stay; `place` is its (b, h, first query, first key), `seed` two int32.

    Where the tile has whole blocks of 32 keys, which then begin one, it takes a call for four of its registers.
    """
    b, h, query, key = place
    shared = shape[0] * SUBLANES % _BLOCK == 0
    counters = (shape[0] // 4 if shared else shape[0], *shape[1:])
    group, within, column = (lax.broadcasted_iota(jnp.int32, counters, axis) for axis in range(3))
    eight = lax.shift_right_logical(jnp.int32(key), 3) + group  # of eights of keys, where they do not share
    block = lax.shift_right_logical(jnp.int32(key), 2) + SUBLANES * group + within
    if not shared:
        block = lax.shift_right_logical(eight, 2) * SUBLANES + within
    places = (block, column + query, jnp.full(counters, h, jnp.int32), jnp.full(counters, b, jnp.int32))
    # 0, but a number of its own everywhere: a loop cannot carry what the compiler knows to repeat along an axis.
    nothing = lax.shift_right_logical(column + within, 31)
    first, second, third, fourth = ((x + nothing).astype(jnp.uint32) for x in places)
    key_words = jnp.asarray(seed[0]).astype(jnp.uint32), jnp.asarray(seed[1]).astype(jnp.uint32)
    # As a loop, for the constants of all rounds at once would fill the registers.
    state = key_words, (first, second, third, fourth)
    _, words = lax.fori_loop(0, ROUNDS, lambda _, state: philox_round(state[0], state[1], jnp.uint32), state)
    if shared:
        found = jnp.stack(words, axis=1).reshape(shape)
    else:
        number = eight & 3
        first_two = jnp.where(number == 0, words[0], words[1])
        found = jnp.where(number < 2, first_two, jnp.where(number == 2, words[2], words[3]))
    return found >= jnp.uint32(threshold(dropout))
