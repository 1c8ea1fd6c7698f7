"""Run the issue of a stretch of machine code by all warps of one multiprocessor, cycle by cycle where it matters.

Each of four partitions issues one instruction a cycle, of the warp that has been ready longest. A warp is ready when
the stall count of its last instruction is over and the scoreboards that it names are free. Values are not computed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush

from .gpus import Gpu
from .pipes import PIPES, SHARED, Use, use
from .sass import Instruction

PARTITIONS = 4
_BARRIER = 12.0  # cycles from the last warp's arrival to the first that goes on
_MOST = 400_000  # instructions that are worth running


@dataclass
class Stretch:
    """A stretch of code, ready to run: its instructions, with what each takes and which special rule it has."""

    instructions: list[Instruction]
    uses: list[Use]
    rules: list[tuple[str, int]]


@dataclass(frozen=True)
class Pace:
    """How a stretch runs in the long run, all resident programs together.

    Attributes:
        cycles: of the multiprocessor for one pass of every resident program.
        busy: of them, those in which each pipe works, the mean of the partitions.
        issued: instructions a partition issues in them.
    """

    cycles: float
    busy: dict[str, float] = field(default_factory=dict)
    issued: float = 0.0

    @property
    def limit(self) -> str:
        """The pipe that is busy longest, or "latency" where none is busy for half of the time."""
        slots = {**self.busy, "issue": self.issued}
        name = max(slots, key=slots.__getitem__)
        return name if slots[name] >= 0.5 * self.cycles else "latency"


def stretch(instructions: Sequence[Instruction], gpu: Gpu, warps: int) -> Stretch:
    """Prepare code that `warps` warps of a program run."""
    return Stretch(
        list(instructions),
        [use(instruction, gpu) for instruction in instructions],
        [_rule(instruction, warps) for instruction in instructions],
    )


def _rule(instruction: Instruction, warps: int) -> tuple[str, int]:
    name, operands = instruction.name, instruction.operands
    if name.startswith("BAR.SYNC"):
        count = re.match(r"[^,]+, 0x([0-9a-f]+)", operands)
        return "meet", min(warps, int(count.group(1), 16) // 32) if count else warps
    if name.startswith("LDGDEPBAR"):
        return "commit", 0
    if name.startswith("DEPBAR.LE"):
        return "copies", int(operands.split(",")[1].split("{")[0].strip() or "0", 16)
    if name.startswith("WARPGROUP.DEPBAR"):
        return "products", int(operands.split(",")[1].strip(), 16)
    if name.startswith(("HGMMA", "QGMMA", "IGMMA")):
        return "product", int("gsb0" in operands)
    if name.startswith("LDGSTS"):
        return "copy", 0
    return "", 0


@dataclass
class _Warp:
    program: int
    partition: int
    at: int = 0
    passes: int = 0
    free: list[float] = field(default_factory=lambda: [0.0] * 6)
    copying: float = 0.0
    copies: list[float] = field(default_factory=list)
    multiplying: float = 0.0
    products: list[float] = field(default_factory=list)


class _Processor:
    def __init__(self, code: Stretch, programs: int, warps: int, passes: int) -> None:
        self.code, self.passes = code, passes
        self.warps = [_Warp(index // warps, index % PARTITIONS) for index in range(programs * warps)]
        self.issue = [0.0] * PARTITIONS
        self.pipes = {(pipe, part): 0.0 for pipe in PIPES for part in range(1 if pipe in SHARED else PARTITIONS)}
        self.busy = dict.fromkeys(PIPES, 0.0)
        self.issued = 0
        self.ends: list[list[float]] = [[] for _ in range(passes)]
        self.marks: list[tuple[dict[str, float], int]] = []
        self.met: dict[tuple[int, int], list[tuple[float, int]]] = {}

    def run(self) -> None:
        """All passes of all warps."""
        queue: list[tuple[float, float, int]] = []
        for index in range(len(self.warps)):
            heappush(queue, (0.0, 0.0, index))
        instructions, uses, rules = self.code.instructions, self.code.uses, self.code.rules
        last = len(instructions)
        while queue:
            now, since, index = heappop(queue)
            warp = self.warps[index]
            instruction, taken, (rule, number) = instructions[warp.at], uses[warp.at], rules[warp.at]
            start = self._start(now, warp, instruction, taken, rule, number)
            if start > now:
                heappush(queue, (start, since, index))
                continue
            self.issue[warp.partition] = now + 1
            self.issued += 1
            done = self._occupy(now, warp, taken)
            self._finish(warp, instruction, done, now, rule, number)
            warp.at += 1
            after = now + max(1, instruction.stall)
            if warp.at == last:
                warp.at = 0
                self.ends[warp.passes].append(after)
                if len(self.ends[warp.passes]) == len(self.warps):
                    self.marks.append((dict(self.busy), self.issued))
                warp.passes += 1
                if warp.passes == self.passes:
                    if rule != "meet":
                        continue
                    after = float("inf")
            if rule == "meet":
                self._meet(queue, index, warp, after, number, warp.at)
            else:
                heappush(queue, (after, after, index))

    def _start(self, now: float, warp: _Warp, instruction: Instruction, taken: Use, rule: str, number: int) -> float:
        start = max(now, self.issue[warp.partition])
        for barrier in instruction.waits:
            start = max(start, warp.free[barrier])
        if rule == "copies" and len(warp.copies) > number:
            start = max(start, warp.copies[-1 - number])
        elif rule == "products" and len(warp.products) > number:
            start = max(start, warp.products[-1 - number])
        if taken.pipe and taken.waits:
            start = max(start, self.pipes[taken.pipe, warp.partition])
        return start

    def _occupy(self, now: float, warp: _Warp, taken: Use) -> float:
        """Take the pipe; returns when the result is there."""
        done = now
        if taken.shared:
            free = max(now, self.pipes["shared", 0]) + taken.shared
            self.pipes["shared", 0] = free
            self.busy["shared"] += taken.shared
            done = free
        if taken.pipe:
            shared = taken.pipe in SHARED
            key = (taken.pipe, 0 if shared else warp.partition)
            free = max(now, self.pipes[key]) + taken.cycles
            self.pipes[key] = free
            self.busy[taken.pipe] += taken.cycles if shared else taken.cycles / PARTITIONS
            done = max(done, free)
        return done + taken.latency

    def _finish(self, warp: _Warp, instruction: Instruction, done: float, now: float, rule: str, number: int) -> None:
        if instruction.writes >= 0 and rule not in ("commit", "copy"):
            warp.free[instruction.writes] = max(warp.free[instruction.writes], done)
        if instruction.reads >= 0:
            warp.free[instruction.reads] = max(warp.free[instruction.reads], now + 12)
        if rule == "copy":
            warp.copying = max(warp.copying, done)
        elif rule == "commit":
            warp.copies.append(max(warp.copying, now))
        elif rule == "product":
            warp.multiplying = max(warp.multiplying, done)
            if number:
                warp.products.append(warp.multiplying)

    def _meet(
        self, queue: list[tuple[float, float, int]], index: int, warp: _Warp, after: float, number: int, at: int
    ) -> None:
        """A barrier of the program: the last warp to come lets all go on."""
        waiting = self.met.setdefault((warp.program, at), [])
        waiting.append((after, index))
        if len(waiting) >= number:
            release = max((time for time, _ in waiting if time != float("inf")), default=0.0) + _BARRIER
            for time, other in waiting:
                if time != float("inf"):
                    heappush(queue, (max(time, release), release, other))
            waiting.clear()


@lru_cache(maxsize=512)
def pace(code: tuple[Instruction, ...], gpu: Gpu, programs: int, warps: int) -> Pace:
    """The pace of a loop's body in the long run, by `programs` programs of `warps` warps on one multiprocessor."""
    size = max(1, len(code) * programs * warps)
    passes = max(3, min(8, _MOST // size))
    return _run(stretch(code, gpu, warps), programs, warps, passes)


@lru_cache(maxsize=512)
def once(code: tuple[Instruction, ...], gpu: Gpu, programs: int, warps: int) -> Pace:
    """One pass from an idle multiprocessor, all latencies included."""
    return _run(stretch(code, gpu, warps), programs, warps, 1)


def _run(code: Stretch, programs: int, warps: int, passes: int) -> Pace:
    if not code.instructions:
        return Pace(0.0)
    processor = _Processor(code, programs, warps, passes)
    processor.run()
    ends = [max(found, default=0.0) for found in processor.ends]
    if passes == 1:
        return Pace(ends[0], dict(processor.busy), processor.issued / PARTITIONS)
    first = 1 if passes < 5 else 2
    count = passes - 1 - first
    (before, issued_before), (after, issued_after) = processor.marks[first], processor.marks[-1]
    busy = {name: (after[name] - before[name]) / count for name in after}
    cycles = (ends[-1] - ends[first]) / count
    return Pace(cycles, busy, (issued_after - issued_before) / count / PARTITIONS)
