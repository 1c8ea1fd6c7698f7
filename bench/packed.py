"""GPU programs that are compiled here and launched elsewhere: where there is a chip, and no compiler or another one.

A folder holds the machine code of every launch of named shapes, `KEY.cubin`, and beside it in `KEY.json` what a launch
has to know of it. The key says which program a launch needs: its kernel, and all that the compiler was told of its
arguments. The machine with the chip needs torch, any Triton, and the driver, called as NVIDIA documents its API.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from crosstile.kernels.tiles.launch import Launch
from crosstile.kernels.tiles.targets import Target, get_target

from .gpu import compiled_launch, specialise
from .programs import Job, gpu_plan

_MAX_STATIC_SHARED = 48 * 1024
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_C_TYPES = {
    "i1": ctypes.c_int8,
    "u1": ctypes.c_int8,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}


class MissingProgramError(RuntimeError):
    """The folder lacks the program of a launch."""


@dataclass(frozen=True)
class Program:
    """What a launch has to know of its machine code: the kernel's name in it, threads, and bytes of memory."""

    name: str
    threads: int
    shared: int
    scratch: int
    scratch_alignment: int


def key_of(launch: Launch, specialised: tuple[Any, ...]) -> str:
    """The name of the program that the launch needs, specialised as `gpu.specialise` says."""
    where = launch.kernel.fn.__module__, launch.kernel.fn.__name__
    told = where, launch.num_warps, launch.num_stages, launch.options, specialised
    return hashlib.sha256(repr(told).encode()).hexdigest()[:24]


def pack(jobs: Iterable[Job], folder: Path) -> Iterator[Job]:
    """Compile what the jobs launch, each program once; yields each job when its programs are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        plan, target = gpu_plan(job), get_target(job.target)
        arrays = {**plan.inputs, **plan.outputs, **plan.scratch}
        for launch in plan.launches:
            file = folder / f"{key_of(launch, specialise(launch, arrays, target))}.cubin"
            if not all(launch.grid) or file.exists():
                continue
            compiled = compiled_launch(launch, arrays, target)
            facts = compiled.metadata
            program = Program(
                facts.name, 32 * facts.num_warps, facts.shared, facts.global_scratch_size, facts.global_scratch_align
            )
            file.with_suffix(".json").write_text(json.dumps(asdict(program)))
            file.write_bytes(compiled.asm["cubin"])
        yield job


class Packed:
    """Launches the programs of a folder on the current device, as `crosstile.torch.launching` wants it."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder, self._target = folder, target
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._loaded: dict[str, tuple[Any, Program]] = {}
        self._context = ctypes.c_void_p()
        self._check(self._driver.cuCtxGetCurrent(ctypes.byref(self._context)))

    def __call__(self, launch: Launch, tensors: list[Any]) -> None:
        """Launch on torch's current stream; tensors in the order of the launch's inputs and outputs."""
        import torch

        from crosstile.torch import describe

        self._check(self._driver.cuCtxSetCurrent(self._context))  # autograd's thread may have none
        names = (*launch.inputs, *launch.outputs)
        arrays = {name: describe(tensor) for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
        specialised = specialise(launch, arrays, self._target)
        function, program = self._load(launch, key_of(launch, specialised))
        values = arguments(launch, specialised[0], tensors)
        grid = (*launch.grid, 1, 1)[:3]
        scratch = None
        if program.scratch:
            scratch = torch.empty(
                prod(grid) * program.scratch + program.scratch_alignment, dtype=torch.int8, device="cuda"
            )
        values += [ctypes.c_void_p(None if scratch is None else scratch.data_ptr()), ctypes.c_void_p(None)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._driver.cuLaunchKernel(function, *grid, program.threads, 1, 1, program.shared, stream, pointers, None)
        )

    def _load(self, launch: Launch, key: str) -> tuple[Any, Program]:
        if key not in self._loaded:
            file = self._folder / f"{key}.cubin"
            if not file.exists():
                constants = ", ".join(f"{name} {value}" for name, value in launch.constants.items())
                raise MissingProgramError(
                    f"{self._folder}: has no program of {launch.kernel.__name__} with {constants}; "
                    "pack the shape with this version of crosstile"
                )
            program = Program(**json.loads(file.with_suffix(".json").read_text()))
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), file.read_bytes()))
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), module, program.name.encode()))
            if program.shared > _MAX_STATIC_SHARED:
                self._check(self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, program.shared))
            self._loaded[key] = function, program
        return self._loaded[key]

    def _check(self, result: int) -> None:
        if result:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(result, ctypes.byref(name))
            raise RuntimeError(f"CUDA driver: {(name.value or b'').decode() or result}")


def arguments(launch: Launch, signature: dict[str, str], tensors: list[Any]) -> list[Any]:
    """What a program takes: its parameters in order, less what is a constant in it."""
    operands = iter(tensors)
    values: list[Any] = []
    for parameter in launch.kernel.params:
        if parameter.is_constexpr:
            continue
        number: Any = launch.numbers.get(parameter.name)
        tensor = None if parameter.name in launch.numbers else next(operands)
        kind = signature[parameter.name]
        if kind != "constexpr":
            values.append(_C_TYPES[kind](number) if tensor is None else ctypes.c_void_p(tensor.data_ptr()))
    return values
