"""Attention on TPUs, forward and backward, in Pallas.

The online softmax is Milakov & Gimelshein's (arXiv:1805.02867), its tiling FlashAttention's (Dao et al.,
arXiv:2205.14135), the backward from the saved logsumexp FlashAttention-2's (Dao, arXiv:2307.08691).

All kernels compute *transposed* scores, [keys, queries] = k @ q^T. What belongs to a query, its maximum, its sum, its
logsumexp, is then a row along the lanes: reductions run down the sublanes on the vector units, a row broadcasts for
nothing, and no tile is transposed in a kernel. The transposes this asks for are done by XLA outside, together with the
change from [batch, length, heads, dim] to heads first, and the padding to whole tiles.

A grid step holds a long stretch of the side that it walks in VMEM, so that the loop over tiles is inside the kernel: it
runs over the visible tiles only, and computes a mask for those at the edge of a window or at an end. Within a tile, the
parts are of a size that keeps scores in registers between two matrix products. Lengths are scalars that are fetched
before the grid runs: one compilation serves them all. What a call leaves out leaves no instruction.

Few queries, as decoding has, are another kernel's (`pallas_decode.py`): it reads keys and values as they lie.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..tiles.pallas_tiles import LOG2_E
from ..tiles.targets import Target
from .pallas_backward import backward as backward_of_qkv
from .pallas_decode import can_decode
from .pallas_decode import forward as forward_of_few
from .pallas_forward import forward as forward_of_batch
from .pallas_packed import longest, packed_rows, packings, spread_inputs, spread_rows
from .pallas_planes import exact_delta
from .pallas_planes import gradient as gradient_of_plane
from .pallas_tiling import Tiling
from .pallas_visits import can_visit
from .pallas_visits import forward as forward_of_packed
from .sparsity import with_runs
from .spec import INPUTS, AttentionInputs, AttentionSpec, needs_exact_delta
from .tiles import AttentionConfig

DTYPES = ("float32", "bfloat16")  # what the TPU's compiler multiplies; interpreted, float16 too
_WITH_FLOAT8 = ("v7x", "interpret")  # its predecessors multiply another kind, e4m3b11
MAX_DIM = 576  # of a head: that of a latent cache
_MOST_SCALARS = 1 << 17  # of a list of runs: half of the memory that a TPU has for scalars


def supports(spec: AttentionSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Gradients ask for nothing more."""
    reasons = []
    if target.is_gpu:
        reasons.append(f"target: got {target.name}; the Pallas kernels are for TPUs, use implementation='triton'")
    if spec.dtype == "float16":
        if not target.interpreted:
            reasons.append(f"dtype: got float16, which the compiler for {target.name} refuses; cast to bfloat16")
    elif spec.is_float8:
        if target.name not in _WITH_FLOAT8:
            reasons.append(
                f"dtype: got {spec.dtype}, of which {target.name} has no products, as v7x has; cast to bfloat16"
            )
        if needs_grad:
            reasons.append(f"dtype: got {spec.dtype}, which has no backward; cast to bfloat16")
    elif spec.dtype not in DTYPES:
        reasons.append(f"dtype: got {spec.dtype}; it must be one of {', '.join(DTYPES)}")
    for name, size in (("head_dim", spec.head_dim), ("v_dim", spec.v_dim)):
        if size > MAX_DIM:
            reasons.append(f"{name}: got {size}; it must be at most {MAX_DIM}")
    return tuple(reasons)


def completed(spec: AttentionSpec, config: AttentionConfig, target: Target, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with what the host can say of the mask, from the planes that are NumPy's."""
    arrays = AttentionInputs(*inputs)
    if spec.mask is None or _is_empty(arrays):
        return arrays
    blocks, sizes = {}, longest(spec, arrays)
    for name, tiles in (("forward_runs", config.forward), ("dkv_runs", config.dkv)):
        tiling = Tiling.choose(spec, tiles, target, sizes, False)
        blocks[name] = tiling.block_q, tiling.block_kv
    found = with_runs(spec, arrays, blocks)
    lists = {name: getattr(found, name) for name in blocks}
    too_long = [name for name, runs in lists.items() if runs is not None and len(runs) > _MOST_SCALARS]
    return found._replace(**dict.fromkeys(too_long))


def forward(
    spec: AttentionSpec, config: AttentionConfig, target: Target, *inputs: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """out [batch, q_len, q_heads, v_dim] and lse [batch, q_heads, q_len]."""
    arrays = AttentionInputs(*inputs)
    if arrays.cu_seqlens_q is not None:
        if not _is_empty(arrays) and can_visit(spec, config, arrays):
            return forward_of_packed(spec, config, target, arrays)
        queries, keys = packings(spec, arrays)
        out, lse = _forward(spec, config, target, spread_inputs(arrays, queries, keys))
        return queries.packed(out), packed_rows(lse, queries)
    return _forward(spec, config, target, arrays)


def backward(
    spec: AttentionSpec,
    config: AttentionConfig,
    target: Target,
    inputs: tuple[jax.Array | None, ...],
    outputs: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array | None],
) -> tuple[jax.Array | None, ...]:
    """The gradients in the order of INPUTS, in the inputs' shapes and dtypes; None for those that have none."""
    arrays, (out, lse), (dout, dlse) = AttentionInputs(*inputs), outputs, gradients
    if arrays.cu_seqlens_q is None:
        found = _backward(spec, config, target, arrays, out, lse, dout, dlse)
    else:
        queries, keys = packings(spec, arrays)
        statistics = spread_rows(lse, queries), queries.spread(dout), spread_rows(dlse, queries)
        spread = spread_inputs(arrays, queries, keys)
        found = _backward(spec, config, target, spread, queries.spread(out), *statistics)
        found |= {name: side.packed(found[name]) for name, side in (("q", queries), ("k", keys), ("v", keys))}
        if "sinks" in found:
            found["sinks"] = found["sinks"].sum(axis=0, keepdims=True)
    return tuple(found.get(name) for name in INPUTS)


def _forward(
    spec: AttentionSpec, config: AttentionConfig, target: Target, arrays: AttentionInputs
) -> tuple[jax.Array, jax.Array]:
    batch, q_len, q_heads, _ = arrays.q.shape
    if _is_empty(arrays):
        lse = jnp.full((batch, q_heads, q_len), -jnp.inf)
        if arrays.sinks is not None:
            lse = jnp.broadcast_to(arrays.sinks[:, :, None].astype(jnp.float32), lse.shape)
        return jnp.zeros((*arrays.q.shape[:3], arrays.v.shape[3]), spec.out_dtype), lse
    lengths = _lengths(arrays)
    if can_decode(spec, arrays):
        return forward_of_few(spec, config, target, arrays, lengths)
    arrays = _without_padding(arrays, lengths)
    return forward_of_batch(spec, config, target, arrays, lengths)


def _backward(
    spec: AttentionSpec,
    config: AttentionConfig,
    target: Target,
    arrays: AttentionInputs,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
) -> dict[str, jax.Array]:
    lengths = _lengths(arrays)
    arrays = _without_padding(arrays, lengths)
    dout = _up_to(dout, lengths[0][0]) if lengths else dout
    found = {}
    delta = jnp.einsum("bihd,bihd->bhi", dout.astype(jnp.float32), out.astype(jnp.float32))
    subtracted = 0 if dlse is None else jnp.where(lse == -jnp.inf, 0, dlse)
    delta = delta - subtracted
    if arrays.sinks is not None:
        weights = jnp.exp(arrays.sinks[:, :, None] - jnp.where(lse == -jnp.inf, jnp.inf, lse))
        found["sinks"] = -(weights * delta).sum(axis=2).astype(arrays.sinks.dtype)
    slots = [slot for slot in spec.plane_gradients if arrays.planes[slot] is not None]
    if _is_empty(arrays):
        names = "q", "k", "v", *(f"plane{slot}" for slot in slots)
        return found | {name: jnp.zeros_like(getattr(arrays, name)) for name in names}
    blind = lse == -jnp.inf
    if lengths:
        blind |= jnp.arange(lse.shape[2]) >= lengths[0][0][:, None, None]
    # exp2(score - inf): a row without keys has no weights.
    statistics = jnp.where(blind, jnp.inf, lse * LOG2_E), jnp.where(blind, 0, delta) if lengths else delta
    operands = spec, config, target, arrays, lengths, dout, statistics
    found |= zip(("q", "k", "v"), backward_of_qkv(*operands), strict=True)
    if needs_exact_delta(spec, arrays.planes):
        operands = *operands[:-1], (statistics[0], exact_delta(operands) - subtracted)
    found |= {f"plane{slot}": gradient_of_plane(operands, slot) for slot in slots}
    return found


def _is_empty(arrays: AttentionInputs) -> bool:
    return 0 in arrays.q.shape or 0 in arrays.k.shape


def _lengths(arrays: AttentionInputs) -> tuple[jax.Array, ...]:
    """(int32 [2, batch] of queries and keys,), or () where the call has no lengths."""
    if arrays.q_lengths is None and arrays.kv_lengths is None:
        return ()
    sizes = arrays.q.shape[1], arrays.k.shape[1]
    given = (arrays.q_lengths, arrays.kv_lengths)
    batch = arrays.q.shape[0]
    rows = (
        jnp.full(batch, size, jnp.int32) if length is None else jnp.clip(length, 0, size).astype(jnp.int32)
        for length, size in zip(given, sizes, strict=True)
    )
    return (jnp.stack(list(rows)),)


def _without_padding(arrays: AttentionInputs, lengths: tuple[jax.Array, ...]) -> AttentionInputs:
    """What lies past a length, which may be NaN, as 0."""
    if not lengths:
        return arrays
    q_lengths, kv_lengths = lengths[0]
    k, v = (_up_to(array, kv_lengths) for array in (arrays.k, arrays.v))
    return arrays._replace(q=_up_to(arrays.q, q_lengths), k=k, v=v)


def _up_to(array: jax.Array, lengths: jax.Array) -> jax.Array:
    """[batch, length, heads, dim] with 0 past the lengths."""
    return jnp.where(
        (jnp.arange(array.shape[1]) < lengths[:, None])[:, :, None, None], array, jnp.zeros((), array.dtype)
    )
