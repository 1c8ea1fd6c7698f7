"""Rows of tokens out of documents, in an order that is a function of the seed and the step.

windows    rows begin at random places of the whole text
segments   long documents are cut into pieces, and pieces share rows: each goes where the least room is left that it
           fits, the longest first (best-fit packing, arXiv:2404.10830), so that little is padding and no document is
           cut that need not be. Tokens carry the number of their document in the row, 1, 2, ...; 0 is padding
pad        a document a row, what is longer cut off
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .data import Corpus, batch_at, held_out_batches
from .targets import is_predicted

PACKINGS = ("windows", "segments", "pad")


@dataclass(frozen=True)
class Batch:
    """Rows of a step.

    Attributes:
        tokens: int32 `[rows, seq + 1]`.
        segments: int32 `[rows, seq + 1]`, the document of each token and 0 for padding; None is one document a row.
    """

    tokens: np.ndarray
    segments: np.ndarray | None = None

    @cached_property
    def counted(self) -> np.ndarray:
        """int64 `[rows]`, the tokens of each that are predicted."""
        if self.segments is None:
            return np.full(len(self.tokens), self.tokens.shape[1] - 1)
        return is_predicted(self.segments).sum(1)

    def cut(self, count: int) -> list[tuple[Batch, float]]:
        """So many micro-batches, each with its share of all tokens that are predicted."""
        total, rows = max(1, int(self.counted.sum())), len(self.tokens) // count
        parts = []
        for first in range(0, len(self.tokens), rows):
            at = slice(first, first + rows)
            part = Batch(self.tokens[at], None if self.segments is None else self.segments[at])
            parts.append((part, float(part.counted.sum()) / total))
        return parts


class Batches:
    """The batches of a run."""

    def __init__(self, corpus: Corpus, packing: str, batch: int, seq: int, seed: int) -> None:
        self._corpus, self._packing, self._batch, self._seq, self._seed = corpus, packing, batch, seq, seed
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)
        if packing == "windows":
            for name, tokens in (("train on", corpus.train), ("measure on", corpus.held_out)):
                if len(tokens) <= seq:
                    raise ValueError(f"data.seq: got {seq}, with {len(tokens)} tokens to {name}; there must be more")
        else:
            self._rows = Rows(corpus.train, corpus.train_ends, packing, seq)
            if not len(self._rows):
                raise ValueError("data.sources: no document to train on has two tokens")

    def at(self, step: int) -> Batch:
        """Those of a step."""
        if self._packing == "windows":
            return Batch(batch_at(self._corpus, step, self._seed, self._batch, self._seq))
        places = np.arange(step * self._batch, (step + 1) * self._batch)
        epochs, at = np.divmod(places, len(self._rows))
        return self._rows.of([int(self._order(epoch)[row]) for epoch, row in zip(epochs.tolist(), at, strict=True)])

    def held_out(self, count: int) -> list[Batch]:
        """At most `count` batches of the held-out documents, evenly spread and always the same."""
        if self._packing == "windows":
            return [Batch(tokens) for tokens in held_out_batches(self._corpus, count, self._batch, self._seq)]
        rows = Rows(self._corpus.held_out, self._corpus.held_out_ends, self._packing, self._seq)
        if not len(rows):
            raise ValueError("data.held_out: no document that is held out has two tokens")
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), count * self._batch)).astype(int).tolist()
        chosen += [-1] * (-len(chosen) % self._batch)
        return [rows.of(chosen[first : first + self._batch]) for first in range(0, len(chosen), self._batch)]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
        return self._permutation


class Rows:
    """All documents in rows of `seq + 1` tokens, each token but a document's first predicted once."""

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, packing: str, seq: int) -> None:
        self._tokens, self._size = tokens, seq + 1
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        if packing == "pad":
            pieces = np.stack([starts, np.minimum(ends, starts + self._size)], 1)
            pieces = pieces[pieces[:, 1] - pieces[:, 0] > 1]
            self._pieces, self._bounds = pieces, np.arange(len(pieces) + 1)
            return
        pieces = cut(starts, ends, self._size)
        row = best_fit(pieces[:, 1] - pieces[:, 0], self._size)
        order = np.argsort(row, kind="stable")
        self._pieces = pieces[order]
        self._bounds = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def of(self, rows: list[int]) -> Batch:
        """The batch of these rows; -1 is padding alone."""
        tokens, segments = (np.zeros((len(rows), self._size), np.int32) for _ in range(2))
        for at, row in enumerate(rows):
            filled = 0
            pieces = self._pieces[self._bounds[row] : self._bounds[row + 1]] if row >= 0 else ()
            for number, (start, stop) in enumerate(pieces, 1):
                piece = slice(filled, filled + stop - start)
                tokens[at, piece], segments[at, piece] = self._tokens[start:stop], number
                filled = piece.stop
        return Batch(tokens, segments)


def cut(starts: np.ndarray, ends: np.ndarray, size: int) -> np.ndarray:
    """The pieces of documents, int64 `[pieces, 2]` from where to where: at most `size` tokens, the first of a further
    piece the last of the one before, whose successor is thus predicted; none of one token.

    >>> cut(np.array([0, 9]), np.array([9, 10]), 4).tolist()
    [[0, 4], [3, 7], [6, 9]]
    """
    counts = np.maximum(0, -(-(ends - starts - 1) // (size - 1)))
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    first = np.repeat(starts, counts) + within * (size - 1)
    return np.stack([first, np.minimum(first + size, np.repeat(ends, counts))], 1)


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """The row of each piece, int64: the longest first, each into the row with the least room that it fits.

    >>> best_fit(np.array([3, 5, 2, 4, 1]), 6).tolist()
    [2, 0, 1, 1, 0]
    """
    rows = np.zeros(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    free, count = 0, 0  # bit n of `free`: a row has room for n tokens
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            room, row, count = size, count, count + 1
        rows[piece] = row
        if room > length:
            with_room[room - length].append(row)
            free |= 1 << (room - length)
    return rows
