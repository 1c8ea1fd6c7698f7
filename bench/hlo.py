"""Reading a scheduled HLO module as text: computations, the instructions of each in the order of their issue, loops.

Only what a timeline needs is kept. Collectives that the TPU compiler runs beside other work stand inside of fusions:
`async-collective-start.7` calls a computation with the collective in it, later fusions carry it on, and
`async-collective-done.7` waits for it; a channel number joins them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_CALLING = ("fusion", "async-start", "call-start", "call")  # the last but one on a TPU's SparseCore
_BITS = {"pred": 8, "bf16": 16}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*?\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%([\w.\-]+)")


class HloError(ValueError):
    """The text is not as this version of the reader knows it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: without the percent sign.
        opcode: such as "fusion".
        result: its type, as text.
        rest: all behind the opcode: operands, then attributes.
    """

    name: str
    opcode: str
    result: str
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that it names."""
        return _CALLED.findall(self.rest)

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

    @property
    def estimate(self) -> int | None:
        """The compiler's own guess of its cycles, if it made one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found.group(1)) if found else None

    @property
    def likeness(self) -> tuple[str, str, str, int | None]:
        """What instructions have in common that are one program: of such the compiler makes and dumps one alone."""
        return self.opcode, re.sub(r"\.\d+$", "", self.name), re.sub(r"\{[^{}]*\}", "", self.result), self.estimate

    @property
    def channel(self) -> str | None:
        """The number that a collective's parts share."""
        found = re.search(r"channel_id=(\d+)", self.rest)
        return found.group(1) if found else None

    @property
    def bytes(self) -> int:
        """Of the result, or of its largest part where it has several."""
        return max(array_bytes(self.result), default=0)

    @property
    def where(self) -> str:
        """The path of names in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Module:
    """A module.

    Attributes:
        computations: the instructions of each, by its name.
        entry: the name of the first.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop runs: of those that count up to a constant. None where it is not one."""
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
        if condition is None:
            return None
        constants = [
            int(found.group(1))
            for one in self.computations[condition.group(1)]
            if one.opcode == "constant" and (found := re.match(r"(\d+)\)", one.rest))
        ]
        return max(constants) if constants else None

    def body(self, loop: Instruction) -> str:
        """The name of a loop's body."""
        found = re.search(r"body=%([\w.\-]+)", loop.rest)
        if found is None:
            raise HloError(f"{loop.name}: a while without a body")
        return found.group(1)

    def collective_in(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is, or has in a computation that it calls."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return instruction
        for name in instruction.called if instruction.opcode in _CALLING else ():
            for inner in self.computations.get(name, ()):
                if inner.opcode in COLLECTIVES:
                    return inner
        return None

    def for_all(self, cycles: Mapping[str, float]) -> dict[str, float]:
        """The cycles of programs by their instructions' names, and of those that are like one of these."""
        everywhere = [one for instructions in self.computations.values() for one in instructions]
        alike = {one.likeness: cycles[one.name] for one in everywhere if one.name in cycles}
        found = {one.name: alike[one.likeness] for one in everywhere if one.likeness in alike}
        return found | dict(cycles)

    @cached_property
    def programs(self) -> frozenset[str]:
        """The names of all that may have bundles of its own."""
        return frozenset(one.name for instructions in self.computations.values() for one in instructions)


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`. Raises HloError where it is not scheduled."""
    if "is_scheduled=true" not in text[:200]:
        raise HloError("the module is not scheduled: its instructions stand in no order")
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, found = "", "", list[Instruction]()
    for line in text.splitlines():
        if name and line.startswith("}"):
            computations[name], name = tuple(found), ""
        elif name and (match := _INSTRUCTION.match(line)):
            found.append(_instruction(match.group(1), match.group(2)))
        elif not name and (match := _COMPUTATION.match(line)):
            name, found = match.group(2), []
            entry = name if match.group(1) else entry
    if not entry:
        raise HloError("the module has no entry")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    at = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    match = _OPCODE.search(text, at)
    if match is None:
        raise HloError(f"{name}: no opcode in {text[:80]!r}")
    return Instruction(name, match.group(1), text[:at], text[match.end() :])


def _closing(text: str, depth: int = 1) -> int:
    """Where the parenthesis closes that is open at the start; with a depth of 0, the one that stands there."""
    for at in range(len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


def array_bytes(type_text: str) -> Iterator[int]:
    """Bytes of each array in a type."""
    for dtype, sizes in _ARRAY.findall(type_text):
        elements = 1
        for size in sizes.split(","):
            elements *= int(size) if size else 1
        digits = re.match(r"[a-z]+(\d+)", dtype)
        yield elements * _BITS.get(dtype, int(digits.group(1)) if digits else 32) // 8


def exchanged_bytes(collective: Instruction, devices: int) -> int:
    """Of the whole array: what is gathered, or what is reduced, of each of so many devices alike."""
    if collective.opcode in ("all-reduce", "reduce-scatter"):
        return sum(array_bytes(collective.result)) * (devices if collective.opcode == "reduce-scatter" else 1)
    return collective.bytes


def replica_groups(collective: Instruction) -> list[list[int]]:
    """The partitions that exchange with each other, from any of the notations; empty where all do."""
    rest = collective.rest
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        return [[int(one) for one in pair] for pair in re.findall(r"(\d+),(\d+)", pairs.group(1))]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(*(_numbers(part) for part in iota.groups()))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:\([^)]*\)\s*)?\{([^}]*)\}", rest):
        return _of_mesh(mesh.group(1), mesh.group(2))
    return []


def _numbers(text: str | None) -> list[int]:
    return [int(one) for one in text.split(",")] if text else []


def _iota(shape: list[int], sizes: list[int], order: list[int]) -> list[list[int]]:
    import numpy as np

    grid = np.arange(int(np.prod(sizes))).reshape(sizes)
    found: list[list[int]] = (grid.transpose(order) if order else grid).reshape(shape[0], -1).tolist()
    return found


def _of_mesh(axes_text: str, chosen_text: str) -> list[list[int]]:
    """Such as `mesh['a'=2,'b'=8] {'b'}`: the partitions that differ along the chosen axes alone."""
    import numpy as np

    axes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", axes_text)}
    chosen = re.findall(r"'([\w.]+)'", chosen_text)
    grid = np.arange(int(np.prod(list(axes.values())))).reshape(list(axes.values()))
    others = [at for at, name in enumerate(axes) if name not in chosen]
    order = [*others, *(list(axes).index(name) for name in chosen)]
    width = int(np.prod([axes[name] for name in chosen]))
    found: list[list[int]] = grid.transpose(order).reshape(-1, width).tolist()
    return found
