"""The options and shape rules of glu_matmul, the same for every implementation.

Kernels see the canonical form, one leading batch on every array: x `[batch, m, k]`, w_gate and w_up `[batch, k, n]`;
out `[batch, m, n]`, preactivations `[batch, 2, m, n]` (x @ w_gate, then x @ w_up) or None.

A forward whose backward will follow keeps both preactivations. To compute them again would be two more products beside
the backward's four; to keep them costs one write and one read of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

INPUTS = ("x", "w_gate", "w_up")
OUTPUTS = ("out", "preactivations")
FACTS = ("dtype",)
OPTIONAL = ()
WITHOUT_BATCH = ()  # every input leads with the batch
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class GluMatmulSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of every array: "float32", "float16" or "bfloat16" (NumPy also "float64"); sums are float32.
        activation: one of `ACTIVATIONS`, applied to `x @ w_gate` in float32.
        save_preactivations: also write `x @ w_gate` and `x @ w_up` in `dtype`, which the backward reads.
    """

    dtype: str
    activation: str
    save_preactivations: bool = False


SPEC = GluMatmulSpec


def differentiable(spec: GluMatmulSpec) -> tuple[str, ...]:
    """The inputs that have a gradient."""
    return INPUTS


def facts(dtype: str, x: Any, w_gate: Any, w_up: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype}


def saving(spec: GluMatmulSpec) -> GluMatmulSpec:
    """The spec of a forward whose backward will follow."""
    return replace(spec, save_preactivations=True)


def output_shapes(spec: GluMatmulSpec, x: Any, w_gate: Any, w_up: Any) -> Sequence[Any]:
    """(shape, dtype) of out, and of the preactivations or None."""
    batch, m, n = x.shape[0], x.shape[1], w_gate.shape[2]
    return ((batch, m, n), spec.dtype), (((batch, 2, m, n), spec.dtype) if spec.save_preactivations else None)
