"""The options and shape rules of a matmul with a quantised weight, the same for every implementation.

Kernels see the canonical form, one leading batch on every array: a `[batch, m, k]`, bias `[batch, n]` or None, residual
`[batch, m, n]` or None; out `[batch, m, n]`, preactivation the same or None. Of the weight (`kernels/tiles/formats.py`
says what its codes and scales are) values are `[batch, k, n]`, or `[batch, 128 * ceil(k / 256), n]` of two codes a
byte, scales `[batch, groups, n]`, and zeros the same or None. For quantised activations values are `[batch, n, k]`, or
`[batch, n, ceil(k / 2)]`, and scales `[batch, 1, n]`, or `[batch, n, groups]` of MX formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

INPUTS = ("a", "values", "scales", "zeros", "bias", "residual")
OUTPUTS = ("out", "preactivation")
FACTS = ("dtype",)
OPTIONAL = ("zeros", "bias", "residual")
WITHOUT_BATCH = ()  # every input leads with the batch
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class QuantizedMatmulSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of a, bias and residual: "float32", "float16" or "bfloat16" (NumPy also "float64").
        out_dtype: of the result; the sum is float32 (int32 of int8 activations) whatever it is.
        format: of the weight: a name in `FORMATS` of `kernels/tiles/formats.py`.
        group_size: how many k share a scale; 0 means all.
        a_format: None, or the format that a is rounded to, token by token: "int8", "float8_e4m3fn" or "mxfp8".
        activation: None or one of `ACTIVATIONS`, applied to `a @ w + bias` in float32.
        save_preactivation: also write `a @ w + bias` in `dtype`, which the backward of an activation reads.
    """

    dtype: str
    out_dtype: str
    format: str
    group_size: int = 0
    a_format: str | None = None
    activation: str | None = None
    save_preactivation: bool = False


SPEC = QuantizedMatmulSpec


def differentiable(spec: QuantizedMatmulSpec) -> tuple[str, ...]:
    """The inputs that have a gradient, where they are there: the weight is frozen."""
    return ("a", "bias", "residual")


def facts(dtype: str, *arrays: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype}


def saving(spec: QuantizedMatmulSpec) -> QuantizedMatmulSpec:
    """The spec of a forward whose backward will follow."""
    return replace(spec, save_preactivation=spec.activation is not None)


def output_shapes(
    spec: QuantizedMatmulSpec, a: Any, values: Any, scales: Any, zeros: Any, bias: Any, residual: Any
) -> Sequence[Any]:
    """(shape, dtype) of out, and of the preactivation or None."""
    shape = (a.shape[0], a.shape[1], values.shape[2 if spec.a_format is None else 1])
    return (shape, spec.out_dtype), ((shape, spec.dtype) if spec.save_preactivation else None)
