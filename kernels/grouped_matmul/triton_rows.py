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
from ..tiles.triton_gate import store_gated
from ..tiles.triton_products import (
    add_product,
    grouped,
    has_runs,
    runs_along_rows,
    shrink,
    store,
    strides,
    two_products,
    warps,
    wide,
)
from ..tiles.triton_tiles import advance
from .tiles import GroupedMatmulTiles
from .triton_schedule import entry

Named = Mapping[str, Array]


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
    sums = add_product(
        sums, advance(advance(left, batch, left_batch), row, left_row),
        advance(advance(advance(right, batch, right_batch), group, right_group), col, right_col),
        end - row, n - col, length, left_row, left_col, right_row, right_col,
        "ieee", EVEN_K, WIDE, BLOCK_K,
    )  # fmt: skip
    if TWO:
        sums = add_product(
            sums, advance(advance(left_up, batch, left_up_batch), row, left_up_row),
            advance(advance(advance(right_up, batch, right_up_batch), group, right_up_group), col, right_up_col),
            end - row, n - col, length, left_up_row, left_up_col, right_up_row, right_up_col,
            "ieee", EVEN_K, WIDE, BLOCK_K,
        )  # fmt: skip
    store(sums, out, batch, row, col, tokens, n, end, WIDE)


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
    gate, up = two_products(
        advance(advance(left, batch, left_batch), row, left_row),
        advance(advance(advance(right, batch, right_batch), group, right_group), col, right_col),
        advance(advance(advance(right_up, batch, right_up_batch), group, right_up_group), col, right_up_col),
        end - row, n - col, tl.where(group < groups, k, 0),  # the rows of nobody are sums of nothing
        left_row, left_col, right_row, right_col, right_up_row, right_up_col, EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_gated(gate, up, kept, out, batch, row, col, tokens, n, end, ACTIVATION, SAVES, WIDE)


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


def _strides(name: str, array: Array | None) -> dict[str, int]:
    axes = ("batch", "group", "row", "col") if name.startswith("right") else ("batch", "row", "col")
    return strides(name, array, *axes)
