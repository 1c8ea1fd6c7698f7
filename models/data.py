"""What a model learns from and what it is measured on; and the sources of the Python standard library, as bytes.

These are real text that every machine has; `texts` reads other files. Batches are a function of the seed and the step,
so that a run can resume at any step.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

VOCAB_SIZE = 256
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 20  # one file in this many


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others to measure on.

    Attributes:
        train: the tokens of all documents, one after another: unsigned integers `[size]`.
        held_out: the same of those to measure on.
        digest: of both; another Python version has another corpus.
        train_lengths: int `[documents]`, the tokens of each; None is one document.
        held_out_lengths: the same.
        bytes_per_token: of the held-out documents.
    """

    train: np.ndarray
    held_out: np.ndarray
    digest: str
    train_lengths: np.ndarray | None = None
    held_out_lengths: np.ndarray | None = None
    bytes_per_token: float = 1.0

    @cached_property
    def train_ends(self) -> np.ndarray:
        """int64 `[documents]`, where each ends in `train`."""
        return _ends(self.train, self.train_lengths)

    @cached_property
    def held_out_ends(self) -> np.ndarray:
        """The same of those to measure on."""
        return _ends(self.held_out, self.held_out_lengths)


def _ends(tokens: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
    return np.cumsum([len(tokens)] if lengths is None else lengths, dtype=np.int64)


@cache
def standard_library(held_out: int = HELD_OUT) -> Corpus:
    """The `.py` files of this Python's standard library without its tests, in the order of their names."""
    return read_corpus(Path(sysconfig.get_paths()["stdlib"]), held_out)


def read_corpus(folder: Path, held_out: int = HELD_OUT) -> Corpus:
    """The `.py` files under a folder, each ended by a zero byte; one in so many is held out, by its name alone."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if not _EXCLUDED.intersection(name.parts):
            parts[is_held_out(name.as_posix(), held_out)].append(path.read_bytes() + b"\0")
    train, rest = b"".join(parts[False]), b"".join(parts[True])
    if min(len(train), len(rest)) < 10_000:
        raise ValueError(
            f"{folder}: {len(train)} bytes to train on and {len(rest)} held out; it must hold more sources"
        )
    digest = hashlib.sha256(train + rest).hexdigest()
    of_train, of_rest = (np.array([len(part) for part in parts[kept]]) for kept in (False, True))
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(rest, np.uint8), digest, of_train, of_rest)


def is_held_out(name: str, one_in: int) -> bool:
    """Whether a document is kept to measure on: its name alone decides."""
    return hashlib.sha256(name.encode()).digest()[0] % one_in == 0


def batch_at(corpus: Corpus, step: int, seed: int, batch: int, seq: int) -> np.ndarray:
    """The training batch of a step, int32 `[batch, seq + 1]`: windows at random places."""
    starts = np.random.default_rng((seed, step)).integers(0, len(corpus.train) - seq, batch)
    return corpus.train[starts[:, None] + np.arange(seq + 1)].astype(np.int32)


def held_out_batches(corpus: Corpus, count: int, batch: int, seq: int) -> Iterator[np.ndarray]:
    """`count` batches int32 `[batch, seq + 1]` evenly spread over the held-out bytes, always the same."""
    starts = np.linspace(0, len(corpus.held_out) - seq - 1, count * batch).astype(np.int64)
    for rows in starts.reshape(count, batch):
        yield corpus.held_out[rows[:, None] + np.arange(seq + 1)].astype(np.int32)


def encode(text: str) -> np.ndarray:
    """int32 `[length]`, the UTF-8 bytes."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: np.ndarray) -> str:
    """The text of bytes `[length]`, those that are not UTF-8 replaced."""
    return bytes(np.asarray(tokens, np.uint8)).decode("utf-8", "replace")
