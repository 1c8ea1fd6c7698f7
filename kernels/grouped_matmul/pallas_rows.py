"""The TPU kernel of every product whose result has the rows of its groups: the forward, its gate, and dlhs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_tiles import (
    LANES,
    call_params,
    elementwise_piece,
    few_registers,
    split_parts,
    whole_or_fit,
)
from ..tiles.targets import Target
from .pallas_ahead import Ahead, GroupVisit, ahead_scratch, can_fetch
from .pallas_products import (
    add_product,
    finish_rows_of_group,
    in_rows_of_group,
    rows_of_piece,
    scratch,
    store_piece,
    total,
)
from .pallas_schedule import Visits, fit_rows
from .tiles import GroupedMatmulTiles


def rows(
    tiles: GroupedMatmulTiles,
    target: Target,
    lefts: Sequence[jax.Array],
    rights: Sequence[jax.Array],
    sizes: jax.Array,
    activation: str | None = None,
    saves: bool = False,
    turned: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Of one left [batch, tokens, k] and each right [batch, groups, k, n] (turned: [batch, groups, n, k]) a product.

    Two products are gated, and kept if it saves; those of two lefts are added up.
    """
    (batch, tokens, k), groups, n = lefts[0].shape, rights[0].shape[1], rights[0].shape[2 if turned else 3]
    dtype = lefts[0].dtype
    out = jax.ShapeDtypeStruct((batch, tokens, n), dtype)
    kept = jax.ShapeDtypeStruct((batch, 2, tokens, n), dtype) if saves else None
    if not (batch and tokens and n and k and groups):  # nothing to write, or sums of nothing
        return jnp.zeros(out.shape, dtype), (None if kept is None else jnp.zeros(kept.shape, dtype))

    block_m = fit_rows("block_m", tiles.block_m, tokens, groups, target)
    block_n, block_k = (
        whole_or_fit("block_n", tiles.block_n, n, target),
        whole_or_fit("block_k", tiles.block_k, k, target),
    )
    visits = Visits.of(sizes, tokens, block_m, every=False)

    def at(b: Any, v: Any, s: Any, group: Any, tile: Any) -> tuple[Any, Any, Any]:
        """(block of rows, group, step along k) of a visit; for the rows of nobody nothing new is copied."""
        number = b * visits.count + v
        owned = group[number] < groups
        return tile[number], jnp.minimum(group[number], groups - 1), jnp.where(owned, s, 0)

    def left_at(b: Any, j: Any, v: Any, s: Any, group: Any, tile: Any, *_: Any) -> Any:
        row, _, step = at(b, v, s, group, tile)
        return b, row, step

    def right_at(b: Any, j: Any, v: Any, s: Any, group: Any, tile: Any, *_: Any) -> Any:
        _, owner, step = at(b, v, s, group, tile)
        return (b, owner, j, step) if turned else (b, owner, step, j)

    def out_at(b: Any, j: Any, v: Any, s: Any, group: Any, tile: Any, *_: Any) -> Any:
        return b, tile[b * visits.count + v], j

    def kept_at(b: Any, j: Any, v: Any, s: Any, group: Any, tile: Any, *_: Any) -> Any:
        return b, 0, tile[b * visits.count + v], j

    right_block = (block_n, block_k) if turned else (block_k, block_n)
    steps = pl.cdiv(k, block_k)
    ahead = can_fetch(right_block, rights[0].shape[2:], turned, steps, target)
    of_right = pl.BlockSpec(memory_space=pl.ANY) if ahead else pl.BlockSpec((None, None, *right_block), right_at)
    results = pl.pallas_call(
        partial(
            _rows_kernel,
            activation=activation,
            turned=turned,
            products=len(rights),
            lefts=len(lefts),
            groups=groups,
            visits=visits.count,
            blocks=pl.cdiv(n, block_n),
            waits=target.siblings > 0,
            steps=steps,
            tail=k - (steps - 1) * block_k,
            columns=target.matrix_unit or LANES,
            shared_rows=rows_of_piece(target),
            piece=(16, LANES) if few_registers(target) and saves else elementwise_piece(target),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, pl.cdiv(n, block_n), visits.count, steps),
            in_specs=[pl.BlockSpec((None, block_m, block_k), left_at) for _ in lefts] + [of_right for _ in rights],
            out_specs=[
                None if kept is None else pl.BlockSpec((None, 2, block_m, block_n), kept_at),
                pl.BlockSpec((None, block_m, block_n), out_at),
            ],
            scratch_shapes=[
                *scratch(
                    dtype, (block_m, block_n), (block_m, block_k), right_block, 1 if len(lefts) == 2 else len(rights)
                ),
                ahead_scratch(right_block, dtype, len(rights)) if ahead else None,
            ],
        ),
        out_shape=[kept, out],
        name="grouped_matmul_dlhs" if turned else "grouped_matmul",
        **call_params(target, ("parallel", "parallel", "arbitrary", "arbitrary")),
    )(*visits.arrays, visits.following, *lefts, *rights)
    return results[1], results[0]


def _rows_kernel(
    group_ref: Any,
    tile_ref: Any,
    first_ref: Any,
    end_ref: Any,
    following_ref: Any,
    *refs: Any,
    activation: str | None,
    turned: bool,
    products: int,
    lefts: int,
    groups: int,
    visits: int,
    blocks: int,
    waits: bool,
    steps: int,
    tail: int,
    columns: int,
    shared_rows: int,
    piece: tuple[int, int],
) -> None:
    """One step along k of one visit of a tile [m, n].

    refs are lefts [m, k], rights [k, n] or turned [n, k], kept [2, m, n] or None, out [m, n], and scratch.
    """
    left_refs, right_refs = refs[:lefts], refs[lefts : lefts + products]
    kept_ref, out_ref, sums, lows, left_parts, right_parts, ahead = refs[lefts + products :]
    place, step = (pl.program_id(0), pl.program_id(1)), pl.program_id(3)
    visit = GroupVisit(group_ref, first_ref, end_ref, following_ref, place[0] * visits, pl.program_id(2))
    number = visit.number
    owned, first, end = visit.group < groups, visit.first, visit.end
    block_m = out_ref.shape[0]
    begin = tile_ref[number] * block_m
    of_group = partial(in_rows_of_group, (begin, block_m), (first, end), shared_rows)

    @pl.when(owned & (first < end))
    def _multiply() -> None:
        parts: list[Any] = []
        fetched: Sequence[Any] = right_refs
        if ahead is not None:
            held, slot_ref, done = ahead
            copies = Ahead(right_refs, held, slot_ref, done, turned, place, blocks, waits)
            fetched = copies.fetch(visit, (begin, block_m))
        for index, right_ref in enumerate(fetched):
            if index < lefts:
                left_ref = left_refs[index]
                parts = [left_ref] if left_parts is None else split_parts(left_ref, left_parts, piece)
            rights = [right_ref] if right_parts is None else split_parts(right_ref, right_parts, piece)
            at = 0 if lefts > 1 else index
            totals = (sums[at], None if lows is None else lows[at])
            begins = (step == 0) & (at == index)

            multiply = partial(add_product, totals, parts, rights, 1 if turned else 0, begins, columns)
            if tail == left_refs[0].shape[1]:
                of_group(partial(multiply, tail))
            else:
                pl.when(step < steps - 1)(partial(of_group, partial(multiply, left_refs[0].shape[1])))
                pl.when(step == steps - 1)(partial(of_group, partial(multiply, tail)))

    def finish(rows: Any, cols: Any, seen: jax.Array | None) -> None:
        found = [jnp.where(owned, total(sums, lows, place, rows, cols), 0) for place in range(len(sums))]
        store_piece(out_ref, kept_ref, (rows, cols), found, activation, seen)

    pl.when((step == steps - 1) & (first < end))(
        lambda: finish_rows_of_group(out_ref.shape, begin, (first, end), piece, finish)
    )
