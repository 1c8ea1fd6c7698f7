"""The GPU kernels whose tiles are rows of a group: the product with the group's matrix, and the gate of two.

`_rows` is the forward of the product, and with the matrices turned dlhs, which for a gate is the sum of two products.
`_gated` is the forward of the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, contiguous
from ..tiles.triton_activations import activate
from ..tiles.triton_products import element, grouped, halves, indices, shrink, strides, warps
from ..tiles.triton_tiles import advance, needs_wide_offsets
from .tiles import GroupedMatmulTiles
from .triton_schedule import entry

Named = Mapping[str, Array]
EPILOGUE_COLS = tl.constexpr(32)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _rows(
    left, right, left_up, right_up, tiles, out,
    tokens, n, k, groups, slots,
    left_batch, left_row, left_col, right_batch, right_group, right_row, right_col,
    left_up_batch, left_up_row, left_up_col, right_up_batch, right_up_group, right_up_row, right_up_col,
    TWO: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `left @ right[group]`, plus `left_up @ right_up[group]` if there are TWO."""
    batch, slot, col = place(slots, n, BLOCK_N, GROUP_M)
    group, row, end, _ = entry(tiles, batch, slots, slot)
    if row >= end:
        return
    length = tl.where(group < groups, k, 0)  # the rows of nobody are sums of nothing
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = _add_product(
        sums, advance(advance(left, batch, left_batch), row, left_row),
        advance(advance(advance(right, batch, right_batch), group, right_group), col, right_col),
        end - row, n - col, length, left_row, left_col, right_row, right_col, EVEN_K, WIDE, BLOCK_K,
    )  # fmt: skip
    if TWO:
        sums = _add_product(
            sums, advance(advance(left_up, batch, left_up_batch), row, left_up_row),
            advance(advance(advance(right_up, batch, right_up_batch), group, right_up_group), col, right_up_col),
            end - row, n - col, length, left_up_row, left_up_col, right_up_row, right_up_col, EVEN_K, WIDE, BLOCK_K,
        )  # fmt: skip
    store(sums, out, batch, row, col, tokens, n, end, WIDE)


@triton.jit
def _add_product(
    sums, left, right, rows_left, cols_left, k, left_row, left_col, right_row, right_col,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums + left @ right, of the rows at `left` [rows_left, k] and the columns at `right` [k, cols_left]."""
    rows = indices(sums.shape[0], WIDE)
    cols = indices(sums.shape[1], WIDE)
    inner = indices(BLOCK_K, WIDE)
    left_offsets = rows[:, None] * left_row + inner[None, :] * left_col  # [BLOCK_M, BLOCK_K]
    right_offsets = inner[:, None] * right_row + cols[None, :] * right_col  # [BLOCK_K, BLOCK_N]
    for start in range(0, k, BLOCK_K):
        left_mask = (rows < rows_left)[:, None]
        right_mask = (cols < cols_left)[None, :]
        if not EVEN_K:
            inner_exists = inner < k - start
            left_mask = left_mask & inner_exists[None, :]
            right_mask = right_mask & inner_exists[:, None]
        left_tile = tl.load(left + left_offsets, mask=left_mask, other=0.0)
        right_tile = tl.load(right + right_offsets, mask=right_mask, other=0.0)
        sums = tl.dot(left_tile, right_tile, sums, input_precision="ieee")
        left = advance(left, BLOCK_K, left_col)
        right = advance(right, BLOCK_K, right_row)
    return sums


@triton.jit(do_not_specialize=["tokens", "slots"])
def _gated(
    left, right, right_up, tiles, kept, out,
    tokens, n, k, groups, slots,
    left_batch, left_row, left_col, right_batch, right_group, right_row, right_col,
    right_up_batch, right_up_group, right_up_row, right_up_col,
    ACTIVATION: tl.constexpr, SAVES: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of what `left @ right[group]` and `left @ right_up[group]` make; kept has both."""
    batch, slot, col = place(slots, n, BLOCK_N, GROUP_M)
    group, row, end, _ = entry(tiles, batch, slots, slot)
    if row >= end:
        return
    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    left = advance(advance(left, batch, left_batch), row, left_row)
    right = advance(advance(advance(right, batch, right_batch), group, right_group), col, right_col)
    right_up = advance(advance(advance(right_up, batch, right_up_batch), group, right_up_group), col, right_up_col)
    left_offsets = rows[:, None] * left_row + inner[None, :] * left_col  # [BLOCK_M, BLOCK_K]
    right_offsets = inner[:, None] * right_row + cols[None, :] * right_col  # [BLOCK_K, BLOCK_N]
    right_up_offsets = inner[:, None] * right_up_row + cols[None, :] * right_up_col  # [BLOCK_K, BLOCK_N]

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    length = tl.where(group < groups, k, 0)  # the rows of nobody are sums of nothing
    for start in range(0, length, BLOCK_K):
        left_mask = (rows < end - row)[:, None]
        right_mask = (cols < n - col)[None, :]
        if not EVEN_K:
            inner_exists = inner < k - start
            left_mask = left_mask & inner_exists[None, :]
            right_mask = right_mask & inner_exists[:, None]
        left_tile = tl.load(left + left_offsets, mask=left_mask, other=0.0)
        right_tile = tl.load(right + right_offsets, mask=right_mask, other=0.0)
        right_up_tile = tl.load(right_up + right_up_offsets, mask=right_mask, other=0.0)
        gate = tl.dot(left_tile, right_tile, gate, input_precision="ieee")
        up = tl.dot(left_tile, right_up_tile, up, input_precision="ieee")
        left = advance(left, BLOCK_K, left_col)
        right = advance(right, BLOCK_K, right_row)
        right_up = advance(right_up, BLOCK_K, right_up_row)
    store_gated(gate, up, kept, out, batch, row, col, tokens, n, end, ACTIVATION, SAVES, WIDE)


@triton.jit
def store_gated(
    gate, up, kept, out, batch, row, col, tokens, n, end,
    ACTIVATION: tl.constexpr, SAVES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store what tiles of gate and up make, whose first element is (row, col), and both where they are kept.

    Wide tiles go by halves: the activation and addresses of all of them at once would not fit the registers.
    """
    if gate.shape[1] > EPILOGUE_COLS:
        gate_left, gate_right = halves(gate)
        up_left, up_right = halves(up)
        store_gated(gate_left, up_left, kept, out, batch, row, col, tokens, n, end, ACTIVATION, SAVES, WIDE)
        col += gate_left.shape[1]
        store_gated(gate_right, up_right, kept, out, batch, row, col, tokens, n, end, ACTIVATION, SAVES, WIDE)
    else:
        if SAVES:
            store(gate, kept, 2 * batch, row, col, tokens, n, end, WIDE)
            store(up, kept, 2 * batch + 1, row, col, tokens, n, end, WIDE)
        store(activate(gate, ACTIVATION) * up, out, batch, row, col, tokens, n, end, WIDE)


@triton.jit
def store(tile, out, batch, row, col, rows_total, n, end, WIDE: tl.constexpr):
    """Store what lies before row `end` of a tile whose first element is (row, col) of [batch, rows_total, n]."""
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
def place(slots, n, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(batch, slot, first column) of this program's tile."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0) // (slots * tiles_n)
    slot, tile_n = grouped(tl.program_id(0) % (slots * tiles_n), slots, tiles_n, GROUP_M)
    return batch, slot, tile_n * BLOCK_N


# Launches


def fit_rows(tiles: GroupedMatmulTiles, tokens: int, groups: int) -> int:
    """block_m, no larger than a group needs on average: most of a larger tile would be empty."""
    return shrink("block_m", tiles.block_m, triton.cdiv(tokens, max(groups, 1)))


def rows_launch(
    tiles: GroupedMatmulTiles, block_m: int, schedule: Array, lefts: Named, rights: Named, names: tuple[str, str]
) -> Launch:
    """The launch of `_rows` over one left and right or two, of any strides; names are those of the list and of out."""
    (left, *left_up), (right, *right_up) = lefts.values(), rights.values()
    of_tiles = _of_tiles(tiles, block_m, schedule, left, (right, *right_up))
    of_tiles["numbers"] |= _strides("left_up", *(left_up or (None,))) | _strides("right_up", *(right_up or (None,)))
    of_tiles["constants"]["TWO"] = bool(left_up)
    (left_name, *left_up_name), (right_name, *right_up_name) = lefts, rights
    inputs = (left_name, right_name, *(left_up_name or [""]), *(right_up_name or [""]), names[0])
    return Launch(_rows, inputs=inputs, outputs=(names[1],), **of_tiles)


def gated_launch(
    tiles: GroupedMatmulTiles, block_m: int, schedule: Array, inputs: Named, name: str, activation: str, saves: bool
) -> Launch:
    """The launch of `_gated` over lhs, rhs and rhs_up of any strides; name is that of the list."""
    left, right, right_up = inputs.values()
    of_tiles = _of_tiles(tiles, block_m, schedule, left, (right, right_up))
    of_tiles["numbers"] |= _strides("right_up", right_up)
    of_tiles["constants"] |= {"ACTIVATION": activation, "SAVES": saves}
    outputs = ("preactivations", "out") if saves else ("out",)
    return Launch(_gated, inputs=(*inputs, name) if saves else (*inputs, name, ""), outputs=outputs, **of_tiles)


def _of_tiles(
    tiles: GroupedMatmulTiles, block_m: int, schedule: Array, left: Array, rights: tuple[Array, ...]
) -> dict[str, Any]:
    """The arguments of a launch that have to do with its tiles, and with left and the first of rights."""
    (batch, tokens, k), (_, groups, _, n) = left.shape, rights[0].shape
    slots = schedule.shape[1]
    block_n, block_k = shrink("block_n", tiles.block_n, n), shrink("block_k", tiles.block_k, k)
    shrunk = tiles.block_m * tiles.block_n // (block_m * block_n)
    out = contiguous((batch, tokens, n), "")
    if not (runs_along_rows(left) and runs_along_rows(out) and all(map(has_runs, rights))):
        # Each element has an address of its own: those of a large step do not fit the registers, nor does a large
        # tile fit the shared memory on its way to the store.
        block_n, block_k = min(block_n, 128), 16
    pieces = [(left, block_m, block_k), (out, block_m, block_n), *((right, block_k, block_n) for right in rights)]
    return {
        "grid": (batch * slots * triton.cdiv(n, block_n),),
        "numbers": {"tokens": tokens, "n": n, "k": k, "groups": groups, "slots": slots}
        | _strides("left", left)
        | _strides("right", rights[0]),
        "constants": {
            "EVEN_K": k % block_k == 0,
            "WIDE": wide(*pieces),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_M": tiles.group_m,
        },
        "num_warps": warps(tiles.num_warps, shrunk),
        "num_stages": tiles.num_stages,
        "dot_dtype": left.dtype,
    }


def turned(array: Array) -> Array:
    """The view with its last two axes swapped."""
    swap = (*range(len(array.shape) - 2), len(array.shape) - 1, len(array.shape) - 2)
    return Array(tuple(array.shape[axis] for axis in swap), array.dtype, tuple(array.strides[axis] for axis in swap))


def wide(*tiles: tuple[Array, int, int]) -> bool:
    """Whether offsets inside one of these tiles (array, rows, columns) need 64 bits."""
    return needs_wide_offsets((rows, cols, array.strides[-2], array.strides[-1]) for array, rows, cols in tiles)


def runs_along_rows(array: Array) -> bool:
    """Whether 16 elements of a row lie side by side, so that one address serves a wide load from any row on."""
    return array.strides[-1] == 1 and array.shape[-1] % 16 == 0 and array.strides[-2] % 16 == 0


def has_runs(array: Array) -> bool:
    """The same along rows, or along columns from every 16th row on."""
    return runs_along_rows(array) or runs_along_rows(turned(array))


def _strides(name: str, array: Array | None) -> dict[str, int]:
    axes = ("batch", "group", "row", "col") if name.startswith("right") else ("batch", "row", "col")
    return strides(name, array, *axes)
