"""The options and shape rules of matmul, the same for every implementation.

Kernels see the canonical form, one leading batch on every array: a `[batch, m, k]`, b `[batch, k, n]`, bias
`[batch, n]` or None, residual `[batch, m, n]` or None; out `[batch, m, n]`, preactivation the same or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

INPUTS = ("a", "b", "bias", "residual")
OUTPUTS = ("out", "preactivation")
FACTS = ("dtype",)
OPTIONAL = ("bias", "residual")
WITHOUT_BATCH = ()  # every input leads with the batch
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
PRECISIONS = ("tf32", "tf32x3", "bf16x3", "bf16x6")


@dataclass(frozen=True)
class MatmulSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of a, b, bias and residual: "float32", "float16" or "bfloat16" (NumPy also "float64").
        out_dtype: of the result; the sum is float32 whatever it is.
        activation: None or one of `ACTIVATIONS`, applied to `a @ b + bias` in float32.
        save_preactivation: also write `a @ b + bias` in `dtype`, which the backward of an activation reads.
        precision: how the products of float32 are made: None, as float32, or one of `PRECISIONS`, from narrower parts.
    """

    dtype: str
    out_dtype: str
    activation: str | None = None
    save_preactivation: bool = False
    precision: str | None = None


SPEC = MatmulSpec


def differentiable(spec: MatmulSpec) -> tuple[str, ...]:
    """The inputs that have a gradient, where they are there."""
    return INPUTS


def facts(dtype: str, a: Any, b: Any, bias: Any, residual: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype}


def saving(spec: MatmulSpec) -> MatmulSpec:
    """The spec of a forward whose backward will follow."""
    return replace(spec, save_preactivation=spec.activation is not None)


def output_shapes(spec: MatmulSpec, a: Any, b: Any, bias: Any, residual: Any) -> Sequence[Any]:
    """(shape, dtype) of out, and of the preactivation or None."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return (shape, spec.out_dtype), ((shape, spec.dtype) if spec.save_preactivation else None)
