"""From a call's arrays to a launch plan and back, the same for every framework.

Operands are the arguments of `forward` or `backward` after the spec: the input arrays, or the three tuples inputs,
outputs and gradients of the outputs. An absent array is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from crosstile.dispatch import Op
from crosstile.kernels.tiles.launch import Plan
from crosstile.kernels.tiles.targets import Target


def map_arrays(function: Callable[[Any], Any], operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands with every array replaced by the function of it."""
    return tuple(
        map_arrays(function, item) if isinstance(item, tuple) else None if item is None else function(item)
        for item in operands
    )


def completed(
    op: Op, implementation: str, spec: Any, config: Any, target: Target, operands: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The operands, with the inputs that the op's kernels compute on the host from those that are NumPy arrays."""
    complete = getattr(op.module(implementation), "completed", None)
    if complete is None:
        return operands
    if any(isinstance(item, tuple) for item in operands):
        return (complete(spec, config, target, operands[0]), *operands[1:])
    found: tuple[Any, ...] = complete(spec, config, target, operands)
    return found


@lru_cache(maxsize=4096)
def make(op: Op, direction: str, spec: Any, config: Any, descriptions: tuple[Any, ...]) -> Plan:
    """The plan of one direction of the op's Triton kernels."""
    plan: Plan = getattr(op.module("triton"), direction)(spec, config, *descriptions)
    return plan


def by_name(op: Op, operands: tuple[Any, ...]) -> dict[str, Any]:
    """The arrays under the names that a plan has for them."""
    if any(isinstance(item, tuple) for item in operands):
        inputs, outputs, gradients = operands
        groups = [(op.inputs, inputs), (op.outputs, outputs), (gradient_names(op.outputs), gradients)]
    else:
        groups = [(op.inputs, operands)]
    return {
        name: array for names, arrays in groups for name, array in zip(names, arrays, strict=True) if array is not None
    }


def from_names(op: Op, direction: str, named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The inverse of `by_name`; None for a name that is not there."""
    names = (op.inputs,) if direction == "forward" else (op.inputs, op.outputs, gradient_names(op.outputs))
    groups = tuple(tuple(named.get(name) for name in group) for group in names)
    return groups[0] if direction == "forward" else groups


def present_results(op: Op, direction: str, spec: Any, operands: tuple[Any, ...]) -> tuple[bool, ...]:
    """Which results there are."""
    if direction == "backward":
        return present_gradients(op, spec, operands[0])
    return tuple(result is not None for result in op.module("spec").output_shapes(spec, *operands))


def present_gradients(op: Op, spec: Any, inputs: tuple[Any, ...]) -> tuple[bool, ...]:
    """For each input whether a backward has its gradient: not if it is absent, or has none."""
    names = op.module("spec").differentiable(spec)
    return tuple(array is not None and name in names for name, array in zip(op.inputs, inputs, strict=True))


def collect(op: Op, direction: str, plan: Plan, results: Sequence[Any]) -> tuple[Any, ...]:
    """A plan's results in the order of the op's outputs, or of its inputs' gradients; None for those it lacks."""
    named: Mapping[str, Any] = dict(zip(plan.outputs, results, strict=True))
    names = op.outputs if direction == "forward" else gradient_names(op.inputs)
    return tuple(named.get(name) for name in names)


def gradient_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """dq for q, dout for out."""
    return tuple("d" + name for name in names)
