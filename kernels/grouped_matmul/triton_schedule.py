"""Which rows a GPU program takes: a list of tiles, made on the device from the sizes of the groups.

A tile begins where its group does, or a whole number of blocks after, so that it has rows of one group alone. How many
tiles there can be follows from the shapes, however the rows are shared out: programs are launched for all of these, and
those beyond the last tile end at once. The chip hands a program to whichever core is free, so that groups of unlike
sizes keep all cores at work.

An entry of the list is four int32: the group, the tile's first row, where the rows of its group or chunk end, and the
number of its partial sum (-1 where it has none: see `triton_drhs.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, contiguous
from ..tiles.triton_products import strides

ENTRY = tl.constexpr(4)
SIZES = 256  # how many sizes are added up at a time


@triton.jit
def entry(tiles, batch, slots, slot):
    """(group, first row, end, number of the partial sum) of a tile."""
    pointer = tiles + (tl.cast(batch, tl.int64) * slots + slot) * ENTRY
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


@triton.jit
def rows_of_group(sizes, group, groups, stride, tokens, block, EVERY: tl.constexpr, SIZES: tl.constexpr):
    """(first row, end, tiles before, partial sums before) of a group; number `groups` is the rows of nobody.

    A size below 0 counts as 0, and rows past the last are left out. EVERY: an empty group has a tile too.
    """
    first = tl.cast(0, tl.int64)
    tiles = 0
    partials = 0
    for start in range(0, group, SIZES):
        index = start + tl.arange(0, SIZES)
        size = tl.load(sizes + index.to(tl.int64) * stride, mask=index < group, other=0)
        size = tl.minimum(tl.maximum(size, 0), tokens).to(tl.int64)
        ends = tl.minimum(first + tl.cumsum(size, 0), tokens)
        begins = tl.minimum(first + tl.cumsum(size, 0) - size, tokens)
        count = ((ends - begins + block - 1) // block).to(tl.int32)
        partials += tl.sum(tl.where(count > 1, count, 0), 0)
        if EVERY:
            count = tl.where(index < group, tl.maximum(count, 1), 0)
        tiles += tl.sum(count, 0)
        first = tl.minimum(first + tl.sum(size, 0), tokens)
    size = tl.load(sizes + tl.cast(group, tl.int64) * stride, mask=group < groups, other=tokens)
    end = tl.minimum(first + tl.maximum(size, 0), tokens)
    return first.to(tl.int32), end.to(tl.int32), tiles, partials


@triton.jit(do_not_specialize=["tokens", "slots", "block"])
def _schedule(
    group_sizes, tiles,
    tokens, groups, slots, block, sizes_batch, sizes_group,
    EVERY: tl.constexpr, SIZES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The tiles of one group, or of the rows of nobody; the last of these also marks what is left of the list."""
    owners = groups if EVERY else groups + 1
    batch = tl.program_id(0) // owners
    group = tl.program_id(0) % owners
    sizes = group_sizes + tl.cast(batch, tl.int64) * sizes_batch
    first, end, before, partials = rows_of_group(sizes, group, groups, sizes_group, tokens, block, EVERY, SIZES)
    count = tl.cdiv(end - first, block)
    split = count > 1
    if EVERY:
        count = tl.maximum(count, 1)
    stop = tl.where(group == owners - 1, slots - before, count)
    pointer = tiles + (tl.cast(batch, tl.int64) * slots + before) * ENTRY
    for start in range(0, stop, ENTRIES):
        index = start + tl.arange(0, ENTRIES)
        real = index < count
        row = tl.where(real, first + index * block, 0)
        entries = pointer + index * ENTRY
        written = (index < stop) & (before + index < slots)
        tl.store(entries, tl.full([ENTRIES], 0, tl.int32) + group, mask=written)
        tl.store(entries + 1, row, mask=written)
        tl.store(entries + 2, tl.where(real, tl.minimum(row + block, end), -1), mask=written)
        tl.store(entries + 3, tl.where(split & real, partials + index, -1), mask=written)


def tile_slots(tokens: int, groups: int, block: int) -> int:
    """How many tiles there can be, with those of the rows of nobody."""
    return (tokens + (block - 1) * min(groups + 1, tokens)) // block


def chunk_slots(tokens: int, groups: int, block: int) -> int:
    """How many chunks there can be, where an empty group has one too."""
    return tokens // block + groups if groups else 0


def partial_slots(tokens: int, block: int) -> int:
    """How many chunks there can be of groups that have more than one."""
    return 2 * tokens // block


def schedule_launch(name: str, sizes: Array, tokens: int, block: int, every: bool) -> tuple[Launch, Array]:
    """The launch that writes the list of that name, and the list [batch, slots, 4]."""
    batch, groups = sizes.shape
    slots = (chunk_slots if every else tile_slots)(tokens, groups, block)
    launch = Launch(
        _schedule,
        (batch * (groups if every else groups + 1) if slots else 0,),
        inputs=("group_sizes",),
        outputs=(name,),
        numbers={"tokens": tokens, "groups": groups, "slots": slots, "block": block}
        | strides("sizes", sizes, "batch", "group"),
        constants={"EVERY": every, "SIZES": SIZES, "ENTRIES": 32},
        num_warps=1,
    )
    return launch, contiguous((batch, slots, int(ENTRY.value)), "int32")
