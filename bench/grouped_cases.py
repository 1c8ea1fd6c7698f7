"""Problems of grouped products: an empty group, one smaller than a tile, and rows past the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

import crosstile

from .case import Arrays, Frameworks
from .row_cases import RowsCase


@dataclass(frozen=True)
class GroupedCase(RowsCase):
    """`lhs @ rhs` by groups, or with an activation the gate of both matrices."""

    op: ClassVar[str] = "grouped_matmul"

    group_sizes: tuple[int, ...]
    tokens: int
    k: int
    n: int
    activation: str | None = None

    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the float arrays."""
        weight = (len(self.group_sizes), self.k, self.n)
        weights = {"rhs": weight} if self.activation is None else {"w_gate": weight, "w_up": weight}
        return {"lhs": (self.tokens, self.k), **weights, "dout": (self.tokens, self.n)}

    def run(self, side: Frameworks, arrays: Arrays, function: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The same from a framework, with the sizes of the groups in it."""
        group_sizes = side.round(np.array(self.group_sizes, np.int32), "int32")
        return super().run(side, arrays, lambda *floats: function(*floats, group_sizes))

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""
        if self.activation is None:
            return partial(crosstile.grouped_matmul, implementation=implementation)
        return partial(crosstile.grouped_glu_matmul, activation=self.activation, implementation=implementation)


GROUPED = (
    GroupedCase("groups of 9, 0, 20, 1, 41×40→51", group_sizes=(9, 0, 20, 1), tokens=41, k=40, n=51),
    GroupedCase("gated groups, 23×33→24", group_sizes=(3, 18, 0), tokens=23, k=33, n=24, activation="silu"),
)
