"""Triton IR as text, read into operations: what a block does in order, which values each makes and takes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
VALUE = re.compile(r"%[\w#]+(?:\.\d+)?")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(!tt\.ptr<)?([a-z]+)(\d+)")


class TripsError(RuntimeError):
    """The loops of a kernel cannot be counted; the message says why."""


@dataclass
class Op:
    """One operation of the IR: its text without types, the values it makes and takes, and its regions."""

    name: str
    results: list[str]
    operands: list[str]
    text: str
    regions: list[list[Op]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    loop: int = -1
    constant: Any = None
    scalar: bool = True


@dataclass
class LoopWork:
    """What one iteration of a loop does, without its inner loops; loop -1 is the program itself.

    Attributes:
        parent: the loop around it.
        multiplications: of its dots.
        loaded, stored: bytes of tensors between memory and the program.
    """

    parent: int
    multiplications: int = 0
    loaded: int = 0
    stored: int = 0


def add_work(work: LoopWork, op: Op) -> None:
    """Count what an operation multiplies, loads and stores."""
    if op.name in ("tt.dot", "tt.dot_scaled"):
        shapes = [tuple(map(int, dims.split("x")[:-1])) for dims, *_ in _TENSOR.findall(op.text)]
        if len(shapes) >= 2:
            work.multiplications += math.prod(shapes[0]) * shapes[1][-1]
    elif op.name in ("tt.load", "tt.descriptor_load"):
        work.loaded += _tensor_bytes(op.text, last=op.name == "tt.descriptor_load")
    elif op.name in ("tt.store", "tt.descriptor_store"):
        work.stored += _tensor_bytes(op.text, last=True)


def _tensor_bytes(text: str, last: bool) -> int:
    found = _TENSOR.findall(text)
    if not found:
        return 0
    dims, _, kind, bits = found[-1 if last else 0]
    return math.prod(map(int, dims.split("x")[:-1])) * max(int(bits), 8) // 8 if kind in ("f", "bf", "i") else 0


def parse(text: str) -> tuple[list[str], list[Op]]:
    """Parameters and top-level operations of the module's public function."""
    lines = [_LOCATION.sub("", line).strip() for line in text.splitlines()]
    parameters: list[str] = []
    root = Op("func", [], [], "", [[]])
    stack: list[Op] = []
    skipped = 0  # depth inside the region of a reduction or a scan
    for line in lines:
        if line.startswith("tt.func"):
            if "public" not in line:
                raise TripsError("the kernel calls functions that are not inlined")
            parameters = re.findall(r"%(\w+): ", line.partition("(")[2])
            stack = [root]
        elif not stack or not line or line.startswith("#"):
            continue
        elif skipped:
            skipped += line.endswith("({") - line.startswith("})")
        elif line.endswith("({"):
            skipped = 1
            stack[-1].regions[-1].append(_op(line))
        elif line.startswith("^bb"):
            names = re.findall(r"(%\w+):", line)
            if stack[-1] is root:
                stack[-1].regions[-1].append(Op("label", [], [], re.split(r"\W", line[1:])[0], arguments=names))
            else:
                stack[-1].arguments += names
        elif line.startswith("}"):
            if line.endswith("{"):
                stack[-1].regions.append([])
            else:
                stack.pop()
        else:
            made = _op(line)
            stack[-1].regions[-1].append(made)
            if line.endswith("{"):
                made.regions.append([])
                stack.append(made)
    if not parameters and not root.regions[0]:
        raise TripsError("the text holds no kernel")
    return parameters, root.regions[0]


def _op(line: str) -> Op:
    made, equals, rest = line.partition(" = ")
    if not equals or not made.startswith("%"):
        made, rest = "", line
    results = []
    if made:
        name, _, count = made.partition(":")
        results = [f"{name}#{index}" for index in range(int(count))] if count else [name]
    name = rest.split(" ")[0].split("(")[0].strip('"')
    body = re.sub(r"\s:\s(?!.*\s:\s).*$", "", rest) if name not in ("scf.for", "scf.while", "scf.if") else rest
    scalar = "tensor<" not in rest.rpartition(" : ")[2]
    return Op(name, results, VALUE.findall(body), rest, constant=_constant(rest, name), scalar=scalar)


def walk(body: list[Op]) -> Iterator[tuple[Op, list[Op]]]:
    """Every operation at any depth, with the block that it stands in."""
    for op in body:
        yield op, body
        for region in op.regions:
            yield from walk(region)


def bounds(op: Op) -> tuple[str, str, str, str]:
    """Variable, start, end and step of a scf.for."""
    match = re.search(r"(%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)", op.text)
    if match is None:
        raise TripsError(f"a loop whose bounds are not understood: {op.text[:80]}")
    variable, start, end, step = match.groups()
    return variable, start, end, step


def carries(op: Op) -> list[tuple[str, str]]:
    """(argument, initial value) of what a loop carries."""
    inside = re.search(r"(?:iter_args|scf\.while )\((.*?)\) (?:->|:)", op.text)
    return re.findall(r"(%\w+) = (%[\w#]+)", inside.group(1)) if inside else []


def yields(region: list[Op]) -> list[str]:
    """What a region hands to the operation around it."""
    return region[-1].operands if region and region[-1].name in ("scf.yield", "scf.condition") else []


def _constant(text: str, name: str) -> Any:
    if name != "arith.constant":
        return None
    word = text.split()[1]
    if word in ("true", "false"):
        return word == "true"
    try:
        return int(word)
    except ValueError:
        return None
