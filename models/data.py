"""The corpus: the sources of the Python standard library, as bytes. Real text that every machine has.

Batches are a function of the seed and the step, so that a run can resume at any step.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

VOCAB_SIZE = 256
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT = 20  # one file in this many


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and bytes of other files to measure on.

    Attributes:
        train: uint8 `[size]`.
        held_out: uint8 `[size]`.
        digest: of both; another Python version has another corpus.
    """

    train: np.ndarray
    held_out: np.ndarray
    digest: str


@cache
def standard_library() -> Corpus:
    """The `.py` files of this Python's standard library without its tests, in the order of their names."""
    return read_corpus(Path(sysconfig.get_paths()["stdlib"]))


def read_corpus(folder: Path) -> Corpus:
    """The `.py` files under a folder, each ended by a zero byte; which are held out depends on their names alone."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if not _EXCLUDED.intersection(name.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % _HELD_OUT == 0
            parts[held_out].append(path.read_bytes() + b"\0")
    train, rest = b"".join(parts[False]), b"".join(parts[True])
    if min(len(train), len(rest)) < 10_000:
        raise ValueError(
            f"{folder}: {len(train)} bytes to train on and {len(rest)} held out; it must hold more sources"
        )
    digest = hashlib.sha256(train + rest).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(rest, np.uint8), digest)


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
