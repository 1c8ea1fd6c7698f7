"""What the cycle model knows of each TPU: few constants, each with its source.

From data sheets: clocks, matrix units and, in `kernels/tiles/targets.py`, the bandwidth of HBM. Found in the compiler's
output: how many cycles run after a branch. Fitted, on the half of tokamax's measurements that `validation.py` calls
"fitted": `HBM_SHARE`, `HBM_LATENCY` and `PROGRAM_SECONDS`, once for all chips, and the clock of v7x.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosstile.kernels.tiles.targets import get_target

from .dma import Memory
from .machine import Delay
from .matrix import MatrixUnits

HBM_SHARE = 0.86  # of the published bandwidth, what copies reach
HBM_LATENCY = 1.2e-6  # seconds from the start of a copy to its last byte, beside the time of its bytes
PROGRAM_SECONDS = 1e-6  # between two programs that follow each other
ON_CHIP_BYTES_A_CYCLE = 200.0


@dataclass(frozen=True)
class Core:
    """One TensorCore.

    Attributes:
        clock: cycles a second.
        delay: cycles that still run after a branch.
        matrix: its matrix units.
    """

    target: str
    clock: float
    delay: Delay
    matrix: MatrixUnits

    @property
    def siblings(self) -> int:
        """Other cores of the same device, which share its HBM."""
        return get_target(self.target).siblings

    def memory(self, alone: bool) -> Memory:
        """The core's share of HBM, in cycles of its clock; all of it where the program leaves the other core idle."""
        bandwidth = get_target(self.target).bandwidth * 1e9 * (1 + self.siblings if alone else 1)
        return Memory(bandwidth * HBM_SHARE / self.clock, HBM_LATENCY * self.clock, ON_CHIP_BYTES_A_CYCLE)


# Clocks: v4, v5e and v5p from "How to Scale Your Model" (Austin et al., 2025); that of v6e is the one at which its
# matrix units reach the published peak. At those, peak = 2 * units * side**2 * rows a cycle * clock. v7x would need
# 2.2 GHz for its published peak; what was measured on it fits 1.72 GHz.
CORES = {
    core.target: core
    for core in (
        Core("v4", 1.05e9, Delay(1), MatrixUnits(4, 1, 1)),
        Core("v5e", 1.5e9, Delay(4), MatrixUnits(4, 1, 2)),
        Core("v5p", 1.75e9, Delay(4), MatrixUnits(4, 1, 2)),
        Core("v6e", 1.75e9, Delay(4), MatrixUnits(2, 2, 4)),
        Core("v7x", 1.72e9, Delay(6, packed=True), MatrixUnits(2, 2, 4)),
    )
}
