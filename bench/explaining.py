"""`crosstile explain`: the library's own explanation, of a call with a named shape."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

import crosstile

from .shape import Shape, numpy_dtype
from .shapes import OPS, SHAPES, get_shape


def explain(op: str, shape_name: str | None, framework: str, target: str | None, dtype: str) -> str:
    """What `crosstile.explain` says of the op at that shape. Raises ValueError for a name there is not."""
    candidates = [shape for shape in SHAPES if shape.op == op]
    if not candidates:
        raise ValueError(f"op: got {op!r}; it must be one of {', '.join(OPS)}")
    shape = get_shape(shape_name) if shape_name else candidates[0]
    if shape.op != op:
        raise ValueError(
            f"shape: {shape.name} is of {shape.op}; {op} has {', '.join(item.name for item in candidates)}"
        )
    with crosstile.target(target) if target else nullcontext():
        return _explain(shape, framework, dtype)


def _explain(shape: Shape, framework: str, dtype: str) -> str:
    """Of arrays that cost next to nothing: never filled, one element with strides of 0, or traced."""
    arrays = shape.arrays(dtype)
    if framework == "numpy":
        return _of_call(shape, {name: np.empty(size, numpy_dtype(kind)) for name, (size, kind) in arrays.items()})
    if framework == "torch":
        import torch

        empty = {
            name: torch.empty((), dtype=getattr(torch, kind)).expand(size) for name, (size, kind) in arrays.items()
        }
        return _of_call(shape, empty)
    if framework == "jax":
        import jax

        found: list[str] = []
        structs = {name: jax.ShapeDtypeStruct(size, kind) for name, (size, kind) in arrays.items()}
        jax.eval_shape(lambda traced: found.append(_of_call(shape, traced)), structs)
        return found[0]
    raise ValueError(f"framework: got {framework!r}; it must be numpy, torch or jax")


def _of_call(shape: Shape, arrays: Mapping[str, Any]) -> str:
    return str(crosstile.explain(shape.function, **shape.call(arrays)))
