"""Named shapes of grouped products: the experts of real mixtures, in training and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .shape import Shape, Size


@dataclass(frozen=True)
class GroupedShape(Shape):
    """One call: `tokens` routed rows of k, each multiplied with one of `groups` matrices [k, n], or gated by two.

    Attributes:
        activation: None for `grouped_matmul`, else that of `grouped_glu_matmul`.
        weight_rows_are_outputs: the matrices are transposed views of `[groups, n, k]`, as `torch.nn.Linear` has them.
        format: of quantised matrices, None for others.
        group_size: how many of k share a scale; None means all.
        zero_points: whether codes have them.
    """

    op: ClassVar[str] = "grouped_matmul"
    counts: ClassVar[tuple[str, ...]] = ("tokens",)

    tokens: int
    groups: int
    k: int
    n: int
    activation: str | None = None
    weight_rows_are_outputs: bool = False
    format: str | None = None
    group_size: int | None = None
    zero_points: bool = False

    @property
    def function(self) -> str:
        """The public function that is called."""
        return "grouped_matmul" if self.activation is None else "grouped_glu_matmul"

    @property
    def summary(self) -> str:
        """The sizes and the activation in a form a table can hold."""
        what = f"{self.k}→{self.n}" if self.activation is None else f"{self.k}→2×{self.n}, {self.activation}"
        return f"{self.tokens} rows, {self.groups} × {what}{self._format_summary}"

    @property
    def _format_summary(self) -> str:
        if self.format is None:
            return ""
        grouped = f" in groups of {self.group_size}" if self.group_size else ""
        return f", {self.format}{grouped}" + (", zero points" if self.zero_points else "")

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products."""
        return (2.0 if self.activation is None else 4.0) * self.tokens * self.k * self.n

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        turned = self.weight_rows_are_outputs
        size: Size = (self.groups, *((self.n, self.k) if turned else (self.k, self.n)))
        names = ("lhs", "rhs") if self.activation is None else ("x", "w_gate", "w_up")
        found = dict.fromkeys(names, (size, dtype))
        if self.format is not None:
            found = {
                f"{name}{part}": array for name in names[1:] for part, array in self._quantized(self.format).items()
            }
        return {**found, names[0]: ((self.tokens, self.k), dtype), "group_sizes": ((self.groups,), "int32")}

    def _quantized(self, name: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of a matrix' codes, scales and zeros, by what follows its name."""
        from crosstile.kernels.tiles.formats import FORMATS, stored_shapes

        form = FORMATS[name]
        values, scales = ((self.groups, *s) for s in stored_shapes(form, self.group_size or 0, self.k, self.n, False))
        scale_dtype = "uint8" if form.block_scales else "bfloat16" if self.group_size else "float32"
        found: dict[str, tuple[Size, str]] = {"": (values, form.storage), "_scales": (scales, scale_dtype)}
        return found | ({"_zeros": (scales, form.storage)} if self.zero_points else {})

    def integers(self) -> dict[str, np.ndarray]:
        """Groups of uneven sizes, as routers make them, and scales that are exponents: of 2 ** -12 to 2 ** -5."""
        rng = np.random.default_rng(0)
        sizes = {"group_sizes": rng.multinomial(self.tokens, rng.dirichlet(np.full(self.groups, 4.0)))}
        arrays = self.arrays("bfloat16").items()
        exponents = {name: size for name, (size, kind) in arrays if name.endswith("_scales") and kind == "uint8"}
        return sizes | {name: rng.integers(115, 123, size) for name, size in exponents.items()}

    def deviation(self, name: str) -> float:
        """Results of a deviation of one."""
        if name.endswith("_scales"):  # small
            return 0.01 * self.k**-0.5
        return self.k**-0.5 if name in ("rhs", "w_gate", "w_up") else 1.0

    @property
    def turned(self) -> tuple[str, ...]:
        """Codes have k innermost in memory, as `quantize` keeps them where it can."""
        if self.format is None:
            return ()
        return ("rhs",) if self.activation is None else ("w_gate", "w_up")

    def leaves(self, dtype: str) -> list[str]:
        """Scales have no gradient, whatever their dtype."""
        return [name for name in super().leaves(dtype) if "scales" not in name]

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        if self.format is not None:
            arrays = self._with_quantized(arrays)
        turn = self.weight_rows_are_outputs
        found = {
            name: array.swapaxes(1, 2) if turn and len(array.shape) == 3 else array for name, array in arrays.items()
        }
        return found if self.activation is None else {**found, "activation": self.activation}

    def _with_quantized(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        from crosstile.quantization import Quantized

        found = dict(arrays)
        for name in self.turned:
            values, scales, zeros = found[name], found.pop(f"{name}_scales"), found.pop(f"{name}_zeros", None)
            found[name] = Quantized(values, scales, zeros, self.format or "", self.k, self.group_size, None, "bfloat16")
        return found


_KINDS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "group_size": 128},
    "mxfp4": {"format": "mxfp4", "group_size": 32},
    "int4-32-zeros": {"format": "int4", "group_size": 32, "zero_points": True},
    "fp8": {"format": "float8_e4m3fn"},
    "mxfp8": {"format": "mxfp8", "group_size": 32},
}


def _quantized_shapes() -> list[GroupedShape]:
    found = []
    for kind, options in _KINDS.items():
        often = {**options, "everyday": kind == "int4"}
        found += [
            GroupedShape(f"mixtral-8x7b-down-{kind}", 8192, 8, 14336, 4096, **often),
            GroupedShape(f"mixtral-8x7b-experts-{kind}", 8192, 8, 4096, 14336, "silu", **options, everyday=False),
            GroupedShape(f"mixtral-8x7b-decode-{kind}", 32, 8, 4096, 14336, "silu", **often, trains=False),
        ]
    return found


GROUPED = (
    GroupedShape("mixtral-8x7b-experts", 8192, 8, 4096, 14336, "silu"),
    GroupedShape("mixtral-8x7b-down", 8192, 8, 14336, 4096, weight_rows_are_outputs=True, everyday=False),
    GroupedShape("mixtral-8x7b-gate-product", 8192, 8, 4096, 14336, everyday=False),
    GroupedShape("mixtral-8x7b-down-product", 8192, 8, 14336, 4096, everyday=False),
    GroupedShape("qwen3-30b-a3b-experts", 32768, 128, 2048, 768, "silu", weight_rows_are_outputs=True, everyday=False),
    GroupedShape("qwen3-30b-a3b-down", 32768, 128, 768, 2048),
    GroupedShape("qwen3-30b-a3b-decode", 64, 128, 2048, 768, "silu", trains=False, everyday=False),
    GroupedShape("qwen3-30b-a3b-decode-down", 64, 128, 768, 2048, trains=False),
    *_quantized_shapes(),
)
