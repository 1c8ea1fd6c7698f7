"""Norm problems for the kernels' tests: sizes and options, arrays in every layout, and the answers of torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
import torch
from oracles import Arrays, rounded
from torch.nn import functional

from crosstile.kernels.norm.spec import NormSpec

OPERANDS = ("x", "weight", "bias", "residual")


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a problem reads as its difference from this one."""

    kind: str = "rms"
    rows: int = 37
    hidden: int = 40
    batch: int = 2
    bias: bool = False
    residual: bool = False
    zero_centered: bool = False
    eps: float = 1e-5
    dtype: str = "float32"
    offset: float = 0.0  # of x, which a variance must not notice

    @property
    def spec(self) -> NormSpec:
        return NormSpec(self.dtype, self.hidden, self.kind, self.eps, self.zero_centered)

    @cached_property
    def exact_arrays(self) -> Arrays:
        """The inputs and the gradients of the results in float64, of values that the dtype has."""
        whole, row = (self.batch, self.rows, self.hidden), (self.batch, self.hidden)
        shapes = {"x": whole, "weight": row, "bias": row, "residual": whole, "dy": whole, "dsummed": whole}
        here = {"bias": self.bias, "residual": self.residual, "dsummed": self.residual}
        drawn = np.random.default_rng(crc32(repr(self).encode()))
        arrays = {name: drawn.standard_normal(shape) for name, shape in shapes.items() if here.get(name, True)}
        arrays["x"] += self.offset
        return {name: rounded(array, self.dtype) for name, array in arrays.items()}

    def answers(self, dtype: str = "float64", arrays: Arrays | None = None) -> Arrays:
        """y, summed and the gradients by torch in that precision."""
        return norm_by_torch(self.spec, arrays or self.exact_arrays, dtype)


def norm_by_torch(spec: NormSpec, arrays: Arrays, dtype: str) -> Arrays:
    """Each batch by torch's own norm and autograd, computed in `dtype`; float64 values."""

    def leaf(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float64)).to(getattr(torch, dtype)).requires_grad_()

    leaves = {name: leaf(arrays[name]) for name in OPERANDS if name in arrays}
    x = leaves["x"]
    summed = x + leaves["residual"] if "residual" in leaves else x
    normalised = []
    for item, rows in enumerate(summed):
        weight = leaves["weight"][item]
        bias = leaves["bias"][item] if "bias" in leaves else None
        normalised.append(_norm(spec, rows, weight, bias))
    y = torch.stack(normalised) if normalised else 0 * summed
    results, gradients = [y], [leaf(arrays["dy"]).detach()]
    if "residual" in leaves:
        results, gradients = [y, summed], [*gradients, leaf(arrays["dsummed"]).detach()]
    found = torch.autograd.grad(results, list(leaves.values()), gradients, allow_unused=True, materialize_grads=True)
    named = {"y": y, **({"summed": summed} if "residual" in leaves else {})}
    named |= {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {name: tensor.detach().double().numpy() for name, tensor in named.items()}


def _norm(spec: NormSpec, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if spec.kind == "layer":
        return functional.layer_norm(rows, (spec.hidden,), weight, bias, spec.eps)
    if not spec.zero_centered:
        return functional.rms_norm(rows, (spec.hidden,), weight, spec.eps)
    wide = rows if rows.dtype == torch.float64 else rows.float()  # as Gemma computes it
    return functional.rms_norm(wide, (spec.hidden,), 1 + weight.to(wide.dtype), spec.eps).to(rows.dtype)
