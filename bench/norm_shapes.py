"""Named shapes of the norms, at the widths of real models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .shape import Shape, Size


@dataclass(frozen=True)
class NormShape(Shape):
    """One rms_norm or layer_norm call over rows of `hidden` numbers.

    Attributes:
        residual: x + residual is normalised, and returned too.
        zero_centered: rows are scaled by 1 + weight.
        bias: of layer_norm, which it makes of the call.
    """

    op: ClassVar[str] = "norm"
    multiplies: ClassVar[bool] = False

    rows: int
    hidden: int
    residual: bool = False
    zero_centered: bool = False
    bias: bool = False

    @property
    def function(self) -> str:
        """The public function that is called."""
        return "layer_norm" if self.bias else "rms_norm"

    @property
    def summary(self) -> str:
        """The sizes and options in a form a table can hold."""
        flags = [name for name in ("residual", "zero_centered", "bias") if getattr(self, name)]
        return ", ".join([f"{self.rows}×{self.hidden}", *flags])

    @property
    def flops(self) -> float:
        """A norm has no products of matrices."""
        return 0.0

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        rows: Size = (self.rows, self.hidden)
        columns: Size = (self.hidden,)
        beside: dict[str, Size] = {"bias": columns} if self.bias else {}
        beside |= {"residual": rows} if self.residual else {}
        return {name: (size, dtype) for name, size in {"x": rows, "weight": columns, **beside}.items()}

    @property
    def gradients(self) -> tuple[str, ...]:
        """Of both results, where there are two."""
        return ("y", "summed") if self.residual else ()

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        return {**arrays, **({} if self.bias else {"zero_centered": self.zero_centered})}


NORM = (
    NormShape("llama-3-8b-norm", 4096, 4096, residual=True),
    NormShape("gemma-2-2b-norm", 4096, 2304, zero_centered=True, everyday=False),
    NormShape("gpt-2-norm", 4096, 768, residual=True, bias=True, everyday=False),
    NormShape("llama-3-405b-norm", 4096, 16384, residual=True, everyday=False),
)
