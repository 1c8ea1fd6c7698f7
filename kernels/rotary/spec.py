"""The options and shape rules of rotary, the same for every implementation.

Kernels see the canonical form, one leading batch on every array: q `[batch, length, q_heads, head_dim]`, k `[batch,
length, k_heads, head_dim]` or None, positions int32 `[batch, length]`, frequencies float32 `[batch, rotary_dim / 2]`;
rotated_q and rotated_k as q and k. A backward reads nothing but gradients: it turns them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .frequencies import LinearScaling, Llama3Scaling, YarnScaling, scaling_from

__all__ = ["LinearScaling", "Llama3Scaling", "RotarySpec", "YarnScaling", "scaling_from"]

INPUTS = ("q", "k", "positions", "frequencies")
OUTPUTS = ("rotated_q", "rotated_k")
FACTS = ("dtype", "head_dim", "heads")
OPTIONAL = ("k",)
WITHOUT_BATCH = ()  # every input leads with the batch


@dataclass(frozen=True)
class RotarySpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of q and k: "float32", "float16" or "bfloat16" (NumPy also "float64"); angles are float32 or wider.
        heads: of q and k together.
        rotary_dim: how many leading elements of a head are rotated; the others pass as they are.
        interleaved: pair j is elements (2 j, 2 j + 1) of a head, not (j, j + rotary_dim / 2).
        factor: of cos and sin.
    """

    dtype: str
    head_dim: int
    heads: int
    rotary_dim: int
    interleaved: bool = False
    factor: float = 1.0


SPEC = RotarySpec


def differentiable(spec: RotarySpec) -> tuple[str, ...]:
    """The inputs that have a gradient, where they are there."""
    return ("q", "k")


def facts(dtype: str, q: Any, k: Any, positions: Any, frequencies: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype, "head_dim": q.shape[3], "heads": q.shape[2] + (0 if k is None else k.shape[2])}


def saving(spec: RotarySpec) -> RotarySpec:
    """The spec of a forward whose backward will follow: nothing more is written."""
    return spec


def output_shapes(spec: RotarySpec, q: Any, k: Any, positions: Any, frequencies: Any) -> Sequence[Any]:
    """(shape, dtype) of rotated_q, and of rotated_k or None."""
    return (q.shape, spec.dtype), (None if k is None else (k.shape, spec.dtype))
