"""The GPU kernels of drhs, `lhs^T @ dout` over the rows of each group, and for a gate of both its matrices.

Where tiles of drhs are few, a group much longer than the others would keep few cores at work while the rest are idle.
Groups are then cut into chunks of rows. The sums of a group that is one chunk are stored as they are; those of the
others are partial sums in float32, which a second kernel adds in the order of the rows: no atomics, and two runs are
bit-equal. A chunk is so long that the partial sums of all together are a few megabytes, whatever the sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, contiguous
from ..tiles.triton_products import (
    EPILOGUE_COLS,
    element,
    halves,
    indices,
    runs_along_rows,
    shrink,
    store,
    strides,
    warps,
    wide,
)
from ..tiles.triton_tiles import advance
from .tiles import GroupedMatmulTiles
from .triton_rows import Named
from .triton_schedule import SIZES, entry, partial_slots, rows_of_group, schedule_launch

PROGRAMS = 512  # as many as keep the cores of any chip at work
ADDED_ROWS, ADDED_COLS = 32, 64  # the tile of the kernel that only adds


@triton.jit(do_not_specialize=["tokens", "slots", "parts"])
def _drhs(
    left, right, right_up, tiles, out_up, partials, out,
    tokens, m, n, groups, slots, parts,
    left_batch, left_row, left_col, right_batch, right_row, right_col, right_up_batch, right_up_row, right_up_col,
    TWO: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `left^T @ right` of a chunk of rows, and if TWO of `left^T @ right_up`.

    left is [tokens, m] and right [tokens, n]; out [groups, m, n], partials [parts, 1 or 2, m, n].
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    col = program % tiles_n * BLOCK_N
    row = program // tiles_n % tiles_m * BLOCK_M
    slot = program // (tiles_n * tiles_m) % slots
    batch = program // (tiles_n * tiles_m) // slots
    group, first, end, partial = entry(tiles, batch, slots, slot)
    if end < first:  # an empty group has a tile, of zeros
        return
    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    left = advance(advance(advance(left, batch, left_batch), first, left_row), row, left_col)
    right = advance(advance(advance(right, batch, right_batch), first, right_row), col, right_col)
    left_offsets = rows[:, None] * left_col + inner[None, :] * left_row  # [BLOCK_M, BLOCK_K]
    right_offsets = inner[:, None] * right_row + cols[None, :] * right_col  # [BLOCK_K, BLOCK_N]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TWO:
        right_up = advance(advance(advance(right_up, batch, right_up_batch), first, right_up_row), col, right_up_col)
        right_up_offsets = inner[:, None] * right_up_row + cols[None, :] * right_up_col
        sums_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        exists = inner < end - start
        left_mask = (rows < m - row)[:, None] & exists[None, :]
        right_mask = exists[:, None] & (cols < n - col)[None, :]
        left_tile = tl.load(left + left_offsets, mask=left_mask, other=0.0)
        sums = tl.dot(left_tile, tl.load(right + right_offsets, mask=right_mask, other=0.0), sums,
                      input_precision="ieee")  # fmt: skip
        if TWO:
            right_up_tile = tl.load(right_up + right_up_offsets, mask=right_mask, other=0.0)
            sums_up = tl.dot(left_tile, right_up_tile, sums_up, input_precision="ieee")
            right_up = advance(right_up, BLOCK_K, right_up_row)
        left = advance(left, BLOCK_K, left_row)
        right = advance(right, BLOCK_K, right_row)

    number = batch * groups + group
    if SPLITS:
        part = tl.where(partial < 0, -1, (batch * parts + partial) * (2 if TWO else 1))
        _store_either(sums, partials, out, part, number, row, col, m, n, WIDE)
        if TWO:
            part = tl.where(partial < 0, -1, part + 1)
            _store_either(sums_up, partials, out_up, part, number, row, col, m, n, WIDE)
    else:
        store(sums, out, number, row, col, m, n, m, WIDE)
        if TWO:
            store(sums_up, out_up, number, row, col, m, n, m, WIDE)


@triton.jit
def _store_either(tile, partials, out, part, number, row, col, m, n, WIDE: tl.constexpr):
    """Store a tile in its partial sum, or where that is -1 in the result `number`, piece by piece.

    Both are masked: of two branches each would hold all pieces in registers.
    """
    if tile.shape[1] > EPILOGUE_COLS:
        left, right = halves(tile)
        _store_either(left, partials, out, part, number, row, col, m, n, WIDE)
        _store_either(right, partials, out, part, number, row, col + left.shape[1], m, n, WIDE)
    else:
        rows_of_partials = tl.where(part < 0, 0, m)
        store(tile, partials, tl.maximum(part, 0), row, col, m, n, rows_of_partials, WIDE)
        store(tile, out, number, row, col, m, n, m - rows_of_partials, WIDE)


@triton.jit(do_not_specialize=["tokens", "parts", "chunk"])
def _add_partials(
    group_sizes, partials, up_before, before, out_up, out,
    tokens, m, n, groups, parts, chunk, sizes_batch, sizes_group,
    TWO: tl.constexpr, WIDE: tl.constexpr, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the results of a group that is more than one chunk; the others have theirs."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    col = program % tiles_n * BLOCK_N
    row = program // tiles_n % tiles_m * BLOCK_M
    number = program // (tiles_n * tiles_m)
    batch = number // groups
    sizes = group_sizes + tl.cast(batch, tl.int64) * sizes_batch
    first, end, _, before_it = rows_of_group(sizes, number % groups, groups, sizes_group, tokens, chunk, True, SIZES)
    count = tl.cdiv(end - first, chunk)
    if count <= 1:
        return
    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    offsets = rows[:, None] * n + cols[None, :]
    exists = (rows < m - row)[:, None] & (cols < n - col)[None, :]
    PRODUCTS: tl.constexpr = 2 if TWO else 1
    for half in tl.static_range(PRODUCTS):
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in range(before_it, before_it + count):
            tile = element(partials, (batch * parts + part) * PRODUCTS + half, row, col, m, n)
            sums += tl.load(tile + offsets, mask=exists, other=0.0)
        result = out_up if half else out
        tl.store(element(result, number, row, col, m, n) + offsets, sums.to(out.dtype.element_ty), mask=exists)


def drhs_launches(
    tiles: GroupedMatmulTiles, sizes: Array, lefts: Named, rights: Named
) -> tuple[list[Launch], dict[str, Array]]:
    """The launches that write drhs, and drhs_up of a second right, and their scratch; arrays of any strides."""
    (left,), (right, *right_up) = lefts.values(), rights.values()
    (batch, tokens, m), n, groups = left.shape, right.shape[2], sizes.shape[1]
    block_m, block_n = shrink("block_m", tiles.block_m, m), shrink("block_n", tiles.block_n, n)
    block_k = shrink("block_k", tiles.block_k, triton.cdiv(tokens, max(groups, 1)))
    shrunk = tiles.block_m * tiles.block_n // (block_m * block_n)
    out = contiguous((batch, groups, m, n), "")
    if not all(map(runs_along_rows, (left, right, *right_up, out))):
        block_n, block_k = min(block_n, 128), 16  # for the reason that the kernels of rows have

    tiles_of_all = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    pieces = max(1, PROGRAMS // max(1, tiles_of_all))
    chunk = max(block_k, triton.cdiv(triton.cdiv(tokens, pieces), block_k) * block_k)
    splits = pieces > 1
    parts = partial_slots(tokens, chunk) if splits else 0
    schedule, chunks = schedule_launch("chunks", sizes, tokens, chunk, every=True)
    partials = contiguous((batch, parts, len(rights), m, n), "float32")
    numbers = {"tokens": tokens, "m": m, "n": n, "groups": groups, "parts": parts}
    up = right_up[0] if right_up else None
    product = Launch(
        _drhs,
        (batch * chunks.shape[1] * tiles_of_all,),
        inputs=(*lefts, *rights, "chunks") if right_up else (*lefts, *rights, "", "chunks", ""),
        outputs=("drhs_up", "partials", "drhs") if right_up else ("partials", "drhs"),
        numbers=numbers
        | {"slots": chunks.shape[1]}
        | strides("left", left)
        | strides("right", right)
        | strides("right_up", up),
        constants={
            "TWO": bool(right_up),
            "SPLITS": splits,
            "WIDE": wide((left, block_k, block_m), (right, block_k, block_n), (out, block_m, block_n))
            or (up is not None and wide((up, block_k, block_n))),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=warps(tiles.num_warps, shrunk),
        num_stages=tiles.num_stages,
        dot_dtype=left.dtype,
    )
    rows, cols = min(ADDED_ROWS, block_m), min(ADDED_COLS, block_n)
    adding = Launch(
        _add_partials,
        (batch * groups * triton.cdiv(m, rows) * triton.cdiv(n, cols) if splits else 0,),
        inputs=("group_sizes", "partials", *(("drhs_up", "drhs") if right_up else ("", "drhs", ""))),
        outputs=("drhs_up", "drhs") if right_up else ("drhs",),
        numbers=numbers | {"chunk": chunk} | strides("sizes", sizes, "batch", "group"),
        constants={
            "TWO": bool(right_up),
            "WIDE": wide((out, rows, cols)),
            "SIZES": SIZES,
            "BLOCK_M": rows,
            "BLOCK_N": cols,
        },
    )
    return [schedule, product, *([adding] if splits else [])], {"chunks": chunks, "partials": partials}
