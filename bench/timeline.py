"""A whole step on one chip of a pod, replayed from its schedule: when each program, copy and collective is over.

The compiler has put every instruction in order and says which collectives and copies run beside others. Time passes by
the cycles of each program, counted from its machine code where it was dumped; a collective takes its turn on the links
from its start, and what of it is not over when the schedule asks for it is waited for. A loop is replayed twice, and
its other turns take what the second took.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .hlo import Instruction, Module, exchanged_bytes

KERNELS, PRODUCTS, REST = "our kernels", "products", "other programs"
LINKS, COPIES, BETWEEN = "waiting for links", "waiting for copies", "between programs"
_PROGRAMS, _KERNEL, _SMALL = ("fusion", "convolution", "copy"), "tpu_custom_call", 4096
_COPIED = ("copy-done", "slice-done", "dynamic-slice-done")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all")


@dataclass
class Exchange:
    """Collectives of one kind over one group, of one size.

    Attributes:
        kind: such as "all-gather".
        devices: in a group.
        bytes: of the whole array.
        count: how often in a step.
        seconds: on the links, of all.
        waited: of these, seconds in which nothing else ran.
        where: the traced program's names.
    """

    kind: str
    devices: int
    bytes: int
    where: str
    count: float = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class Timeline:
    """Where the time of a step goes.

    Attributes:
        seconds: of each kind of work, those of `KERNELS` to `BETWEEN`.
        exchanges: the collectives.
        programs: seconds of each program by its name, and how often it runs.
        guessed: seconds that are the compiler's estimates, since the programs were not counted.
        unknown: programs for which there is not even that, by name.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    exchanges: dict[tuple[str, int, int, str], Exchange] = field(default_factory=dict)
    programs: dict[str, list[float]] = field(default_factory=dict)
    guessed: float = 0.0
    unknown: set[str] = field(default_factory=set)

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(self.seconds.values())

    def extended(self, other: Timeline, share: float) -> Timeline:
        """This one, and `share` times what the other has more."""

        def line(first: float, second: float) -> float:
            return first + share * (second - first)

        exchanges = {}
        for names, more in other.exchanges.items():
            few = self.exchanges.get(names, Exchange(*names))
            exchanges[names] = replace(
                more,
                count=line(few.count, more.count),
                seconds=line(few.seconds, more.seconds),
                waited=line(few.waited, more.waited),
            )
        return Timeline(
            {kind: line(self.seconds.get(kind, 0.0), time) for kind, time in other.seconds.items()},
            exchanges,
            other.programs,
            line(self.guessed, other.guessed),
            other.unknown,
        )


Duration = Callable[[Instruction], tuple[float, int]]


class Replay:
    """Walks a module.

    `cycles` of each program by its instruction's name; `exchange` gives a collective's seconds and its group's size;
    `copy` the seconds of a copy of so many bytes.
    """

    def __init__(
        self,
        module: Module,
        cycles: Mapping[str, float],
        clock: float,
        between: float,
        exchange: Duration,
        copy: Callable[[int], float],
    ) -> None:
        self._module, self._cycles, self._clock, self._between = module, cycles, clock, between
        self._exchange, self._copy = exchange, copy
        self._now, self._links_free, self._copies_free = 0.0, 0.0, 0.0
        self._arrives: dict[str, tuple[float, Exchange | None]] = {}
        self._times = 1.0
        self.timeline = Timeline()

    def run(self) -> Timeline:
        """Replay from the entry."""
        self._computation(self._module.entry)
        return self.timeline

    def _computation(self, name: str) -> None:
        for instruction in self._module.computations[name]:
            self._instruction(instruction)

    def _instruction(self, one: Instruction) -> None:
        if one.opcode in _FREE:
            return
        if one.opcode == "while":
            self._loop(one)
        elif one.opcode in ("call", "conditional"):
            for called in one.called[:1]:
                self._computation(called)
        elif one.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            self._copies_free = max(self._now, self._copies_free) + self._copy(one.bytes)
            self._arrives[one.name] = (self._copies_free, None)
        elif one.opcode.endswith("-done"):
            self._wait(one.operands[0], COPIES if one.opcode in _COPIED else LINKS)
        elif (collective := self._module.collective_in(one)) is not None:
            self._collective(one, collective)
        else:
            self._program(one)

    def _loop(self, loop: Instruction) -> None:
        trips, body, times = self._module.trips(loop) or 1, self._module.body(loop), self._times
        self._computation(body)
        if trips > 1:
            began = self._now
            self._times = times * (trips - 1)
            self._computation(body)
            self._now += (trips - 2) * (self._now - began)
            self._links_free, self._copies_free = min(self._links_free, self._now), min(self._copies_free, self._now)
        self._times = times

    def _collective(self, one: Instruction, collective: Instruction) -> None:
        if one.opcode.endswith("-start"):
            self._start(one.name, collective)
            return
        key = f"channel {collective.channel or collective.name}"
        if one.opcode == collective.opcode:
            self._start(key, collective)
            self._wait(key, LINKS)
        elif key not in self._arrives:
            self._start(key, collective)
        elif "AsyncCollectiveDone" in self._text(one):
            self._wait(key, LINKS)
        else:
            self._program(one)  # a product that carries the collective on

    def _text(self, one: Instruction) -> str:
        return " ".join(inner.rest for name in one.called for inner in self._module.computations.get(name, ()))

    def _start(self, key: str, collective: Instruction) -> None:
        seconds, devices = self._exchange(collective)
        kind = collective.opcode.removesuffix("-start")
        names = (kind, devices, exchanged_bytes(collective, devices), _short(collective.where))
        exchange = self.timeline.exchanges.setdefault(names, Exchange(*names))
        exchange.count += self._times
        exchange.seconds += self._times * seconds
        self._links_free = max(self._now, self._links_free) + seconds
        self._arrives[key] = (self._links_free, exchange)

    def _wait(self, key: str, kind: str) -> None:
        arrives, exchange = self._arrives.pop(key, (0.0, None))
        waited = max(0.0, arrives - self._now)
        self._now += waited
        self.timeline.seconds[kind] += self._times * waited
        if exchange is not None:
            exchange.waited += self._times * waited

    def _program(self, one: Instruction) -> None:
        cycles = self._cycles.get(one.name)
        if cycles is None:
            cycles = float(one.estimate or 0)
            self.timeline.guessed += self._times * cycles / self._clock
            if not cycles and (one.opcode in _PROGRAMS or _KERNEL in one.rest) and one.bytes > _SMALL:
                self.timeline.unknown.add(one.name)
        if not cycles:
            return
        seconds = cycles / self._clock
        self._now += seconds + self._between
        self.timeline.seconds[self._kind(one)] += self._times * seconds
        self.timeline.seconds[BETWEEN] += self._times * self._between
        ran = self.timeline.programs.setdefault(one.name, [0.0, 0.0])
        ran[0] += self._times * seconds
        ran[1] += self._times

    def _kind(self, one: Instruction) -> str:
        if _KERNEL in one.rest:
            return KERNELS
        return PRODUCTS if one.opcode == "convolution" or "convolution" in self._opcodes(one) else REST

    def _opcodes(self, one: Instruction) -> set[str]:
        return {inner.opcode for name in one.called for inner in self._module.computations.get(name, ())}


def _short(where: str) -> str:
    """The last names of a path, without what tracing adds."""
    parts = [part for part in re.sub(r"[()]", "", where).split("/") if part not in ("while", "body", "closed_call")]
    return "/".join(parts[-2:])


def replay(module: Module, **given: Any) -> Timeline:
    """The timeline of a module: see `Replay`."""
    return Replay(module, **given).run()
