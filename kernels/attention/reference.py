"""Attention in NumPy, forward and backward: the definition that every kernel is held to.

It builds the scores whole, so it is for checking, not for speed. float64 inputs are computed in float64, all others in
float32. The gradients follow Dao, "FlashAttention-2" (arXiv:2307.08691), with those of the logsumexp, of the sinks and
of the planes added. Packed sequences are computed one by one.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..tiles.expressions import INDICES, SCORE, Expression, derivative, evaluate, functions_of, plane
from ..tiles.philox import kept
from .spec import INPUTS, AttentionInputs, AttentionSpec, differentiable

_FUNCTIONS = functions_of(np)


def forward(spec: AttentionSpec, *inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """out and lse; a row that sees no key gives out 0 and lse -inf, or its sink."""
    arrays = AttentionInputs(*inputs)
    dtype = _computed_in(arrays.q)
    if arrays.cu_seqlens_q is None:
        out, lse = _forward(spec, arrays)
    else:
        out = np.zeros((*arrays.q.shape[:3], arrays.v.shape[3]), dtype)
        lse = np.full((1, arrays.q.shape[2], arrays.q.shape[1]), -np.inf, dtype)
        for number, (queries, _, sequence) in enumerate(_sequences(arrays)):
            out[:, queries], lse[:, :, queries] = _forward(spec, sequence, number)
    return out.astype(_dtype_of(spec, arrays.q)), lse


def backward(
    spec: AttentionSpec,
    inputs: tuple[Any, ...],
    outputs: tuple[np.ndarray, np.ndarray],
    gradients: tuple[np.ndarray, np.ndarray | None],
) -> tuple[np.ndarray | None, ...]:
    """The inputs' gradients from those of out and lse (None: zero); None for an input that has none."""
    arrays = AttentionInputs(*inputs)
    if arrays.cu_seqlens_q is None:
        found = _backward(spec, arrays, 0, *outputs, *gradients)
    else:
        (out, lse), (dout, dlse) = outputs, gradients
        wanted = [name for name in differentiable(spec) if getattr(arrays, name) is not None]
        found = {name: np.zeros(getattr(arrays, name).shape, _computed_in(arrays.q)) for name in wanted}
        for number, (queries, keys, sequence) in enumerate(_sequences(arrays)):
            dlse_rows = None if dlse is None else dlse[:, :, queries]
            rows = (out[:, queries], lse[:, :, queries], dout[:, queries], dlse_rows)
            for name, part in _backward(spec, sequence, number, *rows).items():
                if name.startswith("plane"):
                    whole = found[name][number : number + 1] if found[name].shape[0] > 1 else found[name]
                    whole[:, :, : part.shape[2], : part.shape[3]] += part
                elif name == "sinks":
                    found[name] += part
                else:
                    found[name][:, queries if name == "q" else keys] = part
    return tuple(found[name].astype(getattr(arrays, name).dtype) if name in found else None for name in INPUTS)


def visible(spec: AttentionSpec, q_len: Any, kv_len: Any, shape: tuple[int, int] | None = None) -> np.ndarray:
    """bool [queries, keys], of that shape if it is larger than the lengths: which keys lie in each query's window."""
    rows, columns = (q_len, kv_len) if shape is None else shape
    i = np.arange(rows)[:, None]
    j = np.arange(columns)[None, :]
    aligned = i + (kv_len - q_len)
    seen = (i < q_len) & (j < kv_len)
    if spec.left is not None:
        seen = seen & (j >= aligned - spec.left)
    if spec.right is not None:
        seen = seen & (j <= aligned + spec.right)
    return seen


def _forward(spec: AttentionSpec, arrays: AttentionInputs, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of one batch, whose first item has that index."""
    scores, places = _scores(spec, arrays, first)
    sinks = None if arrays.sinks is None else arrays.sinks.astype(scores.dtype)[:, :, None, None]
    peak = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    if sinks is not None:
        peak = np.maximum(peak, sinks)
    finite_peak = np.where(np.isneginf(peak), 0, peak)
    weights = np.exp(scores - finite_peak)  # [batch, q_heads, q_len, kv_len]
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - finite_peak)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    values = _heads(_without_unseen(arrays.v, scores), arrays.q.shape[2])
    weights = _dropped(spec, arrays, places, weights)
    if spec.weight is not None:
        weights = weights * evaluate(spec.weight, places, _FUNCTIONS)
    out = np.einsum("bhij,bjhd->bihd", weights / np.where(total == 0, 1, total), values)
    return (out if arrays.value_scales is None else out * arrays.value_scales[:, None, :, None]), lse


def _backward(
    spec: AttentionSpec, arrays: AttentionInputs, first: int, out: Any, lse: Any, dout: Any, dlse: Any
) -> dict[str, np.ndarray]:
    """The gradients of one batch, by the input's name."""
    scores, values = _scores(spec, arrays, first)
    dtype, q_heads = scores.dtype, arrays.q.shape[2]
    seen: Any = ~np.isneginf(scores)
    blind = ~seen.any(axis=-1).transpose(0, 2, 1)[..., None]  # [batch, q_len, q_heads, 1]
    out, dout, q = (np.where(blind, 0, array.astype(dtype)) for array in (out, dout, arrays.q))
    k, v = (_heads(_without_unseen(array, scores), q_heads) for array in (arrays.k, arrays.v))

    weights = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None])
    delta = np.einsum("bihd,bihd->bhi", dout, out)
    if dlse is not None:
        delta = delta - np.where(np.isneginf(lse), 0, dlse)
    dweights = _dropped(spec, arrays, values, np.einsum("bihd,bjhd->bhij", dout, v))
    dscores = weights * (dweights - delta[..., None])

    found: dict[str, np.ndarray] = {}
    if arrays.sinks is not None:
        sinks = arrays.sinks.astype(dtype)[:, :, None]
        found["sinks"] = -(np.exp(sinks - np.where(np.isneginf(lse), np.inf, lse)) * delta).sum(axis=-1)
    for slot in spec.plane_gradients:
        if spec.score is not None and arrays.planes[slot] is not None:
            change = _through(spec.score, plane(slot), values, seen, dscores)
            found[f"plane{slot}"] = _summed_to(change, arrays.planes[slot].shape)
    if spec.score is not None:
        dscores = _through(spec.score, SCORE, values, seen, dscores)
    dscores = dscores * spec.softmax_scale
    found["q"] = np.einsum("bhij,bjhd->bihd", dscores, k)
    found["k"] = _sum_groups(np.einsum("bhij,bihd->bjhd", dscores, q), arrays.k.shape[2])
    found["v"] = _sum_groups(
        np.einsum("bhij,bihd->bjhd", _dropped(spec, arrays, values, weights), dout), arrays.v.shape[2]
    )
    return found


def _scores(spec: AttentionSpec, arrays: AttentionInputs, first: int) -> tuple[np.ndarray, dict[Expression, Any]]:
    """[batch, q_heads, q_len, kv_len], -inf where a query does not see a key; and what the expressions were given."""
    dtype = _computed_in(arrays.q)
    (batch, q_len, q_heads, _), kv_len = arrays.q.shape, arrays.k.shape[1]
    scores = np.einsum("bihd,bjhd->bhij", arrays.q.astype(dtype), _heads(arrays.k.astype(dtype), q_heads))
    scores = scores * spec.softmax_scale
    grids = np.ix_(*map(np.arange, (batch, q_heads, q_len, kv_len)))
    values: dict[Expression, Any] = {(name,): grid for name, grid in zip(INDICES, grids, strict=True)}
    values |= {SCORE: scores, ("b",): values["b",] + first}
    for slot, array in enumerate(arrays.planes):
        if array is not None:
            values[plane(slot)] = array if array.dtype in (bool, np.int32) else array.astype(dtype)
    seen = visible(spec, _lengths(arrays.q_lengths, q_len), _lengths(arrays.kv_lengths, kv_len), (q_len, kv_len))
    if spec.mask is not None:
        seen = seen & evaluate(spec.mask, values, _FUNCTIONS)
    if spec.score is not None:
        with np.errstate(all="ignore"):  # of what is not seen
            scores = np.broadcast_to(evaluate(spec.score, values, _FUNCTIONS), scores.shape)
    return np.where(seen, scores, -np.inf).astype(dtype, copy=False), values


def _dropped(
    spec: AttentionSpec, arrays: AttentionInputs, places: dict[Expression, Any], weights: np.ndarray
) -> np.ndarray:
    """The weights, or their gradients, with some dropped and the others made larger."""
    if not spec.dropout:
        return weights
    seed = np.asarray(arrays.dropout_seed).view(np.uint32).astype(np.int64)
    b, h, i, j = (places[name,].astype(np.int64) for name in INDICES)
    stay = kept(seed, spec.dropout, (b, h, i, j), int, np.where)
    return np.where(stay, weights / (1 - spec.dropout), 0)


def _through(
    score: Expression, variable: Expression, values: dict[Expression, Any], seen: np.ndarray, dscores: np.ndarray
) -> np.ndarray:
    """The gradient of what a score expression reads, from that of the score: 0 where nothing is seen."""
    with np.errstate(all="ignore"):  # of what is not seen
        return np.where(seen, dscores * evaluate(derivative(score, variable), values, _FUNCTIONS), 0)


def _dtype_of(spec: AttentionSpec, q: np.ndarray) -> Any:
    """That of the result: NumPy has bfloat16 from ml_dtypes."""
    if spec.result_dtype is None:
        return q.dtype
    return ml_dtypes.bfloat16 if spec.result_dtype == "bfloat16" else np.dtype(spec.result_dtype)


def _computed_in(q: np.ndarray) -> Any:
    return np.dtype(np.float64 if q.dtype == np.float64 else np.float32)


def _lengths(lengths: np.ndarray | None, size: int) -> Any:
    """[batch, 1, 1, 1], or the size of the array."""
    return size if lengths is None else np.clip(lengths, 0, size).astype(np.int64)[:, None, None, None]


def _heads(array: np.ndarray, q_heads: int) -> np.ndarray:
    """Keys or values repeated to one a query head."""
    return np.repeat(array, q_heads // array.shape[2], axis=2)


def _without_unseen(array: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Keys or values with 0 where no query sees them, for what is there must reach nothing."""
    batch, kv_len, kv_heads, _ = array.shape
    rows = scores.shape[1] // kv_heads * scores.shape[2]
    seen: Any = ~np.isneginf(scores).reshape(batch, kv_heads, rows, kv_len).all(axis=2)
    return np.where(seen.transpose(0, 2, 1)[..., None], array.astype(scores.dtype), 0)


def _sum_groups(gradient: np.ndarray, kv_heads: int) -> np.ndarray:
    """Sum over the query heads that share a key head: [batch, kv_len, q_heads, d] -> [batch, kv_len, kv_heads, d]."""
    batch, kv_len, q_heads, dim = gradient.shape
    return gradient.reshape(batch, kv_len, kv_heads, q_heads // kv_heads, dim).sum(axis=3)


def _summed_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, shape)).sum(axis=axes, keepdims=True)


def _sequences(arrays: AttentionInputs) -> Any:
    """(rows of queries, rows of keys, the arrays of the sequence as a batch of one) of each packed sequence."""
    starts_q, starts_k = (np.asarray(array, np.int64) for array in (arrays.cu_seqlens_q, arrays.cu_seqlens_k))
    for number in range(len(starts_q) - 1):
        queries = slice(int(starts_q[number]), int(starts_q[number + 1]))
        keys = slice(int(starts_k[number]), int(starts_k[number + 1]))
        sizes = queries.stop - queries.start, keys.stop - keys.start
        planes = [None if array is None else _of_sequence(array, number, *sizes) for array in arrays.planes]
        rows = {"q": arrays.q[:, queries], "k": arrays.k[:, keys], "v": arrays.v[:, keys]}
        names = {f"plane{slot}": array for slot, array in enumerate(planes)}
        yield queries, keys, arrays._replace(**rows, cu_seqlens_q=None, cu_seqlens_k=None, **names)


def _of_sequence(array: np.ndarray, number: int, q_len: int, kv_len: int) -> np.ndarray:
    """The part of a plane [sequences, heads, max_seqlen_q, max_seqlen_k] that belongs to one sequence."""
    array = array[number : number + 1] if array.shape[0] > 1 else array
    array = array[:, :, :q_len] if array.shape[2] > 1 else array
    return array[..., :kv_len] if array.shape[3] > 1 else array
