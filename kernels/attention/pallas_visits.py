"""The forward of packed sequences on TPUs, as they lie: a grid step is a visit to some queries of one sequence.

A chip addresses tokens by whole rows of lanes, and sequences begin anywhere. So a sequence is counted from the last
token before it that can be addressed: its tiles have some of the neighbours' tokens at both ends, whose scores are
masked, and whose results are not kept. Where two sequences share a row of lanes, the later one writes the results of
both. Nothing is copied before or after the kernel, and no token is a padded one's.
"""

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

from ..tiles.expressions import planes
from ..tiles.pallas_tiles import LANES, LOG2_E, call_params, columns, round_up, rows
from ..tiles.targets import Target
from .pallas_forward import kernel, stretched, sums
from .pallas_packed import longest
from .pallas_scores import Scores
from .pallas_tiling import Tiling, Visit
from .spec import AttentionInputs, AttentionSpec
from .tiles import AttentionConfig, AttentionTiles, is_few

_MOST_VISITS = 1 << 13  # of which the scalars take a quarter of the memory that a TPU has for them


def can_visit(spec: AttentionSpec, config: AttentionConfig, arrays: AttentionInputs) -> bool:
    """Whether a packed call has many queries, and nothing that is addressed by a sequence's own positions."""
    sizes, group = longest(spec, arrays), arrays.q.shape[2] // arrays.k.shape[2]
    read = [*planes(spec.score), *planes(spec.mask), *planes(spec.weight)]
    if (
        0 in sizes
        or is_few(sizes[0], group)
        or read
        or spec.dropout
        or spec.is_float8
        or arrays.forward_runs is not None
    ):
        return False
    block_q = _fitting(spec, config, arrays).block_q
    return _count(arrays.q.shape[1], arrays.cu_seqlens_q.shape[0], block_q, LANES) <= _MOST_VISITS


def forward(
    spec: AttentionSpec, config: AttentionConfig, target: Target, arrays: AttentionInputs
) -> tuple[jax.Array, jax.Array]:
    """out `[1, tokens, q_heads, v_dim]` and lse `[1, q_heads, tokens]`, 0 and -inf for tokens that no sequence has."""
    q, k, v, sinks = arrays.q, arrays.k, arrays.v, arrays.sinks
    (_, tokens, q_heads, head_dim), (_, kv_tokens, kv_heads, v_dim) = q.shape, v.shape
    sizes = longest(spec, arrays)
    tiling = Tiling.choose(spec, _fitting(spec, config, arrays), target, sizes, False, packed=True)
    unit = gcd(LANES, tiling.block_q, tiling.block_kv)
    tiling, major, stretches = stretched(tiling, sizes[1] + unit - 1, arrays, target)
    scores, block_q = Scores.of(spec, arrays), tiling.block_q
    visits, number = _visits(arrays, block_q, unit)

    def q_index(b: Any, h: Any, i: Any, s: Any, visits: Any) -> tuple[Any, ...]:
        visit = Visit.read(visits, i)
        return 0, h, 0, pl.multiple_of(visit.q_token + visit.query, unit)

    def kv_first(i: Any, s: Any, visits: Any) -> Any:
        token = Visit.read(visits, i).kv_token
        if stretches == 1:
            return pl.multiple_of(token, unit)
        _, sequence, query = tiling.visit(0, i, (visits,))
        begin, _, _, end = sequence.visible_kv(query)
        return pl.multiple_of(token + tiling.nearest_stretch(s, begin, end, major) * major, unit)

    def k_index(b: Any, h: Any, i: Any, s: Any, visits: Any) -> tuple[Any, ...]:
        return 0, lax.div(h, q_heads // kv_heads), kv_first(i, s, visits), 0

    def v_index(b: Any, h: Any, i: Any, s: Any, visits: Any) -> tuple[Any, ...]:
        return 0, lax.div(h, q_heads // kv_heads), 0, kv_first(i, s, visits)

    def past_end(size: int) -> pl.Element:
        """Tokens from any that can be addressed on; those past the last one are not read."""
        return pl.Element(size, (0, size))

    whole = pl.Element
    operands = [columns(q, tokens), rows(k, kv_tokens), columns(v, kv_tokens)]
    in_specs = [
        pl.BlockSpec((None, None, whole(head_dim), past_end(block_q)), q_index),
        pl.BlockSpec((None, None, past_end(major), whole(head_dim)), k_index),
        pl.BlockSpec((None, None, whole(v_dim), past_end(major)), v_index),
    ]
    if sinks is not None:
        operands.append(jnp.broadcast_to(sinks[:, :, None, None] * LOG2_E, (1, q_heads, 1, block_q)))
        in_specs.append(pl.BlockSpec((None, None, 1, block_q), lambda b, h, *_: (0, h, 0, 0)))
    padded, out_dtype = round_up(tokens, unit), jnp.dtype(spec.out_dtype)
    out, lse = pl.pallas_call(
        partial(_kernel, tiling=tiling, scores=scores, unit=unit),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1, q_heads, number, stretches),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[
                pltpu.VMEM((2, v_dim, block_q), out_dtype),
                pltpu.VMEM((2, 1, block_q), jnp.float32),
                pltpu.VMEM((v_dim, unit), out_dtype),
                pltpu.VMEM((1, unit), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                *sums(tiling, v),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((1, q_heads, v_dim, padded), out_dtype),
            jax.ShapeDtypeStruct((1, q_heads, 1, padded), jnp.float32),
        ],
        name="attention_forward",
        **call_params(target, ("parallel", "parallel", "arbitrary", "arbitrary")),
    )(visits, *operands)
    out, lse = out[..., :tokens].transpose(0, 3, 1, 2), lse[:, :, 0, :tokens]
    if sinks is not None:  # what no sequence has is visited as if it had no keys
        lse = jnp.where(jnp.arange(tokens) < arrays.cu_seqlens_q[-1], lse, -jnp.inf)
    return out, lse


def _fitting(spec: AttentionSpec, config: AttentionConfig, arrays: AttentionInputs) -> AttentionTiles:
    """The tiles, none longer than the mean of the sequences, most of which would not fill it."""

    def fitting(block: int, array: jax.Array, starts: jax.Array) -> int:
        mean = array.shape[1] // max(1, starts.shape[0] - 1)
        return min(block, max(LANES, 1 << mean.bit_length() >> 1))

    return replace(
        config.forward,
        block_q=fitting(config.forward.block_q, arrays.q, arrays.cu_seqlens_q),
        block_kv=fitting(config.forward.block_kv, arrays.k, arrays.cu_seqlens_k),
    )


def _count(tokens: int, sequences: int, block: int, unit: int) -> int:
    """Visits at most: each sequence has a tile that is not full, and begins in its first row of lanes."""
    return (tokens + sequences * (block + unit - 2)) // block


def _visits(arrays: AttentionInputs, block_q: int, unit: int) -> tuple[jax.Array, jax.Array]:
    """int32 [fields of a Visit, visits], and how many of them there are. What no sequence has is one without keys."""
    tokens, number = arrays.q.shape[1], jnp.arange(arrays.cu_seqlens_q.shape[0])
    last = number == number.shape[0] - 1
    starts, kv_starts = (start.astype(jnp.int32) for start in (arrays.cu_seqlens_q, arrays.cu_seqlens_k))
    ends, kv_ends = (jnp.roll(start, -1) for start in (starts, kv_starts))
    ends, kv_starts, kv_ends = jnp.where(last, tokens, ends), jnp.where(last, 0, kv_starts), jnp.where(last, 0, kv_ends)
    q_token, kv_token = starts // unit * unit, kv_starts // unit * unit
    tiles = jnp.where(ends > starts, (ends - q_token + block_q - 1) // block_q, 0)
    before = jnp.where(number[:, None] > number, tiles, 0).sum(axis=1)
    fields = number, q_token, kv_token, starts - q_token, ends - q_token, kv_starts - kv_token, kv_ends - kv_token
    visit = jnp.arange(_count(tokens, number.shape[0], block_q, unit))
    belongs = (visit[:, None] >= before) & (visit[:, None] < before + tiles)  # a sum of one, sooner than a gather
    found = jnp.where(belongs, jnp.stack((*fields, -before * block_q))[:, None], 0).sum(axis=2)
    query = Visit._fields.index("query")
    return found.at[query].add(visit * block_q).astype(jnp.int32), tiles.sum()


def _kernel(*refs: Any, tiling: Tiling, scores: Scores, unit: int) -> None:
    """A visit: the forward's kernel into VMEM, and from there to the results.

    A tile is on its way while the next one is computed, into the other of two slots. It has arrived before the next one
    leaves, which may be for the same row of lanes.
    """
    inputs, results, refs = refs[:-14], refs[-14:-12], refs[-12:]
    visits_ref, (tiles, carried), (pending_ref, done) = inputs[0], (refs[:2], refs[2:4]), refs[4:6]
    h, i = pl.program_id(1), pl.program_id(2)
    slot = lax.rem(i, 2)
    own_tiles = tuple(tile.at[slot] for tile in tiles)  # [v_dim, block_q], [1, block_q]
    has_sinks = len(inputs) == 5
    kernel(*inputs, *own_tiles, *refs[6:], tiling=tiling, scores=scores, has_sinks=has_sinks, has_value_scales=False)
    visit = Visit.read(visits_ref, i)
    most = tiling.block_q // unit
    count = jnp.minimum(lax.div(visit.q_end - visit.query + unit - 1, unit), most)
    last = i == pl.num_programs(2) - 1

    def each(count: Any, act: Any) -> None:
        """Begin, or await, the copies of so many rows of lanes: of a whole tile at once."""

        def some(row: Any, size: int) -> None:
            here = pl.ds(pl.multiple_of(row * unit, unit), size)
            there = pl.ds(pl.multiple_of(visit.q_token + visit.query + row * unit, unit), size)
            for index, (tile, result) in enumerate(zip(own_tiles, results, strict=True)):
                act(pltpu.make_async_copy(tile.at[:, here], result.at[0, h, :, there], done.at[index]))

        pl.when(count == most)(lambda: some(0, most * unit))
        pl.when(count < most)(lambda: lax.fori_loop(0, count, lambda row, _: some(row, unit), None))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _store() -> None:
        for tile, kept, absent in zip(own_tiles, carried, (0.0, -jnp.inf), strict=True):
            _complete(tile, kept, jnp.where(i == 0, absent, kept[...].astype(jnp.float32)), visit, count, unit)
        pl.when(i > 0)(lambda: each(pending_ref[0], lambda copy: copy.wait()))
        each(count, lambda copy: copy.start())
        pending_ref[0] = count
        pl.when(last)(lambda: each(count, lambda copy: copy.wait()))


def _complete(tile: Any, kept_ref: Any, kept: jax.Array, visit: Visit, count: Any, unit: int) -> None:
    """Add what earlier sequences have in the first row of lanes, and keep what this one has in its last."""
    first, last = pl.ds(0, unit), pl.ds(pl.multiple_of((count - 1) * unit, unit), unit)
    own = lax.broadcasted_iota(jnp.int32, kept.shape, 1) + visit.query >= visit.q_first
    tile[:, first] = jnp.where(own, tile[:, first].astype(jnp.float32), kept).astype(tile.dtype)
    kept_ref[...] = tile[:, last]
