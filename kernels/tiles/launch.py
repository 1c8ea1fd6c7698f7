"""What a GPU kernel file returns: which kernels to launch over which arrays, as data.

A plan is made from shapes alone, so the same plan is run by torch on a GPU, by jax-triton, by the interpreter on a
CPU, and compiled for a chip that is not there. A kernel's parameters come in the order: input arrays, output arrays,
then by name numbers (lengths, strides, scales) and constexprs. Numbers come last since jax-triton makes them constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any


@dataclass(frozen=True)
class Array:
    """What a plan knows of an array: shape, dtype name ("float16"), strides in elements, if it begins at 16 bytes."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    aligned: bool = True

    @property
    def reach(self) -> int:
        """The largest distance in elements between two of its elements; past 2**31 offsets need 64 bits."""
        return sum(abs(stride) * (size - 1) for size, stride in zip(self.shape, self.strides, strict=True) if size)


def contiguous(shape: Sequence[int], dtype: str) -> Array:
    """A new row-major array, as a kernel's outputs are."""
    strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Array(tuple(shape), dtype, strides)


@dataclass(frozen=True)
class Launch:
    """One kernel over one grid.

    Attributes:
        kernel: the `triton.jit` function.
        grid: one to three sizes; a launch of size 0 is skipped.
        inputs: names of the arrays it reads, in the kernel's order; "" for an absent one, which is passed as None.
        outputs: names of the arrays it writes, which follow the inputs. One that is an input too is changed in place,
            and what the kernel does not write stays.
        numbers: lengths, strides and scales, by parameter name; they change without a new compilation. None is a
            constant: what belongs to an array that is not there.
        constants: the constexpr parameters, by name.
        dot_dtype: the dtype its dots multiply, "" where it has none (a compile check expects matrix instructions).
        without_memory: constants to take instead where the runner has no memory to give to a kernel while it runs, as
            tensor descriptors need.
        shares: of arrays of which it touches a part, which part of them that is; by name.
        options: more of the compiler's for this chip, which only change its speed: jax-triton passes none.
    """

    kernel: Any
    grid: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, int | float | None]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    dot_dtype: str = ""
    without_memory: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = (*self.inputs, *self.outputs)
        if not all(isinstance(name, str) for name in named):
            raise TypeError(f"Launch: inputs and outputs are names of arrays, got {named}; put numbers in numbers=")


@dataclass(frozen=True)
class Plan:
    """Launches in order; every output and scratch array is written before it is read, and whole in the end.

    Attributes:
        inputs: the arrays that the caller passes, by name.
        outputs: the arrays that the caller gets, in order.
        scratch: arrays that live between two launches.
    """

    launches: tuple[Launch, ...]
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    scratch: Mapping[str, Array] = field(default_factory=dict)
