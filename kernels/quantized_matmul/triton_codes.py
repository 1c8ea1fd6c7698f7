"""GPU kernels that round activations to 8 bits, a scale a row, and multiply codes by codes.

Both operands have k innermost, as instructions of 8 bits and less want it, and the sums are scaled after them. Of MX
formats the matrix units apply the scales themselves, to every 32 of k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.triton_epilogue import epilogue
from ..tiles.triton_formats import GROUP, block_scale, codes_of, is_packed, row_scale, scale_of
from ..tiles.triton_products import element, grouped, indices, store
from ..tiles.triton_tiles import advance


@triton.jit(do_not_specialize=["rows"])
def round_rows(
    a, codes, scales, rows, k, a_batch, a_row, a_col,
    FORMAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of a, as codes, contiguous [batch, rows, k], and its scale, float32 [batch, rows]."""
    batch = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    inner = indices(BLOCK_K, WIDE)
    a = advance(advance(a, batch, a_batch), row, a_row)
    codes = element(codes, batch, row, 0, rows, k)
    tops = tl.zeros([BLOCK_K], tl.float32)
    spoilt = tl.zeros([BLOCK_K], tl.int32)  # by a NaN, which a maximum may or may not keep
    for start in range(0, k, BLOCK_K):
        tile = tl.load(advance(a, start, a_col) + inner * a_col, mask=inner < k - start, other=0.0).to(tl.float32)
        tops = tl.maximum(tops, tl.abs(tile))
        spoilt |= (tile != tile).to(tl.int32)
    top = tl.where(tl.max(spoilt, axis=0) > 0, float("inf"), tl.max(tops, axis=0))
    scale = row_scale(top, FORMAT)
    tl.store(scales + tl.program_id(0), scale)
    divisor = tl.where(scale == scale, scale, 1.0)
    for start in range(0, k, BLOCK_K):
        exists = inner < k - start
        tile = tl.load(advance(a, start, a_col) + inner * a_col, mask=exists, other=0.0).to(tl.float32)
        tl.store(codes + start + inner, codes_of(tl.div_rn(tile, divisor), FORMAT), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def round_blocks(
    a, codes, scales, rows, k, groups, a_batch, a_row, a_col,
    FORMAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of a as codes, contiguous [batch, rows, k], and the scales of its blocks of 32, [batch, rows, groups]."""
    tiles_k = tl.cdiv(k, BLOCK_K)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    start = tl.program_id(0) % tiles_k * BLOCK_K
    row = tl.program_id(0) // tiles_k % tiles_m * BLOCK_M
    batch = tl.program_id(0) // (tiles_k * tiles_m)
    blocks: tl.constexpr = BLOCK_K // GROUP
    lines = indices(BLOCK_M, WIDE)
    inner = indices(BLOCK_K, WIDE)
    exists = (lines < rows - row)[:, None] & (inner < k - start)[None, :]
    a = advance(advance(advance(a, batch, a_batch), row, a_row), start, a_col)
    tile = tl.load(a + lines[:, None] * a_row + inner[None, :] * a_col, mask=exists, other=0.0).to(tl.float32)
    tile = tl.reshape(tile, [BLOCK_M, blocks, GROUP])
    spoilt = tl.max((tile != tile).to(tl.int32), axis=2) > 0
    byte = block_scale(tl.where(spoilt, float("inf"), tl.max(tl.abs(tile), axis=2)), FORMAT)
    of_blocks = indices(blocks, WIDE)
    stored = element(scales, batch, row, start // GROUP, rows, groups) + lines[:, None] * groups + of_blocks[None, :]
    there = (lines < rows - row)[:, None] & (of_blocks < groups - start // GROUP)[None, :]
    tl.store(stored, byte.to(tl.uint8), mask=there)
    scale = scale_of(byte, FORMAT, tl.float32)
    divisor = tl.where(scale == scale, scale, 1.0)[:, :, None]  # a power of two: the quotient is exact
    quotients = tl.reshape(tile / divisor, [BLOCK_M, BLOCK_K])
    pointers = element(codes, batch, row, start, rows, k) + lines[:, None] * k + inner[None, :]
    tl.store(pointers, codes_of(quotients, FORMAT), mask=exists)


@triton.jit(do_not_specialize=["m"])
def product_of_codes(
    a, a_scales, values, scales, bias, residual, preactivation, out,
    m, n, k, groups, batches,
    values_batch, values_row, values_col, scales_batch, scales_row, scales_col,
    bias_batch, bias_col, residual_batch, residual_row, residual_col,
    FORMAT: tl.constexpr, A_FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `activation(a @ w + bias) + residual`, of codes a [m, k] and values [n, k].

    With SPLITS it is a part of the sums alone: those of every SPLITS-th step, into out [splits * batches, m, n].
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tiles_m * tiles_n
    tile_m, tile_n = grouped(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP_M)
    batch = tl.program_id(0) // tiles % batches
    split = tl.program_id(0) // (tiles * batches)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N

    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    rows_exist = rows < m - row
    cols_exist = cols < n - col
    a = element(a, batch, row, 0, m, k)
    a_offsets = rows[:, None] * k + inner[None, :]  # [BLOCK_M, BLOCK_K]
    values = advance(advance(values, batch, values_batch), col, values_row)
    scales = advance(scales, batch, scales_batch)
    if A_FORMAT == "mxfp8":
        sums = _sum_blocks(
            a + a_offsets, element(a_scales, batch, row, 0, m, groups) + rows[:, None] * groups, values,
            advance(scales, col, scales_row) + cols[:, None] * scales_row,
            rows_exist, cols_exist, cols, k, groups, values_row, values_col, scales_col, split,
            FORMAT, EVEN_K, WIDE, SPLITS, BLOCK_K,
        )  # fmt: skip
    else:
        total = tl.int32 if A_FORMAT == "int8" else tl.float32
        sums = tl.zeros([BLOCK_M, BLOCK_N], total)
        w_offsets = cols[:, None] * values_row + inner[None, :] * values_col  # [BLOCK_N, BLOCK_K]
        for step in range(split, tl.cdiv(k, BLOCK_K), SPLITS):
            start = step * BLOCK_K
            a_mask = rows_exist[:, None]
            w_mask = cols_exist[:, None]
            if not EVEN_K:
                a_mask = a_mask & (inner < k - start)[None, :]
                w_mask = w_mask & (inner < k - start)[None, :]
            a_tile = tl.load(a + start + a_offsets, mask=a_mask, other=0.0)
            w_tile = tl.load(advance(values, start, values_col) + w_offsets, mask=w_mask, other=0.0)
            # sm_90 sums products of float8 in 14 bits, and so no more than a step at a time.
            sums = tl.dot(a_tile, tl.trans(w_tile), sums, max_num_imprecise_acc=BLOCK_K, out_dtype=total)
        scale = tl.load(advance(scales, col, scales_col) + cols * scales_col, mask=cols_exist, other=0.0)
        row_scales = tl.load(element(a_scales, batch, row, 0, m, 1) + rows, mask=rows_exist, other=0.0)
        sums = sums.to(tl.float32) * row_scales[:, None] * scale.to(tl.float32)[None, :]

    if SPLITS > 1:
        store(sums, out, split * batches + batch, row, col, m, n, m, WIDE)
    else:
        epilogue(
            sums, bias, residual, preactivation, out, batch, row, col, m, n,
            bias_batch, bias_col, residual_batch, residual_row, residual_col,
            ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE,
        )  # fmt: skip


@triton.jit
def _sum_blocks(
    a, a_scales, values, scales, rows_exist, cols_exist, cols, k, groups, values_row, values_col, scales_col, split,
    FORMAT: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The float32 sums of MX codes at the pointers a [BLOCK_M, BLOCK_K], scaled by the matrix units."""
    blocks: tl.constexpr = BLOCK_K // GROUP
    codes_a_byte: tl.constexpr = 2 if is_packed(FORMAT) else 1
    form: tl.constexpr = "e2m1" if is_packed(FORMAT) else "e4m3"
    width: tl.constexpr = BLOCK_K // codes_a_byte
    inner = indices(BLOCK_K, WIDE)
    packed = indices(width, WIDE)
    of_blocks = indices(blocks, WIDE)
    w_offsets = cols[:, None] * values_row + packed[None, :] * values_col  # [BLOCK_N, width]
    sums = tl.zeros([rows_exist.shape[0], cols_exist.shape[0]], tl.float32)
    for step in range(split, tl.cdiv(k, BLOCK_K), SPLITS):
        start = step * BLOCK_K
        a_mask = rows_exist[:, None]
        w_mask = cols_exist[:, None]
        block_mask = (of_blocks < groups - step * blocks)[None, :]
        if not EVEN_K:
            a_mask = a_mask & (inner < k - start)[None, :]
            w_mask = w_mask & (packed < tl.cdiv(k - start, codes_a_byte))[None, :]
        a_tile = tl.load(a + start, mask=a_mask, other=0.0)
        w_tile = tl.load(advance(values, step * width, values_col) + w_offsets, mask=w_mask, other=0.0)
        a_scale = tl.load(a_scales + step * blocks + of_blocks[None, :], mask=rows_exist[:, None] & block_mask, other=0)
        w_scale = tl.load(
            advance(scales, step * blocks, scales_col) + of_blocks[None, :] * scales_col,
            mask=cols_exist[:, None] & block_mask,
            other=0,
        )
        sums = tl.dot_scaled(a_tile, a_scale, "e4m3", tl.trans(w_tile), w_scale, form, sums)
    return sums
