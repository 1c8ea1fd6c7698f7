"""Attention in NumPy, forward and backward: the definition that every kernel is held to.

It builds the scores whole, so it is for checking, not for speed. float64 inputs are computed in float64, all others in
float32. The gradients follow Dao, "FlashAttention-2" (arXiv:2307.08691), with the logsumexp's own gradient added.
"""

from __future__ import annotations

import numpy as np

from .spec import AttentionSpec


def visible(spec: AttentionSpec, q_len: int, kv_len: int) -> np.ndarray:
    """bool [q_len, kv_len]: which keys each query sees."""
    i = np.arange(q_len)[:, None]
    j = np.arange(kv_len)[None, :]
    return j <= i + (kv_len - q_len) if spec.causal else np.ones((q_len, kv_len), bool)


def forward(spec: AttentionSpec, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out and lse; a row that sees no key gives out 0 and lse -inf."""
    wide, k_heads, v_heads = _widen(q, k, v)
    scores = _scores(spec, wide, k_heads)
    peak = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))  # [batch, q_heads, q_len, kv_len]
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    out = np.einsum("bhij,bjhd->bihd", weights / np.where(total == 0, 1, total), v_heads)
    return out.astype(q.dtype), lse.astype(np.promote_types(wide.dtype, np.float32))


def backward(
    spec: AttentionSpec,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    outputs: tuple[np.ndarray, np.ndarray],
    gradients: tuple[np.ndarray, np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk, dv from the gradients of out and lse (None: zero)."""
    q, k, v = inputs
    out, lse = outputs
    dout, dlse = gradients
    wide, k_heads, v_heads = _widen(q, k, v)
    dout = dout.astype(wide.dtype)

    scores = _scores(spec, wide, k_heads)
    weights = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None])
    delta = np.einsum("bihd,bihd->bhi", dout, out.astype(wide.dtype))
    if dlse is not None:
        delta = delta - np.where(np.isneginf(lse), 0, dlse)
    dscores = weights * (np.einsum("bihd,bjhd->bhij", dout, v_heads) - delta[..., None]) * spec.softmax_scale

    dq = np.einsum("bhij,bjhd->bihd", dscores, k_heads)
    dk = _sum_groups(np.einsum("bhij,bihd->bjhd", dscores, wide), k.shape[2])
    dv = _sum_groups(np.einsum("bhij,bihd->bjhd", weights, dout), v.shape[2])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _widen(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three in the dtype of the computation, keys and values repeated to one a query head."""
    dtype = np.float64 if q.dtype == np.float64 else np.float32
    group = q.shape[2] // k.shape[2]
    k_heads, v_heads = (np.repeat(array.astype(dtype), group, axis=2) for array in (k, v))
    return q.astype(dtype), k_heads, v_heads


def _scores(spec: AttentionSpec, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[batch, q_heads, q_len, kv_len], -inf where a query does not see a key."""
    scores = np.einsum("bihd,bjhd->bhij", q, k) * spec.softmax_scale
    return np.where(visible(spec, q.shape[1], k.shape[1]), scores, -np.inf)


def _sum_groups(gradient: np.ndarray, kv_heads: int) -> np.ndarray:
    """Sum over the query heads that share a key head: [batch, kv_len, q_heads, d] -> [batch, kv_len, kv_heads, d]."""
    batch, kv_len, q_heads, dim = gradient.shape
    return gradient.reshape(batch, kv_len, kv_heads, q_heads // kv_heads, dim).sum(axis=3)
