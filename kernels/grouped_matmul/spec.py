"""The options and shape rules of grouped_matmul and its gate, the same for every implementation.

Kernels see the canonical form, one leading batch on every array: lhs `[batch, tokens, k]`, rhs `[batch, groups, k, n]`,
group_sizes int32 `[batch, groups]`; out `[batch, tokens, n]`. The first `group_sizes[0]` rows of lhs are those of group
0, and are multiplied with `rhs[0]`; the next are those of group 1. The rows past the sum are nobody's: they give zeros
and have zero gradients, and what they hold, NaN too, reaches nothing.

With an activation the op is `activation(lhs @ rhs) * (lhs @ rhs_up)`, by groups. A forward whose backward will follow
then keeps both products, preactivations `[batch, 2, tokens, n]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

INPUTS = ("lhs", "rhs", "rhs_up", "group_sizes")
OUTPUTS = ("out", "preactivations")
FACTS = ("dtype",)
OPTIONAL = ("rhs_up",)
WITHOUT_BATCH = ()  # every input leads with the batch
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class GroupedMatmulSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of every array: "float32", "float16" or "bfloat16" (NumPy also "float64"); sums are float32.
        activation: None for the product alone; with rhs_up one of `ACTIVATIONS`, applied to `lhs @ rhs` in float32.
        save_preactivations: also write `lhs @ rhs` and `lhs @ rhs_up` in `dtype`, which the backward of a gate reads.
    """

    dtype: str
    activation: str | None = None
    save_preactivations: bool = False


SPEC = GroupedMatmulSpec


def differentiable(spec: GroupedMatmulSpec) -> tuple[str, ...]:
    """The inputs that have a gradient."""
    return ("lhs", "rhs", "rhs_up")


def facts(dtype: str, *inputs: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype}


def saving(spec: GroupedMatmulSpec) -> GroupedMatmulSpec:
    """The spec of a forward whose backward will follow: that of a product reads the inputs alone."""
    return replace(spec, save_preactivations=spec.activation is not None)


def output_shapes(spec: GroupedMatmulSpec, lhs: Any, rhs: Any, rhs_up: Any, group_sizes: Any) -> Sequence[Any]:
    """(shape, dtype) of out, and of the preactivations or None."""
    batch, tokens, n = lhs.shape[0], lhs.shape[1], rhs.shape[3]
    kept = ((batch, 2, tokens, n), spec.dtype) if spec.save_preactivations else None
    return ((batch, tokens, n), spec.dtype), kept
