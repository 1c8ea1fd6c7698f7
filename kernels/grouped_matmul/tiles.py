"""The tile sizes of grouped_matmul: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..tiles.formats import FORMATS
from ..tiles.targets import MIB, Target
from ..tiles.tpu_blocks import shrunk_block, vmem_budget
from .spec import GroupedMatmulSpec


@dataclass(frozen=True)
class GroupedMatmulTiles:
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
class GroupedMatmulConfig:
    """Tiles of each kernel's products, m, n and k as that product has them.

    The rows of a group are m in forward and dlhs, and k in drhs. With a gate forward and drhs sum two products of the
    same left operand, in two tiles of float32 sums; dlhs sums two products in one.

    Quantised matrices have no drhs, and in their dlhs block_k counts columns of the result, and block_n is what a step
    sums: a block of the matrix is [block_k, block_n] both ways. On GPUs block_k then counts rows of codes, of which two
    codes a byte are two of k each, and a step stays within a group of k that has one scale, whatever block_k.
    """

    forward: GroupedMatmulTiles
    dlhs: GroupedMatmulTiles
    drhs: GroupedMatmulTiles


CONFIG = GroupedMatmulConfig


class GroupedMatmulSizes(NamedTuple):
    """What the tuned tables know of a call's arrays; rows are those of a group, on average."""

    rows: int
    groups: int
    n: int
    k: int


def sizes_of(spec: GroupedMatmulSpec, inputs: tuple[Any, ...]) -> GroupedMatmulSizes:
    """The sizes of canonical inputs."""
    _, tokens, k = inputs[0].shape
    groups, n = inputs[1].shape[1], inputs[1].shape[3]
    return GroupedMatmulSizes(tokens // max(1, groups), groups, n, k)


def kinds_of(spec: GroupedMatmulSpec) -> dict[str, Any]:
    """What of a spec the tuned tables match exactly."""
    return {name: getattr(spec, name) for name in ("dtype", "activation", "format", "group_size")}


_T = GroupedMatmulTiles


def _config(
    one: GroupedMatmulTiles,
    two: GroupedMatmulTiles,
    drhs_one: GroupedMatmulTiles | None = None,
    drhs_two: GroupedMatmulTiles | None = None,
) -> dict[bool, GroupedMatmulConfig]:
    """For the product alone (False) and with the gate (True), of the tiles of one sum and of two."""
    alone, gated = drhs_one or one, drhs_two or two
    return {False: GroupedMatmulConfig(one, one, alone), True: GroupedMatmulConfig(two, one, gated)}


def _quantized(
    one: GroupedMatmulTiles, two: GroupedMatmulTiles, dlhs: GroupedMatmulTiles
) -> dict[bool, GroupedMatmulConfig]:
    return {False: GroupedMatmulConfig(one, dlhs, one), True: GroupedMatmulConfig(two, dlhs, two)}


# Two tiles of sums take the place of one: they are half as wide, and what is read for them is as much. A group's last
# tile is partly empty, so that tiles are not as high as a matmul's. A TPU keeps a block of a matrix in VMEM while the
# visits of its group follow each other if there is one step along k: hence the long steps.
_NARROW = {
    "sm_80": _config(_T(128, 128, 64), _T(128, 64, 64)),
    "sm_90": _config(_T(128, 256, 64, num_stages=4), _T(128, 128, 64, num_stages=4)),
    "sm_100": _config(_T(128, 256, 64, num_stages=4), _T(128, 128, 64, num_stages=4)),
    "gfx942": _config(_T(128, 256, 64, num_stages=2), _T(128, 128, 64, num_stages=2)),
    "gfx950": _config(_T(128, 256, 64, num_stages=2), _T(128, 128, 64, num_stages=2)),
    "v4": _config(_T(512, 1024, 512), _T(512, 512, 512), _T(1024, 512, 512), _T(512, 512, 512)),  # 16 MiB of VMEM
    **dict.fromkeys(
        ("v5e", "v5p", "v6e"),
        _config(_T(512, 1024, 4096), _T(512, 512, 4096), _T(2048, 1024, 512), _T(2048, 1024, 512)),
    ),
    "v7x": _config(_T(512, 1024, 4096), _T(512, 512, 4096), _T(1024, 1024, 512), _T(1024, 1024, 512)),
}
_FLOAT32 = {
    "cuda": _config(_T(128, 128, 16), _T(128, 64, 16)),
    "rocm": _config(_T(128, 128, 16, num_stages=2), _T(128, 64, 16)),
    "tpu": _config(_T(512, 512, 256), _T(512, 512, 256)),
}
_FLOAT32_V4 = _config(_T(512, 512, 256), _T(512, 256, 256))
# A tile of codes is turned into numbers once for all rows of a tile; sums, numbers and codes share the registers.
_QUANTIZED = {
    "sm_80": _quantized(_T(128, 128, 64), _T(128, 64, 64), _T(128, 64, 32, num_warps=4)),
    "sm_90": _quantized(_T(128, 128, 64), _T(128, 64, 64), _T(128, 64, 64)),
    "sm_100": _quantized(_T(128, 128, 64), _T(128, 64, 64), _T(128, 64, 64, num_warps=4)),
    "gfx942": _quantized(
        _T(128, 128, 64, num_stages=2), _T(128, 64, 64, num_warps=4, num_stages=2), _T(128, 32, 32, num_stages=2)
    ),
    "gfx950": _quantized(_T(128, 128, 64, num_stages=2), _T(128, 64, 64, num_stages=2), _T(128, 32, 32, num_stages=2)),
    "v4": _quantized(_T(512, 512, 1024), _T(512, 256, 1024), _T(512, 512, 512)),  # 16 MiB of VMEM
    **dict.fromkeys(
        ("v5e", "v5p", "v6e", "v7x"), _quantized(_T(512, 1024, 2048), _T(512, 512, 2048), _T(512, 1024, 1024))
    ),
}
_PACKED_ON_SM_80 = _quantized(  # two tiles of numbers at a time
    _T(64, 128, 32, num_warps=4), _T(64, 32, 32, num_warps=4), _T(64, 64, 32, num_warps=4)
)
_QUANTIZED_FLOAT32 = {
    "cuda": _quantized(_T(64, 64, 16), _T(64, 64, 16), _T(64, 32, 32)),
    "rocm": _quantized(_T(64, 64, 16), _T(64, 64, 16), _T(64, 32, 32)),
    "tpu": _quantized(_T(512, 512, 512), _T(256, 256, 512), _T(512, 256, 256)),
}
_INTERPRET = _config(*[_T(16, 32, 32, num_warps=4)] * 2)  # several tiles even in a small test


def choose_config(
    spec: GroupedMatmulSpec, target: Target, sizes: GroupedMatmulSizes | None = None
) -> GroupedMatmulConfig:
    """Tiles for arrays of any size on that chip.

    Kernels shrink a tile that is larger than its array, and on GPUs one that is higher than a group is on average, or
    whose arrays' rows are not runs of 16.
    """
    if target.interpreted:
        tiles = _INTERPRET
    elif spec.format is not None:
        tiles = _for_format(spec, target)
        if target.on_chip_bytes > 16 * MIB and target.is_tpu and sizes is not None and spec.dtype != "float32":
            return _summed_at_once(tiles[spec.activation is not None], spec, target, sizes)
    elif spec.dtype == "float32":
        tiles = _FLOAT32_V4 if target.name == "v4" else _FLOAT32[target.platform]
    else:
        tiles = _NARROW[target.name]
        if target.is_tpu and sizes is not None:
            return _widened(tiles[spec.activation is not None], spec, target, sizes)
    return tiles[spec.activation is not None]


def _widened(
    config: GroupedMatmulConfig, spec: GroupedMatmulSpec, target: Target, sizes: GroupedMatmulSizes
) -> GroupedMatmulConfig:
    """Tiles of one sum with the columns and the steps along k of which the VMEM holds those that read least."""
    gated = spec.activation is not None
    forward, dlhs = config.forward, config.dlhs
    if not gated:
        forward = _reading_least(forward, target, sizes.rows, sizes.n, sizes.k, 1)
    return replace(config, forward=forward, dlhs=_reading_least(dlhs, target, sizes.rows, sizes.k, sizes.n, 1 + gated))


def _summed_at_once(
    config: GroupedMatmulConfig, spec: GroupedMatmulSpec, target: Target, sizes: GroupedMatmulSizes
) -> GroupedMatmulConfig:
    """Tiles of quantised matrices with one step a sum, where the VMEM holds it: a group's codes become numbers once."""
    products = 1 + (spec.activation is not None)
    columns = 4 * (target.matrix_unit or 128)  # as many products as are scheduled together

    def fitting(tiles: GroupedMatmulTiles, length: int, lefts: int, rights: int) -> tuple[int, int] | None:
        """Rows and columns of a tile with whole sums."""
        candidates = [(m, n // products) for m in (tiles.block_m, tiles.block_m // 2) for n in (columns, columns // 2)]
        fits = (one for one in candidates if _quantized_bytes(*one, length, lefts, rights) <= vmem_budget(target))
        return next(fits, None)

    forward, dlhs, k, n = config.forward, config.dlhs, _up_to_tiles(sizes.k), _up_to_tiles(sizes.n)
    if found := fitting(forward, k, 1, products):
        forward = replace(forward, block_m=found[0], block_n=found[1], block_k=k)
    if found := fitting(dlhs, n, products, products):
        dlhs = replace(dlhs, block_m=found[0], block_k=found[1], block_n=n)
    return replace(config, forward=forward, dlhs=dlhs)


def _up_to_tiles(size: int) -> int:
    return -(-size // 128) * 128


def _quantized_bytes(m: int, n: int, k: int, lefts: int, rights: int) -> int:
    """VMEM of a product with codes of 8 bits: blocks twice, as the next is fetched meanwhile, numbers, and sums."""
    return 4 * lefts * m * k + (2 + 2) * rights * k * n + (4 * (2 * rights - 1) + 4 * rights) * m * n


def _reading_least(
    tiles: GroupedMatmulTiles, target: Target, rows: int, columns: int, length: int, products: int
) -> GroupedMatmulTiles:
    """Tiles of 16-bit types for so many rows a group and columns, with so many products summed over that length."""
    whole = -(-length // tiles.block_k) * tiles.block_k
    candidates = [
        replace(tiles, block_n=times * tiles.block_n, block_k=step)
        for times in (1, 2, 4)
        for step in (tiles.block_k, whole)
        if times == 1 or times * tiles.block_n < 2 * columns
    ]
    fitting = [
        one
        for one in candidates
        if _tpu_bytes(one.block_m, one.block_n, min(one.block_k, length), products, products) <= vmem_budget(target)
    ]
    return min(fitting, key=lambda one: _read(one, rows, columns, length), default=tiles)


def _read(tiles: GroupedMatmulTiles, rows: int, columns: int, length: int) -> float:
    """Elements that a group reads of each k.

    Its rows are read for each tile of columns; its matrix for each tile of rows, or once where a step is the whole sum.
    """
    # A group begins somewhere within a tile.
    visits = rows / tiles.block_m + 1
    return visits * tiles.block_m * -(-columns // tiles.block_n) + columns * (1 if tiles.block_k >= length else visits)


def _tpu_bytes(m: int, n: int, k: int, lefts: int, rights: int, results: int = 1, sums: int = 1) -> int:
    """VMEM of a product of 16-bit types: blocks and results twice, as the next is fetched meanwhile, and sums."""
    return 4 * (lefts * m + rights * n) * k + 4 * results * m * n + 4 * sums * m * n


def fits(spec: GroupedMatmulSpec, target: Target, config: GroupedMatmulConfig, sizes: GroupedMatmulSizes) -> bool:
    """Whether a TPU's VMEM holds the tiles of every product of 16-bit types, of groups of any size."""
    if not target.is_tpu or spec.dtype == "float32" or spec.format is not None:
        return True
    two = 1 + (spec.activation is not None)
    forward, dlhs, drhs = config.forward, config.dlhs, config.drhs
    k, n = sizes.k, sizes.n
    needed = (
        _tpu_bytes(forward.block_m, *_shrunk(forward, n, k), 1, two, 2 * two - 1, two),  # both products are kept
        _tpu_bytes(dlhs.block_m, *_shrunk(dlhs, k, n), two, two),
        _tpu_bytes(shrunk_block(drhs.block_m, k), shrunk_block(drhs.block_n, n), drhs.block_k, 1, two, two, two),
    )
    return max(needed) <= vmem_budget(target)


def _shrunk(tiles: GroupedMatmulTiles, columns: int, length: int) -> tuple[int, int]:
    return shrunk_block(tiles.block_n, columns), shrunk_block(tiles.block_k, length)


def _for_format(spec: GroupedMatmulSpec, target: Target) -> dict[bool, GroupedMatmulConfig]:
    if spec.dtype == "float32":
        return _QUANTIZED_FLOAT32[target.platform]
    if target.name == "sm_80" and FORMATS[spec.format or ""].packed:
        return _PACKED_ON_SM_80
    return _QUANTIZED[target.name]
