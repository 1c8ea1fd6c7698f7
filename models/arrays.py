"""The few operations that NumPy, torch and JAX spell differently, so that the model is written once.

What the three share needs no helper: operators, `reshape`, `mean(axis=, keepdims=)`, and the functions of the
`namespace`. No framework is imported unless an array of it is at hand or it was asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np

Array = Any  # numpy.ndarray, torch.Tensor or jax.Array
Tree = Any  # nested dicts and lists with arrays as leaves
Framework = Literal["numpy", "torch", "jax"]
FRAMEWORKS: tuple[Framework, ...] = ("numpy", "torch", "jax")
_ROOTS: dict[str, Framework] = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}


def framework_of(array: Array) -> Framework:
    """ "numpy", "torch" or "jax"; tracers and subclasses count as their framework."""
    for kind in type(array).__mro__:
        framework = _ROOTS.get(kind.__module__.partition(".")[0])
        if framework is not None:
            return framework
    raise TypeError(f"array: got {type(array).__name__}; it must be a numpy.ndarray, torch.Tensor or jax.Array")


def namespace(array: Array) -> ModuleType:
    """numpy, torch or jax.numpy: `exp`, `cos`, `concatenate`, `where` and their like."""
    return import_module({"numpy": "numpy", "torch": "torch", "jax": "jax.numpy"}[framework_of(array)])


def from_numpy(array: Any, framework: str, dtype: str | None = None, device: Any = None) -> Array:
    """A copy of a NumPy array in that framework, cast to `dtype` and put on `device` (NumPy has no devices)."""
    if framework == "torch":
        import torch

        return torch.tensor(array, dtype=getattr(torch, dtype) if dtype else None, device=device)
    if framework == "jax":
        import jax

        return jax.device_put(jax.numpy.array(array, dtype=dtype), device)
    if framework == "numpy":
        return np.array(array, dtype=dtype)
    raise ValueError(f"framework: got {framework!r}; it must be one of {', '.join(FRAMEWORKS)}")


def to_numpy(array: Array) -> np.ndarray:
    """The array in NumPy, bfloat16 widened to float32 (NumPy has none); shares memory where it can."""
    if dtype_name(array) == "bfloat16":
        array = cast(array, "float32")
    return array.detach().cpu().numpy() if framework_of(array) == "torch" else np.asarray(array)


def like(array: Array, reference: Array) -> Array:
    """`array` (lists and NumPy included) as an array of the reference's framework, on its device."""
    framework = framework_of(reference)
    if framework == "torch":
        import torch

        return torch.as_tensor(array, device=reference.device)
    return namespace(reference).asarray(array)


def dtype_name(array: Array) -> str:
    """ "float32", "bfloat16", ..."""
    return str(array.dtype).removeprefix("torch.")


def cast(array: Array, dtype: str) -> Array:
    """The array in that dtype; itself if it has it already."""
    if dtype_name(array) == dtype:
        return array
    if framework_of(array) == "torch":
        return array.to(getattr(namespace(array), dtype))
    return array.astype(dtype)


def arange(stop: int, reference: Array) -> Array:
    """0, 1, ..., stop - 1 as int32 in the reference's framework, on its device."""
    return like(np.arange(stop, dtype=np.int32), reference)


def take(table: Array, indices: Array) -> Array:
    """Rows of `table` `[n, ...]` at integer `indices` of any shape."""
    if framework_of(table) == "torch":
        from torch.nn.functional import embedding

        return embedding(indices, table)
    return table[indices]


def softmax(array: Array) -> Array:
    """Along the last axis."""
    xp = namespace(array)
    powers = xp.exp(array - xp.amax(array, -1)[..., None])
    return powers / powers.sum(-1)[..., None]


def sigmoid(array: Array) -> Array:
    """`1 / (1 + exp(-x))`."""
    return 1 / (1 + namespace(array).exp(-array))


def top_k(array: Array, count: int) -> Array:
    """Where the highest of the last axis are, the highest first and of equals the first."""
    framework = framework_of(array)
    if framework == "torch":
        return array.detach().argsort(dim=-1, descending=True, stable=True)[..., :count]
    if framework == "jax":
        import jax

        return jax.lax.top_k(jax.lax.stop_gradient(array), count)[1]
    return np.argsort(-array, axis=-1, kind="stable")[..., :count]


def pick(array: Array, indices: Array) -> Array:
    """The elements at those places of the last axis."""
    if framework_of(array) == "torch":
        return array.gather(-1, indices)
    return namespace(array).take_along_axis(array, indices, axis=-1)


def write(cache: Array, new: Array, position: Any) -> Array:
    """`cache` `[batch, heads, size, dim]` with `new` `[batch, length, heads, dim]` at `position`.

    NumPy and torch write in place, and so does a program of JAX to which the cache was donated.
    """
    new = new.swapaxes(1, 2)
    if framework_of(cache) == "jax":
        from jax.lax import dynamic_update_slice_in_dim

        return dynamic_update_slice_in_dim(cache, new, position, axis=2)
    cache[:, :, position : position + new.shape[2]] = new
    return cache


def tree_map_with_path(function: Callable[[str, Any], Any], tree: Tree, path: str = "") -> Tree:
    """The tree with `function("layers.0.wq", leaf)` in the place of each leaf."""
    start = path and f"{path}."
    if isinstance(tree, dict):
        return {key: tree_map_with_path(function, value, f"{start}{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [tree_map_with_path(function, value, f"{start}{index}") for index, value in enumerate(tree)]
    return function(path, tree)


def tree_leaves(tree: Tree) -> dict[str, Any]:
    """{"layers.0.wq": leaf} for each leaf, in the order of the tree."""
    leaves: dict[str, Any] = {}
    tree_map_with_path(leaves.__setitem__, tree)
    return leaves
