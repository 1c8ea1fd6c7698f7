"""Paged attention on TPUs, in Pallas: a block of keys is computed with while the pages of the next are copied.

Pages stay in the chip's memory until their numbers are known, and are copied to VMEM, two blocks deep
(`pallas_pages.py`).

In VMEM a block is [keys, kv_heads, head_dim], which is also [keys * kv_heads, head_dim]. Few rows (decoding) are
multiplied with all of that at once, and the products of a query with another head's keys are masked: it costs the
matrix unit nothing, as every key passes through it once in any case. (A value that is NaN, at a key that is seen, then
spoils all heads of its sequence.) Many rows (prefill) are multiplied with one head's keys at a time, which are picked
from the block by a strided load, in float32, as only 32-bit rows can be strided.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.errors import UnsupportedError
from ..tiles.pallas_tiles import LANES, LN_2, LOG2_E, call_params, dot, dot_nt, round_up
from ..tiles.targets import Target
from .pallas_pages import Pages, Walk
from .pallas_tiling import Tiling
from .spec import MAX_HEAD_DIM, PAGE_SIZES, PagedAttentionInputs, PagedAttentionSpec, no_gradient
from .tiles import PagedAttentionConfig

DTYPES = ("float32", "bfloat16")  # what the TPU's compiler multiplies; interpreted, float16 too
_WIDENED = 8  # keys at a time
_FILLED_UP = 2**14  # numbers of pages, 64 KiB of scalar memory


def supports(spec: PagedAttentionSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can."""
    reasons = []
    if needs_grad:
        reasons.append(no_gradient())
    if target.is_gpu:
        reasons.append(f"target: got {target.name}; the Pallas kernels are for TPUs, use implementation='triton'")
    if spec.dtype == "float16":
        if not target.interpreted:
            reasons.append(f"dtype: got float16, which the compiler for {target.name} refuses; cast to bfloat16")
    elif spec.dtype not in DTYPES:
        reasons.append(f"dtype: got {spec.dtype}; it must be one of {', '.join(DTYPES)}")
    for name, size in (("head_dim", spec.head_dim), ("v_dim", spec.v_dim)):
        if size > MAX_HEAD_DIM:
            reasons.append(f"{name}: got {size}; it must be at most {MAX_HEAD_DIM}")
    return tuple(reasons)


def forward(
    spec: PagedAttentionSpec, config: PagedAttentionConfig, target: Target, *inputs: Any
) -> tuple[jax.Array, jax.Array]:
    """out [batch, q_len, q_heads, v_dim] and lse [batch, q_heads, q_len]."""
    arrays = PagedAttentionInputs(*inputs)
    q, k_pages, v_pages = arrays[:3]
    (batch, q_len, q_heads, head_dim), (num_pages, page_size, kv_heads, _) = q.shape, k_pages.shape
    max_pages, v_dim = arrays.page_table.shape[1], v_pages.shape[3]
    if page_size not in PAGE_SIZES:
        raise ValueError(f"k_pages: page_size is {page_size}; it must be one of {', '.join(map(str, PAGE_SIZES))}")
    if 0 in (batch, q_len, num_pages, max_pages):
        sinks = jnp.full((batch, q_heads), -jnp.inf) if arrays.sinks is None else arrays.sinks
        lse = jnp.broadcast_to(sinks[:, :, None], (batch, q_heads, q_len))
        return jnp.zeros((batch, q_len, q_heads, v_dim), q.dtype), lse

    tiling = Tiling.choose(spec, config, target, arrays)
    tiles, groups, rows = tiling.tiles, tiling.groups, tiling.rows
    # In one row XLA copies it before the kernel; rows of its own the scalar memory fills up to 128 numbers each.
    in_rows = max_pages % LANES == 0 or batch * round_up(max_pages, LANES) <= _FILLED_UP
    table = arrays.page_table if in_rows else arrays.page_table.reshape(-1)
    given = table, arrays.lengths, arrays.q_lengths
    scalars = [array for array in given if array is not None]

    def per_row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, groups, rows, width), lambda b, t, *_: (b, t, 0, 0, 0))

    factors = _row_factors(spec, tiling, arrays)
    block: tuple[int, ...] = (2, tiling.block_kv, kv_heads)
    if kv_heads == 1:  # XLA lays out such pages as rows of their one head: with the dimension it would copy the cache
        k_pages, v_pages = (pages[:, :, 0] for pages in (k_pages, v_pages))
        block = (2, tiling.block_kv)
    out, lse = pl.pallas_call(
        partial(
            _kernel,
            spec=spec,
            tiling=tiling,
            q_len=q_len,
            has_q_lengths=arrays.q_lengths is not None,
            has_factors=factors is not None,
            waits=target.siblings > 0,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, tiles),
            in_specs=[
                per_row(head_dim),
                pl.BlockSpec((rows, 2), lambda b, t, *_: (0, 0)),
                pl.BlockSpec((1, tiling.columns), lambda b, t, *_: (0, 0)),
                *([] if factors is None else [pl.BlockSpec((None, groups, rows, 3), lambda b, t, *_: (b, 0, 0, 0))]),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[per_row(v_dim), per_row(1)],
            scratch_shapes=[
                pltpu.VMEM((*block, head_dim), k_pages.dtype),
                pltpu.VMEM((*block, v_dim), v_pages.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((groups, rows, v_dim), jnp.float32),
                pltpu.VMEM((groups, rows, 1), jnp.float32),
                pltpu.VMEM((groups, rows, 1), jnp.float32),
                pltpu.VMEM((tiling.chunk, tiling.columns), jnp.float32),
                *([] if tiling.together else [_one_head(tiling, dim, q.dtype) for dim in (head_dim, v_dim)]),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, tiles, groups, rows, v_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, tiles, groups, rows, 1), jnp.float32),
        ],
        name="paged_attention",
        **call_params(target, ("parallel", "parallel"), checks_copies=False),  # `Pages` keeps them inside
    )(
        *scalars,
        tiling.pack(q),
        tiling.row_numbers,
        tiling.column_heads,
        *([] if factors is None else [factors]),
        k_pages,
        v_pages,
    )
    return tiling.unpack(out, q_len), tiling.unpack(lse, q_len)[..., 0].transpose(0, 2, 1)


def _one_head(tiling: Tiling, dim: int, dtype: Any) -> tuple[Any, list[Any]]:
    """Scratch for a block's keys of one head, and for those of all as float32, in pieces of 128 columns."""
    rows = tiling.block_kv * tiling.kv_heads
    wide = [pltpu.VMEM((rows, min(LANES, dim - at)), jnp.float32) for at in range(0, dim, LANES)]
    return pltpu.VMEM((tiling.block_kv, dim), dtype), wide


def backward(*arguments: Any) -> Any:
    """There is none."""
    raise UnsupportedError(no_gradient())


def _kernel(
    table_ref: Any,  # [batch, max_pages] or [batch * max_pages], in SMEM, as are the lengths, [batch]
    lengths_ref: Any,
    *others: Any,
    spec: PagedAttentionSpec,
    tiling: Tiling,
    q_len: int,
    has_q_lengths: bool,
    has_factors: bool,
    waits: bool,
) -> None:
    """One tile of queries, of all heads, against the keys of their sequence.

    waits: whether steps may be shared by two cores, of which neither knows the other's next one.
    """
    q_lengths_ref, others = (others[0], others[1:]) if has_q_lengths else (None, others)
    # [groups, rows, head_dim]; [rows, 2], the query, from the tile's first, and the key head of each row; [1, columns],
    # the key head of each column of scores.
    (q_ref, rows_ref, columns_ref), others = others[:3], others[3:]
    factors_ref, others = (others[0], others[1:]) if has_factors else (None, others)  # [groups, rows, 3]
    (k_hbm, v_hbm, out_ref, lse_ref, k_block, v_block, semaphores, slot_ref), others = others[:8], others[8:]
    acc, peak_ref, total_ref, scores_ref, *heads = others
    item, tile, tiles = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    block_kv, number = tiling.block_kv, item * tiles + tile

    def lengths(item: Any) -> tuple[Any, Any]:
        """Of an item's keys and queries."""
        keys = jnp.clip(lengths_ref[item], 0, tiling.max_pages * tiling.page_size)
        return keys, q_len if q_lengths_ref is None else jnp.clip(q_lengths_ref[item], 0, q_len)

    def walk_of(item: Any, tile: Any) -> Walk:
        return Walk.of(spec, tiling, item, tile * tiling.queries, *lengths(item))

    walk, (length, q_length) = walk_of(item, tile), lengths(item)
    span, first_query, offset = walk.span, tile * tiling.queries, length - q_length
    over = tile + 1 == tiles
    following = walk_of(
        jnp.where(over, jnp.minimum(item + 1, pl.num_programs(0) - 1), item), jnp.where(over, 0, tile + 1)
    )
    is_last = number == pl.num_programs(0) * tiles - 1

    pages = Pages(tiling, table_ref, (k_hbm, v_hbm), (k_block, v_block), semaphores)

    # The first block of a step is copied while the last one of the step before is computed with, in the other slot.
    alone = waits | (number == 0)
    first_slot = jnp.where(alone, 0, slot_ref[0])
    slot_ref[0] = (first_slot + jnp.maximum(walk.end - walk.begin, 0)) & 1
    starts_following = ~(waits | is_last) & (following.begin < following.end)

    def sink_of(group: Any, at: Any) -> jax.Array:
        """[chunk, 1]: what a row has seen before any key."""
        if factors_ref is None:
            return jnp.full((tiling.chunk, 1), -jnp.inf)
        return factors_ref[group, at, 2:3]

    def begin(group: Any, at: Any) -> None:
        sink = sink_of(group, at)
        acc[group, at] = jnp.zeros((tiling.chunk, acc.shape[2]), jnp.float32)
        peak_ref[group, at] = sink
        total_ref[group, at] = jnp.where(sink == -jnp.inf, 0.0, 1.0)

    tiling.for_each_chunk(begin)

    def step(block: Any, _: None) -> None:
        slot = (first_slot + block - walk.begin) & 1
        is_last_block = block + 1 == walk.end
        pl.when(~is_last_block)(lambda: pages.start(walk, block + 1, 1 - slot))
        pl.when(is_last_block & starts_following)(lambda: pages.start(following, following.begin, 1 - slot))
        pages.wait(walk, block, slot)
        first_key = block * block_kv
        whole = (first_key >= span.full_start) & (first_key + block_kv <= span.full_end)
        attend = partial(
            _attend_together if tiling.together else _attend_by_head, spec, tiling, q_ref, rows_ref, columns_ref,
            factors_ref, k_block.at[slot], v_block.at[slot], acc, peak_ref, total_ref, scores_ref, heads,
        )  # fmt: skip
        bounds = _Bounds(span.start - first_key, span.end - first_key, first_query + offset - first_key)
        pl.when(whole)(lambda: attend(None))
        pl.when(~whole)(lambda: attend(bounds))

    empty = walk.begin >= walk.end
    pl.when(alone & ~empty)(lambda: pages.start(walk, walk.begin, first_slot))
    pl.when(empty & starts_following)(lambda: pages.start(following, following.begin, first_slot))
    lax.fori_loop(walk.begin, walk.end, step, None)

    def finish(group: Any, at: Any) -> None:
        # A row past its sequence's queries has seen nothing, whatever was computed for it.
        real, sink = rows_ref[at, 0:1] < q_length - first_query, sink_of(group, at)
        peak = jnp.where(real, peak_ref[group, at], sink)
        total = jnp.where(real, total_ref[group, at], jnp.where(sink == -jnp.inf, 0.0, 1.0))
        divisor = jnp.where(total == 0, 1, total)
        factor = (1.0 if factors_ref is None else factors_ref[group, at, 1:2]) / divisor
        out_ref[group, at] = jnp.where(real, acc[group, at] * factor, 0).astype(out_ref.dtype)
        lse_ref[group, at] = jnp.where(total == 0, -jnp.inf, (peak + jnp.log2(divisor)) * LN_2)

    tiling.for_each_chunk(finish)


@dataclass(frozen=True)
class _Bounds:
    """What of a block is seen, keys counted from its first: [start, end). The first query stands at `aligned`."""

    start: Any
    end: Any
    aligned: Any


def _attend_together(
    spec: PagedAttentionSpec, tiling: Tiling, q_ref: Any, rows_ref: Any, columns_ref: Any, factors_ref: Any,
    k_block: Any, v_block: Any, acc: Any, peak_ref: Any, total_ref: Any, scores_ref: Any, heads: Any,
    bounds: _Bounds | None,
) -> None:  # fmt: skip
    """All rows with the keys of all heads: a block is [keys * kv_heads, head_dim]."""

    def part_of(block: Any, at: Any) -> jax.Array:
        keys = tiling.part // tiling.kv_heads
        part = block[pl.ds(lax.div(at, tiling.kv_heads), keys)]
        return _widened(part, q_ref.dtype).reshape(tiling.part, part.shape[-1])

    def one_chunk(group: Any, at: Any) -> None:
        _attend(
            spec, tiling, q_ref[group, at, :], rows_ref[at, :], columns_ref,
            None if factors_ref is None else factors_ref[group, at, 0:1],
            partial(part_of, k_block), partial(part_of, v_block),
            acc.at[group, at], peak_ref.at[group, at], total_ref.at[group, at], scores_ref, tiling.kv_heads, bounds,
        )  # fmt: skip

    tiling.for_each_chunk(one_chunk)


def _attend_by_head(
    spec: PagedAttentionSpec, tiling: Tiling, q_ref: Any, rows_ref: Any, columns_ref: Any, factors_ref: Any,
    k_block: Any, v_block: Any, acc: Any, peak_ref: Any, total_ref: Any, scores_ref: Any, heads: Any,
    bounds: _Bounds | None,
) -> None:  # fmt: skip
    """The rows of each key head with its own keys."""
    part = tiling.part
    (k_head, _), (v_head, _) = heads
    for block, (_, wide) in zip((k_block, v_block), heads, strict=True):
        _widen(tiling, block, wide)

    def one_head(head: Any, _: None) -> None:
        for narrow, wide in heads:
            for number, piece in enumerate(wide):
                rows = piece[pl.ds(head, tiling.block_kv, stride=tiling.kv_heads), :]
                narrow[:, number * LANES : number * LANES + piece.shape[1]] = rows.astype(narrow.dtype)

        def one_chunk(chunk: Any, _: None) -> None:
            at = pl.ds(pl.multiple_of(chunk * tiling.chunk, tiling.chunk), tiling.chunk)
            _attend(
                spec, tiling, q_ref[head, at, :], rows_ref[at, :], None,
                None if factors_ref is None else factors_ref[head, at, 0:1],
                lambda key: k_head[pl.ds(key, part), :], lambda key: v_head[pl.ds(key, part), :],
                acc.at[head, at], peak_ref.at[head, at], total_ref.at[head, at], scores_ref, 1, bounds,
            )  # fmt: skip

        lax.fori_loop(0, tiling.rows // tiling.chunk, one_chunk, None)

    lax.fori_loop(0, tiling.kv_heads, one_head, None)


def _widen(tiling: Tiling, block: Any, pieces: Any) -> None:
    """Write a block [keys, kv_heads, dim] as float32 [keys * kv_heads, dim], in pieces of columns."""
    count = _WIDENED * tiling.kv_heads

    def some(number: Any, _: None) -> None:
        values = _widened(block[pl.ds(number * _WIDENED, _WIDENED)], jnp.float32).reshape(count, -1)
        at = pl.ds(pl.multiple_of(number * count, count), count)
        for column, piece in enumerate(pieces):
            piece[at, :] = values[:, column * LANES : column * LANES + piece.shape[1]]

    lax.fori_loop(0, tiling.block_kv // _WIDENED, some, None)


def _attend(
    spec: PagedAttentionSpec, tiling: Tiling, q: jax.Array, rows: jax.Array, columns_ref: Any, factor: Any,
    keys_at: Any, values_at: Any, acc: Any, peak_ref: Any, total_ref: Any, scores_ref: Any, stride: int,
    bounds: _Bounds | None,
) -> None:  # fmt: skip
    """Take in a block of `tiling.columns` keys, of which `stride` stand for one place in the sequence.

    First all scores, and their maximum, then the weights: each waits once for the matrix unit.
    """
    part = tiling.part
    scale = spec.softmax_scale * (LOG2_E if spec.softcap is None else 1 / spec.softcap)
    factor = scale if factor is None else factor * scale

    def score(number: Any, best: jax.Array) -> jax.Array:
        at = pl.multiple_of(number * part, part)
        scores = dot_nt(q, keys_at(at)) * factor
        if spec.softcap is not None:
            scores = jnp.tanh(scores) * (spec.softcap * LOG2_E)
        seen = _seen(spec, rows, columns_ref, at, part, stride, bounds)
        if seen is not None:
            scores = jnp.where(seen, scores, -jnp.inf)
        scores_ref[:, pl.ds(at, part)] = scores
        return jnp.maximum(best, scores.max(axis=1, keepdims=True))

    peak = peak_ref[...]  # [rows, 1]
    new_peak = lax.fori_loop(0, tiling.columns // part, score, peak)
    finite_peak = jnp.where(new_peak == -jnp.inf, 0, new_peak)
    shrink = jnp.exp2(peak - finite_peak)

    def weigh(number: Any, total: jax.Array) -> jax.Array:
        at = pl.multiple_of(number * part, part)
        weights = jnp.exp2(scores_ref[:, pl.ds(at, part)] - finite_peak)
        values = values_at(at)
        if bounds is not None:  # what lies outside may be NaN, which a weight of 0 does not silence
            places = lax.broadcasted_iota(jnp.int32, values.shape, 0)
            exist = (places >= bounds.start * stride - at) & (places < bounds.end * stride - at)
            values = jnp.where(exist, values, jnp.zeros_like(values))
        acc[...] += dot(weights.astype(values.dtype), values)
        return total + weights.sum(axis=1, keepdims=True)

    acc[...] *= shrink
    total_ref[...] = lax.fori_loop(0, tiling.columns // part, weigh, total_ref[...] * shrink)
    peak_ref[...] = new_peak


def _seen(
    spec: PagedAttentionSpec, rows: jax.Array, columns_ref: Any, at: Any, part: int, stride: int, bounds: Any
) -> jax.Array | None:
    """bool [rows, part], or None where every row sees every column. Keys are counted in columns: no division."""
    seen = None
    if stride > 1:
        seen = columns_ref[:, pl.ds(at, part)] == rows[:, 1:2]
    if bounds is None:
        return seen
    column = lax.broadcasted_iota(jnp.int32, (rows.shape[0], part), 1)
    aligned = rows[:, 0:1] + bounds.aligned  # [rows, 1]
    end = bounds.end
    if spec.causal:
        end = jnp.minimum(aligned + 1, end)
    start = bounds.start
    if spec.window_left is not None:
        start = jnp.maximum(aligned - spec.window_left, start)
    inside = (column < end * stride - at) & (column >= start * stride - at)
    return inside if seen is None else seen & inside


def _widened(values: jax.Array, dtype: Any) -> jax.Array:
    """Pages' values in another dtype; integers and float8 reach bfloat16 by float32, as every chip can."""
    if values.dtype == dtype:
        return values
    return values.astype(jnp.float32).astype(dtype)


def _row_factors(spec: PagedAttentionSpec, tiling: Tiling, arrays: PagedAttentionInputs) -> jax.Array | None:
    """float32 [batch, groups, rows, 3]: each row's scale of keys, scale of values, and sink in base 2."""
    if arrays.k_scales is None and arrays.v_scales is None and arrays.sinks is None:
        return None
    batch, _, q_heads, _ = arrays.q.shape

    def by_head(values: Any, absent: float) -> jax.Array:
        if values is None:
            return jnp.full((batch, q_heads), absent, jnp.float32)
        return jnp.broadcast_to(jnp.repeat(values, q_heads // values.shape[-1], axis=-1), (batch, q_heads))

    sinks = by_head(arrays.sinks, -jnp.inf) * LOG2_E
    of_heads = jnp.stack([by_head(arrays.k_scales, 1.0), by_head(arrays.v_scales, 1.0), sinks], axis=-1)
    one_tile = jnp.broadcast_to(of_heads[:, None], (batch, tiling.tiles * tiling.queries, q_heads, 3))
    return tiling.pack(one_tile)[:, 0]
