"""What the norms' forward and backward share on GPUs: tiles of rows, their statistics, and the numbers of a launch.

In kernels an array whose rows are read is a tuple (pointer to its first row, row stride, column stride).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..tiles.launch import Array
from ..tiles.triton_products import indices
from ..tiles.triton_tiles import needs_wide_offsets
from .spec import NormSpec
from .tiles import NormConfig


def block_of(spec: NormSpec, config: NormConfig, rows: int, arrays: dict[str, Array | None]) -> dict[str, Any]:
    """The constants of a kernel that walks these arrays, [batch, rows, hidden] and [batch, hidden]: its tile."""
    sizes = {"block_rows": config.block_rows, "block_cols": config.block_cols}
    for name, size in sizes.items():
        if size < 1 or size & (size - 1):
            raise ValueError(f"config: {name} is {size}; it must be a power of two")
    block_rows = min(config.block_rows, triton.next_power_of_2(max(1, rows)))
    width = triton.next_power_of_2(max(1, spec.hidden))
    block_cols = min(config.block_cols, width)
    reached = [(block_rows, width, spec.hidden, 1)]
    reached += [(block_rows, width, *(0, *array.strides[1:])[-2:]) for array in arrays.values() if array is not None]
    return {
        "HIDDEN": spec.hidden,
        "WIDE": needs_wide_offsets(reached),
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLS": block_cols,
    }


def flags_of(spec: NormSpec) -> dict[str, Any]:
    """The constants of the options."""
    return {"CENTERS": spec.centers, "ZERO_CENTERED": spec.zero_centered}


@triton.jit
def place_of(row_count, BLOCK_ROWS: tl.constexpr):
    """(batch, first row) of this program, where each batch has as many programs as tiles of rows."""
    tiles = tl.cdiv(row_count, BLOCK_ROWS)
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_ROWS


@triton.jit
def load_columns(
    array, col, rows_exist, HIDDEN: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """[ROWS, COLS] of an array's rows from column `col`, as they are; what lies outside reads as 0."""
    rows = indices(ROWS, WIDE)
    cols = col + indices(COLS, WIDE)
    pointers = array[0] + (rows[:, None] * array[1] + cols[None, :] * array[2])
    return tl.load(pointers, mask=rows_exist & (cols < HIDDEN)[None, :], other=0.0)


@triton.jit
def load_tile(
    source, added, col, rows_exist, ADDS: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`source`, or `source + added` rounded to their dtype, as float32 [ROWS, COLS] from column `col`."""
    tile = load_columns(source, col, rows_exist, HIDDEN, WIDE, ROWS, COLS)
    if ADDS:
        other = load_columns(added, col, rows_exist, HIDDEN, WIDE, ROWS, COLS)
        tile = (tile.to(tl.float32) + other.to(tl.float32)).to(tile.dtype)
    return tile.to(tl.float32)


@triton.jit
def load_scale(weight, weight_col, cols, ZERO_CENTERED: tl.constexpr, HIDDEN: tl.constexpr):
    """float32 [1, COLS], what the normalised columns `cols` are multiplied by."""
    scale = tl.load(weight + cols * weight_col, mask=cols < HIDDEN, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        scale += 1.0
    return scale[None, :]


@triton.jit
def moments(tile, eps, CENTERS: tl.constexpr, HIDDEN: tl.constexpr):
    """Of whole rows, 0 past their end, the mean (0 if it is not subtracted) and the factor, float32 [ROWS, 1]."""
    mean = tl.zeros([tile.shape[0], 1], tl.float32)
    if CENTERS:
        mean = tl.sum(tile, axis=1, keep_dims=True) / HIDDEN
        tile = tl.where((tl.arange(0, tile.shape[1]) < HIDDEN)[None, :], tile - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(tile * tile, axis=1, keep_dims=True) / HIDDEN + eps)


@triton.jit
def walked_moments(
    source, added, rows_exist, eps, CENTERS: tl.constexpr, ADDS: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The same of rows longer than a tile, in one walk.

    The squares about the mean of each tile are moved to the mean of all: Chan, Golub & LeVeque, "Updating formulae and
    a pairwise algorithm for computing sample variances" (1979).
    """
    mean = tl.zeros([ROWS, 1], tl.float32)
    squares = tl.zeros([ROWS, 1], tl.float32)
    for col in range(0, HIDDEN, COLS):
        tile = load_tile(source, added, col, rows_exist, ADDS, HIDDEN, WIDE, ROWS, COLS)
        if CENTERS:
            count = tl.minimum(HIDDEN - col, COLS)
            new = count / (col + count)  # the share of this tile in all columns so far
            own_mean = tl.sum(tile, axis=1, keep_dims=True) / count
            tile = tl.where((tl.arange(0, COLS) < HIDDEN - col)[None, :], tile - own_mean, 0.0)
            apart = own_mean - mean
            squares += apart * apart * new * col
            mean += apart * new
        squares += tl.sum(tile * tile, axis=1, keep_dims=True)
    return mean, tl.rsqrt(squares / HIDDEN + eps)
