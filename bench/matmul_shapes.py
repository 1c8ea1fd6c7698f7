"""Named shapes of matmul. A shape carries its epilogue, because the epilogue is part of the kernel that is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .shape import Shape, Size


@dataclass(frozen=True)
class MatmulShape(Shape):
    """One matmul call: `activation(a[m, k] @ b[k, n] + bias) + residual`.

    Attributes:
        weight_rows_are_outputs: b is the transposed view of an `[n, k]` weight, as `torch.nn.Linear` stores it.
        batch: a and b are so many matrices; 0: one, without a leading dimension.
        precision: of float32; the arrays then are float32, whatever dtype is compiled.
    """

    op: ClassVar[str] = "matmul"
    counts: ClassVar[tuple[str, ...]] = ("m",)

    m: int
    k: int
    n: int
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    weight_rows_are_outputs: bool = False
    batch: int = 0
    precision: str | None = None

    @property
    def summary(self) -> str:
        """The sizes and the epilogue in a form a table can hold."""
        parts = ["bias"] * self.bias + [self.activation or ""] + ["residual"] * self.residual + [self.precision or ""]
        said = ", ".join(part for part in parts if part)
        batch = f"{self.batch}×" if self.batch else ""
        return f"{batch}{self.m}×{self.k}→{self.n}" + (f", {said}" if said else "")

    @property
    def flops(self) -> float:
        """Multiplications and additions of the product."""
        return 2.0 * max(1, self.batch) * self.m * self.k * self.n

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        lead = (self.batch,) if self.batch else ()
        sizes: dict[str, Size] = {
            "a": (*lead, self.m, self.k),
            "b": (*lead, self.n, self.k) if self.weight_rows_are_outputs else (*lead, self.k, self.n),
            **({"bias": (self.n,)} if self.bias else {}),
            **({"residual": (*lead, self.m, self.n)} if self.residual else {}),
        }
        return {name: (size, "float32" if self.precision else dtype) for name, size in sizes.items()}

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        b = arrays["b"].T if self.weight_rows_are_outputs else arrays["b"]
        return {**arrays, "b": b, "activation": self.activation, "precision": self.precision}


MATMUL = (
    MatmulShape("llama-3-8b-gate", 4096, 4096, 14336, activation="silu"),
    MatmulShape("llama-3-8b-down", 4096, 14336, 4096, residual=True, weight_rows_are_outputs=True),
    MatmulShape("qwen-2.5-7b-qkv", 4096, 3584, 4608, bias=True),
    MatmulShape("gemma-2-2b-gate", 4096, 2304, 9216, activation="gelu_tanh"),
    MatmulShape("llama-3-8b-decode-gate", 1, 4096, 14336, activation="silu", trains=False),
    MatmulShape("llama-3-8b-qkv", 4096, 4096, 6144, everyday=False),
    MatmulShape("llama-3-8b-out", 4096, 4096, 4096, residual=True, everyday=False),
    MatmulShape("llama-3-8b-decode-16-down", 16, 14336, 4096, residual=True, trains=False, everyday=False),
    MatmulShape("llama-3-8b-decode-64-gate", 64, 4096, 14336, activation="silu", trains=False, everyday=False),
    MatmulShape("square-4096", 4096, 4096, 4096, everyday=False),
    MatmulShape("square-4096-linear", 4096, 4096, 4096, weight_rows_are_outputs=True, everyday=False),
    MatmulShape("llama-3-8b-gate-product", 4096, 4096, 14336, everyday=False),
    MatmulShape("llama-3-8b-down-product", 4096, 14336, 4096, everyday=False),
    MatmulShape("long-k", 512, 65536, 512, everyday=False),
    MatmulShape("odd", 1001, 1003, 1005, bias=True, activation="gelu", residual=True, everyday=False),
    MatmulShape("odd-decode", 3, 1003, 1005, trains=False, everyday=False),
    MatmulShape("batch-of-4096", 64, 64, 64, batch=4096, everyday=False),
    MatmulShape("square-4096-bf16x6", 4096, 4096, 4096, precision="bf16x6", everyday=False),
    MatmulShape("square-4096-bf16x3", 4096, 4096, 4096, precision="bf16x3", everyday=False),
    MatmulShape("square-4096-tf32x3", 4096, 4096, 4096, precision="tf32x3", everyday=False),
)
