"""`crosstile cycles`: the tables of what the cycle model predicts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crosstile.kernels.tiles.targets import get_target

from .cores import CORES
from .cycles import CyclesError, Prediction, predict, total_microseconds
from .programs import Job
from .shapes import get_shape

SCHEMA = "crosstile.cycles/1"
UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU", "fills", "spills")


def run(jobs: Sequence[Job], tiles: dict[str, int], lines: int, console: Console) -> tuple[list[Any], bool]:
    """Predict each job and print its tables. Returns plain data for JSON, and whether every job had a prediction."""
    found, good = [], True
    for job in jobs:
        try:
            predictions = predict(job, tiles)
        except CyclesError as error:
            console.print(f"[red]fails[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            good = False
            continue
        show(job, predictions, lines, console)
        found.append({**asdict(job), "programs": [_plain(prediction) for prediction in predictions]})
    return found, good


def show(job: Job, predictions: Sequence[Prediction], lines: int, console: Console) -> None:
    """One table of the programs of a job, and one of the lines of each kernel."""
    kernels = [prediction for prediction in predictions if prediction.kernel]
    others = [prediction for prediction in predictions if not prediction.kernel]
    total = total_microseconds(predictions)
    table = Table(title=f"predicted, not measured: {job}", box=None, title_justify="left", header_style="bold")
    table.add_column("program")
    for heading in ("cycles", "µs", "MXU %", "wait %", "held %", "HBM %", *(f"{unit} %" for unit in UNITS[1:])):
        table.add_column(heading, justify="right")
    table.add_column("busiest")
    for prediction in kernels:
        table.add_row(*_row(prediction))
    if others:
        table.add_row("XLA around it", "", f"{total_microseconds(others):.1f}")
    console.print(table)
    for prediction in kernels:
        _show_lines(prediction, lines, console)
    if unknown := sum(prediction.unknown for prediction in kernels):
        console.print(
            f"{unknown} values that steer the kernels come from what is not modelled, and were taken for 0",
            highlight=False,
        )
    peak = get_target(job.target).bf16_tflops * (1 + CORES[job.target].siblings)
    console.print(f"predicted: {total:.1f} µs in all{rate(job, total, peak)}\n", highlight=False)


def rate(job: Job, microseconds: float, peak: float) -> str:
    """What a forward's own operations come to, without those on padding and masked tiles; the peak is in TFLOP/s."""
    shape = get_shape(job.shape)
    if job.direction == "backward" or not shape.multiplies:
        return ""
    tflops = shape.flops / microseconds / 1e6
    share = 100 * tflops / peak
    return f", {tflops:.0f} TFLOP/s of the shape's own operations, {share:.0f} % of the chip's bfloat16 peak"


def _row(prediction: Prediction) -> Iterator[str]:
    yield prediction.program
    yield f"{prediction.cycles:.0f}"
    yield f"{prediction.microseconds:.1f}"
    for part in (prediction.units["MXU"], prediction.waits, prediction.held, prediction.memory_busy):
        yield _percent(part, prediction)
    for unit in UNITS[1:]:
        yield _percent(prediction.units.get(unit, 0.0), prediction)
    yield prediction.limit


def _percent(cycles: float, prediction: Prediction) -> str:
    return f"{100 * cycles / prediction.cycles:.0f}"


def _show_lines(prediction: Prediction, lines: int, console: Console) -> None:
    table = Table(title=f"{prediction.program}: predicted cycles by line", box=None, title_justify="left")
    table.add_column("%", justify="right")
    table.add_column("µs", justify="right")
    table.add_column("line")
    for line, cycles in list(prediction.lines.items())[:lines]:
        microseconds = prediction.microseconds * cycles / prediction.cycles
        table.add_row(_percent(cycles, prediction), f"{microseconds:.1f}", escape(_text(line)))
    console.print(table)


def _text(line: str) -> str:
    """A line's file relative to this folder where it lies below it, and its text."""
    file, _, number = line.rpartition(":")
    path = Path(file)
    if not number.isdigit() or not path.is_file():
        return line
    near = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    rows = path.read_text().splitlines()
    text = rows[int(number) - 1].strip() if int(number) <= len(rows) else ""
    return f"{near}:{number}  {text}"


def _plain(prediction: Prediction) -> dict[str, Any]:
    return {**asdict(prediction), "microseconds": prediction.microseconds, "mxu_share": prediction.mxu_share}


def write_json(found: Sequence[Any], path: Path, schema: str = SCHEMA) -> None:
    """The predictions as a JSON document."""
    path.write_text(json.dumps({"schema": schema, "predicted": list(found)}, indent=1) + "\n")
