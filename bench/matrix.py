"""How long the matrix units of a TPU core are at work in a stretch of bundles, and what the core loses to them.

A unit takes in one row of the left side a cycle, or two where it is 256 wide, whatever the compiler thought: the
schedule of a v5e issues products of 16 rows every 13 cycles, and the chip holds them back. A product of rows that the
unit kept (`lmr`) is half a product: so says XLA's own program for a shape, which has two in the place of each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from .bundles import Program

_PRODUCT = re.compile(r"vmatmul(?:\.(?:mubr|msk|low|high|(lmr)))*\.(\w+?)\b.*\.mxu(\d)")
_ROWS = {"f32": 8, "bf16": 16, "f16": 16}  # of one register; 32 of dtypes of one byte
_NARROW_ROWS = 32


@dataclass(frozen=True)
class MatrixUnits:
    """The matrix units of a core.

    Attributes:
        count: how many there are.
        rows_a_cycle: of float32, bfloat16 and float16; `narrow_rows_a_cycle` of dtypes of one byte.
    """

    count: int
    rows_a_cycle: float
    narrow_rows_a_cycle: float

    def work(self, program: Program, first: int, end: int) -> Mapping[str, float]:
        """Cycles that each unit needs for the products of these bundles, by its number."""
        busy: defaultdict[str, float] = defaultdict(float)
        for bundle in program.bundles[first:end]:
            for instruction in bundle:
                if instruction.op.startswith("vmatmul") and (match := _PRODUCT.match(instruction.op)):
                    kept, dtype, unit = match.groups()
                    busy[unit] += self._cycles(dtype) / (2 if kept else 1)
        return busy

    def _cycles(self, dtype: str) -> float:
        if dtype in _ROWS:
            return _ROWS[dtype] / self.rows_a_cycle
        return _NARROW_ROWS / self.narrow_rows_a_cycle

    def stalls(self, program: Program, first: int, end: int) -> float:
        """Cycles by which the busiest unit needs more than the bundles take."""
        return max(0.0, max(self.work(program, first, end).values(), default=0.0) - (end - first))
