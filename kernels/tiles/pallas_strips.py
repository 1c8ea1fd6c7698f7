"""Tiles of results that a TPU kernel copies to HBM itself, a strip of columns as soon as it is finished.

Pallas' pipeline copies a tile of a result when its step is over. The loads for the next step but one then queue behind
it, and after the last step there is nothing left to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .pallas_tiles import LANES, SUBLANES
from .targets import Target

_PACKED = 4 * SUBLANES  # rows that fill registers of any dtype


@dataclass(frozen=True)
class Strips:
    """The copies of one tile of each result, out of VMEM where it is made.

    Attributes:
        tile_refs: [rows, columns] in VMEM, one for each result; None for one that is not asked for.
        result_refs: [batch, m, n] in HBM, likewise.
        done: a semaphore for each result.
        place: the tile's along batch, m and n, read outside of any branch or loop, where interpreters know it.
        grid: how many tiles there are along each; a core makes them in that order.
        waits: whether a tile is on its way before the next begins, as it must be where two cores share the grid:
            neither knows which tile it made last.
    """

    tile_refs: Sequence[Any | None]
    result_refs: Sequence[Any | None]
    done: Any
    place: tuple[Any, Any, Any]
    grid: tuple[int, int, int]
    waits: bool

    def begin(self) -> None:
        """Wait until the last tile has left."""
        if not self.waits:
            pl.when(self._number > 0)(self._wait)

    def store(self, columns: Any) -> None:
        """Begin to copy a strip that is finished."""
        for copy in self._copies(columns):
            copy.start()

    def end(self) -> None:
        """Wait where nothing will later."""
        if self.waits:
            self._wait()
        else:
            count = self.grid[0] * self.grid[1] * self.grid[2]
            pl.when(self._number == count - 1)(self._wait)

    @property
    def _number(self) -> jax.Array:
        batch, row, column = self.place
        number: jax.Array = (batch * self.grid[1] + row) * self.grid[2] + column
        return number

    def _wait(self) -> None:
        for copy in self._copies(None):
            copy.wait()

    def _copies(self, columns: Any | None) -> Iterator[Any]:
        """One for each result: of those columns of the tile, or of the whole tile."""
        for index, (tile, result) in enumerate(zip(self.tile_refs, self.result_refs, strict=True)):
            if tile is not None and result is not None:
                block_m, block_n = tile.shape
                strip: Any = pl.ds(0, block_n) if columns is None else columns
                batch, row, column = self.place
                across = pl.ds(column * block_n + strip.start, strip.size)
                there = result.at[batch, pl.ds(row * block_m, block_m), across]
                yield pltpu.make_async_copy(tile.at[:, strip], there, self.done.at[index])


def in_strips(shape: tuple[int, int], block: tuple[int, int], target: Target) -> bool:
    """Whether tiles of that size can be copied so: all are whole, and begin and end with registers."""
    rows, columns = (SUBLANES, SUBLANES) if target.interpreted else (_PACKED, LANES)
    return not (shape[0] % block[0] or shape[1] % block[1] or block[0] % rows or block[1] % columns)
