"""The copies of the pages of a sequence on a TPU, block by block.

The numbers of pages are read from the sequence's row of the page table, and only pages that some query sees are copied.
A number that no page has stands for the nearest one, as where JAX gathers. All key heads of a page come in one copy,
since they lie together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .pallas_tiling import Span, Tiling
from .spec import PagedAttentionSpec

_AT_ONCE = 16  # copies whose addresses are computed together


@dataclass(frozen=True)
class Walk:
    """What a grid step reads: the blocks from `begin` to `end` of an item's keys, of which it sees a span."""

    item: Any
    span: Span
    begin: Any
    end: Any

    @staticmethod
    def of(spec: PagedAttentionSpec, tiling: Tiling, item: Any, first_query: Any, length: Any, q_length: Any) -> Walk:
        span = tiling.span(spec, first_query, length, q_length)
        end = lax.div(span.end + tiling.block_kv - 1, tiling.block_kv)
        return Walk(item, span, lax.div(span.start, tiling.block_kv), end)


@dataclass(frozen=True)
class Pages:
    """The copies of one kernel.

    Attributes:
        table_ref: [batch, max_pages], or that in one row.
        sources: the pages of keys and of values, in HBM.
        blocks: [2, block_kv, ...] in VMEM for each, two slots.
        semaphores: for each slot and each of the two.
    """

    tiling: Tiling
    table_ref: Any
    sources: tuple[Any, Any]
    blocks: tuple[Any, Any]
    semaphores: Any

    def start(self, walk: Walk, block: Any, slot: Any) -> None:
        """Begin to copy those pieces of a block that have keys to be seen."""
        count = self.tiling.block_kv // self.tiling.piece
        at_once = gcd(count, _AT_ONCE)

        def one(number: Any) -> None:
            for copy in self._of_piece(walk, block, slot, number):
                copy.start()

        def some(number: Any, _: None) -> None:
            for index in range(at_once):
                one(number * at_once + index)

        self._each(walk, block, one, lambda: lax.fori_loop(0, count // at_once, some, None))

    def wait(self, walk: Walk, block: Any, slot: Any) -> None:
        """Until they are there; for a whole block at once, which is as many bytes."""

        def one(number: Any) -> None:
            for copy in self._of_piece(walk, block, slot, number):
                copy.wait()

        def all_pieces() -> None:
            for index, held in enumerate(self.blocks):
                pltpu.make_async_copy(held.at[1 - slot], held.at[slot], self.semaphores.at[slot, index]).wait()

        self._each(walk, block, one, all_pieces)

    def _each(self, walk: Walk, block: Any, one: Callable[[Any], None], all_pieces: Callable[[], None]) -> None:
        first_key, piece, count = block * self.tiling.block_kv, self.tiling.piece, self.tiling.block_kv
        start = lax.div(jnp.maximum(walk.span.start - first_key, 0), piece)
        end = lax.div(jnp.minimum(walk.span.end - first_key, count) + piece - 1, piece)
        whole = (start == 0) & (end == count // piece)
        pl.when(whole)(all_pieces)
        pl.when(~whole)(lambda: lax.fori_loop(start, end, lambda number, _: one(number), None))

    def _of_piece(self, walk: Walk, block: Any, slot: Any, number: Any) -> Iterator[Any]:
        tiling, first_key = self.tiling, block * self.tiling.block_kv
        page = lax.div(first_key, tiling.page_size)
        if tiling.piece == tiling.page_size:
            page, at = page + number, pl.ds(0, tiling.piece)
        else:
            at = pl.ds(lax.rem(first_key + number * tiling.piece, tiling.page_size), tiling.piece)
        in_one_row = len(self.table_ref.shape) == 1
        place = walk.item * tiling.max_pages + page if in_one_row else (walk.item, page)
        listed = jnp.clip(self.table_ref[place], 0, self.sources[0].shape[0] - 1)
        there, to = (listed, at), pl.ds(number * tiling.piece, tiling.piece)
        for index, (pages, held) in enumerate(zip(self.sources, self.blocks, strict=True)):
            yield pltpu.make_async_copy(pages.at[there], held.at[slot, to], self.semaphores.at[slot, index])
