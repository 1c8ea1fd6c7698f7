"""Named shapes of matmul. A shape carries its epilogue, because the epilogue is part of the kernel that is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .shape import Shape, Size


@dataclass(frozen=True)
class MatmulShape(Shape):
    """One matmul call: `activation(a[m, k] @ b[k, n] + bias) + residual`.

    weight_rows_are_outputs: b is the transposed view of an `[n, k]` weight, as `torch.nn.Linear` stores it.
    """

    op: ClassVar[str] = "matmul"

    m: int
    k: int
    n: int
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    weight_rows_are_outputs: bool = False

    @property
    def summary(self) -> str:
        """The sizes and the epilogue in a form a table can hold."""
        parts = ["bias"] * self.bias + [self.activation or ""] + ["residual"] * self.residual
        epilogue = ", ".join(part for part in parts if part)
        return f"{self.m}×{self.k}→{self.n}" + (f", {epilogue}" if epilogue else "")

    @property
    def flops(self) -> float:
        """Multiplications and additions of the product."""
        return 2.0 * self.m * self.k * self.n

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        sizes = {
            "a": (self.m, self.k),
            "b": (self.n, self.k) if self.weight_rows_are_outputs else (self.k, self.n),
            **({"bias": (self.n,)} if self.bias else {}),
            **({"residual": (self.m, self.n)} if self.residual else {}),
        }
        return {name: (size, dtype) for name, size in sizes.items()}

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        b = arrays["b"].T if self.weight_rows_are_outputs else arrays["b"]
        return {**arrays, "b": b, "activation": self.activation}


MATMUL = (
    MatmulShape("llama-3-8b-gate", 4096, 4096, 14336, activation="silu"),
    MatmulShape("llama-3-8b-down", 4096, 14336, 4096, residual=True, weight_rows_are_outputs=True),
    MatmulShape("qwen-2.5-7b-qkv", 4096, 3584, 4608, bias=True),
    MatmulShape("gemma-2-2b-gate", 4096, 2304, 9216, activation="gelu_tanh"),
    MatmulShape("llama-3-8b-decode-gate", 1, 4096, 14336, activation="silu", trains=False),
)
