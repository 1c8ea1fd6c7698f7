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


CONFIG = MatmulConfig


# Chosen so that the matrix units, not the memory, are the limit, and the tile's float32 sums stay on the chip: in
# registers (no spills, every epilogue), in sm_100's tensor memory, or in a TPU's VMEM beside double-buffered blocks.
_NARROW = {
    "sm_80": MatmulConfig(128, 256, 64, num_warps=8, num_stages=3),
    "sm_90": MatmulConfig(128, 256, 64, num_warps=8, num_stages=4),
    "sm_100": MatmulConfig(128, 256, 64, num_warps=8, num_stages=4),
    "gfx942": MatmulConfig(256, 256, 64, num_warps=8),
    "gfx950": MatmulConfig(256, 128, 64, num_warps=8),
    "v4": MatmulConfig(512, 1024, 512),  # 16 MiB of VMEM
    "v5e": MatmulConfig(1024, 1024, 512),
    "v5p": MatmulConfig(1024, 1024, 512),
    "v6e": MatmulConfig(2048, 1024, 512),  # 560 operations a byte of memory
    "v7x": MatmulConfig(1024, 1024, 512),
}
_FLOAT32_GPU = MatmulConfig(128, 128, 16, num_warps=8, num_stages=3)
_FLOAT32_TPU = MatmulConfig(512, 512, 256)
_INTERPRET = MatmulConfig(32, 32, 32)  # several tiles even in a small test


def choose_config(spec: MatmulSpec, target: Target) -> MatmulConfig:
    """Tiles for arrays of any size on that chip; kernels shrink a tile that is larger than its array."""
    if target.interpreted:
        return _INTERPRET
    if spec.dtype == "float32":
        return _FLOAT32_TPU if target.is_tpu else _FLOAT32_GPU
    return _NARROW[target.name]
