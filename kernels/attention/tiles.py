"""The tile sizes of attention: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles.targets import Target
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


# By the width of a head on chip: (block_q, block_kv, num_warps, num_stages) of the forward, dk/dv and dq kernels. Each is
# the largest that compiles without spills, in any 16-bit type, causal or not.
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
        256: ((128, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
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
}


def _for_gpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    width = max(spec.head_dim, spec.v_dim)
    bucket = min(size for size in (64, 128, 256) if width <= size)
    if spec.dtype == "float32":
        # NVIDIA's tensor cores have no float32: its products run on the vector units, unrolled, from registers.
        tiles = AttentionTiles(32, 32, 4, 1)
        return AttentionConfig(tiles, tiles, tiles)
    return AttentionConfig(*(AttentionTiles(*tiles) for tiles in _GPU_TILES[target.name][bucket]))


def _for_tpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    """Scores of 256 queries by 1024 keys are the largest that the compiler keeps in registers between two products."""
    tiles = AttentionTiles(256, 1024)
    return AttentionConfig(tiles, tiles, tiles)
