"""Named shapes of matmul with a quantised weight: Llama 3 8B's, in every format, in decoding and in prefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .shape import Shape, Size


@dataclass(frozen=True)
class QuantizedShape(Shape):
    """One call `activation(a[m, k] @ w[k, n]) + residual` of which w is quantised.

    Attributes:
        format: of the weight.
        group_size: how many of k share a scale; None means all.
        zero_points: whether codes have them.
        activations: the format that a is rounded to, or None.
    """

    op: ClassVar[str] = "quantized_matmul"

    m: int
    k: int
    n: int
    format: str
    group_size: int | None = None
    zero_points: bool = False
    activations: str | None = None
    activation: str | None = None
    residual: bool = False

    @property
    def function(self) -> str:
        """The public function that is called."""
        return "matmul"

    @property
    def summary(self) -> str:
        """The sizes, the format and the epilogue in a form a table can hold."""
        parts = [self.format, f"groups of {self.group_size}" if self.group_size else ""]
        parts += ["zero points"] * self.zero_points + [f"activations {self.activations}" if self.activations else ""]
        parts += [self.activation or ""] + ["residual"] * self.residual
        return f"{self.m}×{self.k}→{self.n}, " + ", ".join(part for part in parts if part)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the product."""
        return 2.0 * self.m * self.k * self.n

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        from crosstile.kernels.tiles.formats import FORMATS, stored_shapes

        form = FORMATS[self.format]
        turned = self.activations is not None
        values, scales = stored_shapes(form, self.group_size or 0, self.k, self.n, turned)
        scale_dtype = "uint8" if form.block_scales else "bfloat16" if self.group_size else "float32"
        sizes: dict[str, tuple[Size, str]] = {
            "a": ((self.m, self.k), dtype),
            "values": (values, form.storage),
            "scales": (scales, scale_dtype),
        }
        if self.zero_points:
            sizes["zeros"] = (scales, form.storage)
        if self.residual:
            sizes["residual"] = ((self.m, self.n), dtype)
        return sizes

    def integers(self) -> dict[str, np.ndarray]:
        """Scales that are exponents: of 2 ** -7 to 1."""
        size, kind = self.arrays("bfloat16")["scales"]
        return {"scales": np.random.default_rng(0).integers(120, 128, size)} if kind == "uint8" else {}

    def deviation(self, name: str) -> float:
        """Scales are small."""
        return 0.01 if name == "scales" else 1.0

    @property
    def turned(self) -> tuple[str, ...]:
        """Codes have k innermost in memory, as `quantize` keeps them where it can."""
        return () if self.activations else ("values",)

    def leaves(self, dtype: str) -> list[str]:
        """Scales have no gradient, whatever their dtype."""
        return [name for name in super().leaves(dtype) if "scales" not in name]

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        from crosstile.quantization import Quantized

        rest = dict(arrays)
        values, scales, zeros = rest.pop("values"), rest.pop("scales"), rest.pop("zeros", None)
        b = Quantized(values, scales, zeros, self.format, self.k, self.group_size, self.activations, "bfloat16")
        return {**rest, "b": b, "activation": self.activation}


_KINDS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8"},
    "int8-128-zeros": {"format": "int8", "group_size": 128, "zero_points": True},
    "int4": {"format": "int4", "group_size": 128},
    "int4-columns": {"format": "int4"},
    "int4-64": {"format": "int4", "group_size": 64},
    "int4-32-zeros": {"format": "int4", "group_size": 32, "zero_points": True},
    "fp8": {"format": "float8_e4m3fn"},
    "mxfp8": {"format": "mxfp8", "group_size": 32},
    "mxfp4": {"format": "mxfp4", "group_size": 32},
    "int8-int8": {"format": "int8", "activations": "int8"},
    "fp8-fp8": {"format": "float8_e4m3fn", "activations": "float8_e4m3fn"},
    "mxfp8-mxfp8": {"format": "mxfp8", "group_size": 32, "activations": "mxfp8"},
    "mxfp4-mxfp8": {"format": "mxfp4", "group_size": 32, "activations": "mxfp8"},
}
_EVERYDAY = ("int8", "int4", "mxfp4", "int8-int8", "fp8-fp8")


def _shapes() -> list[QuantizedShape]:
    found = []
    for kind, options in _KINDS.items():
        gate = {"k": 4096, "n": 14336, "activation": "silu", **options}
        down = {"k": 14336, "n": 4096, "residual": True, **options}
        common, often = kind in _EVERYDAY, kind == "int4"
        found += [
            QuantizedShape(f"llama-3-8b-gate-{kind}", 4096, **gate, everyday=common),
            QuantizedShape(f"llama-3-8b-decode-down-{kind}", 16, **down, trains=False, everyday=common),
            QuantizedShape(f"llama-3-8b-decode-gate-{kind}", 1, **gate, trains=False, everyday=often),
            QuantizedShape(f"llama-3-8b-decode-qkv-{kind}", 64, 4096, 6144, **options, trains=False, everyday=often),
        ]
    return found


QUANTIZED = tuple(_shapes())
