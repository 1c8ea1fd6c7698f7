"""torch tensors on a TPU: the Pallas kernels as torch ops, through `torch.tpu.pallas.jax_op` of torch_tpu.

Written against the source of torch_tpu 0.2.0. `jax_op` reads a function's annotated signature, exports it for the TPU
and registers a torch op; each kernel, spec and set of present arrays becomes one such op, made once.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from inspect import Parameter, Signature
from typing import Any

import jax
import torch

from crosstile import plans
from crosstile.dispatch import Op
from crosstile.kernels.tiles.targets import TARGETS, Target

_NAMES = {  # torch_tpu's device names
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU v7": "v7x",
    "TPU v7x": "v7x",
    "TPU7x": "v7x",
}


def target_of(device: Any) -> Target:
    """The kind of TPU that torch_tpu found."""
    name = torch.tpu.get_device_name(device)  # type: ignore[attr-defined]
    if name not in _NAMES:
        raise ValueError(f"torch_tpu names its device {name!r}; known are {', '.join(_NAMES)}: use crosstile.target")
    return TARGETS[_NAMES[name]]


def execute(
    op: Op, direction: str, spec: Any, operands: tuple[Any, ...], config: Any, target: Target
) -> list[torch.Tensor | None]:
    """One direction of the op's Pallas kernel on TPU tensors; None for absent results."""
    named = plans.by_name(op, operands)
    present = plans.present_results(op, direction, spec, operands)
    results = iter(_operator(op, direction, spec, config, target, tuple(named), sum(present))(*named.values()))
    return [next(results) if there else None for there in present]


@lru_cache(maxsize=1024)
def _operator(
    op: Op, direction: str, spec: Any, config: Any, target: Target, names: tuple[str, ...], results: int
) -> Any:
    kernel = getattr(op.module("pallas"), direction)

    def function(*arrays: jax.Array) -> Any:
        operands = plans.from_names(op, direction, dict(zip(names, arrays, strict=True)))
        return tuple(result for result in kernel(spec, config, target, *operands) if result is not None)

    function.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=jax.Array) for name in names],
        return_annotation=tuple[(jax.Array,) * results],  # type: ignore[misc]
    )
    digest = sha256(repr((spec, config, target.name, names)).encode()).hexdigest()[:16]
    function.__name__ = f"{op.name}_{direction}_{digest}"
    return torch.tpu.pallas.jax_op(f"crosstile_tpu::{function.__name__}", function)  # type: ignore[attr-defined]
