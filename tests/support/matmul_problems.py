"""Matmul problems for the kernels' tests: sizes and options, arrays in every layout, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
from oracles import Arrays, matmul_by_torch, rounded

from crosstile.kernels.matmul.spec import MatmulSpec

OPERANDS = ("a", "b", "bias", "residual")
LAYOUTS = ("contiguous", "transposed", "sliced", "negative", "repeated")


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a problem reads as its difference from this one."""

    m: int = 33
    k: int = 65
    n: int = 40
    batch: int = 2
    activation: str | None = None
    bias: bool = False
    residual: bool = False
    dtype: str = "float32"
    out_dtype: str = ""
    precision: str | None = None

    @property
    def spec(self) -> MatmulSpec:
        saves = self.activation is not None
        return MatmulSpec(self.dtype, self.out_dtype or self.dtype, self.activation, saves, self.precision)

    @cached_property
    def exact_arrays(self) -> Arrays:
        """The inputs and the gradient of out in float64, of values that the dtype has."""
        m, k, n, batch = self.m, self.k, self.n, self.batch
        shapes = {"a": (batch, m, k), "b": (batch, k, n), "bias": (batch, n), "residual": (batch, m, n)}
        here = {"a": True, "b": True, "bias": self.bias, "residual": self.residual}
        drawn = np.random.default_rng(crc32(repr(self).encode()))
        arrays = {name: drawn.standard_normal(shapes[name]) for name in OPERANDS if here[name]}
        arrays["a"] /= max(1, k) ** 0.5 / 2  # so that the activations bend
        return {
            name: rounded(array, self.dtype)
            for name, array in {**arrays, "dout": drawn.standard_normal((batch, m, n))}.items()
        }

    def answers(self, dtype: str = "float64", arrays: Arrays | None = None) -> Arrays:
        """out, da, db, dbias, dresidual by torch in that precision."""
        arrays = dict(arrays or self.exact_arrays)
        if self.bias:
            arrays["bias"] = arrays["bias"][:, None]
        results = matmul_by_torch(**arrays, activation=self.activation, dtype=dtype)
        if self.bias:
            results["dbias"] = results["dbias"][:, 0]
        return results


def lay_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values (for "repeated": those of its first matrix and row) in that layout, NaN everywhere between."""
    if layout == "transposed":
        return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "sliced":
        storage = np.full([3 * size + 5 for size in array.shape], np.nan, array.dtype)
        view = storage[tuple(slice(2, 2 + 3 * size, 3) for size in array.shape)]
        view[...] = array
        return view
    if layout == "negative":
        flip = (slice(None, None, -1),) * array.ndim
        return np.ascontiguousarray(array[flip])[flip]
    if layout == "repeated":
        return np.broadcast_to(array[:1] if array.ndim == 2 else array[:1, :1], array.shape)
    return np.ascontiguousarray(array)
