"""Named shapes of real models, shared by the compile check, the tests and the benchmarks.

Sizes are those of the models' public `config.json`. A matmul shape carries its epilogue, because the epilogue is part
of the kernel that is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class AttentionShape:
    """One attention call: q `[batch, q_len, q_heads, head_dim]` against kv_len keys of kv_heads heads."""

    op: ClassVar[str] = "attention"

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    q_len: int = 4096
    kv_len: int = 4096
    batch: int = 1
    causal: bool = True
    trains: bool = True

    @property
    def summary(self) -> str:
        """The sizes in a form a table can hold."""
        length = str(self.q_len) if self.q_len == self.kv_len else f"{self.q_len}×{self.kv_len}"
        return f"{length} tokens, {self.q_heads}/{self.kv_heads} heads, d {self.head_dim}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two products of the forward, half of them where causal."""
        pairs = self.q_len * self.kv_len
        if self.causal:
            pairs -= self.q_len * (self.q_len - 1) // 2
        return 4.0 * self.batch * self.q_heads * self.head_dim * pairs

    def bytes(self, dtype: str) -> float:
        """What a fused forward must move: q and out, k and v once, and the float32 logsumexp."""
        q_and_out = 2 * self.q_len * self.q_heads * self.head_dim
        k_and_v = 2 * self.kv_len * self.kv_heads * self.head_dim
        return float(self.batch * ((q_and_out + k_and_v) * BYTES[dtype] + 4 * self.q_len * self.q_heads))


@dataclass(frozen=True)
class MatmulShape:
    """One matmul call: `activation(a[m, k] @ b[k, n] + bias) + residual`.

    weight_rows_are_outputs: b is the transposed view of an `[n, k]` weight, as `torch.nn.Linear` stores it.
    """

    op: ClassVar[str] = "matmul"

    name: str
    m: int
    k: int
    n: int
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    weight_rows_are_outputs: bool = False
    trains: bool = True

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

    def bytes(self, dtype: str) -> float:
        """What a fused forward must move: each operand once, the result once."""
        elements = self.m * self.k + self.k * self.n + self.m * self.n
        elements += self.n * self.bias + self.m * self.n * self.residual
        return float(elements * BYTES[dtype])


Shape = AttentionShape | MatmulShape

ATTENTION = (
    AttentionShape("llama-3.2-1b", q_heads=32, kv_heads=8, head_dim=64),
    AttentionShape("llama-3-8b", q_heads=32, kv_heads=8, head_dim=128),
    AttentionShape("phi-3-mini", q_heads=32, kv_heads=32, head_dim=96),
    AttentionShape("gemma-2-2b", q_heads=8, kv_heads=4, head_dim=256),
    AttentionShape("llama-3-8b-decode", q_heads=32, kv_heads=8, head_dim=128, q_len=1, batch=8, trains=False),
)

MATMUL = (
    MatmulShape("llama-3-8b-gate", 4096, 4096, 14336, activation="silu"),
    MatmulShape("llama-3-8b-down", 4096, 14336, 4096, residual=True, weight_rows_are_outputs=True),
    MatmulShape("qwen-2.5-7b-qkv", 4096, 3584, 4608, bias=True),
    MatmulShape("gemma-2-2b-gate", 4096, 2304, 9216, activation="gelu_tanh"),
    MatmulShape("llama-3-8b-decode-gate", 1, 4096, 14336, activation="silu", trains=False),
)

QUICK = ("llama-3.2-1b", "llama-3-8b", "llama-3-8b-down")

SHAPES: tuple[Shape, ...] = (*ATTENTION, *MATMUL)


def get_shape(name: str) -> Shape:
    """The shape of that name. Raises ValueError with the names there are."""
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise ValueError(f"shape: got {name!r}; it must be one of {', '.join(shape.name for shape in SHAPES)}")
