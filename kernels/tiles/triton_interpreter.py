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

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from .launch import Launch, Plan

_POINTEE = {
    "float16": tl.float16,
    "float32": tl.float32,
    "float64": tl.float64,
    "int8": tl.int8,
    "int32": tl.int32,
    "int64": tl.int64,
    "bool": tl.int1,
}
DTYPES = frozenset(_POINTEE)  # bfloat16 is absent: Triton 3.9 interprets its dots and casts wrongly

_one_at_a_time = threading.RLock()  # the patch is global, and JAX calls back on threads of its own


def run(plan: Plan, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The plan's outputs. Arrays that a kernel fails to write whole show as NaN (floats) or garbage (integers)."""
    memory = dict(arrays)
    for name, array in {**plan.outputs, **plan.scratch}.items():
        memory[name] = np.full(array.shape, np.nan if array.dtype.startswith("float") else -1, array.dtype)
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


def _language_user() -> None:
    """A function whose globals hold tl and tl.core, which is where Triton looks for what to patch."""


@contextmanager
def _interpreted() -> Iterator[None]:
    anchor = FunctionType(_language_user.__code__, {"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(anchor)
    compiled_call = JITFunction.__call__
    was_interpreting = triton.knobs.runtime.interpret
    try:
        triton.knobs.runtime.interpret = True
        JITFunction.__call__ = lambda self, *args, **kwargs: _as_python(self)(*args, **kwargs)
        yield
    finally:
        JITFunction.__call__ = compiled_call
        triton.knobs.runtime.interpret = was_interpreting
        scope.restore()
