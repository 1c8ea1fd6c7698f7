"""What GPU kernels over matrices share: the order and the addresses of tiles, and the numbers of a launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Array
from .triton_tiles import advance, copies_apart, needs_wide_offsets

EPILOGUE_COLS = tl.constexpr(32)  # of a wide tile are finished and stored at a time, for the sake of the registers

# Tiles


@triton.jit
def grouped(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The place of a tile when GROUP_M rows of tiles are walked column by column, so that they share b in the L2."""
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def indices(SIZE: tl.constexpr, WIDE: tl.constexpr):
    """0 .. SIZE - 1, in 64 bits where the offsets inside a tile need them."""
    index = tl.arange(0, SIZE)
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def element(pointer, batch, row, col, rows, cols):
    """The element (batch, row, col) of a contiguous array [batch, rows, cols]."""
    return pointer + ((tl.cast(batch, tl.int64) * rows + row) * cols + col)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns: what is done to a whole wide tile does not fit the registers."""
    pairs = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def store(tile, out, batch, row, col, rows_total, n, end, WIDE: tl.constexpr):
    """Store what lies before row `end` of a tile whose first element is (row, col) of a contiguous [batch, rows, n]."""
    if tile.shape[1] > EPILOGUE_COLS:
        left, right = halves(tile)
        store(left, out, batch, row, col, rows_total, n, end, WIDE)
        store(right, out, batch, row, col + left.shape[1], rows_total, n, end, WIDE)
    else:
        rows = indices(tile.shape[0], WIDE)
        cols = indices(tile.shape[1], WIDE)
        exists = (rows < end - row)[:, None] & (cols < n - col)[None, :]
        pointers = element(out, batch, row, col, rows_total, n) + (rows[:, None] * n + cols[None, :])
        tl.store(pointers, tile.to(out.dtype.element_ty), mask=exists)


@triton.jit
def masks_of_step(rows, rows_left, cols, cols_left, inner, k, start, EVEN_K: tl.constexpr):
    """Which elements of a step's two tiles there are: of the left one [BLOCK_M, 1 or BLOCK_K], of the right one."""
    left_mask = (rows < rows_left)[:, None]
    right_mask = (cols < cols_left)[None, :]
    if not EVEN_K:
        # One comparison a step keeps the loop in one piece, which the compilers pipeline; a peeled tail would be a
        # second copy of the dot and of its buffers.
        inner_exists = inner < k - start
        left_mask = left_mask & inner_exists[None, :]
        right_mask = right_mask & inner_exists[:, None]
    return left_mask, right_mask


@triton.jit
def add_product(
    sums, left, right, rows_left, cols_left, k, left_row, left_col, right_row, right_col,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums + left @ right, of the rows at `left` [rows_left, k] and the columns at `right` [k, cols_left]."""
    rows = indices(sums.shape[0], WIDE)
    cols = indices(sums.shape[1], WIDE)
    inner = indices(BLOCK_K, WIDE)
    left_offsets = rows[:, None] * left_row + inner[None, :] * left_col  # [BLOCK_M, BLOCK_K]
    right_offsets = inner[:, None] * right_row + cols[None, :] * right_col  # [BLOCK_K, BLOCK_N]
    for start in range(0, k, BLOCK_K):
        left_mask, right_mask = masks_of_step(rows, rows_left, cols, cols_left, inner, k, start, EVEN_K)
        left_tile = tl.load(left + left_offsets, mask=left_mask, other=0.0)
        right_tile = tl.load(right + right_offsets, mask=right_mask, other=0.0)
        sums = tl.dot(left_tile, right_tile, sums, input_precision=PRECISION)
        left = advance(left, BLOCK_K, left_col)
        right = advance(right, BLOCK_K, right_row)
    return sums


@triton.jit
def two_products(
    left, first, second, rows_left, cols_left, k, left_row, left_col, first_row, first_col, second_row, second_col,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`left @ first` and `left @ second` [BLOCK_M, BLOCK_N], in one loop that reads left once."""
    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    left_offsets = rows[:, None] * left_row + inner[None, :] * left_col  # [BLOCK_M, BLOCK_K]
    first_offsets = inner[:, None] * first_row + cols[None, :] * first_col  # [BLOCK_K, BLOCK_N]
    second_offsets = inner[:, None] * second_row + cols[None, :] * second_col  # [BLOCK_K, BLOCK_N]
    first_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        left_mask, right_mask = masks_of_step(rows, rows_left, cols, cols_left, inner, k, start, EVEN_K)
        left_tile = tl.load(left + left_offsets, mask=left_mask, other=0.0)
        first_tile = tl.load(first + first_offsets, mask=right_mask, other=0.0)
        second_tile = tl.load(second + second_offsets, mask=right_mask, other=0.0)
        first_sums = tl.dot(left_tile, first_tile, first_sums, input_precision="ieee")
        second_sums = tl.dot(left_tile, second_tile, second_sums, input_precision="ieee")
        left = advance(left, BLOCK_K, left_col)
        first = advance(first, BLOCK_K, first_row)
        second = advance(second, BLOCK_K, second_row)
    return first_sums, second_sums


# Launches


def transposed(array: Array) -> Array:
    """The view with its last two axes swapped."""
    (*lead, rows, cols), (*lead_strides, row, col) = array.shape, array.strides
    return Array((*lead, cols, rows), array.dtype, (*lead_strides, col, row), array.aligned)


def shrink(name: str, block: int, size: int) -> int:
    """The block, no larger than the array needs. Triton's tiles are powers of two, and `tl.dot` wants at least 16."""
    if block < 16 or block & (block - 1):
        raise ValueError(f"config: {name} is {block}; it must be a power of two, and at least 16")
    return min(block, max(16, triton.next_power_of_2(size)))


def warps(num_warps: int, shrunk: int) -> int:
    """Fewer for a tile that shrank by that factor."""
    return min(num_warps, max(4, num_warps // shrunk))


def strides(name: str, array: Array | None, *axes: str) -> dict[str, int]:
    """The strides by parameter name, with 0 for an absent array and for a batch of one, which is never stepped.

    axes are those of the array, "batch", "row" and "col" where none are named.
    """
    axes = axes or ("batch", "row", "col")
    found = (0,) * len(axes) if array is None else (array.strides[0] if array.shape[0] > 1 else 0, *array.strides[1:])
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, found, strict=True)}


def wide(*tiles: tuple[Array, int, int]) -> bool:
    """Whether offsets inside one of these tiles (array, rows, columns) need 64 bits."""
    return needs_wide_offsets((rows, cols, array.strides[-2], array.strides[-1]) for array, rows, cols in tiles)


def runs_along_rows(array: Array) -> bool:
    """Whether 16 elements of a row lie side by side, so that one address serves a wide load from any row on."""
    return array.strides[-1] == 1 and array.shape[-1] % 16 == 0 and array.strides[-2] % 16 == 0


def has_runs(array: Array) -> bool:
    """The same along rows, or along columns from every 16th row on."""
    return runs_along_rows(array) or runs_along_rows(transposed(array))


def has_descriptor(array: Array, item_bytes: int) -> bool:
    """Whether the copy engine can load tiles of it: one matrix, its rows or columns runs that begin at 16 bytes."""
    batch, rows, cols = array.shape
    if batch != 1 or not array.aligned or not rows * cols or max(rows, cols) >= 2**31:
        return False
    return any(_is_run(array, axis, item_bytes) for axis in (1, 2))


def turned(array: Array, item_bytes: int) -> bool:
    """Whether the runs of a matrix that has a descriptor are its columns."""
    return not _is_run(array, 2, item_bytes)


def _is_run(array: Array, axis: int, item_bytes: int) -> bool:
    apart = array.strides[3 - axis] * item_bytes
    return array.strides[axis] == 1 and copies_apart(apart)
