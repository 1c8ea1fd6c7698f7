"""What to compile: from a named shape, the launch plan of a GPU or the JAX program of a TPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from crosstile.dispatch import OPS, supports
from crosstile.kernels.tiles.launch import Array, Plan, contiguous
from crosstile.kernels.tiles.targets import get_target
from crosstile.plans import completed, map_arrays

from .shape import Shape
from .shapes import get_shape

Direction = Literal["forward", "saving", "backward"]
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Job:
    """One compilation: an op of a named shape, in one direction, for one chip.

    The direction "saving" is the forward that also keeps what its backward reads, where that is another program.
    """

    target: str
    op: str
    direction: Direction
    shape: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.target} {self.op} {self.direction} {self.shape} {self.dtype}"


def jobs_for(targets: Iterable[str], shapes: Iterable[Shape], dtypes: Iterable[str]) -> list[Job]:
    """Every direction of every shape in every dtype on every target; the slow ones (GPUs) first."""
    kinds = tuple(dtypes)
    chosen = [(shape, directions(shape)) for shape in shapes]
    return [
        Job(target, shape.op, direction, shape.name, dtype)
        for target in sorted(targets, key=lambda name: get_target(name).is_tpu)
        for shape, ways in chosen
        for dtype in kinds
        for direction in ways
    ]


def directions(shape: Shape) -> tuple[Direction, ...]:
    """Serving shapes have no backward; "saving" is there where a forward for a backward has another spec."""
    if not shape.trains:
        return ("forward",)
    spec, _ = shape.prepare(DTYPES[0])
    saves = OPS[shape.op].module("spec").saving(spec) != spec
    return ("forward", "saving", "backward") if saves else ("forward", "backward")


def unsupported(job: Job) -> tuple[str, ...]:
    """Why the library does not offer this on that chip, such as pages of float8 where a GPU has none; () if it does."""
    target = get_target(job.target)
    implementation = "triton" if target.is_gpu else "pallas"
    return supports(job.op, implementation, spec_of(job), target, job.direction != "forward")


def spec_of(job: Job) -> Any:
    """The op's spec, as the public function makes it for this job's arrays."""
    return _prepared(job)[0]


def chosen_tiles(job: Job) -> Any:
    """The tiles that the library chooses for this job's arrays."""
    spec, inputs = _prepared(job)
    return OPS[job.op].tiles(spec, get_target(job.target), inputs)[0]


def _prepared(job: Job) -> tuple[Any, tuple[Any, ...]]:
    spec, inputs = get_shape(job.shape).prepare(job.dtype)
    return (spec if job.direction == "forward" else OPS[job.op].module("spec").saving(spec)), inputs


def gpu_plan(job: Job, config: Any = None) -> Plan:
    """The launches of the op's Triton kernels; `config` are its tiles, None for those that the library chooses."""
    kernel, target = import_module(f"crosstile.kernels.{job.op}.triton"), get_target(job.target)
    spec, found = _prepared(job)
    config = config or OPS[job.op].tiles(spec, target, tuple(found))[0]
    if not get_shape(job.shape).known_to_host:
        found = map_arrays(_describe, tuple(found))
    inputs = map_arrays(_describe, completed(OPS[job.op], "triton", spec, config, target, tuple(found)))
    forward: Plan = kernel.forward(spec, config, *inputs)
    if job.direction != "backward":
        return forward
    outputs = tuple(forward.outputs.get(name) for name in OPS[job.op].outputs)
    given = get_shape(job.shape).gradients or OPS[job.op].outputs[:1]
    gradients = tuple(
        contiguous(output.shape, output.dtype) if name in given and output else None
        for name, output in zip(OPS[job.op].outputs, outputs, strict=True)
    )
    backward: Plan = kernel.backward(spec, config, inputs, outputs, gradients)
    return backward


def _describe(array: Any) -> Array:
    if isinstance(array, Array):
        return array
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def tpu_program(job: Job, config: Any = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function that calls the public op for the target, and its arguments as trees of ShapeDtypeStruct.

    `config` are the op's tiles, None for those that the library chooses.
    """
    import jax
    import jax.numpy as jnp

    import crosstile

    shape = get_shape(job.shape)
    structs = {name: jax.ShapeDtypeStruct(size, kind) for name, (size, kind) in shape.arrays(job.dtype).items()}
    floats = {name: struct for name, struct in structs.items() if jnp.issubdtype(struct.dtype, jnp.floating)}
    others = {name: struct for name, struct in structs.items() if name not in floats}

    def call(floats: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
        return shape.run({**floats, **others}, implementation="pallas", config=config)

    def for_target(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with crosstile.target(job.target):
                return function(*args)

        return run

    program, arguments = directed(for_target(call), floats, others, job.direction)
    return for_target(program), arguments


def directed(
    call: Callable[..., Any], floats: Mapping[str, Any], others: Mapping[str, Any], direction: Direction
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The program of one direction of `call(floats, others)`, and its arguments: a backward's are what was saved."""
    import jax

    def saving(floats: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
        return jax.vjp(lambda floats: call(floats, others), floats)

    if direction == "forward":
        return call, (floats, others)
    if direction == "saving":
        return saving, (floats, others)
    out, pull = jax.eval_shape(saving, floats, others)
    return lambda pull, gradient: pull(gradient), (pull, out)


def tiles_by_kernel(job: Job) -> Callable[[str], str]:
    """A TPU kernel's tiles from its name: of the configuration's field that the name ends in, else of every field."""
    config = chosen_tiles(job)
    parts = {name: _blocks(part) for name, part in vars(config).items() if hasattr(part, "__dict__")}

    def tiles(kernel: str) -> str:
        for name, blocks in parts.items():
            if kernel.endswith(name):
                return blocks
        others = {blocks for name, blocks in parts.items() if name != "forward"}
        return "; ".join(sorted(others)) or _blocks(config)

    return tiles


def _blocks(config: Any) -> str:
    parts = [(name.removeprefix("block_"), value) for name, value in vars(config).items() if name.startswith("block_")]
    return ", ".join(f"{name} {value}" for name, value in parts)
