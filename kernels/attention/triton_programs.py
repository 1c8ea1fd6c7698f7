"""What a program of the attention kernels for GPUs works on: its tile, head and sequence, and what a mask shows."""

from __future__ import annotations

import triton
import triton.language as tl

# Which program has which tile


@triton.jit
def tile_head_batch(size, heads, sequences, together, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """This program's tile of the sequence, its head and its batch item.

    Tiles of a head follow each other, which then share it in cache; where `together` is given, one tile of so many
    heads comes before the next (`triton_common.programs`).
    """
    tiles = tl.cdiv(size, BLOCK)
    if PACKED:
        tiles += sequences + 1
    if together is not None:
        within = tl.program_id(0) % (tiles * together)
        tile = within // together
        pair = tl.program_id(0) // (tiles * together) * together + within % together
    else:
        tile = tl.program_id(0) % tiles
        pair = tl.program_id(0) // tiles
    return tile, pair % heads, pair // heads


@triton.jit
def tile_head_batch_of_axes(size, heads, sequences, BLOCK: tl.constexpr, PACKED: tl.constexpr, LONGEST: tl.constexpr):
    """The same where the last tile is the longest, and with LONGEST the grid is (heads together, tiles, more heads).

    Nothing is divided then. (But ptxas for sm_90 spills what the three numbers take in the kernel of dk and dv.)
    """
    if LONGEST:
        pair = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        head, batch = pair % heads, pair // heads
    else:
        tile, head, batch = tile_head_batch(size, heads, sequences, None, BLOCK, PACKED)
    return tile, head, batch


# Which tiles a mask shows: runs of them, in a list that `kernels/attention/sparsity.py` describes


@triton.jit
def runs_of(runs, item, head, tile, sequences, PACKED: tl.constexpr):
    """(first, end): where the runs of a tile stand in the list; the next is two further on."""
    if PACKED:  # of the rows past the last sequence, and of those past the end of one, there are no tiles
        item = tl.minimum(item, sequences - 1)
    tile = tl.minimum(tile, tl.load(runs + 2) - 1)
    row = runs + 3 + item * tl.load(runs) + head * tl.load(runs + 1) + tile
    return tl.load(row), tl.load(row + 1)


@triton.jit
def within_run(runs, run, start, full_start, full_end, end, BLOCK: tl.constexpr):
    """The bounds of the window, as `kv_ranges` and `q_ranges` give them, cut to one run of tiles."""
    first = tl.load(runs + run)
    whole = first < 0
    first = tl.where(whole, ~first, first) * BLOCK
    start = tl.maximum(start, first)
    end = tl.minimum(end, tl.load(runs + run + 1) * BLOCK)
    full_start = tl.where(whole, tl.minimum(tl.maximum(full_start, start), end), end)
    full_end = tl.minimum(tl.maximum(full_end, full_start), end)
    return start, full_start, full_end, end


# Sequences of their own lengths: padded, or packed one after the other


@triton.jit
def length_of(lengths, item, size, GIVEN: tl.constexpr):
    """How many of the `size` rows of a batch item there are."""
    length = size
    if GIVEN:
        length = tl.minimum(tl.maximum(tl.load(lengths + item), 0), size)
    return length


@triton.jit
def find_sequence(cu_seqlens, sequences, tile, BLOCK: tl.constexpr):
    """Whose the tile is, in a schedule that gives sequence s the tiles from `cu_seqlens[s] // BLOCK + s` on.

    These are enough for its rows, and they are known without adding up the others. Sequence number `sequences` is what
    lies past the last.
    """
    low = tl.cast(0, tl.int32)
    high = tl.cast(sequences, tl.int32)
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(cu_seqlens + middle) // BLOCK + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle - 1)
    return low


@triton.jit
def rows_of_sequence(cu_seqlens, sequences, sequence, size):
    """(first, count) of a packed sequence, or of the rows past the last one."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), size)
    past = tl.load(cu_seqlens + sequence + 1, mask=sequence < sequences, other=size)
    return first, tl.maximum(tl.minimum(past, size) - first, 0)


@triton.jit
def sequence_of(
    tile, batch, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k, sequences, q_size, kv_size,
    BY_KEYS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(tile in the sequence, sequence, its first query, q_len, its first key, kv_len).

    Of packed sequences the tile was one of a schedule of all. The rows past the last sequence see nothing.
    """
    item = batch
    q_first = 0
    kv_first = 0
    if PACKED:
        item = find_sequence(cu_seqlens_k if BY_KEYS else cu_seqlens_q, sequences, tile, BLOCK)
        q_first, q_len = rows_of_sequence(cu_seqlens_q, sequences, item, q_size)
        kv_first, kv_len = rows_of_sequence(cu_seqlens_k, sequences, item, kv_size)
        if BY_KEYS:
            tile -= kv_first // BLOCK + item
            q_len = tl.where(item < sequences, q_len, 0)
        else:
            tile -= q_first // BLOCK + item
            kv_len = tl.where(item < sequences, kv_len, 0)
    else:
        q_len = length_of(q_lengths, batch, q_size, Q_LENGTHS)
        kv_len = length_of(kv_lengths, batch, kv_size, KV_LENGTHS)
    return tile, item, q_first, q_len, kv_first, kv_len
