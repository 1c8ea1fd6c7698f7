"""Rotary by the framework's elementwise ops, in float32 and rounded once, differentiable as the framework does."""

from __future__ import annotations

from typing import Any

from .spec import RotarySpec


def forward(spec: RotarySpec, q: Any, k: Any, positions: Any, frequencies: Any) -> tuple[Any, Any]:
    """q and k, rotated; positions and frequencies broadcast along the batch."""
    rotate = _torch if type(q).__module__.startswith("torch") or not hasattr(q, "aval") else _jax
    return rotate(spec, q, k, positions, frequencies)


def _torch(spec: RotarySpec, q: Any, k: Any, positions: Any, frequencies: Any) -> tuple[Any, Any]:
    import torch

    wide = torch.promote_types(q.dtype, torch.float32)
    angles = (positions[:, :, None].float() * frequencies[:, None]).to(wide)
    cos, sin = (spec.factor * part[:, :, None] for part in (angles.cos(), angles.sin()))

    def rotate(x: Any) -> Any:
        turned, rest = x[..., : spec.rotary_dim].to(wide), x[..., spec.rotary_dim :]
        first, second = _pairs(spec, turned)
        parts = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(parts, -1).flatten(-2) if spec.interleaved else torch.cat(parts, -1)
        return torch.cat((turned.to(x.dtype), rest), -1) if rest.shape[-1] else turned.to(x.dtype)

    return rotate(q), (None if k is None else rotate(k))


def _jax(spec: RotarySpec, q: Any, k: Any, positions: Any, frequencies: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp

    wide = jnp.promote_types(q.dtype, jnp.float32)
    angles = (positions[:, :, None].astype(jnp.float32) * frequencies[:, None]).astype(wide)
    cos, sin = (spec.factor * part[:, :, None] for part in (jnp.cos(angles), jnp.sin(angles)))

    def rotate(x: Any) -> Any:
        turned, rest = x[..., : spec.rotary_dim].astype(wide), x[..., spec.rotary_dim :]
        first, second = _pairs(spec, turned)
        parts = (first * cos - second * sin, second * cos + first * sin)
        turned = jnp.stack(parts, -1).reshape(turned.shape) if spec.interleaved else jnp.concatenate(parts, -1)
        return jnp.concatenate((turned.astype(x.dtype), rest), -1)

    return rotate(q), (None if k is None else rotate(k))


def _pairs(spec: RotarySpec, turned: Any) -> tuple[Any, Any]:
    """The first and the second elements of all pairs."""
    if spec.interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    half = spec.rotary_dim // 2
    return turned[..., :half], turned[..., half:]
