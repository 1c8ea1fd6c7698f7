"""`crosstile batches`: what a token of training costs in small and large batches, and what padding costs.

Measured on this machine's device, in both frameworks, with every program that they compile counted. Steps of all
contestants take turns, so that what disturbs the machine disturbs all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median, quantiles

import numpy as np
from rich.console import Console
from rich.table import Table

from crosstile.models import init
from crosstile.models.config import Config
from crosstile.models.learners import Learner, make_learner
from crosstile.models.packing import Batch, Rows
from crosstile.models.recipe import Recipe

CONTESTANTS = ("torch", "torch compiled", "jax")
WAYS = ("packed", "padded to the whole length", "padded to the longest", "padded to a power of two")
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Measured:
    """Steps of one kind.

    Attributes:
        contestant: of `CONTESTANTS`.
        what: the batch's size, or how its rows were made.
        tokens: a step, that are predicted.
        seconds: of each step, after those that compiled.
        compilations: programs that were compiled, and the seconds that it took with the steps that waited for them.
        padding: the share of the tokens that is none.
    """

    contestant: str
    what: str
    tokens: float
    seconds: Sequence[float]
    compilations: int
    waited: float
    padding: float = 0.0

    @property
    def microseconds(self) -> float:
        """Of a predicted token, the median."""
        return median(self.seconds) / self.tokens * 1e6

    @property
    def quartiles(self) -> tuple[float, float]:
        """The same of the quartiles."""
        low, _, high = quantiles(self.seconds, n=4)
        return low / self.tokens * 1e6, high / self.tokens * 1e6


def by_size(
    contestants: Sequence[str], sizes: Sequence[int], seq: int, rounds: int, config: Config | None = None
) -> list[Measured]:
    """Steps of batches of these sizes: random tokens, all predicted."""
    config = config or Config.demo()
    rng = np.random.default_rng(0)
    rows = {
        str(size): [Batch(rng.integers(0, config.vocab_size, (size, seq + 1), np.int32))] * (rounds + 1)
        for size in sizes
    }
    return [found for contestant in contestants for found in _in_turns(contestant, config, rows)]


def by_packing(
    contestants: Sequence[str], batch: int, seq: int, rounds: int, config: Config | None = None
) -> list[Measured]:
    """Steps over the same documents of mixed lengths, in each of the `WAYS`: a batch has so many rows of `seq`."""
    config = config or Config.demo()
    tokens, ends = documents(config.vocab_size, seq, 8 * batch * (rounds + 1))
    rows = {way: list(_batches(way, tokens, ends, batch, seq, rounds + 1)) for way in WAYS}
    return [found for contestant in contestants for found in _in_turns(contestant, config, rows)]


def documents(vocab: int, seq: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, and where each document ends: their lengths are log-normal, a median of an eighth of a row."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(seq / 8), 0.9, count), 4, seq).astype(np.int64)
    return rng.integers(0, vocab, int(lengths.sum()), np.int32), lengths.cumsum()


def _batches(way: str, tokens: np.ndarray, ends: np.ndarray, batch: int, seq: int, count: int) -> Iterator[Batch]:
    rows = Rows(tokens, ends, "segments" if way == "packed" else "pad", seq)
    order = np.random.default_rng(1).permutation(len(rows))
    for step in range(count):
        made = rows.of([int(row) for row in order[step * batch : (step + 1) * batch]])
        yield _trimmed(made, way)


def _trimmed(batch: Batch, way: str) -> Batch:
    """Without the columns that are padding in all rows, or with as many as a power of two needs."""
    if way not in WAYS[2:] or batch.segments is None:
        return batch
    longest = int((batch.segments != 0).sum(1).max())
    if way == WAYS[3]:
        longest = min(batch.tokens.shape[1], 1 + (1 << (longest - 2).bit_length()))
    return Batch(batch.tokens[:, :longest], batch.segments[:, :longest])


def _in_turns(contestant: str, config: Config, rows: dict[str, list[Batch]]) -> Iterator[Measured]:
    """Every kind's steps, the kinds taking turns; what compiles is told from what only runs."""
    learner = _learner(contestant, config)
    seconds: dict[str, list[float]] = {what: [] for what in rows}
    waited, compiled = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0)
    with _counting(contestant) as count:
        for turn in range(max(map(len, rows.values()))):
            for what, batches in rows.items():
                before, began = count(), time.perf_counter()
                learner.step(batches[turn], 1e-4)
                took = time.perf_counter() - began
                if count() > before:
                    compiled[what] += count() - before
                    waited[what] += took
                elif turn:
                    seconds[what].append(took)
    for what, batches in rows.items():
        counted = float(np.mean([batch.counted.sum() for batch in batches]))
        padding = 1 - float(np.mean([batch.counted.mean() / (batch.tokens.shape[1] - 1) for batch in batches]))
        times = seconds[what] if len(seconds[what]) > 1 else [waited[what] / max(1, len(batches))] * 2
        yield Measured(contestant, what, counted, times, compiled[what], waited[what], padding)


def _learner(contestant: str, config: Config) -> Learner:
    framework = contestant.partition(" ")[0]
    recipe = replace(Recipe(), framework=framework, compile=contestant.endswith("compiled"))
    return make_learner(recipe, init(config, 0, framework), config)


@contextmanager
def _counting(contestant: str) -> Iterator[Callable[[], int]]:
    """A function that says how many programs were compiled so far."""
    if contestant == "jax":
        import jax

        seen = [0]

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            seen[0] += event == _COMPILED

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield lambda: seen[0]
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        return
    import torch._dynamo.utils as dynamo

    yield lambda: int(dynamo.counters["stats"]["unique_graphs"])


def show(title: str, found: Sequence[Measured], console: Console) -> None:
    """A table, the contestants one below the other."""
    table = Table(title=title, box=None, title_justify="left")
    headings = ("", "rows", "µs a token", "quartiles", "token/s", "padding", "compilations", "s waited for them")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "rows") else "right")
    for one in found:
        low, high = one.quartiles
        table.add_row(
            one.contestant,
            one.what,
            f"{one.microseconds:.1f}",
            f"{low:.1f} … {high:.1f}",
            f"{1e6 / one.microseconds:,.0f}",
            f"{one.padding:.0%}",
            str(one.compilations),
            f"{one.waited:.1f}" if one.compilations else "",
        )
    console.print(table)
    console.print("measured on this machine", style="dim")
