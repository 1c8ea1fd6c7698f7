"""Blocks of the groups' matrices that a TPU kernel copies itself, a group ahead.

Pallas' pipeline copies what the next visit reads: the block of the next group is asked for while the last rows of the
present one are multiplied, often few, and takes longer. Here it is on its way during all visits of the present group,
a share in each, so that the rows that these ask for meanwhile do not wait behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_tiles import LANES
from ..tiles.targets import Target

_SHARES = 8  # of a block, at most: one is copied at a time
_ROWS = 32  # of a share, a multiple: they fill registers of any dtype


class GroupVisit(NamedTuple):
    """A visit, in the arrays of `pallas_schedule.Visits`, of which those of this batch item begin at `start`."""

    groups: Any
    firsts: Any
    ends: Any
    followings: Any
    start: Any
    index: Any

    @property
    def number(self) -> Any:
        return self.start + self.index

    @property
    def fresh(self) -> Any:
        """Whether it is the first of its group."""
        before = self.groups[self.number - jnp.minimum(self.index, 1)]
        return (self.index == 0) | (before != self.groups[self.number])

    @property
    def group(self) -> Any:
        return self.groups[self.number]

    @property
    def first(self) -> Any:
        return self.firsts[self.number]

    @property
    def end(self) -> Any:
        return self.ends[self.number]


@dataclass(frozen=True)
class Ahead:
    """The copies of one kernel, in a grid of batch items, blocks of columns of the result, and visits.

    Attributes:
        matrices: [batch, groups, rows, columns] in HBM.
        blocks: [2, rows, columns] in VMEM, the block of this group and that of the next one.
        slot_ref: which of the two is this group's.
        done: a semaphore for each matrix and slot.
        along_rows: whether blocks are cut along the matrices' rows, and else along their columns.
        place: the numbers of the batch item and of the block of columns.
        count: how many blocks of columns there are.
        waits: whether nothing is copied for the next block of columns, which may be another core's.
    """

    matrices: Sequence[Any]
    blocks: Sequence[Any]
    slot_ref: Any
    done: Any
    along_rows: bool
    place: tuple[Any, Any]
    count: int
    waits: bool

    def fetch(self, visit: GroupVisit, block: tuple[Any, int]) -> list[Any]:
        """The blocks of the visit's group, awaited, while a share of the next one's is copied.

        After the last group the first of the next block of columns comes. block: of the visit's rows, the first one
        and how many there are.
        """
        column, group = self.place[1], visit.group
        head = visit.groups[visit.start]
        alone = visit.fresh & (visit.index == 0) & ((column == 0) | self.waits)

        @pl.when(visit.fresh)
        def _await() -> None:
            slot = jnp.where(alone, 0, 1 - self.slot_ref[0])
            self.slot_ref[0] = slot
            pl.when(alone)(lambda: self._each(0, self.shares, lambda copy: copy.start(), column, group, slot))
            self._each(0, self.shares, lambda copy: copy.wait(), column, group, slot)

        following = visit.followings[visit.number]
        over = following < 0
        next_column, next_group = jnp.where(over, column + 1, column), jnp.where(over, head, following)
        first, end = visit.first, visit.end
        before, after = jnp.maximum(block[0] - first, 0), jnp.minimum(block[0] + block[1], end) - first
        begin, until = (lax.div(self.shares * rows, jnp.maximum(end - first, 1)) for rows in (before, after))

        @pl.when(~over if self.waits else next_column < self.count)
        def _next() -> None:
            self._each(begin, until, lambda copy: copy.start(), next_column, next_group, 1 - self.slot_ref[0])

        return [block.at[self.slot_ref[0]] for block in self.blocks]

    @property
    def shares(self) -> int:
        return _shares(self.blocks[0].shape[1])

    def _each(self, begin: Any, end: Any, act: Callable[[Any], None], column: Any, group: Any, slot: Any) -> None:
        def one(share: Any, _: None) -> None:
            for copy in self._copies(share, column, group, slot):
                act(copy)

        lax.fori_loop(begin, end, one, None)

    def _copies(self, share: Any, column: Any, group: Any, slot: Any) -> Iterator[Any]:
        for index, (matrix, block) in enumerate(zip(self.matrices, self.blocks, strict=True)):
            _, rows, columns = block.shape
            size = rows // self.shares
            first = pl.multiple_of(share * size, size)
            row = pl.multiple_of(column * rows + first, size) if self.along_rows else first
            at = pl.ds(0 if self.along_rows else pl.multiple_of(column * columns, columns), columns)
            there = matrix.at[self.place[0], group, pl.ds(row, size), at]
            yield pltpu.make_async_copy(there, block.at[slot, pl.ds(first, size)], self.done.at[index, slot])


def can_fetch(block: Sequence[int], matrix: Sequence[int], along_rows: bool, steps: int, target: Target) -> bool:
    """Whether a block is that of the whole sum, and all are whole ones that begin and end with registers."""
    cut, size = (0, matrix[0]) if along_rows else (1, matrix[1])
    whole = size % block[cut] == 0 and block[1 - cut] == matrix[1 - cut]
    aligned = target.interpreted or (block[0] % _ROWS == 0 and block[1] % LANES == 0)
    return steps == 1 and whole and aligned


def ahead_scratch(block: Sequence[int], dtype: Any, count: int) -> list[Any]:
    """Scratch: the blocks, the slot, the semaphores."""
    blocks = [pltpu.VMEM((2, *block), dtype) for _ in range(count)]
    return [blocks, pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((count, 2))]


def _shares(rows: int) -> int:
    return next(count for count in (_SHARES, 4, 2, 1) if rows % (count * _ROWS) == 0 or count == 1)
