"""Which tiles of keys each tile of queries sees, derived from the mask: empty ones, full ones, and the partial rest.

A mask is evaluated over a box of queries and keys at once, every value as an interval that holds all that it can be
there. Where the truth is certain the box is empty or full, else it is cut in four, down to single tiles. So a million
tokens cost as many steps as the mask has edges, and no array of tiles x tiles is made. Where an interval cannot tell, a
tile is partial, which is slower and never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .expressions import SCORE, Expression, const, leaves, plane
from .expressions import planes as slots_of
from .intervals import UNKNOWN, Interval, bounded, bounds_of, swept, truth

_BOXES = 1 << 15  # at a time: their intervals stay in cache
_SEGMENTS = 1 << 19  # before they are merged


@dataclass(frozen=True, eq=False)
class Runs:
    """The tiles that each tile of one side visits on the other, as runs of consecutive ones.

    Row `(b * heads + h) * row_tiles + tile` has the runs `bounds[offsets[row]:offsets[row + 1]]`, sorted, each
    `(first tile, end tile, 1 if full else 0)`. A full tile needs no mask: all of it exists on the visited side, and all
    that exists on the other sees it. Between runs nothing is seen.

    Attributes:
        batch, heads: 1 where the mask is the same for all.
        row_len, row_block: the tokens of the side whose tiles own the rows, and of one tile.
        column_len, column_block: those of the visited side.
        offsets: int32 `[batch * heads * row_tiles + 1]`.
        bounds: int32 `[runs, 3]`.
    """

    batch: int
    heads: int
    row_len: int
    row_block: int
    column_len: int
    column_block: int
    offsets: np.ndarray
    bounds: np.ndarray

    @property
    def row_tiles(self) -> int:
        return -(-self.row_len // self.row_block)

    @property
    def column_tiles(self) -> int:
        return -(-self.column_len // self.column_block)

    @property
    def visited(self) -> int:
        """How many tiles are not skipped, over all rows."""
        return int(_lengths(self.bounds).sum())

    @property
    def full_share(self) -> float:
        """The share of the visited tiles that need no mask."""
        return int(_lengths(self.bounds[self.bounds[:, 2] == 1]).sum()) / max(1, self.visited)

    @property
    def sparsity(self) -> float:
        """The share of all tiles that is skipped."""
        return 1 - self.visited / max(1, (len(self.offsets) - 1) * self.column_tiles)

    @property
    def longest(self) -> int:
        """The most tiles that one row visits."""
        before = np.concatenate([[0], np.cumsum(_lengths(self.bounds))])[self.offsets]
        return int(np.diff(before).max(initial=0))

    def of(self, tile: int, b: int = 0, h: int = 0) -> np.ndarray:
        """The runs `[n, 3]` of one tile, for any b and h of the call."""
        row = ((b if self.batch > 1 else 0) * self.heads + (h if self.heads > 1 else 0)) * self.row_tiles + tile
        return self.bounds[self.offsets[row] : self.offsets[row + 1]]

    def transposed(self) -> Runs:
        """The same seen from the other side: for each tile of keys, the runs of tiles of queries."""
        sides = self.column_len, self.column_block, self.row_len, self.row_block
        return _runs(_by_column(self), self.batch, self.heads, sides)

    def __str__(self) -> str:
        """How much is visited, and three rows of the first head in words."""
        lines = [
            f"{self.row_tiles} x {self.column_tiles} tiles of {self.row_block} x {self.column_block} tokens, "
            f"batch {self.batch}, heads {self.heads}: {self.visited} visited ({self.sparsity:.2%} skipped), "
            f"{self.full_share:.1%} of them full, at most {self.longest} a row"
        ]
        for tile in sorted({0, self.row_tiles // 2, self.row_tiles - 1} - {-1, self.row_tiles}):
            words = [f"{('partial', 'full')[full]} {first} to {end - 1}" for first, end, full in self.of(tile)]
            lines.append(f"row {tile}: {', '.join(words) or 'nothing'}")
        return "\n".join(lines)


def visible_tiles(
    mask: Expression | None,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    *,
    left: int | None = None,
    right: int | None = None,
    planes: Sequence[np.ndarray | None] = (),
    batch: int = 1,
    heads: int = 1,
) -> Runs:
    """The runs of tiles of keys for each tile of queries.

    Args:
        mask: what a query sees besides the window; None hides nothing.
        q_len, kv_len: the lengths, from which the window is aligned bottom-right.
        block_q, block_kv: tokens of a tile.
        left, right: the window; None is unbounded.
        planes: the arrays that the mask reads, `[batch|1, heads|1, q_len|1, kv_len|1]`; None where one is not known.
        batch, heads: of the call; they count only where the mask depends on them.
    """
    mask = const(True) if mask is None else mask
    read = {slot: planes[slot] if slot < len(planes) else None for slot in slots_of(mask)}
    _check(read, (batch, heads, q_len, kv_len))
    batch, heads = (
        size if (name,) in leaves(mask) or any(p is not None and p.shape[axis] > 1 for p in read.values()) else 1
        for axis, (name, size) in enumerate((("b", batch), ("h", heads)))
    )
    grid = _Grid(q_len, kv_len, block_q, block_kv, heads)
    pyramids = {slot: _Pyramid(array, grid) for slot, array in read.items()}
    segments = _collected(_segments(_within_window(mask, left, right, q_len, kv_len), grid, pyramids, batch))
    return _runs(segments, batch, heads, (q_len, block_q, kv_len, block_kv))


def _check(read: dict[int, np.ndarray | None], sizes: tuple[int, ...]) -> None:
    for slot, array in read.items():
        shape = sizes if array is None else array.shape
        if len(shape) != 4 or any(have not in (1, size) for have, size in zip(shape, sizes, strict=True)):
            raise ValueError(f"planes[{slot}] is {shape}; each dimension must be 1 or that of {sizes}")


def _within_window(mask: Expression, left: int | None, right: int | None, q_len: int, kv_len: int) -> Expression:
    """The mask, of the keys in the window."""
    furthest, offset = q_len + kv_len, kv_len - q_len  # a wider window is as good as none
    if right is not None:
        end = const(offset + max(-furthest, min(right, furthest)))
        mask = ("and", ("le", ("j",), ("add", ("i",), end)), mask)
    if left is not None:
        begin = const(offset - max(-furthest, min(left, furthest)))
        mask = ("and", ("ge", ("j",), ("add", ("i",), begin)), mask)
    return mask


# ---- Boxes


class _Grid(NamedTuple):
    """The tiles of a head. A box of level n is 2**n x 2**n tiles."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    heads: int

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.q_len // self.block_q), -(-self.kv_len // self.block_kv)

    @property
    def levels(self) -> int:
        return max(0, max(self.tiles) - 1).bit_length()


class _Pyramid:
    """The least and the greatest value of a plane in every box that it can be asked for; None: not known."""

    def __init__(self, array: np.ndarray | None, grid: _Grid) -> None:
        self.levels: list[Interval] = []
        if array is None:
            return
        kind = {"bool": "bool", "int32": "int"}.get(array.dtype.name, "float")
        lo, hi = array, array
        for step in ((grid.block_q, grid.block_kv), *[(2, 2)] * grid.levels):
            lo, hi = (_reduced(bound, end, step) for bound, end in ((np.minimum, lo), (np.maximum, hi)))
            with np.errstate(all="ignore"):
                self.levels.append(bounded(lo.astype(np.float64), hi.astype(np.float64), kind))

    def at(self, level: int, *indices: np.ndarray) -> Interval:
        if not self.levels:
            return UNKNOWN
        lo, hi, kind, _ = self.levels[level]
        where = tuple(index if size > 1 else 0 for index, size in zip(indices, lo.shape, strict=True))
        return Interval(lo[where], hi[where], kind)


def _reduced(bound: np.ufunc, array: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """The bound of every `step` queries and keys; NaN, if there is one among them."""
    for axis, size in zip((3, 2), reversed(step), strict=True):
        if array.shape[axis] > 1:
            array = bound.reduceat(array, np.arange(0, array.shape[axis], size), axis=axis)
    return array


def _segments(mask: Expression, grid: _Grid, pyramids: dict[int, _Pyramid], batch: int) -> Iterator[np.ndarray]:
    """[n, 4]: (row, first tile, end tile, full) of what is seen, in pieces and in no order.

    The stack takes the four parts of a box before its neighbour, so that it stays short whatever the mask is.
    """
    roots = np.zeros((batch * grid.heads, 3), np.int32)  # head of the batch, tile of queries, tile of keys
    roots[:, 0] = np.arange(len(roots))
    stack = [(grid.levels, roots)] if all(grid.tiles) else []
    known = swept(mask, {("i",): grid.block_q, ("j",): grid.block_kv})
    while stack:
        level, boxes = stack.pop()
        if len(boxes) > _BOXES:
            stack.append((level, boxes[_BOXES:]))
            boxes = boxes[:_BOXES]
        verdict = truth(bounds_of(mask, {**_leaves(boxes, level, grid, pyramids), **known}))
        full, seen, stuck = (np.broadcast_to(x, len(boxes)) > 0 for x in (verdict.lo, verdict.hi, verdict.stuck))
        final = full | stuck | (level == 0)
        yield _rows_of(boxes[seen & final], full[seen & final], level, grid)
        if not final.all():
            stack.append((level - 1, _quarters(boxes[seen & ~final], grid, level - 1)))


def _leaves(boxes: np.ndarray, level: int, grid: _Grid, pyramids: dict[int, _Pyramid]) -> dict[Expression, Interval]:
    """What each leaf can be in each box."""
    b, h = np.divmod(boxes[:, 0], grid.heads)
    items = {(name,): Interval(1.0 * index, 1.0 * index, "int") for name, index in (("b", b), ("h", h))}
    i, j = (
        _index(tile << level, ((tile + 1) << level) - 1, block, length)
        for tile, block, length in ((boxes[:, 1], grid.block_q, grid.q_len), (boxes[:, 2], grid.block_kv, grid.kv_len))
    )
    read = {plane(slot): pyramid.at(level, b, h, boxes[:, 1], boxes[:, 2]) for slot, pyramid in pyramids.items()}
    return {**items, ("i",): i, ("j",): j, SCORE: UNKNOWN, **read}


def _index(first: np.ndarray, last: np.ndarray, block: int, length: int) -> Interval:
    """The tokens of some tiles, from the first to the last."""
    return Interval(first * float(block), np.minimum((last + 1.0) * block, length) - 1, "int")


def _quarters(boxes: np.ndarray, grid: _Grid, level: int) -> np.ndarray:
    """The boxes of that level that boxes of the level above consist of, without those past the end."""
    parts = np.repeat(boxes, 4, axis=0) * np.array([1, 2, 2], np.int32)
    parts[:, 1:] += np.tile(np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32), (len(boxes), 1))
    return parts[((parts[:, 1:] << level) < grid.tiles).all(axis=1)]


def _rows_of(boxes: np.ndarray, full: np.ndarray, level: int, grid: _Grid) -> np.ndarray:
    """[n, 4]: the segment of each row of tiles in each box."""
    first, end = boxes[:, 1:] << level, np.minimum((boxes[:, 1:] + 1) << level, grid.tiles)
    rows, repeats = _expanded(boxes[:, 0] * grid.tiles[0] + first[:, 0], end[:, 0] - first[:, 0])
    others = np.stack([first[:, 1], end[:, 1], full], axis=1).astype(np.int32)
    return np.concatenate([rows.astype(np.int32)[:, None], np.repeat(others, repeats, axis=0)], axis=1)


# ---- Segments


def _runs(segments: np.ndarray, batch: int, heads: int, sides: tuple[int, int, int, int]) -> Runs:
    """Segments [n, 4] as Runs; a column tile that reaches past the end is partial."""
    row_len, row_block, column_len, column_block = sides
    last = column_len // column_block
    reaches = (segments[:, 3] == 1) & (segments[:, 2] > last)
    tails = segments[reaches] * np.array([1, 0, 1, 0], np.int32) + np.array([0, last, 0, 0], np.int32)
    segments = np.concatenate([segments, tails])
    segments[:, 2][np.flatnonzero(reaches)] = last
    merged = _merged(segments[segments[:, 1] < segments[:, 2]])
    rows = batch * heads * -(-row_len // row_block)
    offsets = np.searchsorted(merged[:, 0], np.arange(rows + 1)).astype(np.int32)
    return Runs(batch, heads, *sides, offsets, np.ascontiguousarray(merged[:, 1:]))


def _by_column(runs: Runs) -> np.ndarray:
    """The segments [n, 4] of each column.

    Where a column differs between a row and the row before, a segment of it ends or begins: the work is that of the
    result. Rows are numbered with an empty one after those of each head, in which all that is open ends.
    """
    stride, width = runs.row_tiles + 1, runs.column_tiles + 1
    rows = np.repeat(np.arange(len(runs.offsets) - 1), np.diff(runs.offsets))
    rows += rows // max(1, runs.row_tiles)
    begins, ends = (rows * width + runs.bounds[:, side] for side in (0, 1))
    states = runs.bounds[:, 2] + 1
    points = np.unique(np.concatenate([begins, ends, begins + width, ends + width]))  # of its own row, and of the next
    now, before = (_state_at(at, begins, ends, states) for at in (points, points - width))
    changed = np.flatnonzero(now != before)  # and stays so up to the next point
    places, repeats = _expanded(points[changed], points[changed + 1] - points[changed])
    row, column = np.divmod(places, width)
    group, row = np.divmod(row, stride)
    keys = (group * runs.column_tiles + column) * stride + row
    order = np.argsort(keys, kind="stable")
    column, row = np.divmod(keys[order], stride)
    state = np.repeat(now[changed], repeats)[order]
    seen = np.flatnonzero(state)  # never a column's last change
    return np.stack([column[seen], row[seen], row[seen + 1], state[seen] - 1], axis=1).astype(np.int32)


def _collected(pieces: Iterator[np.ndarray]) -> np.ndarray:
    """All pieces in one, merged now and then, so that the memory is that of the result."""
    merged = np.empty((0, 4), np.int32)
    pending, count = [merged], 0
    for piece in pieces:
        pending.append(piece)
        count += len(piece)
        if count > max(_SEGMENTS, len(merged)):
            merged = _merged(np.concatenate(pending))
            pending, count = [merged], 0
    return np.concatenate(pending)


def _merged(segments: np.ndarray) -> np.ndarray:
    """Sorted by row and first tile, and joined where they touch and are alike."""
    ordered = segments[np.lexsort((segments[:, 1], segments[:, 0]))]
    before, after = ordered[:-1], ordered[1:]
    apart = (before[:, 0] != after[:, 0]) | (before[:, 2] != after[:, 1]) | (before[:, 3] != after[:, 3])
    begins = np.flatnonzero(np.concatenate([[True], apart])[: len(ordered)])
    merged = ordered[begins]
    merged[:, 2] = ordered[np.append(begins[1:], len(ordered)) - 1, 2] if len(ordered) else 0
    return merged


def _lengths(bounds: np.ndarray) -> np.ndarray:
    return bounds[:, 1].astype(np.int64) - bounds[:, 0]


def _expanded(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """start, start + 1, ... of each range, one after the other; and the lengths."""
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + within, lengths


def _state_at(points: np.ndarray, begins: np.ndarray, ends: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The state of the range, of sorted ones, that holds each point; 0 in none."""
    index = np.searchsorted(begins, points, side="right") - 1
    inside = (index >= 0) & (points < np.append(ends, 0)[index])
    return np.where(inside, np.append(states, 0)[index], 0)
