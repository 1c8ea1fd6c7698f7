"""What the compilers told: the facts of one compiled kernel, and the budget they are held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from crosstile.kernels.tiles.targets import get_target

MAX_REGISTERS = {"cuda": 255, "rocm": 512}
MATRIX_DTYPES = ("float16", "bfloat16")
SPILLS_A_BUNDLE = 1  # on a TPU a spill is a load or store of VMEM beside other work, which `crosstile cycles` counts


@dataclass(frozen=True)
class KernelFacts:
    """One kernel in the machine code of one chip.

    Attributes:
        instructions: of the machine code, counted once whatever the trip counts; VLIW bundles on a TPU.
        matrix: how many instructions of each kind feed the matrix units, such as `{"HGMMA": 8}`.
        dot_dtype: the dtype of the kernel's dots, "" where it has none.
        spills: loads and stores of registers that did not fit, or the compiler's own count of them.
        on_chip_bytes: shared memory of one program (GPU), VMEM of the kernel (TPU).
        registers: per thread (GPU), None on a TPU.
        local_bytes: private memory per thread (GPU); not 0 means a spill or an indexed array.
        units: slots that the schedule fills, by unit (TPU).
        notes: other counts worth seeing, such as TMA instructions.
    """

    kernel: str
    tiles: str
    instructions: int
    matrix: dict[str, int]
    dot_dtype: str
    spills: int
    on_chip_bytes: int
    registers: int | None = None
    local_bytes: int = 0
    units: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def over_budget(facts: KernelFacts, target_name: str) -> tuple[str, ...]:
    """Why this kernel fails on that chip, a sentence each; empty where it passes."""
    target = get_target(target_name)
    found = []
    if _lacks_matrix_instructions(facts, target.platform):
        unit = "MXU" if target.is_tpu else "tensor-core"
        found.append(f"no {unit} instruction, though it multiplies {facts.dot_dtype}")
    if facts.spills > (SPILLS_A_BUNDLE * facts.instructions if target.is_tpu else 0):
        scalars = facts.notes.get("scalar_register_spills")
        found.append(f"{facts.spills} register spills" + (f", {scalars} of them of scalars" if scalars else ""))
    elif facts.local_bytes:
        found.append(f"{facts.local_bytes} bytes of private memory per thread")
    if facts.on_chip_bytes > target.on_chip_bytes:
        memory = "VMEM" if target.is_tpu else "shared memory"
        found.append(f"{facts.on_chip_bytes} bytes of {memory}, more than the chip's {target.on_chip_bytes}")
    limit = MAX_REGISTERS.get(target.platform)
    if limit and facts.registers is not None and facts.registers > limit:
        found.append(f"{facts.registers} registers, more than the chip's {limit}")
    return tuple(found)


def _lacks_matrix_instructions(facts: KernelFacts, platform: str) -> bool:
    """Products belong on the matrix units, where there are some for their dtype: NVIDIA has none for float32."""
    if not facts.dot_dtype or any(facts.matrix.values()):
        return False
    return has_matrix_instructions(platform, facts.dot_dtype)


def has_matrix_instructions(platform: str, dtype: str) -> bool:
    """Whether products of that dtype have matrix units to go to."""
    return platform != "cuda" or dtype in MATRIX_DTYPES
