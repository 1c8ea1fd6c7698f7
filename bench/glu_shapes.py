"""Named shapes of the gated products: the feed-forward layers of real models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .shape import Shape, Size


@dataclass(frozen=True)
class GluShape(Shape):
    """One glu_matmul call: `activation(x[m, k] @ w_gate[k, n]) * (x @ w_up)`, both weights stored as `[n, k]`."""

    op: ClassVar[str] = "glu_matmul"
    counts: ClassVar[tuple[str, ...]] = ("m",)

    m: int
    k: int
    n: int
    activation: str

    @property
    def summary(self) -> str:
        """The sizes and the activation in a form a table can hold."""
        return f"{self.m}×{self.k}→2×{self.n}, {self.activation}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products."""
        return 4.0 * self.m * self.k * self.n

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        weight = (self.n, self.k), dtype
        return {"x": ((self.m, self.k), dtype), "w_gate": weight, "w_up": weight}

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        weights = {name: arrays[name].T for name in ("w_gate", "w_up")}
        return {"x": arrays["x"], **weights, "activation": self.activation}


GLU = (
    GluShape("llama-3-8b-glu", 4096, 4096, 14336, "silu"),
    GluShape("gemma-2-2b-glu", 4096, 2304, 9216, "gelu_tanh", everyday=False),
)
