"""The options and shape rules of attention, the same for every implementation.

Shapes: q `[batch, q_len, q_heads, head_dim]`, k `[batch, kv_len, kv_heads, head_dim]`, v `[batch, kv_len, kv_heads,
v_dim]`; out `[batch, q_len, q_heads, v_dim]` in q's dtype, lse float32 `[batch, q_heads, q_len]` (natural logarithm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

FACTS = ("dtype", "head_dim", "v_dim")
OPTIONAL = ()
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of q, k, v and the result: "float32", "float16" or "bfloat16" (NumPy also "float64").
        head_dim: the last dimension of q and k.
        v_dim: the last dimension of v and the result.
        causal: query i sees key j where `j <= i + kv_len - q_len`.
        scale: multiplies the scores; None means `1 / sqrt(head_dim)`.
        return_lse: whether the caller wants the logsumexp (kernels compute it in any case).
    """

    dtype: str
    head_dim: int
    v_dim: int
    causal: bool = False
    scale: float | None = None
    return_lse: bool = False

    @property
    def softmax_scale(self) -> float:
        return 1.0 / sqrt(self.head_dim) if self.scale is None else self.scale


SPEC = AttentionSpec


def facts(dtype: str, q: Any, k: Any, v: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype, "head_dim": q.shape[-1], "v_dim": v.shape[-1]}


def saving(spec: AttentionSpec) -> AttentionSpec:
    """The spec of a forward whose backward will follow: every forward has the logsumexp already."""
    return spec


def output_shapes(spec: AttentionSpec, q: Any, k: Any, v: Any) -> Sequence[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of out and lse."""
    batch, q_len, q_heads, _ = q.shape
    lse_dtype = "float64" if spec.dtype == "float64" else "float32"
    return ((batch, q_len, q_heads, v.shape[-1]), spec.dtype), ((batch, q_heads, q_len), lse_dtype)
