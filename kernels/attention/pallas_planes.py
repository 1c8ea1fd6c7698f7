"""The gradients of planes on TPUs: one kernel a plane, deterministic.

A program owns a tile of the plane and walks what the plane is broadcast along, in the grid's last dimensions: the sum
stays in VMEM while it does. A tile of sums is one of scores, [keys, queries], folded only at the end to what the plane
has of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.expressions import const
from ..tiles.expressions import plane as plane_leaf
from ..tiles.expressions import planes as slots_of
from ..tiles.pallas_tiles import call_params, columns, dot, fold, pad_to, round_up, rows, unfold
from ..tiles.targets import Target
from .pallas_backward import slope_of, weigh
from .pallas_scores import Place, Plane, Scores, spread
from .pallas_tiling import Seen, Tiling
from .spec import AttentionInputs, AttentionSpec
from .tiles import AttentionConfig

Operands = tuple[
    AttentionSpec,
    AttentionConfig,
    Target,
    AttentionInputs,
    tuple[jax.Array, ...],
    jax.Array,
    tuple[jax.Array, jax.Array],
]


def gradient(operands: Operands, slot: int) -> jax.Array:
    """The gradient of the plane in that slot, in its shape and dtype; the operands are those of `pallas_backward`."""
    spec, array = operands[0], operands[3].planes[slot]
    if slot not in slots_of(spec.score):
        return jnp.zeros_like(array)
    found = _summed(operands, Plane.of(slot, array), slope_of(spec, plane_leaf(slot)))
    return found[:, :, : array.shape[2], : array.shape[3]].astype(array.dtype)


def exact_delta(operands: Operands) -> jax.Array:
    """Each query's sum of weights times what comes back to them, [batch, q_heads, q_len], nothing of it rounded.

    It is the gradient of a plane with a number for every query of a score that grows with it, but for delta.
    """
    lse = operands[-1][0]
    owner = Plane.of(-1, jax.ShapeDtypeStruct((*lse.shape, 1), jnp.float32))
    found = _summed((*operands[:-1], (lse, jnp.zeros_like(lse))), owner, const(1.0))
    return found[:, :, : lse.shape[2], 0]


def _summed(operands: Operands, owner: Plane, slope: Any) -> jax.Array:
    """What comes back to the scores times the slope, summed to what the owner has of them, its tiles written whole."""
    spec, config, target, arrays, lengths, dout, statistics = operands
    q, k, v = arrays[:3]
    (batch, q_len, q_heads, head_dim), (_, kv_len, kv_heads, v_dim) = q.shape, v.shape
    scores = Scores.of(spec, arrays)
    tiling = Tiling.choose(spec, config.dkv, target, (q_len, kv_len), bool(lengths), hides_queries=True)
    block_q, block_kv = tiling.block_q, tiling.block_kv
    scalars = lengths if arrays.dropout_seed is None else (*lengths, arrays.dropout_seed)
    q_padded, kv_padded = round_up(q_len, block_q), round_up(kv_len, block_kv)
    sizes = batch, q_heads, kv_padded // block_kv, q_padded // block_q
    owned = owner.batch, owner.heads, owner.keys, owner.queries
    order = sorted(range(4), key=lambda axis: not owned[axis])  # of the grid's dimensions, those it owns first
    count = sum(owned)

    def at(*step: Any) -> tuple[Any, ...]:
        """(b, h, tile of keys, tile of queries) of a grid step."""
        return tuple(step[order.index(axis)] for axis in range(4))

    def per_query(size: int) -> pl.BlockSpec:
        def index(*step: Any) -> tuple[Any, ...]:
            b, h, _, i = at(*step)
            return b, h, 0, i

        return pl.BlockSpec((None, None, size, block_q), index)

    def per_key(dim: int) -> pl.BlockSpec:
        def index(*step: Any) -> tuple[Any, ...]:
            b, h, j, _ = at(*step)
            return b, lax.div(h, q_heads // kv_heads), j, 0

        return pl.BlockSpec((None, None, block_kv, dim), index)

    leading = batch if owner.batch else 1, q_heads if owner.heads else 1
    ends = kv_padded if owner.whole else 1, q_padded if owner.queries else kv_padded if owner.keys else block_q
    found = pl.pallas_call(
        partial(
            _kernel,
            tiling=tiling,
            scores=scores,
            slope=slope,
            owner=owner,
            at=at,
            owned=count,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=tuple(sizes[axis] for axis in order),
            in_specs=[
                per_query(head_dim),
                per_query(v_dim),
                per_query(1),
                per_query(1),
                per_key(head_dim),
                per_key(v_dim),
                *(plane.block(block_kv, block_q, block_q, at) for plane in scores.planes),
            ],
            out_specs=owner.block(block_kv, block_q, block_q, at),
            scratch_shapes=[
                pltpu.VMEM((block_kv, block_q), jnp.float32),
                *(scratch for plane in scores.planes for scratch in plane.scratch(block_kv, block_q)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((*leading, *ends), jnp.float32),
        name="attention_plane_gradient",
        **call_params(target, ["parallel" if axis < count else "arbitrary" for axis in range(4)]),
    )(
        *scalars,
        columns(q, q_padded),
        columns(dout, q_padded),
        *(pad_to(statistic[:, :, None, :], 3, q_padded) for statistic in statistics),
        rows(k, kv_padded),
        rows(v, kv_padded),
        *(plane.prepared(arrays.planes[plane.slot], q_padded, kv_padded, block_q) for plane in scores.planes),
    )
    if owner.queries:
        return found.swapaxes(2, 3)
    return found if owner.keys else found.sum(axis=3, keepdims=True)


def _kernel(*refs: Any, tiling: Tiling, scores: Scores, slope: Any, owner: Plane, at: Any, owned: int) -> None:
    """One tile of scores, added to what the same tile of the plane has got."""
    scalars, refs = refs[: tiling.prefetched], refs[tiling.prefetched :]
    q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref = refs[:6]
    planes, (out_ref, acc, *scratch) = refs[6 : 6 + len(scores.planes)], refs[6 + len(scores.planes) :]
    block_q, block_kv, part = tiling.block_q, tiling.block_kv, tiling.part
    few = scores.rows_of(tiling)
    b, h, j, i = at(*(pl.program_id(axis) for axis in range(4)))
    first: Any = True
    last: Any = True
    for axis in range(owned, 4):
        first &= pl.program_id(axis) == 0
        last &= pl.program_id(axis) == pl.num_programs(axis) - 1
    query, key = i * block_q, j * block_kv
    sequence = tiling.sequence(b, scalars)
    begin, _, _, end = sequence.visible_kv(query)

    @pl.when(first)
    def _start() -> None:
        acc[...] = jnp.zeros_like(acc)

    @pl.when((j >= begin) & (j < end))
    def _add() -> None:
        sources = spread(scores.planes, planes, tuple(scratch), part)

        def add(number: Any, _: None) -> None:
            row = pl.multiple_of(number * few, few)
            keys = pl.ds(row, few)
            place = Place(b, h, query, key + row, pl.ds(0, block_q), keys, sequence, sources, tiling.seed(scalars))
            products, dweights = fold(dot(k_ref[keys, :], q_ref[...])), fold(dot(v_ref[keys, :], dout_ref[...]))
            seen = Seen.MASKED if tiling.has_partial_tiles else Seen.WHOLE
            _, change = weigh(scores, slope, products, dweights, (lse_ref[...], delta_ref[...]), place, seen)
            acc[keys, :] += unfold(change)

        lax.fori_loop(0, block_kv // few, add, None)

    @pl.when(last)
    def _finish() -> None:
        sums = acc[...]
        if not owner.whole:
            sums = (sums.T if owner.keys else sums).sum(axis=0, keepdims=True)
        out_ref[...] = sums
