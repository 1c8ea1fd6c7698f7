"""GPUs as the issue model sees them: rates, sizes, and the few constants that were fitted to measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

_WARM = 0.8  # of the L2 cache, what a kernel finds there again


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        target: the chip it is compiled for.
        product: its name.
        processors: multiprocessors, or compute units on AMD.
        clock: 1e9 cycles a second that it sustains.
        bandwidth: of its memory, 1e9 bytes a second, data sheet.
        shared_bytes: shared memory of a multiprocessor, of which a program may take `most_shared`.
        registers: 32-bit registers of a multiprocessor's partition.
        warps: that a partition holds at once, and `programs` that a multiprocessor does.
        matrix_rate: multiplications of two-byte numbers a cycle and multiprocessor, dense, from the data sheet.
        register_matrix_share: of it, what instructions reach whose operands are in registers.
        matrix_share: of it, what a kernel sustains that does nothing else; the clock falls with power.
        float_lanes: 32-bit floating-point lanes of a partition; `special_lanes` those of exp2, rsqrt and conversions.
        l2_bytes: that a multiprocessor gets from the L2 cache in a cycle.
        latency: cycles from a load's issue to its data.
        memory_share: of the bandwidth, what kernels reach.
        cache_bytes: of the L2 cache; arrays that fit, and lie there from the last run, come at `cache_bandwidth`.
        launch: seconds that a kernel takes to start and end.
        wave: lanes of a warp.
        measured: by whom timings of this product were compared with the model, "" where nobody did.
    """

    target: str
    product: str
    processors: int
    clock: float
    bandwidth: float
    shared_bytes: int
    matrix_rate: int
    float_lanes: int = 32
    special_lanes: int = 4
    register_matrix_share: float = 1.0
    matrix_share: float = 1.0
    registers: int = 16384
    warps: int = 16
    programs: int = 32
    l2_bytes: float = 64.0
    latency: float = 700.0
    memory_share: float = 0.9
    cache_bytes: float = 0.0
    cache_bandwidth: float = 0.0
    launch: float = 2e-6
    wave: int = 32
    measured: str = ""

    def memory_seconds(self, size: int) -> float:
        """Of a kernel that moves so many bytes and does nothing else."""
        if size <= _WARM * self.cache_bytes:
            return size / (self.cache_bandwidth * 1e9)
        return size / (self.bandwidth * 1e9 * self.memory_share)

    def seconds(self, cycles: float) -> float:
        """Of that many cycles."""
        return cycles / self.clock / 1e9


_A100 = Gpu(
    *("sm_80", "A100 80 GB", 108, 1.41, 2039, 167936, 1024),
    float_lanes=16,
    cache_bytes=40e6,
    cache_bandwidth=3500,
    measured="tokamax",
)
_H100 = Gpu(
    *("sm_90", "H100 SXM", 132, 1.755, 3350, 233472, 2048),
    register_matrix_share=0.63,
    matrix_share=0.8,
    cache_bytes=50e6,
    cache_bandwidth=5500,
    measured="tokamax",
)
_B200 = Gpu("sm_100", "B200", 148, 1.85, 8000, 233472, 4096, register_matrix_share=0.25)
_MI300X = Gpu("gfx942", "MI300X", 304, 2.1, 5300, 65536, 1024, registers=512 * 64, warps=8, wave=64, special_lanes=4)
_MI355X = Gpu("gfx950", "MI355X", 256, 2.4, 8000, 163840, 2048, registers=512 * 64, warps=8, wave=64, special_lanes=4)

GPUS = {gpu.target: gpu for gpu in (_A100, _H100, _B200, _MI300X, _MI355X)}
A100_40 = replace(_A100, product="A100 40 GB", bandwidth=1555)
H200 = replace(_H100, product="H200", bandwidth=4800, measured="crosstile")
