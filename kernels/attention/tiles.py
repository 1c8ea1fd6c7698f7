"""The tile sizes of attention: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles.targets import MIB, Target
from .spec import AttentionSpec


@dataclass(frozen=True)
class AttentionTiles:
    """Tiles of one kernel: block_q queries against block_kv keys at a time.

    num_warps and num_stages are for GPUs; TPU kernels do not read them.
    """

    block_q: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of the forward kernel, of the dk/dv kernel and of the dq kernel."""

    forward: AttentionTiles
    dkv: AttentionTiles
    dq: AttentionTiles


CONFIG = AttentionConfig


def choose_config(spec: AttentionSpec, target: Target) -> AttentionConfig:
    """Tiles for arrays of any length on that chip; kernels shrink a tile that is larger than its array."""
    if target.is_tpu:
        return _for_tpu(spec, target)
    if target.is_gpu:
        return _for_gpu(spec, target)
    small = AttentionTiles(32, 32)  # interpreted: several tiles even in a short test
    return AttentionConfig(small, small, small)


# By the width of a head on chip: (block_q, block_kv, num_warps, num_stages) of the forward, dk/dv and dq kernels. Large
# tiles, as long as the compiler spills no register, in both 16-bit types, causal or not.
_GPU_TILES = {
    "sm_80": {
        64: ((128, 64, 4, 3), (32, 128, 8, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 3), (32, 64, 4, 2), (128, 32, 8, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "sm_90": {
        64: ((128, 128, 8, 3), (64, 128, 8, 2), (128, 128, 8, 2)),
        128: ((128, 128, 8, 2), (32, 128, 8, 2), (128, 64, 8, 3)),
        256: ((128, 32, 8, 2), (16, 64, 8, 2), (64, 32, 8, 2)),
    },
    "sm_100": {
        64: ((128, 128, 8, 3), (64, 128, 8, 2), (128, 128, 8, 2)),
        128: ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        256: ((128, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    },
    "gfx942": {
        64: ((128, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)),
        128: ((128, 32, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
        256: ((64, 32, 4, 1), (16, 32, 4, 1), (64, 16, 4, 1)),
    },
    "gfx950": {
        64: ((128, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)),
        128: ((128, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
        256: ((64, 32, 4, 2), (32, 32, 4, 1), (64, 16, 4, 1)),
    },
    # NVIDIA's tensor cores have no float32: exact products run on the vector units, from whole rows in registers.
    "cuda float32": {
        64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        128: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "rocm float32": {
        64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        256: ((32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}


def _for_gpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    table = _GPU_TILES[f"{target.platform} float32" if spec.dtype == "float32" else target.name]
    width = max(spec.head_dim, spec.v_dim)
    bucket = min(size for size in table if width <= size)
    return AttentionConfig(*(AttentionTiles(*tiles) for tiles in table[bucket]))


def _for_tpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    """Long tiles of keys against few queries: scores of one part of a tile stay in registers between two products.

    VMEM of 16 MiB (v4) does not hold the longest with the widest heads. One kernel computes all gradients, with the
    tiles of dk and dv.
    """
    row_bytes = max(spec.head_dim, spec.v_dim) * (4 if spec.dtype == "float32" else 2)
    tiles = AttentionTiles(256, 512 if target.on_chip_bytes <= 16 * MIB and row_bytes > 512 else 1024)
    return AttentionConfig(tiles, tiles, tiles)
