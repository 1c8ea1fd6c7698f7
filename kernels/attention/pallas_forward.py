"""The forward kernel of attention on TPUs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_tiles import (
    LANES,
    LN_2,
    LOG2_E,
    SUBLANES,
    call_params,
    columns,
    common_rows,
    dot,
    fold,
    round_up,
    rows,
    stretch,
    stretch_room,
    unfold,
)
from ..tiles.targets import Target
from .pallas_scores import Place, Scores, spread
from .pallas_tiling import Seen, Tiling
from .spec import AttentionInputs, AttentionSpec
from .tiles import AttentionConfig

_PIECE = 32  # rows of weights in registers at a time


def forward(
    spec: AttentionSpec,
    config: AttentionConfig,
    target: Target,
    arrays: AttentionInputs,
    lengths: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """out and lse; lengths is int32 [2, batch] of queries and keys, or () where all are those of the arrays."""
    q, k, v, sinks = arrays.q, arrays.k, arrays.v, arrays.sinks
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads, v_dim = k.shape[1], k.shape[2], v.shape[3]
    sparse = arrays.forward_runs is not None
    tiling = Tiling.choose(spec, config.forward, target, (q_len, kv_len), bool(lengths), has_runs=sparse)
    scores = Scores.of(spec, arrays, sparse)
    scalars = tuple(array for array in (*lengths, arrays.forward_runs, arrays.dropout_seed) if array is not None)
    block_q, block_kv, q_padded = tiling.block_q, tiling.block_kv, round_up(q_len, tiling.block_q)
    of_planes = sum(
        (2 * plane.itemsize if plane.queries else 4) * block_q if plane.keys else 0 for plane in scores.planes
    )
    tiling, major, stretches = stretched(tiling, kv_len, arrays, target, of_planes, not sparse and not scores.planes)

    def kv_stretch(b: Any, h: Any, i: Any, s: Any, *scalars: Any) -> Any:
        begin, _, _, end = tiling.sequence(b, scalars).visible_kv(i * block_q)
        if sparse:
            begin, end = tiling.runs(b, h, i, scalars).hull(begin, end)
        return tiling.nearest_stretch(s, begin, end, major)

    def keys(b: Any, h: Any, i: Any, s: Any, *scalars: Any) -> Any:
        if tiling.follows:  # a position, and else a number of blocks
            return pl.multiple_of(tiling.sequence(b, scalars).first_tile(i * block_q) * block_kv, block_kv)
        return kv_stretch(b, h, i, s, *scalars)

    def k_index(b: Any, h: Any, *step: Any) -> tuple[Any, ...]:
        return b, lax.div(h, q_heads // kv_heads), keys(b, h, *step), 0

    def v_index(b: Any, h: Any, *step: Any) -> tuple[Any, ...]:
        return b, lax.div(h, q_heads // kv_heads), 0, keys(b, h, *step)

    def plane_index(b: Any, h: Any, i: Any, s: Any, *scalars: Any) -> tuple[Any, ...]:
        return b, h, kv_stretch(b, h, i, s, *scalars), i

    def per_query(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, block_q), lambda b, h, i, s, *_: (b, h, 0, i))

    kv_padded = major * stretches
    walked: Any = major
    across: tuple[Any, Any] = head_dim, v_dim
    if tiling.follows:  # from any tile on; what is past the last one is not read
        kv_padded, walked = round_up(kv_len, block_kv), pl.Element(major, (0, major))
        across = pl.Element(head_dim), pl.Element(v_dim)
    operands = [columns(q, q_padded), rows(k, kv_padded), columns(v, kv_padded)]
    in_specs = [
        per_query(head_dim),
        pl.BlockSpec((None, None, walked, across[0]), k_index),
        pl.BlockSpec((None, None, across[1], walked), v_index),
    ]
    if sinks is not None:
        operands.append(jnp.broadcast_to(sinks[:, :, None, None] * LOG2_E, (batch, q_heads, 1, block_q)))
        in_specs.append(pl.BlockSpec((None, None, 1, block_q), lambda b, h, *_: (b, h, 0, 0)))
    if arrays.value_scales is not None:
        operands.append(jnp.broadcast_to(arrays.value_scales[:, :, None, None], (batch, q_heads, 1, block_q)))
        in_specs.append(pl.BlockSpec((None, None, 1, block_q), lambda b, h, *_: (b, h, 0, 0)))
    for plane in scores.planes:
        operands.append(plane.prepared(arrays.planes[plane.slot], q_padded, major * stretches, block_q))
        in_specs.append(plane.block(major, block_q, block_q, plane_index))

    out, lse = pl.pallas_call(
        partial(
            kernel,
            tiling=tiling,
            scores=scores,
            has_sinks=sinks is not None,
            has_value_scales=arrays.value_scales is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, q_heads, q_padded // block_q, stretches),
            in_specs=in_specs,
            out_specs=[per_query(v_dim), per_query(1)],
            scratch_shapes=[
                *sums(tiling, v),
                *(scratch for plane in scores.planes for scratch in plane.scratch(major, block_q)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, q_heads, v_dim, q_padded), spec.out_dtype),
            jax.ShapeDtypeStruct((batch, q_heads, 1, q_padded), jnp.float32),
        ],
        name="attention_forward",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary"), checks_copies=bool(scalars)),
    )(*scalars, *operands)
    return out[..., :q_len].transpose(0, 3, 1, 2), lse[:, :, 0, :q_len]


def stretched(
    tiling: Tiling,
    kv_size: int,
    arrays: AttentionInputs,
    target: Target,
    of_planes: int = 0,
    may_follow: bool = False,
) -> tuple[Tiling, int, int]:
    """What a tiling becomes where VMEM does not hold all keys at once; how many it holds, and how often.

    of_planes: bytes of the planes for a key. may_follow: whether it may hold those of a tile's window instead.
    """
    (head_dim, v_dim), item_bytes = (arrays.q.shape[3], arrays.v.shape[3]), arrays.q.dtype.itemsize
    width = round_up(head_dim, LANES) + round_up(v_dim, LANES)  # what a row of both takes in VMEM
    query_bytes = 2 * width * item_bytes + 4 * v_dim + (4 + item_bytes) * tiling.block_kv
    key_bytes = 2 * width * item_bytes + of_planes  # the stretch that is computed with, and the next one
    room = stretch_room(tiling.block_q * query_bytes, target)
    major, stretches = stretch(kv_size, tiling.block_kv, key_bytes, room)
    seen = tiling.most_tiles * tiling.block_kv
    if stretches > 1 and may_follow and 0 < seen < major:
        return replace(tiling, follows=True), seen, 1
    if stretches > 1:  # the last tile of a stretch may be any
        tiling = replace(tiling, diagonal=False, left_diagonal=False)
    return tiling, major, stretches


def sums(tiling: Tiling, v: jax.Array) -> list[Any]:
    """The kernel's scratch, beside that of the planes."""
    block_q, block_kv = tiling.block_q, tiling.block_kv
    return [
        pltpu.VMEM((v.shape[3], block_q), jnp.float32),
        pltpu.VMEM((block_kv, block_q), jnp.float32),
        pltpu.VMEM((block_kv, block_q), v.dtype),
        *(pltpu.VMEM((size, block_q), jnp.float32) for size in (1, SUBLANES, SUBLANES)),
    ]


def kernel(*refs: Any, tiling: Tiling, scores: Scores, has_sinks: bool, has_value_scales: bool) -> None:
    """One tile of queries against a stretch of keys.

    The scores of the next tile are computed while the present one is exponentiated and summed: one keeps the matrix
    unit busy, the other the vector units. Both go strip by strip, which have nothing to do with each other, so that
    the compiler finds work for both units everywhere. scores_ref passes each part on, written just after it was read.
    """
    scalars, refs = refs[: tiling.prefetched], refs[tiling.prefetched :]
    q_ref, k_ref, v_ref = refs[:3]  # [head_dim, block_q], [major, head_dim], [v_dim, major]
    sinks_ref, refs = refs[3], refs[3 + has_sinks :]  # [1, block_q], base 2
    value_scales_ref, refs = refs[0], refs[has_value_scales:]  # [1, block_q]
    planes, refs = refs[: len(scores.planes)], refs[len(scores.planes) :]
    out_ref, lse_ref = refs[:2]  # [v_dim, block_q], [1, block_q]
    # [v_dim, block_q]; [block_kv, block_q]; the same in v's dtype; the maximum, [1, block_q]; that of the written
    # scores and the sum of the weights, [8, block_q], both still spread over the sublanes.
    acc, scores_ref, weights_ref, peak_ref, best_ref, total_ref = refs[2:8]
    block_q, block_kv, part = tiling.block_q, tiling.block_kv, tiling.part
    piece, few = common_rows(_PIECE, part), scores.rows_of(tiling)
    strips = [slice(start, start + tiling.strip) for start in range(0, block_q, tiling.strip)]
    one = 2.0**scores.weight_exponent  # what a weight of 1 is
    wide = q_ref.shape[0] > (LANES if tiling.rolled else 2 * LANES)
    h, first_tile = pl.program_id(1), pl.program_id(3) * (k_ref.shape[0] // block_kv)
    b, sequence, query = tiling.visit(pl.program_id(0), pl.program_id(2), scalars)
    first_tile = sequence.first_tile(query) if tiling.follows else first_tile
    cuts_corners = not wide and not scores.changes_weights
    cut = tiling.has_partial_tiles or scores.sparse
    edge = Seen.UP_TO_DIAGONAL if tiling.diagonal and cuts_corners else Seen.MASKED

    @pl.when(pl.program_id(3) == 0)
    def _start() -> None:
        acc[...] = jnp.zeros_like(acc)
        if has_sinks:  # a sink is a key whose value is 0
            peak_ref[...] = sinks_ref[...]
            total_ref[...] = jnp.broadcast_to(jnp.where(sinks_ref[...] == -jnp.inf, 0, one / SUBLANES), total_ref.shape)
        else:
            peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
            total_ref[...] = jnp.zeros_like(total_ref)

    def in_loops(seen: Seen) -> bool:
        """Whether so much is computed of a score that only a few rows' fit in registers."""
        return scores.score is not None or scores.masks(seen is not Seen.WHOLE) or wide

    def score(tile: Any, row: int, strip: slice, seen: Seen) -> None:
        """Write the scores of some keys of a tile and a strip of queries, and keep their maximum."""
        first = pl.multiple_of(tile * block_kv, block_kv) + row
        products = fold(dot(k_ref[pl.ds(first, part), :], q_ref[:, strip]))
        finish(row, first, products, strip, seen.masks(slice(row, row + part), strip), seen)

    def score_in_loops(tile: Any, row: int, seen: Seen) -> None:
        """The same for all queries."""
        first = pl.multiple_of(tile * block_kv, block_kv) + row
        scores_ref[row : row + part, :] = dot(k_ref[pl.ds(first, part), :], q_ref[...])

        def each(number: Any, _: None) -> None:
            at = pl.multiple_of(number * few, few)
            products = fold(scores_ref[pl.ds(row + at, few), :])
            finish(row + at, first + at, products, slice(0, block_q), seen is not Seen.WHOLE, seen)

        lax.fori_loop(0, part // few, each, None)

    def finish(row: Any, first: Any, products: jax.Array, strip: slice, masked: bool, seen: Seen) -> None:
        """Make scores of the products of some rows of a tile, which lie at `first` in the stretch."""
        size = products.shape[0] * SUBLANES
        key, keys, queries = first_tile * block_kv + first, pl.ds(first, size), pl.ds(strip.start, products.shape[2])
        place = Place(b, h, query + strip.start, key, queries, keys, sequence, sources)
        found, _ = scores.of_tile(products, place, masked, seen)
        scores_ref[pl.ds(row, size), strip] = unfold(found)
        best_ref[:, strip] = jnp.maximum(best_ref[:, strip], found.max(axis=0))

    def step(
        tile: Any,
        _: None,
        adding: Seen = Seen.WHOLE,
        following: Seen | None = Seen.WHOLE,
        shared: bool = False,
    ) -> None:
        """Add a tile whose scores are written, and write those of the following one.

        shared: whether it may hold other sequences' keys. Their weights are 0, but their values may be NaN.
        """
        peak = peak_ref[...]
        new_peak = jnp.maximum(peak, best_ref[...].max(axis=0, keepdims=True))
        finite_peak = jnp.where(new_peak == -jnp.inf, 0, new_peak)
        shrink = jnp.exp2(peak - finite_peak)
        finite_peak = finite_peak - scores.weight_exponent if scores.weight_exponent else finite_peak
        peak_ref[...] = new_peak
        best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
        total_ref[...] = total_ref[...] * shrink
        if scores.changes_weights:
            lax.fori_loop(0, block_kv // few, partial(change, tile, finite_peak), None)
        for strip in strips:
            added = adding.keys(block_kv, part, strip)
            followed = range(0) if following is None or in_loops(following) else following.keys(block_kv, part, strip)
            for row in range(0, block_kv, part):
                if row in added and not scores.changes_weights:
                    weigh(row, strip, finite_peak[:, strip])
                if following is not None and row in followed:
                    score(tile + 1, row, strip, following)
            keys = pl.ds(pl.multiple_of(tile * block_kv, block_kv) + added.start, len(added) * part)
            weights = weights_ref[added.start : added.stop, strip]
            for dim in range(0, v_ref.shape[0], LANES):
                dims = slice(dim, dim + LANES)
                values = v_ref[dims, keys]
                if shared:
                    at = (first_tile + tile) * block_kv + added.start
                    own = lax.broadcasted_iota(jnp.int32, values.shape, 1) + at
                    own = (own >= sequence.kv_first) & (own < sequence.kv_len)
                    values = jnp.where(own, values.astype(jnp.float32), 0).astype(values.dtype)
                acc[dims, strip] = acc[dims, strip] * shrink[:, strip] + dot(values, weights)
        if following is not None and in_loops(following):
            for row in range(0, block_kv, part):
                score_in_loops(tile + 1, row, following)

    def weigh(row: int, strip: slice, finite_peak: jax.Array) -> None:
        """Make weights of some scores, a piece at a time, and add them up."""
        for start in range(row, row + part, piece):
            weights = jnp.exp2(scores_ref[start : start + piece, strip] - finite_peak)
            total_ref[:, strip] += fold(weights).sum(axis=0)
            weights_ref[start : start + piece, strip] = weights.astype(v_ref.dtype)

    def change(tile: Any, finite_peak: Any, number: Any, _: None) -> None:
        """Make weights of a few scores, which count in the sum as they are, and meet v changed."""
        row = pl.multiple_of(number * few, few)
        at = pl.ds(row, few)
        weights = fold(jnp.exp2(scores_ref[at, :] - finite_peak))
        total_ref[...] += weights.sum(axis=0)
        first = pl.multiple_of(tile * block_kv + row, few)
        key, keys = first_tile * block_kv + first, pl.ds(first, few)
        place = Place(b, h, query, key, pl.ds(0, block_q), keys, sequence, sources, tiling.seed(scalars))
        weights_ref[at, :] = unfold(scores.changed(weights, place)).astype(v_ref.dtype)

    sources = spread(scores.planes, planes, refs[8:], part)
    tiles = k_ref.shape[0] // block_kv

    def walk(begin: Any, whole_begin: Any, whole_end: Any, end: Any) -> None:
        pl.when(end > begin)(partial(walk_some, begin, whole_begin, whole_end, end))

    def begin_with(tile: Any, seen: Seen) -> None:
        """Write the scores of the first tile."""
        if in_loops(seen):
            for row in range(0, block_kv, part):
                score_in_loops(tile, row, seen)
        else:
            for strip in strips:
                for row in seen.keys(block_kv, part, strip):
                    score(tile, row, strip, seen)

    def begin_as_seen(begin: Any, whole_begin: Any, whole_end: Any, end: Any) -> None:
        """The same, with a mask where one is needed, and without what lies past a diagonal."""
        if not cut:
            return begin_with(begin, Seen.WHOLE)
        starts_whole = whole_begin <= begin
        whole = starts_whole & (whole_end > begin)
        on_edge = starts_whole & ~whole & (begin == end - 1)
        pl.when(whole)(partial(begin_with, begin, Seen.WHOLE))
        if edge is Seen.UP_TO_DIAGONAL:
            pl.when(on_edge)(partial(begin_with, begin, edge))
            whole |= on_edge
        pl.when(~whole)(partial(begin_with, begin, Seen.MASKED))
        return None

    def walk_some(begin: Any, whole_begin: Any, whole_end: Any, end: Any) -> None:
        best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
        # Each loop goes by the tile whose scores it writes, the one after the tile that it adds. What was written with
        # a mask may be added as whole.
        if tiling.left_diagonal and cuts_corners:
            second = edge if tiling.left == block_kv - 1 else Seen.WHOLE

            def add_first() -> None:
                begin_with(begin, Seen.PAST_DIAGONAL)
                step(begin, None, adding=Seen.PAST_DIAGONAL, following=second)

            pl.when(whole_begin > begin)(add_first)
            pl.when(whole_begin <= begin)(partial(begin_as_seen, begin, whole_begin, whole_end, end))
            first = jnp.where(whole_begin > begin, begin + 1, begin)
        else:
            begin_as_seen(begin, whole_begin, whole_end, end)
            first = begin
            if tiling.left is not None or scores.sparse or tiling.packed:
                unshared = whole_begin if tiling.packed else whole_begin - 1
                first = jnp.clip(unshared, begin, end - 1)
                lax.fori_loop(begin, first, partial(step, following=Seen.MASKED, shared=tiling.packed), None)
        last = jnp.maximum(jnp.minimum(whole_end, end) - 1, first)
        lax.fori_loop(first, last, step, None)
        if cut:
            lax.fori_loop(last, end - 1, partial(step, following=edge), None)
        step(end - 1, None, adding=edge, following=None, shared=tiling.packed)

    bounds = sequence.visible_kv(query)
    if scores.sparse:
        tiling.runs(b, h, pl.program_id(2), scalars).each(bounds, first_tile, tiles, walk)
    else:
        walk(*(jnp.clip(bound - first_tile, 0, tiles) for bound in bounds))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _finish() -> None:
        total = total_ref[...].sum(axis=0, keepdims=True)
        peak, summed = peak_ref[...], acc[...]
        if tiling.has_lengths:  # queries past the end, of which anything can have come
            exist = lax.broadcasted_iota(jnp.int32, peak.shape, 1) < sequence.q_len - query
            summed = jnp.where(exist, summed, 0)
            peak = jnp.where(exist, peak, sinks_ref[...] if has_sinks else -jnp.inf)
            total = jnp.where(exist, total, jnp.where(peak == -jnp.inf, 0.0, one))
        empty = total == 0
        divisor = jnp.where(empty, 1, total)
        if scores.dropout:
            summed = summed / (1 - scores.dropout)
        if has_value_scales:
            summed = summed * value_scales_ref[...]
        out_ref[...] = (summed / divisor).astype(out_ref.dtype)
        peak = peak - scores.weight_exponent if scores.weight_exponent else peak
        lse_ref[...] = jnp.where(empty, -jnp.inf, (peak + jnp.log2(divisor)) * LN_2)
