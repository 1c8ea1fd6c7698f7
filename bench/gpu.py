"""Compile a launch plan for a GPU that is not there, with Triton's own assemblers, and read the machine code.

Arguments are specialised as Triton does at run time, so that the program is the one a launch would run: pointers and
integers that 16 divides say so, an integer 1 becomes a constant, larger integers widen to 64 bits, and on AMD an array
within 2 GiB is known to be.
"""

from __future__ import annotations

import os
import time
from typing import Any

from crosstile.kernels.tiles.launch import Array, Launch, Plan
from crosstile.kernels.tiles.targets import Target, get_target

from .facts import KernelFacts
from .isa import MachineCode, read_amdgcn, read_sass

_TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i1",
}
_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_DIVISIBLE = ["tt.divisibility", 16]
_NEAR = ["tt.pointer_range", 32]

Argument = tuple[str, object, list[list[object]]]


def compile_plan(plan: Plan, target_name: str) -> tuple[KernelFacts, ...]:
    """The facts of every program of the plan, in the order of its launches; those of an empty grid have none.

    Launches of one program, which differ in numbers that it is not specialised for, count once.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    target = get_target(target_name)
    arrays = {**plan.inputs, **plan.outputs, **plan.scratch}
    programs: dict[str, KernelFacts] = {}
    for launch in plan.launches:
        how = launch.kernel.__name__, launch.num_warps, launch.num_stages, launch.options, launch.outputs
        program = repr((how, specialise(launch, arrays, target)))
        if all(launch.grid) and program not in programs:
            programs[program] = _compile(launch, arrays, target)
    return tuple(programs.values())


def compiled_launch(launch: Launch, arrays: dict[str, Array], target: Target) -> Any:
    """What Triton makes of a launch: `asm` and `metadata`."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch, arrays, target)
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=gpu_target(target),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options},
    )


def _compile(launch: Launch, arrays: dict[str, Array], target: Target) -> KernelFacts:
    started = time.perf_counter()
    compiled = compiled_launch(launch, arrays, target)
    code = read_compiled(compiled, target)
    return KernelFacts(
        kernel=f"{launch.kernel.__name__.strip('_')} → {', '.join(launch.outputs)}",
        tiles=tiles_in_words(launch),
        dot_dtype=launch.dot_dtype,
        on_chip_bytes=compiled.metadata.shared,
        seconds=time.perf_counter() - started,
        **vars(code),
    )


def gpu_target(target: Target) -> Any:
    """Triton's name for the chip."""
    from triton.backends.compiler import GPUTarget

    if target.platform == "cuda":
        return GPUTarget("cuda", target.capability, 32)
    return GPUTarget("hip", target.name, 64)


def read_compiled(compiled: Any, target: Target) -> MachineCode:
    """The facts of what Triton compiled."""
    if target.platform == "cuda":
        return read_sass(compiled.asm["sass"], compiled.asm["cubin"])
    return read_amdgcn(compiled.asm["amdgcn"])


def specialise(
    launch: Launch, arrays: dict[str, Array], target: Target
) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """The signature, constants and attributes that `triton.jit` would derive from these arguments."""
    operands = iter((*launch.inputs, *launch.outputs))
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for parameter in launch.kernel.params:
        hints: list[list[object]]
        if parameter.is_constexpr:
            kind, constant, hints = "constexpr", _constant(launch, parameter), []
        else:
            value = launch.numbers[parameter.name] if parameter.name in launch.numbers else arrays.get(next(operands))
            kind, constant, hints = _argument(value, parameter, target)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = constant
        if hints:
            attributes[(parameter.num,)] = hints
    return signature, constants, attributes


def _constant(launch: Launch, parameter: Any) -> object:
    if parameter.name in launch.constants:
        return launch.constants[parameter.name]
    if parameter.has_default:
        return parameter.default
    raise ValueError(f"launch of {launch.kernel.__name__}: the constexpr {parameter.name} has no value")


def _argument(value: Array | float | None, parameter: Any, target: Target) -> Argument:
    """(type, constant, attributes) of one argument."""
    specialises = not parameter.do_not_specialize
    aligns = specialises and not parameter.do_not_specialize_on_alignment
    if value is None:  # an absent array
        return "constexpr", None, []
    if isinstance(value, Array):
        near = target.platform == "rocm" and (value.reach + 1) * _ITEM_BYTES[value.dtype] < 2**31
        hints = [_DIVISIBLE] * (aligns and value.aligned) + [_NEAR] * (specialises and near)
        return f"*{_TYPES[value.dtype]}", None, hints
    if isinstance(value, bool):
        return "u1", None, []
    if isinstance(value, float):
        return parameter.annotation_type or "fp32", None, []
    if value == 1 and specialises and not parameter.annotation_type:
        return "constexpr", 1, []
    kind = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
    return kind, None, [_DIVISIBLE] * (aligns and value % 16 == 0)


def item_bytes(dtype: str) -> int:
    """Of one element of that dtype, by its NumPy name."""
    return _ITEM_BYTES[dtype]


def tiles_in_words(launch: Launch) -> str:
    """The launch's blocks, warps and stages."""
    blocks = [
        f"{name.lower().removeprefix('block_')} {value}"
        for name, value in launch.constants.items()
        if name.upper().startswith("BLOCK") or name in ("BM", "BN", "BK")
    ]
    return ", ".join([*blocks, f"{launch.num_warps} warps", f"{launch.num_stages} stages"])
