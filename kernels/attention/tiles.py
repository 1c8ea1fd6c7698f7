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


def choose_config(spec: AttentionSpec, target: Target) -> AttentionConfig:
    """Tiles for arrays of any length on that chip; kernels shrink a tile that is larger than its array."""
    if target.is_tpu:
        return _for_tpu(spec, target)
    if target.is_gpu:
        return _for_gpu(spec, target)
    small = AttentionTiles(32, 32)  # interpreted: several tiles even in a short test
    return AttentionConfig(small, small, small)


def _for_gpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    tiles = AttentionTiles(64, 64)
    return AttentionConfig(tiles, tiles, tiles)


def _for_tpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    tiles = AttentionTiles(512, 512)
    return AttentionConfig(tiles, tiles, tiles)
