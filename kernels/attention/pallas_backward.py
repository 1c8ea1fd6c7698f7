"""The backward kernel of attention on TPUs: the gradients of queries, keys and values in one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.expressions import SCORE, const, derivative, evaluate
from ..tiles.pallas_tiles import (
    LANES,
    SUBLANES,
    call_params,
    columns,
    dot,
    dot_nt,
    fold,
    pad_to,
    round_up,
    rows,
    split_parts,
    stretch,
    stretch_room,
    turned_piece,
    unfold,
)
from ..tiles.targets import Target
from .pallas_scores import FUNCTIONS, Place, Scores, full, spread
from .pallas_tiling import Seen, Tiling
from .spec import AttentionInputs, AttentionSpec
from .tiles import AttentionConfig

_STRIP = 512  # queries: scores of more would only be spilled


def backward(
    spec: AttentionSpec,
    config: AttentionConfig,
    target: Target,
    arrays: AttentionInputs,
    lengths: tuple[jax.Array, ...],
    dout: jax.Array,
    statistics: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv.

    The statistics are lse in base 2, inf where a query has no weights, and delta, both [batch, q_heads, q_len].
    """
    q, k, v = arrays[:3]
    (batch, q_len, q_heads, head_dim), (_, kv_len, kv_heads, v_dim) = q.shape, v.shape
    group = q_heads // kv_heads
    sparse = arrays.dkv_runs is not None
    scores = Scores.of(spec, arrays, sparse)
    tiling = Tiling.choose(
        spec, config.dkv, target, (q_len, kv_len), bool(lengths), spec.score is not None, has_runs=sparse
    )
    scalars = tuple(array for array in (*lengths, arrays.dkv_runs, arrays.dropout_seed) if array is not None)
    block_q, block_kv, kv_padded = tiling.block_q, tiling.block_kv, round_up(kv_len, tiling.block_kv)
    plane_bytes = sum(
        2 * (block_kv if plane.whole else SUBLANES) * plane.itemsize for plane in scores.planes if plane.queries
    )
    tiling, major, stretches, heads = held(tiling, arrays, plane_bytes, target)
    splits, q_padded = group // heads, round_up(q_len, block_q) if tiling.follows else major * stretches

    def first_seen(b: Any, h: Any, s: Any, j: Any, g: Any, *scalars: Any) -> Any:
        """The first tile of queries that a tile of keys is seen by."""
        return tiling.sequence(b, scalars).visible_q(j * block_kv)[0]

    def q_head(b: Any, h: Any, s: Any, j: Any, g: Any, *scalars: Any) -> Any:
        if tiling.follows:
            return h * heads + g
        # Keys that no query of the stretch sees repeat the last head: nothing is fetched for them.
        begin, _, _, end = tiling.sequence(b, scalars).visible_q(j * block_kv)
        if sparse:
            begin, end = tiling.runs(b, h * heads + g, j, scalars).hull(begin, end)
        visible = begin * block_q < (s + 1) * major
        if tiling.left is not None or scalars:
            visible &= end * block_q > s * major
        return h * heads + jnp.where(visible, g, heads - 1)

    def per_query(size: int) -> pl.BlockSpec:
        if tiling.follows:  # positions, and else numbers of blocks; what is past the last query is not read
            return pl.BlockSpec(
                (None, None, pl.Element(size), pl.Element(major, (0, major))),
                lambda *step: (step[0], q_head(*step), 0, first_seen(*step) * block_q),
            )
        return pl.BlockSpec((None, None, size, major), lambda *step: (step[0], q_head(*step), 0, step[2]))

    def complete(*step: Any) -> Any:
        """The block of dq that a step writes: the first tile that sees the keys sees none after them."""
        if tiling.follows:
            return step[0], q_head(*step), 0, first_seen(*step)
        return step[0], step[1], 0, step[2]

    def kv_rows(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, block_kv, dim), lambda b, h, s, j, *_: (b, lax.div(h, splits), j, 0))

    def partial_sum(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, block_kv, dim), lambda b, h, s, j, *_: (s, b, h, j, 0))

    dq, dk, dv = pl.pallas_call(
        partial(_kernel, tiling=tiling, scores=scores, slope=slope_of(spec), turned=turned_piece(target, k.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, kv_heads * splits, stretches, kv_padded // block_kv, heads),
            in_specs=[
                per_query(head_dim),
                per_query(v_dim),
                per_query(1),
                per_query(1),
                kv_rows(head_dim),
                kv_rows(v_dim),
                *(
                    plane.block(block_kv, major, block_q, lambda *step: (step[0], q_head(*step), step[3], step[2]))
                    for plane in scores.planes
                ),
            ],
            out_specs=[
                pl.BlockSpec(
                    (None, *((1, head_dim, block_q) if tiling.follows else (heads, head_dim, major))), complete
                ),
                partial_sum(head_dim),
                partial_sum(v_dim),
            ],
            scratch_shapes=[
                pltpu.VMEM((heads, head_dim, major), jnp.float32),
                pltpu.VMEM((block_kv, head_dim), jnp.float32),
                pltpu.VMEM((block_kv, v_dim), jnp.float32),
                pltpu.VMEM((1, head_dim, block_kv), k.dtype),
                *[pltpu.VMEM((block_kv, block_q), q.dtype)] * 2,
                *(scratch for plane in scores.planes for scratch in plane.scratch(block_kv, block_q)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, q_heads, head_dim, q_padded), q.dtype),
            *(
                jax.ShapeDtypeStruct(
                    (stretches, batch, kv_heads * splits, kv_padded, dim),
                    k.dtype if stretches * splits == 1 else jnp.float32,
                )
                for dim in (head_dim, v_dim)
            ),
        ],
        name="attention_backward",
        **call_params(
            target, ("parallel", "parallel", "parallel", "arbitrary", "arbitrary"), checks_copies=bool(scalars)
        ),
    )(
        *scalars,
        # As columns: XLA compiles the fused change of both to rows for a minute.
        columns(q, q_padded),
        columns(dout, q_padded),
        *(pad_to(statistic[:, :, None, :], 3, q_padded) for statistic in statistics),
        rows(k, kv_padded),
        rows(v, kv_padded),
        *(plane.prepared(arrays.planes[plane.slot], q_padded, kv_padded, block_q) for plane in scores.planes),
    )
    dk, dv = (d.reshape(stretches, batch, kv_heads, splits, kv_padded, -1).sum(axis=(0, 3)) for d in (dk, dv))
    dk, dv = (d[:, :, :kv_len].transpose(0, 2, 1, 3).astype(k.dtype) for d in (dk, dv))
    return dq[..., :q_len].transpose(0, 3, 1, 2), dk, dv


def held(tiling: Tiling, arrays: AttentionInputs, plane_bytes: int, target: Target) -> tuple[Tiling, int, int, int]:
    """How many queries VMEM holds, in how many stretches of them, and of how many heads of a group the sums of dq.

    dq is summed, and then written, for a stretch of queries. Of dk and dv there are sums for each stretch, and for each
    share of a group: of stretches and shares as few as go together. Where windows end with their query, those that see
    a tile of keys are fewer: the kernel may hold them alone, and writes a tile of dq as soon as the last of its keys is
    past. plane_bytes: of the planes for a query.
    """
    q, k, v = arrays[:3]
    group, q_len, block_q = q.shape[2] // k.shape[2], q.shape[1], tiling.block_q
    width = round_up(q.shape[3], LANES) + round_up(v.shape[3], LANES)  # what a row of both takes in VMEM
    key_bytes = (2 * width + q.shape[3]) * k.dtype.itemsize + (4 + 2 * 4) * width
    room = stretch_room(tiling.block_kv * key_bytes, target)
    operand_bytes = 2 * width * q.dtype.itemsize + plane_bytes
    result_bytes = 2 * q.shape[3] * q.dtype.itemsize
    head_bytes = q.shape[3] * 4 + result_bytes

    def stretches_of(heads: int) -> int:
        return _even(-(-q_len // block_q), stretch(q_len, block_q, operand_bytes + heads * head_bytes, room)[1])

    fitting = max(1, (room // block_q - operand_bytes) // head_bytes)
    shares = [n for n in range(1, group + 1) if group % n == 0 and n <= fitting]
    heads = min(shares, key=lambda n: (stretches_of(n) * (group // n + 1), -n))
    stretches = stretches_of(heads)
    seen = tiling.most_queries * block_q
    follow_bytes = seen * (operand_bytes + group * q.shape[3] * 4) + block_q * result_bytes
    if 0 < seen < q_len and heads * stretches > 1 and not plane_bytes and follow_bytes <= room:
        return replace(tiling, follows=True), seen, 1, group
    return tiling, -(-q_len // (block_q * stretches)) * block_q, stretches, heads


def _even(blocks: int, least: int) -> int:
    """How many stretches of blocks: the least, or some more that are of one length, so that nothing is padded."""
    return next((count for count in range(least, 2 * least) if blocks % count == 0), least)


def slope_of(spec: AttentionSpec, variable: Any = SCORE) -> Any:
    """By how much the score of the call grows with the raw score, or another leaf, as an expression."""
    return derivative(SCORE if spec.score is None else spec.score, variable)


def weigh(
    scores: Scores, slope: Any, products: jax.Array, dweights: Any, rows: tuple[Any, Any], place: Place, seen: Seen
) -> Any:
    """Of a folded tile: the weights, and the gradient of what the score has the slope for; 0 where it is not seen.

    `rows` are lse and delta. The weights are those that stay, not yet made larger.
    """
    lse, delta = rows
    found, values = scores.of_tile(products, place, seen is not Seen.WHOLE, seen)
    weights = jnp.exp2(found - lse)
    if scores.dropout:
        dweights = scores.dropped(dweights / (1 - scores.dropout), place)
    change = weights * (dweights - delta)
    if slope != const(1.0):
        change = jnp.where(found > -jnp.inf, change * full(evaluate(slope, values, FUNCTIONS), change.shape), 0)
    return scores.dropped(weights, place), change


def _kernel(*refs: Any, tiling: Tiling, scores: Scores, slope: Any, turned: tuple[int, int]) -> None:
    """One tile of keys against a stretch of queries, all three gradients at once: five products a tile, not seven.

    dk and dv are complete after the last of the heads; dq stays in VMEM until the last tile of keys that it needs.
    """
    scalars, refs = refs[: tiling.prefetched], refs[tiling.prefetched :]
    q_ref, dout_ref = refs[:2]  # [head_dim, major] and [v_dim, major], of one query head
    lse_ref, delta_ref = refs[2:4]  # [1, major]
    k_ref, v_ref = refs[4:6]  # [block_kv, head_dim], [block_kv, v_dim]
    planes, refs = refs[6 : 6 + len(scores.planes)], refs[6 + len(scores.planes) :]
    # [heads, head_dim, major], or [1, head_dim, block_q] where queries follow; [block_kv, head_dim]; [block_kv, v_dim]
    dq_ref, dk_ref, dv_ref = refs[:3]
    dq_acc, dk_acc, dv_acc = refs[3:6]
    k_columns_ref = refs[6]  # the keys as [1, head_dim, block_kv]
    weights_ref, dscores_ref = refs[7:9]  # [block_kv, block_q], in q's dtype
    block_q, block_kv, part, scale = tiling.block_q, tiling.block_kv, tiling.part, scores.scale
    few = scores.rows_of(tiling)
    b, key, head = pl.program_id(0), pl.program_id(3) * block_kv, pl.program_id(4)
    q_head = pl.program_id(1) * dq_acc.shape[0] + head
    tiles, whole = q_ref.shape[1] // block_q, slice(0, block_q)
    sequence = tiling.sequence(b, scalars)
    bounds = sequence.visible_q(key)
    first_tile = bounds[0] if tiling.follows else pl.program_id(2) * tiles

    def queries_of(tile: Any, some: slice = whole) -> Any:
        """Some queries of a tile."""
        first = pl.multiple_of(tile * block_q, block_q) + some.start
        return pl.ds(pl.multiple_of(first, gcd(block_q, part)), some.stop - some.start)

    def sums_of(tile: Any, some: slice = whole) -> Any:
        """Where they are summed: the place of a tile that follows keys was that of one whose sums are complete."""
        return queries_of(lax.rem(first_tile + tile, tiles) if tiling.follows else tile, some)

    def clear(tile: Any, _: None = None) -> None:
        dq_acc[head, :, sums_of(tile)] = jnp.zeros((dq_acc.shape[1], block_q), jnp.float32)

    pl.when(pl.program_id(3) == 0)(lambda: lax.fori_loop(0, tiles, clear, None))
    if tiling.follows:  # the last tile sees these keys first
        clear(tiles - 1)

    @pl.when(head == 0)
    def _start_dkv() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

        split_parts(k_ref, k_columns_ref, turned, turned=True)

    def weights_of(tile: Any, row: Any, size: int, seen: Seen, some: slice) -> tuple[jax.Array, jax.Array]:
        """The weights of some rows and queries of a tile, and the gradients of their scores: [size, queries]."""
        at, keys = queries_of(tile, some), pl.ds(row, size)
        query = (first_tile + tile) * block_q + some.start
        place = Place(b, q_head, query, key + row, at, keys, sequence, sources, tiling.seed(scalars))
        products, dweights = fold(dot(k_ref[keys, :], q_ref[:, at])), fold(dot(v_ref[keys, :], dout_ref[:, at]))
        found = weigh(scores, slope, products, dweights, (lse_ref[:, at], delta_ref[:, at]), place, seen)
        weights, dscores = (unfold(array).astype(q_ref.dtype) for array in found)
        return weights, dscores

    def add_to_dkv(at: Any, row: Any, weights: jax.Array, dscores: jax.Array) -> None:
        keys = pl.ds(row, part)
        dv_acc[keys, :] += dot_nt(weights, dout_ref[:, at])
        dk_acc[keys, :] += dot_nt(dscores, q_ref[:, at])

    def add_to_dq(at: Any, row: Any, dscores: jax.Array) -> None:
        dq_acc[head, :, at] += dot(k_columns_ref[0, :, pl.ds(row, part)], dscores)

    def step(tile: Any, _: None, seen: Seen) -> None:
        def add(row: int) -> None:
            seeing = seen.queries(block_q, slice(row, row + part))
            for first in range(seeing.start, seeing.stop, _STRIP):
                some = slice(first, min(first + _STRIP, seeing.stop))
                weights, dscores = weights_of(tile, row, part, seen, some)
                add_to_dkv(queries_of(tile, some), row, weights, dscores)
                add_to_dq(sums_of(tile, some), row, dscores)

        for row in range(0, block_kv, part):
            if seen is Seen.MASKED:
                pl.when(sequence.sees((first_tile + tile) * block_q, key + row, part))(partial(add, row))
            else:
                add(row)

    def step_in_loops(tile: Any, _: None, seen: Seen) -> None:
        """The same with fewer registers: what lies between the products passes through memory, a few rows at a time."""

        def each(size: int, run: Any) -> None:
            lax.fori_loop(0, block_kv // size, lambda at, _: run(pl.multiple_of(at * size, size)), None)

        def write(row: Any) -> None:
            keys = pl.ds(row, few)
            weights_ref[keys, :], dscores_ref[keys, :] = weights_of(tile, row, few, seen, whole)

        def read_dkv(row: Any) -> None:
            add_to_dkv(queries_of(tile), row, weights_ref[pl.ds(row, part), :], dscores_ref[pl.ds(row, part), :])

        each(few, write)
        each(part, read_dkv)
        each(part, lambda row: add_to_dq(sums_of(tile), row, dscores_ref[pl.ds(row, part), :]))

    sources = spread(scores.planes, planes, refs[9:], part)
    in_loops = tiling.rolled or scores.has_expressions or scores.dropout > 0 or q_ref.shape[0] > 2 * LANES
    run = step_in_loops if in_loops else step
    first_edge = Seen.UP_TO_DIAGONAL if tiling.diagonal and not in_loops else Seen.MASKED
    last_edge = Seen.PAST_DIAGONAL if tiling.left_diagonal and not in_loops else Seen.MASKED

    def walk(begin: Any, whole_begin: Any, whole_end: Any, end: Any) -> None:
        if tiling.has_partial_tiles or scores.sparse:
            whole_begin = jnp.minimum(whole_begin, end)
            lax.fori_loop(begin, whole_begin, partial(run, seen=first_edge), None)
        whole_end = jnp.minimum(whole_end, end)
        lax.fori_loop(whole_begin, whole_end, partial(run, seen=Seen.WHOLE), None)
        if tiling.left is not None or tiling.has_partial_queries or scores.sparse:
            lax.fori_loop(jnp.maximum(whole_begin, whole_end), end, partial(run, seen=last_edge), None)

    if scores.sparse:
        tiling.runs(b, q_head, pl.program_id(3), scalars).each(bounds, first_tile, tiles, walk)
    else:
        walk(*(jnp.clip(bound - first_tile, 0, tiles) for bound in bounds))

    @pl.when(head == pl.num_programs(4) - 1)
    def _finish_dkv() -> None:
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        summed = dv_acc[...] / (1 - scores.dropout) if scores.dropout else dv_acc[...]
        dv_ref[...] = summed.astype(dv_ref.dtype)

    def write_dq(tile: Any, _: None = None) -> None:
        row, queries = (0, slice(None)) if tiling.follows else (head, queries_of(tile))
        dq_ref[row, :, queries] = (dq_acc[head, :, sums_of(tile)] * scale).astype(dq_ref.dtype)

    if tiling.follows:  # no query after the first tile's is its keys' last
        write_dq(0)
    else:
        pl.when(pl.program_id(3) == pl.num_programs(3) - 1)(lambda: lax.fori_loop(0, tiles, write_dq, None))
