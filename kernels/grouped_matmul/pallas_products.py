"""What the TPU kernels of grouped_matmul share: products and results of the rows of a group, and memory for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_activations import activate
from ..tiles.pallas_tiles import LANES, LOW_PRODUCTS, PRODUCTS_AT_ONCE, contract, in_chunks, in_pieces
from ..tiles.targets import Target

# How much of k one product takes, by the columns of a matrix unit: each product begins and ends with units that wait.
DEEP = {128: 1024, 256: 4096}
DEEP_OF_PARTS = 512  # and of float32, in parts


def add_product(
    totals: tuple[Any, Any | None],
    lefts: list[Any],
    rights: list[Any],
    right_axis: int,
    begins: Any,
    columns: int,
    length: int,
    rows: Any = slice(None),
) -> None:
    """Add a product over the first `length` of k to those rows' sums, or begin them; float32 operands come in parts.

    The products of the lower parts have sums of their own: those of an infinity are NaN, and do not count. Numbers that
    bfloat16 has are one part.
    """
    sums_ref, low_ref = totals

    def add(total_ref: Any, pair: tuple[int, int], cols: Any, inner: Any, begins: Any) -> None:
        right = rights[pair[1]][cols, inner] if right_axis else rights[pair[1]][inner, cols]
        product = contract(lefts[pair[0]][rows, inner], right, (1, right_axis))
        total_ref[rows, cols] = product + jnp.where(begins & (inner.start == 0), 0, total_ref[rows, cols])

    # As many columns at a time as the matrix unit holds, and a loop for each pair of parts: a whole tile's products,
    # or those of all pairs, would not fit the registers.
    def add_all(total_ref: Any, pair: tuple[int, int], begins: Any) -> None:
        step = columns if low_ref is None else _even(sums_ref.shape[1], columns)
        deep = _even(length, DEEP[columns] if low_ref is None else DEEP_OF_PARTS)
        at_once = 1 if low_ref is not None else PRODUCTS_AT_ONCE

        def add_deep(inner: Any) -> None:
            in_chunks(sums_ref.shape[1], step, lambda cols: add(total_ref, pair, cols, inner, begins), at_once)

        in_chunks(length, deep, add_deep)

    add_all(sums_ref, (0, 0), begins)
    pairs = [pair for pair in LOW_PRODUCTS if pair[1] < len(rights)] if low_ref is not None else []
    for index, pair in enumerate(pairs):
        add_all(low_ref, pair, begins & (index == 0))


def in_rows_of_group(
    block: tuple[Any, int], group: tuple[Any, Any], shared: int, multiply: Callable[..., None]
) -> None:
    """Multiply a block that groups share, which is visited for each, where it has rows of the group.

    block: its first row, and how many it has; group: from which row to which. shared: rows of a piece, which is
    multiplied whole or not at all.
    """
    (begin, size), (first, end) = block, group
    whole = (first <= begin) & (begin + size <= end)

    def if_any(rows: Any) -> None:
        pl.when((begin + rows.start < end) & (begin + rows.start + rows.size > first))(lambda: multiply(rows=rows))

    if shared >= size:
        multiply()
    else:
        pl.when(whole)(multiply)
        pl.when(~whole)(lambda: in_chunks(size, shared, if_any))


def rows_of_piece(target: Target) -> int:
    """Rows of a shared block that are multiplied whole or not at all: with fewer the matrix units wait for columns."""
    return 8 if target.interpreted else LANES


def finish_rows_of_group(
    shape: tuple[int, int], begin: Any, group: tuple[Any, Any], piece: tuple[int, int], finish: Callable[..., None]
) -> None:
    """Finish the pieces of a block at row `begin` that have rows of the group.

    finish takes rows, columns, and a column that says which of the rows are the group's, or None for all.
    """
    size, (first, end) = shape[0], group
    whole = (first <= begin) & (begin + size <= end)

    def some(rows: Any, cols: Any) -> None:
        row = begin + rows.start + lax.broadcasted_iota(jnp.int32, (rows.size, 1), 0)
        finish(rows, cols, (row >= first) & (row < end))

    def strip(number: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(number * piece[0], piece[0]), piece[0])
        in_chunks(shape[1], piece[1], lambda cols: some(rows, cols))

    def part() -> None:
        if size % piece[0]:
            in_pieces(shape, piece, some)
        else:
            of_end = lax.div(jnp.minimum(end - begin, size) + piece[0] - 1, piece[0])
            lax.fori_loop(lax.div(jnp.maximum(first - begin, 0), piece[0]), of_end, strip, None)

    pl.when(whole)(lambda: in_pieces(shape, piece, lambda rows, cols: finish(rows, cols, None)))
    pl.when(~whole)(part)


def store_piece(
    out_ref: Any,
    kept_ref: Any | None,
    at: tuple[Any, Any],
    found: list[jax.Array],
    activation: str | None,
    seen: jax.Array | None,
) -> None:
    """Write the rows that are seen, None for all, of a piece of the result, gated if there is an activation.

    Where products are kept, both are written beside it.
    """

    def put(ref: Any, value: jax.Array) -> None:
        kept = value if seen is None else jnp.where(seen, value, ref[...].astype(jnp.float32))
        ref[...] = kept.astype(ref.dtype)

    put(out_ref.at[at], found[0] if activation is None else activate(activation, found[0]) * found[1])
    if kept_ref is not None:
        for half in (0, 1):
            put(kept_ref.at[half, *at], found[half])


def _even(size: int, most: int) -> int:
    """The largest step of whole registers that divides the size, so that all are of one loop; else the most."""
    return next((step for step in range(most, LANES - 1, -LANES) if size % step == 0), most)


def total(sums: list[Any], lows: list[Any] | None, place: int, rows: Any, cols: Any) -> jax.Array:
    """A piece of a finished product."""
    found: jax.Array = sums[place][rows, cols]
    if lows is None:
        return found
    low = lows[place][rows, cols]
    return found + jnp.where(jnp.isnan(low), 0, low)


def set_zero(ref: Any, rows: Any, cols: Any) -> None:
    """Write zeros to a piece."""
    ref[rows, cols] = jnp.zeros_like(ref[rows, cols])


def scratch(
    dtype: Any,
    tile: tuple[int, int],
    left: tuple[int, int],
    right: tuple[int, int],
    products: int,
    always: bool = False,
) -> list[Any]:
    """Memory for the sums of the products, for those of the lower parts, and for the parts of left and right.

    float32 operands have three parts, of bfloat16. Others have none, or always one, as they are.
    """
    sums = [pltpu.VMEM(tile, jnp.float32) for _ in range(products)]
    if dtype == jnp.float32:
        return [sums, sums, pltpu.VMEM((3, *left), jnp.bfloat16), pltpu.VMEM((3, *right), jnp.bfloat16)]
    if always:
        return [sums, None, pltpu.VMEM((1, *left), dtype), pltpu.VMEM((1, *right), dtype)]
    return [sums, None, None, None]
