"""NumPy arrays: the definition itself, or a kernel in its interpreter. Nothing is differentiable here."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from crosstile import calls, plans
from crosstile.dispatch import Op
from crosstile.kernels.tiles.expressions import functions_of
from crosstile.kernels.tiles.launch import Array
from crosstile.kernels.tiles.targets import INTERPRET, Target

KNOWS_NEED = True  # whether `needs_grad` is sure, and not only possible


def on_cpu(array: Any) -> bool:
    """NumPy arrays live in the host's memory."""
    return True


def target_of(array: Any) -> Target:
    """The interpreters."""
    return INTERPRET


def needs_grad(arrays: tuple[Any, ...]) -> bool:
    """NumPy records no gradients."""
    return False


def obstacles(implementation: str, target: Target, arrays: tuple[Any, ...]) -> tuple[str, ...]:
    """Why that implementation cannot take NumPy arrays there."""
    if implementation == "library":
        return ("library is the op of torch or JAX itself, and NumPy has none: use numpy",)
    if implementation != "numpy" and not target.interpreted:
        return (f"NumPy arrays are on this CPU and cannot run on {target.name}: leave crosstile.target, or use numpy",)
    return ()


def canonical(op: Op, spec: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays in canonical form."""
    return tuple(calls.CANONICAL[op.name](np, spec, arrays)[1])


def call(
    op: Op, spec: Any, arrays: tuple[Any, ...], implementation: str, config: Any, target: Target
) -> tuple[Any, ...]:
    """The op's outputs."""
    arrays = plans.map_arrays(lambda array: array.astype(array.dtype.newbyteorder("="), copy=False), arrays)
    spec, arrays, shape = calls.CANONICAL[op.name](np, spec, arrays)
    outputs = execute(op, "forward", spec, arrays, implementation, config, target)
    return (outputs[0].reshape(shape), *outputs[1:]) if shape else outputs


def execute(
    op: Op, direction: str, spec: Any, operands: tuple[Any, ...], implementation: str, config: Any, target: Target
) -> tuple[Any, ...]:
    """One direction of an implementation on canonical NumPy arrays.

    operands are the arguments of `forward` or `backward` after the spec: the inputs, or the three tuples.
    """
    module = op.module(implementation)
    if implementation == "numpy":
        return getattr(module, direction)(spec, *operands)
    config = config or op.module("tiles").choose_config(spec, target)
    operands = plans.completed(op, implementation, spec, config, target, operands)
    if implementation == "triton":
        from crosstile.kernels.tiles import triton_interpreter

        plan = plans.make(op, direction, spec, config, plans.map_arrays(_describe, operands))
        return plans.collect(op, direction, plan, triton_interpreter.run(plan, plans.by_name(op, operands)))
    from crosstile import jax

    return jax.execute_on_host(op, direction, spec, operands, config, target)


def wants_gradient(array: Any) -> bool:
    """NumPy records no gradients."""
    return False


def host(like: Any) -> tuple[Any, Any]:
    """The module for arrays that the host knows, and an array like those that it makes."""
    return sys.modules[__name__], like


def in_host(array: Any) -> Any:
    """An array of NumPy's as the host keeps it: as it is."""
    return array


def as_int32(array: Any) -> Any:
    """Ids, lengths and offsets as kernels read them."""
    return np.ascontiguousarray(array, np.int32)


def largest(array: Any) -> Any:
    """The largest of each row of numbers that are not negative; 0 of an empty one."""
    return array.max(axis=-1, initial=0.0)


def words(seed: Any, like: Any) -> Any:
    """Two int32 words, the low one first, of themselves or of one integer."""
    seed = np.asarray(seed)
    return (seed if seed.ndim else np.stack([seed, seed.astype(np.int64) >> 32])).astype(np.int32)


def spread(array: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """In that dtype, and repeated to that shape."""
    return np.broadcast_to(np.asarray(array).astype(dtype, copy=False), shape)


def as_plane(array: Any, like: Any) -> Any:
    """An array beside the scores, as kernels read it: bool, int32, or a float no wider than q."""
    kind = array.dtype.kind
    if kind in "iu":
        return as_int32(array)
    return array.astype(np.float32) if array.dtype == np.float64 and like.dtype != np.float64 else array


def index_grid(size: Any, axis: int, like: Any) -> Any:
    """0, 1, ... along one of four axes."""
    return np.arange(size, dtype=np.int32).reshape([-1 if at == axis else 1 for at in range(4)])


def functions() -> dict[str, Any]:
    """What the ops of an expression mean for NumPy arrays."""
    return functions_of(np)


def look_up(held: Any, indices: list[Any], like: Any) -> Any:
    """The elements at those indices, which broadcast to four dimensions; an index past an end takes the end."""
    clipped = tuple(np.clip(index, 0, size - 1) for index, size in zip(indices, held.shape, strict=True))
    found = np.asarray(held)[clipped]
    return as_plane(found if found.ndim == 4 else found.reshape(1, 1, 1, 1), like)


def _describe(array: np.ndarray) -> Array:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Array(array.shape, array.dtype.name, strides, array.ctypes.data % 16 == 0)
