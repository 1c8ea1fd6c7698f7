"""glu_matmul problems for the kernels' tests: sizes and options, arrays of values that a dtype has, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
import torch
from oracles import ACTIVATIONS, Arrays, rounded

from crosstile.kernels.glu_matmul.spec import GluMatmulSpec

OPERANDS = ("x", "w_gate", "w_up")


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a problem reads as its difference from this one."""

    m: int = 33
    k: int = 65
    n: int = 40
    batch: int = 2
    activation: str = "silu"
    dtype: str = "float32"

    @property
    def spec(self) -> GluMatmulSpec:
        return GluMatmulSpec(self.dtype, self.activation, save_preactivations=True)

    @cached_property
    def exact_arrays(self) -> Arrays:
        """The inputs and the gradient of out in float64, of values that the dtype has."""
        m, k, n, batch = self.m, self.k, self.n, self.batch
        shapes = {"x": (batch, m, k), "w_gate": (batch, k, n), "w_up": (batch, k, n), "dout": (batch, m, n)}
        drawn = np.random.default_rng(crc32(repr(self).encode()))
        arrays = {name: drawn.standard_normal(shape) for name, shape in shapes.items()}
        arrays["x"] /= max(1, k) ** 0.5 / 2  # so that the activations bend
        return {name: rounded(array, self.dtype) for name, array in arrays.items()}

    def answers(self, dtype: str = "float64", arrays: Arrays | None = None) -> Arrays:
        """out, dx, dw_gate and dw_up by torch in that precision."""
        return glu_by_torch(self.activation, arrays or self.exact_arrays, dtype)


def glu_by_torch(activation: str, arrays: Arrays, dtype: str = "float64") -> Arrays:
    """The results by torch's own ops and autograd, each computed in `dtype`; float64 values."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float64)).to(getattr(torch, dtype))

    leaves = {name: tensor(arrays[name]).requires_grad_() for name in OPERANDS}
    out = ACTIVATIONS[activation](leaves["x"] @ leaves["w_gate"]) * (leaves["x"] @ leaves["w_up"])
    gradients = torch.autograd.grad(out, list(leaves.values()), tensor(arrays["dout"]))
    named = {"out": out} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: result.detach().double().numpy() for name, result in named.items()}
