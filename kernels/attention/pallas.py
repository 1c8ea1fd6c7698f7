"""Attention on TPUs, forward and backward, in Pallas.

The online softmax is Milakov & Gimelshein's (arXiv:1805.02867), its tiling FlashAttention's (Dao et al.,
arXiv:2205.14135), the backward from the saved logsumexp FlashAttention-2's (Dao, arXiv:2307.08691).

Both kernels compute *transposed* scores, [keys, queries] = k @ q^T. What belongs to a query, its maximum, its sum, its
logsumexp, is then a row along the lanes: reductions run down the sublanes on the vector units, a row broadcasts for
nothing, and no tile is transposed in a kernel. The transposes this asks for are done by XLA outside, together with the
change from [batch, length, heads, dim] to heads first, and the padding to whole tiles.

A grid step holds a long stretch of the side that it walks in VMEM, so that the loop over tiles is inside the kernel: it
runs over the visible tiles only, and computes a mask for those on the diagonal or at the end. Within a tile, the parts
are of a size that keeps scores in registers between two matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd
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
    dot,
    dot_nt,
    fit_block,
    pad_to,
    round_up,
    stretch,
    stretch_room,
)
from ..tiles.targets import Target
from .spec import MAX_HEAD_DIM, AttentionSpec
from .tiles import AttentionConfig, AttentionTiles

DTYPES = ("float32", "bfloat16")  # what the TPU's compiler multiplies; interpreted, float16 too


def supports(spec: AttentionSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Gradients ask for nothing more."""
    reasons = []
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
    spec: AttentionSpec, config: AttentionConfig, target: Target, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """out [batch, q_len, q_heads, v_dim] and lse [batch, q_heads, q_len]."""
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads, v_dim = k.shape[1], k.shape[2], v.shape[3]
    if 0 in (batch, q_len, q_heads, kv_len):
        return jnp.zeros((batch, q_len, q_heads, v_dim), q.dtype), jnp.full((batch, q_heads, q_len), -jnp.inf)

    tiling = _Tiling.choose(spec, config.forward, target, q_len, kv_len, part=target.matrix_unit)
    block_q, q_padded = tiling.block_q, round_up(q_len, tiling.block_q)
    width = round_up(head_dim, LANES) + round_up(v_dim, LANES)  # what a row of both takes in VMEM
    key_bytes = 2 * width * k.dtype.itemsize  # the stretch that is computed with, and the next one
    query_bytes = 2 * width * q.dtype.itemsize + 4 * (v_dim + tiling.block_kv)
    major, stretches = stretch(kv_len, tiling.block_kv, key_bytes, stretch_room(block_q * query_bytes, target))
    kv_padded = major * stretches

    def kv_stretch(h: Any, i: Any, s: Any) -> tuple[Any, Any]:
        # A stretch that no query of the tile sees repeats the last visible one: nothing is fetched for it.
        tiles = jnp.maximum(tiling.visible_kv(i * block_q)[1], 1)
        return lax.div(h, q_heads // kv_heads), jnp.minimum(s, lax.div((tiles - 1) * tiling.block_kv, major))

    def k_index(b: Any, h: Any, i: Any, s: Any) -> tuple[Any, ...]:
        return (b, *kv_stretch(h, i, s), 0)

    def v_index(b: Any, h: Any, i: Any, s: Any) -> tuple[Any, ...]:
        kv_head, at = kv_stretch(h, i, s)
        return b, kv_head, 0, at

    def per_query(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, block_q), lambda b, h, i, s: (b, h, 0, i))

    out, lse = pl.pallas_call(
        partial(_forward_kernel, scale=spec.softmax_scale, tiling=tiling),
        grid=(batch, q_heads, q_padded // block_q, stretches),
        in_specs=[
            per_query(head_dim),
            pl.BlockSpec((None, None, major, head_dim), k_index),
            pl.BlockSpec((None, None, v_dim, major), v_index),
        ],
        out_specs=[per_query(v_dim), per_query(1)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, q_heads, v_dim, q_padded), q.dtype),
            jax.ShapeDtypeStruct((batch, q_heads, 1, q_padded), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((rows, block_q), jnp.float32) for rows in (v_dim, tiling.block_kv, 1, SUBLANES)],
        name="attention_forward",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(_columns(q, q_padded), _rows(k, kv_padded), _columns(v, kv_padded))
    return out[..., :q_len].transpose(0, 3, 1, 2), lse[:, :, 0, :q_len]


def _forward_kernel(
    q_ref: Any,  # [head_dim, block_q]
    k_ref: Any,  # [major, head_dim]
    v_ref: Any,  # [v_dim, major]
    out_ref: Any,  # [v_dim, block_q]
    lse_ref: Any,  # [1, block_q]
    acc: Any,  # [v_dim, block_q]
    scores_ref: Any,  # [block_kv, block_q]
    peak_ref: Any,  # [1, block_q]
    total_ref: Any,  # [8, block_q]: the sum of the weights, still spread over the sublanes
    *,
    scale: float,
    tiling: _Tiling,
) -> None:
    """One tile of queries against a stretch of keys.

    The scores of the next tile are computed while the present one is exponentiated and summed: one keeps the matrix
    unit busy, the other the vector units. scores_ref passes each part on, written just after it was read.
    """
    block_kv, part = tiling.block_kv, tiling.part
    query = pl.program_id(2) * tiling.block_q
    first_tile = pl.program_id(3) * (k_ref.shape[0] // block_kv)

    @pl.when(pl.program_id(3) == 0)
    def _start() -> None:
        acc[...] = jnp.zeros_like(acc)
        peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    def score(tile: Any, row: int, masked: bool) -> jax.Array:
        """Write one part of a tile's scores; their maximum, [8, block_q]."""
        at = pl.ds(pl.multiple_of(tile * block_kv, block_kv) + row, part)
        scores = dot(k_ref[at, :], q_ref[...]) * (scale * LOG2_E)
        if masked:
            scores = jnp.where(tiling.mask(query, (first_tile + tile) * block_kv + row), scores, -jnp.inf)
        scores_ref[row : row + part, :] = scores
        return _fold(scores).max(axis=0)

    def step(tile: Any, carry: tuple[Any, Any, Any], following: bool, masked: bool = False) -> tuple[Any, Any, Any]:
        """Add a tile whose scores are written, and write those of the following one."""
        peak, total, best = carry  # [1, block_q], [8, block_q] and the written scores' maximum, [8, block_q]
        new_peak = jnp.maximum(peak, best.max(axis=0, keepdims=True))
        finite_peak = jnp.where(new_peak == -jnp.inf, 0, new_peak)
        shrink = jnp.exp2(peak - finite_peak)
        total, best = total * shrink, jnp.full_like(best, -jnp.inf)
        for row in range(0, block_kv, part):
            weights = jnp.exp2(scores_ref[row : row + part, :] - finite_peak)
            total += _fold(weights).sum(axis=0)
            at = pl.ds(pl.multiple_of(tile * block_kv, block_kv) + row, part)
            past = acc[...] * shrink if row == 0 else acc[...]
            acc[...] = past + dot(v_ref[:, at], weights.astype(v_ref.dtype))
            if following:
                best = jnp.maximum(best, score(tile + 1, row, masked))
        return new_peak, total, best

    whole, some = tiling.visible_kv(query)
    tiles = k_ref.shape[0] // block_kv
    whole, some = (jnp.clip(bound - first_tile, 0, tiles) for bound in (whole, some))

    @pl.when(some > 0)
    def _walk() -> None:
        best = jnp.full((SUBLANES, tiling.block_q), -jnp.inf)
        for row in range(0, block_kv, part):
            best = jnp.maximum(best, score(0, row, masked=tiling.has_partial_tiles))
        carry = peak_ref[...], total_ref[...], best
        whole_next = jnp.maximum(whole - 1, 0)
        carry = lax.fori_loop(0, whole_next, partial(step, following=True), carry)
        if tiling.has_partial_tiles:
            carry = lax.fori_loop(whole_next, some - 1, partial(step, following=True, masked=True), carry)
        peak_ref[...], total_ref[...], _ = step(some - 1, carry, following=False)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _finish() -> None:
        total = total_ref[...].sum(axis=0, keepdims=True)
        empty = total == 0
        divisor = jnp.where(empty, 1, total)
        out_ref[...] = (acc[...] / divisor).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty, -jnp.inf, (peak_ref[...] + jnp.log2(divisor)) * LN_2)


def backward(
    spec: AttentionSpec,
    config: AttentionConfig,
    target: Target,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    outputs: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv, in the shapes and dtypes of q, k and v."""
    q, k, v = inputs
    out, lse = outputs
    dout, dlse = gradients
    if 0 in q.shape or 0 in k.shape:
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    (batch, q_len, q_heads, head_dim), (_, kv_len, kv_heads, v_dim) = q.shape, v.shape
    group = q_heads // kv_heads

    delta = jnp.einsum("bihd,bihd->bhi", dout.astype(jnp.float32), out.astype(jnp.float32))
    if dlse is not None:
        delta = delta - jnp.where(lse == -jnp.inf, 0, dlse)
    lse2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)  # exp2(score - inf): a row without keys has no weights

    tiling = _Tiling.choose(spec, config.dkv, target, q_len, kv_len, part=2 * target.matrix_unit)
    block_kv, kv_padded = tiling.block_kv, round_up(kv_len, tiling.block_kv)
    # dq is summed, and then written, for a stretch of queries and as many heads of the group as VMEM holds a tile of.
    width = round_up(head_dim, LANES) + round_up(v_dim, LANES)  # what a row of both takes in VMEM
    key_bytes = 2 * (width + head_dim) * k.dtype.itemsize + (4 + 2 * 4) * width
    room = stretch_room(block_kv * key_bytes, target)
    operand_bytes, head_bytes = 2 * width * q.dtype.itemsize, head_dim * (4 + 2 * q.dtype.itemsize)
    fitting = (room // tiling.block_q - operand_bytes) // head_bytes
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= max(1, fitting))
    splits = group // heads
    major, stretches = stretch(q_len, tiling.block_q, operand_bytes + heads * head_bytes, room)
    q_padded = major * stretches

    def q_head(h: Any, s: Any, j: Any, g: Any) -> Any:
        # Keys that no query of the stretch sees repeat the last head: nothing is fetched for them.
        visible = tiling.visible_q(j * block_kv)[0] * tiling.block_q < (s + 1) * major
        return h * heads + jnp.where(visible, g, heads - 1)

    def q_rows(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, major, dim), lambda b, h, s, j, g: (b, q_head(h, s, j, g), s, 0))

    def kv_rows(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, block_kv, dim), lambda b, h, s, j, g: (b, lax.div(h, splits), j, 0))

    def partial_sum(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, block_kv, dim), lambda b, h, s, j, g: (s, b, h, j, 0))

    row = pl.BlockSpec((None, None, 1, major), lambda b, h, s, j, g: (b, q_head(h, s, j, g), 0, s))
    dq, dk, dv = pl.pallas_call(
        partial(_backward_kernel, scale=spec.softmax_scale, tiling=tiling),
        grid=(batch, kv_heads * splits, stretches, kv_padded // block_kv, heads),
        in_specs=[
            q_rows(head_dim),
            q_rows(v_dim),
            row,
            row,
            kv_rows(head_dim),
            pl.BlockSpec((None, None, head_dim, block_kv), lambda b, h, s, j, g: (b, lax.div(h, splits), 0, j)),
            kv_rows(v_dim),
        ],
        out_specs=[
            pl.BlockSpec((None, heads, head_dim, major), lambda b, h, s, j, g: (b, h, 0, s)),
            partial_sum(head_dim),
            partial_sum(v_dim),
        ],
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
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32)
            for shape in ((heads, head_dim, major), (block_kv, head_dim), (block_kv, v_dim))
        ],
        name="attention_backward",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary", "arbitrary")),
    )(
        _rows(q, q_padded),
        _rows(dout, q_padded),
        *(pad_to(statistic[:, :, None, :], 3, q_padded) for statistic in (lse2, delta)),
        _rows(k, kv_padded),
        _columns(k, kv_padded),
        _rows(v, kv_padded),
    )
    dk, dv = (d.reshape(stretches, batch, kv_heads, splits, kv_padded, -1).sum(axis=(0, 3)) for d in (dk, dv))
    dk, dv = (d[:, :, :kv_len].transpose(0, 2, 1, 3).astype(k.dtype) for d in (dk, dv))
    return dq[..., :q_len].transpose(0, 3, 1, 2), dk, dv


def _backward_kernel(
    q_ref: Any,  # [major, head_dim], of one query head
    dout_ref: Any,  # [major, v_dim]
    lse_ref: Any,  # [1, major], base 2
    delta_ref: Any,  # [1, major]
    k_ref: Any,  # [block_kv, head_dim]
    k_columns_ref: Any,  # [head_dim, block_kv], the same keys
    v_ref: Any,  # [block_kv, v_dim]
    dq_ref: Any,  # [heads, head_dim, major]
    dk_ref: Any,  # [block_kv, head_dim]
    dv_ref: Any,  # [block_kv, v_dim]
    dq_acc: Any,
    dk_acc: Any,
    dv_acc: Any,
    *,
    scale: float,
    tiling: _Tiling,
) -> None:
    """One tile of keys against a stretch of queries, all three gradients at once: five products a tile, not seven.

    dk and dv are complete after the last of the heads; dq stays in VMEM until the last tile of keys.
    """
    block_q, part = tiling.block_q, tiling.part
    key = pl.program_id(3) * tiling.block_kv
    head = pl.program_id(4)
    tiles = q_ref.shape[0] // block_q
    first_tile = pl.program_id(2) * tiles

    @pl.when(pl.program_id(3) == 0)
    def _start_dq() -> None:
        dq_acc[head] = jnp.zeros(dq_acc.shape[1:], jnp.float32)

    @pl.when(head == 0)
    def _start_dkv() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def add(tile: Any, row: int, masked: bool) -> None:
        at = pl.ds(pl.multiple_of(tile * block_q, block_q), block_q)
        q, dout, keys = q_ref[at, :], dout_ref[at, :], pl.ds(row, part)
        weights = jnp.exp2(dot_nt(k_ref[keys, :], q) * (scale * LOG2_E) - lse_ref[:, at])  # [part, block_q]
        if masked:
            weights = jnp.where(tiling.mask((first_tile + tile) * block_q, key + row), weights, 0)
        dscores = (weights * (dot_nt(v_ref[keys, :], dout) - delta_ref[:, at])).astype(q.dtype)
        dv_acc[keys, :] += dot(weights.astype(q.dtype), dout)
        dk_acc[keys, :] += dot(dscores, q)
        dq_acc[head, :, at] += dot(k_columns_ref[:, keys], dscores)

    def step(tile: Any, _: None, masked: bool) -> None:
        last = (first_tile + tile + 1) * block_q - 1
        for row in range(0, tiling.block_kv, part):
            if masked:
                pl.when(tiling.sees(last, key + row))(partial(add, tile, row, masked=True))
            else:
                add(tile, row, masked=False)

    some, whole = tiling.visible_q(key)
    some, whole = (jnp.clip(bound - first_tile, 0, tiles) for bound in (some, whole))
    if tiling.has_partial_tiles:
        lax.fori_loop(some, whole, partial(step, masked=True), None)
    lax.fori_loop(whole, tiles, partial(step, masked=False), None)

    @pl.when(head == pl.num_programs(4) - 1)
    def _finish_dkv() -> None:
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _finish_dq() -> None:
        dq_ref[head] = (dq_acc[head] * scale).astype(dq_ref.dtype)


@dataclass(frozen=True)
class _Tiling:
    """Which tiles there are and which are visible. Tiles of keys are computed in parts of `part` rows."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    part: int
    causal: bool

    @staticmethod
    def choose(
        spec: AttentionSpec, tiles: AttentionTiles, target: Target, q_len: int, kv_len: int, part: int
    ) -> _Tiling:
        block_q = fit_block("config.block_q", tiles.block_q, q_len, target)
        block_kv = fit_block("config.block_kv", tiles.block_kv, kv_len, target)
        return _Tiling(q_len, kv_len, block_q, block_kv, gcd(part or 2 * SUBLANES, block_kv), spec.causal)

    @property
    def offset(self) -> int:
        return self.kv_len - self.q_len

    @property
    def has_partial_tiles(self) -> bool:
        return self.causal or self.kv_len % self.block_kv != 0

    def sees(self, query: Any, key: Any) -> Any:
        """Whether a query sees a key. The padded queries of a causal call see padded keys; both are cut off."""
        return key <= query + self.offset if self.causal else key < self.kv_len

    def mask(self, query: Any, key: Any) -> jax.Array:
        """bool [part, block_q]: `sees` for the queries from `query` and the keys from `key`."""
        keys = lax.broadcasted_iota(jnp.int32, (self.part, self.block_q), 0)
        if not self.causal:
            return keys < self.kv_len - key
        return keys - lax.broadcasted_iota(jnp.int32, keys.shape, 1) <= query - key + self.offset

    def visible_kv(self, query: Any) -> tuple[Any, Any]:
        """For the tile of queries at `query`: how many tiles of keys all of them see whole, and any in part."""
        if not self.causal:
            return self.kv_len // self.block_kv, -(-self.kv_len // self.block_kv)
        first = jnp.clip(query + self.offset + 1, 0, self.kv_len)
        last = jnp.clip(query + self.offset + self.block_q, 0, self.kv_len)
        return lax.div(first, self.block_kv), lax.div(last + self.block_kv - 1, self.block_kv)

    def visible_q(self, key: Any) -> tuple[Any, Any]:
        """The first tile of queries that sees some of the tile of keys at `key`, and the first that sees all of it."""
        end = key + self.block_kv
        if not self.causal:
            return 0, jnp.where(end > self.kv_len, -(-self.q_len // self.block_q), 0)
        first = jnp.maximum(key - self.offset, 0)
        last = jnp.maximum(end - 1 - self.offset, 0)
        return lax.div(first, self.block_q), lax.div(last + self.block_q - 1, self.block_q)


def _fold(tile: jax.Array) -> jax.Array:
    """[rows, n] -> [rows / 8, 8, n]: reduced over its first axis, what is left fills a register's sublanes."""
    return tile.reshape(-1, SUBLANES, tile.shape[1])


def _rows(array: jax.Array, length: int) -> jax.Array:
    """[batch, length, heads, dim] -> [batch, heads, padded length, dim]."""
    return pad_to(array.transpose(0, 2, 1, 3), 2, length)


def _columns(array: jax.Array, length: int) -> jax.Array:
    """[batch, length, heads, dim] -> [batch, heads, dim, padded length]."""
    return pad_to(array.transpose(0, 2, 3, 1), 3, length)
