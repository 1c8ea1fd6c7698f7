"""How often each loop of a Triton kernel runs, program by program, from its Triton IR.

The IR says in plain arithmetic of program ids and arguments where every loop begins and ends. Only what a bound or a
branch needs is computed; tensors never are. A loop that nothing inside depends on is counted without being run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .triton_ir import VALUE, LoopWork, Op, TripsError, add_work, bounds, carries, parse, walk, yields


class Counter:
    """The loops of one kernel, and how often they run for a program id."""

    def __init__(self, text: str) -> None:
        self.parameters, self._body = parse(text)
        self.work: dict[int, LoopWork] = {-1: LoopWork(-1)}
        self._number(self._body, -1)
        self.needed = _needed(self._body)
        self._steering: dict[int, list[Op]] = {}

    @property
    def loops(self) -> list[int]:
        """The loops, outer before inner, in the order of the text."""
        return [loop for loop in self.work if loop >= 0]

    def count(
        self,
        arguments: Mapping[str, Any],
        program: tuple[int, ...],
        grid: tuple[int, ...],
        memory: Callable[[str, int], Any] | None = None,
    ) -> dict[int, int]:
        """Iterations of every loop in that program; `memory(parameter, offset)` gives elements of an array."""
        run = _Run(self, dict(arguments), (*program, 0, 0)[:3], (*grid, 1, 1)[:3], memory)
        run.block(self._body)
        return run.counts

    def steering(self, body: list[Op]) -> list[Op]:
        """The operations of a block that a count depends on, and those that end it."""
        found = self._steering.get(id(body))
        if found is None:
            found = [op for op in body if op.regions or not op.results or (op.scalar and op.results[0] in self.needed)]
            self._steering[id(body)] = found
        return found

    def _number(self, body: list[Op], parent: int) -> None:
        for op in body:
            within = parent
            if op.name in ("scf.for", "scf.while"):
                within = op.loop = len(self.work) - 1
                self.work[within] = LoopWork(parent)
            add_work(self.work[within if within == parent else parent], op)
            for region in op.regions:
                self._number(region, within)


def _needed(body: list[Op]) -> set[str]:
    """The values that a bound, a branch or a condition depends on."""
    sources: dict[str, set[str]] = {}
    wanted: set[str] = set()
    for op, _ in walk(body):
        for name in op.results if op.scalar or op.regions else ():
            sources.setdefault(name, set()).update(_sources(op, name))
        for name, source in _carried(op):
            sources.setdefault(name, set()).update(source)
        wanted |= _steers(op)
    for op, _ in walk(body):
        if op.name.startswith("cf."):
            _join_blocks(op, body, sources)
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += sources.get(name, ())
    return found


def _steers(op: Op) -> set[str]:
    if op.name == "scf.for":
        return set(bounds(op)[1:])
    if op.name == "scf.if":
        return {op.operands[0]}
    if op.name in ("scf.condition", "cf.cond_br"):
        return {op.operands[0]}
    return set()


def _sources(op: Op, result: str) -> set[str]:
    """What a result is made of."""
    if op.name == "scf.if":
        at = op.results.index(result)
        ends = [yields(region) for region in op.regions]
        return {end[at] for end in ends if at < len(end)} | {op.operands[0]}
    if op.name == "scf.for":
        at = op.results.index(result)
        return {carries(op)[at][0], *bounds(op)[1:]}
    if op.name == "scf.while":
        at = op.results.index(result)
        return {yields(op.regions[0])[at + 1]}
    return set(op.operands)


def _carried(op: Op) -> Iterator[tuple[str, set[str]]]:
    """Arguments of loops with where their values come from."""
    if op.name == "scf.for":
        ends = yields(op.regions[0])
        variable, start, *_ = bounds(op)
        yield variable, {start}
        for at, (argument, initial) in enumerate(carries(op)):
            yield argument, {initial, ends[at]}
    elif op.name == "scf.while":
        ends = yields(op.regions[1])
        for at, (argument, initial) in enumerate(carries(op)):
            yield argument, {initial, ends[at]}
        passed = yields(op.regions[0])[1:]
        for argument, value in zip(op.arguments, passed, strict=False):
            yield argument, {value}


def _join_blocks(op: Op, body: list[Op], sources: dict[str, set[str]]) -> None:
    for label, values in re.findall(r"\^(\w+)(?:\(([^:)]*))?", op.text):
        for block in body:
            if block.name == "label" and block.text == label:
                for argument, value in zip(block.arguments, VALUE.findall(values), strict=False):
                    sources.setdefault(argument, set()).add(value)


class _Run:
    """One program of the grid."""

    def __init__(self, counter: Counter, arguments: dict[str, Any], program: Any, grid: Any, memory: Any) -> None:
        self.needed, self.steering = counter.needed, counter.steering
        self.program, self.grid, self.memory = program, grid, memory
        self.counts = dict.fromkeys(counter.loops, 0)
        self.values: dict[str, Any] = {f"%{name}": value for name, value in arguments.items()}
        for name in counter.parameters:
            self.values.setdefault(f"%{name}", (name, 0))  # an array: its name and an offset in elements

    def value(self, name: str) -> Any:
        found = self.values.get(name)
        if found is None:
            raise TripsError("a loop or a branch depends on values that are loaded or computed in tensors")
        return found

    def block(self, body: list[Op]) -> list[str]:
        """Run the operations in order; returns the operands of the last, which is a yield or a return."""
        body, at, values = self.steering(body), 0, self.values
        while at < len(body):
            op = body[at]
            at += 1
            if op.regions:
                self._structure(op)
            elif op.results:
                values[op.results[0]] = op.constant if op.constant is not None else self._compute(op)
            elif op.name in ("scf.yield", "scf.condition"):
                return op.operands
            elif op.name == "tt.return":
                return []
            elif op.name.startswith("cf."):
                at = self._jump(op, body)
        return []

    def _jump(self, op: Op, body: list[Op]) -> int:
        ways = re.findall(r"\^(\w+)(?:\(([^:)]*))?", op.text)
        label, values = ways[0] if op.name == "cf.br" or self.value(op.operands[0]) else ways[1]
        for at, block in enumerate(body):
            if block.name == "label" and block.text == label:
                for argument, value in zip(block.arguments, VALUE.findall(values), strict=False):
                    self.values[argument] = self.values.get(value)
                return at + 1
        raise TripsError(f"a branch to {label}, which is not there")

    def _structure(self, op: Op) -> None:
        if op.name == "scf.if":
            chosen = 0 if self.value(op.operands[0]) else 1
            if chosen < len(op.regions):
                self._give(op.results, self.block(op.regions[chosen]))
        elif op.name == "scf.for":
            self._for(op)
        elif op.name == "scf.while":
            self._while(op)

    def _give(self, names: list[str], operands: list[str]) -> None:
        found = [self.values.get(operand) for operand in operands]
        self.values.update(zip(names, found, strict=False))

    def _for(self, op: Op) -> None:
        variable, start, end, step = bounds(op)
        trips = range(self.value(start), self.value(end), self.value(step))
        self.counts[op.loop] += len(trips)
        carried = carries(op)
        names = [name for name, _ in carried]
        self._give(names, [initial for _, initial in carried])
        if self._plain(op):
            return
        seen: list[list[Any]] = []
        for done, index in enumerate(trips):
            self.values[variable] = index
            self._give(names, self.block(op.regions[0]))
            seen.append([self.values.get(name) for name in names])
            if done == 2 and self._steady(op, seen):
                ahead = len(trips) - 3
                steps = [b - a if isinstance(b, int) else 0 for a, b in zip(seen[1], seen[2], strict=True)]
                for name, last, gain in zip(names, seen[2], steps, strict=True):
                    self.values[name] = last + gain * ahead if gain else last
                break
        self._give(op.results, names)

    def _steady(self, op: Op, seen: list[list[Any]]) -> bool:
        """Whether what the loop carries goes on in equal steps: it is only added to, and did so three times."""
        if any(inner.name not in _LINEAR for inner in self.steering(op.regions[0])):
            return False
        return all(a == b == c or (isinstance(a, int) and b - a == c - b) for a, b, c in zip(*seen, strict=True))

    def _plain(self, op: Op) -> bool:
        """Whether nothing that steers the kernel happens inside or comes out."""
        return not self.needed.intersection(op.results) and not any(inner.regions for inner in op.regions[0])

    def _while(self, op: Op) -> None:
        carried = carries(op)
        names = [name for name, _ in carried]
        self._give(names, [initial for _, initial in carried])
        while True:
            condition, *passed = self.block(op.regions[0])
            if not self.value(condition):
                self._give(op.results, passed)
                return
            self.counts[op.loop] += 1
            self._give(op.arguments, passed)
            self._give(names, self.block(op.regions[1]))

    def _compute(self, op: Op) -> Any:
        given = [self.values.get(name) for name in op.operands]
        if None in given:
            return None
        if rule := _RULES.get(op.name):
            return rule(*given)
        if op.name == "tt.get_program_id":
            return self.program["xyz".index(op.text.split()[1])]
        if op.name == "tt.get_num_programs":
            return self.grid["xyz".index(op.text.split()[1])]
        if op.name == "tt.load" and self.memory and isinstance(given[0], tuple):
            return self.memory(*given[0])
        if op.name == "tt.addptr" and isinstance(given[0], tuple):
            return given[0][0], given[0][1] + given[1]
        if op.name in ("arith.cmpi", "arith.cmpf"):
            return _compare(op.text, *given)
        return None


def _compare(text: str, first: Any, second: Any) -> Any:
    how = text.split()[1].rstrip(",").lstrip("suo")
    rules = {"eq": first == second, "ne": first != second}
    if not isinstance(first, tuple):
        rules |= {"lt": first < second, "le": first <= second, "gt": first > second, "ge": first >= second}
    return rules.get(how)


def _quotient(first: int, second: int) -> int | None:
    """Towards zero, as machines divide."""
    return None if not second else abs(first) // abs(second) * (1 if (first < 0) == (second < 0) else -1)


def _remainder(first: int, second: int) -> int | None:
    return None if not second else first - second * (_quotient(first, second) or 0)


_LINEAR = {"arith.addi", "arith.subi", "arith.constant", "arith.extsi", "arith.trunci", "scf.yield"}
_RULES: dict[str, Callable[..., Any]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": _quotient,
    "arith.divui": _quotient,
    "arith.remsi": _remainder,
    "arith.remui": _remainder,
    "arith.floordivsi": lambda a, b: a // b if b else None,
    "arith.ceildivsi": lambda a, b: -(-a // b) if b else None,
    "arith.maxsi": max,
    "arith.minsi": min,
    "arith.maxui": max,
    "arith.minui": min,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.shrui": lambda a, b: a >> b,
    "arith.select": lambda c, a, b: a if c else b,
    "arith.extsi": lambda a: -int(a) if isinstance(a, bool) else a,
    "arith.extui": int,
    "arith.trunci": lambda a: a,
    "arith.index_cast": lambda a: a,
    "arith.sitofp": float,
    "arith.fptosi": int,
    "arith.addf": lambda a, b: a + b,
    "arith.mulf": lambda a, b: a * b,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
}
