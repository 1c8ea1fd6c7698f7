"""Sums in HBM that a TPU kernel adds to: all pass by, part after part, as often as there is something to add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tiles import PASSING_SLOTS


@dataclass(frozen=True)
class PassingSums:
    """Parts are numbered from the first of the first pass to the last of the last one, and are added to in that order.

    Attributes:
        sums_ref: [rows, columns] of float32 in HBM: whole parts.
        parts_ref: [slots, rows of a part, columns of a part] in VMEM, no more slots than a pass has parts.
        read, written: a semaphore for each slot.
        passes: how often the sums pass by.
    """

    sums_ref: Any
    parts_ref: Any
    read: Any
    written: Any
    passes: Any

    def add(self, number: Any, write: Callable[[Any, Any], None]) -> None:
        """write(part_ref, first) adds to a part; the first time there is nothing there.

        A part is read after it was written: as it comes into a slot, what left that slot is awaited, and a pass is at
        least as many parts ago.
        """
        slots, per_pass = self.parts_ref.shape[0], self.parts_of_a_pass
        end, coming = self.passes * per_pass, number + slots // 2
        pl.when((coming >= slots) & (coming < end))(lambda: self._write(coming - slots).wait())
        pl.when((coming >= per_pass) & (coming < end))(lambda: self._read(coming).start())
        pl.when(number >= per_pass)(lambda: self._read(number).wait())
        write(self.parts_ref.at[lax.rem(number, slots)], number < per_pass)
        self._write(number).start()

        @pl.when(number == end - 1)
        def _wait_for_the_last() -> None:
            for before in range(slots):
                self._write(number - before).wait()

    @property
    def parts_of_a_pass(self) -> int:
        return _parts(self.sums_ref.shape, self.parts_ref.shape[1:])

    def _read(self, number: Any) -> Any:
        there, here, slot = self._places(number)
        return pltpu.make_async_copy(there, here, self.read.at[slot])

    def _write(self, number: Any) -> Any:
        there, here, slot = self._places(number)
        return pltpu.make_async_copy(here, there, self.written.at[slot])

    def _places(self, number: Any) -> tuple[Any, Any, Any]:
        """A part in HBM, row by row of parts, its slot in VMEM, and the slot's number."""
        slots, height, width = self.parts_ref.shape
        of_row, slot = self.sums_ref.shape[1] // width, lax.rem(number, slots)
        part = lax.rem(number, self.parts_of_a_pass)
        row = pl.multiple_of(lax.div(part, of_row) * height, height)
        column = pl.multiple_of(lax.rem(part, of_row) * width, width)
        return self.sums_ref.at[pl.ds(row, height), pl.ds(column, width)], self.parts_ref.at[slot], slot


def passing_scratch(shape: tuple[int, int], part: tuple[int, int]) -> dict[str, Any]:
    """The slots and semaphores for sums of that shape, in parts of that shape."""
    slots = min(PASSING_SLOTS, _parts(shape, part))
    semaphores = pltpu.SemaphoreType.DMA((slots,))
    return {"parts_ref": pltpu.VMEM((slots, *part), jnp.float32), "read": semaphores, "written": semaphores}


def _parts(shape: tuple[int, int], part: tuple[int, int]) -> int:
    """How many parts there are."""
    return (shape[0] // part[0]) * (shape[1] // part[1])
