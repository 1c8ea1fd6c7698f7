"""The norms by the framework's own ops, differentiable as the framework does; any leading dimensions."""

from __future__ import annotations

from typing import Any

from .spec import NormSpec


def forward(spec: NormSpec, x: Any, weight: Any, bias: Any, residual: Any) -> tuple[Any, Any]:
    """y, and the sum that it normalises where there is a residual."""
    normalise = _torch if type(x).__module__.startswith("torch") or not hasattr(x, "aval") else _jax
    if residual is None:
        return normalise(spec, x, weight, bias), None
    summed = x + residual
    return normalise(spec, summed, weight, bias), summed


def _torch(spec: NormSpec, x: Any, weight: Any, bias: Any) -> Any:
    from torch.nn import functional

    if spec.centers:
        return functional.layer_norm(x, (spec.hidden,), weight, bias, spec.eps)
    if not spec.zero_centered:
        return functional.rms_norm(x, (spec.hidden,), weight, spec.eps)
    # A narrow type has no room for a small weight beside 1.
    wide = x if x.dtype.itemsize > 4 else x.float()
    return functional.rms_norm(wide, (spec.hidden,), 1 + weight.to(wide.dtype), spec.eps).to(x.dtype)


def _jax(spec: NormSpec, x: Any, weight: Any, bias: Any) -> Any:
    import jax
    import jax.numpy as jnp

    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, scale = x.astype(wide), weight.astype(wide)
    if spec.centers:
        rows = rows - rows.mean(axis=-1, keepdims=True)
    y = rows * jax.lax.rsqrt(jnp.square(rows).mean(axis=-1, keepdims=True) + spec.eps)
    y = y * (1 + scale if spec.zero_centered else scale)
    return (y if bias is None else y + bias.astype(wide)).astype(x.dtype)
