"""The chips a kernel is written for, as data: what a tile choice and a roofline need to know.

Figures are per device as a program sees it (one TensorCore of v4, v5p and v7x; one die of nothing else), from the
vendors' datasheets, the Cloud TPU documentation and `jax/_src/tpu_info.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Target:
    """One kind of chip, or the interpreters.

    Attributes:
        name: how users name it: `sm_90`, `gfx942`, `v6e`, or `interpret`.
        platform: `cuda`, `rocm`, `tpu`, or `cpu` (the interpreters).
        bf16_tflops: dense peak of the matrix units, 1e12 operations a second.
        bandwidth: of the device's memory, 1e9 bytes a second.
        on_chip_bytes: shared memory that one program may use (GPU), or VMEM of one core (TPU).
        matrix_unit: the side of the matrix unit (TPU), 0 where it has no single size.
        chip: the product the figures are of.
        processors: streaming multiprocessors or compute units (GPU), which run programs side by side; 0 on a TPU.
        siblings: other cores of the same device (TPU), which share its HBM and the parallel part of a kernel's grid.
    """

    name: str
    platform: Literal["cuda", "rocm", "tpu", "cpu"]
    bf16_tflops: float = 0.0
    bandwidth: float = 0.0
    on_chip_bytes: int = 0
    matrix_unit: int = 0
    chip: str = ""
    processors: int = 0
    siblings: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.platform in ("cuda", "rocm")

    @property
    def is_tpu(self) -> bool:
        return self.platform == "tpu"

    @property
    def interpreted(self) -> bool:
        return self.platform == "cpu"

    @property
    def capability(self) -> int:
        """CUDA compute capability as Triton counts it (90 for sm_90); 0 elsewhere."""
        return int(self.name[3:]) if self.platform == "cuda" else 0


INTERPRET = Target("interpret", "cpu", chip="this CPU, interpreted")

_CHIPS = (
    Target("sm_80", "cuda", 312, 2039, 163 * KIB, chip="A100 80 GB", processors=108),
    Target("sm_90", "cuda", 989, 3350, 227 * KIB, chip="H100 SXM", processors=132),
    Target("sm_100", "cuda", 2250, 8000, 227 * KIB, chip="B200", processors=148),
    Target("gfx942", "rocm", 1307, 5300, 64 * KIB, chip="MI300X", processors=304),
    Target("gfx950", "rocm", 2500, 8000, 160 * KIB, chip="MI355X", processors=256),
    Target("v4", "tpu", 137.5, 615, 16 * MIB, 128, chip="TPU v4, one of two cores", siblings=1),
    Target("v5e", "tpu", 197, 820, 128 * MIB, 128, chip="TPU v5e"),
    Target("v5p", "tpu", 229.5, 1382, 64 * MIB, 128, chip="TPU v5p, one of two cores", siblings=1),
    Target("v6e", "tpu", 918, 1638, 128 * MIB, 256, chip="TPU v6e"),
    Target("v7x", "tpu", 1154, 3690, 64 * MIB, 256, chip="TPU v7x, one of two devices"),
)

TARGETS: dict[str, Target] = {chip.name: chip for chip in _CHIPS}


def nearest_cuda(major: int, minor: int) -> Target:
    """The CUDA target whose instructions that compute capability has."""
    return TARGETS["sm_100" if major == 10 else "sm_90" if (major, minor) == (9, 0) else "sm_80"]


def get_target(name: str) -> Target:
    """The target of that name. Raises ValueError with the names there are."""
    if name == INTERPRET.name:
        return INTERPRET
    if name not in TARGETS:
        raise ValueError(f"target: got {name!r}; it must be one of {', '.join(TARGETS)}")
    return TARGETS[name]
