"""Run the scalar half of a TPU program: it alone decides which bundles are issued, and so how many cycles pass.

A core issues one bundle a cycle in the order of the program. Each stretch of bundles between two branches becomes one
Python function of its scalar instructions, of those alone on which control, copies and flags depend; the vector half is
counted and not computed. A value that comes from the vector half reads as 0, and `Run.unknown` says how many such were
asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .bundles import Instruction, Program, value_of
from .dma import GRANULE, Memory, Queue
from .scalars import MASK, UNKNOWN, Names, assignment, operand_at, read, smem_word, store

MOST_STRETCHES = 100_000_000
WORDS = GRANULE // 4
END = -1
_CORE = "#allocation0"  # the word of SMEM in which a program finds the number of its core
_VALUE = re.compile(r"%([sp]?\d+)")
_SPILL = re.compile(r"#allocation\w*_spill")
_NAMED_PLACE = re.compile(r"#allocation\w+")
_EFFECTS = ("dma.", "vsyncadd", "sbr.")
Stretch = Callable[..., tuple[int, float]]


class MachineError(RuntimeError):
    """The program does not end, or branches in a way that this machine does not know."""


class _Smem(dict[int, int]):
    """Words of SMEM. One that nobody wrote reads as 0: the compiler reads some where it needs no value."""

    def __missing__(self, address: int) -> int:
        return 0


@dataclass
class Run:
    """What a run counted.

    Attributes:
        cycles: from the first bundle to the end of the last, waits included.
        visits: how often each stretch ran, by its first bundle.
        waits: cycles spent waiting for copies, by the bundle of the wait.
        unknown: values asked of the vector half, and copies to SMEM of operands without words; taken for 0.
        bytes_moved: between HBM and the core.
        memory_busy: cycles in which HBM was moving them.
    """

    cycles: float = 0.0
    visits: dict[int, int] = field(default_factory=dict)
    waits: dict[int, float] = field(default_factory=dict)
    unknown: int = 0
    bytes_moved: int = 0
    memory_busy: float = 0.0

    def ask(self) -> int:
        """A value of the vector half."""
        self.unknown += 1
        return 0

    def waited(self, bundle: int, since: float, until: float) -> float:
        """Book a wait; returns how long it was."""
        if until > since:
            self.waits[bundle] = self.waits.get(bundle, 0.0) + until - since
        return until - since


@dataclass(frozen=True)
class _Operands:
    """The data of the operands that steer the program, as 32-bit words."""

    words: Mapping[int, Sequence[int]]
    run: Run

    def scalar(self, number: int) -> int:
        data = self.words.get(number, (0,))
        return int(data[0]) & MASK

    def to_smem(self, smem: _Smem, source: int, granules: int, target: int) -> None:
        """A copy of an operand's words to SMEM, with zeros where the copy is longer than the operand."""
        number, start = operand_at(source)
        if number not in self.words:
            self.run.ask()
        else:
            data = self.words[number][start * WORDS : (start + granules) * WORDS]
            first = smem_word(target)
            for at in range(granules * WORDS):
                smem[first + at] = int(data[at]) & MASK if at < len(data) else 0


@dataclass(frozen=True)
class Delay:
    """The cycles that still run after a branch.

    `packed`: one empty bundle may stand for several of them (v7x). Then the delay lasts until the region's end, if that
    is within it, else until the empty bundle.
    """

    cycles: int
    packed: bool = False

    def after(self, program: Program, branch: int) -> int:
        """The first bundle that a taken branch skips."""
        behind = range(branch + 1, min(branch + self.cycles + 1, len(program.bundles)))
        empty = next((at for at in behind if not program.bundles[at]), None) if self.packed else None
        if empty is None:
            return branch + self.cycles + 1
        for at in behind[empty - branch :]:
            if at in program.starts:
                break
            if at in program.ends:
                return at + 1
        return empty + 1


class Machine:
    """A program made ready to run.

    `stalls(first, end)` are the cycles that a stretch takes beside those of its bundles.
    """

    def __init__(
        self, program: Program, delay: Delay, stalls: Callable[[int, int], float] = lambda first, end: 0.0
    ) -> None:
        self._program = program
        self._delay = delay
        self._stalls = stalls
        self._names = Names()
        self._leaders = _leaders(program, delay)
        self._needed = needed_values(program)
        self._stretches: dict[int, Stretch] = {}
        self.ends: dict[int, int] = {}
        self.stalled: dict[int, float] = {}

    def run(
        self,
        memory: Memory,
        operands: Mapping[int, Sequence[int]] | None = None,
        core: int = 0,
        neighbours: bool = False,
    ) -> Run:
        """Run from the first bundle to the end. Raises MachineError, ScalarError or DeadlockError where it cannot.

        `operands` are the 32-bit words of the operands whose data steer the program, by their number; `neighbours`:
        see `Queue`.
        """
        run, queue = Run(), Queue(memory, neighbours)
        data = _Operands(operands or {}, run)
        smem = _Smem({self._names.address(_CORE): core})
        state = [0] * 64, [False] * 64, smem, queue, run, data
        at, now, steps, visits, stretches = 0, 0.0, 0, run.visits, self._stretches
        while at != END:
            visits[at] = visits.get(at, 0) + 1
            stretch = stretches.get(at) or self._compile(at)
            at, now = stretch(*state, now)
            steps += 1
            if steps > MOST_STRETCHES:
                raise MachineError(f"no end after {MOST_STRETCHES} stretches: a loop waits for what is not modelled")
        run.cycles, run.bytes_moved, run.memory_busy = now, queue.bytes_moved, queue.busy
        return run

    def _compile(self, first: int) -> Stretch:
        """The function of the stretch that begins there."""
        lines, goes_on, end = [], "", first
        bundles, idle = self._program.bundles, 0
        stop = len(bundles)
        while end < stop:
            if end != first and end in self._leaders and not goes_on:
                break
            for instruction in bundles[end]:
                if instruction.op == "sbr.rel":
                    if goes_on:
                        raise MachineError(f"bundle {end} branches in the delay slots of a branch")
                    target = self._target(instruction)
                    taken = read(instruction.guard, self._names) if instruction.guard else "True"
                    lines.append(f"taken = {taken}")
                    goes_on = f"{target} if taken else "
                    stop = min(stop, self._delay.after(self._program, end))
                    idle = end + 1 + self._delay.cycles - stop
            lines += self._bundle(end, end - first)
            end += 1
        self.ends[first], self.stalled[first] = end, self._stalls(first, end)
        after = end if end < len(bundles) else END
        lines.append(f"return ({goes_on}{after}), t + {end - first + idle + self.stalled[first]}")
        source = "def stretch(S, P, W, Q, R, D, t):\n" + "".join(f"    {line}\n" for line in lines)
        scope: dict[str, Any] = {}
        exec(compile(source, f"<bundles {first} to {end}>", "exec"), scope)
        return self._stretches.setdefault(first, scope["stretch"])

    def _target(self, branch: Instruction) -> int:
        """Where a branch goes; a region that no bundle starts is the end of the program."""
        region = int(branch.operands[0].rpartition("$region")[2])
        return self._program.regions.get(region, END)

    def _bundle(self, at: int, offset: int) -> list[str]:
        """The statements of one bundle: first what reads registers and writes none, then all writes at once."""
        lines, writes = [], []
        for instruction in self._program.bundles[at]:
            if instruction.op == "sst":
                if _stores_needed(instruction, self._needed):
                    lines.append(store(instruction, self._names))
            elif instruction.op.startswith(("dma.", "vsyncadd")):
                lines += self._effect(instruction, at, offset)
            elif value_of(instruction.writes) in self._needed and not _renames(instruction):
                writes.append(assignment(instruction, self._names))
        if writes:
            lines.append(", ".join(target for target, _ in writes) + " = " + ", ".join(f"({v})" for _, v in writes))
        return lines

    def _effect(self, instruction: Instruction, at: int, offset: int) -> list[str]:
        """A copy that starts, a wait for one, or a change of a flag."""
        op, operands = instruction.op, [read(operand, self._names) for operand in instruction.operands]
        if op == "dma.done.wait":
            now = f"t + {offset}"
            lines = [f"t += R.waited({at}, {now}, Q.wait({operands[0]}, {operands[1]}, {now}))"]
        elif op == "vsyncadd":
            lines = [f"Q.add({operands[0]}, {operands[1]})"]
        elif op.startswith("dma.") and "size_in_granules" in instruction.named:
            lines = self._copy(instruction, operands, offset)
        else:
            lines = []
        guard = read(instruction.guard, self._names) if instruction.guard else ""
        return [f"if {guard}: {line}" for line in lines] if guard else lines

    def _copy(self, instruction: Instruction, operands: list[str], offset: int) -> list[str]:
        path = instruction.op.removeprefix("dma.")
        named = {name: read(value, self._names) for name, value in instruction.named.items()}
        granules, flag = named["size_in_granules"], named.get("dst_syncflagno", "0")
        if path == "general":  # its strides, and its ends, are in a table
            path = "hbm_general"
        lines = [f"Q.start({path!r}, {granules}, {flag}, t + {offset})"]
        if path.endswith("_to_smem"):
            lines.append(f"D.to_smem(W, {operands[0]}, {granules}, {operands[2]})")
        return lines


def _leaders(program: Program, delay: Delay) -> set[int]:
    """Bundles at which a stretch begins: where a branch goes, and where it goes on."""
    found = {0}
    for at, bundle in enumerate(program.bundles):
        for instruction in bundle:
            if instruction.op == "sbr.rel":
                region = int(instruction.operands[0].rpartition("$region")[2])
                found |= {program.regions.get(region, END), delay.after(program, at)}
    return found


def needed_values(program: Program) -> set[str]:
    """The values, and the places in SMEM, on which branches, copies and flags depend."""
    makers: dict[str, list[Instruction]] = {}
    stores: list[Instruction] = []
    waiting: list[str] = []
    for bundle in program.bundles:
        for instruction in bundle:
            if instruction.op.startswith(_EFFECTS):
                waiting += _reads(instruction)
            elif instruction.op == "sst":
                stores.append(instruction)
            elif name := value_of(instruction.writes):
                makers.setdefault(name, []).append(instruction)
    needed: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        if name.startswith("#"):
            waiting += [value for kept in stores if _stores_needed(kept, {name}) for value in _reads(kept)]
        for maker in makers.get(name, ()):
            waiting += _reads(maker) if maker.op not in UNKNOWN else ()
            if maker.op == "sld":
                waiting += [_place(maker)]
    return needed


def _renames(instruction: Instruction) -> bool:
    """Whether it only gives a register's value another number: it then reads what its own bundle writes."""
    if instruction.op.startswith("int_to_ptr"):
        return read(instruction.operands[-1], Names()) == read(instruction.writes, Names())
    return instruction.op == "sphi"


def _reads(instruction: Instruction) -> Iterable[str]:
    return _VALUE.findall(" ".join((*instruction.operands, instruction.guard)))


def _place(access: Instruction) -> str:
    """The allocation that a load or store of SMEM names; "#" where an address in a register says it."""
    name = _NAMED_PLACE.search(access.operands[0])
    return name.group(0) if name else "#"


def _stores_needed(kept: Instruction, needed: set[str]) -> bool:
    place = _place(kept)
    if place in needed:
        return True
    if place == "#":
        return any(name.startswith("#") and not _SPILL.match(name) for name in needed)
    return "#" in needed and not _SPILL.match(place)
