"""The compiled programs of a job, as the issue model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from crosstile.kernels.tiles.launch import Array, Launch
from crosstile.kernels.tiles.targets import Target, get_target
from crosstile.kernels.tiles.tuned import changed_tiles

from .dumping import stand_ins
from .gpu import compiled_launch, item_bytes, read_compiled, tiles_in_words
from .gpus import GPUS
from .issue import Issue, IssueError, Program, predict_program
from .programs import Job, chosen_tiles, gpu_plan
from .shapes import get_shape


def predict(job: Job, tiles: Mapping[str, int] | None = None) -> tuple[Issue, ...]:
    """Compile a job for its GPU and predict each of its kernels, in the order of the launches.

    `tiles` changes fields of the configuration that the library would choose, such as `{"forward.block_q": 64}`.
    Raises IssueError where the target is no GPU or the loops of a kernel cannot be counted, ValueError where a field
    does not exist.
    """
    if job.target not in GPUS:
        raise IssueError(f"target: got {job.target!r}; it must be a GPU, one of {', '.join(GPUS)}")
    return tuple(predict_program(program, GPUS[job.target]) for program in programs_of(job, tiles))


def programs_of(job: Job, tiles: Mapping[str, int] | None = None) -> list[Program]:
    """Every launch of the job in order, compiled; `tiles` changes fields of what the library chooses."""
    plan = gpu_plan(job, changed_tiles(chosen_tiles(job), tiles)) if tiles else gpu_plan(job)
    arrays = {**plan.inputs, **plan.outputs, **plan.scratch}
    target = get_target(job.target)
    steering = stand_ins(get_shape(job.shape), job.dtype)
    return [program_of(launch, arrays, target, steering) for launch in plan.launches if all(launch.grid)]


def program_of(
    launch: Launch,
    arrays: Mapping[str, Array],
    target: Target,
    steering: Mapping[str, np.ndarray] | None = None,
) -> Program:
    """One launch, compiled; `steering` has the values of integer arrays that its loops depend on."""
    compiled = compiled_launch(launch, dict(arrays), target)
    facts = read_compiled(compiled, target)
    named = {name for name in (*launch.inputs, *launch.outputs) if name}
    return Program(
        name=f"{launch.kernel.__name__.strip('_')} → {', '.join(launch.outputs)}",
        tiles=tiles_in_words(launch),
        code=compiled.asm["sass" if target.platform == "cuda" else "amdgcn"],
        ir=compiled.asm["ttir"],
        arguments={name: value for name, value in launch.numbers.items() if value is not None},
        grid=launch.grid,
        warps=compiled.metadata.num_warps,
        registers=facts.registers,
        shared=compiled.metadata.shared,
        spills=facts.spills,
        memory_bytes=round(sum(array_bytes(arrays[name]) * launch.shares.get(name, 1.0) for name in named)),
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0),
        elements=_Elements(launch, arrays, steering or {}),
    )


def array_bytes(array: Array) -> int:
    """Of its elements, each place in memory counted once where a stride is 0."""
    sizes = [size for size, stride in zip(array.shape, array.strides, strict=True) if stride]
    return prod(sizes) * item_bytes(array.dtype)


class _Elements:
    """Elements of the arrays of a launch by the parameter's name, for the loops that depend on them."""

    def __init__(self, launch: Launch, arrays: Mapping[str, Array], steering: Mapping[str, np.ndarray]) -> None:
        operands = iter((*launch.inputs, *launch.outputs))
        self.values: dict[str, Any] = {}
        for parameter in launch.kernel.params:
            if not parameter.is_constexpr and parameter.name not in launch.numbers:
                self.values[parameter.name] = steering.get(next(operands))

    def __call__(self, parameter: str, offset: int) -> Any:
        values = self.values.get(parameter)
        return None if values is None or not 0 <= offset < values.size else values.reshape(-1)[offset].item()
