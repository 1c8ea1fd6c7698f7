"""Paged attention in NumPy: the definition that every kernel is held to.

It gathers each batch item's keys and values, and builds its scores whole. float64 queries are computed in float64, all
others in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..tiles.errors import UnsupportedError
from .spec import PagedAttentionInputs, PagedAttentionSpec, no_gradient


def forward(spec: PagedAttentionSpec, *inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """out and lse; a row that sees no key gives out 0 and lse -inf, or its sink."""
    arrays = PagedAttentionInputs(*inputs)
    batch, q_len, q_heads, _ = arrays.q.shape
    page_size, v_dim = arrays.v_pages.shape[1], arrays.v_pages.shape[3]
    dtype = np.dtype(np.float64 if arrays.q.dtype == np.float64 else np.float32)
    lengths = np.clip(arrays.lengths, 0, arrays.page_table.shape[1] * page_size).astype(np.int64)
    q_lengths = np.full(batch, q_len) if arrays.q_lengths is None else np.clip(arrays.q_lengths, 0, q_len)
    out = np.zeros((batch, q_len, q_heads, v_dim), dtype)
    lse = np.full((batch, q_heads, q_len), -np.inf, dtype)
    for item in range(batch):
        sinks = None if arrays.sinks is None else arrays.sinks[item].astype(dtype)
        if sinks is not None:
            lse[item] = sinks[:, None]
        seen = visible(spec, int(q_lengths[item]), int(lengths[item]))  # [queries, keys]
        keys = np.flatnonzero(seen.any(axis=0))
        queries = slice(0, seen.shape[0])
        pages, rows = arrays.page_table[item, keys // page_size], keys % page_size
        k = _values(arrays.k_pages, pages, rows, arrays.k_scales, dtype)  # [keys, kv_heads, head_dim]
        v = _values(arrays.v_pages, pages, rows, arrays.v_scales, dtype)
        q = arrays.q[item, queries].astype(dtype)
        out[item, queries], lse[item, :, queries] = _attend(spec, q, k, v, seen[:, keys], sinks)
    return out.astype(arrays.q.dtype), lse


def backward(*arguments: Any) -> None:
    """There is none."""
    raise UnsupportedError(no_gradient())


def visible(spec: PagedAttentionSpec, q_length: int, length: int) -> np.ndarray:
    """bool [q_length, length]: which keys of the cache each query sees."""
    aligned = np.arange(q_length)[:, None] + (length - q_length)
    keys = np.arange(length)[None, :]
    seen = np.ones((q_length, length), bool)
    if spec.causal:
        seen &= keys <= aligned
    if spec.window_left is not None:
        seen &= keys >= aligned - spec.window_left
    return seen


def _values(pages: np.ndarray, chosen: np.ndarray, rows: np.ndarray, scales: np.ndarray | None, dtype: Any) -> Any:
    """[keys, kv_heads, dim] from rows of pages, dequantised."""
    values = pages[chosen, rows].astype(dtype)
    return values if scales is None else values * scales.astype(dtype)[:, None]


def _attend(
    spec: PagedAttentionSpec, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, sinks: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """out [queries, q_heads, v_dim] and lse [q_heads, queries] of one batch item."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(array, group, axis=1) for array in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * spec.softmax_scale
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    scores = np.where(seen, scores, -np.inf)  # [q_heads, queries, keys]
    peak = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    if sinks is not None:
        peak = np.maximum(peak, sinks[:, None, None])
    finite_peak = np.where(np.isneginf(peak), 0, peak)
    weights = np.exp(scores - finite_peak)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - finite_peak)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    return np.einsum("hij,jhd->ihd", weights / np.where(total == 0, 1, total), v), lse
