"""The options and shape rules of paged attention, the same for every implementation.

Shapes: q `[batch, q_len, q_heads, head_dim]`, k_pages `[num_pages, page_size, kv_heads, head_dim]`, v_pages
`[num_pages, page_size, kv_heads, v_dim]`; out `[batch, q_len, q_heads, v_dim]` in q's dtype, lse float32
`[batch, q_heads, q_len]` (natural logarithm).

Key j of a batch item lies in row `j % page_size` of page `page_table[item, j // page_size]`. What no query sees is not
read: neither a page, nor its entry in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

MAX_HEAD_DIM = 256
PAGE_SIZES = (16, 32, 64, 128, 256)
QUANTIZED = ("int8", "float8_e4m3fn")  # what pages may be, beside q's dtype
FACTS = ("dtype", "page_dtype", "head_dim", "v_dim")


@dataclass(frozen=True)
class PagedAttentionSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of q and the result: "float32", "float16" or "bfloat16" (NumPy also "float64").
        page_dtype: of k_pages and v_pages: q's, "int8" or "float8_e4m3fn".
        head_dim: the last dimension of q and k_pages.
        v_dim: the last dimension of v_pages and the result.
        causal: query i sees key j where `j <= i'`, `i' = i + lengths - q_lengths` of the batch item.
        scale: multiplies the scores; None means `1 / sqrt(head_dim)`.
        return_lse: whether the caller wants the logsumexp (kernels compute it in any case).
        window_left: query i sees key j only where `i' - window_left <= j`; None is unbounded.
        softcap: bounds the scores, `softcap * tanh(score / softcap)`; None does not.
    """

    dtype: str
    page_dtype: str
    head_dim: int
    v_dim: int
    causal: bool = True
    scale: float | None = None
    return_lse: bool = False
    window_left: int | None = None
    softcap: float | None = None

    @property
    def softmax_scale(self) -> float:
        return 1.0 / sqrt(self.head_dim) if self.scale is None else self.scale


SPEC = PagedAttentionSpec


class PagedAttentionInputs(NamedTuple):
    """The arrays of a call; None for those that are absent.

    Attributes:
        page_table: int32 `[batch, max_pages]`.
        lengths: int32 `[batch]`, how many keys of each batch item are in the cache, its queries' own included.
        q_lengths: int32 `[batch]`, how many of the rows of q are there; None means all.
        k_scales, v_scales: float32 `[kv_heads]`, by which the values in the pages are multiplied.
        sinks: float32 `[batch, q_heads]`, logits that join the softmax's denominator.
    """

    q: Any
    k_pages: Any
    v_pages: Any
    page_table: Any
    lengths: Any
    q_lengths: Any = None
    k_scales: Any = None
    v_scales: Any = None
    sinks: Any = None


INPUTS = PagedAttentionInputs._fields
OUTPUTS = ("out", "lse")
OPTIONAL = ("q_lengths", "k_scales", "v_scales", "sinks")
WITHOUT_BATCH = ("k_pages", "v_pages", "k_scales", "v_scales")  # every other input leads with the batch


def differentiable(spec: PagedAttentionSpec) -> tuple[str, ...]:
    """None of the inputs has a gradient: a cache is for inference."""
    return ()


def facts(dtype: str, q: Any, k_pages: Any, v_pages: Any, *others: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    kind = k_pages.dtype
    page_dtype = kind if isinstance(kind, str) else getattr(kind, "name", None) or str(kind).removeprefix("torch.")
    return {"dtype": dtype, "page_dtype": page_dtype, "head_dim": q.shape[-1], "v_dim": v_pages.shape[-1]}


def saving(spec: PagedAttentionSpec) -> PagedAttentionSpec:
    """The spec of a forward whose backward will follow: there is none."""
    return spec


def output_shapes(
    spec: PagedAttentionSpec, q: Any, k_pages: Any, v_pages: Any, *others: Any
) -> Sequence[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of out and lse."""
    batch, q_len, q_heads, _ = q.shape
    lse_dtype = "float64" if spec.dtype == "float64" else "float32"
    return ((batch, q_len, q_heads, v_pages.shape[-1]), spec.dtype), ((batch, q_heads, q_len), lse_dtype)


def no_gradient() -> str:
    """Why a call that wants a gradient cannot have one."""
    return (
        "paged attention is for inference and has no backward: use implementation='library' where the framework "
        "should differentiate it, or attention() over a cache that is one array"
    )
