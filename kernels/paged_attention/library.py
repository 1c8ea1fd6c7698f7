"""Paged attention from the framework's smaller ops: the pages are gathered into one array, and the scores built whole.

For a CPU, and for what no kernel takes. It reads every page that the table has room for.
"""

from __future__ import annotations

from typing import Any

from .spec import PagedAttentionInputs, PagedAttentionSpec


def forward(spec: PagedAttentionSpec, *inputs: Any) -> tuple[Any, Any]:
    """out and lse. sinks may come as `[q_heads]` too."""
    arrays = PagedAttentionInputs(*inputs)
    if type(arrays.q).__module__.startswith("torch") or not hasattr(arrays.q, "aval"):
        import torch

        return _forward(torch, spec, arrays)
    import jax.numpy as jnp

    return _forward(jnp, spec, arrays)


def _forward(xp: Any, spec: PagedAttentionSpec, arrays: PagedAttentionInputs) -> tuple[Any, Any]:
    """Either framework, in what both have under one name."""
    q, lengths = arrays.q, arrays.lengths
    (batch, q_len, q_heads, head_dim), (num_pages, page_size, kv_heads, _) = q.shape, arrays.k_pages.shape
    max_pages, group = arrays.page_table.shape[1], q_heads // kv_heads
    kv_len = max_pages * page_size
    if 0 in (batch, q_len, num_pages, kv_len):
        empty = xp.zeros((batch, q_heads, q_len), **_like(xp, q, xp.float32))
        out = xp.zeros((*q.shape[:3], spec.v_dim), **_like(xp, q, q.dtype))
        return out, _with_sinks(xp, empty - float("inf"), arrays.sinks)
    wide = xp.float64 if spec.dtype == "float64" else xp.float32
    i = xp.arange(q_len, **_like(xp, q, None))[None, :, None]
    j = xp.arange(kv_len, **_like(xp, q, None))[None, None, :]
    length = xp.clip(lengths, 0, kv_len)[:, None, None]
    q_length = q_len if arrays.q_lengths is None else xp.clip(arrays.q_lengths, 0, q_len)[:, None, None]
    aligned = i + length - q_length
    seen = (i < q_length) & (j < length)  # [batch, q_len, kv_len]
    if spec.causal:
        seen = seen & (j <= aligned)
    if spec.window_left is not None:
        seen = seen & (j >= aligned - spec.window_left)
    used = seen.any(axis=1)  # [batch, kv_len]

    table = xp.where(used.reshape(batch, max_pages, page_size).any(axis=2), arrays.page_table, 0)
    k = _gathered(xp, arrays.k_pages, table, used, arrays.k_scales, wide)  # [batch, kv_len, kv_heads, head_dim]
    v = _gathered(xp, arrays.v_pages, table, used, arrays.v_scales, wide)
    grouped = _to(q, wide).reshape(batch, q_len, kv_heads, group, head_dim)
    scores = xp.einsum("bihgd,bjhd->bhgij", grouped, k) * spec.softmax_scale
    if spec.softcap is not None:
        scores = spec.softcap * xp.tanh(scores / spec.softcap)
    scores = xp.where(seen[:, None, None], scores, -float("inf")).reshape(batch, q_heads, q_len, kv_len)
    lse = _with_sinks(xp, _logsumexp(xp, scores), arrays.sinks)
    weights = xp.exp(scores - xp.where(lse == -float("inf"), 0.0, lse)[..., None])
    out = xp.einsum("bhgij,bjhd->bihgd", weights.reshape(batch, kv_heads, group, q_len, kv_len), v)
    return _to(out.reshape(batch, q_len, q_heads, spec.v_dim), q.dtype), lse


def _gathered(xp: Any, pages: Any, table: Any, used: Any, scales: Any, dtype: Any) -> Any:
    """[batch, kv_len, kv_heads, dim]: the pages of each batch item one after another, dequantised, 0 where unseen."""
    batch, max_pages = table.shape
    values = _to(pages[table], dtype).reshape(batch, max_pages * pages.shape[1], *pages.shape[2:])
    values = xp.where(used[..., None, None], values, 0.0)
    return values if scales is None else values * _to(scales, dtype)[:, None]


def _logsumexp(xp: Any, scores: Any) -> Any:
    peak = xp.amax(scores, -1)
    finite = xp.where(peak == -float("inf"), 0.0, peak)
    return finite + xp.log(xp.exp(scores - finite[..., None]).sum(-1))


def _with_sinks(xp: Any, lse: Any, sinks: Any) -> Any:
    """lse [batch, q_heads, q_len] with the sinks [batch, q_heads] or [q_heads] in it."""
    return lse if sinks is None else xp.logaddexp(lse, _to(sinks, lse.dtype)[..., None])


def _to(array: Any, dtype: Any) -> Any:
    return array.to(dtype) if hasattr(array, "to") and not hasattr(array, "aval") else array.astype(dtype)


def _like(xp: Any, array: Any, dtype: Any) -> dict[str, Any]:
    """The arguments that put a new array of that dtype beside another."""
    kind = {} if dtype is None else {"dtype": dtype}
    return kind | ({"device": array.device} if xp.__name__ == "torch" else {})
