"""The tile sizes of glu_matmul: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles.targets import Target
from .spec import GluMatmulSpec


@dataclass(frozen=True)
class GluMatmulTiles:
    """An output tile of block_m by block_n, summed block_k at a time.

    group_m rows of tiles are walked together so that they share the right operand in the L2 cache. group_m, num_warps
    and num_stages are for GPUs; TPU kernels do not read them.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True)
class GluMatmulConfig:
    """Tiles of each kernel's products, m, n and k as that product has them.

    forward and dw sum two products of the same left operand, in two tiles of float32 sums; dx sums two products in one.
    """

    forward: GluMatmulTiles
    dx: GluMatmulTiles
    dw: GluMatmulTiles


CONFIG = GluMatmulConfig
_T = GluMatmulTiles


def _alike(pair: GluMatmulTiles, dx: GluMatmulTiles) -> GluMatmulConfig:
    return GluMatmulConfig(forward=pair, dx=dx, dw=pair)


# Two tiles of sums take the place of a matmul's one: they are half as wide, and what is read for them is as much.
_NARROW = {
    "sm_80": _alike(_T(256, 64, 32, num_stages=4), _T(256, 128, 32, num_stages=4)),
    "sm_90": _alike(_T(128, 128, 64, num_stages=4), _T(128, 256, 64, num_stages=4)),
    "sm_100": _alike(_T(128, 128, 64, num_stages=4), _T(128, 256, 64, num_stages=4)),
    "gfx942": _alike(_T(256, 128, 64, num_stages=2), _T(256, 256, 64, num_stages=2)),
    "gfx950": _alike(_T(128, 128, 64, num_stages=2), _T(256, 128, 64, num_stages=2)),
    "v4": _alike(_T(512, 512, 512), _T(512, 1024, 256)),  # 16 MiB of VMEM
    "v5e": _alike(_T(1024, 512, 512), _T(1024, 1024, 256)),
    "v5p": _alike(_T(1024, 512, 512), _T(1024, 1024, 256)),
    "v6e": _alike(_T(2048, 512, 512), _T(2048, 1024, 256)),  # 560 operations a byte of memory
    "v7x": _alike(_T(1024, 512, 512), _T(1024, 1024, 256)),
}
_FLOAT32 = {
    "cuda": _alike(_T(128, 64, 16), _T(128, 128, 16)),
    "rocm": _alike(_T(128, 64, 16), _T(128, 128, 16, num_stages=2)),
    "tpu": _alike(_T(512, 512, 256), _T(512, 512, 256)),
}
_FLOAT32_V4 = _alike(_T(512, 256, 256), _T(512, 512, 256))
_INTERPRET = _alike(_T(32, 32, 32, num_warps=4), _T(32, 32, 32, num_warps=4))  # several tiles even in a small test


def choose_config(spec: GluMatmulSpec, target: Target) -> GluMatmulConfig:
    """Tiles for arrays of any size on that chip.

    Kernels shrink a tile that is larger than its array, and on GPUs one of arrays whose rows are not runs of 16.
    """
    if target.interpreted:
        return _INTERPRET
    if spec.dtype == "float32":
        return _FLOAT32_V4 if target.name == "v4" else _FLOAT32[target.platform]
    return _NARROW[target.name]
