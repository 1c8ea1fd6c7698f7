"""How a kernel of linear cross-entropy goes through its tiles on a TPU: in loops whose values fit the registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..tiles.pallas_tiles import LANES, contract, few_registers, in_chunks, split_parts
from ..tiles.targets import Target

NOWHERE = 2**30  # the first row of a tile that is not there
PART_PAIRS = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))  # of two float32, those with small products first


class Walk(NamedTuple):
    """How much of a tile is in hand at a time.

    Attributes:
        columns: of a product, as many as the matrix unit holds.
        features: of a product that is summed in a whole tile of logits.
        piece: rows and columns of a tile in an elementwise loop: every value of it stays in registers.
        turn: rows and features of a product that is summed in a strip of logits.
        taken: rows and columns of a strip that are taken in at a time.
        at_once: products of columns of a gradient that are scheduled together.
    """

    columns: int
    features: int
    piece: tuple[int, int]
    turn: tuple[int, int]
    taken: tuple[int, int]
    at_once: int


def walk_of(target: Target, turned: bool = False) -> Walk:
    """That of a chip, also where what is taken in is turned; interpreted, small tiles take several turns too."""
    if target.interpreted:
        return Walk(16, 16, (32, 256), (16, 16), (8, 8), 1)
    few, columns = few_registers(target), target.matrix_unit or 2 * LANES
    taken = (LANES, LANES) if turned else (32 if few else 64, columns)
    return Walk(columns, 512, (16, 128) if few else (32, 256), (512, 1024), taken, 8)


def walk_strips(
    walk: Walk,
    hidden_ref: Any,
    weight_ref: Any,
    strips: tuple[Any, Any],
    block_v: int,
    take_in: Callable[[jax.Array, Any, Any, Any], None],
    across: bool = False,
) -> None:
    """weight @ hidden^T by strips of tokens; while one is summed, the one before is taken in, also across the steps.

    Rows to take in stand between products of a few rows, where the compiler schedules them while the matrix unit works.
    Where it may not go across the steps, a step takes in its last strip alone.
    """
    step, steps = pl.program_id(2), pl.num_programs(2)
    (block_t, features), columns = hidden_ref.shape, walk.columns
    count, width = block_t // columns, min(walk.turn[1], features)
    turns, groups, share = _shares(walk, block_v, features)

    def take_in_rows(strip_ref: Any, strip: Any, rows: Any, first: Any) -> None:
        for col in range(0, columns, walk.taken[1]):
            cols = pl.ds(pl.multiple_of(strip * columns + col, walk.taken[1]), walk.taken[1])
            take_in(strip_ref[rows, col : col + walk.taken[1]], rows, cols, first)

    def sum_strip(strip: Any, strip_ref: Any, before_ref: Any) -> None:
        cols = pl.ds(pl.multiple_of(strip * columns, columns), columns)
        before, step_before = lax.rem(strip + count - 1, count), jnp.where(strip > 0, step, step - 1)
        first = jnp.where(step_before < 0, NOWHERE, step_before * block_v)

        def add(inner: Any, group: int) -> None:
            rows = pl.ds(group * walk.turn[0], min(walk.turn[0], block_v - group * walk.turn[0]))
            product = contract(weight_ref[rows, inner], hidden_ref[cols, inner], (1, 1))
            strip_ref[rows, :] = product + jnp.where(inner.start == 0, 0, strip_ref[rows, :])

        def turn(inner: Any) -> None:
            taken = lax.div(inner.start, width) * groups * share
            for group in range(groups):
                add(inner, group)
                for row in range(group * share, group * share + share, walk.taken[0]):
                    rows = pl.ds(pl.multiple_of(taken + row, walk.taken[0]), walk.taken[0])
                    take_in_rows(before_ref, before, rows, first)

        in_chunks(turns * width, width, turn)
        for group in range(groups if features % width else 0):
            add(pl.ds(turns * width, features % width), group)

    def sum_pair(pair: Any, _: None) -> None:
        for turn in (0, 1):
            sum_strip(2 * pair + turn, strips[turn], strips[1 - turn])

    lax.fori_loop(0, count // 2, sum_pair, None)

    def take_in_last() -> None:
        height, first = turns * groups * share, step * block_v
        in_chunks(height, walk.taken[0], lambda rows: take_in_rows(strips[1], count - 1, rows, first))

    if across:
        pl.when(step == steps - 1)(take_in_last)
    else:
        take_in_last()


def rows_of_strip(walk: Walk, block_v: int, features: int) -> int:
    """As many rows as are taken in, of which the last may be past the tile's."""
    turns, groups, share = _shares(walk, block_v, features)
    return turns * groups * share


def _shares(walk: Walk, block_v: int, features: int) -> tuple[int, int, int]:
    """Turns along the features of a strip, products of a turn, and rows of the strip before to take in beside each."""
    turns, groups = features // min(walk.turn[1], features), -(-block_v // walk.turn[0])
    return turns, groups, -(-block_v // (turns * groups * walk.taken[0])) * walk.taken[0]


def multiply(hidden: tuple[Any, Any], weight: tuple[Any, Any], logits_ref: Any, walk: Walk) -> None:
    """weight @ hidden^T, [vocab, tokens]: as many columns at a time as the matrix unit holds, and some features.

    The products of all features at once would be summed in registers, which they do not fit.
    """
    (hidden_ref, hidden_parts), (weight_ref, weight_parts) = hidden, weight

    def add(inner: Any) -> None:
        tokens, rows = (
            parts_of(ref.at[:, inner], parts, walk.piece)
            for ref, parts in ((hidden_ref, hidden_parts), (weight_ref, weight_parts))
        )

        def multiply_columns(cols: Any) -> None:
            def product(p: Any, q: Any) -> jax.Array:
                return contract(rows(p)[...], tokens(q)[cols, :], (1, 1))

            add_products(logits_ref, cols, product, weight_parts is not None, inner.start == 0)

        in_chunks(logits_ref.shape[1], walk.columns, multiply_columns)

    in_chunks(weight_ref.shape[1], walk.features, add)


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
    parts_ref = parts_ref.at[:, :, : block_ref.shape[1]]
    split_parts(block_ref, parts_ref, piece)
    return lambda part: parts_ref.at[part]


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
