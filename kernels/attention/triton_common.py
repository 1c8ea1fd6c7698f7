"""What the launches of the attention kernels for GPUs share: numbers and constants made of a call's arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton

from ..tiles.expressions import SCORE, const, derivative
from ..tiles.launch import Array
from ..tiles.philox import threshold
from ..tiles.triton_expressions import constant, score_constant, slots
from ..tiles.triton_tiles import copies_apart, head_columns, needs_wide_offsets, padded
from .spec import INPUTS, AttentionInputs, AttentionSpec
from .tiles import AttentionTiles

ITEM_BYTES = {"float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4}
PLANE_AXES = ("batch", "head", "row", "column")
_SHARED = 8 << 20  # numbers of 16 bits, in less than half of an A100's L2 cache
_MOST_PROGRAMS = 65535  # along the second and the third axis of a grid


def arrays_of(inputs: AttentionInputs) -> dict[str, Array]:
    """Those that there are, by name."""
    return {name: array for name, array in zip(INPUTS, inputs, strict=True) if array is not None}


def names_of(arrays: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The names as a launch takes them: "" for an array that is not there."""
    return tuple(name if name in arrays else "" for name in names)


def strides_of(**arrays: Array | None) -> dict[str, int]:
    """The strides of arrays [batch, row, head, column] or [batch, head, row] as the kernels name them; absent: 0."""
    strides: dict[str, int] = {}
    for name, array in arrays.items():
        axes = ("batch", "row", "head", "column") if array and len(array.shape) == 4 else ("batch", "head", "row")
        strides |= {f"{name}_{axis}": array.strides[i] if array else 0 for i, axis in enumerate(axes)}
    return strides


def sink_strides(inputs: AttentionInputs) -> dict[str, int | float | None]:
    """Those of the sinks [batch, head]."""
    batch, head = (None, None) if inputs.sinks is None else inputs.sinks.strides
    return {"sinks_batch": batch, "sinks_head": head}


def score_numbers(spec: AttentionSpec, inputs: AttentionInputs) -> dict[str, int | float | None]:
    """What the kernels know of sizes, scale and planes by number; None where a plane does not vary.

    Without an expression of the score the scale goes into the exponent, and scores stay as the product left them.
    """
    numbers: dict[str, int | float | None] = {
        "score_scale": None if spec.score is None and spec.mask is None else spec.softmax_scale,
        "q_size": inputs.q.shape[1],
        "kv_size": inputs.k.shape[1],
        "sequences": None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1,
    }
    for slot, array in enumerate(inputs.planes):
        for axis, name in enumerate(PLANE_AXES):
            varies = array is not None and slot in _read(spec) and array.shape[axis] != 1
            numbers[f"plane{slot}_{name}"] = array.strides[axis] if varies else None
    return numbers


def score_constants(spec: AttentionSpec, inputs: AttentionInputs) -> dict[str, Any]:
    """What the kernels are built for beside the sizes of a head."""
    return {
        "Q_LENGTHS": inputs.q_lengths is not None,
        "KV_LENGTHS": inputs.kv_lengths is not None,
        "PACKED": inputs.cu_seqlens_q is not None,
        "LEFT": spec.left,
        "RIGHT": spec.right,
        "SCORE": score_constant(spec.score),
        "MASK": None if spec.mask == const(True) else constant(spec.mask),
        "SLOTS": _read(spec),
        "DROPOUT": threshold(spec.dropout) if spec.dropout else None,
    }


def slope_of(spec: AttentionSpec, variable: tuple[Any, ...] = SCORE) -> tuple[Any, ...] | None:
    """The derivative of the score as a kernel's constant; None for 1."""
    slope = const(1.0 if variable == SCORE else 0.0) if spec.score is None else derivative(spec.score, variable)
    return None if slope == const(1.0) else constant(slope)


def size_constants(
    spec: AttentionSpec, tiles: AttentionTiles, inputs: AttentionInputs, *others: Array
) -> dict[str, Any]:
    """The sizes of heads and tiles."""
    planes = [inputs.planes[slot] for slot in _read(spec)]
    return {
        "GROUP": inputs.q.shape[2] // max(inputs.k.shape[2], 1),
        "HEAD_DIM": spec.head_dim,
        "V_DIM": spec.v_dim,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "WIDE": wide(max(tiles.block_q, tiles.block_kv), *inputs[:3], *others),
        "WIDE_PLANES": needs_wide_offsets(
            (tiles.block_q, tiles.block_kv, plane.strides[2], plane.strides[3]) for plane in planes
        ),
    }


def by_descriptors(tiles: AttentionTiles, *walked: Array) -> bool:
    """Whether the copy engine loads tiles of these arrays: each head one tile wide, its rows runs at 16 bytes."""

    def allows(array: Array) -> bool:
        batch, *between, column = (stride * ITEM_BYTES[array.dtype] for stride in array.strides)
        apart = all(map(copies_apart, between))
        whole = head_columns(array.shape[3]) == array.shape[3]
        return array.aligned and whole and column == ITEM_BYTES[array.dtype] and apart and batch % 16 == 0

    return bool(tiles.descriptors) and all(map(allows, walked))


def by_addresses(constants: Mapping[str, Any]) -> dict[str, Any]:
    """What of a kernel's constants changes where nobody gives it memory for descriptors: see `Launch`."""
    return {"DESCRIPTORS": False} if constants["DESCRIPTORS"] else {}


def wide(rows: int, *arrays: Array) -> bool:
    """Whether offsets inside a tile of that many rows of any of the arrays need 64 bits."""
    return needs_wide_offsets((rows, padded(array.shape[3]), array.strides[1], array.strides[3]) for array in arrays)


def programs(spec: AttentionSpec, tiles: AttentionTiles, inputs: AttentionInputs, by_keys: bool) -> tuple[int, ...]:
    """The grid of a kernel whose programs own a tile of keys each, or of queries.

    Packed sequences each begin a tile of their own, and so does what lies past the last: a tile more for each.

    Under a causal mask work grows towards one end of a sequence, and a program that begins late and takes long leaves
    the others idle. The grid then has three axes, (heads together, tiles, more heads), and chips go along the first
    before the second: one tile of all heads, then the next. Together are as many heads as find in the L2 cache what
    they read of the other sequence.
    """
    (batch, q_size, q_heads, _), (_, kv_size, kv_heads, _) = inputs.q.shape, inputs.k.shape
    size, block, heads, read = q_size, tiles.block_q, q_heads, kv_size * kv_heads
    if by_keys:
        size, block, heads, read = kv_size, tiles.block_kv, kv_heads, q_size * q_heads
    count, pairs = triton.cdiv(size, block), heads * batch
    if inputs.cu_seqlens_q is not None:
        count += inputs.cu_seqlens_q.shape[0]
    if tiles.longest_first and spec.right is not None and spec.left is None and pairs:
        numbers = max(1, read * (spec.head_dim + spec.v_dim) // heads)
        most = min(pairs, max(1, _SHARED // numbers))
        together = next(divisor for divisor in range(most, 0, -1) if pairs % divisor == 0)
        if max(count, pairs // together) <= _MOST_PROGRAMS:
            return (together, count, pairs // together)
    return (count * pairs,)


def checked(tiles: AttentionTiles, name: str) -> AttentionTiles:
    """The tiles, or an error that names the one that no kernel can have."""
    for field, size in (("block_q", tiles.block_q), ("block_kv", tiles.block_kv)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"config.{name}.{field}: got {size}; it must be a power of two, and 16 or more on a GPU")
    return tiles


def _read(spec: AttentionSpec) -> tuple[int, ...]:
    return slots(spec.score, spec.mask, spec.weight)
