"""The options and shape rules of both norms, the same for every implementation.

Kernels see the canonical form, one leading batch on every array: x `[batch, rows, hidden]`, weight `[batch, hidden]`,
bias `[batch, hidden]` or None, residual `[batch, rows, hidden]` or None; y `[batch, rows, hidden]`, summed the same or
None.

A backward recomputes mean and scale of a row instead of reading them: it reads the whole row in any case, so that they
cost no memory traffic, and one forward serves inference and training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INPUTS = ("x", "weight", "bias", "residual")
OUTPUTS = ("y", "summed")
FACTS = ("dtype", "hidden")
OPTIONAL = ("bias", "residual")
WITHOUT_BATCH = ()  # every input leads with the batch


@dataclass(frozen=True)
class NormSpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of every array: "float32", "float16" or "bfloat16" (NumPy also "float64").
        hidden: the length of a row.
        kind: "rms", `x / sqrt(mean(x^2) + eps)`, or "layer", `(x - mean(x)) / sqrt(var(x) + eps)`.
        eps: added under the root.
        zero_centered: a row is scaled by `1 + weight` instead of weight.
    """

    dtype: str
    hidden: int
    kind: str
    eps: float
    zero_centered: bool = False

    @property
    def centers(self) -> bool:
        """Whether the mean of a row is subtracted."""
        return self.kind == "layer"


SPEC = NormSpec


def differentiable(spec: NormSpec) -> tuple[str, ...]:
    """The inputs that have a gradient, where they are there."""
    return INPUTS


def facts(dtype: str, x: Any, weight: Any, bias: Any, residual: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype, "hidden": x.shape[-1]}


def saving(spec: NormSpec) -> NormSpec:
    """The spec of a forward whose backward will follow: nothing more is written."""
    return spec


def output_shapes(spec: NormSpec, x: Any, weight: Any, bias: Any, residual: Any) -> Sequence[Any]:
    """(shape, dtype) of y, and of summed or None."""
    return (x.shape, spec.dtype), (None if residual is None else (x.shape, spec.dtype))
