"""Linear cross-entropy by the framework's own ops, a tile of logits at a time, forward and backward.

Beyond its inputs and results it needs a few tiles; with narrow floats also the sums of dhidden, in float32. torch keeps
the logits where there are few (`library_torch.KEPT`). A second derivative is taken of logits built whole.
"""

from __future__ import annotations

from typing import Any

from .spec import LinearCrossEntropySpec


def forward(spec: LinearCrossEntropySpec, hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any, Any]:
    """lse and target_logit [batch, tokens], and logit_sum where the spec asks for it."""
    if type(hidden).__module__.startswith("torch") or not hasattr(hidden, "aval"):
        from . import library_torch

        found: tuple[Any, ...] = library_torch.statistics(spec, hidden, weight, targets)
    else:
        from . import library_jax

        found = library_jax.statistics(spec, hidden, weight, targets)
    return found[0], found[1], (found[2] if spec.sums else None)
