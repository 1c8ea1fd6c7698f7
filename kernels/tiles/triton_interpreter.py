"""Run a launch plan on NumPy arrays, with Triton's interpreter, in the process that also compiles.

Triton reads `TRITON_INTERPRET` when `@triton.jit` decorates, so that a kernel is either compiled or interpreted for
the life of a process. Here kernels stay compilable: while a plan runs, and only then, the language is patched to NumPy
and a call of a jitted function inside a kernel runs its Python. No torch is needed.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
    "uint8": tl.uint8,
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
        memory[name] = np.full(array.shape, np.asarray(np.nan if "float" in array.dtype else -1).astype(array.dtype))
    with _one_at_a_time, _interpreted(), _subnormal_numbers(), np.errstate(all="ignore"):
        for launch in plan.launches:
            _run_launch(launch, memory)
    return tuple(memory[name] for name in plan.outputs)


@contextmanager
def _subnormal_numbers() -> Iterator[None]:
    """Threads of XLA's, on which JAX calls back, take subnormal numbers for zero; a GPU does not."""
    library = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(64)  # more than glibc's fenv_t has on any processor
    library.fegetenv(before)
    library.fesetenv(ctypes.c_void_p(-1))  # glibc's FE_DFL_ENV
    try:
        yield
    finally:
        library.fesetenv(before)


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


def _from_integers(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method for casts, in which integers reach bfloat16 by float32; Triton 3.9 takes them for its bits."""

    def cast(builder: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            return _cast(method(builder, source, tl.float32), tl.bfloat16)
        return method(builder, source, target)

    return cast


def _product(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
    """A product of tiles. NumPy holds narrow floats as their bits, and Triton 3.9 multiplies those of bfloat16."""
    x, y = (
        each.data.view(_NUMPY[each.dtype.scalar]).astype(np.float32) if each.dtype.is_floating() else each.data
        for each in (a, b)
    )
    if a.dtype.scalar == tl.float32 and precision.name in _PARTS:
        result = _product_of_parts(x, y, *_PARTS[precision.name])
    else:
        result = np.matmul(x, y, dtype=total.data.dtype)
    return interpreter.TensorHandle(result + total.data, total.dtype.scalar)


# Bits of each part's mantissa, and how many parts: the products whose parts' numbers sum to less than that are made.
_PARTS = {"TF32": (10, 1), "TF32x3": (10, 2), "BF16x3": (7, 2), "BF16x6": (7, 3)}


def _product_of_parts(x: np.ndarray, y: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The product of float32 matrices as matrix units of narrower floats make it, which take them as sums of parts."""
    xs, ys = _split(x, bits, count), _split(y, bits, count)
    lower = np.zeros((x.shape[0], y.shape[1]), np.float32)
    for i in range(count):
        for j in range(count - i):
            if i or j:
                lower += xs[i] @ ys[j]
    return xs[0] @ ys[0] + np.where(np.isnan(lower), 0, lower)  # the lower parts of an infinity do not count


def _split(x: np.ndarray, bits: int, count: int) -> list[np.ndarray]:
    """The parts, the greatest first, each rounded to the nearest number of so many bits."""
    parts = []
    for _ in range(count):
        dropped = 23 - bits
        raw = x.view(np.uint32).astype(np.uint64)
        rounded = (raw + (1 << (dropped - 1)) - 1 + (raw >> dropped & 1)) >> dropped << dropped
        part = np.where(np.isfinite(x), rounded.astype(np.uint32).view(np.float32), x)
        parts.append(part)
        x = np.ascontiguousarray(x - part)
    return parts


def _language_user() -> None:
    """A function whose globals hold tl and tl.core, which is where Triton looks for what to patch."""


@contextmanager
def _interpreted() -> Iterator[None]:
    anchor = FunctionType(_language_user.__code__, {"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(anchor)
    compiled_call = JITFunction.__call__
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    methods = {name: getattr(builder, name) for name in ("create_dot", "binary_op", "unary_op", "cast_impl")}
    options = interpreter.interpreter_builder.options
    was_interpreting = triton.knobs.runtime.interpret
    try:
        triton.knobs.runtime.interpret = True
        JITFunction.__call__ = lambda self, *args, **kwargs: _as_python(self)(*args, **kwargs)
        interpreter._convert_float = _converted
        builder.create_dot = _product
        builder.cast_impl = _from_integers(methods["cast_impl"])
        interpreter.interpreter_builder.options = replace(
            options, allowed_dot_input_precisions=(*options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
        )
        builder.binary_op, builder.unary_op = _widened(methods["binary_op"]), _widened(methods["unary_op"])
        yield
    finally:
        interpreter.interpreter_builder.options = options
        interpreter._convert_float = convert
        for name, method in methods.items():
            setattr(builder, name, method)
        JITFunction.__call__ = compiled_call
        triton.knobs.runtime.interpret = was_interpreting
        scope.restore()
