"""Problems of a matmul with a quantised weight: sizes and options, arrays of values that a dtype has, and answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
import torch
from oracles import ACTIVATIONS, Arrays, rounded

from crosstile.kernels.quantized_matmul.spec import QuantizedMatmulSpec
from crosstile.kernels.tiles.formats import (
    FORMATS,
    MX_GROUP,
    dequantized_rows,
    quantized_rows,
    stored,
    weights,
)

WEIGHT = ("values", "scales", "zeros")
KINDS = {
    "int8": {"form": "int8"},
    "int8-zeros": {"form": "int8", "zero_points": True},
    "int8-64-zeros": {"form": "int8", "group_size": 64, "zero_points": True},
    "int4": {"form": "int4"},
    "int4-zeros": {"form": "int4", "zero_points": True},
    "int4-32": {"form": "int4", "group_size": 32},
    "int4-64": {"form": "int4", "group_size": 64},
    "int4-128-zeros": {"form": "int4", "group_size": 128, "zero_points": True},
    "fp8": {"form": "float8_e4m3fn"},
    "fp8-64": {"form": "float8_e4m3fn", "group_size": 64},
    "mxfp8": {"form": "mxfp8"},
    "mxfp4": {"form": "mxfp4"},
    "int8-int8": {"form": "int8", "a_format": "int8"},
    "fp8-fp8": {"form": "float8_e4m3fn", "a_format": "float8_e4m3fn"},
    "mxfp8-mxfp8": {"form": "mxfp8", "a_format": "mxfp8"},
    "mxfp4-mxfp8": {"form": "mxfp4", "a_format": "mxfp8"},
}
ALONE = tuple(kind for kind, options in KINDS.items() if "a_format" not in options)
BLOCKS = ("mxfp8-mxfp8", "mxfp4-mxfp8")  # whose products TPUs do not have


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a problem reads as its difference from this one."""

    kind: str = "int4-32"
    m: int = 21
    k: int = 300
    n: int = 40
    batch: int = 2
    bias: bool = True
    activation: str | None = "silu"
    residual: bool = True
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        return KINDS[self.kind]

    @property
    def group_size(self) -> int:
        return MX_GROUP if FORMATS[self.options["form"]].block_scales else self.options.get("group_size", 0)

    @property
    def spec(self) -> QuantizedMatmulSpec:
        """That of a forward whose backward follows."""
        form, a_format = self.options["form"], self.options.get("a_format")
        saves = self.activation is not None
        return QuantizedMatmulSpec(self.dtype, self.dtype, form, self.group_size, a_format, self.activation, saves)

    @cached_property
    def weight(self) -> dict[str, np.ndarray]:
        """values, scales and, if it has them, zeros."""
        drawn = np.random.default_rng(crc32(repr(self).encode()) + 1)
        w = drawn.standard_normal((self.batch, self.k, self.n)) * np.exp(drawn.standard_normal((1, self.k, self.n)))
        turned, zeros = "a_format" in self.options, self.options.get("zero_points", False)
        arrays = stored(np, w, FORMATS[self.options["form"]], self.group_size, zeros, turned)
        return {name: array for name, array in zip(WEIGHT, arrays, strict=True) if array is not None}

    @cached_property
    def exact_weight(self) -> np.ndarray:
        """What the codes and scales stand for, in float64."""
        arrays = tuple(self.weight.get(name) for name in WEIGHT)
        turned, form = "a_format" in self.options, FORMATS[self.options["form"]]
        return weights(np, arrays, form, self.group_size, self.k, turned, "float64")

    @cached_property
    def exact_arrays(self) -> Arrays:
        """a, bias, residual and the gradient of out in float64, of values that the dtype has."""
        m, k, n, batch = self.m, self.k, self.n, self.batch
        shapes: dict[str, tuple[int, ...]] = {"a": (batch, m, k), "dout": (batch, m, n)}
        if self.bias:
            shapes["bias"] = (batch, n)
        if self.residual:
            shapes["residual"] = (batch, m, n)
        drawn = np.random.default_rng(crc32(repr(self).encode()))
        arrays = {name: drawn.standard_normal(shape) for name, shape in shapes.items()}
        arrays["a"] /= max(1, k) ** 0.5  # so that the activations bend
        return {name: rounded(array, self.dtype) for name, array in arrays.items()}

    def native(self) -> dict[str, Any]:
        """All arrays in NumPy, floats in the dtype."""
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        return {**{name: array.astype(dtype) for name, array in self.exact_arrays.items()}, **self.weight}

    def answers(self, dtype: str = "float64") -> Arrays:
        """out and the gradients by torch in that precision, of the weight dequantised and of a rounded beforehand."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.array(array, np.float64)).to(getattr(torch, dtype))

        arrays = self.exact_arrays
        a_format = self.options.get("a_format")
        leaves = {name: tensor(arrays[name]).requires_grad_() for name in ("a", "bias", "residual") if name in arrays}
        a = leaves["a"]
        if a_format is not None:  # straight through
            codes, scales = quantized_rows(np, arrays["a"], a_format)
            a = tensor(dequantized_rows(np, codes, scales, a_format, "float64")) + (a - a.detach())
        z = a @ tensor(self.exact_weight)
        z = z + leaves["bias"][:, None] if self.bias else z
        out = ACTIVATIONS[self.activation](z)
        out = out + leaves["residual"] if self.residual else out
        gradients = torch.autograd.grad(out, list(leaves.values()), tensor(arrays["dout"]))
        named = {"out": out} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {name: result.detach().double().numpy() for name, result in named.items()}


def named_gradients(found: Any) -> dict[str, Any]:
    """The gradients that a backward returns, by name, without those that are not there."""
    names = ("a", *WEIGHT, "bias", "residual")
    return {f"d{name}": gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
