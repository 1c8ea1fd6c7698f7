"""grouped_matmul problems for the kernels' tests: sizes and options, arrays of values a dtype has, and the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
import torch
from oracles import ACTIVATIONS, Arrays, rounded
from quantized_problems import KINDS

from crosstile.kernels.grouped_matmul.spec import INPUTS as OPERANDS
from crosstile.kernels.grouped_matmul.spec import GroupedMatmulSpec
from crosstile.kernels.tiles.formats import FORMATS, MX_GROUP, stored, weights

FLOATS = OPERANDS[:3]


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a problem reads as its difference from this one.

    sizes: of the groups of every batch item, which has them in another order; rows past their sum hold NaN.
    kind: one of `KINDS` for quantised matrices, which the exact arrays have as what their codes and scales stand for.
    """

    sizes: tuple[int, ...] = (5, 0, 17, 1, 10)
    tokens: int = 37
    k: int = 33
    n: int = 40
    batch: int = 1
    activation: str | None = None
    dtype: str = "float32"
    kind: str | None = None

    @property
    def spec(self) -> GroupedMatmulSpec:
        saves, form = self.activation is not None, KINDS[self.kind]["form"] if self.kind else None
        return GroupedMatmulSpec(self.dtype, self.activation, saves, form, self.group_size)

    @property
    def group_size(self) -> int:
        options = KINDS[self.kind] if self.kind else {}
        return MX_GROUP if options and FORMATS[options["form"]].block_scales else options.get("group_size", 0)

    @cached_property
    def quantized(self) -> dict[str, np.ndarray]:
        """Codes, scales and zeros of the matrices that there are, by the names of the op's inputs."""
        options = KINDS[self.kind or ""]
        drawn = np.random.default_rng(crc32(repr(self).encode()) + 1)
        size, found = (self.batch, len(self.sizes), self.k, self.n), {}
        for name in self.names[1:]:
            w = drawn.standard_normal(size) * np.exp(drawn.standard_normal(size))
            arrays = stored(np, w, FORMATS[options["form"]], self.group_size, options.get("zero_points", False))
            found |= dict(zip((name, f"{name}_scales", f"{name}_zeros"), arrays, strict=True))
        return {name: array for name, array in found.items() if array is not None}

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The inputs that have a gradient."""
        return self.names if self.kind is None else ("lhs",)

    def present(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The op's inputs that there are, by name: of those arrays, with codes and scales for quantised matrices."""
        found = {name: arrays[name] for name in (*self.names, "group_sizes")}
        return found | self.quantized if self.kind else found

    def inputs(self, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
        """The same in order, None for those that are not there."""
        return tuple(self.present(arrays).get(name) for name in OPERANDS)

    @property
    def names(self) -> tuple[str, ...]:
        """The float inputs that there are."""
        return FLOATS if self.activation else FLOATS[:2]

    @cached_property
    def group_sizes(self) -> np.ndarray:
        """int32 [batch, groups]."""
        orders = [np.roll(np.array(self.sizes, np.int32), shift) for shift in range(self.batch)]
        return np.array(orders, np.int32).reshape(self.batch, len(self.sizes))

    @cached_property
    def exact_arrays(self) -> Arrays:
        """The inputs and the gradient of out in float64, of values that the dtype has, and the sizes."""
        weight = (self.batch, len(self.sizes), self.k, self.n)
        shapes = {
            "lhs": (self.batch, self.tokens, self.k),
            "rhs": weight,
            "rhs_up": weight,
            "dout": (self.batch, self.tokens, self.n),
        }
        drawn = np.random.default_rng(crc32(repr(self).encode()))
        arrays = {name: drawn.standard_normal(shape) for name, shape in shapes.items()}
        arrays["lhs"] /= max(1, self.k) ** 0.5 / 2  # so that the activations bend
        arrays = {name: rounded(array, self.dtype) for name, array in arrays.items()}
        for name in self.names[1:] if self.kind else ():
            parts = tuple(self.quantized.get(f"{name}{part}") for part in ("", "_scales", "_zeros"))
            arrays[name] = weights(np, parts, FORMATS[self.spec.format], self.group_size, self.k, False, "float64")
        for name in ("lhs", "dout"):
            arrays[name][:, sum(self.sizes) :] = np.nan
        return {**arrays, "group_sizes": self.group_sizes}

    def answers(self, dtype: str = "float64", arrays: Arrays | None = None) -> Arrays:
        """out, dlhs, drhs and with a gate drhs_up by torch in that precision."""
        found = grouped_by_torch(self.activation, arrays or self.exact_arrays, dtype)
        return {name: found[name] for name in ("out", *(f"d{name}" for name in self.differentiated))}


def grouped_by_torch(activation: str | None, arrays: Arrays, dtype: str = "float64") -> Arrays:
    """The results by torch's own matmul, a group at a time, and autograd, each computed in `dtype`; float64 values."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float64)).to(getattr(torch, dtype))

    names = FLOATS if activation else FLOATS[:2]
    leaves = {name: tensor(arrays[name]).requires_grad_() for name in names}
    dout = tensor(arrays["dout"])
    parts = [torch.zeros_like(dout)]  # the rows of nobody
    loss = sum((leaf[:0].sum() for leaf in leaves.values()), torch.zeros(()))
    for item, sizes in enumerate(arrays["group_sizes"].tolist()):
        end = 0
        for group, size in enumerate(sizes):
            rows, end = slice(end, end + size), end + size
            found = leaves["lhs"][item, rows] @ leaves["rhs"][item, group]
            if activation:
                found = ACTIVATIONS[activation](found) * (leaves["lhs"][item, rows] @ leaves["rhs_up"][item, group])
            loss = loss + (found * dout[item, rows]).sum()
            parts[0][item, rows] = found.detach()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = {"out": parts[0]} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: result.detach().double().numpy() for name, result in named.items()}
