"""Where our TPU kernels stand beside those of others, by the same counter, each with the best tiles of a search.

Every time is predicted by `cycles.py` from the machine code of the same compiler. `run` recomputes; the results lie in
a CSV file, of which `standings_table.py` makes the tables.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, reduce
from pathlib import Path
from typing import Any

from crosstile.kernels.tiles.targets import get_target

from .contests import OURS, Contest, get_contest, grid, ladders
from .cores import CORES
from .cycles import Prediction, predict, predict_child, total_microseconds
from .peers import peers
from .programs import Job, chosen_tiles
from .search import Cache, Found, Tiles, descend, refuse_spills, search, sources_digest
from .shapes import get_shape

DTYPE = "bfloat16"
CHOSEN = f"{OURS}, tiles as chosen"
_MODEL = ("bundles", "cores", "cycles", "dma", "dumping", "machine", "matrix", "scalars", "steering")
_TOKAMAX = "tokamax"
MOST = 1.02  # of the data sheet's limit, which is a little below what a clock gives


@dataclass(frozen=True)
class Entry:
    """What one contestant reached in one contest on one chip.

    Attributes:
        microseconds: of the whole call: kernels, and what XLA puts around them.
        kernels: of its Pallas kernels alone, in microseconds; of a call without any, of all.
        share: of the time that the chip's data sheet allows for the call.
        tiles: the best found, as `name value` with spaces.
        trials: how many tiles were tried.
        refusal: why there is no time, "" where there is one.
    """

    chip: str
    contest: str
    contestant: str
    microseconds: float
    kernels: float
    share: float
    tiles: str
    trials: int
    refusal: str = ""


@dataclass(frozen=True)
class Standing:
    """One contest on one chip: ours at its best tiles and at those that the library chooses, and the best peer."""

    chip: str
    contest: str
    ours: Entry
    chosen: Entry | None
    peer: Entry

    @property
    def ratio(self) -> float:
        """Our time over the best peer's, of the whole calls: below 1 we are faster."""
        return self.ours.microseconds / self.peer.microseconds

    @property
    def kernel_ratio(self) -> float:
        """The same of the kernels alone."""
        return self.ours.kernels / self.peer.kernels


def run(
    chips: Iterable[str],
    contests: Sequence[Contest],
    contestants: Sequence[str] | None = None,
    *,
    seconds: float = 300.0,
    tokamax: str | None = None,
) -> Iterator[Entry]:
    """Search the tiles of every contestant in every contest; results come as they are found.

    Args:
        chips: names of TPUs.
        contests: of `contests.CONTESTS`.
        contestants: only these; None is all.
        seconds: after which no new tiles are tried, for one contestant in one contest.
        tokamax: the interpreter of an environment that has tokamax; None leaves its kernels out.
    """
    for contest in contests:
        for chip in chips:
            for contestant in (OURS, *contest.peers):
                if contestants is None or contestant in contestants:
                    yield from _searched(contest, chip, contestant, seconds, tokamax)


def _searched(contest: Contest, chip: str, contestant: str, seconds: float, tokamax: str | None) -> Iterator[Entry]:
    if contestant == OURS:
        job = Job(chip, get_shape(contest.shape).op, contest.direction, contest.shape, DTYPE)
        trial = _Trial(lambda tiles: predict(job, tiles), refuse_spills=True)
        kept = Cache(f"{job} {_about(contest)}", sources_digest(job.op, "pallas"))
        as_chosen = _Trial(lambda tiles: predict(job, tiles))
        yield _entry(contest, chip, CHOSEN, search(as_chosen, ({},)), as_chosen)
        config, walk = chosen_tiles(job), ladders(contest, job.op, None)
        start = {name: reduce(getattr, name.split("."), config) for name in walk}
        found = descend(trial, start, walk, cache=kept, seconds=seconds) if start else search(trial, ({},))
    elif contestant.startswith(_TOKAMAX) and tokamax is None:
        return
    else:
        python = tokamax if contestant.startswith(_TOKAMAX) and tokamax else sys.executable
        asked = {
            "peer": contestant, "shape": contest.shape, "dtype": DTYPE, "direction": contest.direction, "target": chip,
        }  # fmt: skip
        trial = _Trial(lambda tiles: predict_child("peer_dumping", {**asked, "tiles": dict(tiles)}, chip, python))
        key = (
            f"{json.dumps(asked)} least vmem {_about(contest)} {_packages(python) if python != sys.executable else ''}"
        )
        kept = Cache(key, _source(contestant))
        found = search(trial, grid(contest, contestant), cache=kept)
        if not found[0].refusal:
            walk = ladders(contest, contestant, found[0].tiles)
            walked = descend(trial, found[0].tiles, walk, cache=kept, seconds=seconds)
            found = _joined(found, walked)
    yield _entry(contest, chip, contestant, found, trial)


class _Trial:
    """Predicts a call with some tiles, and keeps what it predicted."""

    def __init__(self, predicting: Callable[[Tiles], Sequence[Prediction]], refuse_spills: bool = False) -> None:
        self._predicting, self._refuse_spills = predicting, refuse_spills
        self._known: dict[tuple[tuple[str, int], ...], Sequence[Prediction]] = {}

    def __call__(self, tiles: Tiles) -> float:
        predictions = self.predictions(tiles)
        if self._refuse_spills:
            refuse_spills(predictions)
        return total_microseconds(predictions)

    def predictions(self, tiles: Tiles) -> Sequence[Prediction]:
        """Of every program of the call."""
        key = tuple(sorted(tiles.items()))
        if key not in self._known:
            self._known[key] = self._predicting(tiles)
        return self._known[key]


def _joined(*searches: Sequence[Found]) -> tuple[Found, ...]:
    by_tiles = {tuple(sorted(found.tiles.items())): found for several in searches for found in several}
    return tuple(sorted(by_tiles.values(), key=lambda found: found.microseconds))


def _entry(contest: Contest, chip: str, contestant: str, found: Sequence[Found], trial: _Trial) -> Entry:
    best = found[0]
    tiles = " ".join(f"{name} {value}" for name, value in best.tiles.items())
    if best.refusal:
        reason = " ".join(best.refusal.split())[:200]
        return Entry(chip, contest.name, contestant, 0.0, 0.0, 0.0, tiles, len(found), reason)
    predictions = trial.predictions(best.tiles)
    total = total_microseconds(predictions)
    kernels = sum(prediction.microseconds for prediction in predictions if prediction.kernel) or total
    share = _least_microseconds(contest, chip) / total
    if share > MOST:
        reason = (
            f"predicted in {total:.1f} µs, which no chip of this kind could do: the model does not follow its loops"
        )
        return Entry(chip, contest.name, contestant, 0.0, 0.0, 0.0, tiles, len(found), reason)
    return Entry(chip, contest.name, contestant, total, kernels, share, tiles, len(found))


def _least_microseconds(contest: Contest, chip: str) -> float:
    """By the data sheet: of the products at the peak, and in a forward of the bytes at the bandwidth of HBM.

    A backward of attention computes five products where the forward has two.
    """
    shape, target = get_shape(contest.shape), get_target(chip)
    whole = 1 + CORES[chip].siblings
    compute = shape.flops / (target.bf16_tflops * whole) / 1e6
    if contest.direction == "backward":
        return compute * (2.5 if shape.op == "attention" else 2.0)
    return max(compute, shape.bytes(DTYPE) / (target.bandwidth * whole) / 1e3)


@cache
def _about(contest: Contest) -> str:
    """What a kept result depends on beside the tiles: the sizes, and the model that predicted it."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in _MODEL))
    return f"{get_shape(contest.shape)!r} {digest.hexdigest()[:16]}"


@cache
def _source(peer: str) -> str:
    """Of the function that makes a peer's call."""
    return hashlib.sha256(inspect.getsource(peers()[peer]).encode()).hexdigest()[:16]


@cache
def _packages(python: str) -> str:
    """The versions that another interpreter has."""
    asking = "from importlib.metadata import version; print(*map(version, ('tokamax', 'jax', 'libtpu')))"
    return subprocess.run([python, "-c", asking], capture_output=True, text=True, check=True).stdout.strip()


def standings(entries: Iterable[Entry]) -> list[Standing]:
    """Of every contest on every chip in which ours and a peer have a time, in the order of the contests."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if not entry.refusal:
            found.setdefault((entry.contest, entry.chip), []).append(entry)
    result = []
    for (contest, chip), those in found.items():
        own = {entry.contestant: entry for entry in those if entry.contestant in (OURS, CHOSEN)}
        peers = [entry for entry in those if entry.contestant not in own]
        if own and peers:
            ours = min(own.values(), key=lambda entry: entry.microseconds)
            best = min(peers, key=lambda entry: entry.microseconds)
            result.append(Standing(chip, contest, ours, own.get(CHOSEN), best))
    return result


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """The old entries with the new ones in their place, in the order of contests, chips and contestants."""
    found = {(entry.contest, entry.chip, entry.contestant): entry for entry in (*old, *new)}
    return sorted(found.values(), key=_order)


def _order(entry: Entry) -> tuple[int, str, int, str]:
    from .contests import CONTESTS

    first = {CHOSEN: 0, OURS: 1}.get(entry.contestant, 2)
    return CONTESTS.index(get_contest(entry.contest)), entry.chip, first, entry.contestant


def read_csv(path: Path) -> list[Entry]:
    """The entries that `write_csv` wrote; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_read(row) for row in csv.DictReader(file)]


def _read(row: Mapping[str, str]) -> Entry:
    numbers: dict[str, Any] = {name: float(row[name]) for name in ("microseconds", "kernels", "share")}
    return Entry(**{**row, **numbers, "trials": int(row["trials"])})


def write_csv(entries: Iterable[Entry], path: Path) -> None:
    """One line a contestant."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Entry)], lineterminator="\n")
        writer.writeheader()
        for entry in entries:
            row = asdict(entry)
            writer.writerow(
                {
                    **row,
                    **{name: f"{row[name]:.1f}" for name in ("microseconds", "kernels")},
                    "share": f"{entry.share:.3f}",
                }
            )


def write_json(entries: Iterable[Entry], path: Path) -> None:
    """The same as a JSON document."""
    document = {"schema": "crosstile.standings/1", "predicted": [asdict(entry) for entry in entries]}
    path.write_text(json.dumps(document, indent=1) + "\n")
