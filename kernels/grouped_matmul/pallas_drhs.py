"""The TPU kernel of drhs, `lhs^T @ dout` over the rows of each group, and for a gate of both its matrices.

The visits of a group follow each other. Rows of other groups are set to 0, on both sides: a NaN there, or past the last
row, would else reach the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_tiles import (
    LANES,
    call_params,
    elementwise_piece,
    in_pieces,
    turned_piece,
    whole_or_fit,
    write_parts,
)
from ..tiles.targets import Target
from .pallas_products import add_product, scratch, set_zero, total
from .pallas_schedule import Visits, fit_rows
from .tiles import GroupedMatmulTiles


def drhs(
    tiles: GroupedMatmulTiles, target: Target, left: jax.Array, rights: Sequence[jax.Array], sizes: jax.Array
) -> list[jax.Array]:
    """For each right [batch, tokens, n] the products `left^T @ right` over the rows of each group."""
    (batch, tokens, m), groups, n = left.shape, sizes.shape[1], rights[0].shape[2]
    out = jax.ShapeDtypeStruct((batch, groups, m, n), left.dtype)
    if not (batch and tokens and n and m and groups):
        return [jnp.zeros(out.shape, out.dtype) for _ in rights]
    block_m, block_n = (
        whole_or_fit("block_m", tiles.block_m, m, target),
        whole_or_fit("block_n", tiles.block_n, n, target),
    )
    block_k = fit_rows("block_k", tiles.block_k, tokens, groups, target)
    visits = Visits.of(sizes, tokens, block_k, every=True)

    def at(column: int) -> Any:
        def index(b: Any, i: Any, j: Any, v: Any, group: Any, tile: Any, *_: Any) -> Any:
            return b, tile[b * visits.count + v], (i, j)[column]

        return index

    def out_at(b: Any, i: Any, j: Any, v: Any, group: Any, *_: Any) -> Any:
        return b, group[b * visits.count + v], i, j

    results: list[jax.Array] = pl.pallas_call(
        partial(
            _drhs_kernel,
            products=len(rights),
            visits=visits.count,
            columns=target.matrix_unit or LANES,
            piece=elementwise_piece(target),
            turned=turned_piece(target, left.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, pl.cdiv(m, block_m), pl.cdiv(n, block_n), visits.count),
            in_specs=[pl.BlockSpec((None, block_k, block_m), at(0))]
            + [pl.BlockSpec((None, block_k, block_n), at(1)) for _ in rights],
            out_specs=[pl.BlockSpec((None, None, block_m, block_n), out_at) for _ in rights],
            scratch_shapes=scratch(
                left.dtype, (block_m, block_n), (block_m, block_k), (block_k, block_n), len(rights), always=True
            ),
        ),
        out_shape=[out] * len(rights),
        name="grouped_matmul_drhs",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(*visits.arrays, left, *rights)
    return results


def _drhs_kernel(
    group_ref: Any,
    tile_ref: Any,
    first_ref: Any,
    end_ref: Any,
    left_ref: Any,
    *refs: Any,
    products: int,
    visits: int,
    columns: int,
    piece: tuple[int, int],
    turned: tuple[int, int],
) -> None:
    """One visit: its rows [k] of left [k, m] and rights [k, n] are added to the tiles [m, n] of their group.

    refs are rights, outs [m, n], and scratch.
    """
    right_refs, out_refs = refs[:products], refs[products : 2 * products]
    sums, lows, left_parts, right_parts = refs[2 * products :]
    visit = pl.program_id(3)
    number = pl.program_id(0) * visits + visit
    group, first, end = group_ref[number], first_ref[number], end_ref[number]
    begins = (visit == 0) | (group_ref[number - jnp.minimum(visit, 1)] != group)
    ends = (visit == visits - 1) | (group_ref[number + jnp.where(visit == visits - 1, 0, 1)] != group)
    block_k = left_ref.shape[0]
    begin = tile_ref[number] * block_k
    whole = (first <= begin) & (end >= begin + block_k)

    def masked(ref: Any, rows: Any, cols: Any) -> jax.Array:
        values = ref[rows, cols].astype(jnp.float32)
        row = begin + rows.start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        return jnp.where((row >= first) & (row < end), values, 0)

    def accumulate(partly: bool) -> None:
        def turn(cols: Any, rows: Any) -> None:
            values = masked(left_ref, rows, cols) if partly else left_ref[rows, cols]
            write_parts(left_parts, cols, rows, values.T)

        masks = (max(LANES, turned[0] // 2), max(LANES, turned[1] // 2))  # they take registers too
        in_pieces(left_parts.shape[1:], masks if partly else turned, turn)
        lefts = [left_parts.at[index] for index in range(left_parts.shape[0])]
        for place, right_ref in enumerate(right_refs):
            rights = [right_ref]
            if partly or lows is not None:

                def write(rows: Any, cols: Any, ref: Any = right_ref) -> None:
                    write_parts(right_parts, rows, cols, masked(ref, rows, cols) if partly else ref[rows, cols])

                in_pieces(right_ref.shape, piece, write)
                rights = [right_parts.at[index] for index in range(right_parts.shape[0])]
            add_product(
                (sums[place], None if lows is None else lows[place]), lefts, rights, 0, begins, columns, block_k
            )

    pl.when((first < end) & whole)(partial(accumulate, False))
    pl.when((first < end) & ~whole)(partial(accumulate, True))

    @pl.when(begins & (first >= end))  # an empty group
    def _zero() -> None:
        for ref in (*sums, *(lows or ())):
            in_pieces(ref.shape, piece, partial(set_zero, ref))

    def finish(rows: Any, cols: Any) -> None:
        for place, out_ref in enumerate(out_refs):
            out_ref[rows, cols] = total(sums, lows, place, rows, cols).astype(out_ref.dtype)

    pl.when(ends)(lambda: in_pieces(out_refs[0].shape, piece, finish))
