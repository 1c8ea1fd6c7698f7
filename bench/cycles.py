"""Predict how long a kernel runs on a TPU that is not here, and say where its time goes.

The compiler's final bundles are run in their scalar half (`machine.py`), with a queue for copies (`dma.py`) and the
matrix units' own pace (`matrix.py`). What comes out is predicted; only a chip measures. `docs/cycles.md` says how near
it is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import environ
from pathlib import Path
from typing import Any

from .bundles import SOURCES, BundleError, Program, read_bundles
from .cores import CORES, PROGRAM_SECONDS, Core
from .dma import DeadlockError
from .machine import Machine, MachineError, Run
from .programs import Job
from .scalars import ScalarError
from .steering import Words
from .tpu import environment

COMPILER = "(grid, windows and copies)"  # what bundles without a line of Python are for
WAITING = "(waiting for copies)"
SECONDS = 600.0
NOT_COUNTED = (BundleError, DeadlockError, MachineError, ScalarError)  # what a program that the model fails on raises
DUMP = "llo"  # the folder of the bundles, in that of a child
_KERNEL = 'custom_call_target="tpu_custom_call"'
_NAME = re.compile(r"(\d+)-(.+)-\d+-final_bundles\.txt")
_AROUND = ("TLP", "<")  # the program around the kernels, and what starts and ends it
Steering = Sequence[tuple[str, Mapping[str, Sequence[int]]]]


class CyclesError(RuntimeError):
    """A job has no prediction; the message says why."""


@dataclass(frozen=True)
class Prediction:
    """One program on one core: all times are predicted.

    Attributes:
        program: the kernel's name, or that of the XLA operation.
        kernel: whether it is a Pallas kernel.
        cycles: from start to end.
        waits: of them, waiting for copies.
        held: of them, held back by the matrix units beyond what the compiler planned for.
        units: cycles in which each unit is busy: `MXU` counts rows, the others the slots that the bundles fill.
        lines: cycles by `file:line` of Python; of several in one bundle, each has its part.
        bytes_moved: between HBM and the core.
        memory_busy: cycles in which HBM was moving them.
        unknown: values that the program asked of its vector half and that were taken for 0.
    """

    program: str
    target: str
    kernel: bool
    cycles: float
    waits: float
    held: float
    units: dict[str, float]
    lines: dict[str, float]
    bytes_moved: int
    memory_busy: float
    unknown: int

    @property
    def microseconds(self) -> float:
        """At the core's clock."""
        return self.cycles / CORES[self.target].clock * 1e6

    @property
    def mxu_share(self) -> float:
        """Of the matrix units' time, the part in which rows enter them: the share of the peak that the shapes reach."""
        return self.units.get("MXU", 0.0) / self.cycles if self.cycles else 0.0

    @property
    def limit(self) -> str:
        """The unit, or HBM, that is busy longest: what to relieve first."""
        busy = {**self.units, "HBM": self.memory_busy}
        return max(busy, key=busy.__getitem__)


def predict(job: Job, tiles: Mapping[str, int] | None = None) -> tuple[Prediction, ...]:
    """Compile a job for its TPU in a process of its own, and predict every program in it.

    `tiles` changes fields of the configuration that the library would choose, such as `{"forward.block_q": 512}`.
    Raises CyclesError where the target is no TPU, a field does not exist, or the compiler refuses.
    """
    if job.target not in CORES:
        raise CyclesError(f"target: got {job.target!r}; it must be a TPU, one of {', '.join(CORES)}")
    try:
        return predict_child("dumping", {"job": asdict(job), "tiles": dict(tiles or {})}, job.target)
    except CyclesError as error:
        raise CyclesError(f"{job}: {error}") from error


def predict_child(
    module: str, asked: Mapping[str, Any], target: str, python: str = sys.executable
) -> tuple[Prediction, ...]:
    """Predict every program that a child process compiles: a module of `crosstile.bench`, as `dumping` is one.

    `asked` is what it reads, and `python` its interpreter. Raises CyclesError with the compiler's refusal, or with what
    of a program cannot be counted.
    """
    with tempfile.TemporaryDirectory(prefix="crosstile-cycles-") as name:
        folder = Path(name)
        refusal = run_child(module, folder, f" {SOURCES}", json.dumps(asked), python)
        if refusal is not None:
            raise CyclesError(refusal)
        try:
            return predict_dump(folder / DUMP, target, json.loads((folder / "steering.json").read_text()))
        except NOT_COUNTED as error:
            raise CyclesError(f"not counted: {type(error).__name__}: {error}") from error


def run_child(
    module: str, folder: Path, flags: str = "", asked: str = "", python: str = sys.executable, seconds: float = SECONDS
) -> str | None:
    """Run a module of `crosstile.bench` that compiles for TPUs, and leaves bundles in `folder / DUMP`; its refusal.

    `asked` is what it reads, and `flags` the compiler's beside those that dump.
    """
    (folder / DUMP).mkdir()
    settings = environment(folder / DUMP)
    settings["LIBTPU_INIT_ARGS"] += flags
    child = subprocess.run(
        [python, "-m", f"crosstile.bench.{module}", str(folder)],
        input=asked,
        capture_output=True,
        text=True,
        env={**environ, **settings},
        timeout=seconds,
    )
    if not child.returncode:
        return None
    refusal = folder / "refusal.txt"
    return refusal.read_text() if refusal.exists() else child.stderr.strip()[-1500:]


def predict_dump(folder: Path, target: str, steering: Steering = ()) -> tuple[Prediction, ...]:
    """Predict every program whose bundles lie in a folder, in the order of compilation.

    `steering` has, for each kernel by its name and in order, the words of its operands (see `steering.py`). The name is
    "" where the kernel's author gave none; the compiler then named it.
    """
    waiting = _by_kernel(steering)
    found = []
    for path, name in _dumped(folder):
        if name.startswith(_AROUND):
            continue
        kernel = _KERNEL in _beside(path, "schedule-analysis_final_bundles.txt")
        given = waiting.get(_plain(name)) or (waiting.get("", []) if kernel else [])
        found.append(_predict_program(path, name, kernel, target, given.pop(0) if given else {}))
    return tuple(found)


def cycles_of(folder: Path, target: str, names: Container[str], steering: Steering = ()) -> dict[str, float]:
    """Cycles of every program in a folder that the compiler made of one of these instructions, by its name.

    `steering` is as in `predict_dump`; what it leaves open is taken for 0. Of a program that exchanges with other chips
    these are its own: it waits for none of them. A program that cannot be run is left out.
    """
    found, core, waiting = {}, CORES[target], _by_kernel(steering)
    for path, name in _dumped(folder):
        if name not in names:
            continue
        given = waiting.get(_plain(name), [])
        words = given.pop(0) if given else {}
        with suppress(MachineError, ScalarError, DeadlockError):
            machine = _machine(core, read_bundles(path))
            found[name] = machine.run(core.memory(_alone(machine, core, words)), words, neighbours=True).cycles
    return found


def _by_kernel(steering: Steering) -> dict[str, list[Words]]:
    """The words of the kernels of each name, in their order."""
    found: dict[str, list[Words]] = {}
    for name, words in steering:
        found.setdefault(name, []).append({int(number): list(data) for number, data in words.items()})
    return found


def _plain(name: str) -> str:
    """An instruction's name without the number that the compiler adds."""
    return re.sub(r"\.\d+$", "", name)


def _dumped(folder: Path) -> Iterator[tuple[Path, str]]:
    """The file of every program's bundles, in the order of compilation, and the name of its instruction."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = _NAME.fullmatch(path.name)
        if match and "schedule-analysis" not in path.name:
            yield path, match.group(2)


def _machine(core: Core, program: Program) -> Machine:
    return Machine(program, core.delay, lambda first, end: core.matrix.stalls(program, first, end))


def _predict_program(path: Path, name: str, kernel: bool, target: str, words: Words) -> Prediction:
    core, program = CORES[target], read_bundles(path)
    machine = _machine(core, program)
    run = machine.run(core.memory(_alone(machine, core, words)), words)
    busy = _units(_beside(path, "final_hlo-static-per-bundle-utilization.txt"), machine, run)
    busy["MXU"] = sum(
        visits * sum(core.matrix.work(program, first, machine.ends[first]).values()) / core.matrix.count
        for first, visits in run.visits.items()
    )
    return Prediction(
        program=_plain(name),
        target=target,
        kernel=kernel,
        cycles=run.cycles,
        waits=sum(run.waits.values()),
        held=sum(machine.stalled[first] * visits for first, visits in run.visits.items()),
        units=busy,
        lines=_lines(program, machine, run),
        bytes_moved=run.bytes_moved,
        memory_busy=run.memory_busy,
        unknown=run.unknown,
    )


def _alone(machine: Machine, core: Core, words: Words) -> bool:
    """Whether the program gives the other core of the device nothing to do: it copies nothing there."""
    return not core.siblings or not machine.run(core.memory(False), words, core=1, neighbours=True).bytes_moved


def _beside(path: Path, what: str) -> str:
    """The text of another file of the same program, "" where the dump has none."""
    lead = re.escape(path.name.rpartition("-final_bundles")[0].rpartition("-")[0])
    for other in path.parent.iterdir():
        if re.fullmatch(rf"{lead}-\d+-{re.escape(what)}", other.name):
            return other.read_text(errors="replace")
    return ""


def _units(table: str, machine: Machine, run: Run) -> dict[str, float]:
    """Busy cycles of each unit: the slots that the bundles fill, by how many a bundle has, times the visits."""
    head, _, body = table.partition("== UTILIZATION:")
    lines = head.splitlines()
    if len(lines) < 3:
        return {}
    names = [name.strip() for name in lines[1].split(",")]
    slots = [max(1, int(count)) for count in lines[2].split()]
    rows = [list(map(int, line.split())) for line in body.splitlines() if line.strip()]
    busy: defaultdict[str, float] = defaultdict(float)
    for first, visits in run.visits.items():
        for row in rows[first : machine.ends[first]]:
            for name, filled, width in zip(names, row, slots, strict=True):
                if filled:
                    busy[name] += visits * filled / width
    return {name.replace("VLOAD:FILL", "fills").replace("VSTORE:SPILL", "spills"): busy[name] for name in names}


def _lines(program: Program, machine: Machine, run: Run) -> dict[str, float]:
    """Cycles by line of Python; what the matrix units hold back is spread over the stretch.

    A bundle without a line belongs to the compiler's own work.
    """
    found: defaultdict[str, float] = defaultdict(float)
    for first, visits in run.visits.items():
        end = machine.ends[first]
        cycles = visits * (end - first + machine.stalled[first]) / (end - first)
        for bundle in program.bundles[first:end]:
            lines = [instruction.where for instruction in bundle if instruction.where] or [COMPILER]
            for line in lines:
                found[line] += cycles / len(lines)
    if waits := sum(run.waits.values()):
        found[WAITING] = waits
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def total_microseconds(predictions: Sequence[Prediction]) -> float:
    """Predicted time of all programs, one after the other, with the time between them."""
    return sum(prediction.microseconds + PROGRAM_SECONDS * 1e6 for prediction in predictions)
