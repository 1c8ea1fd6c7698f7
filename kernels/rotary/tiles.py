"""The tile sizes of rotary: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles.targets import KIB, MIB, Target
from .spec import RotarySpec


@dataclass(frozen=True)
class RotaryConfig:
    """A program takes block_length positions, and on a GPU block_heads heads of them; cos and sin serve them all.

    TPU kernels take all heads, and read block_length alone.
    """

    block_length: int
    block_heads: int = 8
    num_warps: int = 4


CONFIG = RotaryConfig

_INTERPRET = RotaryConfig(block_length=16, block_heads=2)  # several programs even in a small test
# Of half a head's tile: 8 a thread of cos, of sin and of each half. Of 16 ptxas for sm_100 spills none, of 8 some.
_ELEMENTS, _ELEMENTS_SM_100 = 1024, 2048


def choose_config(spec: RotarySpec, target: Target) -> RotaryConfig:
    """Tiles for arrays of any length on that chip; kernels shrink a tile that is larger than its array."""
    if target.interpreted:
        return _INTERPRET
    if target.is_tpu:
        item_bytes = 4 if spec.dtype == "float32" else 2
        room = (512 * KIB if target.on_chip_bytes <= 16 * MIB else MIB) * 2
        fitting = room // (item_bytes * spec.heads * spec.head_dim)
        return RotaryConfig(block_length=min(max(16, fitting // 16 * 16), 512))
    half = 1 << (spec.rotary_dim // 2 - 1).bit_length()
    elements = _ELEMENTS_SM_100 if target.name == "sm_100" else _ELEMENTS
    return RotaryConfig(min(max(1, elements // half), 64))
