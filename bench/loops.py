"""The loops of a program of machine code: natural loops, from its branches and what dominates what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .sass import Instruction


@dataclass
class Loop:
    """A loop, or the whole program (`header` -1).

    Attributes:
        header: index of its first instruction.
        own: indices of its instructions that are in no inner loop, in order.
        every: those that run in each of its iterations; the others stand behind a branch.
        inner: the loops in it, in order.
    """

    header: int
    own: list[int] = field(default_factory=list)
    every: set[int] = field(default_factory=set)
    inner: list[Loop] = field(default_factory=list)

    def flat(self) -> list[Loop]:
        """The loops in it at any depth, outer before inner, in order."""
        return [found for loop in self.inner for found in (loop, *loop.flat())]


def find_loops(program: Sequence[Instruction]) -> Loop:
    """The whole program as a tree of loops."""
    blocks = _blocks(program)
    starts = [first for first, _ in blocks]
    follows = [_followers(program, end, starts, number) for number, (_, end) in enumerate(blocks)]
    before: list[list[int]] = [[] for _ in blocks]
    for number, ways in enumerate(follows):
        for way in ways:
            before[way].append(number)
    dominators = _dominators(before)
    bodies: dict[int, set[int]] = {}
    latches: dict[int, set[int]] = {}
    for number, ways in enumerate(follows):
        for way in ways:
            if way in dominators[number]:
                bodies.setdefault(way, {way}).update(_body(way, number, before))
                latches.setdefault(way, set()).add(number)
    return _tree(blocks, bodies, latches, dominators)


def _blocks(program: Sequence[Instruction]) -> list[tuple[int, int]]:
    """(first, end) of each stretch that only its start is entered from and only its end is left from."""
    starts = {0}
    for index, instruction in enumerate(program):
        if instruction.target >= 0:
            starts.add(instruction.target)
        if instruction.target >= 0 or not instruction.falls:
            starts.add(index + 1)
    ordered = sorted(start for start in starts if start < len(program))
    return list(zip(ordered, [*ordered[1:], len(program)], strict=True))


def _followers(program: Sequence[Instruction], end: int, starts: list[int], number: int) -> list[int]:
    last = program[end - 1]
    found = [starts.index(last.target)] if last.target >= 0 else []
    if last.falls and number + 1 < len(starts):
        found.append(number + 1)
    return found


def _dominators(before: list[list[int]]) -> list[set[int]]:
    """For each block, the blocks that every path to it goes through; what no branch leads to is a start of its own."""
    everything = set(range(len(before)))
    roots = {number for number, ways in enumerate(before) if not number or not ways}
    found = [{number} if number in roots else set(everything) for number in range(len(before))]
    changed = True
    while changed:
        changed = False
        for number, ways in enumerate(before):
            if number not in roots:
                common = set.intersection(*(found[way] for way in ways)) | {number}
                changed |= common != found[number]
                found[number] = common
    return found


def _body(header: int, latch: int, before: list[list[int]]) -> set[int]:
    body, waiting = {header, latch}, [latch]
    while waiting:
        number = waiting.pop()
        if number != header:
            new = set(before[number]) - body
            body |= new
            waiting += new
    return body


def _tree(
    blocks: list[tuple[int, int]], bodies: dict[int, set[int]], latches: dict[int, set[int]], dominators: list[set[int]]
) -> Loop:
    root = Loop(-1)
    loops = {header: Loop(blocks[header][0]) for header in bodies}
    outward = {
        header: min(
            (
                other
                for other in bodies
                if other != header and header in bodies[other] and bodies[header] < bodies[other]
            ),
            key=lambda other: len(bodies[other]),
            default=-1,
        )
        for header in bodies
    }
    for header in sorted(bodies):
        (loops[outward[header]] if outward[header] >= 0 else root).inner.append(loops[header])
    for number, (first, end) in enumerate(blocks):
        holders = [header for header, body in bodies.items() if number in body]
        header = min(holders, key=lambda other: len(bodies[other]), default=-1)
        loop = loops[header] if holders else root
        loop.own += range(first, end)
        if not holders or all(number in dominators[latch] for latch in latches[header]):
            loop.every.update(range(first, end))
    return root
