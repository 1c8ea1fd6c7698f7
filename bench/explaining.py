"""`crosstile explain`: the library's own explanation, of a call with a named shape."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import crosstile

from .shapes import SHAPES, AttentionShape, Shape, get_shape


def explain(op: str, shape_name: str | None, framework: str, target: str | None, dtype: str) -> str:
    """What `crosstile.explain` says of the op at that shape. Raises ValueError for a name there is not."""
    candidates = [shape for shape in SHAPES if shape.op == op]
    if not candidates:
        raise ValueError(f"op: got {op!r}; it must be one of {', '.join(sorted({shape.op for shape in SHAPES}))}")
    shape = get_shape(shape_name) if shape_name else candidates[0]
    if shape.op != op:
        raise ValueError(
            f"shape: {shape.name} is of {shape.op}; {op} has {', '.join(item.name for item in candidates)}"
        )
    with crosstile.target(target) if target else nullcontext():
        return str(_explain(shape, framework, dtype))


def _explain(shape: Shape, framework: str, dtype: str) -> Any:
    if isinstance(shape, AttentionShape):
        keys = (shape.batch, shape.kv_len, shape.kv_heads, shape.head_dim)
        q = _empty(framework, dtype, (shape.batch, shape.q_len, shape.q_heads, shape.head_dim))
        k, v = _empty(framework, dtype, keys), _empty(framework, dtype, keys)
        return crosstile.explain("attention", q, k, v, causal=shape.causal)
    a, b = _empty(framework, dtype, (shape.m, shape.k)), _empty(framework, dtype, (shape.k, shape.n))
    bias = _empty(framework, dtype, (shape.n,)) if shape.bias else None
    residual = _empty(framework, dtype, (shape.m, shape.n)) if shape.residual else None
    return crosstile.explain("matmul", a, b, bias=bias, activation=shape.activation, residual=residual)


def _empty(framework: str, dtype: str, shape: tuple[int, ...]) -> Any:
    """An array that costs next to nothing: one element, seen with strides of 0 where the framework can."""
    if framework == "torch":
        import torch

        return torch.empty((), dtype=getattr(torch, dtype)).expand(shape)
    if framework == "jax":
        import jax.numpy as jnp

        return jnp.zeros(shape, dtype)
    if framework == "numpy":
        import numpy as np

        return np.broadcast_to(np.empty((), dtype), shape)
    raise ValueError(f"framework: got {framework!r}; it must be numpy, torch or jax")
