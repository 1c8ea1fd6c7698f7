"""Named shapes of the rotary embedding: queries and keys of real models, turned in one launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .shape import Shape, Size


@dataclass(frozen=True)
class RotaryShape(Shape):
    """One rotary call.

    Attributes:
        rotary_dim: the dimensions of a head that turn; None is all.
    """

    op: ClassVar[str] = "rotary"
    multiplies: ClassVar[bool] = False

    q_heads: int
    kv_heads: int
    head_dim: int
    length: int = 4096
    base: float = 500000.0
    interleaved: bool = False
    rotary_dim: int | None = None

    @property
    def summary(self) -> str:
        """The sizes and options in a form a table can hold."""
        parts = [f"{self.length} tokens", f"{self.q_heads}/{self.kv_heads} heads", f"d {self.head_dim}"]
        parts += ["interleaved"] if self.interleaved else []
        return ", ".join(parts + ([] if self.rotary_dim is None else [f"{self.rotary_dim} rotated"]))

    @property
    def flops(self) -> float:
        """A rotation has no products of matrices."""
        return 0.0

    @property
    def gradients(self) -> tuple[str, ...]:
        """Of the queries and of the keys."""
        return ("rotated_q", "rotated_k")

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        q, k = ((1, self.length, heads, self.head_dim) for heads in (self.q_heads, self.kv_heads))
        return {"q": (q, dtype), "k": (k, dtype), "positions": ((1, self.length), "int32")}

    def integers(self) -> dict[str, np.ndarray]:
        """Positions from 0 on."""
        return {"positions": np.arange(self.length)[None]}

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        options = {"base": self.base, "interleaved": self.interleaved, "rotary_dim": self.rotary_dim}
        return {"x": (arrays["q"], arrays["k"]), "positions": arrays["positions"], **options}


ROTARY = (
    RotaryShape("llama-3-8b-rotary", q_heads=32, kv_heads=8, head_dim=128),
    RotaryShape("gpt-neox-rotary", q_heads=32, kv_heads=32, head_dim=80, base=10000.0, rotary_dim=20, everyday=False),
    RotaryShape("cohere-rotary", q_heads=64, kv_heads=8, head_dim=128, interleaved=True, everyday=False),
)
