"""Where each named shape can at best land on each chip: predicted from the datasheets, never measured.

The roofline (Williams et al., 2009): a kernel that moves B bytes for F operations runs at most at
`min(peak, F / B * bandwidth)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from crosstile.kernels.tiles.targets import TARGETS, Target

from .shape import Shape
from .shapes import SHAPES


@dataclass(frozen=True)
class Bound:
    """The most that one shape's forward can reach on one chip.

    Attributes:
        intensity: operations per byte that must move.
        tflops: 1e12 operations a second, at most.
        microseconds: at least.
        limit: "compute" or "memory".
    """

    target: str
    shape: Shape
    intensity: float
    tflops: float
    microseconds: float
    limit: str


def bound(shape: Shape, target: Target, dtype: str = "bfloat16") -> Bound:
    """The roofline of one shape on one chip; the peak is that of bfloat16 and float16."""
    moved = shape.bytes(dtype)
    by_compute, by_memory = shape.flops / target.bf16_tflops / 1e6, moved / target.bandwidth / 1e3
    microseconds = max(by_compute, by_memory)
    limit = "compute" if by_compute >= by_memory else "memory"
    return Bound(target.name, shape, shape.flops / moved, shape.flops / microseconds / 1e6, microseconds, limit)


def bounds(targets: Sequence[Target] = tuple(TARGETS.values()), shapes: Sequence[Shape] | None = None) -> list[Bound]:
    """Every shape on every chip; without `shapes` the everyday ones."""
    if shapes is None:
        shapes = [shape for shape in SHAPES if shape.everyday]
    return [bound(shape, target) for target in targets for shape in shapes]


def show(found: Sequence[Bound], console: Console) -> None:
    """The table, labelled as what it is."""
    table = Table(
        title="predicted from datasheets: the most a forward can reach, bfloat16", box=None, title_justify="left"
    )
    for heading in ("target", "op", "shape"):
        table.add_column(heading)
    for heading in ("ops/byte", "TFLOP/s ≤", "µs ≥", "limit"):
        table.add_column(heading, justify="right")
    for item in found:
        table.add_row(
            item.target,
            item.shape.op,
            item.shape.name,
            f"{item.intensity:.0f}",
            f"{item.tflops:.1f}",
            f"{item.microseconds:.1f}",
            item.limit,
        )
    console.print(table)
