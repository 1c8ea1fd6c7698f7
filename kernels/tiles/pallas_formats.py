"""Quantised weights in TPU kernels: codes to numbers, in VMEM. `formats.py` says what the formats are.

Bytes come as int8, which every generation's compiler takes: `as_int8` changes no bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .formats import E8M0_NAN, FORMATS, HALF
from .pallas_tiles import LANES, few_registers, in_pieces, write_parts
from .targets import Target

ROWS = 32  # of bytes, which fill a register's sublanes: codes are turned into numbers so many rows at least at a time


def as_int8(array: jax.Array) -> jax.Array:
    """Packed codes and e8m0 scales as signed bytes; other arrays as they are."""
    if array.dtype != jnp.uint8:
        return array
    return lax.bitcast_convert_type(array, jnp.int8)


def numbers_of(codes: jax.Array, zeros: jax.Array | None, name: str, high: bool = False) -> jax.Array:
    """What a tile of codes stands for before the scale, in float32; high: the high halves of bytes.

    zeros broadcast to the tile.
    """
    if FORMATS[name].mantissa is not None and not FORMATS[name].packed:
        return codes.astype(jnp.float32)
    codes = codes.astype(jnp.int32)
    if FORMATS[name].packed:
        codes = (codes >> 4 if high else codes) & 15
    if name == "mxfp4":
        magnitude = codes & 7
        # Twice the value is linear in the code between powers of two, and convex.
        doubled = jnp.maximum(magnitude, jnp.maximum(2 * magnitude - 4, 4 * magnitude - 16)).astype(jnp.float32)
        return jnp.where(codes >= 8, -0.5, 0.5) * doubled
    if zeros is not None:
        codes = codes - (zeros.astype(jnp.int32) & (15 if name == "int4" else -1))
    elif name == "int4":
        codes = codes - 8
    return codes.astype(jnp.float32)


def scale_of(stored: jax.Array, name: str) -> jax.Array:
    """Scales as they are stored, in float32."""
    if not FORMATS[name].block_scales:
        return stored.astype(jnp.float32)
    byte = stored.astype(jnp.int32) & 255
    special = jnp.where((byte == 0) | (byte == E8M0_NAN), 1 << 22, 0)
    return lax.bitcast_convert_type((byte << 23) | special, jnp.float32)


def code_piece(target: Target) -> tuple[int, int]:
    """Rows and columns that are turned into numbers at a time.

    Few enough that what lies between fits v4's registers. With more the rows of a piece are scheduled one after the
    other, and the more there are, the less often the units wait for the next piece to begin.
    """
    if target.interpreted:
        return 64, 512
    return (ROWS, LANES) if few_registers(target) else (8 * ROWS, 2 * LANES)


def chunks(rows: int, name: str, group_size: int) -> Iterator[tuple[int, int, int, bool, int]]:
    """(first row, rows, row of codes, high half, group) of the parts of a tile of weights that one row scales."""
    packed = FORMATS[name].packed
    size = group_size or (HALF if packed else rows)
    for first in range(0, rows, size):
        code_row = first // (2 * HALF) * HALF + first % HALF if packed else first
        yield first, min(size, rows - first), code_row, packed and first % (2 * HALF) >= HALF, first // size


def dequantise(
    values_ref: Any,
    scales_ref: Any | None,
    zeros_ref: Any | None,
    parts_ref: Any,
    name: str,
    group_size: int,
    piece: tuple[int, int],
) -> None:
    """Write a tile of weights, [rows, columns] of as many parts as parts_ref has; without scales_ref before the scale.

    scales and zeros are [groups, columns] of the tile's rows.
    """
    for first, size, code_row, high, group in chunks(parts_ref.shape[1], name, group_size):
        row = group if group_size else 0
        if scales_ref is not None and row >= scales_ref.shape[0]:
            continue  # rows that only pad a block of bytes

        def write(
            rows: Any, cols: Any, first: int = first, code_row: int = code_row, high: bool = high, row: int = row
        ) -> None:
            codes = values_ref[_moved(rows, code_row), cols]
            zeros = None if zeros_ref is None else zeros_ref[row : row + 1, cols]
            weights = numbers_of(codes, zeros, name, high)
            if scales_ref is not None:
                weights = weights * scale_of(scales_ref[row : row + 1, cols], name)
            write_parts(parts_ref, _moved(rows, first), cols, weights)

        in_pieces((size, parts_ref.shape[2]), piece, write)


def _moved(rows: Any, by: int) -> Any:
    """The same rows of a later chunk; chunks begin at multiples of 32."""
    if isinstance(rows.start, int):
        return pl.ds(rows.start + by, rows.size)
    return pl.ds(pl.multiple_of(rows.start + by, ROWS), rows.size)
