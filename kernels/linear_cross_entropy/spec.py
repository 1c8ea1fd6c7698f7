"""The options and shape rules of linear cross-entropy, the same for every implementation.

Kernels see the canonical form: hidden `[batch, tokens, features]`, weight `[batch, vocab, features]`, targets int32
`[batch, tokens]`. With the logits `z = cap(hidden @ weight^T)`, `[batch, tokens, vocab]`, they return three statistics
of each token's row, float32 `[batch, tokens]`:

* lse, the natural logarithm of the sum of `exp(z)`;
* target_logit, `z[target]`;
* logit_sum, the sum of `z`, or None where the spec does not ask for it.

Whatever is made of a row (the loss, label smoothing, the z-loss, the joining of shards of the vocabulary) is made of
these, and the gradient of a logit from theirs:

    dz[v] = dlse * exp(z[v] - lse) + (dtarget_logit if v == target) + dlogit_sum

A target is the number of a row of weight, `ELSEWHERE` for a token that counts but whose target is in another shard of
the vocabulary (target_logit is 0), or `IGNORED`: such a token's statistics and gradients are 0, and what its row of
hidden holds reaches nothing, NaN neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ELSEWHERE, IGNORED = -1, -2
FACTS = ("dtype", "features")


@dataclass(frozen=True)
class LinearCrossEntropySpec:
    """Facts of the arrays that a kernel is built for, then the options of the call.

    Attributes:
        dtype: of hidden and weight: "float32", "float16" or "bfloat16" (NumPy also "float64").
        features: the last dimension of hidden and weight.
        softcap: a logit becomes `softcap * tanh(logit / softcap)`; None leaves it.
        sums: whether the caller wants logit_sum.
    """

    dtype: str
    features: int
    softcap: float | None = None
    sums: bool = False


SPEC = LinearCrossEntropySpec


class LinearCrossEntropyInputs(NamedTuple):
    """The arrays of a call, canonical."""

    hidden: Any
    weight: Any
    targets: Any


INPUTS = LinearCrossEntropyInputs._fields
OUTPUTS = ("lse", "target_logit", "logit_sum")
OPTIONAL = ()
WITHOUT_BATCH = ()  # every input leads with the batch


def differentiable(spec: LinearCrossEntropySpec) -> tuple[str, ...]:
    """The inputs that have a gradient."""
    return ("hidden", "weight")


def facts(dtype: str, hidden: Any, weight: Any, targets: Any) -> dict[str, Any]:
    """The fields in `FACTS`, which the arrays decide; the others are the options of the call."""
    return {"dtype": dtype, "features": hidden.shape[-1]}


def saving(spec: LinearCrossEntropySpec) -> LinearCrossEntropySpec:
    """The spec of a forward whose backward will follow: every forward has the logsumexp, which is all it reads."""
    return spec


def output_shapes(spec: LinearCrossEntropySpec, hidden: Any, weight: Any, targets: Any) -> Sequence[Any]:
    """(shape, dtype) of lse, target_logit, and logit_sum or None."""
    row = (hidden.shape[:2], "float64" if spec.dtype == "float64" else "float32")
    return row, row, (row if spec.sums else None)
