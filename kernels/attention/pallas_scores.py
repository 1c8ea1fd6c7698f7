"""Scores of a tile on a TPU: the expressions of the score and of the mask, and the planes that they read.

Tiles are transposed, [keys, queries], and folded to [keys / 8, 8, queries], so that a tile is a row of registers. What
a plane does not vary along is never read more than once: one of queries is a row, one of keys a row that the kernel
turns into a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.expressions import INDICES, SCORE, Expression, children, evaluate, functions_of, plane
from ..tiles.expressions import planes as slots_of
from ..tiles.pallas_philox import kept
from ..tiles.pallas_tiles import LANES, LOG2_E, SUBLANES, common_rows, fold, pad_to
from .pallas_tiling import Seen, Sequence, Tiling
from .spec import AttentionInputs, AttentionSpec


@dataclass(frozen=True)
class Plane:
    """How a kernel holds a plane: along which dimensions it varies, and whether its numbers stand for truth."""

    slot: int
    batch: bool
    heads: bool
    queries: bool
    keys: bool
    boolean: bool
    integral: bool
    itemsize: int

    @staticmethod
    def of(slot: int, array: jax.Array | jax.ShapeDtypeStruct) -> Plane:
        whole = array.shape[2] > 1 and array.shape[3] > 1
        boolean = array.dtype == jnp.bool_
        integral = not jnp.issubdtype(array.dtype, jnp.floating)
        itemsize = 4 if not whole or array.dtype == jnp.float16 else array.dtype.itemsize
        batch, heads, queries, keys = (size > 1 for size in array.shape)
        return Plane(slot, batch, heads, queries, keys, boolean, integral, itemsize)

    @property
    def whole(self) -> bool:
        """Whether it varies along queries and keys."""
        return self.queries and self.keys

    def prepared(self, array: jax.Array, q_padded: int, kv_padded: int, block_q: int) -> jax.Array:
        """As the kernel reads it: [batch|1, heads|1, keys, queries], or with a row of one of the two, or of neither."""
        if self.boolean:
            array = array.astype(jnp.int8)
        if self.itemsize == 4 and array.dtype.itemsize < 4:
            array = array.astype(jnp.int32 if self.integral else jnp.float32)
        if self.whole:
            return pad_to(pad_to(array.swapaxes(2, 3), 2, kv_padded), 3, q_padded)
        if self.keys:
            return pad_to(array, 3, kv_padded)
        array = array.swapaxes(2, 3)
        return pad_to(array, 3, q_padded) if self.queries else jnp.broadcast_to(array, (*array.shape[:3], block_q))

    def block(
        self, keys: int, queries: int, block_q: int, at: Callable[..., tuple[Any, Any, Any, Any]]
    ) -> pl.BlockSpec:
        """Blocks of so many keys and queries; `at` has (b, h, block of keys, block of queries) of a grid step."""

        def index(*step: Any) -> tuple[Any, ...]:
            b, h, of_keys, of_queries = at(*step)
            place = b if self.batch else 0, h if self.heads else 0
            if self.whole:
                return *place, of_keys, of_queries
            return *place, 0, of_keys if self.keys else of_queries if self.queries else 0

        row = keys if self.keys else queries if self.queries else block_q
        return pl.BlockSpec((None, None, keys, queries) if self.whole else (None, None, 1, row), index)

    def scratch(self, keys: int, block_q: int) -> list[Any]:
        """Where `spread` writes."""
        kind = jnp.int32 if self.integral else jnp.float32
        return [pltpu.VMEM((keys, block_q), kind)] if self.keys and not self.queries else []

    def load(self, ref: Any, keys: Any, queries: Any) -> jax.Array:
        """What it holds for slices of keys and queries: [keys / 8, 8, queries], or 1 group of keys for all."""
        if self.whole:
            tile = ref[keys, queries]
        elif self.keys:
            tile = ref[keys, :]
        else:
            row = ref[:, queries] if self.queries else ref[...]
            tile = jnp.broadcast_to(row, (SUBLANES, row.shape[1]))
        if self.boolean:
            return fold(tile.astype(jnp.int32)) != 0
        return fold(tile if self.integral else tile.astype(jnp.float32))


@dataclass(frozen=True)
class Place:
    """A tile in a kernel's blocks, and in the call.

    Attributes:
        b, h, query, key: its batch item, query head, first query and first key.
        queries, keys: the slices (`pl.ds`) of the planes' blocks.
        sequence: the batch item's lengths and window.
        planes: the references to the planes' blocks.
        seed: the reference to that of the dropout.
    """

    b: Any
    h: Any
    query: Any
    key: Any
    queries: Any
    keys: Any
    sequence: Sequence
    planes: tuple[Any, ...]
    seed: Any = None


@dataclass(frozen=True)
class Scores:
    """What becomes of products q·k: their scale, and the two expressions with the planes that they read.

    sparse: whether the tiles that need no mask are known; else the mask is computed in all.
    """

    scale: float
    score: Expression | None
    mask: Expression | None
    planes: tuple[Plane, ...]
    sparse: bool
    dropout: float
    weight: Expression | None
    weight_exponent: int

    @staticmethod
    def of(spec: AttentionSpec, arrays: AttentionInputs, sparse: bool = False) -> Scores:
        slots = sorted({*slots_of(spec.score), *slots_of(spec.mask), *slots_of(spec.weight)})
        planes = tuple(Plane.of(slot, arrays.planes[slot]) for slot in slots)
        return Scores(
            spec.softmax_scale, spec.score, spec.mask, planes, sparse, spec.dropout, spec.weight, spec.weight_exponent
        )

    @property
    def has_expressions(self) -> bool:
        return self.score is not None or self.mask is not None

    def masks(self, masked: bool) -> bool:
        """Whether the mask is computed in a tile that is seen in part, or in one that may be seen whole."""
        return self.mask is not None and (masked or not self.sparse)

    @property
    def changes_weights(self) -> bool:
        """Whether weights are dropped, or multiplied by something, before the product with v."""
        return self.dropout > 0 or self.weight is not None

    def changed(self, weights: jax.Array, place: Place) -> jax.Array:
        """The weights of a folded tile as they meet v."""
        if self.weight is not None:
            weights = weights * full(evaluate(self.weight, self.values(weights, place), FUNCTIONS), weights.shape)
        return self.dropped(weights, place)

    def rows_of(self, tiling: Tiling) -> int:
        """Rows of keys at a time, so few that all that the expressions compute of them stays in registers."""
        registers, several = (32 if tiling.rolled else 64), 3
        operations = sum(_operations(part) for part in (self.score, self.mask) if part is not None)
        rows = registers * LANES // max(tiling.block_q, LANES) // (2 if operations > several else 1)
        packed = self.dropout > 0 or any(plane.whole and plane.itemsize == 1 for plane in self.planes)
        return common_rows(max(rows, 32 if packed else SUBLANES), tiling.part)

    def values(self, products: jax.Array, place: Place) -> dict[Expression, Any]:
        """What each leaf of an expression is, for products [keys / 8, 8, queries]."""
        row, sequence = (1, *products.shape[1:]), place.sequence
        keys = SUBLANES * lax.broadcasted_iota(jnp.int32, products.shape, 0)
        indices = (
            jnp.full(row, place.b, jnp.int32),
            jnp.full(row, place.h, jnp.int32),
            lax.broadcasted_iota(jnp.int32, row, 2) + (place.query - sequence.q_first),
            lax.broadcasted_iota(jnp.int32, row, 1) + keys + (place.key - sequence.kv_first),
        )
        values: dict[Expression, Any] = {(name,): index for name, index in zip(INDICES, indices, strict=True)}
        values[SCORE] = products * self.scale
        for layout, ref in zip(self.planes, place.planes, strict=True):
            values[plane(layout.slot)] = layout.load(ref, place.keys, place.queries)
        return values

    def of_tile(
        self, products: jax.Array, place: Place, masked: bool, edge: Seen = Seen.MASKED
    ) -> tuple[jax.Array, dict[Expression, Any]]:
        """The scores in base 2, -inf where they are not seen, and what the expressions were given.

        masked: whether the tile is seen in part, and else whole. edge: if in part, how.
        """
        expressed = self.score is not None or self.masks(masked)
        values = self.values(products, place) if expressed else {}
        if self.score is None:
            scores = products * (self.scale * LOG2_E)
        else:
            scores = full(evaluate(self.score, values, FUNCTIONS), products.shape) * LOG2_E
        if masked and place.sequence.tiling.has_partial_tiles:
            rows, columns = products.shape[0] * SUBLANES, products.shape[2]
            seen = place.sequence.mask(place.query, place.key, rows, columns, edge)
            scores = jnp.where(seen, scores, -jnp.inf)
        if self.masks(masked) and self.mask is not None:
            scores = jnp.where(full(truth(evaluate(self.mask, values, FUNCTIONS)), products.shape), scores, -jnp.inf)
        return scores, values

    def dropped(self, weights: jax.Array, place: Place) -> jax.Array:
        """Weights, or their gradients, of a folded tile, with 0 for those that are dropped."""
        if not self.dropout:
            return weights
        at = place.b, place.h, place.query, place.key
        return jnp.where(kept(place.seed, self.dropout, at, weights.shape), weights, 0)


def spread(planes: tuple[Plane, ...], refs: tuple[Any, ...], scratch: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The references that `Plane.load` takes: a plane of keys, a row, is turned into columns in its scratch.

    That happens once a grid step, some rows of keys at a time.
    """
    remaining, found = iter(scratch), []
    for layout, ref in zip(planes, refs, strict=True):
        if layout.keys and not layout.queries:
            columns = next(remaining)
            _spread(ref, columns, rows)
            found.append(columns)
        else:
            found.append(ref)
    return tuple(found)


def _spread(ref: Any, columns: Any, rows: int) -> None:
    def turn(at: Any, _: None) -> None:
        keys = pl.ds(pl.multiple_of(at * rows, rows), rows)
        columns[keys, :] = jnp.broadcast_to(ref[:, keys], (columns.shape[1], rows)).T

    lax.fori_loop(0, columns.shape[0] // rows, turn, None)


def _operations(expression: Expression) -> int:
    below = children(expression)
    return sum(map(_operations, below), 1) if below else 0


def full(value: Any, shape: tuple[int, ...]) -> jax.Array:
    """An expression's value for every element of a tile, float32 or bool."""
    value = jnp.asarray(value)
    return jnp.broadcast_to(value if value.dtype == jnp.bool_ else value.astype(jnp.float32), shape)


def truth(value: Any) -> Any:
    """Whether it is not 0."""
    value = jnp.asarray(value)
    return value if value.dtype == jnp.bool_ else value != 0


def _is_bool(x: Any) -> bool:
    return bool(jnp.result_type(x) == jnp.bool_)


def _numbers(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of two numbers that may be given truths, which the compiler has no arithmetic for."""

    def with_numbers(x: Any, y: Any) -> Any:
        return function(*(jnp.where(a, 1, 0) if _is_bool(a) else a for a in (x, y)))

    return with_numbers


def _where(condition: Any, x: Any, y: Any) -> Any:
    condition = truth(condition)
    if _is_bool(x) and _is_bool(y):
        return jnp.logical_or(jnp.logical_and(condition, x), jnp.logical_and(jnp.logical_not(condition), y))
    return jnp.where(condition, *(jnp.where(a, 1, 0) if _is_bool(a) else a for a in (x, y)))


def _floordiv(x: Any, y: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(x, y), jnp.integer):
        return jnp.floor(x / y)
    if isinstance(y, int) and y > 0 and y & (y - 1) == 0:
        return jnp.asarray(x) >> (y.bit_length() - 1)
    # The compiler has no division of integers. Two quotients of floats are exact together, but for the last unit.
    quotient: Any = 0
    rest = x
    for _ in range(2):
        part = jnp.floor(jnp.asarray(rest, jnp.float32) / jnp.asarray(y, jnp.float32)).astype(jnp.int32)
        quotient, rest = quotient + part, rest - part * y
    over, under = (rest >= y, rest < 0) if isinstance(y, int) and y > 0 else _outside(rest, y)
    return quotient + jnp.where(over, 1, 0) - jnp.where(under, 1, 0)


def _outside(rest: Any, y: Any) -> tuple[Any, Any]:
    """Whether a rest is too large for a quotient, and whether it is too small: it has the sign of the divisor."""
    positive = y > 0
    over = jnp.where(positive, rest - y, y - rest) >= 0
    return over, jnp.where(positive, rest, -rest) < 0


def _mod(x: Any, y: Any) -> Any:
    return x - y * _floordiv(x, y)


_JNP = functions_of(jnp)
_OF_NUMBERS = ("add", "sub", "mul", "div", "min", "max", "lt", "le", "gt", "ge", "eq", "ne")
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **_JNP,
    **{name: _numbers(_JNP[name]) for name in _OF_NUMBERS},
    "floordiv": _numbers(_floordiv),
    "mod": _numbers(_mod),
    "not": lambda x: jnp.logical_not(truth(x)),
    "and": lambda x, y: jnp.logical_and(truth(x), truth(y)),
    "or": lambda x, y: jnp.logical_or(truth(x), truth(y)),
    "where": _where,
}
