"""The options and shape rules of grouped_matmul and its gate, the same for every implementation.

Kernels see the canonical form, one leading batch on every array: lhs `[batch, tokens, k]`, rhs `[batch, groups, k, n]`,
group_sizes int32 `[batch, groups]`; out `[batch, tokens, n]`. The first `group_sizes[0]` rows of lhs are those of group
0, and are multiplied with `rhs[0]`; the next are those of group 1. The rows past the sum are nobody's: they give zeros
and have zero gradients, and what they hold, NaN too, reaches nothing.

With an activation the op is `activation(lhs @ rhs) * (lhs @ rhs_up)`, by groups. A forward whose backward will follow
then keeps both products, preactivations `[batch, 2, tokens, n]`.

With a format the matrices are quantised, and frozen (`kernels/tiles/formats.py` says what codes and scales are): rhs
and rhs_up are codes `[batch, groups, k, n]`, or `[batch, groups, 128 * ceil(k / 256), n]` of two codes a byte, each
with scales `[batch, groups, scale groups, n]`, and zeros the same or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

INPUTS = (
    "lhs", "rhs", "rhs_up", "group_sizes", "rhs_scales", "rhs_zeros", "rhs_up_scales", "rhs_up_zeros",
)  # fmt: skip
OUTPUTS = ("out", "preactivations")
FACTS = ("dtype",)
OPTIONAL = ("rhs_up", "rhs_scales", "rhs_zeros", "rhs_up_scales", "rhs_up_zeros")
WITHOUT_BATCH = ()  # every input leads with the batch
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class GroupedMatmulSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of every array but codes and scales: "float32", "float16" or "bfloat16" (NumPy also "float64"); sums are
            float32.
        activation: None for the product alone; with rhs_up one of `ACTIVATIONS`, applied to `lhs @ rhs` in float32.
        save_preactivations: also write `lhs @ rhs` and `lhs @ rhs_up` in `dtype`, which the backward of a gate reads.
        format: None, or that of quantised matrices: a name in `FORMATS` of `kernels/tiles/formats.py`.
        group_size: how many of k share a scale there; 0 means all.
    """

    dtype: str
    activation: str | None = None
    save_preactivations: bool = False
    format: str | None = None
    group_size: int = 0


SPEC = GroupedMatmulSpec


def differentiable(spec: GroupedMatmulSpec) -> tuple[str, ...]:
    """The inputs that have a gradient."""
    return ("lhs", "rhs", "rhs_up") if spec.format is None else ("lhs",)


def facts(dtype: str, *inputs: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype}


def saving(spec: GroupedMatmulSpec) -> GroupedMatmulSpec:
    """The spec of a forward whose backward will follow: that of a product reads the inputs alone."""
    return replace(spec, save_preactivations=spec.activation is not None)


def output_shapes(spec: GroupedMatmulSpec, lhs: Any, rhs: Any, *others: Any) -> Sequence[Any]:
    """(shape, dtype) of out, and of the preactivations or None."""
    batch, tokens, n = lhs.shape[0], lhs.shape[1], rhs.shape[3]
    kept = ((batch, 2, tokens, n), spec.dtype) if spec.save_preactivations else None
    return ((batch, tokens, n), spec.dtype), kept
