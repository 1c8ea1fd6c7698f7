"""How a kernel of linear cross-entropy goes through its tiles on a TPU: in loops whose values fit the registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..tiles.pallas_tiles import LANES, SUBLANES, contract, few_registers, in_chunks, write_parts
from ..tiles.targets import Target

FEATURES_AT_ONCE = 512  # of a product of rows of hidden and weight
PART_PAIRS = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))  # of two float32, those with small products first


def multiply(
    hidden: tuple[Any, Any], weight: tuple[Any, Any], logits_ref: Any, columns: int, piece: tuple[int, int]
) -> None:
    """weight @ hidden^T, [vocab, tokens]: as many columns at a time as the matrix unit holds, and some features.

    The products of all features at once would be summed in registers, which they do not fit.
    """
    (hidden_ref, hidden_parts), (weight_ref, weight_parts) = hidden, weight

    def add(inner: Any) -> None:
        tokens, rows = (
            parts_of(ref.at[:, inner], parts, piece)
            for ref, parts in ((hidden_ref, hidden_parts), (weight_ref, weight_parts))
        )

        def multiply_columns(cols: Any) -> None:
            def product(p: Any, q: Any) -> jax.Array:
                return contract(rows(p)[...], tokens(q)[cols, :], (1, 1))

            add_products(logits_ref, cols, product, weight_parts is not None, inner.start == 0)

        in_chunks(logits_ref.shape[1], columns, multiply_columns)

    in_chunks(weight_ref.shape[1], FEATURES_AT_ONCE, add)


def add_products(
    sums_ref: Any, cols: Any, product: Callable[[Any, Any], jax.Array], in_parts: bool, first: Any
) -> None:
    """Add the product of two operands, or those of their parts, to some columns; the first time there is nothing there.

    A loop: all six together would be summed in the registers.
    """
    if not in_parts:
        sums_ref[:, cols] = product(0, 0) + jnp.where(first, 0, sums_ref[:, cols])
        return

    def add(number: Any, _: None) -> None:
        p, q = (sum(jnp.where(number == at, pair[side], 0) for at, pair in enumerate(PART_PAIRS)) for side in (0, 1))
        sums_ref[:, cols] = product(p, q) + jnp.where(first & (number == 0), 0, sums_ref[:, cols])

    lax.fori_loop(0, len(PART_PAIRS), add, None)


def parts_of(block_ref: Any, parts_ref: Any | None, piece: tuple[int, int]) -> Callable[[Any], Any]:
    """The block's parts by number: itself, or of float32 the three of which it is the sum (see `split_parts`)."""
    if parts_ref is None:
        return lambda part: block_ref
    height, width = block_ref.shape

    def split(cols: Any) -> None:
        over_rows(height, piece[0], lambda rows, _: write_parts(parts_ref, rows, cols, block_ref[rows, cols]), None)

    in_chunks(width, piece[1], split)
    return lambda part: parts_ref.at[part, :, :width]


def turn(from_ref: Any, to_ref: Any) -> None:
    """Transpose a tile, by squares as wide as a register: a product that does so itself spills."""

    def turn_columns(cols: Any) -> None:
        def turn_square(rows: Any) -> None:
            to_ref[cols, rows] = from_ref[rows, cols].T

        in_chunks(from_ref.shape[0], LANES, turn_square)

    in_chunks(from_ref.shape[1], LANES, turn_columns)


def cap(raw: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | float]:
    """The logits of raw products, and their slope."""
    if softcap is None:
        return raw, 1.0
    bent = jnp.tanh(raw * (1 / softcap))
    return bent * softcap, 1 - bent * bent


def whole_and_last(step: Any, steps: Any, block: int, size: int, run: Callable[[int], None]) -> None:
    """Run with the length of a step's block: the last one reads no further than the array goes."""
    tail = size % block
    if tail == 0:
        run(block)
    elif size < block:
        run(tail)
    else:
        pl.when(step < steps - 1)(lambda: run(block))
        pl.when(step == steps - 1)(lambda: run(tail))


def fold(tile: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """[rows, columns] reduced to the rows of one register, [8, columns]."""
    return reduce(tile.reshape(-1, SUBLANES, tile.shape[1]), axis=0)


def over_rows(size: int, piece: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carry something through a body of slices of that many rows, and of what is left; size is a multiple of 8."""

    def step(index: jax.Array, carry: Any) -> Any:
        return body(pl.ds(pl.multiple_of(index * piece, piece), piece), carry)

    if size >= piece:
        carry = lax.fori_loop(0, size // piece, step, carry)
    return body(pl.ds(size // piece * piece, size % piece), carry) if size % piece else carry


def columns_at_once(target: Target) -> int:
    """Columns of a product at a time: as many as the matrix unit holds."""
    return target.matrix_unit or 2 * LANES


def piece_of(target: Target) -> tuple[int, int]:
    """Rows and columns of an elementwise loop at a time: every value of the loop stays in registers."""
    return (16, 128) if few_registers(target) else (32, 256)
