"""Matmul with a quantised weight by the framework's own ops: the weight is dequantised, whole, to a's dtype.

Differentiable as the framework does, with the rounding of a passed straight through. On narrow types torch rounds the
product once before the epilogue.
"""

from __future__ import annotations

from typing import Any

from ..tiles.formats import FORMATS, cast, dequantized_rows, quantized_rows, weights
from .spec import QuantizedMatmulSpec


def forward(
    spec: QuantizedMatmulSpec, a: Any, values: Any, scales: Any, zeros: Any, bias: Any, residual: Any
) -> tuple[Any, None]:
    """out, and None in the place of the preactivation; any leading dimensions."""
    run = _torch if type(a).__module__.startswith("torch") or not hasattr(a, "aval") else _jax
    return run(spec, a, (values, scales, zeros), bias, residual), None


def _torch(spec: QuantizedMatmulSpec, a: Any, weight: tuple[Any, Any, Any], bias: Any, residual: Any) -> Any:
    import torch
    from torch.nn import functional

    w = cast(_weight(torch, spec, a, weight), spec.dtype)
    if spec.a_format is not None:
        a = _rounded(torch, spec, a.detach()) + (a - a.detach())
    out = torch.matmul(a, w)
    out = out if bias is None else out + bias
    if spec.activation == "gelu_tanh":
        out = functional.gelu(out, approximate="tanh")
    elif spec.activation is not None:
        out = getattr(functional, spec.activation)(out)
    if residual is not None:
        out = out + residual
    return out if spec.out_dtype == spec.dtype else out.to(getattr(torch, spec.out_dtype))


def _jax(spec: QuantizedMatmulSpec, a: Any, weight: tuple[Any, Any, Any], bias: Any, residual: Any) -> Any:
    import jax
    import jax.numpy as jnp

    wide = jnp.promote_types(a.dtype, jnp.float32)
    w = cast(_weight(jnp, spec, a, weight), spec.dtype)
    if spec.a_format is not None:
        a = jax.lax.stop_gradient(_rounded(jnp, spec, a)) + (a - jax.lax.stop_gradient(a))
    out = jnp.matmul(a, w, preferred_element_type=wide)
    out = out if bias is None else out + bias.astype(wide)
    if spec.activation in ("gelu", "gelu_tanh"):
        out = jax.nn.gelu(out, approximate=spec.activation == "gelu_tanh")
    elif spec.activation is not None:
        out = getattr(jax.nn, spec.activation)(out)
    out = out if residual is None else out + residual.astype(wide)
    return out.astype(spec.out_dtype)


def _weight(xp: Any, spec: QuantizedMatmulSpec, a: Any, weight: tuple[Any, Any, Any]) -> Any:
    turned, dtype = spec.a_format is not None, "float64" if spec.dtype == "float64" else "float32"
    return weights(xp, weight, FORMATS[spec.format], spec.group_size, a.shape[-1], turned, dtype)


def _rounded(xp: Any, spec: QuantizedMatmulSpec, a: Any) -> Any:
    """a as its own format has it, in its dtype."""
    assert spec.a_format is not None
    return cast(dequantized_rows(xp, *quantized_rows(xp, a, spec.a_format), spec.a_format), spec.dtype)
