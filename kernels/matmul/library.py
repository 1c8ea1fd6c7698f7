"""Matmul by the framework's own ops, with the epilogue in float32 around it, differentiable as the framework does.

On float32 the sum stays in float32; on narrower types torch rounds the product once before the epilogue.
"""

from __future__ import annotations

from typing import Any

from .spec import MatmulSpec


def forward(spec: MatmulSpec, a: Any, b: Any, bias: Any, residual: Any) -> tuple[Any, None]:
    """out, and None in the place of the preactivation; any leading dimensions."""
    if type(a).__module__.startswith("torch") or not hasattr(a, "aval"):
        return _torch(spec, a, b, bias, residual), None
    return _jax(spec, a, b, bias, residual), None


def _torch(spec: MatmulSpec, a: Any, b: Any, bias: Any, residual: Any) -> Any:
    import torch
    from torch.nn import functional

    from ..tiles.torch_products import product

    out = product(a, b, bias)
    if spec.activation == "gelu_tanh":
        out = functional.gelu(out, approximate="tanh")
    elif spec.activation is not None:
        out = getattr(functional, spec.activation)(out)
    if residual is not None:
        out = out + residual
    return out if spec.out_dtype == spec.dtype else out.to(getattr(torch, spec.out_dtype))


def _jax(spec: MatmulSpec, a: Any, b: Any, bias: Any, residual: Any) -> Any:
    import jax
    import jax.numpy as jnp

    wide = jnp.promote_types(a.dtype, jnp.float32)
    out = jnp.matmul(a, b, preferred_element_type=wide)
    out = out if bias is None else out + bias.astype(wide)
    if spec.activation in ("gelu", "gelu_tanh"):
        out = jax.nn.gelu(out, approximate=spec.activation == "gelu_tanh")
    elif spec.activation is not None:
        out = getattr(jax.nn, spec.activation)(out)
    out = out if residual is None else out + residual.astype(wide)
    return out.astype(spec.out_dtype)
