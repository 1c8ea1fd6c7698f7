"""How many programs of a kernel a multiprocessor holds at once, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass

from .gpus import Gpu

_RESERVED = 1024  # bytes of shared memory that the driver keeps for each program, compute capability 8.0 and later


@dataclass(frozen=True)
class Occupancy:
    """Programs on one multiprocessor.

    Attributes:
        programs: resident at once; 0: one alone asks for more than there is, and a launch fails.
        warps: of them all.
        limit: what allows no more: registers, shared memory, warps or programs.
        share: of the warps that the multiprocessor could hold.
    """

    programs: int
    warps: int
    limit: str
    share: float


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> Occupancy:
    """From a thread's registers, a program's shared memory in bytes, its warps and its columns of tensor memory.

    Registers are given out by 8 to a thread and a warp lies in one partition (NVIDIA, "CUDA C++ Programming Guide",
    compute capabilities; AMD, "MI300 instruction set architecture", section 3.6).

    >>> from crosstile.bench.gpus import GPUS
    >>> occupancy(GPUS["sm_90"], registers=168, shared=100_000, warps=8)
    Occupancy(programs=1, warps=8, limit='registers', share=0.125)
    """
    each = max(8, -(-registers // 8) * 8) * gpu.wave
    reserved = _RESERVED if gpu.wave == 32 else 0
    room = {
        "registers": 4 * (gpu.registers // each) // warps,
        "shared memory": gpu.shared_bytes // max(1, shared + reserved),
        "warps": 4 * gpu.warps // warps,
        "programs": gpu.programs,
    }
    if tensor_memory:
        room["tensor memory"] = 512 // tensor_memory
    limit = min(room, key=room.__getitem__)
    programs = room[limit]
    return Occupancy(programs, programs * warps, limit, min(1.0, programs * warps / (4 * gpu.warps)))
