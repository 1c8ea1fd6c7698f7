"""Attention by the framework's own op: torch's `scaled_dot_product_attention`, XLA's `dot_product_attention`.

Differentiable as the framework differentiates it. The logsumexp, and the lengths that the framework's op aligns
otherwise (it is causal from the top left), are built from smaller ops.
"""

from __future__ import annotations

from typing import Any

from .spec import AttentionSpec


def forward(spec: AttentionSpec, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """out and, where the spec asks for it, lse."""
    if type(q).__module__.startswith("torch") or not hasattr(q, "aval"):
        return _torch(spec, q, k, v)
    return _jax(spec, q, k, v)


def _torch(spec: AttentionSpec, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q_len, kv_len = q.shape[1], k.shape[1]
    if spec.return_lse or not kv_len:
        return _torch_with_lse(spec, q, k, v)
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210 (a bool, where torch.compile has a SymBool)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not spec.causal or q_len == 1:
        out = scaled_dot_product_attention(q, k, v, scale=spec.scale, enable_gqa=grouped)
    elif q_len == kv_len:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
    elif q_len > kv_len:  # the first queries see no key; the others are a square
        blind = q.new_zeros((*q.shape[:2], q_len - kv_len, spec.v_dim))
        seen = q[:, :, q_len - kv_len :]
        out = scaled_dot_product_attention(seen, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
        out = torch.cat((blind, out), dim=2)
    else:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)
    return out.transpose(1, 2), None


def _torch_with_lse(spec: AttentionSpec, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    import torch

    group = q.shape[2] // k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (array.repeat_interleave(group, dim=2) for array in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * spec.softmax_scale
    if spec.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[1] - q.shape[1] + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], float("-inf"))
    blind = lse == float("-inf")
    weights = torch.exp(scores - lse.masked_fill(blind, 0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v), lse


def _jax(spec: AttentionSpec, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    q_len, kv_len = q.shape[1], k.shape[1]
    square = spec.v_dim == spec.head_dim and (not spec.causal or q_len == kv_len)
    if not spec.return_lse and kv_len and square:
        return jax.nn.dot_product_attention(q, k, v, scale=spec.softmax_scale, is_causal=spec.causal), None

    group = q.shape[2] // k.shape[2]
    grouped = q.reshape(*q.shape[:2], k.shape[2], group, q.shape[3])
    scores = jnp.einsum("bihgd,bjhd->bhgij", grouped, k, preferred_element_type=jnp.float32) * spec.softmax_scale
    if spec.causal:
        seen = jnp.arange(kv_len) <= jnp.arange(q_len)[:, None] + (kv_len - q_len)
        scores = jnp.where(seen, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, initial=-jnp.inf, keepdims=True)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0, peak))
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    blind = total == 0
    weights = weights / jnp.where(blind, 1, total)
    out = jnp.einsum("bhgij,bjhd->bihgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    lse = jnp.where(blind, -jnp.inf, peak + jnp.log(jnp.where(blind, 1, total)))[..., 0]
    return out.reshape(*q.shape[:3], v.shape[3]).astype(q.dtype), lse.reshape(*lse.shape[:1], -1, q_len)
