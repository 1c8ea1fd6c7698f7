"""The TPU kernel of quantised matrices, dequantised block by block in VMEM: the product, its gate, and dlhs.

A visit turns the block of its group's codes into numbers, and multiplies its rows by them. Where a sum has one step,
the visits of a group, which follow each other, share the numbers of the first. In the forward a scale that a whole
column shares never reaches the numbers: it multiplies the sums. Codes are then exact in bfloat16, as MX weights are
with their scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.formats import FORMATS, HALF
from ..tiles.pallas_formats import as_int8, code_piece, dequantise
from ..tiles.pallas_tiles import (
    LANES,
    SUBLANES,
    call_params,
    elementwise_piece,
    few_registers,
    round_up,
    split_parts,
    whole_or_fit,
)
from ..tiles.targets import Target
from .pallas_ahead import Ahead, GroupVisit, ahead_scratch, can_fetch
from .pallas_products import add_product, finish_rows_of_group, in_rows_of_group, rows_of_piece, store_piece, total
from .pallas_schedule import Visits, fit_rows
from .spec import GroupedMatmulSpec
from .tiles import GroupedMatmulTiles

Matrix = tuple[jax.Array, jax.Array, jax.Array | None]


def quantized_rows(
    spec: GroupedMatmulSpec,
    tiles: GroupedMatmulTiles,
    target: Target,
    lefts: Sequence[jax.Array],
    matrices: Sequence[Matrix],
    sizes: jax.Array,
    k: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Of one left [batch, tokens, k] and each matrix a product, gated if there are two, and kept if the spec saves.

    Where k is given, dlhs: of lefts [batch, tokens, n] and the matrices transposed, their products added up. Blocks are
    cut along k and n, whichever is summed; "rows" of a matrix are along k. A matrix is its codes, scales and zeros.
    """
    matrices = [(as_int8(values), as_int8(scales), zeros) for values, scales, zeros in matrices]
    (batch, tokens, summed), groups, n = lefts[0].shape, *matrices[0][0].shape[1::2]
    dtype, transposes = lefts[0].dtype, k is not None
    k = summed if k is None else k
    columns = k if transposes else n
    saves = spec.save_preactivations and not transposes
    out = jax.ShapeDtypeStruct((batch, tokens, columns), dtype)
    kept = jax.ShapeDtypeStruct((batch, 2, tokens, columns), dtype) if saves else None
    if not (batch and tokens and columns and summed and groups):  # nothing to write, or sums of nothing
        return jnp.zeros(out.shape, dtype), (None if kept is None else jnp.zeros(kept.shape, dtype))

    form, scaled = FORMATS[spec.format or ""], bool(spec.group_size)
    block_m = fit_rows("block_m", tiles.block_m, tokens, groups, target)
    block_n, block_k = whole_or_fit("block_n", tiles.block_n, n, target), _block_k(spec, tiles.block_k, k)
    code_rows = -(-block_k // (2 * HALF)) * HALF if form.packed else block_k
    number_rows = 2 * code_rows if form.packed else block_k
    block_out, block_sum = (block_k, block_n) if transposes else (block_n, block_k)
    steps = pl.cdiv(summed, block_sum)
    visits = Visits.of(sizes, tokens, block_m, every=False)

    def at(b: Any, v: Any, s: Any, group: Any) -> tuple[Any, Any]:
        """(group, step) of a visit; for the rows of nobody nothing new is copied."""
        number = b * visits.count + v
        return jnp.minimum(group[number], groups - 1), jnp.where(group[number] < groups, s, 0)

    def left_at(b: Any, j: Any, v: Any, s: Any, group: Any, tile: Any, *_: Any) -> Any:
        return b, tile[b * visits.count + v], at(b, v, s, group)[1]

    def rows_at(b: Any, j: Any, v: Any, s: Any, group: Any, *_: Any) -> Any:
        owner, step = at(b, v, s, group)
        return (b, owner, j, step) if transposes else (b, owner, step, j)

    def columns_at(b: Any, j: Any, v: Any, s: Any, group: Any, *_: Any) -> Any:
        owner, step = at(b, v, s, group)
        return b, owner, 0, step if transposes else j

    def out_at(b: Any, j: Any, v: Any, s: Any, group: Any, tile: Any, *_: Any) -> Any:
        return b, tile[b * visits.count + v], j

    def kept_at(b: Any, j: Any, v: Any, s: Any, group: Any, tile: Any, *_: Any) -> Any:
        return b, 0, tile[b * visits.count + v], j

    scale_rows = min(matrices[0][1].shape[2], -(-number_rows // spec.group_size)) if scaled else 1
    of_scales = pl.BlockSpec((None, None, scale_rows, block_n), rows_at if scaled else columns_at)
    codes = matrices[0][0]
    ahead = can_fetch((code_rows, block_n), codes.shape[2:], transposes, steps, target)
    of_codes = pl.BlockSpec((None, None, code_rows, block_n), rows_at)
    of_matrix = (pl.BlockSpec(memory_space=pl.ANY) if ahead else of_codes, of_scales, of_scales)
    arrays = [  # zeros in a dtype of which a block may have eight rows, as the scales' are
        (values, scales, None if zeros is None else zeros.astype(jnp.bfloat16)) for values, scales, zeros in matrices
    ]

    wide = dtype == jnp.float32
    exact = form.block_scales or not (scaled or transposes)  # in bfloat16
    part_dtype = jnp.bfloat16 if wide else dtype
    numbers = pltpu.VMEM((3 if wide and not exact else 1, number_rows, block_n), part_dtype)
    sums = [pltpu.VMEM((block_m, block_out), jnp.float32)] * (1 if transposes else len(matrices))
    results = pl.pallas_call(
        partial(
            _kernel,
            name=spec.format or "",
            group_size=spec.group_size,
            activation=spec.activation,
            transposes=transposes,
            groups=groups,
            visits=visits.count,
            blocks=pl.cdiv(columns, block_out),
            waits=target.siblings > 0,
            steps=steps,
            tail=summed - (steps - 1) * block_sum,
            columns=target.matrix_unit or LANES,
            shared_rows=rows_of_piece(target),
            piece=(16, LANES) if few_registers(target) and saves else elementwise_piece(target),
            codes_piece=code_piece(target),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, pl.cdiv(columns, block_out), visits.count, steps),
            in_specs=[
                [pl.BlockSpec((None, block_m, block_sum), left_at)] * len(lefts),
                [tuple(None if a is None else s for a, s in zip(m, of_matrix, strict=True)) for m in arrays],
            ],
            out_specs=[
                None if kept is None else pl.BlockSpec((None, 2, block_m, block_out), kept_at),
                pl.BlockSpec((None, block_m, block_out), out_at),
            ],
            scratch_shapes=[
                sums,
                sums if wide else None,
                pltpu.VMEM((3, block_m, block_sum), jnp.bfloat16) if wide else None,
                [numbers] * len(matrices),
                ahead_scratch((code_rows, block_n), codes.dtype, len(matrices)) if ahead else None,
            ],
        ),
        out_shape=[kept, out],
        name="grouped_matmul_quantized_dlhs" if transposes else "grouped_matmul_quantized",
        **call_params(target, ("parallel", "parallel", "arbitrary", "arbitrary")),
    )(*visits.arrays, visits.following, list(lefts), arrays)
    return results[1], results[0]


def _kernel(
    group_ref: Any,
    tile_ref: Any,
    first_ref: Any,
    end_ref: Any,
    following_ref: Any,
    left_refs: Any,
    matrix_refs: Any,
    kept_ref: Any | None,
    out_ref: Any,
    sums: Any,
    lows: Any | None,
    left_parts: Any | None,
    all_numbers: Any,
    ahead: Any | None,
    *,
    name: str,
    group_size: int,
    activation: str | None,
    transposes: bool,
    groups: int,
    visits: int,
    blocks: int,
    waits: bool,
    steps: int,
    tail: int,
    columns: int,
    shared_rows: int,
    piece: tuple[int, int],
    codes_piece: tuple[int, int],
) -> None:
    """One step of one visit of a tile [m, columns].

    lefts are [m, sum], matrices (codes, scales, zeros) of [k, n], kept [2, m, columns] or None, out [m, columns].
    """
    place, step = (pl.program_id(0), pl.program_id(1)), pl.program_id(3)
    visit = GroupVisit(group_ref, first_ref, end_ref, following_ref, place[0] * visits, pl.program_id(2))
    number, fresh = visit.number, visit.fresh
    owned, first, end = visit.group < groups, visit.first, visit.end
    block_m, block = out_ref.shape[0], left_refs[0].shape[1]
    begin = tile_ref[number] * block_m
    of_group = partial(in_rows_of_group, (begin, block_m), (first, end), shared_rows)
    scales_numbers = bool(group_size) or transposes

    def write_numbers(codes: Sequence[Any]) -> None:
        for values_ref, (_, scales_ref, zeros_ref), numbers in zip(codes, matrix_refs, all_numbers, strict=True):
            of_block = scales_ref if scales_numbers else None
            dequantise(values_ref, of_block, zeros_ref, numbers, name, group_size, codes_piece)

    @pl.when(owned & (first < end))
    def _multiply() -> None:
        codes = [values_ref for values_ref, _, _ in matrix_refs]
        if ahead is not None:
            held, slot_ref, done = ahead
            copies = Ahead(codes, held, slot_ref, done, transposes, place, blocks, waits)
            codes = copies.fetch(visit, (begin, block_m))
        to_numbers = partial(write_numbers, codes)
        if steps == 1:
            pl.when(fresh)(to_numbers)
        else:
            to_numbers()
        parts: list[Any] = []
        for index, numbers in enumerate(all_numbers):
            if index < len(left_refs):
                left_ref = left_refs[index]
                parts = [left_ref] if left_parts is None else split_parts(left_ref, left_parts, piece)
            at = 0 if transposes else index
            totals = (sums[at], None if lows is None else lows[at])
            rights = [numbers.at[part] for part in range(numbers.shape[0])]
            multiply = partial(
                add_product, totals, parts, rights, 1 if transposes else 0, (step == 0) & (at == index), columns
            )
            if tail == block:
                of_group(partial(multiply, tail))
            else:
                pl.when(step < steps - 1)(partial(of_group, partial(multiply, block)))
                pl.when(step == steps - 1)(partial(of_group, partial(multiply, tail)))

    def finish(rows: Any, cols: Any, seen: jax.Array | None) -> None:
        found = []
        for place in range(len(sums)):
            product = total(sums, lows, place, rows, cols)
            if not scales_numbers:
                product = product * matrix_refs[place][1][:, cols].astype(jnp.float32)
            found.append(jnp.where(owned, product, 0))
        store_piece(out_ref, kept_ref, (rows, cols), found, None if transposes else activation, seen)

    pl.when((step == steps - 1) & (first < end))(
        lambda: finish_rows_of_group(out_ref.shape, begin, (first, end), piece, finish)
    )


def _block_k(spec: GroupedMatmulSpec, block: int, k: int) -> int:
    """The whole of k if the block holds it, else as long as a block of scales has groups, and bytes have halves."""
    form = FORMATS[spec.format or ""]
    scale_rows = 32 if form.block_scales else SUBLANES
    unit = max(spec.group_size * scale_rows, 2 * HALF if form.packed else LANES)
    return min(k, round_up(block, unit))
