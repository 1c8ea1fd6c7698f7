"""The tile sizes of matmul: what `config=` takes, the choice made without it, and how a product is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..tiles.targets import Target
from ..tiles.tpu_blocks import BLOCKS, best_tile, deepest_step, is_safe, shrunk_block, vmem_budget
from .spec import MatmulSpec

SKINNY = 64  # products of so few rows are limited by how fast b is read
_MOST_RESIDENT = 8  # programs of a small tile that a processor runs at once
_LEAST_STEPS = 4  # of a part of a sum: less would not fill the pipeline of loads
_ADDING, _ADDING_SKINNY = 1536, 768  # what adding up the parts costs, as a length of k that takes as long


@dataclass(frozen=True)
class MatmulConfig:
    """An output tile of block_m by block_n, summed block_k at a time.

    Attributes:
        block_m: rows of a tile. Kernels shrink a tile that is larger than its array.
        block_n: columns of a tile.
        block_k: how much of k is multiplied in one step.
        group_m: rows of tiles that are walked together so that they share b in the L2 cache. This and all below but the
            skinny tile are for GPUs.
        num_warps: of a program.
        num_stages: of the pipeline that loads tiles ahead.
        skinny_n: block_n of a product of at most 64 rows; 0: as of others.
        skinny_k: block_k of such a product; 0: as of others.
        split_k: 1 never cuts a sum along k, more cuts every sum into so many parts, as far as k is long enough; 0: cuts
            where tiles are so few, or so few are left for the last round, that it pays.
        processors: how many programs the chip runs at a time; 0: not known, then split_k 0 is 1.
        persistent: 1: no more programs than processors, each of which walks many tiles and loads the next while it
            stores one.
        descriptors: 1: the chip's copy engine (TMA) loads tiles, and stores results, where strides allow it.
        specialize: 1: warps of their own load and multiply, beside those that store (sm_100).
        matrix_size: rows and columns of what one instruction multiplies on AMD's chips, 16 or 32; 0: the compiler's
            choice.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 2
    skinny_n: int = 0
    skinny_k: int = 0
    split_k: int = 0
    processors: int = 0
    persistent: int = 0
    descriptors: int = 0
    specialize: int = 0
    matrix_size: int = 0


CONFIG = MatmulConfig


class MatmulSizes(NamedTuple):
    """What the tuned tables know of a call's arrays; few are rows that make a product skinny."""

    batch: int
    m: int
    n: int
    k: int
    few: bool
    bias: bool
    residual: bool


def sizes_of(spec: MatmulSpec, inputs: tuple[Any, ...]) -> MatmulSizes:
    """The sizes of canonical inputs."""
    a, b, bias, residual = inputs
    batch, m, k = a.shape
    return MatmulSizes(batch, m, b.shape[2], k, m <= SKINNY, bias is not None, residual is not None)


def kinds_of(spec: MatmulSpec) -> dict[str, Any]:
    """What of a spec the tuned tables match exactly."""
    return {name: getattr(spec, name) for name in ("dtype", "out_dtype", "activation", "precision")}


_C = MatmulConfig


# Chosen so that the matrix units, not the memory, are the limit, and the tile's float32 sums stay on the chip: in
# registers (no spills, every epilogue), in sm_100's tensor memory, or in a TPU's VMEM beside double-buffered blocks
# (`_for_tpu` takes larger ones where they fit). Skinny tiles keep as many bytes of b on their way as the memory needs
# to be busy; on a TPU a step brings so many of them that what the step itself costs is small beside the copy.
_NARROW = {
    "sm_80": _C(128, 128, 32, num_warps=4, num_stages=4, skinny_n=128, skinny_k=128),
    "sm_90": _C(128, 256, 64, num_warps=8, num_stages=4, skinny_n=128, skinny_k=128, persistent=1, descriptors=1),
    "sm_100": _C(
        128, 256, 64, num_warps=8, num_stages=4, skinny_n=128, skinny_k=128, persistent=1, descriptors=1, specialize=1
    ),
    "gfx942": _C(256, 256, 64, num_warps=8, skinny_n=128, skinny_k=128, matrix_size=16),
    "gfx950": _C(256, 128, 64, num_warps=8, skinny_n=128, skinny_k=128, matrix_size=16),
    "v4": _C(512, 1024, 512, skinny_n=2048, skinny_k=512),  # 16 MiB of VMEM
    "v5e": _C(1024, 1024, 512, skinny_n=1024, skinny_k=2048),
    "v5p": _C(1024, 1024, 512, skinny_n=1024, skinny_k=2048),
    "v6e": _C(2048, 1024, 512, skinny_n=4096, skinny_k=1024),  # 560 operations a byte of memory
    "v7x": _C(1024, 1024, 512, skinny_n=4096, skinny_k=1024),
}
_FLOAT32 = {
    "sm_80": _C(128, 128, 16, num_warps=8, num_stages=3, skinny_n=64, skinny_k=32),
    **dict.fromkeys(("sm_90", "sm_100"), _C(128, 128, 32, num_warps=8, num_stages=3, skinny_n=64, skinny_k=64)),
    **dict.fromkeys(("gfx942", "gfx950"), _C(128, 128, 16, num_warps=8, num_stages=3, skinny_n=64, skinny_k=64)),
    "v4": _C(512, 512, 256, skinny_n=512, skinny_k=512),
    **dict.fromkeys(("v5e", "v5p", "v6e", "v7x"), _C(512, 512, 256, skinny_n=1024, skinny_k=1024)),
}
_INTERPRET = _C(32, 32, 32, processors=5, persistent=1, descriptors=1)  # several tiles even in a small test


def choose_config(spec: MatmulSpec, target: Target, sizes: MatmulSizes | None = None) -> MatmulConfig:
    """Tiles for arrays of those sizes on that chip, or of any."""
    if target.interpreted:
        return _INTERPRET
    tiles = _FLOAT32 if spec.dtype == "float32" else _NARROW
    config = replace(tiles[target.name], processors=target.processors)
    return config if spec.dtype == "float32" or not target.is_tpu else _for_tpu(spec, target, config, sizes)


def _for_tpu(spec: MatmulSpec, target: Target, config: MatmulConfig, sizes: MatmulSizes | None) -> MatmulConfig:
    """The best tile that fits with the call's epilogue, or any that there may be."""
    most, lengths = ((BLOCKS[0],) * 2, ()) if sizes is None else (sizes[1:3], sizes[1:4])
    step, rows = deepest_step(target, lengths)  # a backward sums along m and n
    tile = best_tile(target, lambda m, n: _tpu_bytes(spec, m, n, step, sizes), (min(most[0], rows), most[1]))
    return replace(config, block_m=tile[0], block_n=tile[1], block_k=step)


def _tpu_bytes(spec: MatmulSpec, m: int, n: int, k: int, sizes: MatmulSizes | None) -> int:
    """VMEM of a product of 16-bit types: its blocks twice, since the next is fetched meanwhile, and its sums.

    Beside the result there may be a residual, and the preactivation that a backward reads. A backward turns a round.
    """
    result = 4 if spec.out_dtype == "float32" else 2
    residual, bias = (2, 2) if sizes is None else (2 * sizes.residual, 2 * sizes.bias)
    forward = 2 * m * n * (result + residual + 2 * (spec.activation is not None)) + 2 * 16 * n * bias
    return max(2 * 2 * (m + n) * k + 4 * m * n + forward, _tpu_bytes_backward(m, n, k))


def _tpu_bytes_backward(m: int, n: int, k: int) -> int:
    return 2 * 2 * (m + n) * k + 4 * m * n + 2 * m * n * 2 + 2 * m * k


def fits(spec: MatmulSpec, target: Target, config: MatmulConfig, sizes: MatmulSizes) -> bool:
    """Whether a TPU's VMEM holds the tiles of all three products of 16-bit types, and they spill nothing."""
    if not target.is_tpu or spec.dtype == "float32" or sizes.m <= SKINNY:
        return True
    products = (sizes.m, sizes.n, sizes.k), (sizes.m, sizes.k, sizes.n), (sizes.k, sizes.n, sizes.m)
    for number, product in enumerate(products):
        blocks = (config.block_m, config.block_n, config.block_k)
        m, n, k = (shrunk_block(block, size) for block, size in zip(blocks, product, strict=True))
        needed = _tpu_bytes_backward(m, n, k) if number else _tpu_bytes(spec, m, n, k, sizes)
        if needed > vmem_budget(target) or not is_safe(target, m, k, product[2]):
            return False
    return True


def of_rows(config: MatmulConfig, m: int) -> MatmulConfig:
    """The tiles of a product of m rows."""
    if m > SKINNY or not (config.skinny_n or config.skinny_k):
        return config
    return replace(
        config,
        block_n=config.skinny_n or config.block_n,
        block_k=config.skinny_k or config.block_k,
        num_warps=min(config.num_warps, 4),
        persistent=0,  # several small programs beside each other hide each other's stores
        descriptors=0,
        specialize=0,
    )


def shrunk(config: MatmulConfig, m: int, block_m: int, block_n: int, steps: int) -> MatmulConfig:
    """The configuration for a tile that shrank to block_m by block_n, of sums of so many steps.

    Of small tiles a processor holds several, if it is not given stages that it has no steps for.
    """
    times = config.block_m * config.block_n // (block_m * block_n)
    resident = min(2 * times, _MOST_RESIDENT) if m > SKINNY and times > 1 else 1
    return replace(
        config,
        block_m=block_m,
        block_n=block_n,
        num_warps=min(config.num_warps, max(4, config.num_warps // times)),
        num_stages=min(config.num_stages, max(2, steps)),
        processors=config.processors * resident,
        specialize=config.specialize if times == 1 else 0,
    )


def parts_of_sums(config: MatmulConfig, m: int, tiles: int, steps: int) -> tuple[int, int]:
    """(whole, parts): the first tiles, whose sums are whole, and into how many parts the sum of each other is cut.

    The processors take tiles in rounds. Those of the last round, which would leave processors idle, are cut along k so
    that every processor has a part (as the hybrid schedules of Osama et al., arXiv:2301.03598, do), if the time that
    it saves is more than it takes to add the parts.
    """
    if config.split_k:
        parts = _even_parts(steps, config.split_k)
        return (tiles, 1) if parts == 1 else (0, parts)
    left = tiles % config.processors if config.processors else 0
    if not left:
        return tiles, 1
    parts = _even_parts(steps, min(config.processors // left, steps // _LEAST_STEPS))
    adding = (_ADDING_SKINNY if m <= SKINNY else _ADDING) // config.block_k
    saved = steps - -(-steps // parts) - adding
    rounds = tiles // config.processors + 1
    if saved * 10 < rounds * steps:  # less than a tenth of all
        return tiles, 1
    return tiles - left, parts


def _even_parts(steps: int, parts: int) -> int:
    """No more than that, and none of them empty."""
    parts = max(1, min(parts, steps))
    return -(-steps // -(-steps // parts)) if steps else 1
