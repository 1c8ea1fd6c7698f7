"""The tile sizes of matmul: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles.targets import Target
from .spec import MatmulSpec


@dataclass(frozen=True)
class MatmulConfig:
    """An output tile of block_m by block_n, summed block_k at a time.

    group_m rows of tiles are walked together so that they share b in the L2 cache. group_m, num_warps and num_stages
    are for GPUs; TPU kernels do not read them.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 2


def choose_config(spec: MatmulSpec, target: Target) -> MatmulConfig:
    """Tiles for arrays of any size on that chip; kernels shrink a tile that is larger than its array."""
    if target.is_tpu:
        return MatmulConfig(512, 512, 512)
    if target.is_gpu:
        return MatmulConfig(128, 128, 64, num_warps=8)
    return MatmulConfig(32, 32, 32)  # interpreted: several tiles even in a small test
