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


@triton.constexpr_function
def head_columns(size: int) -> int:
    """How many columns of a head of `size` the first of its tiles holds: all, unless two tiles take up less.

    A tile's width is a power of two: a head of 192 is one of 128 and one of 64, a head of 576 one of 512 and one of 64.
    """
    first = 1 << (size.bit_length() - 1)
    rest = max(16, 1 << (size - first - 1).bit_length()) if size > first else 0
    return first if size > 128 and first + rest < 2 * first else size


def needs_wide_offsets(tiles: Iterable[tuple[int, int, int, int]]) -> bool:
    """Whether an offset inside one of the tiles `(rows, columns, row_stride, column_stride)` passes 32 bits.

    Every lane computes its offset, the masked ones too, so rows and columns are those of the padded tile.
    """
    return any(
        (rows - 1) * abs(row_stride) + (columns - 1) * abs(column_stride) > _INT32_MAX
        for rows, columns, row_stride, column_stride in tiles
    )


def copies_apart(stride_bytes: int) -> bool:
    """Whether the copy engine (TMA) can load runs that lie so far apart."""
    return stride_bytes % 16 == 0 and 0 < stride_bytes < 2**40


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
def described(pointer, heads, row_count, head_stride, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What the copy engine needs to load tiles of [heads, row_count, COLUMNS], each [1, ROWS, padded(COLUMNS)].

    What lies outside the array reads as 0.
    """
    return tl.make_tensor_descriptor(
        pointer,
        [heads, tl.maximum(row_count, 1), COLUMNS],
        [tl.cast(head_stride, tl.int64), tl.cast(row_stride, tl.int64), 1],
        [1, ROWS, padded(COLUMNS)],
    )


@triton.jit
def load_head_tile(
    source, head, first_row, row_count, head_stride, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK_ROWS: tl.constexpr, WIDE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[ROWS, padded(COLUMNS)] of a head of [heads, row_count, COLUMNS]: of a pointer, or of what `described` gave."""
    if DESCRIBED:
        tile = source.load([head, first_row, 0]).reshape([ROWS, padded(COLUMNS)])
    else:
        tile = load_tile(
            advance(source, head, head_stride), first_row, row_count, row_stride, column_stride,
            ROWS, COLUMNS, CHECK_ROWS, WIDE,
        )  # fmt: skip
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


# Which keys a query sees. With i' = i + kv_len - q_len: key j where i' - LEFT <= j <= i' + RIGHT; None is unbounded.


@triton.jit
def visible(queries, keys, q_len, kv_len, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which scores count, of the queries that exist: both are indices that broadcast to the tile's shape."""
    if RIGHT is None:
        mask = keys < kv_len
    else:
        mask = keys <= queries + (kv_len - q_len + RIGHT)
        if RIGHT > 0:  # without it the diagonal hides the keys past the end
            mask = mask & (keys < kv_len)
    if LEFT is not None:
        mask = mask & (keys >= queries + (kv_len - q_len - LEFT))
    return mask


@triton.jit
def kv_ranges(
    first_row, q_len, kv_len, LEFT: tl.constexpr, RIGHT: tl.constexpr, PAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """(start, full_start, full_end, end) for a tile of queries: no query sees a key outside [start, end), and each sees
    all of [full_start, full_end), so that only the parts beside that need a mask. PAST: a tile may lie past the last
    query, and then sees nothing.
    """
    start = 0
    full_start = 0
    full_end = kv_len
    end = kv_len
    if RIGHT is not None:
        seen_by_first = first_row + kv_len - q_len + 1 + RIGHT
        full_end = tl.minimum(tl.maximum(seen_by_first, 0), kv_len)
        end = tl.minimum(tl.maximum(seen_by_first + BLOCK_Q - 1, 0), kv_len)
    full_end = full_end // BLOCK_KV * BLOCK_KV
    if LEFT is not None:
        hidden_to_first = first_row + kv_len - q_len - LEFT
        hidden_to_last = hidden_to_first + tl.minimum(BLOCK_Q, q_len - first_row) - 1
        start = tl.minimum(tl.maximum(hidden_to_first, 0), kv_len) // BLOCK_KV * BLOCK_KV
        full_end = tl.maximum(full_end, start)
        full_start = tl.minimum(tl.cdiv(tl.maximum(hidden_to_last, 0), BLOCK_KV) * BLOCK_KV, full_end)
    if PAST:
        start = tl.where(first_row < q_len, start, 0)
        full_start = tl.where(first_row < q_len, full_start, 0)
        full_end = tl.where(first_row < q_len, full_end, 0)
        end = tl.where(first_row < q_len, end, 0)
    return start, full_start, full_end, end


@triton.jit
def q_ranges(
    first_column, q_len, kv_len, LEFT: tl.constexpr, RIGHT: tl.constexpr, PAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """(start, full_start, full_end, end) for a tile of keys, as `kv_ranges` for a tile of queries.

    The tiles are laid from the last query backwards, so that the one that sticks out is the first, beside the diagonal:
    `start` may be negative, and without LEFT one masked loop and one unmasked suffice.
    """
    last_column = tl.minimum(first_column + BLOCK_KV, kv_len) - 1
    seeing_any = q_len  # of the queries, counted from the last one backwards
    seeing_all = q_len
    if RIGHT is not None:
        seeing_any = tl.minimum(kv_len - first_column + RIGHT, q_len)
        seeing_all = tl.minimum(kv_len - last_column + RIGHT, q_len)
        if RIGHT < 0:
            seeing_any = tl.maximum(seeing_any, 0)
            seeing_all = tl.maximum(seeing_all, 0)
    if PAST:
        seeing_any = tl.where(first_column < kv_len, seeing_any, 0)
        seeing_all = tl.where(first_column < kv_len, seeing_all, 0)
    start = q_len - tl.cdiv(seeing_any, BLOCK_Q) * BLOCK_Q
    full_start = q_len - seeing_all // BLOCK_Q * BLOCK_Q
    full_end = q_len
    end = q_len
    if LEFT is not None:
        beyond_any = tl.minimum(tl.maximum(kv_len - first_column - 1 - LEFT, 0), q_len)
        beyond_all = tl.minimum(tl.maximum(kv_len - last_column - 1 - LEFT, 0), q_len)
        full_end = q_len - tl.cdiv(beyond_any, BLOCK_Q) * BLOCK_Q
        end = q_len - beyond_all // BLOCK_Q * BLOCK_Q
        full_start = tl.minimum(full_start, tl.maximum(end, start))
        full_end = tl.maximum(full_end, full_start)
    return start, full_start, full_end, end


@triton.jit
def q_ranges_of_runs(
    first_column, q_len, kv_len, LEFT: tl.constexpr, RIGHT: tl.constexpr, PAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """The same for tiles laid from the first query on, as runs count them."""
    first = first_column - (kv_len - q_len)
    last = tl.minimum(first_column + BLOCK_KV, kv_len) - 1 - (kv_len - q_len)
    start = 0
    full_start = 0
    full_end = q_len
    end = q_len
    if RIGHT is not None:
        start = tl.minimum(tl.maximum(first - RIGHT, 0), q_len)
        full_start = tl.minimum(tl.maximum(last - RIGHT, 0), q_len)
    if LEFT is not None:
        full_end = tl.minimum(tl.maximum(first + LEFT + 1, 0), q_len)
        end = tl.minimum(tl.maximum(last + LEFT + 1, 0), q_len)
    if PAST:
        end = tl.where(first_column < kv_len, end, 0)
    start = start // BLOCK_Q * BLOCK_Q
    full_start = tl.cdiv(full_start, BLOCK_Q) * BLOCK_Q
    return start, full_start, full_end // BLOCK_Q * BLOCK_Q, tl.cdiv(end, BLOCK_Q) * BLOCK_Q


# Online softmax: Milakov and Gimelshein (arXiv:1805.02867), as in FlashAttention-2 (arXiv:2307.08691)


@triton.jit
def online_softmax(scores, peak, total, log2_scale, SOME_HIDDEN: tl.constexpr, EXPONENT: tl.constexpr = 0):
    """Take in a tile of scores [rows, columns]; returns (weights, rescale, peak, total).

    weights are `2 ** (scores * log2_scale - peak + EXPONENT)`; `rescale` [rows] brings what was summed under the old
    peak to the new. log2_scale is positive. With SOME_HIDDEN a row's peak may be -inf, and is then not subtracted.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
    base = new_peak
    if SOME_HIDDEN:
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    rescale = tl.exp2(peak - base)
    if EXPONENT:
        base = base - EXPONENT
    weights = tl.exp2(scores * log2_scale - base[:, None])
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, axis=1)
