"""The tile sizes of glu_matmul: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..tiles.targets import MIB, Target
from ..tiles.tpu_blocks import BLOCKS, best_tile, deepest_step, is_safe, shrunk_block, vmem_budget
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


class GluMatmulSizes(NamedTuple):
    """What the tuned tables know of a call's arrays."""

    m: int
    n: int
    k: int


def sizes_of(spec: GluMatmulSpec, inputs: tuple[Any, ...]) -> GluMatmulSizes:
    """The sizes of canonical inputs."""
    return GluMatmulSizes(inputs[0].shape[1], inputs[1].shape[2], inputs[0].shape[2])


def kinds_of(spec: GluMatmulSpec) -> dict[str, Any]:
    """What of a spec the tuned tables match exactly."""
    return {"dtype": spec.dtype, "activation": spec.activation}


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
}
_FLOAT32 = {
    "cuda": _alike(_T(128, 64, 16), _T(128, 128, 16)),
    "rocm": _alike(_T(128, 64, 16), _T(128, 128, 16, num_stages=2)),
    "tpu": _alike(_T(512, 512, 256), _T(512, 512, 256)),
}
_FLOAT32_V4 = _alike(_T(512, 256, 256), _T(512, 512, 256))
_INTERPRET = _alike(_T(32, 32, 32, num_warps=4), _T(32, 32, 32, num_warps=4))  # several tiles even in a small test


def choose_config(spec: GluMatmulSpec, target: Target, sizes: GluMatmulSizes | None = None) -> GluMatmulConfig:
    """Tiles for arrays of any size on that chip.

    Kernels shrink a tile that is larger than its array, and on GPUs one of arrays whose rows are not runs of 16.
    """
    if target.interpreted:
        return _INTERPRET
    if spec.dtype == "float32":
        return _FLOAT32_V4 if target.name == "v4" else _FLOAT32[target.platform]
    return _for_tpu(target, sizes) if target.is_tpu else _NARROW[target.name]


def _for_tpu(target: Target, sizes: GluMatmulSizes | None) -> GluMatmulConfig:
    """The best tile of each product of 16-bit types that fits the VMEM."""
    tokens, wide, features = sizes or (BLOCKS[0],) * 3
    step, rows = deepest_step(target, sizes or ())
    steps = {"forward": step, "dx": step // 2 if target.on_chip_bytes <= 16 * MIB else step, "dw": step}
    most = {"forward": (tokens, wide), "dx": (tokens, features), "dw": (features, wide)}

    def tiles(part: str) -> GluMatmulTiles:
        def needed(m: int, n: int) -> int:
            return _tpu_bytes(part, m, n, steps[part])

        limits = min(most[part][0], rows), most[part][1]
        return _T(*best_tile(target, needed, limits, lefts=2 if part == "dx" else 1, rights=2), steps[part])

    return GluMatmulConfig(tiles("forward"), tiles("dx"), tiles("dw"))


def _tpu_bytes(part: str, m: int, n: int, k: int) -> int:
    """VMEM of a product of 16-bit types: its blocks twice, since the next is fetched meanwhile, its sums, its results.

    Results are out and both preactivations of the forward, dx, and both gradients of the weights.
    """
    if part == "forward":
        return 4 * (m + 2 * n) * k + 20 * m * n
    if part == "dx":
        return 8 * (m + n) * k + 8 * m * n
    return 4 * (m + 2 * n) * k + 16 * m * n + 2 * m * k  # the left operand is turned round


def fits(spec: GluMatmulSpec, target: Target, config: GluMatmulConfig, sizes: GluMatmulSizes) -> bool:
    """Whether a TPU's VMEM holds the tiles of every product of 16-bit types, and they spill nothing."""
    if not target.is_tpu or spec.dtype == "float32":
        return True
    tokens, wide, features = sizes
    products = {
        "forward": (tokens, wide, features),
        "dx": (tokens, features, wide),
        "dw": (features, wide, tokens),
    }
    for part, product in products.items():
        tiles = getattr(config, part)
        blocks = (tiles.block_m, tiles.block_n, tiles.block_k)
        m, n, k = (shrunk_block(block, size) for block, size in zip(blocks, product, strict=True))
        if _tpu_bytes(part, m, n, k) > vmem_budget(target) or not is_safe(target, m, k, product[2]):
            return False
    return True
