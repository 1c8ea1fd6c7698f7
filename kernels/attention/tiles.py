"""The tile sizes of attention: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..tiles.targets import MIB, Target
from .spec import AttentionSpec

_FEW = 32  # rows of one product with the keys, at most
_KEYS_OF_FEW = 1024  # a megabyte of two heads' keys and values, of which a grid step brings some


@dataclass(frozen=True)
class AttentionTiles:
    """Tiles of one kernel: block_q queries against block_kv keys at a time.

    All but the blocks is for GPUs; TPU kernels do not read it, nor block_q where queries are few.

    Attributes:
        descriptors: 1: the chip's copy engine (TMA) loads the tiles of the sequence walked, where strides allow it.
        longest_first: 1: under a causal mask the longest tiles of all heads begin; 0: head follows head.
    """

    block_q: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 2
    descriptors: int = 0
    longest_first: int = 1


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of the forward kernel, of the dk/dv kernel and of the dq kernel."""

    forward: AttentionTiles
    dkv: AttentionTiles
    dq: AttentionTiles


CONFIG = AttentionConfig


class AttentionSizes(NamedTuple):
    """What the tuned tables know of a call's arrays; group is how many query heads share a key head.

    Lengths of packed sequences are their bounds.
    """

    q_len: int
    kv_len: int
    group: int


def sizes_of(spec: AttentionSpec, inputs: tuple[Any, ...]) -> AttentionSizes:
    """The sizes of canonical inputs."""
    (_, q_len, q_heads, _), (_, kv_len, kv_heads, _) = inputs[0].shape, inputs[1].shape
    if spec.max_seqlen_q is not None and spec.max_seqlen_k is not None:
        q_len, kv_len = spec.max_seqlen_q, spec.max_seqlen_k
    return AttentionSizes(q_len, kv_len, q_heads // max(1, kv_heads))


def kinds_of(spec: AttentionSpec) -> dict[str, Any]:
    """What of a spec the tuned tables match exactly."""
    return {
        **{name: getattr(spec, name) for name in ("dtype", "out_dtype", "head_dim", "v_dim", "causal")},
        "window": 0 if spec.left is None else 1 << max(0, spec.left).bit_length(),
        **{name: getattr(spec, name) is not None for name in ("score", "mask", "weight", "max_seqlen_q")},
        "plane_gradients": len(spec.plane_gradients),
        "dropout": spec.dropout > 0,
        "lengths": spec.has_lengths,
    }


def is_few(q_len: int, group: int) -> bool:
    """Whether the queries of the heads that share a key head are so few that a TPU waits for the keys alone."""
    return q_len * group <= _FEW


def choose_config(spec: AttentionSpec, target: Target, sizes: AttentionSizes | None = None) -> AttentionConfig:
    """Tiles for arrays of any length on that chip; kernels shrink a tile that is larger than its array."""
    if target.is_tpu:
        config = _for_tpu(spec, target)
        if sizes is not None and is_few(sizes.q_len, sizes.group):
            return replace(config, forward=replace(config.forward, block_kv=_KEYS_OF_FEW))
        return config
    if target.is_gpu:
        return _for_gpu(spec, target)
    small = AttentionTiles(32, 32)  # interpreted: several tiles even in a short test
    return AttentionConfig(small, replace(small, descriptors=1), small)


# By the width of a head on chip: (block_q, block_kv, num_warps, num_stages[, descriptors[, longest_first]]) of the
# forward, dk/dv and dq kernels. Large tiles, as long as the compiler spills no register, in both 16-bit types, causal
# or not; on sm_90 those that an H100 ran fastest, programs of 64 rows, two or three of which share a multiprocessor.
# Elsewhere heads up to 128 and 256 have those that the issue model ranks first (`docs/performance.md`).
_Table = dict[int, tuple[tuple[int, ...], ...]]
_Tables = dict[str, _Table]
_GPU_TILES: _Tables = {
    "sm_80": {
        64: ((128, 64, 4, 3), (64, 64, 8, 3), (128, 32, 4, 3)),
        128: ((128, 64, 8, 3), (64, 32, 4, 2), (128, 32, 8, 3)),
        192: ((128, 64, 8, 3), (16, 64, 8, 3), (64, 32, 8, 3)),
        256: ((64, 32, 8, 3), (32, 32, 8, 3), (64, 32, 8, 3)),
        512: ((64, 16, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
        576: ((32, 32, 8, 1), (16, 16, 8, 1), (32, 32, 8, 1)),
    },
    "sm_90": {
        64: ((64, 64, 4, 3), (64, 64, 4, 3, 1), (64, 64, 4, 3, 1)),
        128: ((64, 64, 4, 3), (64, 64, 4, 2, 1), (64, 64, 4, 2, 1)),
        192: ((128, 64, 8, 3), (16, 64, 4, 3), (64, 32, 4, 3)),
        256: ((128, 64, 8, 2, 1), (64, 32, 8, 3, 1), (64, 32, 4, 3, 1)),
        512: ((32, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
        576: ((32, 16, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1)),
    },
    "sm_100": {
        64: ((64, 128, 4, 2, 1), (64, 64, 4, 3, 1), (128, 64, 4, 3, 1)),
        128: ((64, 64, 4, 3, 1), (64, 128, 8, 3, 1), (128, 128, 8, 2, 1)),
        256: ((128, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
        512: ((32, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
        576: ((32, 16, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1)),
    },
    "gfx942": {
        64: ((128, 64, 4, 2), (64, 32, 4, 1), (32, 64, 4, 1)),
        128: ((128, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
        256: ((64, 32, 4, 1), (32, 16, 8, 1), (32, 32, 4, 1)),
        512: ((64, 16, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
        576: ((64, 16, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "gfx950": {
        64: ((128, 128, 4, 1), (32, 128, 4, 2), (32, 64, 4, 1)),
        128: ((128, 64, 4, 1), (64, 32, 4, 1), (32, 32, 8, 1)),
        256: ((64, 32, 4, 2), (32, 16, 8, 1), (64, 16, 4, 1)),
        512: ((64, 16, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1)),
        576: ((64, 16, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
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


# The same where expressions, planes, dropout, a window's left edge, lengths or packing need registers too. On AMD a
# mask takes a pair of scalar registers for every score of a thread, and there are 106: narrow tiles have few.
_GPU_TILES_OF_SCORES: _Tables = {
    "sm_80": {
        64: ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        128: ((128, 32, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2)),
    },
    "sm_90": {
        64: ((64, 64, 4, 3), (64, 64, 4, 2, 1), (64, 64, 4, 2, 1)),
        128: ((64, 64, 4, 3), (64, 64, 4, 2, 1, 0), (64, 64, 4, 2, 1)),
        256: ((128, 64, 8, 2, 1), (64, 32, 8, 3, 1), (128, 32, 8, 3, 1)),
    },
    "sm_100": {
        64: ((64, 64, 4, 3), (32, 64, 4, 2, 1), (64, 64, 4, 2, 1)),
        128: ((128, 64, 8, 3), (64, 128, 8, 2, 1), (64, 64, 4, 2, 1)),
    },
    "gfx942": {
        64: ((128, 16, 8, 2), (16, 64, 4, 2), (64, 16, 4, 1)),
        128: ((128, 16, 8, 2), (16, 64, 4, 2), (64, 32, 8, 1)),
        256: ((64, 16, 8, 1), (16, 32, 4, 1), (64, 16, 4, 1)),
    },
    "gfx950": {
        64: ((128, 16, 8, 2), (16, 64, 4, 2), (64, 16, 4, 1)),
        128: ((128, 16, 8, 2), (16, 64, 4, 2), (64, 32, 8, 1)),
        256: ((64, 16, 8, 1), (16, 32, 4, 2), (64, 16, 4, 1)),
    },
}

_SM_100_TIGHT: _Table = {
    64: ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    128: ((128, 64, 8, 3), (32, 64, 4, 2), (64, 64, 8, 2)),
}


# And where a mask of expressions, or dropout, needs still more.
_GPU_TILES_OF_MASKS: _Tables = {
    "sm_90": {128: ((64, 64, 4, 3), (32, 64, 4, 3, 1), (64, 64, 4, 2, 1))},
    "sm_100": _SM_100_TIGHT,
    "gfx950": {128: ((128, 16, 8, 2), (16, 64, 4, 2), (64, 16, 8, 1))},
}
# And where a plane has a gradient.
_GPU_TILES_OF_PLANES: _Tables = {
    "sm_90": dict.fromkeys((64, 128), ((64, 64, 4, 3), (32, 64, 4, 2, 1), (64, 64, 4, 2, 1))),
    "sm_100": _SM_100_TIGHT,
}


def _for_gpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    name = f"{target.platform} float32" if spec.dtype == "float32" else target.name
    table = _GPU_TILES[name]
    width = max(spec.head_dim, spec.v_dim)
    if (
        spec.dropout
        or spec.has_lengths
        or any(given is not None for given in (spec.score, spec.mask, spec.left, spec.max_seqlen_q))
    ):
        table = {**table, **_GPU_TILES_OF_SCORES.get(name, {})}
    if spec.dropout or spec.mask is not None:
        table = {**table, **_GPU_TILES_OF_MASKS.get(name, {})}
    if spec.plane_gradients:
        table = {**table, **_GPU_TILES_OF_PLANES.get(name, {})}
    if 192 in table and spec.v_dim > 128:  # heads of 192 are DeepSeek's, whose values are 128 wide
        width = max(width, 193)
    bucket = min(size for size in table if width <= size)
    return AttentionConfig(*(AttentionTiles(*tiles) for tiles in table[bucket]))


def _for_tpu(spec: AttentionSpec, target: Target) -> AttentionConfig:
    """Large tiles where scores are plain, by predicted cycles (`docs/performance.md`); else of what registers hold.

    What computes more of a score does so in loops within a tile, so that a large one would only be more code. One
    kernel computes the gradients of queries, keys and values, with the tiles of dk and dv, as the planes' kernels do.
    """
    width = max(spec.head_dim, spec.v_dim)
    plain = spec.score is None and spec.mask is None and spec.weight is None and not spec.dropout
    if spec.dtype == "float32":  # six passes a product: the smallest tiles spill least, though not nothing
        forward, backward = (128, 128), (128, 128)
    elif width > 256 or target.on_chip_bytes <= 16 * MIB:  # v4 has 32 vector registers, the others 64
        forward, backward = (128, 128), (128, 256)
    elif plain:
        most, square = 512 if spec.has_lengths else 1024, spec.right == 0
        most_keys = most if spec.max_seqlen_q is None else min(most, 512)  # the backward's sequences have lengths
        if spec.left is not None:  # what of a tile no window reaches is computed for nothing, but small tiles wait
            reach = 1 << max(0, spec.left + square).bit_length() >> 1
            most, most_keys = (min(size, max(reach, 512)) for size in (most, most_keys))
        # A diagonal cuts square tiles from corner to corner, and past it the backward computes nothing.
        forward, backward = (most, most), (most_keys if square else min(most_keys, 512), most_keys)
    elif width > 128:
        forward, backward = (128, 512), (128, 512)
        if target.matrix_unit == 256:
            forward, backward = (128, 256), (128, 128)
    elif target.matrix_unit == 256:
        forward, backward = (128, 512) if spec.mask is None else (128, 256), (128, 512)
    else:
        forward, backward = (128, 512), (128, 512)
    return AttentionConfig(AttentionTiles(*forward), AttentionTiles(*backward), AttentionTiles(*backward))
