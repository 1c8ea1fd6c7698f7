"""What each instruction occupies: which pipe of an NVIDIA multiprocessor, for how long, and when its result is there.

Sources: throughputs by instruction and compute capability, NVIDIA, "CUDA C++ Programming Guide", table of arithmetic
instructions; matrix rates from the data sheets (dense peak over processors and clock); `HMMA` on Hopper, at 0.63 of the
peak that only `HGMMA` reaches, and latencies: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture via Microbenchmarking", 2024; Jia et al., 2018, and Abdelkhalik et al., "Demystifying the Nvidia Ampere
Architecture through Microbenchmarking and Instruction-level Analysis", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .gpus import Gpu
from .sass import Instruction, access_bytes, matrix_work

SHARED = ("shared", "L2")  # by all four partitions of a multiprocessor
PIPES = ("tensor", "FMA", "ALU", "MUFU", "uniform", *SHARED)
_FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "IMAD", "FFMA32I"}
_PACKED = {"FFMA2", "FMUL2", "FADD2"}
_SLOW = {"MUFU": 23, "I2F": 23, "F2I": 23, "F2F": 23, "FRND": 23, "POPC": 23, "FLO": 23}
_SHARED_MEMORY = {"LDS", "LDSM", "STS", "STSM", "ATOMS", "LDL", "STL"}  # private memory lies in the same cache
_GLOBAL = {"LDG", "LD", "STG", "ST", "RED", "REDG", "ATOMG", "ATOM"}
_CONTROL = {"BRA", "NOP", "EXIT", "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "MEMBAR", "FENCE", "SYNCS"}
_LATENCY = {"LDS": 29, "LDSM": 33, "SHFL": 24, "LDC": 30, "LDCU": 30, "S2R": 25, "S2UR": 25, "R2UR": 12, "MEMBAR": 20}
_TENSOR_MEMORY = {"LDTM": 30, "STTM": 30}  # between registers and Blackwell's tensor memory


@dataclass(frozen=True)
class Use:
    """What one warp's instruction takes.

    Attributes:
        pipe: its pipe, "" for none.
        cycles: that it keeps the pipe.
        latency: from issue to the result.
        waits: whether the warp stands still until the pipe is free; else the work queues there.
        shared: cycles of shared memory beside it, where a matrix instruction reads its operands from it.
    """

    pipe: str = ""
    cycles: float = 0.0
    latency: float = 6.0
    waits: bool = True
    shared: float = 0.0


@cache
def use(instruction: Instruction, gpu: Gpu) -> Use:
    """The pipe that an instruction takes on that chip."""
    base = instruction.base
    if instruction.guard == "!PT":  # never runs
        return Use()
    if work := matrix_work(instruction):
        return _matrix(instruction, work, gpu)
    if base in _SLOW:
        return Use("MUFU", 32 / gpu.special_lanes, _SLOW[base])
    if base in _FMA:
        slow = 2 if base in _PACKED or base == "IMAD" else 1
        return Use("FMA", max(1, 32 / gpu.float_lanes) * (slow if gpu.float_lanes == 32 else 1), 4)
    if base in _SHARED_MEMORY:
        return Use("shared", max(1, access_bytes(instruction) / 128), _LATENCY.get(base, 29), waits=False)
    if base == "SHFL":
        return Use("shared", 1, _LATENCY[base], waits=False)
    if base in ("LDGSTS", *_GLOBAL):
        return Use("L2", access_bytes(instruction) / gpu.l2_bytes, gpu.latency, waits=False)
    if base in _TENSOR_MEMORY:
        return Use("", 0, _TENSOR_MEMORY[base])
    if base in _CONTROL or base.startswith(("UT", "ELECT", "VOTE", "BS", "CALL", "RET")):
        return Use("", 0, _LATENCY.get(base, 6))
    if base.startswith("U") or base in ("R2UR", "LDC", "LDCU", "S2R", "S2UR", "ULDC"):
        return Use("uniform", 1, _LATENCY.get(base, 6))
    return Use("ALU", 2, 4)


def _matrix(instruction: Instruction, work: int, gpu: Gpu) -> Use:
    name = instruction.name
    rate = gpu.matrix_rate / 4 * _width(name)
    if not name.startswith("HGMMA") and not name.startswith("QGMMA") and not name.startswith("IGMMA"):
        return Use("tensor", work / (rate * gpu.register_matrix_share), 18)
    shape = name.split(".")[1].split("x")
    rows, columns, inner = (int(side) for side in shape)
    item = 4 if "TF32" in name else 1 if name[0] in "QI" else 2
    in_memory = instruction.operands.count("gdesc") and not instruction.operands.split(",")[1].strip().startswith("R")
    # Four warps share the right operand; each reads its own rows of the left one, where that lies in shared memory.
    read = (columns + (rows if in_memory else 0)) * inner * item / 4
    return Use("tensor", work / rate, 32, waits=False, shared=read / 128)


def _width(name: str) -> float:
    """Products a cycle, relative to those of two bytes."""
    if "TF32" in name:
        return 0.5
    return 2.0 if name.startswith(("Q", "I")) or "E4M3" in name or "E5M2" in name else 1.0
