"""The tile sizes of a matmul with a quantised weight: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..tiles.targets import Target
from .spec import QuantizedMatmulSpec

FEW = 64  # rows of a with which the reading of the weight takes longer than its products
_RESIDENT = 2  # programs of such a product that a processor runs at once
_LEAST_STEPS = 4  # of a part of a sum: less would not fill the pipeline of loads


@dataclass(frozen=True)
class QuantizedMatmulTiles:
    """An output tile of block_m by block_n, summed block_k rows of the weight's codes at a time.

    Two codes a byte are two of k to a row. On a GPU a step stays within a group of k that has one scale, whatever
    block_k. group_m rows of tiles are walked together so that they share the weight in the L2 cache. A tile shrinks to
    its array, of rows to least_m at least. group_m, num_warps, num_stages and least_m are for GPUs.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 2
    least_m: int = 16


@dataclass(frozen=True)
class QuantizedMatmulConfig:
    """The tiles of the forward, of one of at most 64 rows, and of `da = dz @ w^T`.

    Attributes:
        forward: of many rows.
        few: of at most 64.
        da: here block_k counts the columns of the result, and block_n is what a step sums.
        splits: into how many parts every sum along k is cut; 0: where tiles are few, as many as keep the chip busy.
        processors: how many programs the chip runs at a time; 0: not known, then splits 0 is 1.
    """

    forward: QuantizedMatmulTiles
    few: QuantizedMatmulTiles
    da: QuantizedMatmulTiles
    splits: int = 0
    processors: int = 0


CONFIG = QuantizedMatmulConfig
_T = QuantizedMatmulTiles


# A tile of weights is turned into numbers once for all rows of a tile, which are therefore many; the float32 sums, the
# numbers and the codes on their way share the registers (no spills, every format), or a TPU's VMEM. With few rows the
# tiles keep as many bytes of the weight on their way as the memory needs to be busy. An H100 chose those of sm_90.
_WEIGHTS = {
    "sm_80": QuantizedMatmulConfig(
        _T(128, 128, 64, num_warps=8, num_stages=3), _T(32, 64, 128, num_stages=4), _T(128, 64, 32)
    ),
    "sm_90": QuantizedMatmulConfig(
        _T(128, 128, 64, num_warps=8, num_stages=3), _T(64, 64, 128, num_stages=4), _T(256, 32, 64, num_stages=4)
    ),
    "sm_100": QuantizedMatmulConfig(
        _T(128, 128, 64, num_warps=8, num_stages=3), _T(64, 64, 128, num_stages=4), _T(128, 64, 64)
    ),
    "gfx942": QuantizedMatmulConfig(_T(128, 128, 64, num_warps=8), _T(64, 64, 64), _T(128, 64, 64, num_warps=8)),
    "gfx950": QuantizedMatmulConfig(_T(128, 128, 64, num_warps=8), _T(64, 64, 64), _T(128, 32, 64, num_warps=8)),
    "v4": QuantizedMatmulConfig(_T(512, 512, 512), _T(64, 512, 512), _T(512, 512, 512)),  # 16 MiB of VMEM
    "v5e": QuantizedMatmulConfig(_T(1024, 1024, 512), _T(64, 1024, 1024), _T(1024, 512, 512)),
    "v5p": QuantizedMatmulConfig(_T(1024, 1024, 512), _T(64, 1024, 1024), _T(1024, 512, 512)),
    "v6e": QuantizedMatmulConfig(_T(1024, 1024, 512), _T(64, 2048, 512), _T(1024, 512, 512)),
    "v7x": QuantizedMatmulConfig(_T(1024, 1024, 512), _T(64, 1024, 1024), _T(1024, 512, 512)),
}
_OF_BLOCKS = {"da": _T(256, 64, 64, num_warps=8, num_stages=3)}
_PACKED_ON_SM_80 = {"forward": _T(64, 128, 32, num_stages=3)}  # two tiles of numbers at a time beside mma's operands
_OF_FORMAT: dict[tuple[str, str], dict[str, Any]] = {  # what differs
    ("sm_80", "int4"): _PACKED_ON_SM_80,
    ("sm_80", "mxfp4"): _PACKED_ON_SM_80,
    ("sm_90", "int4"): {"forward": _T(128, 128, 32, num_stages=3), "da": _T(128, 64, 64, num_warps=8, num_stages=3)},
    ("sm_90", "mxfp4"): _OF_BLOCKS,
    ("sm_90", "mxfp8"): _OF_BLOCKS,
}
_BYTES_WITHOUT_GROUPS_ON_SM_90 = _T(128, 128, 64, num_stages=3)
_LEAST_ROWS = {  # of a tile of codes by codes: fewer are none that these chips' instructions for them multiply
    ("sm_90", "int8"): 64,
    ("sm_90", "float8_e4m3fn"): 64,
    ("sm_100", "int8"): 64,
    ("sm_100", "float8_e4m3fn"): 64,
    ("sm_100", "mxfp8"): 128,
}
_FLOAT32_GPU = QuantizedMatmulConfig(
    _T(64, 64, 16, num_warps=8, num_stages=3), _T(64, 64, 64, num_stages=3), _T(64, 32, 32, num_warps=8)
)
_FLOAT32_TPU = QuantizedMatmulConfig(_T(512, 512, 256), _T(64, 512, 256), _T(512, 256, 256))
_INTERPRET = QuantizedMatmulConfig(  # several tiles even in a small test
    _T(32, 32, 32), _T(16, 32, 32), _T(32, 32, 32), processors=5
)


def choose_config(spec: QuantizedMatmulSpec, target: Target) -> QuantizedMatmulConfig:
    """Tiles for arrays of any size on that chip; kernels shrink a tile that is larger than its array."""
    if target.interpreted:
        return _INTERPRET
    if spec.dtype == "float32":
        return replace(_FLOAT32_TPU if target.is_tpu else _FLOAT32_GPU, processors=target.processors)
    changes = _OF_FORMAT.get((target.name, spec.format), {})
    config = replace(_WEIGHTS[target.name], processors=target.processors, **changes)
    if (target.name, spec.format) == ("sm_90", "int8") and not spec.group_size:
        config = replace(config, forward=_BYTES_WITHOUT_GROUPS_ON_SM_90)
    if spec.a_format is not None and target.is_gpu:
        least = _LEAST_ROWS.get((target.name, spec.a_format), 16)
        return replace(
            config, forward=_T(128, 128, 128, num_warps=8, num_stages=3), few=_T(max(64, least), 64, 256, least_m=least)
        )
    return config


def splits_of(config: QuantizedMatmulConfig, tiles: int, steps: int) -> int:
    """Into how many parts the sum of each tile is cut along k, none of them empty."""
    if config.splits:
        return max(1, min(config.splits, steps))
    if not tiles:
        return 1
    return max(1, min(_RESIDENT * config.processors // tiles, steps // _LEAST_STEPS))
