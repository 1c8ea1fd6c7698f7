"""The forward of attention on TPUs for few queries, as decoding has: bound by the memory that holds the keys.

The queries of all heads that share a key head are the rows of one small matrix, so that each key is loaded once. Keys
and values are read as they lie, [keys, dim]; a grid step brings some blocks of them for several key heads. Blocks that
no query sees are not fetched, and what lies past a length is masked in the kernel: the arrays are never copied for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import gcd, inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.expressions import INDICES, SCORE, evaluate, planes
from ..tiles.pallas_tiles import (
    LANES,
    LN_2,
    LOG2_E,
    SUBLANES,
    call_params,
    dot,
    dot_nt,
    few_registers,
    fit_block,
    round_up,
    rows,
)
from ..tiles.targets import Target
from ..tiles.tpu_blocks import vmem_budget
from .pallas_scores import FUNCTIONS, full, truth
from .pallas_tiling import Sequence, Tiling
from .spec import AttentionInputs, AttentionSpec
from .tiles import AttentionConfig, is_few

_HEADS = 8  # of keys in a grid step, at most
_PART = 8 * 512  # scores that stay in registers, of heads as wide as a register
_AT_ONCE = 2  # of the heads of keys: more spill registers
_BLOCKS = 4  # in a grid step, at most: each is code of its own
_ON_THE_WAY = 2.4e-6  # seconds of the memory's bandwidth that a grid step brings: twice the latency of a copy


def can_decode(spec: AttentionSpec, arrays: AttentionInputs) -> bool:
    """Whether the call is one of few queries, and asks for nothing that the other kernel alone has."""
    (_, q_len, q_heads, _), kv_heads = arrays.q.shape, arrays.k.shape[2]
    others = spec.dropout or spec.weight is not None or spec.is_float8 or arrays.forward_runs is not None
    return is_few(q_len, q_heads // kv_heads) and not others and not planes(spec.score) and not planes(spec.mask)


@dataclass(frozen=True)
class Cut:
    """How a call is cut.

    Attributes:
        tiling: of the keys into blocks; its queries are one tile.
        group: how many query heads share a key head.
        heads: of keys in a grid step.
        part: how many keys are computed with at a time.
        blocks: in a grid step, a power of two.
    """

    tiling: Tiling
    group: int
    heads: int
    part: int
    blocks: int

    @staticmethod
    def choose(
        spec: AttentionSpec, config: AttentionConfig, target: Target, arrays: AttentionInputs, has_lengths: bool
    ) -> Cut:
        (_, q_len, q_heads, _), (_, kv_len, kv_heads, _) = arrays.q.shape, arrays.k.shape
        group = q_heads // kv_heads
        height = round_up(q_len * group, SUBLANES)
        width = round_up(spec.head_dim, LANES) + round_up(spec.v_dim, LANES)
        room, wanted = float(vmem_budget(target) * 7 // 8), _ON_THE_WAY * target.bandwidth * 1e9
        if target.interpreted:
            room = wanted = inf

        def brought(heads: int, block: int) -> int:
            return heads * block * width * arrays.k.dtype.itemsize

        def fits(heads: int, block: int, blocks: int = 1) -> bool:  # some are computed with, as many on their way
            return 2 * blocks * brought(heads, block) + heads * height * (4 * block + 16 * width) <= room

        block = fit_block("config.block_kv", config.forward.block_kv, kv_len, target)
        while block > LANES and not fits(1, block):
            block = fit_block("config.block_kv", round_up(block // 2, LANES), kv_len, target)
        even = [heads for heads in range(min(kv_heads, _HEADS), 1, -1) if kv_heads % heads == 0 and fits(heads, block)]
        heads = even[0] if even else 1
        blocks, limit = 1, min(2 if target.interpreted else _BLOCKS, -(-kv_len // block))
        while blocks < limit and blocks * brought(heads, block) < wanted and fits(heads, block, 2 * blocks):
            blocks *= 2
        part, wide = gcd(LANES, block), width // (2 * LANES)
        most = _PART // (wide * height * (2 if few_registers(target) else 1))
        while block % (2 * part) == 0 and 2 * part <= most:
            part *= 2
        tiles = replace(config.forward, block_kv=block)
        tiling = replace(Tiling.choose(spec, tiles, target, (q_len, kv_len), has_lengths), block_q=q_len)
        return Cut(tiling, group, heads, part, blocks)

    @property
    def rows(self) -> int:
        """Of the matrix that a key head's queries make."""
        return self.tiling.q_size * self.group

    @property
    def all_blocks(self) -> int:
        """Of a sequence."""
        return -(-self.tiling.kv_size // self.tiling.block_kv)

    def nearest(self, number: Any, which: int, sequence: Sequence) -> Any:
        """The block to hold for that one of those at `which` in their grid steps: the nearest that some query sees.

        What is held already is not fetched again. Negative where no query sees any of them.
        """
        begin, _, _, end = sequence.visible_kv(0)
        first = begin + ((which - begin) & (self.blocks - 1))
        last = end - 1 - ((end - 1 - which) & (self.blocks - 1))
        return jnp.where(first < end, jnp.clip(number, first, last), -1)

    def pack(self, array: jax.Array) -> jax.Array:
        """[batch, q_len, q_heads, dim] -> [batch, kv_heads, rows, dim]."""
        batch, q_len, q_heads, dim = array.shape
        array = array.reshape(batch, q_len, q_heads // self.group, self.group, dim).transpose(0, 2, 1, 3, 4)
        return array.reshape(batch, q_heads // self.group, self.rows, dim)

    def unpack(self, array: jax.Array) -> jax.Array:
        """The inverse of `pack`."""
        batch, kv_heads, _, dim = array.shape
        array = array.reshape(batch, kv_heads, -1, self.group, dim).transpose(0, 2, 1, 3, 4)
        return array.reshape(batch, -1, kv_heads * self.group, dim)

    @property
    def row_numbers(self) -> np.ndarray:
        """int32 [rows, 2]: the query of each row, and its head in the group."""
        row = np.arange(self.rows, dtype=np.int32)
        return np.stack([row // self.group, row % self.group], axis=1)


def forward(
    spec: AttentionSpec,
    config: AttentionConfig,
    target: Target,
    arrays: AttentionInputs,
    lengths: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """out and lse; lengths is int32 [2, batch] of queries and keys, or () where all are those of the arrays."""
    q, k, v = arrays.q, arrays.k, arrays.v
    batch, q_len, q_heads, head_dim = q.shape
    kv_heads, v_dim = k.shape[2], v.shape[3]
    cut = Cut.choose(spec, config, target, arrays, bool(lengths))
    tiling, heads, height = cut.tiling, cut.heads, cut.rows

    def per_row(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, height, size), lambda b, h, *_: (b, h, 0, 0))

    def per_key(size: int, which: int) -> pl.BlockSpec:
        def index(b: Any, h: Any, s: Any, *scalars: Any) -> tuple[Any, ...]:
            block = cut.nearest(s * cut.blocks + which, which, tiling.sequence(b, scalars))
            return *(jnp.where(block < 0, 0, at) for at in (b, h, block)), 0

        return pl.BlockSpec((None, heads, tiling.block_kv, size), index)

    padded = cut.all_blocks * tiling.block_kv
    operands: list[Any] = [cut.pack(q), cut.row_numbers]
    in_specs = [per_row(head_dim), pl.BlockSpec((height, 2), lambda b, h, *_: (0, 0))]
    for array, dim in ((k, head_dim), (v, v_dim)):
        array = rows(array, padded)
        operands += [array if target.interpreted else _left_in_memory(array)] * cut.blocks
        in_specs += [per_key(dim, which) for which in range(cut.blocks)]
    for factor in (arrays.sinks, arrays.value_scales):
        if factor is not None:
            operands.append(cut.pack(jnp.broadcast_to(factor[:, None, :, None], (batch, q_len, q_heads, 1))))
            in_specs.append(per_row(1))
    out, lse = pl.pallas_call(
        partial(
            _kernel,
            spec=spec,
            cut=cut,
            has_sinks=arrays.sinks is not None,
            has_value_scales=arrays.value_scales is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lengths),
            grid=(batch, kv_heads // heads, -(-cut.all_blocks // cut.blocks)),
            in_specs=in_specs,
            out_specs=[per_row(v_dim), per_row(1)],
            scratch_shapes=[
                pltpu.VMEM((heads, height, v_dim), jnp.float32),
                pltpu.VMEM((heads, height, tiling.block_kv), jnp.float32),
                pltpu.VMEM((heads, height, 1), jnp.float32),
                pltpu.VMEM((heads, height, 1), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, height, v_dim), spec.out_dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, height, 1), jnp.float32),
        ],
        name="attention_decode",
        **call_params(target, ("parallel", "parallel", "arbitrary")),
    )(*lengths, *operands)
    return cut.unpack(out), cut.unpack(lse)[..., 0].swapaxes(1, 2)


@jax.custom_batching.custom_vmap
def _left_in_memory(array: jax.Array) -> jax.Array:
    """A kernel's operand, which XLA else may bring to VMEM whole and, if it is a cache that is written, back again."""
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


@_left_in_memory.def_vmap
def _left_to_xla(_: int, batched: list[bool], array: jax.Array) -> tuple[jax.Array, bool]:
    """Under vmap, of which the constraint knows nothing."""
    return array, batched[0]


def _kernel(*refs: Any, spec: AttentionSpec, cut: Cut, has_sinks: bool, has_value_scales: bool) -> None:
    """The rows of some key heads against some blocks of their keys."""
    tiling = cut.tiling
    scalars, refs = refs[: tiling.has_lengths], refs[tiling.has_lengths :]
    q_ref, rows_ref, refs = refs[0], refs[1], refs[2:]  # [heads, rows, dim], [rows, 2]
    # Each block of keys, or of values, is [heads, block_kv, dim].
    k_refs, v_refs, refs = refs[: cut.blocks], refs[cut.blocks : 2 * cut.blocks], refs[2 * cut.blocks :]
    sinks_ref, refs = refs[0], refs[has_sinks:]  # [heads, rows, 1]
    value_scales_ref, refs = refs[0], refs[has_value_scales:]
    # [heads, rows, v_dim]; [heads, rows, 1]; then float32 scratch: sums, scores, maxima in base 2, sums of weights.
    out_ref, lse_ref, acc, scores_ref, peak_ref, total_ref = refs
    item, first_head = pl.program_id(0), pl.program_id(1) * cut.heads
    sequence = tiling.sequence(item, scalars)
    begin, whole_begin, whole_end, end = sequence.visible_kv(0)

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        acc[...] = jnp.zeros_like(acc)
        if has_sinks:  # a sink is a key whose value is 0
            peak_ref[...] = sinks_ref[...] * LOG2_E
            total_ref[...] = jnp.where(sinks_ref[...] == -jnp.inf, 0.0, 1.0)
        else:
            peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
            total_ref[...] = jnp.zeros_like(total_ref)

    def attend(block: Any, k_ref: Any, v_ref: Any, whole: bool) -> None:
        """First all scores, and their maximum, then the weights: each waits once for the matrix unit."""

        def score(head: Any, _: None) -> None:
            for at in range(0, tiling.block_kv, cut.part):
                keys = slice(at, at + cut.part)
                products = dot_nt(q_ref[head], k_ref[head, keys])
                place = item, first_head + head, block * tiling.block_kv + at
                scores_ref[head, :, keys] = _scores(spec, cut, products, rows_ref, sequence, place, whole)

        def add(head: Any, _: None) -> None:
            peak = peak_ref[head]
            new_peak = jnp.maximum(peak, scores_ref[head].max(axis=1, keepdims=True))
            finite_peak = jnp.where(new_peak == -jnp.inf, 0, new_peak)
            shrink = jnp.exp2(peak - finite_peak)
            total, summed = total_ref[head] * shrink, acc[head] * shrink
            for at in range(0, tiling.block_kv, cut.part):
                keys = slice(at, at + cut.part)
                weights = jnp.exp2(scores_ref[head, :, keys] - finite_peak)
                values = v_ref[head, keys]
                if not whole:  # what lies past a length may be NaN, which a weight of 0 does not silence
                    key = block * tiling.block_kv + at + lax.broadcasted_iota(jnp.int32, (cut.part, 1), 0)
                    values = jnp.where(key < sequence.kv_len, values, jnp.zeros_like(values))
                total += weights.sum(axis=1, keepdims=True)
                summed += dot(weights.astype(values.dtype), values)
            total_ref[head], acc[head], peak_ref[head] = total, summed, new_peak

        for step in (score, add):  # most blocks are whole
            lax.fori_loop(0, cut.heads, step, None, unroll=min(_AT_ONCE, cut.heads) if whole else 1)

    for which, (k_ref, v_ref) in enumerate(zip(k_refs, v_refs, strict=True)):
        block = pl.program_id(2) * cut.blocks + which
        is_seen = (block >= begin) & (block < end)
        is_whole = is_seen & (block >= whole_begin) & (block < whole_end)
        pl.when(is_whole)(partial(attend, block, k_ref, v_ref, True))
        pl.when(is_seen & ~is_whole)(partial(attend, block, k_ref, v_ref, False))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _finish() -> None:
        total, peak, summed = total_ref[...], peak_ref[...], acc[...]
        if tiling.has_lengths:  # queries past the end, of which anything can have come
            exist = (rows_ref[:, 0:1] < sequence.q_len)[None]
            summed = jnp.where(exist, summed, 0)
            peak = jnp.where(exist, peak, sinks_ref[...] * LOG2_E if has_sinks else -jnp.inf)
            total = jnp.where(exist, total, jnp.where(peak == -jnp.inf, 0.0, 1.0))
        empty = total == 0
        divisor = jnp.where(empty, 1, total)
        if has_value_scales:
            summed = summed * value_scales_ref[...]
        out_ref[...] = (summed / divisor).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty, -jnp.inf, (peak + jnp.log2(divisor)) * LN_2)


def _scores(
    spec: AttentionSpec,
    cut: Cut,
    products: jax.Array,
    rows_ref: Any,
    sequence: Sequence,
    place: tuple[Any, Any, Any],
    whole: bool,
) -> jax.Array:
    """The scores in base 2 of products [rows, keys], -inf where they are not seen.

    `place` is that of the first: the batch item, the key head, the key.
    """
    (item, kv_head, first), tiling = place, cut.tiling
    query, shape = rows_ref[:, 0:1], products.shape
    key = first + lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    scores = products * (spec.softmax_scale * (LOG2_E if spec.score is None else 1))
    values: dict[Any, Any] = {}
    if spec.score is not None or spec.mask is not None:
        indices = jnp.full((1, 1), item, jnp.int32), kv_head * cut.group + rows_ref[:, 1:2], query, key
        values = {(name,): index for name, index in zip(INDICES, indices, strict=True)}
        values[SCORE] = scores
    if spec.score is not None:
        scores = full(evaluate(spec.score, values, FUNCTIONS), shape) * LOG2_E
    if spec.mask is not None:
        scores = jnp.where(full(truth(evaluate(spec.mask, values, FUNCTIONS)), shape), scores, -jnp.inf)
    if whole:
        return scores
    seen = jnp.broadcast_to(key < sequence.kv_len, shape)
    if tiling.right is not None:
        seen &= key <= query + sequence.offset + tiling.right
    if tiling.left is not None:
        seen &= key >= query + sequence.offset - tiling.left
    return jnp.where(seen, scores, -jnp.inf)
