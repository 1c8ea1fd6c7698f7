"""What to compile: from a named shape, the launch plan of a GPU or the JAX program of a TPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from crosstile.dispatch import OPS
from crosstile.kernels.tiles.launch import Array, Plan, contiguous
from crosstile.kernels.tiles.targets import get_target

from .shapes import AttentionShape, MatmulShape, Shape, get_shape

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
    chosen, kinds = tuple(shapes), tuple(dtypes)
    return [
        Job(target, shape.op, direction, shape.name, dtype)
        for target in sorted(targets, key=lambda name: get_target(name).is_tpu)
        for shape in chosen
        for dtype in kinds
        for direction in directions(shape)
    ]


def directions(shape: Shape) -> tuple[Direction, ...]:
    """Serving shapes have no backward; only a matmul with an activation saves something."""
    if not shape.trains:
        return ("forward",)
    saves = isinstance(shape, MatmulShape) and shape.activation is not None
    return ("forward", "saving", "backward") if saves else ("forward", "backward")


def gpu_plan(job: Job) -> Plan:
    """The launches of the op's Triton kernels with the tiles that the library chooses for the target."""
    shape = get_shape(job.shape)
    spec = spec_of(job)
    kernel = import_module(f"crosstile.kernels.{job.op}.triton")
    config = _tiles_of(job).choose_config(spec, get_target(job.target))
    inputs = tuple(_arrays(shape, job.dtype))
    forward = kernel.forward(spec, config, *inputs)
    if job.direction != "backward":
        return forward
    outputs = tuple(forward.outputs.get(name) for name in OPS[job.op].outputs)
    out = next(iter(forward.outputs.values()))
    gradients = (contiguous(out.shape, out.dtype), *(None for _ in outputs[1:]))
    return kernel.backward(spec, config, inputs, outputs, gradients)


def tpu_program(job: Job) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function that calls the public op for the target, and its arguments as trees of ShapeDtypeStruct."""
    import jax

    import crosstile

    shape = get_shape(job.shape)
    call = _public_call(shape)
    arguments = tuple(_structs(shape, job.dtype))

    def for_target(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with crosstile.target(job.target):
                return function(*args)

        return run

    if job.direction == "forward":
        return for_target(call), arguments
    saving = for_target(lambda *args: jax.vjp(call, *args))
    if job.direction == "saving":
        return saving, arguments
    out, pull = jax.eval_shape(saving, *arguments)
    return for_target(lambda pull, gradient: pull(gradient)), (pull, out)


def spec_of(job: Job) -> Any:
    """The op's spec, as the public function makes it for this job's arrays."""
    shape = get_shape(job.shape)
    if isinstance(shape, AttentionShape):
        from crosstile.kernels.attention.spec import AttentionSpec

        return AttentionSpec(job.dtype, shape.head_dim, shape.head_dim, causal=shape.causal)
    from crosstile.kernels.matmul.spec import MatmulSpec

    saves = job.direction != "forward" and shape.activation is not None
    return MatmulSpec(job.dtype, job.dtype, shape.activation, save_preactivation=saves)


def tiles_by_kernel(job: Job) -> Callable[[str], str]:
    """A TPU kernel's tiles from its name: of the configuration's field that the name ends in, else of every field."""
    config = _tiles_of(job).choose_config(spec_of(job), get_target(job.target))
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


def _tiles_of(job: Job) -> Any:
    return import_module(f"crosstile.kernels.{job.op}.tiles")


def _arrays(shape: Shape, dtype: str) -> list[Array | None]:
    """The kernel's inputs in their canonical form, one leading batch on each."""
    if isinstance(shape, AttentionShape):
        return [contiguous(size, dtype) for size in _attention_sizes(shape)]
    a, b, bias, residual = _matmul_sizes(shape)
    weight = Array(
        (1, *b), dtype, (shape.k * shape.n, 1, shape.k) if shape.weight_rows_are_outputs else (b[0] * b[1], b[1], 1)
    )
    return [
        contiguous((1, *a), dtype),
        weight,
        contiguous((1, *bias), dtype) if bias else None,
        contiguous((1, *residual), dtype) if residual else None,
    ]


def _structs(shape: Shape, dtype: str) -> list[Any]:
    """The public function's array arguments, absent ones left out; a weight of output rows comes as `[n, k]`."""
    import jax

    if isinstance(shape, AttentionShape):
        return [jax.ShapeDtypeStruct(size, dtype) for size in _attention_sizes(shape)]
    a, b, bias, residual = _matmul_sizes(shape)
    b = b[::-1] if shape.weight_rows_are_outputs else b
    return [jax.ShapeDtypeStruct(size, dtype) for size in (a, b, bias, residual) if size]


def _public_call(shape: Shape) -> Callable[..., Any]:
    import crosstile

    if isinstance(shape, AttentionShape):
        return lambda q, k, v: crosstile.attention(q, k, v, causal=shape.causal, implementation="pallas")

    def matmul(a: Any, b: Any, *epilogue: Any) -> Any:
        rest = list(epilogue)
        return crosstile.matmul(
            a,
            b.T if shape.weight_rows_are_outputs else b,
            bias=rest.pop(0) if shape.bias else None,
            activation=shape.activation,
            residual=rest.pop(0) if shape.residual else None,
            implementation="pallas",
        )

    return matmul


def _attention_sizes(shape: AttentionShape) -> tuple[tuple[int, ...], ...]:
    keys = (shape.batch, shape.kv_len, shape.kv_heads, shape.head_dim)
    return (shape.batch, shape.q_len, shape.q_heads, shape.head_dim), keys, keys


def _matmul_sizes(shape: MatmulShape) -> tuple[tuple[int, ...], ...]:
    """a, b, bias and residual; () for what is absent."""
    bias = (shape.n,) if shape.bias else ()
    residual = (shape.m, shape.n) if shape.residual else ()
    return (shape.m, shape.k), (shape.k, shape.n), bias, residual
