"""Hold the cycle model's predictions against times that others measured: tokamax's, compiled here by `tokamax_dumps`.

tokamax (openxla/tokamax, Apache-2.0) measured whole calls: the kernel and what XLA puts around it, in device time. So
is the prediction here: every program that the compiler made, one after the other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from .cycles import NOT_COUNTED, predict_dump, total_microseconds

HALVES = ("fitted", "held out")


@dataclass(frozen=True)
class Pair:
    """One call: microseconds predicted and measured, or why there is no prediction.

    `half` is "fitted" where constants were set with it in view, else "held out": by the first digit of its name's hash.
    """

    chip: str
    op: str
    name: str
    predicted: float
    measured: float
    refused: str = ""

    @property
    def half(self) -> str:
        return HALVES[int(self.name[0], 16) % 2]

    @property
    def error(self) -> float:
        """Of the predicted time, relative to the measured."""
        return abs(self.predicted / self.measured - 1)


@dataclass(frozen=True)
class Agreement:
    """How near the predictions of one chip and half are.

    Attributes:
        count: of calls.
        median: relative error, and `ninetieth`, its 90th percentile.
        ratio: the median of predicted to measured.
        rank: Spearman's correlation of ranks.
    """

    count: int
    median: float
    ninetieth: float
    ratio: float
    rank: float


def compare(folder: Path) -> list[Pair]:
    """A pair for every call whose bundles lie in the folder."""
    return [pair for entry in sorted(folder.glob("*/*/entry.json")) if (pair := _pair(entry)) is not None]


def _pair(entry: Path) -> Pair | None:
    record = json.loads(entry.read_text())
    measured = median(record["data"]["evaluation_times_ms"]) * 1000
    chip, op, name = record["chip"], record["op"], entry.parent.name
    if "error" in record:
        return Pair(chip, op, name, 0.0, measured, record["error"])
    try:
        predictions = predict_dump(entry.parent, chip, record["steering"])
    except NOT_COUNTED as error:
        return Pair(chip, op, name, 0.0, measured, f"{type(error).__name__}: {error}")
    return Pair(chip, op, name, total_microseconds(predictions), measured)


def agreement(pairs: Sequence[Pair]) -> Agreement:
    """The figures of those pairs that have a prediction."""
    good = [pair for pair in pairs if not pair.refused]
    errors = [pair.error for pair in good]
    return Agreement(
        count=len(good),
        median=float(np.median(errors)),
        ninetieth=float(np.quantile(errors, 0.9)),
        ratio=float(np.median([pair.predicted / pair.measured for pair in good])),
        rank=rank_correlation([pair.predicted for pair in good], [pair.measured for pair in good]),
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, 1 where both orders are the same; NaN of fewer than two."""
    if len(first) < 2:
        return float("nan")
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (first, second)]
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def groups(pairs: Sequence[Pair]) -> Iterator[tuple[str, str, list[Pair]]]:
    """The pairs by chip and half, then by chip and op."""
    for chip in dict.fromkeys(pair.chip for pair in pairs):
        mine = [pair for pair in pairs if pair.chip == chip]
        for half in HALVES:
            yield chip, half, [pair for pair in mine if pair.half == half]
        for op in sorted({pair.op for pair in mine}):
            yield chip, op.removeprefix("pallas_mosaic_tpu_"), [pair for pair in mine if pair.op == op]


def agreement_rows(groups: Iterable[tuple[str, str, Sequence[Pair]]], digits: int) -> list[tuple[str, ...]]:
    """The cells of the table: chip, calls, count, median and 90th percentile of the error in percent, ratio, rank
    correlation; of each group (chip, calls, pairs) with a prediction."""
    rows: list[tuple[str, ...]] = []
    for chip, name, pairs in groups:
        if any(not pair.refused for pair in pairs):
            found = agreement(pairs)
            errors = (f"{100 * error:.{digits}f}" for error in (found.median, found.ninetieth))
            rows.append((chip, name, str(found.count), *errors, f"{found.ratio:.2f}", f"{found.rank:.3f}"))
    return rows


def show_agreement(title: str, rows: Iterable[tuple[str, ...]], console: Console) -> None:
    """A table of such cells."""
    table = Table(title=title, box=None, title_justify="left")
    table.add_column("chip")
    table.add_column("calls")
    for heading in ("count", "median error %", "90th percentile %", "median predicted/measured", "rank correlation"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show(pairs: Sequence[Pair], console: Console) -> None:
    """The table, and every call without a prediction."""
    title = "predicted by the cycle model, measured by tokamax"
    show_agreement(title, agreement_rows(groups(pairs), digits=1), console)
    refused = Counter((pair.chip, pair.op, pair.refused.splitlines()[0][:120]) for pair in pairs if pair.refused)
    for (chip, op, reason), count in refused.items():
        console.print(f"no prediction for {count} of {chip} {op}: {reason}", highlight=False, soft_wrap=True)


def read_csv(path: Path) -> list[Pair]:
    """The pairs that `write_csv` wrote."""
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return [Pair(chip, op, name, float(predicted), float(measured)) for chip, op, name, _, predicted, measured in rows]


def write_csv(pairs: Sequence[Pair], path: Path) -> None:
    """One line a call."""
    lines = ["chip,op,name,half,predicted_us,measured_us"]
    for pair in pairs:
        if not pair.refused:
            lines.append(f"{pair.chip},{pair.op},{pair.name},{pair.half},{pair.predicted:.1f},{pair.measured:.1f}")
    path.write_text("\n".join(lines) + "\n")
