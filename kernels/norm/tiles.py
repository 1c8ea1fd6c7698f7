"""The tile sizes of the norms: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles.targets import KIB, Target
from .spec import NormSpec


@dataclass(frozen=True)
class NormConfig:
    """How many rows, of how many columns, are worked on at a time.

    A GPU program holds whole rows in registers where a row is no longer than block_cols, and walks longer ones. The
    gradients of weight and bias are summed by at most `partials` programs, each over rows of its own, and then over
    these. A TPU kernel always has whole rows in VMEM and reads block_rows alone.
    """

    block_rows: int
    block_cols: int = 4096
    partials: int = 256
    num_warps: int = 4


CONFIG = NormConfig

_INTERPRET = NormConfig(block_rows=16, block_cols=512, partials=3)  # several programs even in a small test
_TPU_BLOCK = {"v4": 256 * KIB}  # bytes of a block; there are at most eight, double buffers counted, beside the sums
_ELEMENTS = 1024  # that a warp holds of a row: 32 registers a thread of NVIDIA's for the row, half of them on AMD
_LONGEST = 8192  # a row that a GPU program holds; its backward holds six arrays of it
# Programs that sum gradients: two to each multiprocessor, so that loads of one cover the sums of the other.
_PARTIALS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608, "gfx950": 512}


def choose_config(spec: NormSpec, target: Target) -> NormConfig:
    """Tiles for rows of that length on that chip; kernels shrink a tile that is larger than its array."""
    if target.interpreted:
        return _INTERPRET
    if target.is_tpu:
        item_bytes = 4 if spec.dtype == "float32" else 2
        fitting = _TPU_BLOCK.get(target.name, 1024 * KIB) // (item_bytes * max(1, spec.hidden))
        return NormConfig(block_rows=min(max(16, fitting // 16 * 16), 512))
    width = 1 << max(spec.hidden - 1, 0).bit_length()
    block_cols = min(width, _LONGEST)
    num_warps = min(max(1, block_cols // _ELEMENTS * 2), 16)
    return NormConfig(max(1, 1024 // block_cols), block_cols, _PARTIALS[target.name], max(num_warps, 2))
