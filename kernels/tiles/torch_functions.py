"""What the ops of an expression mean for torch's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .expressions import functions_of


def functions_of_torch() -> dict[str, Callable[..., Any]]:
    """What each op means for tensors; `where`, `min`, `max` and the logical ops take numbers beside them too."""

    def of_tensors(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            device = next((operand.device for operand in operands if isinstance(operand, torch.Tensor)), None)
            if name in ("exp", "log", "sqrt", "tanh"):
                operands = tuple(float(x) if isinstance(x, int) else x for x in operands)
            kinds = (torch.float64 if isinstance(x, float) else None for x in operands)
            return function(
                *(torch.as_tensor(x, dtype=kind, device=device) for x, kind in zip(operands, kinds, strict=True))
            )

        return call

    needing_tensors = ("abs", "exp", "log", "sqrt", "tanh", "not", "min", "max", "and", "or", "where")
    plain = functions_of(torch)
    return {name: of_tensors(name, plain[name]) if name in needing_tensors else plain[name] for name in plain}
