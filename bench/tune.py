"""`crosstile tune`: search the tiles of named shapes, and write what was found to the tables that calls look into.

On a TPU that is not here a trial is compiled and its cycles are counted; with a chip it is timed. A search goes on
where the last one stopped, since every trial is kept (`search.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crosstile.dispatch import OPS
from crosstile.kernels.tiles import tuned
from crosstile.kernels.tiles.targets import Target, get_target
from crosstile.kernels.tiles.tuned import Entry

from .ladders import Space, spaces
from .programs import Direction, Job, spec_of, unsupported
from .search import Cache, Evaluate, Found, Tiles, descend, search, sources_digest
from .shapes import get_shape


@dataclass(frozen=True)
class Trials:
    """How times are found: `of` makes the trials of one direction of a shape, by "predicted" or "measured"."""

    of: Callable[[Job], Evaluate]
    by: str


class TuneError(RuntimeError):
    """A shape cannot be tuned; the message says why."""


@dataclass(frozen=True)
class Tuned:
    """What one search of one shape gave: microseconds by tiles.

    Attributes:
        in_use: of the tiles that a call has gets until now, from the tables or the heuristic.
        origin: where those come from.
        best: what was found.
        trials: how many tiles were tried, those that the cache knew among them.
        done: whether no neighbour of the best is left to try.
    """

    job: str
    what: str
    heuristic: float
    in_use: float
    origin: str
    best: Found
    trials: int
    done: bool

    @property
    def gap(self) -> float:
        """The time of the tiles in use, as a multiple of that of the best: 1 where nothing is to be gained."""
        return self.in_use / self.best.microseconds if isfinite(self.best.microseconds) else 1.0


def tune(
    op: str, shape_name: str, target: Target, dtype: str, trials_of: Trials, seconds: float, digest: str
) -> tuple[list[Tuned], Entry | None]:
    """Search the tiles of one shape on one chip, and the entry of a table that they make.

    There is no entry where the time ran out before any tiles were found to work. Raises TuneError where the library
    does not offer the shape there.
    """
    shape = get_shape(shape_name)
    probe = Job(target.name, op, "forward", shape_name, dtype)
    if reasons := unsupported(probe):
        raise TuneError(f"{probe}: {' '.join(reasons)}")
    declared = OPS[op].module("tiles")
    spec, inputs = spec_of(probe), shape.prepare(dtype)[1]
    sizes = declared.sizes_of(spec, inputs)
    heuristic = declared.choose_config(spec, target, sizes)
    used, origin = OPS[op].tiles(spec, target, inputs)
    end = time.monotonic() + seconds
    searches = spaces(shape, target, sizes._asdict(), heuristic)
    others = tuned.changed_tiles(heuristic, {name: 0 for space in searches for name in space.ladders})

    def trials(directions: Sequence[Direction]) -> tuple[Evaluate, Cache]:
        jobs = [Job(target.name, op, direction, shape_name, dtype) for direction in directions]
        return _summed([trials_of.of(job) for job in jobs]), Cache(
            f"{trials_of.by} {' '.join(map(str, jobs))} {others}", digest
        )

    def allowed(tiles: Tiles) -> bool:
        """Whether a call would be given these tiles."""
        return tuned.applied(declared, spec, target, heuristic, tiles, sizes) is not None

    rows = []
    for space in searches:
        before, in_use = (_clipped(config, space) for config in (heuristic, used))
        evaluate, cache = trials(space.directions)
        tried = search(evaluate, [before, in_use], cache=cache, allowed=allowed)
        at = {tuple(each.tiles.items()): each.microseconds for each in tried}
        found = descend(
            evaluate, tried[0].tiles, space.ladders, cache=cache, allowed=allowed, seconds=end - time.monotonic()
        )
        rows.append(
            Tuned(
                f"{target.name} {op} {shape_name} {dtype}",
                space.name,
                at[tuple(before.items())],
                at[tuple(in_use.items())],
                origin,
                _working(found, *trials(space.must_work)) if space.must_work else found[0],
                len(found),
                time.monotonic() < end,
            )
        )
    if not all(isfinite(row.best.microseconds) for row in rows):
        return rows, None
    return rows, Entry(
        kinds=declared.kinds_of(spec),
        sizes=tuned.bucketed(sizes)._asdict(),
        tiles={name: value for row in rows for name, value in row.best.tiles.items()},
        heuristic={row.what: _rounded(row.heuristic) for row in rows},
        tuned={row.what: _rounded(row.best.microseconds) for row in rows},
        by=trials_of.by,
        source=shape_name,
    )


def _rounded(microseconds: float) -> float | None:
    """As a table has it: None for tiles that were refused."""
    return round(microseconds, 1) if isfinite(microseconds) else None


def _working(found: Sequence[Found], evaluate: Evaluate, cache: Cache) -> Found:
    """The fastest that another direction does not refuse; most of the first do not."""
    for each in found:
        if isfinite(each.microseconds):
            (there,) = search(evaluate, [each.tiles], cache=cache)
            if isfinite(there.microseconds):
                return each
    return Found(found[0].tiles, inf, "refused where nothing is saved for a backward")


def _summed(parts: Sequence[Evaluate]) -> Evaluate:
    return lambda tiles: sum(part(tiles) for part in parts)


def _clipped(config: Any, space: Space) -> dict[str, int]:
    """The searched fields of a configuration; a value above its ladder is shrunk to the top, as kernels shrink it."""
    found = {}
    for name, ladder in space.ladders.items():
        part, _, field = name.rpartition(".")
        found[name] = min(int(getattr(getattr(config, part) if part else config, field)), ladder[-1])
    return found


def shapes_of(op: str, names: Sequence[str] | None, lengths: Sequence[int]) -> list[str]:
    """The shapes to tune: those named, else the op's everyday ones, each with so many tokens if lengths are given.

    Shapes for decoding count no tokens that could change.
    """
    from .shapes import SHAPES

    chosen = [get_shape(name) for name in names or ()] or [s for s in SHAPES if s.everyday and s.op == op]
    found: list[str] = []
    for shape in chosen:
        if shape.op != op:
            continue
        if not lengths or not shape.trains or not shape.counts or "@" in shape.name:
            found.append(shape.name)
            continue
        found += [
            shape.name
            if all(getattr(shape, name) == length for name in shape.counts)
            else shape.resized(dict.fromkeys(shape.counts, length)).name
            for length in lengths
        ]
    return list(dict.fromkeys(found))


def write(file: Path, op: str, chip: str, entry: Entry) -> None:
    """Put an entry into a table, in the place of one with the same key."""
    kept = {known.key: known for known in tuned.read_table(file)}
    kept[entry.key] = entry
    tuned.write_table(file, op, chip, list(kept.values()))
    tuned.forget()


def run(
    asked: Sequence[tuple[str, str, str]],
    dtype: str,
    trials_of: Trials,
    table: Callable[[str, str], Path] | None,
    seconds: float,
) -> Iterator[Tuned | str]:
    """Tune each (op, target, shape), writing each entry when it is found; yields every row, or why there is none.

    `table` gives the file of an op and a chip; None writes nothing. The time is shared out evenly among what is left.
    """
    end = time.monotonic() + seconds
    digests: dict[tuple[str, str], str] = {}
    for place, (op, chip, shape) in enumerate(asked):
        if place and time.monotonic() > end:
            yield f"time was up: {len(asked) - place} shapes are left for the next run"
            return
        target = get_target(chip)
        implementation = "triton" if target.is_gpu else "pallas"
        digest = digests.setdefault((op, implementation), sources_digest(op, implementation))
        share = max(0.0, end - time.monotonic()) / (len(asked) - place)
        try:
            rows, entry = tune(op, shape, target, dtype, trials_of, share, digest)
        except TuneError as problem:
            yield str(problem)
            continue
        if table is not None and entry is not None:
            write(table(op, chip), op, chip, entry)
        yield from rows


def table_of(rows: Sequence[Tuned], by: str) -> Table:
    """Heuristic, in use and tuned, a search a row."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=by, title_justify="left")
    for heading in ("shape", "of"):
        table.add_column(heading)
    for heading in ("heuristic µs", "in use µs", "tuned µs", "heuristic / tuned", "in use / tuned", "trials"):
        table.add_column(heading, justify="right")
    table.add_column("tiles")
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Tuned) -> tuple[str, ...]:
    """One row as text."""
    best = row.best.microseconds
    return (
        row.job,
        row.what,
        *(_microseconds(value) for value in (row.heuristic, row.in_use, best)),
        *(
            f"{value / best:.3f}" if isfinite(value) and isfinite(best) else "–"
            for value in (row.heuristic, row.in_use)
        ),
        f"{row.trials}" + ("" if row.done else ", time was up"),
        ", ".join(f"{name} {value}" for name, value in row.best.tiles.items())
        if isfinite(best)
        else row.best.refusal[:90],
    )


def _microseconds(value: float) -> str:
    return "refused" if value == inf else f"{value:.1f}"


def show(rows: Sequence[Tuned], by: str, console: Console) -> None:
    """The table, and by how much the tiles in use are slower than what was found."""
    console.print(table_of(rows, by))
    gaps = sorted(row.gap for row in rows)
    if gaps:
        console.print(
            f"{by}: in use / tuned: median {gaps[len(gaps) // 2]:.3f}, largest {gaps[-1]:.3f}, of {len(gaps)} searches",
            highlight=False,
        )
