"""Which rows a TPU kernel takes at each step: a list of visits, made on the device from the sizes of the groups.

Blocks of rows lie where they lie, whatever the groups: a block that has rows of two groups is visited twice, each time
for the rows of one. How many visits there can be follows from the shapes, however the rows are shared out. The list is
in the chip's scalar memory before a kernel starts, so that the copies of a visit begin while the one before is computed
with.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from ..tiles.pallas_tiles import LANES, fit_block
from ..tiles.targets import Target


@dataclass(frozen=True)
class Visits:
    """int32 [batch * count] each, and how many a batch item has.

    Attributes:
        group: whose the rows are; number `groups` is nobody.
        tile: the number of the block of rows.
        first: the first row of the group.
        end: where its rows end. Of an empty group, and of the visits that are left over, it is `first`.
        following: the group with rows that comes next, -1 where none does.
    """

    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    count: int
    following: jax.Array

    @classmethod
    def of(cls, sizes: jax.Array, tokens: int, block: int, every: bool) -> Visits:
        """The visits of all rows, those of nobody too; or, of EVERY group, an empty one too, but not of nobody's rows.

        sizes is int32 [batch, groups]. The visits that are left over repeat the last, without rows.
        """
        batch, groups = sizes.shape
        sizes = jnp.clip(sizes, 0, tokens)
        ends = lax.associative_scan(lambda x, y: jnp.minimum(x + y, tokens), sizes, axis=1)
        firsts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
        if not every:
            firsts = jnp.concatenate((firsts, ends[:, -1:]), axis=1)
            ends = jnp.pad(ends, ((0, 0), (0, 1)), constant_values=tokens)
        blocks = -(-tokens // block)
        taken = jnp.where(firsts < ends, (ends - 1) // block - firsts // block + 1, int(every))
        after = jnp.cumsum(taken, axis=1)
        count = blocks + (groups if every else min(groups + 1, tokens)) - 1
        number = jnp.arange(count)[None]
        seen = jnp.minimum(number, after[:, -1:] - 1)
        group = (after[:, None, :] <= seen[:, :, None]).sum(axis=2)

        def of_group(values: jax.Array) -> jax.Array:
            return jnp.take_along_axis(values, group, axis=1)

        first, end = of_group(firsts), of_group(ends)
        tile = jnp.minimum(first // block + seen - of_group(after - taken), blocks - 1)
        left_over = number >= after[:, -1:]
        first, end = jnp.where(left_over, 0, first), jnp.where(left_over, 0, end)
        later = jnp.where((group < groups)[:, None] & (group[:, None] > group[:, :, None]), group[:, None], groups)
        following = later.min(axis=2, initial=groups)
        following = jnp.where(following < groups, following, -1)
        flat = [array.astype(jnp.int32).reshape(batch * count) for array in (group, tile, first, end, following)]
        return cls((flat[0], flat[1], flat[2], flat[3]), count, flat[4])


def fit_rows(name: str, block: int, tokens: int, groups: int, target: Target) -> int:
    """The rows of a block: no more than half a group on average, since many blocks are then of one group alone."""
    unit = 8 if target.interpreted else LANES
    if tokens <= unit:
        return tokens
    half = -(-tokens // (2 * groups * unit)) * unit
    return fit_block(name, min(block, max(unit, half)), tokens, target)
