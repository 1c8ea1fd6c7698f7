"""AMD machine code, from the assembly that Triton returns, and what each instruction occupies.

A compute unit has four vector units of 16 lanes, so that a wave of 64 keeps one for 4 cycles; exp2 and its kind take
16, a matrix instruction its products over the unit's share of the data sheet's peak (AMD, "AMD Instinct MI300
instruction set architecture", 2024). The assembly says nothing of stalls: the compiler leaves them to the hardware.
What is counted is therefore a lower bound, the busiest pipe of all waves that are resident.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from .gpus import Gpu
from .pipes import PIPES, Use
from .sass import Instruction
from .warps import PARTITIONS, Pace

_LINE = re.compile(r"^\t((?:v|s|ds|buffer|global|flat|scratch)_\w+)\s*(.*?)(?:\s*;.*)?$")
_LABEL = re.compile(r"^(\.LBB\w+):")
_MATRIX = re.compile(r"v_s?mfma\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?")
_SLOW = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")
_WIDTHS = (
    ("x4", 16),
    ("b128", 16),
    ("x3", 12),
    ("b96", 12),
    ("x2", 8),
    ("b64", 8),
    ("short", 2),
    ("b16", 2),
    ("b8", 1),
)


def parse_amdgcn(text: str) -> tuple[Instruction, ...]:
    """The instructions of the one kernel in the text; names keep their underscores."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(lines)
        elif instruction := _LINE.match(line):
            lines.append((instruction.group(1), instruction.group(2)))
    found = []
    for name, operands in lines:
        branches = name.startswith(("s_branch", "s_cbranch"))
        target = labels.get(operands.strip(), -1) if branches else -1
        found.append(Instruction(name, operands, target=target, falls=name not in ("s_branch", "s_endpgm")))
    return tuple(found)


def matrix_work(instruction: Instruction) -> int:
    """Multiplications of one wave's matrix instruction, `v_mfma_f32_32x32x8_bf16`; 0 of others."""
    match = _MATRIX.match(instruction.name)
    return prod(int(side) for side in match.groups() if side) if match else 0


def use(instruction: Instruction, gpu: Gpu) -> Use:
    """The pipe that an instruction takes, and for how long."""
    name = instruction.name
    if work := matrix_work(instruction):
        width = 2.0 if "f8" in name or "i8" in name else 0.25 if name.endswith("f32") else 1.0
        return Use("tensor", work / (gpu.matrix_rate / PARTITIONS * width))
    if name.startswith("ds_"):
        twice = 2 if "read2" in name or "write2" in name else 1
        return Use("shared", twice * gpu.wave * _width(name) / 128)
    if name.startswith(("buffer_", "global_", "flat_", "scratch_")):
        return Use("L2", gpu.wave * _width(name) / gpu.l2_bytes)
    if name.startswith("s_"):
        return Use("uniform", 1)
    return Use("MUFU", 16) if _SLOW.match(name) else Use("ALU", gpu.wave / 16)


def _width(name: str) -> int:
    """Bytes of a lane's access."""
    return next((size for word, size in _WIDTHS if word in name), 4)


def bound(code: Sequence[Instruction], gpu: Gpu, programs: int, warps: int) -> Pace:
    """The least that a pass of all resident programs takes: the busiest pipe."""
    busy = dict.fromkeys(PIPES, 0.0)
    for instruction in code:
        taken = use(instruction, gpu)
        shared = 1 if taken.pipe in ("shared", "L2") else PARTITIONS
        busy[taken.pipe] += taken.cycles * programs * warps / shared
    busy["ALU"] += busy["MUFU"]  # both are the vector unit
    return Pace(max(busy.values()), busy, len(code) * programs * warps / PARTITIONS)
