"""The arguments of glu_matmul: checked, and made into a spec and the arrays that kernels take."""

from __future__ import annotations

from math import prod
from typing import Any

from crosstile.arguments import check_rank, common_dtype, show
from crosstile.kernels.glu_matmul.spec import ACTIVATIONS, GluMatmulSpec


def prepare_glu_matmul(
    x: Any, w_gate: Any, w_up: Any, *, activation: str = "silu"
) -> tuple[GluMatmulSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    dtype = common_dtype(("x", "w_gate", "w_up"), (x, w_gate, w_up))
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x: got rank {len(shape)}, {show(shape)}; it must be [..., m, k] (a vector: x[None])")
    for name, weight in (("w_gate", w_gate), ("w_up", w_up)):
        check_rank(name, weight.shape, 2, "[k, n]")
    if w_gate.shape[0] != shape[-1]:
        hint = " (a weight [n, k] as torch.nn.Linear has it: w_gate.T)" if w_gate.shape[1] == shape[-1] else ""
        raise ValueError(
            f"w_gate: k is {w_gate.shape[0]} in {show(w_gate.shape)}; it must be {shape[-1]}, as in x {show(shape)}"
            f"{hint}"
        )
    if tuple(w_up.shape) != tuple(w_gate.shape):
        raise ValueError(f"w_up: got {show(w_up.shape)}; it must have the shape of w_gate, {show(w_gate.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return GluMatmulSpec(dtype, activation), (x, w_gate, w_up)


def canonical_glu_matmul(
    xp: Any, spec: GluMatmulSpec, arrays: tuple[Any, ...]
) -> tuple[GluMatmulSpec, tuple[Any, ...], tuple[int, ...]]:
    """The arrays with one leading batch each, and the result's shape: all dimensions of x before the last are rows."""
    x, w_gate, w_up = arrays
    rows = (1, prod(x.shape[:-1]), x.shape[-1])
    return spec, (x.reshape(rows), w_gate[None], w_up[None]), (*x.shape[:-1], w_gate.shape[1])
