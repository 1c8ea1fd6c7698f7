"""What GPU kernels share: addressing tiles, loading and storing them with tails, masks, online softmax.

A tile's address is a scalar 64-bit pointer to its first row plus offsets inside the tile. The offsets are 32-bit, which
costs fewer registers, unless WIDE: `needs_wide_offsets` decides that from the strides, on the host.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

_INT32_MAX = 2**31 - 1


@triton.constexpr_function
def padded(size: int) -> int:
    """The width of the tile that holds `size` columns: a power of two, and at least the 16 that `tl.dot` multiplies."""
    return max(16, 1 << (size - 1).bit_length())


def needs_wide_offsets(tiles: Iterable[tuple[int, int, int, int]]) -> bool:
    """Whether an offset inside one of the tiles `(rows, columns, row_stride, column_stride)` passes 32 bits.

    Every lane computes its offset, the masked ones too, so rows and columns are those of the padded tile.
    """
    return any(
        (rows - 1) * abs(row_stride) + (columns - 1) * abs(column_stride) > _INT32_MAX
        for rows, columns, row_stride, column_stride in tiles
    )


# Tiles in memory


@triton.jit
def advance(pointer, count, stride):
    """The pointer `count` strides further on, in 64 bits: for scalars, once a program or once a tile."""
    return pointer + tl.cast(count, tl.int64) * stride


@triton.jit
def rows_exist(first_row, row_count, ROWS: tl.constexpr):
    """bool [ROWS]; a tile may begin before row 0, where tiles are laid from the last row backwards."""
    rows = first_row + tl.arange(0, ROWS)
    return (rows >= 0) & (rows < row_count)


@triton.jit
def tile_pointers(
    pointer, first_row, row_stride, column_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    """[ROWS, WIDTH] addresses, from row `first_row` of the array at `pointer`."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return advance(pointer, first_row, row_stride) + (rows[:, None] * row_stride + columns[None, :] * column_stride)


@triton.jit
def load_tile(
    pointer, first_row, row_count, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK_ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[ROWS, padded(COLUMNS)] of an array [row_count, COLUMNS], from row `first_row`; what lies outside it reads as 0.

    Without CHECK_ROWS all rows must exist. Where COLUMNS is its own padded width there is then no mask at all: one that
    is always true still costs instructions.
    """
    WIDTH: tl.constexpr = padded(COLUMNS)
    pointers = tile_pointers(pointer, first_row, row_stride, column_stride, ROWS, WIDTH, WIDE)
    if CHECK_ROWS:
        mask = rows_exist(first_row, row_count, ROWS)[:, None]
        if COLUMNS != WIDTH:
            mask = mask & (tl.arange(0, WIDTH) < COLUMNS)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif COLUMNS != WIDTH:
        tile = tl.load(pointers, mask=(tl.arange(0, WIDTH) < COLUMNS)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_rows(pointer, first, count, stride, other, BLOCK: tl.constexpr, CHECK: tl.constexpr = True):
    """[BLOCK] of an array [count], from element `first`; what lies outside it reads as `other`."""
    pointers = advance(pointer, first, stride) + tl.arange(0, BLOCK).to(tl.int64) * stride
    if CHECK:
        values = tl.load(pointers, mask=rows_exist(first, count, BLOCK), other=other)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def store_tile(
    pointer, tile, first_row, row_count, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Write what exists of `tile` [ROWS, padded(COLUMNS)] in the array's dtype; an output's columns are contiguous."""
    WIDTH: tl.constexpr = padded(COLUMNS)
    pointers = tile_pointers(pointer, first_row, row_stride, 1, ROWS, WIDTH, WIDE)
    mask = rows_exist(first_row, row_count, ROWS)[:, None]
    if COLUMNS != WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < COLUMNS)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


# Which keys a query sees: all of them, or if causal key j where j <= i + kv_len - q_len


@triton.jit
def visible(queries, keys, q_len, kv_len, CAUSAL: tl.constexpr):
    """Which scores count, where `queries` and `keys` are indices that broadcast to the tile's shape."""
    if CAUSAL:
        mask = keys <= queries + (kv_len - q_len)  # keys past the end too, for every query that exists
    else:
        mask = keys < kv_len
    return mask


@triton.jit
def kv_ranges(first_row, q_len, kv_len, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """(full, end) for a tile of queries: keys in [0, full) need no mask, [full, end) do, and none sees the rest."""
    if CAUSAL:
        seen_by_first = first_row + kv_len - q_len + 1
        full = tl.minimum(tl.maximum(seen_by_first, 0), kv_len)
        end = tl.minimum(tl.maximum(seen_by_first + BLOCK_Q - 1, 0), kv_len)
    else:
        full = kv_len
        end = kv_len
    return full // BLOCK_KV * BLOCK_KV, end


@triton.jit
def q_ranges(first_column, q_len, kv_len, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """(start, full) for a tile of keys: the query tiles in [start, full) need a mask, those in [full, q_len) do not.

    The tiles are laid from the last query backwards, so that the one that sticks out is the first, beside the diagonal:
    `start` may be negative, and one masked loop and one unmasked suffice.
    """
    seeing_any = q_len
    seeing_all = q_len
    if CAUSAL:
        last_column = tl.minimum(first_column + BLOCK_KV, kv_len) - 1
        seeing_any = tl.minimum(kv_len - first_column, q_len)
        seeing_all = tl.minimum(kv_len - last_column, q_len)
    return q_len - tl.cdiv(seeing_any, BLOCK_Q) * BLOCK_Q, q_len - seeing_all // BLOCK_Q * BLOCK_Q


# Online softmax: Milakov and Gimelshein (arXiv:1805.02867), as in FlashAttention-2 (arXiv:2307.08691)


@triton.jit
def online_softmax(scores, peak, total, log2_scale, SOME_HIDDEN: tl.constexpr):
    """Take in a tile of scores [rows, columns]; returns (weights, rescale, peak, total).

    weights are `2 ** (scores * log2_scale - peak)`; `rescale` [rows] brings what was summed under the old peak to the
    new. log2_scale is positive. With SOME_HIDDEN a row's peak may be -inf, and is then not subtracted.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
    base = new_peak
    if SOME_HIDDEN:
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * log2_scale - base[:, None])
    rescale = tl.exp2(peak - base)
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, axis=1)
