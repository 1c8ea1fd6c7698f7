"""Which tiles of attention there are on a TPU, which of them are visible, and the mask of one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..tiles.pallas_tiles import SUBLANES, few_registers, fit_block
from ..tiles.targets import Target
from .sparsity import HEADER
from .spec import AttentionSpec
from .tiles import AttentionTiles

_STRIP = 256  # queries: a matrix unit's width, or two of them side by side


class Seen(Enum):
    """What of a tile its queries see: all of it, what a mask says, or what lies on one side of a diagonal from corner
    to corner: the keys up to a window's right edge, or those from its left edge on."""

    WHOLE = auto()
    MASKED = auto()
    UP_TO_DIAGONAL = auto()
    PAST_DIAGONAL = auto()

    def keys(self, block_kv: int, part: int, strip: slice) -> range:
        """The first keys of those parts of a tile of which some query of a strip sees something."""
        if self is Seen.UP_TO_DIAGONAL:
            return range(0, min(block_kv, -(-strip.stop // part) * part), part)
        return range(strip.start // part * part if self is Seen.PAST_DIAGONAL else 0, block_kv, part)

    def queries(self, block_q: int, keys: slice) -> slice:
        """The queries of a tile of which some see some of the keys."""
        if self is Seen.UP_TO_DIAGONAL:
            return slice(keys.start, block_q)
        return slice(0, keys.stop if self is Seen.PAST_DIAGONAL else block_q)

    def masks(self, keys: slice, strip: slice) -> bool:
        """Whether some query of a strip may not see some of the keys, all counted in the tile."""
        if self is Seen.UP_TO_DIAGONAL:
            return keys.stop - 1 > strip.start
        if self is Seen.PAST_DIAGONAL:
            return keys.start < strip.stop
        return self is Seen.MASKED


@dataclass(frozen=True)
class Tiling:
    """Tiles of block_q queries against block_kv keys, those computed in parts of `part` keys against `strip` queries.

    Attributes:
        q_size, kv_size: of the arrays; the lengths of all sequences if has_lengths is False.
        left, right: the window.
        has_lengths: whether each batch item has its own lengths.
        hides_queries: whether the mask covers what lies past the last query, where an expression may give anything.
        rolled: whether a chip has so few registers that only loops keep the compiler from spilling them.
        has_runs: whether a list says which tiles the mask shows (`sparsity.py`).
        drops: whether weights are dropped.
        diagonal: whether a window's right edge goes through tiles from corner to corner, and nothing else cuts those.
        left_diagonal: whether its left edge does, too.
        packed: whether grid steps go by visits, each a tile of one of the packed sequences (`pallas_visits.py`).
        follows: whether the keys in VMEM begin where the window of a tile of queries does; in the backward, the queries
            where those begin that see a tile of keys.
    """

    q_size: int
    kv_size: int
    block_q: int
    block_kv: int
    part: int
    strip: int
    left: int | None
    right: int | None
    has_lengths: bool
    hides_queries: bool
    rolled: bool
    has_runs: bool
    drops: bool
    diagonal: bool
    left_diagonal: bool
    packed: bool
    follows: bool = False

    @staticmethod
    def choose(
        spec: AttentionSpec,
        tiles: AttentionTiles,
        target: Target,
        sizes: tuple[int, int],
        has_lengths: bool,
        hides_queries: bool = False,
        has_runs: bool = False,
        packed: bool = False,
    ) -> Tiling:
        block_q = fit_block("config.block_q", tiles.block_q, sizes[0], target)
        block_kv = fit_block("config.block_kv", tiles.block_kv, sizes[1], target)
        part = gcd(target.matrix_unit or 2 * SUBLANES, block_kv)
        left, right = _within(spec.left, sizes), _within(spec.right, sizes)
        strip = _STRIP if target.matrix_unit else 4 * SUBLANES
        plain = spec.score is None and spec.mask is None and not has_lengths and not hides_queries
        level = spec.same_tokens if packed else (sizes[1] - sizes[0]) % block_q == 0
        square = right == 0 and block_q == block_kv and level
        diagonal = plain and square and (left is None or left >= block_kv - 1)
        return Tiling(
            *sizes,
            block_q,
            block_kv,
            part,
            strip=block_q if block_q <= strip else gcd(strip, block_q),
            left=left,
            right=right,
            has_lengths=has_lengths,
            hides_queries=hides_queries,
            rolled=few_registers(target),
            has_runs=has_runs,
            drops=spec.dropout > 0,
            diagonal=diagonal,
            left_diagonal=diagonal and not packed and left is not None and (left + 1) % block_kv == 0,
            packed=packed,
        )

    @property
    def ends_with_window(self) -> bool:
        """Whether no query sees a key past the last one, because its window ends before."""
        return self.right is not None and self.right <= 0

    @property
    def has_partial_tiles(self) -> bool:
        """Whether there are tiles of which a query sees only some keys."""
        window = self.left is not None or self.right is not None
        own_ends = self.has_lengths or self.packed
        return window or own_ends or self.kv_size % self.block_kv != 0 or self.has_partial_queries

    @property
    def most_tiles(self) -> int:
        """How many tiles of keys a tile of queries sees at most, 0 where no window bounds them."""
        if self.left is None or self.right is None:
            return 0
        return max(1, -(-(self.block_q - 1 + self.left + self.right + 1) // self.block_kv) + 1)

    @property
    def most_queries(self) -> int:
        """How many tiles of queries see a tile of keys at most, where the first of them is the last that it sees: tiles
        are of one size, windows that are bounded end with their query, and every query sees a key. Else 0."""
        if self.left is None or self.right != 0 or self.block_q != self.block_kv or self.has_lengths or self.has_runs:
            return 0
        if self.kv_size < self.q_size or (self.kv_size - self.q_size) % self.block_q:
            return 0
        return (self.block_kv - 1 + max(self.left, 0)) // self.block_q + 1

    @property
    def has_partial_queries(self) -> bool:
        return self.hides_queries and (self.has_lengths or self.q_size % self.block_q != 0)

    @property
    def prefetched(self) -> int:
        """How many arrays of scalars are fetched before the grid runs: lengths or visits, a list of runs, a seed."""
        return self.has_lengths + self.packed + self.has_runs + self.drops

    def nearest_stretch(self, stretch: Any, begin: Any, end: Any, major: int) -> Any:
        """The stretch of `major` keys to hold at a step, of those that hold the tiles from `begin` to `end`.

        One that no query of the tile sees repeats the nearest visible one: nothing is fetched for it.
        """
        nearest = jnp.minimum(stretch, lax.div((jnp.maximum(end, 1) - 1) * self.block_kv, major))
        if self.left is None and not self.has_runs:
            return nearest
        return jnp.maximum(nearest, lax.div(jnp.minimum(begin, end) * self.block_kv, major))

    def seed(self, scalars: tuple[Any, ...]) -> Any:
        """The reference to the seed, None where nothing is dropped."""
        return scalars[self.has_lengths + self.has_runs] if self.drops else None

    def sequence(self, b: Any, scalars: tuple[Any, ...]) -> Sequence:
        """Batch item b; scalars are the references to what is prefetched, or more."""
        if not self.has_lengths:
            return Sequence(self, self.q_size, self.kv_size)
        return Sequence(self, scalars[0][0, b], scalars[0][1, b])

    def visit(self, b: Any, tile: Any, scalars: tuple[Any, ...]) -> tuple[Any, Sequence, Any]:
        """Of a grid step of the forward: the batch item, or packed sequence, and the first query of its tile."""
        if not self.packed:
            return b, self.sequence(b, scalars), tile * self.block_q
        visit = Visit.read(scalars[0], tile)
        return visit.number, Sequence(self, visit.q_end, visit.kv_end, visit.q_first, visit.kv_first), visit.query

    def runs(self, b: Any, h: Any, tile: Any, scalars: tuple[Any, ...]) -> RunsOfTile:
        """What the mask shows to a tile of queries, or of keys, whichever the list's rows are."""
        listed = scalars[self.has_lengths]
        row = HEADER + b * listed[0] + h * listed[1] + tile
        return RunsOfTile(listed, listed[row], listed[row + 1])


class Visit(NamedTuple):
    """A tile of queries of one packed sequence, against its keys. Positions count from two aligned tokens before them.

    Attributes:
        number: of the sequence.
        q_token, kv_token: those tokens, among all: what a chip can address.
        q_first, q_end, kv_first, kv_end: the sequence's own.
        query: the first of the tile.
    """

    number: Any
    q_token: Any
    kv_token: Any
    q_first: Any
    q_end: Any
    kv_first: Any
    kv_end: Any
    query: Any

    @staticmethod
    def read(visits: Any, number: Any) -> Visit:
        """One of those in scalar memory, [fields, visits]."""
        return Visit(*(visits[field, number] for field in range(len(Visit._fields))))


class RunsOfTile(NamedTuple):
    """The runs of one tile: where they stand in the list."""

    listed: Any
    start: Any
    stop: Any

    def hull(self, begin: Any, end: Any) -> tuple[Any, Any]:
        """The tiles from the first that is seen to the last, of those between two bounds."""
        first = jnp.maximum(begin, _first_of(self.listed, self.start))
        last = jnp.minimum(end, self.listed[self.stop - 1])
        return first, jnp.where(self.stop > self.start, last, first)

    def each(self, bounds: tuple[Any, ...], offset: Any, tiles: int, walk: Any) -> None:
        """Walk each run: (begin, whole_begin, whole_end, end) of the window cut to it, counted from a tile `offset` and
        within so many tiles."""
        begin, whole_begin, whole_end, end = bounds

        def one(number: Any, _: None) -> None:
            at = self.start + 2 * number
            whole = self.listed[at] < 0
            first = jnp.clip(jnp.maximum(begin, _first_of(self.listed, at)) - offset, 0, tiles)
            last = jnp.clip(jnp.minimum(end, self.listed[at + 1]) - offset, first, tiles)
            whole_first = jnp.where(whole, jnp.clip(whole_begin - offset, first, last), last)
            walk(first, whole_first, jnp.clip(whole_end - offset, whole_first, last), last)

        lax.fori_loop(0, lax.div(self.stop - self.start, 2), one, None)


def _first_of(listed: Any, at: Any) -> Any:
    """A run's first tile, which is inverted where the run is seen whole."""
    return jnp.where(listed[at] < 0, ~listed[at], listed[at])


@dataclass(frozen=True)
class Sequence:
    """A batch item: its tiles, and its lengths, which are numbers that a kernel reads where it has lengths.

    A packed sequence begins at q_first and kv_first, and then q_len and kv_len are where it ends.
    """

    tiling: Tiling
    q_len: Any
    kv_len: Any
    q_first: Any = 0
    kv_first: Any = 0

    @property
    def offset(self) -> Any:
        """Query i's window lies around the key i + offset."""
        return self.kv_len - self.q_len

    def visible_kv(self, query: Any) -> tuple[Any, Any, Any, Any]:
        """For the tile of queries at `query`: the first tile of keys that some see, the first and the end of those that
        all see whole, and the end of those that some see."""
        tiling, clip = self.tiling, self._clip_to(self.kv_first, self.kv_len)
        first = query + self.offset
        last = first + tiling.block_q - 1
        begin = whole_begin = self.kv_first
        end = whole_end = self.kv_len
        if tiling.left is not None:
            begin, whole_begin = clip(first - tiling.left), clip(last - tiling.left)
        if tiling.right is not None:
            whole_end, end = clip(first + tiling.right + 1), clip(last + tiling.right + 1)
        if tiling.has_lengths or tiling.packed:
            end = jnp.where(query < self.q_len, end, 0)
        return _tiles(begin, whole_begin, whole_end, end, tiling.block_kv)

    def first_tile(self, query: Any) -> Any:
        """The first of those, one that there is."""
        tiling = self.tiling
        return jnp.minimum(self.visible_kv(query)[0], -(-tiling.kv_size // tiling.block_kv) - 1)

    def visible_q(self, key: Any) -> tuple[Any, Any, Any, Any]:
        """The same of the tiles of queries, for the tile of keys at `key`."""
        tiling, clip = self.tiling, self._clip_to(0, self.q_len)
        first = key - self.offset
        last = first + tiling.block_kv - 1
        begin: Any = 0
        whole_begin: Any = 0
        end = self.q_len
        whole_end = end if tiling.has_partial_queries else _round_up(end, tiling.block_q)
        if tiling.right is not None:
            begin, whole_begin = clip(first - tiling.right), clip(last - tiling.right)
        if tiling.left is not None:
            whole_end = jnp.clip(first + tiling.left + 1, 0, whole_end)
            end = clip(last + tiling.left + 1)
        if tiling.has_lengths:
            end = jnp.where(key < self.kv_len, end, 0)
        if not tiling.ends_with_window and (tiling.has_lengths or tiling.kv_size % tiling.block_kv):
            whole_begin = jnp.where(key + tiling.block_kv > self.kv_len, _round_up(end, tiling.block_q), whole_begin)
        return _tiles(begin, whole_begin, whole_end, end, tiling.block_q)

    def sees(self, query: Any, key: Any, rows: int) -> Any:
        """Whether some query of the tile at `query` sees some of the keys from `key`.

        Where windows end at the last key, padded queries see padded keys; both are cut off.
        """
        tiling = self.tiling
        if tiling.right is not None:
            seen = key <= query + tiling.block_q - 1 + self.offset + tiling.right
        else:
            seen = key < self.kv_len
        if tiling.left is not None:
            seen = seen & (key + rows - 1 >= query + self.offset - tiling.left)
        return seen

    def mask(self, query: Any, key: Any, rows: int, columns: int, seen: Seen = Seen.MASKED) -> jax.Array:
        """bool [rows / 8, 8, columns]: which queries from `query` see which keys from `key`, in a tile so seen.

        The comparison is by group of eight keys, so that what a loop keeps in registers is one group's indices.
        """
        tiling = self.tiling
        keys, queries = (lax.broadcasted_iota(jnp.int32, (1, SUBLANES, columns), axis) for axis in (1, 2))
        group = SUBLANES * lax.broadcasted_iota(jnp.int32, (rows // SUBLANES, SUBLANES, columns), 0)
        conditions = []
        if tiling.right is not None and seen is not Seen.PAST_DIAGONAL:
            conditions.append(keys - queries <= query - key + self.offset + tiling.right - group)
        if tiling.left is not None and seen is not Seen.UP_TO_DIAGONAL:
            conditions.append(keys - queries >= query - key + self.offset - tiling.left - group)
        if tiling.packed and seen is not Seen.UP_TO_DIAGONAL:
            conditions.append(keys >= self.kv_first - key - group)
        if not tiling.ends_with_window:
            conditions.append(keys < self.kv_len - key - group)
        if tiling.has_partial_queries:
            conditions.append(jnp.broadcast_to(queries < self.q_len - query, group.shape))
        visible = conditions[0]
        for condition in conditions[1:]:
            visible = visible & condition
        return visible

    def _clip_to(self, first: Any, end: Any) -> Any:
        return lambda x: jnp.clip(x, first, end)


def _within(bound: int | None, sizes: tuple[int, int]) -> int | None:
    """A window's bound; one past everything is as good as one at its end, and does not overflow."""
    return None if bound is None else max(-sum(sizes), min(bound, sum(sizes)))


def _tiles(begin: Any, whole_begin: Any, whole_end: Any, end: Any, block: int) -> tuple[Any, Any, Any, Any]:
    """Positions, not negative, as numbers of tiles."""
    return (
        _div(begin, block),
        _div(whole_begin + block - 1, block),
        _div(whole_end, block),
        _div(end + block - 1, block),
    )


def _div(x: Any, y: int) -> Any:
    return x // y if isinstance(x, int) else lax.div(x, y)


def _round_up(x: Any, block: int) -> Any:
    return _div(x + block - 1, block) * block
