"""What a named shape is: one call of a public function, at the sizes of a real model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

Size = tuple[int, ...]


@dataclass(frozen=True)
class Shape(ABC):
    """One call. A subclass is all that the compile check, the roofline and `explain` need to know of an op.

    Attributes:
        op: the folder of `crosstile.kernels`.
        multiplies: whether one of the op's kernels must use the matrix units.
        trains: whether it has a backward.
        everyday: whether it is compiled where no shape is named, or only with `--all`.
        counts: the fields that count tokens, which tuning sets to several lengths.
        known_to_host: whether the arrays that `call` makes are the host's, who tells the kernels what a mask hides.
    """

    op: ClassVar[str]
    multiplies: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = ()

    name: str
    trains: bool = field(default=True, kw_only=True)
    everyday: bool = field(default=True, kw_only=True)
    known_to_host: bool = field(default=False, kw_only=True)

    @property
    def function(self) -> str:
        """The public function that is called."""
        return self.op

    @property
    @abstractmethod
    def summary(self) -> str:
        """The sizes and options in a form a table can hold."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Multiplications and additions of the forward's products."""

    @abstractmethod
    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call, by a name; those of a float dtype are differentiated."""

    @property
    def gradients(self) -> tuple[str, ...]:
        """The op's outputs whose gradients its backward is given, where they are more than the first."""
        return ()

    def leaves(self, dtype: str) -> list[str]:
        """The arrays that have a gradient."""
        return [name for name, (_, kind) in self.arrays(dtype).items() if self.trains and kind == dtype]

    def integers(self) -> dict[str, np.ndarray]:
        """What the arrays of integers hold where the call is run and not only compiled."""
        return {}

    def deviation(self, name: str) -> float:
        """Of the normal numbers that the array of that name holds there."""
        return 1.0

    @property
    def turned(self) -> tuple[str, ...]:
        """Arrays whose last two axes have changed places in memory."""
        return ()

    def stored(self, name: str, size: Size) -> Size:
        """The size in which the array of that name and size lies in memory."""
        return (*size[:-2], size[-1], size[-2]) if name in self.turned else size

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name, made of those arrays in any framework."""
        return dict(arrays)

    def run(self, arrays: Mapping[str, Any], *, implementation: str, config: Any = None) -> Any:
        """What the public function returns for those arrays."""
        import crosstile

        function = getattr(crosstile, self.function)
        return function(**self.call(arrays), implementation=implementation, config=config)

    def prepare(self, dtype: str) -> tuple[Any, tuple[Any, ...]]:
        """The spec and the kernels' inputs as the public function makes them, of NumPy arrays of zeros."""
        from crosstile import calls

        arrays = {
            name: np.zeros(self.stored(name, size), numpy_dtype(kind))
            for name, (size, kind) in self.arrays(dtype).items()
        }
        arrays |= {name: arrays[name].swapaxes(-1, -2) for name in self.turned}
        spec, inputs = calls.PREPARE[self.function](**self.call(arrays))
        spec, inputs, _ = calls.CANONICAL[self.op](np, spec, inputs)
        return spec, inputs

    def resized(self, sizes: Mapping[str, int]) -> Shape:
        """The same call with other sizes, named `name@field=number,field=number`.

        Raises ValueError for a field that is no size.
        """
        known = [item.name for item in fields(self) if type(getattr(self, item.name)) is int]
        for field_name in sizes:
            if field_name not in known:
                raise ValueError(f"shape: {self.name} has no size {field_name!r}; it has {', '.join(known)}")
        said = ",".join(f"{field_name}={size}" for field_name, size in sizes.items())
        changed: dict[str, Any] = {**sizes, "name": f"{self.name}@{said}"}
        return replace(self, **changed)

    def bytes(self, dtype: str) -> float:
        """What a fused forward must move: each array once, and what it returns once."""
        from crosstile.dispatch import OPS

        spec, inputs = self.prepare(dtype)
        moved = [(size, kind) for size, kind in self.arrays(dtype).values()]
        moved += [result for result in OPS[self.op].module("spec").output_shapes(spec, *inputs) if result is not None]
        return float(sum(prod(size) * numpy_dtype(kind).itemsize for size, kind in moved))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name, bfloat16 and float8 among them."""
    return np.dtype(getattr(ml_dtypes, name, name))
