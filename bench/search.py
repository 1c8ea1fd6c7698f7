"""Find the fastest tiles of a kernel by trying some: each trial is one compilation, so that few must do.

`search` tries a list of candidates. `descend` walks: from tiles that are known to work it changes one field at a time
to a neighbouring value of its ladder, keeps what is faster, and stops where no neighbour is. `predicting` makes the
trial of a TPU that is not here. What a trial gave is kept on disk, so that a search goes on where it stopped:

    from crosstile.bench.programs import Job
    from crosstile.bench.search import Cache, descend, predicting, sources_digest

    job = Job("v6e", "attention", "forward", "llama-3-8b", "bfloat16")
    found = descend(
        predicting(job),
        {"forward.block_q": 256, "forward.block_kv": 256},
        {"forward.block_q": (128, 256, 512, 1024), "forward.block_kv": (128, 256, 512, 1024, 2048)},
        cache=Cache(str(job), sources_digest(job.op, "pallas")),
    )
    print(found[0].tiles, found[0].microseconds)
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache as once
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, combinations
from math import inf
from pathlib import Path

from crosstile.kernels.tiles.targets import get_target
from crosstile.kernels.tiles.tuned import user_folder

from .cycles import CyclesError, Prediction, predict, total_microseconds
from .programs import Job

Tiles = Mapping[str, int]
Evaluate = Callable[[Tiles], float]
Allowed = Callable[[Tiles], bool]
SPILLS = 0.25  # of a TPU's slots for them: with more, tiles are refused
LEAST_GAIN = 0.002  # of the time: a smaller gain is no reason to move
_COMPILERS = ("jax", "jaxlib", "libtpu", "triton")


class RefusedError(RuntimeError):
    """These tiles cannot be used; the message says why: a spill, too much memory, a compiler's refusal."""


@dataclass(frozen=True)
class Found:
    """What one trial gave.

    Attributes:
        tiles: the fields that were set, by name; a field of a part is `part.field`.
        microseconds: infinite where the tiles were refused.
        refusal: why, "" where they were not.
    """

    tiles: dict[str, int]
    microseconds: float
    refusal: str = ""


class Cache:
    """Results of trials on disk, one small file each; several processes may share it.

    A result belongs to the caller's key (what is compiled, for which chip), the tiles, the compilers' versions and the
    digest of the kernels' sources, so that nothing stale is found.
    """

    def __init__(self, key: str, digest: str = "", folder: Path | None = None) -> None:
        self._folder = (folder or user_folder()) / "trials"
        self._about = [key, digest, *compiler_versions()]

    def get(self, tiles: Tiles) -> Found | None:
        """The result of an earlier trial of these tiles, if there was one."""
        try:
            kept = json.loads(self._file(tiles).read_text())
        except (OSError, ValueError):
            return None
        return Found(kept["tiles"], inf if kept["microseconds"] is None else kept["microseconds"], kept["refusal"])

    def put(self, found: Found) -> None:
        """Keep a result; a folder that cannot be written is no error."""
        kept = {**asdict(found), "microseconds": None if found.refusal else found.microseconds, "about": self._about}
        file = self._file(found.tiles)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(kept, indent=1) + "\n")
            partial.replace(file)
        except OSError:
            return

    def _file(self, tiles: Tiles) -> Path:
        told = json.dumps([self._about, sorted(tiles.items())])
        return self._folder / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.json"


def search(
    evaluate: Evaluate,
    candidates: Iterable[Tiles],
    *,
    cache: Cache | None = None,
    allowed: Allowed = lambda tiles: True,
) -> tuple[Found, ...]:
    """Try every candidate; the results with the fastest first, and those that were refused last.

    `evaluate` returns microseconds, or raises RefusedError or CyclesError, whose message is then the refusal. It is not
    called for tiles that the cache knows, nor twice for the same, nor for those that are not `allowed`.
    """
    trials = _Trials(evaluate, cache, allowed)
    for tiles in candidates:
        trials(tiles)
    return trials.sorted()


def descend(
    evaluate: Evaluate,
    start: Tiles,
    ladders: Mapping[str, Sequence[int]],
    *,
    cache: Cache | None = None,
    allowed: Allowed = lambda tiles: True,
    seconds: float | None = None,
) -> tuple[Found, ...]:
    """Walk from `start` to tiles that no neighbour beats; all results as `search` returns them.

    A ladder has the values that a field may take, in order; a field without one stays as it is in `start`. A step
    moves one field to the next value up or down, and on in that direction while it gains. Where a larger value was
    refused, there may be room for it if another field of the same part takes less: such trades are tried last, and so
    are two blocks of a part that grow or shrink together, as square tiles do. After `seconds` no new trial begins: the
    results so far are returned, and with a cache the next call goes on from there.
    """
    walk = _Walk(_Trials(evaluate, cache, allowed), start, inf if seconds is None else time.monotonic() + seconds)
    improved = True
    while improved:
        improved = False
        for field, ladder in ladders.items():
            for towards in (1, -1):
                moved = False
                while (value := _next(ladder, walk.best.tiles[field], towards)) is not None and walk.try_(
                    {field: value}
                ):
                    moved = improved = True
                if moved:  # the other direction is where it came from
                    break
        if not improved:
            improved = any(walk.try_(change) for change in chain(_trades(walk, ladders), _together(walk, ladders)))
    return walk.trials.sorted()


class _Walk:
    """Where a descent stands."""

    def __init__(self, trials: _Trials, start: Tiles, end: float) -> None:
        self.trials, self.best, self._end = trials, trials(start), end

    def try_(self, change: Tiles) -> bool:
        """Try a change of the best tiles, and stay there if it gains."""
        if time.monotonic() > self._end:
            return False
        tried = self.trials({**self.best.tiles, **change})
        gains = tried.microseconds < self.best.microseconds * (1 - LEAST_GAIN)
        if gains:
            self.best = tried
        return gains

    def refused(self, change: Tiles) -> bool:
        """Whether this change was tried and refused."""
        return self.trials.known({**self.best.tiles, **change}) == inf


def _trades(walk: _Walk, ladders: Mapping[str, Sequence[int]]) -> Iterator[Tiles]:
    """One field up, which was refused alone, and another of its part down."""
    at = walk.best.tiles
    for field, ladder in ladders.items():
        up = _next(ladder, at[field], 1)
        if up is None or not walk.refused({field: up}):
            continue
        for other, steps in ladders.items():
            down = _next(steps, at[other], -1)
            if other != field and down is not None and _part(field) == _part(other):
                yield {field: up, other: down}


def _together(walk: _Walk, ladders: Mapping[str, Sequence[int]]) -> Iterator[Tiles]:
    """Two blocks of one part, both up or both down."""
    at = walk.best.tiles
    blocks = [field for field in ladders if field.rpartition(".")[2].startswith("block_")]
    pairs = [pair for pair in combinations(blocks, 2) if _part(pair[0]) == _part(pair[1])]
    for towards in (1, -1):
        for one, other in pairs:
            first, second = (_next(ladders[field], at[field], towards) for field in (one, other))
            if first is not None and second is not None:
                yield {one: first, other: second}


def _part(field: str) -> str:
    """The part of a configuration that a field is of, "" where it has none."""
    return field.rpartition(".")[0]


def _next(ladder: Sequence[int], value: int, towards: int) -> int | None:
    """The nearest value of a ladder above or below; a value that is not on it stands between two that are."""
    beyond = [step for step in ladder if (step - value) * towards > 0]
    return min(beyond, key=lambda step: abs(step - value)) if beyond else None


class _Trials:
    """Every trial of one search, each made once."""

    def __init__(self, evaluate: Evaluate, cache: Cache | None, allowed: Allowed) -> None:
        self._evaluate, self._cache, self._allowed = evaluate, cache, allowed
        self._found: dict[tuple[tuple[str, int], ...], Found] = {}

    def __call__(self, tiles: Tiles) -> Found:
        key = tuple(sorted(tiles.items()))
        if key not in self._found:
            if self._allowed(tiles):
                kept = self._cache.get(tiles) if self._cache else None
                self._found[key] = kept or self._try(dict(tiles))
            else:
                self._found[key] = Found(dict(tiles), inf, "not allowed")
        return self._found[key]

    def known(self, tiles: Tiles) -> float | None:
        """The time of tiles that were tried in this search, None of others."""
        found = self._found.get(tuple(sorted(tiles.items())))
        return None if found is None else found.microseconds

    def _try(self, tiles: dict[str, int]) -> Found:
        try:
            found = Found(tiles, self._evaluate(tiles))
        except (RefusedError, CyclesError) as refusal:
            found = Found(tiles, inf, str(refusal) or type(refusal).__name__)
        except subprocess.TimeoutExpired as refusal:
            found = Found(tiles, inf, f"the compiler took longer than {refusal.timeout:.0f} s")
        if self._cache:
            self._cache.put(found)
        return found

    def sorted(self) -> tuple[Found, ...]:
        """The fastest first; of equals the first that was tried."""
        return tuple(sorted(self._found.values(), key=lambda found: found.microseconds))


def predicting(job: Job) -> Evaluate:
    """Trials of a job on a chip that is not here: the predicted time of all that its program does.

    Tiles with which a kernel spills registers, or needs more memory than the chip has, are refused.
    """
    return _on_gpu(job) if get_target(job.target).is_gpu else _on_tpu(job)


def _on_tpu(job: Job) -> Evaluate:
    """Its cycles (`cycles.py`); more VMEM than there is, the compiler itself refuses."""

    def evaluate(tiles: Tiles) -> float:
        predictions = predict(job, tiles)
        refuse_spills(predictions)
        return total_microseconds(predictions)

    return evaluate


def refuse_spills(predictions: Iterable[Prediction]) -> None:
    """Raise RefusedError where a kernel spills vector registers in more than a quarter of its slots for them.

    Fewer cost what the prediction counts.
    """
    for prediction in predictions:
        busy = max(prediction.units.get("spills", 0.0), prediction.units.get("fills", 0.0))
        if prediction.kernel and busy > SPILLS * prediction.cycles:
            share = busy / prediction.cycles
            raise RefusedError(f"{prediction.program} spills vector registers in {share:.0%} of its slots for them")


def _on_gpu(job: Job) -> Evaluate:
    """The time by its instructions' issue (`issue.py`)."""
    from .issue_child import ask

    def evaluate(tiles: Tiles) -> float:
        microseconds, refusal = ask(job, tiles)
        if refusal:
            raise RefusedError(refusal)
        return microseconds

    return evaluate


def sources_digest(op: str, implementation: str) -> str:
    """Of the sources of an op's kernels, "triton" or "pallas", with its spec and the shared helpers.

    Its `tiles.py` is left out: a trial says itself which tiles it is of.
    """
    import crosstile.kernels

    root = Path(crosstile.kernels.__path__[0])
    own = [*sorted((root / op).glob(f"{implementation}*.py")), root / op / "spec.py"]
    digest = hashlib.sha256()
    for file in (*own, *sorted((root / "tiles").glob(f"{implementation}*.py"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@once
def compiler_versions() -> tuple[str, ...]:
    """`name==version` of the compilers that are installed."""
    found = []
    for name in _COMPILERS:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return tuple(found)
