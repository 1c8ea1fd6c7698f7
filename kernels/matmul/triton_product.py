"""The kernels of matmul's products on GPUs: one multiplies, one adds the parts of sums that were cut.

A tile is loaded by addresses, for any strides, or by the chip's copy engine where the strides allow it. The programs
are as many as the tiles, or as the chip runs at a time, and then each walks many. Where tiles are too few to keep the
chip busy, a sum is cut along k: its parts go to scratch, and a second kernel adds them in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.triton_epilogue import DESCRIBED_COLS, epilogue
from ..tiles.triton_products import add_product, element, grouped
from ..tiles.triton_tiles import advance


@triton.jit(do_not_specialize=["m", "first", "tiles", "parts"])
def matmul(
    a, b, bias, residual, preactivation, out,
    m, n, k, first, tiles, parts,
    a_batch, a_row, a_col, b_batch, b_row, b_col,
    bias_batch, bias_col, residual_batch, residual_row, residual_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, PERSISTENT: tl.constexpr, SPECIALIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, TURNED_A: tl.constexpr, TURNED_B: tl.constexpr, DESCRIBED: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGNED_M: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of `activation(a @ b + bias) + residual`, and of `a @ b + bias` where it is kept.

    With PARTS, out [items, BLOCK_M, BLOCK_N] gets the sum of one part of k instead; an item is one part of one tile.
    """
    if ALIGNED_M:
        m = m // 16 * 16  # m is not specialised on, so that its changes compile nothing: tell what the plan knows of it
    if DESCRIPTORS:
        if TURNED_A:
            a = tl.make_tensor_descriptor(a, [k, m], [a_col, 1], [BLOCK_K, BLOCK_M])
        else:
            a = tl.make_tensor_descriptor(a, [m, k], [a_row, 1], [BLOCK_M, BLOCK_K])
        if TURNED_B:
            b = tl.make_tensor_descriptor(b, [n, k], [b_col, 1], [BLOCK_N, BLOCK_K])
        else:
            b = tl.make_tensor_descriptor(b, [k, n], [b_row, 1], [BLOCK_K, BLOCK_N])
    if DESCRIBED:
        COLS: tl.constexpr = min(DESCRIBED_COLS, BLOCK_N)
        out = tl.make_tensor_descriptor(out, [m, n], [n, 1], [BLOCK_M, COLS])
        if SAVES:
            preactivation = tl.make_tensor_descriptor(preactivation, [m, n], [n, 1], [BLOCK_M, COLS])
    if PERSISTENT:
        # Made one with the loop along k, so that a program loads its next tile while it stores this one.
        for item in tl.range(
            tl.program_id(0), tiles * parts, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZE
        ):
            _item(
                item, a, b, bias, residual, preactivation, out, m, n, k, first, parts,
                a_batch, a_row, a_col, b_batch, b_row, b_col,
                bias_batch, bias_col, residual_batch, residual_row, residual_col,
                ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, PRECISION, PARTS, False,
                DESCRIPTORS, TURNED_A, TURNED_B, DESCRIBED, EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )  # fmt: skip
    else:
        _item(
            tl.program_id(0), a, b, bias, residual, preactivation, out, m, n, k, first, parts,
            a_batch, a_row, a_col, b_batch, b_row, b_col,
            bias_batch, bias_col, residual_batch, residual_row, residual_col,
            ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, PRECISION, PARTS, SPECIALIZE,
            DESCRIPTORS, TURNED_A, TURNED_B, DESCRIBED, EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip


@triton.jit
def _item(
    item, a, b, bias, residual, preactivation, out, m, n, k, first, parts,
    a_batch, a_row, a_col, b_batch, b_row, b_col,
    bias_batch, bias_col, residual_batch, residual_row, residual_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, SPECIALIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, TURNED_A: tl.constexpr, TURNED_B: tl.constexpr, DESCRIBED: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile, or one part of k of one."""
    begin, end, tile = 0, k, first + item
    if PARTS:
        length = tl.cdiv(tl.cdiv(k, BLOCK_K), parts) * BLOCK_K
        begin = item % parts * length
        end = tl.minimum(k, begin + length)
        tile = first + item // parts
    batch, row, col = _place(tile, m, n, DESCRIPTORS, BLOCK_M, BLOCK_N, GROUP_M)

    if DESCRIPTORS:
        sums = _sum_by_descriptors(
            a, b, row, col, begin, end, TURNED_A, TURNED_B, PRECISION, SPECIALIZE, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        a = advance(advance(advance(a, batch, a_batch), row, a_row), begin, a_col)
        b = advance(advance(advance(b, batch, b_batch), col, b_col), begin, b_row)
        sums = add_product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), a, b, m - row, n - col, end - begin, a_row, a_col, b_row, b_col,
            PRECISION, EVEN_K, WIDE, BLOCK_K,
        )  # fmt: skip

    if PARTS:
        _store_part(sums, out, item)
    else:
        epilogue(
            sums, bias, residual, preactivation, out, batch, row, col, m, n,
            bias_batch, bias_col, residual_batch, residual_row, residual_col,
            ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE, DESCRIBED,
        )  # fmt: skip


@triton.jit
def _place(tile, m, n, ONE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(batch, row, col) of the first element of a tile, from where all offsets count; of ONE matrix batch is 0."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = 0
    if not ONE:
        batch = tile // (tiles_m * tiles_n)
        tile = tile % (tiles_m * tiles_n)
    tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP_M)
    return batch, tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def _sum_by_descriptors(
    a, b, row, col, begin, end, TURNED_A: tl.constexpr, TURNED_B: tl.constexpr,
    PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a @ b [BLOCK_M, BLOCK_N] over k from begin to end; what lies outside an array is loaded as 0."""
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_K), warp_specialize=SPECIALIZE):
        start = begin + step * BLOCK_K
        if TURNED_A:
            a_tile = a.load([start, row]).T
        else:
            a_tile = a.load([row, start])
        if TURNED_B:
            b_tile = b.load([col, start]).T
        else:
            b_tile = b.load([start, col])
        sums = tl.dot(a_tile, b_tile, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _store_part(sums, out, item):
    """Store a tile in scratch [items, BLOCK_M, BLOCK_N], which has room for all of it."""
    rows = tl.arange(0, sums.shape[0])
    cols = tl.arange(0, sums.shape[1])
    out = element(out, item, 0, 0, sums.shape[0], sums.shape[1])
    tl.store(out + (rows[:, None] * sums.shape[1] + cols[None, :]), sums)


@triton.jit(do_not_specialize=["m", "first", "parts"])
def add_parts(
    scratch, bias, residual, same_preactivation, same_out, preactivation, out,
    m, n, first, parts, bias_batch, bias_col, residual_batch, residual_row, residual_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A piece [ROWS, COLS] of a tile: its parts, from the first on, and then the epilogue.

    same_preactivation and same_out are the outputs again where other tiles of them are written already.
    """
    across: tl.constexpr = BLOCK_N // COLS
    pieces: tl.constexpr = BLOCK_M // ROWS * across
    number = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    batch, row, col = _place(first + number, m, n, False, BLOCK_M, BLOCK_N, GROUP_M)
    inside_row, inside_col = piece // across * ROWS, piece % across * COLS
    row += inside_row
    col += inside_col

    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    exists = (rows < m - row)[:, None] & (cols < n - col)[None, :]
    pointers = element(scratch, tl.cast(number, tl.int64) * parts, inside_row, inside_col, BLOCK_M, BLOCK_N) + (
        rows[:, None] * BLOCK_N + cols[None, :]
    )
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for _ in tl.range(0, parts, loop_unroll_factor=8):  # so many loads are on their way at a time
        sums += tl.load(pointers, mask=exists, other=0.0)
        pointers += BLOCK_M * BLOCK_N

    epilogue(
        sums, bias, residual, preactivation, out, batch, row, col, m, n,
        bias_batch, bias_col, residual_batch, residual_row, residual_col,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE,
    )  # fmt: skip
