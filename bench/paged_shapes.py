"""Named shapes of paged attention: decoding and prefill in chunks, from pages of two sizes and three dtypes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from .shape import Shape, Size


@dataclass(frozen=True)
class PagedAttentionShape(Shape):
    """One call: q_len new tokens of each of `batch` sequences against the kv_len keys that each has in the cache.

    page_dtype: None is q's; others have scales.
    """

    op: ClassVar[str] = "paged_attention"

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    page_dtype: str | None = None
    q_len: int = 1
    kv_len: int = 8192
    batch: int = 8
    trains: bool = field(default=False, kw_only=True)

    @property
    def summary(self) -> str:
        """The sizes in a form a table can hold."""
        pages = f"pages of {self.page_size}" + (f" in {self.page_dtype}" if self.page_dtype else "")
        length = f"{self.batch} × {self.q_len}×{self.kv_len} tokens"
        return f"{length}, {self.q_heads}/{self.kv_heads} heads, d {self.head_dim}, {pages}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two products, for the pairs that see each other."""
        pairs = self.q_len * self.kv_len - self.q_len * (self.q_len - 1) // 2
        return 4.0 * self.batch * self.q_heads * self.head_dim * pairs

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call; the pages are those in use."""
        rows: Size = () if self.q_len == 1 else (self.q_len,)
        used = self.kv_len // self.page_size
        pages = (self.batch * used, self.page_size, self.kv_heads, self.head_dim), self.page_dtype or dtype
        found: dict[str, tuple[Size, str]] = {
            "q": ((self.batch, *rows, self.q_heads, self.head_dim), dtype),
            "k_pages": pages,
            "v_pages": pages,
            "page_table": ((self.batch, used), "int32"),
            "lengths": ((self.batch,), "int32"),
        }
        if self.page_dtype:
            found |= dict.fromkeys(("k_scales", "v_scales"), ((self.kv_heads,), "float32"))
        return found

    def integers(self) -> dict[str, np.ndarray]:
        """Pages in any order, every sequence of the same length."""
        used = self.kv_len // self.page_size
        pages = np.random.default_rng(0).permutation(self.batch * used).reshape(self.batch, used)
        return {"page_table": pages, "lengths": np.full(self.batch, self.kv_len)}

    def deviation(self, name: str) -> float:
        """Scales are small."""
        return 0.05 if "scale" in name else 1.0


_KINDS = {"": None, "-int8": "int8", "-fp8": "float8_e4m3fn"}
_LLAMA = PagedAttentionShape("llama-3-8b-paged", q_heads=32, kv_heads=8, head_dim=128, page_size=16, everyday=False)

PAGED = (
    replace(_LLAMA, everyday=True),
    replace(_LLAMA, name="qwen-2.5-1.5b-paged", q_heads=12, kv_heads=2),
    replace(_LLAMA, name="gemma-2b-paged", q_heads=8, kv_heads=1, head_dim=256),
    *(
        replace(_LLAMA, name=f"llama-3-8b-{way}-{size}{kind}", q_len=q_len, page_size=size, page_dtype=page_dtype)
        for way, q_len in (("decode", 1), ("chunk", 128))
        for size in (16, 256)
        for kind, page_dtype in _KINDS.items()
        if (way, size, kind) != ("decode", 16, "")  # the first of all
    ),
)
