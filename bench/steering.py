"""Which words steer a kernel: the integers among the operands of its `pallas_call`, such as scalar prefetch.

They are computed on this CPU, by the part of the program on which they depend. Arrays that the caller leaves open are
zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Words = dict[int, list[int]]
MOST_WORDS = 1 << 22  # of a value that is computed here; SMEM holds fewer


def steering(program: Any, arguments: Sequence[Any]) -> list[tuple[str, Words]]:
    """The name of each Pallas kernel of a closed jaxpr, in order, and the words of its steering operands by number.

    `arguments` are the program's arrays or, for those that steer nothing, their ShapeDtypeStruct.
    """
    found: list[tuple[str, Words]] = []
    _known(program, arguments, found)
    return found


def known_results(program: Any, arguments: Sequence[Any]) -> list[Any]:
    """The results of a closed jaxpr that follow from the arguments with a value; None for the others."""
    known = _known(program, arguments, [])
    return [_value(var, known) for var in program.jaxpr.outvars]


def _known(program: Any, arguments: Sequence[Any], found: list[tuple[str, Words]]) -> dict[Any, Any]:
    known = {var: _constant(value) for var, value in zip(program.jaxpr.constvars, program.consts, strict=True)}
    known |= dict(zip(program.jaxpr.invars, arguments, strict=True))
    _walk(program.jaxpr, known, found)
    return known


def _walk(jaxpr: Any, known: dict[Any, Any], found: list[tuple[str, Words]]) -> None:
    """Go through the equations: into calls, past kernels, and with NumPy's values where every input has one."""
    for equation in jaxpr.eqns:
        values = [_value(var, known) for var in equation.invars]
        if equation.primitive.name == "pallas_call":
            found.append((equation.params["name"] or "", _words(values)))
            results: Sequence[Any] = [None] * len(equation.outvars)
        elif (inner := _called(equation)) is not None:
            spread = equation.primitive.name == "shard_map"
            if spread:
                values = [
                    _first_part(value, var.aval.shape) for value, var in zip(values, inner.jaxpr.invars, strict=True)
                ]
            within = {var: _constant(value) for var, value in zip(inner.jaxpr.constvars, inner.consts, strict=True)}
            within |= dict(zip(inner.jaxpr.invars, values[-len(inner.jaxpr.invars) :], strict=True))
            _walk(inner.jaxpr, within, found)
            results = [None if spread else _value(var, within) for var in inner.jaxpr.outvars]
        else:
            results = _evaluate(equation, values)
        known |= dict(zip(equation.outvars, results, strict=True))


def _first_part(value: Any, shape: tuple[int, ...]) -> Any:
    """What the first of many devices has of a value."""
    return None if value is None else value[tuple(slice(size) for size in shape)]


def _called(equation: Any) -> Any:
    """The jaxpr that an equation calls with its own inputs, or None: jit, custom derivatives and batching, remat, and
    what each of many devices runs."""
    for name in ("jaxpr", "call_jaxpr", "call"):
        inner = equation.params.get(name)
        if inner is not None and equation.primitive.name not in ("while", "scan", "cond", "reduce"):
            if not hasattr(inner, "consts"):
                from jax.extend.core import ClosedJaxpr

                inner = ClosedJaxpr(inner, ())
            if len(inner.jaxpr.invars) <= len(equation.invars) and len(inner.jaxpr.outvars) == len(equation.outvars):
                return inner
    return None


def _evaluate(equation: Any, values: Sequence[Any]) -> Sequence[Any]:
    """The results, or None for each where an input has no value, they are more than SMEM could hold, or other devices
    take part."""
    unknown = [None] * len(equation.outvars)
    if any(value is None for value in values) or any(var.aval.size > MOST_WORDS for var in equation.outvars):
        return unknown
    if equation.primitive.name == "axis_index":
        return [np.int32(0)]
    try:
        results = equation.primitive.bind(*values, **equation.params)
    except NameError:  # of an axis of the mesh
        return unknown
    return results if equation.primitive.multiple_results else [results]


def _words(values: Sequence[Any]) -> Words:
    """The 32-bit words of a kernel's operands of integers: the bounds of its grid, and what it reads from SMEM."""
    found = {}
    for at, value in enumerate(values):
        kind = getattr(value, "dtype", None)  # that of a random key is none of NumPy's
        if isinstance(kind, np.dtype) and kind.kind in "iub":
            found[at] = _padded(np.asarray(value)).view(np.int32).tolist()
    return found


def _padded(array: np.ndarray) -> np.ndarray:
    """The words as SMEM holds them: one row after the other, each row a multiple of 128 where there are many."""
    if array.dtype.itemsize != 4:
        array = array.astype(np.int32)
    if array.ndim < 2:
        return np.ascontiguousarray(array).reshape(-1)
    width = -(-array.shape[-1] // 128) * 128
    padded = np.zeros((*array.shape[:-1], width), array.dtype)
    padded[..., : array.shape[-1]] = array
    return padded.reshape(-1)


def _value(var: Any, known: dict[Any, Any]) -> Any:
    if hasattr(var, "val"):  # a literal
        return var.val
    return _constant(known.get(var))


def _constant(value: Any) -> Any:
    return None if type(value).__name__ == "ShapeDtypeStruct" else value
