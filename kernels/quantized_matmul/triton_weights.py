"""GPU kernels that dequantise tiles of a weight in registers: `a @ w`, and `dz @ w^T` of its backward.

A step reads rows of codes. Of formats with two codes a byte they are two tiles of weights, each multiplied by columns
of a of its own, so that nothing is interleaved. A tile of weights lies within one group along k: its scales are a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.triton_epilogue import epilogue
from ..tiles.triton_formats import (
    ROWS_APART,
    as_bytes,
    is_packed,
    numbers_of,
    place,
    weights_of,
)
from ..tiles.triton_products import element, grouped, indices, store
from ..tiles.triton_tiles import advance


@triton.jit(do_not_specialize=["m"])
def product(
    a, values, scales, zeros, bias, residual, preactivation, out,
    m, n, k, groups, batches,
    a_batch, a_row, a_col, values_batch, values_row, values_col, scales_batch, scales_row, scales_col,
    zeros_batch, zeros_row, zeros_col, bias_batch, bias_col, residual_batch, residual_row, residual_col,
    FORMAT: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGNED_M: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `activation(a @ w + bias) + residual`, BLOCK_K rows of codes a step.

    With SPLITS it is a part of the sums alone: those of every SPLITS-th step, into out [splits * batches, m, n].
    """
    if ALIGNED_M:
        m = m // 16 * 16  # m is not specialised on, so that its changes compile nothing: tell what the plan knows of it
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tiles_m * tiles_n
    tile_m, tile_n = grouped(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP_M)
    batch = tl.program_id(0) // tiles % batches
    split = tl.program_id(0) // (tiles * batches)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N

    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    rows_exist = indices(BLOCK_M, WIDE) < m - row
    cols_exist = cols < n - col
    a = advance(advance(a, batch, a_batch), row, a_row)
    values = advance(advance(as_bytes(values), batch, values_batch), col, values_col)
    scales = advance(advance(scales, batch, scales_batch), col, scales_col) + cols * scales_col
    a_offsets = indices(BLOCK_M, WIDE)[:, None] * a_row + inner[None, :] * a_col  # [BLOCK_M, BLOCK_K]
    w_offsets = inner[:, None] * values_row + cols[None, :] * values_col  # [BLOCK_K, BLOCK_N]
    zero_of_column = 0
    if HAS_ZEROS:
        zeros = advance(advance(as_bytes(zeros), batch, zeros_batch), col, zeros_col) + cols * zeros_col
        if not GROUP_SIZE:
            zero_of_column = tl.load(zeros, mask=cols_exist, other=0)[None, :]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    packed: tl.constexpr = is_packed(FORMAT)
    rows_of_codes = tl.cdiv(k, 2 * ROWS_APART) * ROWS_APART if packed else k
    for step in range(split, tl.cdiv(rows_of_codes, BLOCK_K), SPLITS):
        code_row, first = place(step, FORMAT, BLOCK_K)
        code_mask = cols_exist[None, :]
        if not EVEN_K and not packed:
            code_mask = code_mask & (inner < k - first)[:, None]
        codes = tl.load(advance(values, code_row, values_row) + w_offsets, mask=code_mask, other=0)
        for high in tl.static_range(2 if packed else 1):
            start = first + high * ROWS_APART
            a_mask = rows_exist[:, None]
            if not EVEN_K:
                a_mask = a_mask & (inner < k - start)[None, :]
            a_tile = tl.load(advance(a, start, a_col) + a_offsets, mask=a_mask, other=0.0)
            if GROUP_SIZE:
                w = weights_of(
                    codes, scales, zeros, start, cols_exist, groups, scales_row, zeros_row,
                    FORMAT, GROUP_SIZE, HAS_ZEROS, high, True, a_tile.dtype,
                )  # fmt: skip
            else:
                w = numbers_of(codes, zero_of_column, FORMAT, high, HAS_ZEROS, a_tile.dtype)
            sums = tl.dot(a_tile, w, sums, input_precision="ieee")

    if not GROUP_SIZE:  # one scale a column: after the sum, where it rounds no weight
        sums *= tl.load(scales, mask=cols_exist, other=0.0).to(tl.float32)[None, :]
    if SPLITS > 1:
        store(sums, out, split * batches + batch, row, col, m, n, m, WIDE)
    else:
        epilogue(
            sums, bias, residual, preactivation, out, batch, row, col, m, n,
            bias_batch, bias_col, residual_batch, residual_row, residual_col,
            ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def product_with_transpose(
    dz, values, scales, zeros, da,
    m, n, k, groups, code_rows,
    dz_batch, dz_row, dz_col, values_batch, values_row, values_col, scales_batch, scales_row, scales_col,
    zeros_batch, zeros_row, zeros_col,
    FORMAT: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, PAIRS: tl.constexpr,
    EVEN_N: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The columns of `da = dz @ w^T` that BLOCK_K rows of codes stand for, [BLOCK_M, BLOCK_K] once or, packed, twice.

    PAIRS: a byte holds two neighbours along k. Strides of a turned weight come swapped, as those of a weight [k, n].
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_k = tl.cdiv(code_rows, BLOCK_K)
    tiles = tiles_m * tiles_k
    tile_m, tile_k = grouped(tl.program_id(0) % tiles, tiles_m, tiles_k, GROUP_M)
    batch = tl.program_id(0) // tiles
    row, code_row = tile_m * BLOCK_M, tile_k * BLOCK_K

    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    rows_exist = rows < m - row
    codes_exist = inner < code_rows - code_row
    dz = advance(advance(dz, batch, dz_batch), row, dz_row)
    values = advance(advance(as_bytes(values), batch, values_batch), code_row, values_row)
    scales = advance(scales, batch, scales_batch)
    if HAS_ZEROS:
        zeros = advance(as_bytes(zeros), batch, zeros_batch)
    dz_offsets = rows[:, None] * dz_row + cols[None, :] * dz_col  # [BLOCK_M, BLOCK_N]
    w_offsets = inner[:, None] * values_row + cols[None, :] * values_col  # [BLOCK_K, BLOCK_N]

    if PAIRS:
        first, apart, between = 2 * code_row, 1, 2
    else:
        first, apart, between = place(tile_k, FORMAT, BLOCK_K)[1], ROWS_APART, 1
    low_sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    high_sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32) if is_packed(FORMAT) else 0
    for start in range(0, n, BLOCK_N):
        cols_exist = cols < n - start
        dz_mask = rows_exist[:, None]
        code_mask = codes_exist[:, None]
        if not EVEN_N:
            dz_mask = dz_mask & cols_exist[None, :]
            code_mask = code_mask & cols_exist[None, :]
        dz_tile = tl.load(advance(dz, start, dz_col) + dz_offsets, mask=dz_mask, other=0.0)
        codes = tl.load(advance(values, start, values_col) + w_offsets, mask=code_mask, other=0)
        of_columns = advance(scales, start, scales_col) + cols * scales_col
        zeros_of_columns = advance(zeros, start, zeros_col) + cols * zeros_col if HAS_ZEROS else 0
        low = weights_of(
            codes, of_columns, zeros_of_columns, first, cols_exist, groups, scales_row, zeros_row,
            FORMAT, GROUP_SIZE, HAS_ZEROS, False, True, dz_tile.dtype,
        )  # fmt: skip
        low_sums = tl.dot(dz_tile, tl.trans(low), low_sums, input_precision="ieee")
        if is_packed(FORMAT):
            high = weights_of(
                codes, of_columns, zeros_of_columns, first + apart, cols_exist, groups, scales_row, zeros_row,
                FORMAT, GROUP_SIZE, HAS_ZEROS, True, True, dz_tile.dtype,
            )  # fmt: skip
            high_sums = tl.dot(dz_tile, tl.trans(high), high_sums, input_precision="ieee")

    _store_columns(low_sums, da, batch, row, first, between, m, k, WIDE)
    if is_packed(FORMAT):
        _store_columns(high_sums, da, batch, row, first + apart, between, m, k, WIDE)


@triton.jit
def _store_columns(sums, da, batch, row, first, between, m, k, WIDE: tl.constexpr):
    """Store columns of a contiguous da [batch, m, k] that lie `between` apart, from column `first` on."""
    rows = indices(sums.shape[0], WIDE)
    cols = indices(sums.shape[1], WIDE) * between
    exists = (rows < m - row)[:, None] & (cols < k - first)[None, :]
    da = element(da, batch, row, 0, m, k) + first
    tl.store(da + rows[:, None] * k + cols[None, :], sums.to(da.dtype.element_ty), mask=exists)
