"""Named shapes of grouped products: the experts of real mixtures, in training and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .shape import Shape, Size


@dataclass(frozen=True)
class GroupedShape(Shape):
    """One call: `tokens` routed rows of k, each multiplied with one of `groups` matrices [k, n], or gated by two.

    Attributes:
        activation: None for `grouped_matmul`, else that of `grouped_glu_matmul`.
        weight_rows_are_outputs: the matrices are transposed views of `[groups, n, k]`, as `torch.nn.Linear` has them.
    """

    op: ClassVar[str] = "grouped_matmul"

    tokens: int
    groups: int
    k: int
    n: int
    activation: str | None = None
    weight_rows_are_outputs: bool = False

    @property
    def function(self) -> str:
        """The public function that is called."""
        return "grouped_matmul" if self.activation is None else "grouped_glu_matmul"

    @property
    def summary(self) -> str:
        """The sizes and the activation in a form a table can hold."""
        what = f"{self.k}→{self.n}" if self.activation is None else f"{self.k}→2×{self.n}, {self.activation}"
        return f"{self.tokens} rows, {self.groups} × {what}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products."""
        return (2.0 if self.activation is None else 4.0) * self.tokens * self.k * self.n

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        turned = self.weight_rows_are_outputs
        weight = (self.groups, *((self.n, self.k) if turned else (self.k, self.n))), dtype
        names = ("lhs", "rhs") if self.activation is None else ("x", "w_gate", "w_up")
        found = dict.fromkeys(names, weight)
        return {**found, names[0]: ((self.tokens, self.k), dtype), "group_sizes": ((self.groups,), "int32")}

    def integers(self) -> dict[str, np.ndarray]:
        """Groups of uneven sizes, as routers make them."""
        rng = np.random.default_rng(0)
        return {"group_sizes": rng.multinomial(self.tokens, rng.dirichlet(np.full(self.groups, 4.0)))}

    def deviation(self, name: str) -> float:
        """Results of a deviation of one."""
        return self.k**-0.5 if name in ("rhs", "w_gate", "w_up") else 1.0

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        turn = self.weight_rows_are_outputs
        found = {
            name: array.swapaxes(1, 2) if turn and len(array.shape) == 3 else array for name, array in arrays.items()
        }
        return found if self.activation is None else {**found, "activation": self.activation}


GROUPED = (
    GroupedShape("mixtral-8x7b-experts", 8192, 8, 4096, 14336, "silu"),
    GroupedShape("mixtral-8x7b-down", 8192, 8, 14336, 4096, weight_rows_are_outputs=True, everyday=False),
    GroupedShape("qwen3-30b-a3b-experts", 32768, 128, 2048, 768, "silu", weight_rows_are_outputs=True, everyday=False),
    GroupedShape("qwen3-30b-a3b-down", 32768, 128, 768, 2048),
    GroupedShape("qwen3-30b-a3b-decode", 64, 128, 2048, 768, "silu", trains=False, everyday=False),
    GroupedShape("qwen3-30b-a3b-decode-down", 64, 128, 768, 2048, trains=False),
)
