"""Named shapes of linear cross-entropy: the heads of real models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .shape import Shape, Size


@dataclass(frozen=True)
class CrossEntropyShape(Shape):
    """One linear_cross_entropy call: tokens of `features` numbers against the rows of a vocabulary."""

    op: ClassVar[str] = "linear_cross_entropy"
    counts: ClassVar[tuple[str, ...]] = ("tokens",)

    tokens: int
    features: int
    vocab: int
    softcap: float | None = None

    @property
    def summary(self) -> str:
        """The sizes and options in a form a table can hold."""
        cap = "" if self.softcap is None else f", softcap {self.softcap:g}"
        return f"{self.tokens}×{self.features}→{self.vocab}{cap}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the logits."""
        return 2.0 * self.tokens * self.features * self.vocab

    @property
    def gradients(self) -> tuple[str, ...]:
        """Of both terms of the loss."""
        return ("lse", "target_logit")

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        return {
            "hidden": ((self.tokens, self.features), dtype),
            "weight": ((self.vocab, self.features), dtype),
            "targets": ((self.tokens,), "int32"),
        }

    def integers(self) -> dict[str, np.ndarray]:
        """Targets drawn from the whole vocabulary."""
        return {"targets": np.random.default_rng(0).integers(0, self.vocab, self.tokens)}

    def deviation(self, name: str) -> float:
        """Logits of a deviation of one."""
        return self.features**-0.5 if name == "weight" else 1.0

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        return {**arrays, "softcap": self.softcap}


CROSS_ENTROPY = (
    CrossEntropyShape("llama-3-8b-head", 8192, 4096, 128256),
    CrossEntropyShape("gemma-2-2b-head", 8192, 2304, 256000, softcap=30.0, everyday=False),
)
