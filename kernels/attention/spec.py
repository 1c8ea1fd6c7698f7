"""The options and shape rules of attention, the same for every implementation.

Shapes: q `[batch, q_len, q_heads, head_dim]`, k `[batch, kv_len, kv_heads, head_dim]`, v `[batch, kv_len, kv_heads,
v_dim]`; out `[batch, q_len, q_heads, v_dim]` in q's dtype, lse float32 `[batch, q_heads, q_len]` (natural logarithm).

A call's softcap, bias, mask, segment ids and mods reach a kernel as two expressions, of the score and of what a query
sees, and as planes, the arrays that the expressions read (`kernels/tiles/expressions.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

from ..tiles.expressions import Expression

MAX_PLANES = 6
FLOAT8 = "float8_e4m3fn"
FACTS = ("dtype", "head_dim", "v_dim")


@dataclass(frozen=True)
class AttentionSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of q, k, v and the result: "float32", "float16" or "bfloat16" (NumPy also "float64"); of q, k and v alone
            "float8_e4m3fn", which has no backward.
        head_dim: the last dimension of q and k.
        v_dim: the last dimension of v and the result.
        causal: query i sees key j where `j <= i'`, `i' = i + kv_len - q_len`.
        window_left: and where `i' - window_left <= j`; None is unbounded.
        window_right: and where `j <= i' + window_right`; None is unbounded.
        scale: multiplies the scores; None means `1 / sqrt(head_dim)`.
        score: what becomes of a scaled score; None leaves it.
        mask: a key is seen where this is true as well; None hides nothing.
        max_seqlen_q: of packed sequences, a bound on their numbers of queries; None where nothing is packed.
        max_seqlen_k: and of their keys.
        same_tokens: whether the packed queries and keys are known to be of the same tokens, sequence by sequence.
        dropout: the share of the weights that is dropped; those that stay are divided by `1 - dropout`.
        weight: by what a weight is multiplied before the product with v, from 0 to 1; None leaves it.
        result_dtype: of the result, where that is not dtype.
        has_lengths: whether batch items have their own lengths, which takes registers.
        plane_gradients: the slots of the planes that want a gradient.
        return_lse: whether the caller wants the logsumexp (kernels compute it in any case).
    """

    dtype: str
    head_dim: int
    v_dim: int
    causal: bool = False
    scale: float | None = None
    return_lse: bool = False
    window_left: int | None = None
    window_right: int | None = None
    score: Expression | None = None
    mask: Expression | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    same_tokens: bool = False
    plane_gradients: tuple[int, ...] = ()
    dropout: float = 0.0
    has_lengths: bool = False
    weight: Expression | None = None
    result_dtype: str | None = None

    @property
    def softmax_scale(self) -> float:
        return 1.0 / sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def out_dtype(self) -> str:
        """The dtype of the result."""
        return self.result_dtype or self.dtype

    @property
    def is_float8(self) -> bool:
        """Whether q, k and v have 8 bits; then weights are rounded to as few, in the upper half of their range."""
        return self.dtype == FLOAT8

    @property
    def weight_exponent(self) -> int:
        """Weights are computed as `2 ** weight_exponent` times what they are: float8_e4m3fn has 1/512 to 448."""
        return 8 if self.is_float8 else 0

    @property
    def left(self) -> int | None:
        """Query i sees no key before `i' - left`."""
        return self.window_left

    @property
    def right(self) -> int | None:
        """Query i sees no key after `i' + right`; causal is 0."""
        return 0 if self.causal else self.window_right


SPEC = AttentionSpec


class AttentionInputs(NamedTuple):
    """The arrays of a call; None for those that are absent.

    Attributes:
        q_lengths, kv_lengths: int32 `[batch]`, how many queries and keys of each batch item there are.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`; then q, k and v hold one batch item, the packed sequences.
        sinks: float32 `[batch, q_heads]`, logits that join the softmax's denominator.
        value_scales: float32 `[batch, q_heads]`, by which the result is multiplied.
        dropout_seed: int32 `[2]`, the low and the high word, where weights are dropped.
        forward_runs, dkv_runs, dq_runs: int32, which tiles each kernel visits (`sparsity.py`).
        plane0: and the others: `[batch, q_heads, q_len, kv_len]`, each 1 where the plane does not vary; of packed
            sequences `[sequences, q_heads, max_seqlen_q, max_seqlen_k]`.
    """

    q: Any
    k: Any
    v: Any
    q_lengths: Any = None
    kv_lengths: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    sinks: Any = None
    value_scales: Any = None
    dropout_seed: Any = None
    forward_runs: Any = None
    dkv_runs: Any = None
    dq_runs: Any = None
    plane0: Any = None
    plane1: Any = None
    plane2: Any = None
    plane3: Any = None
    plane4: Any = None
    plane5: Any = None

    @property
    def planes(self) -> tuple[Any, ...]:
        return self[-MAX_PLANES:]


INPUTS = AttentionInputs._fields
OUTPUTS = ("out", "lse")
OPTIONAL = INPUTS[3:]
KNOWN_TO_HOST = INPUTS[-MAX_PLANES:]  # may be NumPy's, or in the host's memory: then kernels skip what the mask hides
# Every other input leads with the batch.
WITHOUT_BATCH = ("cu_seqlens_q", "cu_seqlens_k", "dropout_seed", "forward_runs", "dkv_runs", "dq_runs")
SHARED = ("dropout_seed",)  # one for all, under vmap too


def differentiable(spec: AttentionSpec) -> tuple[str, ...]:
    """The inputs that have a gradient, where they are there."""
    if spec.is_float8:
        return ()
    return ("q", "k", "v", "sinks", *(f"plane{slot}" for slot in spec.plane_gradients))


def needs_exact_delta(spec: AttentionSpec, planes: Sequence[Any]) -> bool:
    """Whether a plane of one number for all keys of a query has a gradient, in 16 bits.

    It sums what the keys send, times the same error of the query's delta. That of a delta from outputs of 16 bits,
    small beside each term, would not be beside the sum, whose terms cancel.
    """
    asked = (planes[slot] for slot in spec.plane_gradients)
    return spec.dtype != "float32" and any(plane is not None and plane.shape[3] == 1 for plane in asked)


def facts(dtype: str, q: Any, k: Any, v: Any, *others: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype, "head_dim": q.shape[-1], "v_dim": v.shape[-1]}


def saving(spec: AttentionSpec) -> AttentionSpec:
    """The spec of a forward whose backward will follow: every forward has the logsumexp already."""
    return spec


def output_shapes(spec: AttentionSpec, q: Any, k: Any, v: Any, *others: Any) -> Sequence[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of out and lse."""
    batch, q_len, q_heads, _ = q.shape
    lse_dtype = "float64" if spec.dtype == "float64" else "float32"
    return ((batch, q_len, q_heads, v.shape[-1]), spec.out_dtype), ((batch, q_heads, q_len), lse_dtype)
