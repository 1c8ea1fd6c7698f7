"""Problems of matmul with a quantised weight, whose peer is the library: the weight dequantised, whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np

import crosstile

from .row_cases import RowsCase


@dataclass(frozen=True)
class QuantizedCase(RowsCase):
    """`silu(a[m, k] @ w[k, n]) + residual` of which w is quantised as `quantize` says."""

    op: ClassVar[str] = "quantized_matmul"

    m: int
    k: int
    n: int
    quantize: Mapping[str, Any] = field(hash=False)

    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the float arrays."""
        result = (self.m, self.n)
        return {"a": (self.m, self.k), "residual": result, "dout": result}

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""

        def matmul(a: Any, residual: Any) -> Any:
            w = np.random.default_rng(1).standard_normal((self.k, self.n)).astype(np.float32)
            b = crosstile.quantize(_like(w, a), **self.quantize)
            return crosstile.matmul(a, b, activation="silu", residual=residual, implementation=implementation)

        return matmul


def _like(values: np.ndarray, like: Any) -> Any:
    """The values as an array of the framework that the other is of."""
    if type(like).__module__.startswith("torch"):
        import torch

        return torch.from_numpy(values)
    import jax.numpy as jnp

    return jnp.asarray(values)


_case = partial(QuantizedCase, m=21, k=140, n=51)
QUANTIZED_CASES = (
    _case(
        "int4 in groups of 64, zero points, 21×140→51",
        quantize={"dtype": "int4", "group_size": 64, "zero_points": True},
    ),
    _case("mxfp4, 21×140→51", quantize={"dtype": "mxfp4"}),
    _case("int8 by int8, 21×140→51", quantize={"dtype": "int8", "activations": "int8"}),
)
