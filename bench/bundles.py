"""The TPU compiler's final bundles as data: one VLIW instruction word a cycle, read from the text that libtpu dumps.

A line of the dump is `address kind : depth { instruction ;; instruction } /* regions that start or end here */`. A
value is named `%s<value>_<register>`: the same value under its number in the program and in the register that holds it.
With `--xla_mosaic_enable_llo_source_annotations` an instruction names the line of Python that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SOURCES = "--xla_mosaic_enable_llo_source_annotations=true"  # changes comments only, not the schedule

_HEAD = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:L[HBE]|P[BF]|CT)? *: *[> ]*\{", re.M)
_NAMED = re.compile(r"/\*(\w+)=\*/")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_END = re.compile(r"\bEnd region \d+")
_WHERE = re.compile(r'loc\("([^"]*)":(\d+)')
_GUARD = re.compile(r"\((!?%p\d+_p\d+|[01])\),?")
_INSTRUCTION = re.compile(r"(?:(%[\w, %]+?) = )?([\w.\-]+(?:\[\d+\][\w.]*)?(?:<[^>]*>)?)\s*(.*)", re.S)
_REGISTER = re.compile(r"!?%[sp]\d+_[sp](\d+)\Z")
_VALUE = re.compile(r"!?%([sp]?\d+)(?:_[sp]\d+)?\Z")
_REMAINDER = "/* kRem */"


class BundleError(RuntimeError):
    """The text is not as this reader knows it."""


@dataclass(frozen=True)
class Instruction:
    """One slot of a bundle.

    Attributes:
        op: its name, such as `sadd.s32` or `vmatmul.bf16.gmra.mxu1`.
        writes: the value that it makes, such as `%s36_s26`, or "".
        guard: the predicate without which it does nothing, such as `!%p9_p1` or `0`, or "".
        operands: as written, without names and comments.
        named: operands that the dump names, such as `size_in_granules`.
        where: `file:line` of the Python that it comes from, or "".
    """

    op: str
    writes: str
    guard: str
    operands: tuple[str, ...]
    named: dict[str, str]
    where: str


@dataclass(frozen=True)
class Program:
    """The bundles of one compiled kernel.

    Attributes:
        bundles: the instructions of each.
        regions: the bundle at which each region starts, by its number.
        ends: the bundles at which a region ends.
    """

    bundles: tuple[tuple[Instruction, ...], ...]
    regions: dict[int, int]
    ends: frozenset[int]

    @cached_property
    def starts(self) -> frozenset[int]:
        """The bundles at which a region starts."""
        return frozenset(self.regions.values())


def read_bundles(path: Path) -> Program:
    """The program in a file `*-final_bundles.txt`. Raises BundleError where the text has another form."""
    return parse_bundles(path.read_text(errors="replace"))


def parse_bundles(text: str) -> Program:
    """The program in the text of such a file; see `read_bundles`."""
    heads = list(_HEAD.finditer(text))
    if not heads:
        raise BundleError("the dump holds no bundle")
    ends = [head.start() for head in heads[1:]] + [len(text)]
    bundles, last = [], set()
    regions: dict[int, int] = {}
    for at, (head, end) in enumerate(zip(heads, ends, strict=True)):
        if int(head.group(1), 16) != at:
            raise BundleError(f"bundle {at} has the address {head.group(1)}: bundles are missing from the dump")
        body = text[head.end() : end]
        for comment in _COMMENT.findall(_NAMED.sub("", body)):
            regions |= {int(number): at for number in _START.findall(comment)}
            if _END.search(comment):
                last.add(at)
        bundles.append(tuple(_instructions(body)))
    return Program(tuple(bundles), regions, frozenset(last))


def _instructions(body: str) -> Iterator[Instruction]:
    for slot in _NAMED.sub(r"@\1@", body).split(";;"):
        where = _WHERE.search(slot)
        plain = _COMMENT.sub("", slot).partition("}")[0].strip()
        if plain:
            plain = plain.replace("sdivrem", "sdivrem.rem") if _REMAINDER in slot else plain
            yield _instruction(plain, f"{where.group(1)}:{where.group(2)}" if where else "")


def _instruction(plain: str, where: str) -> Instruction:
    match = _INSTRUCTION.match(plain)
    if match is None:
        raise BundleError(f"cannot read the instruction {plain[:80]!r}")
    writes, op, rest = match.groups()
    if op.startswith("v") and not op.startswith(("vsync", "vwait")):  # the vector units' operands steer nothing
        return Instruction(op, writes or "", "", (), {}, where)
    rest = re.sub(r"\[thread:\S+\]", "", rest)
    guard = _GUARD.search(rest)
    if guard:
        rest = rest[: guard.start()].rstrip() + (", " if rest[: guard.start()].strip() else "") + rest[guard.end() :]
    operands, named = [], {}
    for part in _split(rest):
        name, _, value = part[1:].partition("@") if part.startswith("@") else ("", "", part)
        operands.append(value.strip())
        if name:
            named[name] = value.strip()
    return Instruction(op, writes or "", guard.group(1) if guard else "", tuple(operands), named, where)


def _split(text: str) -> Iterator[str]:
    """The parts between the commas that stand in no bracket."""
    depth, start = 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            if part := text[start:at].strip():
                yield part
            start = at + 1
    if part := text[start:].strip():
        yield part


def value_of(operand: str) -> str:
    """The value that an operand names, such as `s36` of `%s36_s26` or `p9` of `!%p9_p1`; "" of a literal or vector."""
    match = _VALUE.match(operand)
    return match.group(1) if match else ""


def register_of(operand: str) -> int:
    """The number of the register that holds it: 26 of `%s36_s26`. Raises BundleError where it names none."""
    match = _REGISTER.match(operand)
    if match is None:
        raise BundleError(f"{operand!r} names no scalar register")
    return int(match.group(1))
