"""Run a launch plan on NumPy arrays, with Triton's interpreter, in the process that also compiles.

Triton reads `TRITON_INTERPRET` when `@triton.jit` decorates, so that a kernel is either compiled or interpreted for
the life of a process. Here kernels stay compilable: while a plan runs, and only then, the language is patched to NumPy
and a call of a jitted function inside a kernel runs its Python. No torch is needed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from .launch import Launch, Plan

_POINTEE = {
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "float32": tl.float32,
    "float64": tl.float64,
    "float8_e4m3fn": tl.float8e4nv,
    "int8": tl.int8,
    "int32": tl.int32,
    "int64": tl.int64,
    "bool": tl.int1,
}
DTYPES = frozenset(_POINTEE)
_NUMPY = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float16: np.dtype(np.float16),
    tl.float32: np.dtype(np.float32),
    tl.float64: np.dtype(np.float64),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
}

_one_at_a_time = threading.RLock()  # the patch is global, and JAX calls back on threads of its own


def run(plan: Plan, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The plan's outputs. Arrays that a kernel fails to write whole show as NaN (floats) or garbage (integers)."""
    memory = dict(arrays)
    for name, array in {**plan.outputs, **plan.scratch}.items():
        memory[name] = np.full(array.shape, np.nan if "float" in array.dtype else -1, array.dtype)
    with _one_at_a_time, _interpreted(), np.errstate(all="ignore"):
        for launch in plan.launches:
            _run_launch(launch, memory)
    return tuple(memory[name] for name in plan.outputs)


def _run_launch(launch: Launch, memory: Mapping[str, np.ndarray]) -> None:
    function = _as_python(launch.kernel)
    pointers = [_pointer(memory[name]) if name else None for name in (*launch.inputs, *launch.outputs)]
    numbers = {name: interpreter._implicit_cvt(value) for name, value in launch.numbers.items()}
    grid = (*launch.grid, *(1,) * (3 - len(launch.grid)))
    interpreter.interpreter_builder.set_grid_dim(*grid)
    for index in itertools.product(*map(range, grid)):
        interpreter.interpreter_builder.set_grid_idx(*index)
        function(*pointers, **numbers, **launch.constants)


def _pointer(array: np.ndarray) -> tl.tensor:
    kind = tl.pointer_type(_POINTEE[array.dtype.name])
    return tl.tensor(interpreter.TensorHandle(np.array([array.ctypes.data], np.uint64), kind), kind)


def _as_python(kernel: JITFunction) -> Callable[..., Any]:
    return interpreter.InterpretedFunction(kernel.fn).rewrite()


def _converted(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """The bits of floats in another format, rounded to the nearest even and held within its finite range, as chips do.

    Triton 3.9's own loses the carry of a mantissa that rounds up, and else rounds towards zero.
    """
    values = np.ascontiguousarray(data).view(_NUMPY[source])
    if target == tl.float8e4nv:
        greatest = float(ml_dtypes.finfo(_NUMPY[target]).max)
        values = np.clip(values.astype(np.float32), -greatest, greatest)
    return values.astype(_NUMPY[target]).view(f"uint{target.primitive_bitwidth}")


def _widened(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method for elementwise ops, which takes tiles and NumPy's function, computing bfloat16 in float32."""

    def compute(builder: Any, *operands: Any) -> Any:
        *tiles, function = operands
        if all(tile.dtype.scalar != tl.bfloat16 for tile in tiles):
            return method(builder, *operands)
        result = method(builder, *(_cast(tile, tl.float32) for tile in tiles), function)
        if result.data.dtype == np.bool_:  # a comparison, which the builder labels with its operands' type
            return interpreter.TensorHandle(result.data, tl.int1)
        return _cast(result, tl.bfloat16)

    return compute


def _cast(tile: Any, target: Any) -> Any:
    bits = _converted(tile.data, tile.dtype.scalar, target, None)
    return interpreter.TensorHandle(bits.view(np.float32) if target == tl.float32 else bits, target)


def _product(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
    """A product of tiles. NumPy holds narrow floats as their bits, and Triton 3.9 multiplies those of bfloat16."""
    x, y = (
        each.data.view(_NUMPY[each.dtype.scalar]).astype(np.float32) if each.dtype.is_floating() else each.data
        for each in (a, b)
    )
    result = np.matmul(x, y, dtype=total.data.dtype) + total.data
    return interpreter.TensorHandle(result, total.dtype.scalar)


def _language_user() -> None:
    """A function whose globals hold tl and tl.core, which is where Triton looks for what to patch."""


@contextmanager
def _interpreted() -> Iterator[None]:
    anchor = FunctionType(_language_user.__code__, {"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(anchor)
    compiled_call = JITFunction.__call__
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    methods = {name: getattr(builder, name) for name in ("create_dot", "binary_op", "unary_op")}
    was_interpreting = triton.knobs.runtime.interpret
    try:
        triton.knobs.runtime.interpret = True
        JITFunction.__call__ = lambda self, *args, **kwargs: _as_python(self)(*args, **kwargs)
        interpreter._convert_float = _converted
        builder.create_dot = _product
        builder.binary_op, builder.unary_op = _widened(methods["binary_op"]), _widened(methods["unary_op"])
        yield
    finally:
        interpreter._convert_float = convert
        for name, method in methods.items():
            setattr(builder, name, method)
        JITFunction.__call__ = compiled_call
        triton.knobs.runtime.interpret = was_interpreting
        scope.restore()
