"""torch tensors: every op as a pair of `torch.library` ops, so that autograd, compile, vmap and opcheck know them.

`crosstile::attention` and `crosstile::attention_backward` (and so for each op) take the canonical arrays, the spec's
options, and which implementation runs for which target. An absent array is returned as an empty tensor, since a
torch op's results cannot be optional.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, get_type_hints

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op

from crosstile import calls, plans
from crosstile import numpy as on_host
from crosstile.dispatch import OPS, Op, installed
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.kernels.tiles.expressions import parse, text_of
from crosstile.kernels.tiles.host_arrays import HostArray
from crosstile.kernels.tiles.launch import Array, Launch, Plan
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, Target, get_target, nearest_cuda
from crosstile.kernels.tiles.torch_functions import functions_of_torch

_SCHEMA_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
    "int | None": "int?",
    "float | None": "float?",
    "str | None": "str?",
    "tuple[int, ...]": "int[]",
    "Expression | None": "str?",
}

_LARGE = 2**22  # bytes of a host's array that is copied anew for each call
_recorded: dict[int, Tensor] = {}  # copies that CUDA graphs read, which no cache may drop

KNOWS_NEED = True  # whether `needs_grad` is sure, and not only possible


def on_cpu(array: Tensor) -> bool:
    """Whether the tensor is in this CPU's memory."""
    return array.device.type == "cpu"


def target_of(array: Tensor) -> Target:
    """The kind of chip that the tensor is on."""
    device = array.device
    if device.type == "cuda" and torch.version.hip:
        return TARGETS[torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]]
    if device.type == "cuda":
        return nearest_cuda(*torch.cuda.get_device_capability(device))
    if device.type == "tpu":
        from crosstile import torch_tpu

        return torch_tpu.target_of(device)
    return INTERPRET


def needs_grad(arrays: tuple[Any, ...]) -> bool:
    """Whether autograd will ask for a backward."""
    return torch.is_grad_enabled() and any(array is not None and array.requires_grad for array in arrays)


def wants_gradient(array: Any) -> bool:
    """Whether autograd may ask for that array's gradient."""
    return isinstance(array, Tensor) and array.requires_grad


def host(like: Tensor) -> tuple[Any, Tensor]:
    """The module for arrays that the host knows, and a tensor like those that it makes."""
    return sys.modules[__name__], like if like.device.type == "cpu" else like.new_empty((), device="cpu")


def own(arrays: tuple[Any, ...], like: Tensor) -> tuple[Any, ...]:
    """The tensors, those that stayed in the host's memory on the others' device."""
    if on_cpu(like):
        return arrays
    return tuple(array if array is None else array.to(like.device) for array in arrays)


def in_host(array: Any) -> Tensor:
    """A tensor, of an array of NumPy's too: a copy, for torch has no negative strides and no fixed arrays."""
    return torch.as_tensor(np.array(array)) if isinstance(array, np.ndarray) else array


def as_int32(array: Any) -> Tensor:
    """Ids, lengths and offsets as kernels read them."""
    return in_host(array).to(torch.int32).contiguous()


def largest(array: Tensor) -> Tensor:
    """The largest of each row of numbers that are not negative; 0 of an empty one."""
    return array.amax(dim=-1) if array.shape[-1] else array.new_zeros(array.shape[:-1])


def words(seed: Any, like: Tensor) -> Tensor:
    """Two int32 words, the low one first, of themselves or of one integer."""
    if isinstance(seed, list):  # filled in, not copied from the host: a CUDA graph can record it
        return torch.stack([torch.full((), word, dtype=torch.int32, device=like.device) for word in seed])
    if not seed.dim():
        seed = seed.to(torch.int64)
        seed = torch.stack([seed, seed >> 32])
    return seed.to(torch.int32)


def drawn_dropout(share: float, like: Tensor) -> dict[str, Any]:
    """Options of attention that drop a share of the weights, by a seed from torch's own generator."""
    if not share:
        return {}
    return {"dropout": share, "dropout_seed": torch.randint(2**62, (), device=like.device)}


def spread(array: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
    """In that dtype, and repeated to that shape."""
    return array.to(getattr(torch, dtype)).expand(shape)


def as_plane(array: Any, like: Tensor) -> Tensor:
    """An array beside the scores, as kernels read it: bool, int32, or a float no wider than q."""
    array = in_host(array)
    if array.dtype == torch.float64 and like.dtype != torch.float64:
        return array.to(torch.float32)
    return array if array.dtype.is_floating_point or array.dtype == torch.bool else array.to(torch.int32)


def index_grid(size: Any, axis: int, like: Tensor) -> Tensor:
    """0, 1, ... along one of four axes."""
    return torch.arange(size, dtype=torch.int32, device=like.device).reshape([-1 if a == axis else 1 for a in range(4)])


def functions() -> dict[str, Any]:
    """What the ops of an expression mean for tensors."""
    return functions_of_torch()


def look_up(held: Any, indices: list[Any], like: Tensor) -> Tensor:
    """The elements at those indices, which broadcast to four dimensions; an index past an end takes the end."""
    held = in_host(held).to(like.device)
    clipped = tuple(
        index.clamp(0, size - 1) if isinstance(index, Tensor) else min(max(index, 0), size - 1)
        for index, size in zip(indices, held.shape, strict=True)
    )
    found = held[clipped] if clipped else held
    return as_plane(found if found.dim() == 4 else found.reshape(1, 1, 1, 1), like)


def obstacles(implementation: str, target: Target, arrays: tuple[Any, ...]) -> tuple[str, ...]:
    """Why that implementation cannot take these tensors for that target."""
    device = arrays[0].device.type
    if implementation in ("numpy", "library"):
        return ()
    if any(type(array).__name__ == "DTensor" for array in arrays):
        return ("the tensors are DTensors: call it inside `with crosstile.sharded(mesh)`",)
    if not target.interpreted and device == "cpu":
        return (
            f"the tensors are on this CPU and cannot run on {target.name}: leave crosstile.target, "
            "or move them to the chip; `crosstile compile` compiles without one",
        )
    if implementation == "pallas" and target.is_tpu and not installed("torch_tpu"):
        return ("torch_tpu is not installed: pip install torch_tpu",)
    return ()


def canonical(op: Op, spec: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays in canonical form."""
    return tuple(calls.CANONICAL[op.name](torch, spec, arrays)[1])


def call(
    op: Op, spec: Any, arrays: tuple[Any, ...], implementation: str, config: Any, target: Target
) -> tuple[Any, ...]:
    """The op's outputs, recorded by autograd."""
    _check_devices(op, arrays)
    spec, arrays, shape = calls.CANONICAL[op.name](torch, spec, arrays)
    if needs_grad(arrays):
        spec = op.module("spec").saving(spec)
    if torch._C._are_functorch_transforms_active():
        arrays = _one_leading_size(arrays)
    operator = _OPERATORS[op.name]
    options = [_encoded(getattr(spec, name), kind) for name, kind in operator.options.items()]
    tiles = None if config is None else flatten_config(config)
    outputs = operator(*arrays, *options, implementation, target.name, tiles)
    return (outputs[0].reshape(shape), *outputs[1:]) if shape else outputs


def _one_leading_size(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays whose batch of one stands for every item, repeated: `vmap` lets the mapped dimension join the batch."""
    batch = arrays[0].shape[0]
    return tuple(
        array.expand(batch, *array.shape[1:]) if array is not None and array.shape[0] == 1 else array
        for array in arrays
    )


def _check_devices(op: Op, arrays: tuple[Any, ...]) -> None:
    device, known_to_host = arrays[0].device, getattr(op.module("spec"), "KNOWN_TO_HOST", ())
    for name, array in zip(op.inputs[1:], arrays[1:], strict=True):
        if array is not None and array.device != device and not (array.device.type == "cpu" and name in known_to_host):
            raise ValueError(f"{name}: is on {array.device}; it must be on {device}, as {op.inputs[0]} is: use .to()")


@dataclass(frozen=True)
class _Recorded:
    """A torch operator with its derivative, twice: `torch.func.grad` cannot see through a `torch.library` op.

    Attributes:
        operator: with the derivative registered, for autograd, compile and export.
        function: the same as an autograd.Function, for the transforms of torch.func.
        options: the spec's options and their types, in the order of the schema.
    """

    operator: CustomOpDef
    function: type[torch.autograd.Function]
    options: dict[str, str]

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return self.function.apply(*args)
        return self.operator(*args)


def _record(
    op: Op, operator: CustomOpDef, fake: Callable[..., Any], remember: Any, differentiate: Any, options: dict[str, str]
) -> _Recorded:
    operator.register_fake(fake)
    operator.register_autograd(differentiate, setup_context=remember)
    operator.register_vmap(lambda info, in_dims, *args: _fold(op, operator, info.batch_size, in_dims, args))
    methods = {"forward": operator, "setup_context": remember, "backward": differentiate}
    members = {"generate_vmap_rule": True} | {name: staticmethod(method) for name, method in methods.items()}
    return _Recorded(operator, type(operator._name, (torch.autograd.Function,), members), options)


def _register(op: Op) -> _Recorded:
    """Define `crosstile::<op>` and `crosstile::<op>_backward`, with fakes, autograd and vmap."""
    module = op.module("spec")
    options = _option_types(module)
    inputs, outputs, gradients = op.inputs, op.outputs, plans.gradient_names(op.outputs)
    tail = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in options.items()]
    tail += ["str implementation", "str target", "int[]? config"]
    leading = [f"Tensor{'?' if name in module.OPTIONAL else ''} {name}" for name in inputs]

    def schema(arrays: list[str], results: int) -> str:
        return f"({', '.join(arrays + tail)}) -> ({', '.join(['Tensor'] * results)})"

    def forward(*args: Any) -> tuple[Tensor, ...]:
        operands = args[: len(inputs)]
        return _execute(op, "forward", operands, operands, args[len(inputs) :])

    def backward(*args: Any) -> tuple[Tensor, ...]:
        operands = group(args)
        return _execute(op, "backward", operands, operands[0], args[width:])

    def group(args: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        first, second = len(inputs), len(inputs) + len(outputs)
        return tuple(args[:first]), tuple(args[first:second]), tuple(args[second:width])

    def fake_forward(*args: Any) -> tuple[Tensor, ...]:
        arrays = args[: len(inputs)]
        spec = _spec(op, arrays, args[len(inputs) :])
        shapes = module.output_shapes(spec, *arrays)
        return tuple(
            arrays[0].new_empty(0) if shape is None else arrays[0].new_empty(shape[0], dtype=getattr(torch, shape[1]))
            for shape in shapes
        )

    def fake_backward(*args: Any) -> tuple[Tensor, ...]:
        arrays = args[: len(inputs)]
        present = plans.present_gradients(op, _spec(op, arrays, args[width:]), arrays)
        return tuple(
            x.new_empty(x.shape) if there else arrays[0].new_empty(0) for x, there in zip(arrays, present, strict=True)
        )

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: len(op.inputs)], *output)
        ctx.options = inputs[len(op.inputs) :]

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        arrays = ctx.saved_tensors
        results = backward_op(*arrays, *gradients, *ctx.options)
        present = plans.present_gradients(op, _spec(op, arrays, ctx.options), arrays[: len(inputs)])
        found = [dx if there else None for dx, there in zip(results, present, strict=True)]
        return (*found, *[None] * len(ctx.options))

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise UnsupportedError(
            f"{op.name}: the backward kernel has no derivative of its own (double backward): "
            "use implementation='library' where second derivatives are needed"
        )

    width = len(inputs) + len(outputs) + len(gradients)
    saved = [f"Tensor {name}" for name in outputs] + [f"Tensor? {name}" for name in gradients]
    backward_op = _record(
        op,
        custom_op(
            f"crosstile::{op.name}_backward", backward, mutates_args=(), schema=schema(leading + saved, len(inputs))
        ),
        fake_backward,
        lambda ctx, inputs, output: None,
        refuse,
        options,
    )
    return _record(
        op,
        custom_op(f"crosstile::{op.name}", forward, mutates_args=(), schema=schema(leading, len(outputs))),
        fake_forward,
        remember,
        differentiate,
        options,
    )


def _fold(
    op: Op, operator: CustomOpDef, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """vmap: every array has a leading batch, so the mapped dimension joins it."""
    module = op.module("spec")
    shared = getattr(module, "SHARED", ())
    for name, array, dim in zip(op.inputs, args, in_dims, strict=False):
        if name in module.WITHOUT_BATCH and array is not None and not (name in shared and dim is None):
            raise UnsupportedError(
                f"{name}: {op.name} cannot be mapped by torch.vmap over it: loop, or pack all into one"
            )

    def fold(name: str, array: Any, dim: int | None) -> Any:
        if not isinstance(array, Tensor) or (not array.numel() and array.dim() == 1) or name in shared:
            return array
        mapped = array.expand(size, *array.shape) if dim is None else array.movedim(dim, 0)
        return mapped.reshape(size * mapped.shape[1], *mapped.shape[2:])

    names = (*op.inputs, *[""] * (len(args) - len(op.inputs)))
    results = operator(*(fold(*each) for each in zip(names, args, in_dims, strict=True)))
    unfolded = tuple(
        result.reshape(size, result.shape[0] // size, *result.shape[1:]) if result.dim() > 1 else result
        for result in results
    )
    return unfolded, tuple(0 if result.dim() > 1 else None for result in results)


def _spec(op: Op, inputs: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    module = op.module("spec")
    facts = module.facts(str(inputs[0].dtype).removeprefix("torch."), *inputs[: len(op.inputs)])
    kinds = _option_types(module).items()
    return module.SPEC(**facts, **{name: _decoded(x, kind) for (name, kind), x in zip(kinds, options, strict=False)})


def _option_types(module: Any) -> dict[str, str]:
    """The spec's fields that are options of the call, and their types as the class writes them."""
    return {field.name: str(field.type) for field in fields(module.SPEC) if field.name not in module.FACTS}


def _encoded(value: Any, kind: str) -> Any:
    """An option as a torch op takes it."""
    if value is None or not kind.startswith(("tuple", "Expression")):
        return value
    return list(value) if kind.startswith("tuple") else text_of(value)


def _decoded(value: Any, kind: str) -> Any:
    """The inverse of `_encoded`."""
    if value is None or not kind.startswith(("tuple", "Expression")):
        return value
    return tuple(value) if kind.startswith("tuple") else parse(value)


def _execute(
    op: Op, direction: str, operands: tuple[Any, ...], inputs: tuple[Any, ...], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Run one direction; absent results are empty tensors."""
    spec = _spec(op, inputs, options)
    implementation, chip, tiles = options[-3:]
    target = get_target(chip)
    config_class = op.module("tiles").CONFIG
    config = op.tiles(spec, target, inputs)[0] if tiles is None else unflatten_config(config_class, tiles)
    if direction == "backward":
        operands = _present(operands)
    like = inputs[0]
    if implementation == "numpy" or target.interpreted:
        arrays = plans.map_arrays(to_numpy, operands)
        results = on_host.execute(op, direction, spec, arrays, implementation, config, target)
        tensors = [None if result is None else from_numpy(result).to(like.device) for result in results]
        return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)
    known = plans.map_arrays(lambda tensor: to_numpy(tensor) if on_cpu(tensor) else tensor, operands)
    operands = plans.map_arrays(
        lambda array: _on_device(array, like.device) if isinstance(array, np.ndarray) else array,
        plans.completed(op, implementation, spec, config, target, known),
    )
    if implementation == "triton":
        plan = plans.make(op, direction, spec, config, plans.map_arrays(describe, operands))
        tensors = list(plans.collect(op, direction, plan, _launch(plan, plans.by_name(op, operands), like)))
    else:
        from crosstile import torch_tpu

        tensors = torch_tpu.execute(op, direction, spec, operands, config, target)
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _present(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The backward's operands with empty outputs as None, and a missing gradient of the result as zeros."""
    inputs, outputs, gradients = operands
    outputs = (outputs[0], *(None if output.dim() == 1 and not output.numel() else output for output in outputs[1:]))
    first = torch.zeros_like(outputs[0]) if gradients[0] is None else gradients[0]
    return inputs, outputs, (first, *gradients[1:])


def _launch(plan: Plan, tensors: dict[str, Tensor], like: Tensor) -> list[Tensor]:
    memory = dict(tensors)
    for name, array in {**plan.outputs, **plan.scratch}.items():
        memory[name] = torch.empty(array.shape, dtype=getattr(torch, array.dtype), device=like.device)
    with torch.cuda.device(like.device):
        for launch in plan.launches:
            if all(launch.grid):
                names = (*launch.inputs, *launch.outputs)
                _launcher.run(launch, [memory[name] if name else None for name in names])
    return [memory[name] for name in plan.outputs]


def _compile_and_launch(launch: Launch, tensors: list[Tensor | None]) -> None:
    if launch.without_memory:  # it asks for memory while it runs, which torch gives, in this call alone
        copy_context().run(_launch_with_memory, launch, tensors)
    else:
        _launch_by_triton(launch, tensors)


def _launch_with_memory(launch: Launch, tensors: list[Tensor | None]) -> None:
    import triton

    like = next(tensor for tensor in tensors if tensor is not None)
    triton.set_allocator(lambda size, alignment, stream: like.new_empty(size, dtype=torch.int8))
    _launch_by_triton(launch, tensors)


def _launch_by_triton(launch: Launch, tensors: list[Tensor | None]) -> None:
    launch.kernel[launch.grid](
        *tensors,
        **launch.numbers,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch.options,
    )


class _Launcher:
    """How a kernel is launched, on every thread: autograd runs a backward on one of its own."""

    run: Callable[[Launch, list[Tensor | None]], None] = staticmethod(_compile_and_launch)


_launcher = _Launcher()


@contextmanager
def launching(run: Callable[[Launch, list[Tensor | None]], None]) -> Iterator[None]:
    """Inside, every GPU kernel is launched by `run(launch, tensors)`, such as from programs compiled elsewhere.

    tensors are those of the launch's inputs and outputs, None for an absent one.
    """
    before, _launcher.run = _launcher.run, run
    try:
        yield
    finally:
        _launcher.run = before


def describe(tensor: Tensor) -> Array:
    """What a launch plan knows of a tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Array(tuple(tensor.shape), dtype, tensor.stride(), tensor.data_ptr() % 16 == 0)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's values in the host's memory, without a copy where it can; narrow floats as ml_dtypes has them."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy, made once where it is small: a CUDA graph can record no copy from the host's memory."""
    if array.nbytes > _LARGE:
        return from_numpy(array).to(device)
    copy = _copied(HostArray(array), device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _recorded[id(copy)] = copy
    return copy


@lru_cache(maxsize=64)
def _copied(held: HostArray, device: torch.device) -> Tensor:
    return from_numpy(held.array).to(device)


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of the array's values, row-major; it may share memory with a writable array."""
    array = np.ascontiguousarray(array)
    array = array if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def flatten_config(config: Any) -> list[int]:
    """A configuration's numbers in order, as a torch op can take them."""
    values = [getattr(config, field.name) for field in fields(config)]
    return [number for value in values for number in (flatten_config(value) if is_dataclass(value) else [value])]


def unflatten_config(config_class: Any, numbers: Sequence[int]) -> Any:
    """The inverse of `flatten_config`."""

    def build(kind: Any) -> Any:
        hints = get_type_hints(kind)
        return kind(*(build(hints[f.name]) if is_dataclass(hints[f.name]) else next(rest) for f in fields(kind)))

    rest = iter(numbers)
    return build(config_class)


_OPERATORS = {op.name: _register(op) for op in OPS.values()}
