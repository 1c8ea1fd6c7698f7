"""The tile sizes of paged attention: what `config=` takes, the choice made without it, and into how many parts the keys
of a sequence are split.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles.targets import Target
from .spec import PagedAttentionSpec

_MOST_SPLITS = 128


@dataclass(frozen=True)
class PagedAttentionTiles:
    """Tiles of one kernel: block_rows pairs of a query and a head against block_kv keys at a time.

    Rows are the queries of all heads that share a key head. num_warps and num_stages are for GPUs; TPU kernels do not
    read them. A tile that is larger than its array is shrunk.
    """

    block_rows: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class PagedAttentionConfig:
    """Tiles where all rows of a sequence fit `decode.block_rows`, and tiles for more.

    programs is how many programs keep the chip busy: where there are fewer, sequences are split (GPU).
    """

    decode: PagedAttentionTiles
    prefill: PagedAttentionTiles
    programs: int = 1


CONFIG = PagedAttentionConfig


def split_count(programs: int, tiles: int, wanted: int) -> int:
    """Into how many parts to split the keys of every sequence, of `tiles` tiles at most, given so many programs.

    It depends on the sizes of arrays alone: each program divides the keys that its sequence has by it.
    """
    return max(1, min(-(-wanted // max(programs, 1)), tiles // 2, _MOST_SPLITS))


def choose_config(spec: PagedAttentionSpec, target: Target) -> PagedAttentionConfig:
    """Tiles for a cache of any size on that chip."""
    if target.is_tpu:
        return _for_tpu(spec, target)
    if target.is_gpu:
        return _for_gpu(spec, target)
    # Interpreted: several tiles and splits even in a short test.
    return PagedAttentionConfig(PagedAttentionTiles(16, 32), PagedAttentionTiles(32, 32), programs=12)


# By the width of a head on chip: (block_rows, block_kv, num_warps, num_stages) of decoding and of prefill. Large tiles,
# as long as the compiler spills no register, from pages of any dtype.
_GPU_TILES = {
    "sm_80": {
        64: ((64, 64, 4, 4), (128, 64, 8, 3)),
        128: ((64, 64, 4, 3), (128, 64, 8, 3)),
        256: ((64, 32, 4, 2), (64, 32, 8, 3)),
    },
    "sm_90": {
        64: ((64, 64, 4, 4), (128, 64, 4, 3)),
        128: ((64, 64, 4, 3), (64, 64, 4, 3)),
        256: ((64, 32, 4, 3), (64, 64, 8, 2)),
    },
    "sm_100": {
        64: ((64, 64, 4, 4), (128, 64, 8, 3)),
        128: ((64, 64, 4, 3), (128, 64, 8, 3)),
        256: ((64, 32, 4, 3), (64, 64, 8, 2)),
    },
    # Wider tiles of keys, pipelined, trip an assertion of LLVM's AMD back end.
    "gfx942": {
        64: ((64, 32, 4, 2), (128, 32, 4, 2)),
        128: ((64, 32, 4, 2), (64, 32, 4, 2)),
        256: ((32, 32, 4, 1), (64, 32, 4, 1)),
    },
    "gfx950": {
        64: ((64, 32, 4, 2), (128, 32, 4, 2)),
        128: ((64, 32, 4, 2), (64, 32, 4, 2)),
        256: ((32, 32, 4, 2), (64, 32, 4, 2)),
    },
    # Exact products of float32 run on NVIDIA's vector units, from whole rows in registers.
    "float32": {
        64: ((32, 32, 4, 2), (32, 32, 4, 1)),
        128: ((16, 16, 8, 2), (32, 32, 8, 1)),
        256: ((16, 16, 4, 1), (16, 16, 8, 1)),
    },
}
# The same of pages that are converted on their way, in registers.
_GPU_TILES_OF_QUANTIZED = {"sm_80": {128: ((64, 64, 4, 3), (128, 32, 8, 3))}}
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx950": 256}


def _for_gpu(spec: PagedAttentionSpec, target: Target) -> PagedAttentionConfig:
    name = "float32" if spec.dtype == "float32" else target.name
    table = _GPU_TILES[name]
    if spec.page_dtype != spec.dtype:
        table = {**table, **_GPU_TILES_OF_QUANTIZED.get(name, {})}
    width = max(spec.head_dim, spec.v_dim)
    decode, prefill = table[min(size for size in table if width <= size)]
    return PagedAttentionConfig(
        PagedAttentionTiles(*decode), PagedAttentionTiles(*prefill), programs=2 * _PROCESSORS[target.name]
    )


def _for_tpu(spec: PagedAttentionSpec, target: Target) -> PagedAttentionConfig:
    """A block of keys is what one round of copies brings; the kernel makes it smaller where VMEM asks for it.

    The more bandwidth, the more of it a block must be for its copies to last as long as what is done between them.
    """
    decode = 2048 if target.bandwidth > 1000 else 512  # GB/s
    return PagedAttentionConfig(PagedAttentionTiles(128, decode), PagedAttentionTiles(256, 512))
