"""What is wrong with the tuned tables: entries that no call can reach any more, or that name what there is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosstile.dispatch import OPS
from crosstile.kernels.tiles import tuned
from crosstile.kernels.tiles.targets import TARGETS
from crosstile.kernels.tiles.tuned import Entry

from .programs import Job, spec_of, unsupported
from .shapes import get_shape

SLOWER = 1.01  # a tuned time may be that multiple of the heuristic's


def files(kernels: Path) -> list[Path]:
    """Every file of a `tuned` folder of an op, below the folder of all ops."""
    return sorted(kernels.glob("*/tuned/*"))


def problems(kernels: Path) -> list[str]:
    """A sentence for everything that is wrong with the tables below that folder."""
    return [f"{file.relative_to(kernels)}: {problem}" for file in files(kernels) for problem in _of_file(file)]


def _of_file(file: Path) -> Iterator[str]:
    op, chip = file.parent.parent.name, file.stem
    if file.suffix != ".json" or chip not in TARGETS:
        yield f"a table is named CHIP.json, and the chips are {', '.join(TARGETS)}"
        return
    if op not in OPS or not hasattr(OPS[op].module("tiles"), "sizes_of"):
        yield f"no op {op!r} declares sizes_of and kinds_of"
        return
    try:
        document = json.loads(file.read_text())
        entries = tuned.read_table(file)
    except (ValueError, KeyError, TypeError) as error:
        yield f"cannot be read: {error}"
        return
    if (document.get("op"), document.get("chip")) != (op, chip):
        yield f"says that it is of {document.get('op')} on {document.get('chip')}"
    keys = [entry.key for entry in entries]
    if keys != sorted(keys):
        yield "its entries are not sorted"
    for entry in entries:
        if keys.count(entry.key) > 1:
            yield f"{entry.source}: another entry has the same key"
        for problem in _of_entry(op, chip, entry):
            yield f"{entry.source}: {problem}"


def _of_entry(op: str, chip: str, entry: Entry) -> Iterator[str]:
    try:
        shape = get_shape(entry.source)
    except ValueError as error:
        yield str(error)
        return
    if shape.op != op:
        yield f"its source is a shape of {shape.op}"
        return
    job = Job(chip, op, "forward", entry.source, str(entry.kinds.get("dtype")))
    try:
        reasons = unsupported(job)
    except (TypeError, AttributeError):
        yield f"kinds: got {entry.kinds}, which have no dtype"
        return
    if reasons:
        yield f"the library does not offer it there: {' '.join(reasons)}"
    declared = OPS[op].module("tiles")
    spec, inputs = spec_of(job), shape.prepare(job.dtype)[1]
    yield from _differences("kinds", entry.kinds, declared.kinds_of(spec))
    sizes = declared.sizes_of(spec, inputs)
    yield from _differences("sizes", entry.sizes, tuned.bucketed(sizes)._asdict())
    target = TARGETS[chip]
    if not all(type(value) is int and value > 0 for value in entry.tiles.values()):
        yield f"tiles: got {entry.tiles}; they must be numbers above 0"
    elif tuned.applied(declared, spec, target, declared.choose_config(spec, target, sizes), entry.tiles, sizes) is None:
        yield f"tiles: {declared.CONFIG.__name__} has no such fields, or does not fit {entry.tiles}"
    if entry.by not in ("predicted", "measured"):
        yield f"by: got {entry.by!r}; it must be 'predicted' or 'measured'"
    for direction, microseconds in entry.tuned.items():
        before = entry.heuristic.get(direction)
        if microseconds is None or (before is not None and microseconds > before * SLOWER):
            yield f"{direction}: {microseconds} µs, and the heuristic's tiles take {before}"


def _differences(what: str, entry: dict[str, Any], declared: dict[str, Any]) -> Iterator[str]:
    if entry != declared:
        yield f"{what}: got {entry}; the op declares {declared} of its source"
