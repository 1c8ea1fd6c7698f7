"""Predict how long a kernel runs on a GPU that is not here, from its machine code, and say what limits it.

The loops of the machine code (`loops.py`) are matched with those of the Triton IR, which says how often each runs in
each program (`trips.py`). All warps that fit on a multiprocessor (`occupancy.py`) issue the body of a loop side by side
(`warps.py`). The programs of the grid then fill the multiprocessors one after the other, and memory sets a floor. What
comes out is predicted; only a chip measures. `docs/issue.md` says how near it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heapify, heapreplace
from math import prod
from typing import Any

from . import amdgcn, sass
from .gpus import Gpu
from .loops import Loop, find_loops
from .occupancy import Occupancy, occupancy
from .pipes import PIPES
from .sass import Instruction, names
from .trips import Counter
from .triton_ir import TripsError
from .warps import Pace, once, pace

_PAYLOAD = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "MUFU", "FFMA", "FADD", "FMUL", "HMMA", "HGMMA"}
_PAYLOAD |= {"UTCHMMA", "UTCQMMA", "UTMALDG", "UTMASTG", "LDTM", "STTM", "IMMA", "IGMMA", "QGMMA", "FADD2", "FFMA2"}
_STORES = {"STG", "UTMASTG", "RED", "ATOMG"}
_SPINS = {"SYNCS", "NANOSLEEP"}
_IDLE = 500.0  # cycles of a program that finds nothing to do
_MOST_PROGRAMS = 4096  # whose loops are counted one by one; of larger grids a sample is
LOWER_BOUND = "a lower bound: the busiest pipe, without latencies"
SPECIALISED = "its warps run different code, of which only bytes and products are counted"


class IssueError(RuntimeError):
    """A kernel has no prediction; the message says why."""


@dataclass(frozen=True)
class Program:
    """A compiled kernel and its launch.

    Attributes:
        name: of the kernel, with what tells it from its siblings.
        tiles: in words.
        code: its machine code as text, SASS with control words.
        ir: its Triton IR.
        arguments: numbers by parameter name.
        grid: programs.
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
        spills: loads and stores of registers that did not fit.
        memory_bytes: of the arrays it reads and writes, each counted once.
        tensor_memory: columns of it that a program takes (sm_100).
        elements: `elements(parameter, offset)` of arrays that steer its loops.
    """

    name: str
    tiles: str
    code: str
    ir: str
    arguments: Mapping[str, Any]
    grid: tuple[int, ...]
    warps: int
    registers: int
    shared: int
    spills: int = 0
    memory_bytes: int = 0
    tensor_memory: int = 0
    elements: Callable[[str, int], Any] | None = None


@dataclass(frozen=True)
class Issue:
    """What the model says of one kernel: all times are predicted.

    Attributes:
        program: its name; `tiles` in words.
        microseconds: from start to end, the launch included.
        floor: microseconds that its bytes take at the bandwidth of the memory.
        limit: the pipe that its main loop waits for most, or memory, or latency, or launch.
        tensor_share: of the main loop's cycles, those in which the tensor cores work.
        issue_share: of them, those in which a partition issues.
        tensor_issue: of the main loop's instructions, those that feed the tensor cores.
        busy: share of the main loop's cycles by pipe.
        resident: how many programs a multiprocessor holds, and why no more.
        registers, spills, shared: of the machine code.
        notes: why the prediction cannot be trusted, a sentence each.
    """

    program: str
    tiles: str
    microseconds: float
    floor: float
    limit: str
    tensor_share: float
    issue_share: float
    tensor_issue: float
    busy: Mapping[str, float]
    resident: Occupancy
    registers: int
    spills: int
    shared: int
    notes: tuple[str, ...] = ()


@dataclass
class _Part:
    """A stretch of the program with the loop of the IR that says how often it runs; None for once a program."""

    code: list[Instruction]
    loop: int | None
    scale: float = 1.0  # of the IR's iterations, where the compiler unrolled
    work: int = 0  # multiplications of one iteration of a program, as the IR says
    loaded: int = 0
    pace: Pace = field(default_factory=lambda: Pace(0.0))


def predict_program(program: Program, gpu: Gpu) -> Issue:
    """The model's answer. Raises IssueError where the chip cannot launch it, or the loops cannot be counted."""
    resident = occupancy(gpu, program.registers, program.shared, program.warps, program.tensor_memory)
    if not resident.programs:
        raise IssueError(
            f"{program.name}: cannot be launched: one program asks for more {resident.limit} than there is"
        )
    try:
        counter = Counter(program.ir)
        trips = _trips(program, counter)
    except (TripsError, IndexError, TypeError, KeyError) as error:
        raise IssueError(f"{program.name}: {error}") from error
    code = _parsed(program.code, gpu)
    parts = _parts(program, code, counter, trips)
    programs = max(1, min(resident.programs, -(-prod(program.grid) // gpu.processors)))
    for part in parts:
        part.pace = _pace(part, gpu, programs, program.warps)
    durations = [_duration(parts, count) for count in trips]
    cycles = _schedule(_spread(durations, prod(program.grid)), gpu.processors * programs)
    floor = gpu.memory_seconds(program.memory_bytes)
    main = max(parts, key=lambda part: part.pace.cycles * _weight(part, trips))
    return _answer(program, gpu, main, resident, gpu.seconds(cycles), floor, _doubts(gpu, code))


@lru_cache(maxsize=64)
def _parsed(text: str, gpu: Gpu) -> tuple[Instruction, ...]:
    return sass.parse_sass(text) if gpu.wave == 32 else amdgcn.parse_amdgcn(text)


_looped = lru_cache(maxsize=64)(find_loops)


def matrix_work(instruction: Instruction) -> int:
    """Multiplications of one warp's matrix instruction, of either maker; 0 of others."""
    return (amdgcn if instruction.name.startswith("v_") else sass).matrix_work(instruction)


def _answer(
    program: Program, gpu: Gpu, main: _Part, resident: Occupancy, run: float, floor: float, notes: tuple[str, ...]
) -> Issue:
    loop = main.pace.cycles or 1.0
    seconds = max(run, floor) + gpu.launch
    limit = main.pace.limit if run >= floor else "memory"
    feeding = sum(bool(matrix_work(item)) or (item.base.startswith("UTC") and "MMA" in item.base) for item in main.code)
    return Issue(
        program=program.name,
        tiles=program.tiles,
        microseconds=seconds * 1e6,
        floor=floor * 1e6,
        limit="launch" if gpu.launch > max(run, floor) else limit,
        tensor_share=min(1.0, main.pace.busy.get("tensor", 0.0) / loop),
        issue_share=main.pace.issued / loop,
        tensor_issue=feeding / max(1, len(main.code)),
        busy={name: main.pace.busy.get(name, 0.0) / loop for name in PIPES},
        resident=resident,
        registers=program.registers,
        spills=program.spills,
        shared=program.shared,
        notes=notes,
    )


def _doubts(gpu: Gpu, code: Sequence[Instruction]) -> tuple[str, ...]:
    found = [] if gpu.measured else [f"unchecked: nobody compared {gpu.product} with the model"]
    found += [LOWER_BOUND] * (gpu.wave != 32) + [SPECIALISED] * _specialised(code)
    return tuple(found)


def _specialised(code: Sequence[Instruction]) -> bool:
    return "USETMAXREG" in names(code)


def _trips(program: Program, counter: Counter) -> list[dict[int, int]]:
    """Iterations of the loops in the programs of a sample of the grid, in their order."""
    grid = (*program.grid, 1, 1)[:3]
    return [counter.count(program.arguments, place, grid, program.elements) for place in _sample(grid)]


def _sample(grid: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Programs to count: all, or those of some rows along x, or one of every few where a row is long.

    Which ones is drawn with a fixed seed: a stride would meet the same place of every tile order or group again.
    """
    draw, (columns, rows) = random.Random(0), (grid[0], grid[1] * grid[2])
    across, down = max(1, -(-columns // _MOST_PROGRAMS)), max(1, columns * rows // _MOST_PROGRAMS)
    if columns * rows <= _MOST_PROGRAMS:
        across = down = 1
    chosen = [min(rows - 1, row + draw.randrange(down)) for row in range(0, rows, down)]
    return [
        (min(columns - 1, column + draw.randrange(across)), row % grid[1], row // grid[1])
        for row in chosen
        for column in range(0, columns, across)
    ]


def _spread(durations: list[float], count: int) -> list[float]:
    """The sample's durations, each as often as it stands for."""
    return [durations[index * len(durations) // count] for index in range(count)]


def _schedule(durations: Sequence[float], slots: int) -> float:
    """When the last program ends, if each goes to the first slot that is free."""
    ends = [0.0] * min(slots, len(durations))
    heapify(ends)
    for duration in durations:
        heapreplace(ends, ends[0] + duration)
    return max(ends)


def _duration(parts: Sequence[_Part], count: Mapping[int, int]) -> float:
    """A program in which no loop runs, of a kernel that has loops, has nothing to do and ends at once."""
    if count and not any(count.values()):
        return _IDLE
    return sum(part.pace.cycles * (1 if part.loop is None else count[part.loop] * part.scale) for part in parts)


def _weight(part: _Part, trips: Sequence[Mapping[int, int]]) -> float:
    return 1.0 if part.loop is None else sum(count[part.loop] for count in trips) * part.scale / len(trips)


def _pace(part: _Part, gpu: Gpu, programs: int, warps: int) -> Pace:
    if gpu.wave != 32:
        return amdgcn.bound(part.code, gpu, programs, warps)
    code = tuple(part.code)
    if part.loop is None:  # programs are in different places: while one waits, others run
        alone = once(code, gpu, 1, warps)
        busy = {name: cycles * programs for name, cycles in alone.busy.items()}
        return Pace(max(alone.cycles, *busy.values(), alone.issued * programs), busy, alone.issued * programs)
    found = pace(code, gpu, programs, warps)
    called = names(part.code)
    busy = dict(found.busy)
    if any(name.startswith("UTC") and name.endswith("MMA") for name in called):
        busy["tensor"] = busy.get("tensor", 0.0) + programs * part.work / gpu.matrix_rate
    if not called & {"LDG", "LDGSTS"}:  # the copy engine loads, here or for other warps that do nothing else
        busy["L2"] = busy.get("L2", 0.0) + programs * part.loaded / gpu.l2_bytes
    least = max(busy.get("tensor", 0.0) / gpu.matrix_share, busy.get("L2", 0.0))
    return Pace(max(found.cycles, least), busy, found.issued)


def _parts(
    program: Program, code: tuple[Instruction, ...], counter: Counter, trips: Sequence[Mapping[int, int]]
) -> list[_Part]:
    """The program cut into stretches, each with the loop of the IR that it is."""
    tree = _looped(code)
    loops = [loop for loop in tree.flat() if _works(code, loop)]
    multiplied = _products(code)
    done = [sum(map(multiplied, (code[at] for at in loop.own))) * program.warps for loop in loops]
    matched = match_loops(
        [(loop, count, bool(count) or _multiplies(code, loop)) for loop, count in zip(loops, done, strict=True)],
        counter,
        {number: sum(count[number] for count in trips) for number in counter.loops},
    )
    inside = {at for loop in loops for at in loop.own}
    # Where every loop of the IR is one of the machine code, products outside are iterations that were peeled off.
    peeled = {number for _, number, _ in matched} >= {n for n in counter.loops if counter.work[n].multiplications}
    straight = [code[at] for at in range(len(code)) if at not in inside and not (peeled and matrix_work(code[at]))]
    parts = [_Part(straight, None)]
    for loop, number, scale in matched:
        work = counter.work[number]
        body, tail = _split(code, loop)
        parts.append(_Part(body, number, scale, round(work.multiplications / scale), round(work.loaded / scale)))
        if tail:
            parts.append(_Part(tail, work.parent if work.parent >= 0 else None))
    return [part for part in parts if part.code]


def _works(code: Sequence[Instruction], loop: Loop) -> bool:
    """Whether a loop is of the kernel: not one that only waits."""
    called = {code[at].base for at in loop.own}
    works = called & _PAYLOAD or any(name.startswith(("v_", "ds_")) for name in called)
    return bool(works) and not (len(loop.own) < 12 and called & _SPINS)


def _products(code: Sequence[Instruction]) -> Callable[[Instruction], int]:
    """What a warp's instruction multiplies: of a program without matrix instructions, its fused additions do."""
    if any(map(matrix_work, code)):
        return matrix_work
    if any(item.base.startswith("UTC") for item in code):
        return lambda item: 0
    return lambda item: 32 * (item.base == "FFMA")


def _multiplies(code: Sequence[Instruction], loop: Loop) -> bool:
    return any(matrix_work(code[at]) or (code[at].base.startswith("UTC") and "MMA" in code[at].base) for at in loop.own)


def _split(code: Sequence[Instruction], loop: Loop) -> tuple[list[Instruction], list[Instruction]]:
    """What every iteration of a loop runs, and what only those do that end a tile.

    Where the compiler made one loop of two, the inner one's body and what follows it stand behind branches; that which
    stores to memory belongs to the outer loop, with all that stands behind the same kind of branch.
    """
    guarded = [at for at in loop.own if at not in loop.every]
    stores = any(code[at].base in _STORES for at in guarded)
    if not stores or not _multiplies(code, loop):
        return [code[at] for at in loop.own], []
    runs: list[list[int]] = []
    for at in guarded:
        if runs and at == runs[-1][-1] + 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    tail = {at for run in runs for at in run if not any(_feeds(code[item]) for item in run)}
    return [code[at] for at in loop.own if at not in tail], [code[at] for at in sorted(tail)]


def _feeds(instruction: Instruction) -> bool:
    return bool(matrix_work(instruction)) or instruction.base in ("LDGSTS", "UTMALDG", "UTCHMMA", "UTCQMMA")


def match_loops(
    found: Sequence[tuple[Loop, int, bool]], counter: Counter, iterations: Mapping[int, int]
) -> list[tuple[Loop, int, float]]:
    """Which loop of the IR each loop of the machine code is, and how many of its iterations one of the IR is.

    `found` are the loops of the machine code with the multiplications of one iteration and whether there are any. Those
    that multiply match in order, and so do the others. Where the compiler has dissolved some, those of the IR with the
    most iterations of all programs are taken to be left. Raises IssueError where the machine code has more that
    multiply.
    """
    dots = [number for number in counter.loops if counter.work[number].multiplications]
    if not dots:
        found = [(loop, 0, False) for loop, *_ in found]
    others = [number for number in counter.loops if not counter.work[number].multiplications]
    machine_dots = [(loop, work) for loop, work, multiplies in found if multiplies]
    machine_others = [loop for loop, _, multiplies in found if not multiplies]
    if len(machine_dots) != len(dots):
        machine_dots, dots = _fewer(machine_dots, dots, counter, iterations)
    matched = []
    for (loop, work), number in zip(machine_dots, dots, strict=True):
        matched.append((loop, number, counter.work[number].multiplications / work if work else 1.0))
    if len(machine_others) == len(others):
        matched += [(loop, number, 1.0) for loop, number in zip(machine_others, others, strict=True)]
    elif machine_others and others:
        matched += [(loop, number, 1.0) for loop, number in zip(machine_others, others, strict=False)]
    return matched


def _fewer(
    machine: list[tuple[Loop, int]], dots: list[int], counter: Counter, iterations: Mapping[int, int]
) -> tuple[list[tuple[Loop, int]], list[int]]:
    """Where the counts differ: the loops of both that match."""
    if len(machine) < len(dots):
        kept = sorted(dots, key=lambda number: -iterations[number])[: len(machine)]
        return machine, sorted(kept)
    least = min((counter.work[number].multiplications for number in dots), default=0)
    chosen = [item for item in machine if item[1] >= 0.9 * least or not item[1]]
    if len(chosen) == len(dots):
        return chosen, dots
    raise IssueError(f"the IR has {len(dots)} loops that multiply, the machine code {len(machine)}")
