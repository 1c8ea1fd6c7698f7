"""NVIDIA machine code with its control words, from the disassembly that Triton returns.

A line is `wait:read:write:yield:stall`, a tab and the instruction. `wait` is a mask of six scoreboards that must be
free before it issues, `read` and `write` the scoreboards that it frees once its operands are read and its result is
written, `stall` the cycles until the same warp may issue again, in hexadecimal. The compiler chose them all (Jia et
al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018, chapter 2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_CONTROL = re.compile(r"^([0-9a-f-]{2}):([0-9-]):([0-9-]):([Y-]):([0-9a-f])$")
_BYTES = 16  # of one instruction
_ENDS = ("EXIT", "RET", "BRX", "JMX")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction, of NVIDIA or AMD.

    Attributes:
        name: with its modifiers, `HMMA.16816.F32.BF16`.
        operands: the rest of its text.
        guard: the predicate it runs under, `!P0`, or "".
        stall: cycles until the same warp may issue again.
        waits: scoreboards that must be free before.
        reads: the scoreboard that frees when the operands are read, -1 for none.
        writes: that which frees when the result is there, -1 for none.
        target: where a branch goes, as an index of the program; -1 for no branch.
        falls: whether the next instruction can come after it.
    """

    name: str
    operands: str = ""
    guard: str = ""
    stall: int = 1
    waits: tuple[int, ...] = ()
    reads: int = -1
    writes: int = -1
    target: int = -1
    falls: bool = True

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.split(".", 1)[0]


def parse_sass(text: str) -> tuple[Instruction, ...]:
    """The instructions of the one function in the text."""
    labels: dict[str, int] = {}
    lines: list[tuple[tuple[str, ...], str]] = []
    for line in text.splitlines():
        control, tab, body = line.partition("\t")
        match = _CONTROL.match(control)
        if match and tab:
            lines.append((match.groups(), body.strip().rstrip(";")))
        elif line.endswith(":") and not line.startswith("Function"):
            labels[line[:-1]] = len(lines)
    return tuple(_instruction(control, body, labels, len(lines)) for control, body in lines)


def _instruction(control: tuple[str, ...], body: str, labels: dict[str, int], count: int) -> Instruction:
    wait, read, write, _, stall = control
    guard = ""
    if body.startswith("@"):
        guard, _, body = body[1:].partition(" ")
    name, _, operands = body.partition(" ")
    target = _target(operands, labels, count) if name.startswith(("BRA", "JMP")) else -1
    always = guard in ("", "PT") and not re.match(r"!?U?P\d", operands)
    return Instruction(
        name=name,
        operands=operands,
        guard=guard,
        stall=int(stall, 16),
        waits=() if wait == "--" else tuple(bit for bit in range(6) if int(wait, 16) >> bit & 1),
        reads=-1 if read == "-" else int(read),
        writes=-1 if write == "-" else int(write),
        target=target,
        falls=not (always and (name.startswith(("BRA", "JMP")) or name.split(".")[0] in _ENDS)),
    )


def _target(operands: str, labels: dict[str, int], count: int) -> int:
    """A branch names a label, or an address where the disassembler made none."""
    place = operands.split(",")[-1].strip()
    if place in labels:
        return labels[place]
    address = re.search(r"0x([0-9a-f]+)$", place)
    index = int(address.group(1), 16) // _BYTES if address else -1
    return index if index < count else -1


def access_bytes(instruction: Instruction, lanes: int = 32) -> int:
    """Bytes that a load, store or copy moves for a warp: its width times the lanes; LDSM counts matrices of 128."""
    parts = instruction.name.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return 128 * int(parts[-1]) if parts[-1].isdigit() else 128
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return lanes * next((widths[part] for part in parts[1:] if part in widths), 4)


def matrix_work(instruction: Instruction) -> int:
    """Multiplications of one warp's matrix instruction whose name has its shape; 0 of others.

    `HMMA.16816` is 16x8x16; a warp has a quarter of `HGMMA.64x128x16`, which four warps share.
    """
    match = re.match(r"[HIQDB]G?MMA\.(?:SP\.)?(\d+)(?:x(\d+)x(\d+))?", instruction.name)
    if not match:
        return 0
    if match.group(2):
        return int(match.group(1)) * int(match.group(2)) * int(match.group(3)) // 4
    digits = match.group(1)
    return 16 * 8 * int(digits[3:]) if digits.startswith("168") else 8 * 8 * int(digits[2:] or 4)


def names(instructions: Iterable[Instruction]) -> set[str]:
    """The base names that occur."""
    return {instruction.base for instruction in instructions}
