"""JAX arrays: every implementation as a function that jit, grad, vmap and export understand.

`call` wraps a kernel's forward and backward in one `custom_vjp`. Pallas kernels are JAX functions as they are. Triton
kernels go through jax-triton on a GPU, and through a host callback into the interpreter on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from crosstile import calls, plans
from crosstile import numpy as on_host
from crosstile.dispatch import Op, installed
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.kernels.tiles.expressions import functions_of
from crosstile.kernels.tiles.launch import Array, Launch, Plan, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, Target, nearest_cuda

_TPU_KINDS = {  # jax's device_kind
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
    "TPU v7x": "v7x",
}
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


KNOWS_NEED = False  # whether `needs_grad` is sure, and not only possible


def on_cpu(array: Any) -> bool:
    """Whether the array, or a traced computation on it, runs on this CPU."""
    return _device(array).platform == "cpu"


def target_of(array: Any) -> Target:
    """The kind of chip that the array is on."""
    device = _device(array)
    if device.platform == "tpu":
        return TARGETS[_TPU_KINDS[device.device_kind]]
    if device.platform in ("cuda", "gpu"):
        major, minor = device.compute_capability.split(".")
        return nearest_cuda(int(major), int(minor))
    if device.platform == "rocm":
        return TARGETS[device.compute_capability.split(":")[0]]
    return INTERPRET


def _device(array: Any) -> Any:
    if isinstance(array, jax.core.Tracer):
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        return default if hasattr(default, "platform") else jax.devices(default)[0]
    return next(iter(array.devices()))


def needs_grad(arrays: tuple[Any, ...]) -> bool:
    """Always, since whoever transforms the call may ask for it later."""
    return True


def wants_gradient(array: Any) -> bool:
    """Whether whoever transforms the call may ask for that array's gradient."""
    return isinstance(array, jax.Array) and bool(jnp.issubdtype(array.dtype, jnp.floating))


def host(like: Any) -> tuple[Any, Any]:
    """The module for arrays that the host knows, and an array like those that it makes."""
    return on_host, np.zeros((), like.dtype)


def in_host(array: Any) -> Any:
    """An array of NumPy's as the host keeps it: as it is."""
    return array


def own(arrays: tuple[Any, ...], like: Any) -> tuple[Any, ...]:
    """The arrays, those of NumPy as JAX's."""
    return tuple(jnp.asarray(array) if isinstance(array, np.ndarray) else array for array in arrays)


def as_int32(array: Any) -> Any:
    """Ids, lengths and offsets as kernels read them."""
    return jnp.asarray(array).astype(jnp.int32)


def largest(array: Any) -> Any:
    """The largest of each row of numbers that are not negative; 0 of an empty one."""
    return array.max(axis=-1, initial=0.0)


def words(seed: Any, like: Any) -> Any:
    """Two int32 words, the low one first, of themselves or of one integer."""
    seed = jnp.asarray(seed)
    if seed.ndim:
        return seed.astype(jnp.int32)
    high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.zeros_like(seed)
    return jnp.stack([seed, high]).astype(jnp.int32)


def spread(array: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """In that dtype, and repeated to that shape."""
    return jnp.broadcast_to(array.astype(dtype), shape)


def as_plane(array: Any, like: Any) -> Any:
    """An array beside the scores, as kernels read it: bool, int32, or a float no wider than q."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        return as_int32(array)
    return array.astype(jnp.float32) if array.dtype == jnp.float64 and like.dtype != jnp.float64 else jnp.asarray(array)


def index_grid(size: Any, axis: int, like: Any) -> Any:
    """0, 1, ... along one of four axes."""
    return jnp.arange(size, dtype=jnp.int32).reshape([-1 if at == axis else 1 for at in range(4)])


def functions() -> dict[str, Any]:
    """What the ops of an expression mean for JAX arrays."""
    return functions_of(jnp)


def look_up(held: Any, indices: list[Any], like: Any) -> Any:
    """The elements at those indices, which broadcast to four dimensions; an index past an end takes the end."""
    clipped = tuple(jnp.clip(index, 0, size - 1) for index, size in zip(indices, held.shape, strict=True))
    found = jnp.asarray(held)[clipped]
    return as_plane(found if found.ndim == 4 else found.reshape(1, 1, 1, 1), like)


def obstacles(implementation: str, target: Target, arrays: tuple[Any, ...]) -> tuple[str, ...]:
    """Why that implementation cannot take JAX arrays for that target."""
    if implementation != "triton" or target.interpreted or target.is_tpu:
        return ()
    if not installed("jax_triton"):
        return ("jax-triton is not installed: pip install 'crosstile[cuda]'",)
    if not any(map(installed, _GPU_PLUGINS)):
        return (
            "jax-triton needs a GPU plugin of jax: pip install 'jax[cuda12]' on a machine with a GPU, "
            f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} to compile on one without",
        )
    if target.platform == "rocm" and jax.default_backend() != "gpu":
        return ("jax-triton asks the AMD GPU itself for its name, so it lowers for ROCm only where there is one",)
    return ()


def canonical(op: Op, spec: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is known of the arrays in canonical form, without computing it."""

    def bring(*arrays: Any) -> tuple[Any, ...]:
        return tuple(calls.CANONICAL[op.name](jnp, spec, arrays)[1])

    return tuple(jax.eval_shape(bring, *arrays))


def call(
    op: Op, spec: Any, arrays: tuple[Any, ...], implementation: str, config: Any, target: Target
) -> tuple[Any, ...]:
    """The op's outputs, differentiable."""
    spec, arrays, shape = calls.CANONICAL[op.name](jnp, spec, arrays)
    config = config or op.tiles(spec, target, arrays if _have_static_sizes(arrays) else None)[0]
    arrays = own(plans.completed(op, implementation, spec, config, target, arrays), arrays[0])
    outputs = _differentiable(op, spec, implementation, config, target)(*arrays)
    return (outputs[0].reshape(shape), *outputs[1:]) if shape else outputs


def _have_static_sizes(arrays: tuple[Any, ...]) -> bool:
    """Whether every size is a number, and none a symbol of what is exported for many sizes."""
    return all(type(size) is int for array in arrays if array is not None for size in array.shape)


@lru_cache(maxsize=1024)
def _differentiable(op: Op, spec: Any, implementation: str, config: Any, target: Target) -> Callable[..., Any]:
    run = _once_differentiable(op, implementation, config, target)
    saving = op.module("spec").saving(spec)
    named = partial(checkpoint_name, name=f"crosstile.{op.name}")  # by which `jax.checkpoint` can keep it

    @jax.custom_vjp
    def function(*inputs: Any) -> tuple[Any, ...]:
        return run("forward", spec, inputs)

    def forward(*inputs: Any) -> tuple[Any, Any]:
        outputs = jax.tree.map(named, run("forward", saving, inputs))
        return outputs if saving == spec else (*outputs[:-1], None), (inputs, outputs)

    def backward(saved: Any, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs, outputs = saved
        return run("backward", saving, (inputs, outputs, gradients))

    function.defvjp(forward, backward)
    return function


def _once_differentiable(op: Op, implementation: str, config: Any, target: Target) -> Callable[..., Any]:
    """Run a kernel; a derivative of it, beyond the one that `custom_vjp` gives, is refused clearly."""

    @partial(jax.custom_jvp, nondiff_argnums=(0, 1))
    def run(direction: str, spec: Any, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        return _run(op, direction, spec, operands, implementation=implementation, config=config, target=target)

    @run.defjvp
    def refuse(direction: str, spec: Any, primals: Any, tangents: Any) -> Any:
        raise UnsupportedError(
            f"{op.name}: the backward kernel has no derivative of its own (double backward): "
            "use implementation='library' where second derivatives are needed"
        )

    return run


def _run(
    op: Op, direction: str, spec: Any, operands: tuple[Any, ...], *, implementation: str, config: Any, target: Target
) -> tuple[Any, ...]:
    if implementation == "pallas":
        results = getattr(op.module("pallas"), direction)(spec, config, target, *operands)
        return tuple(results)
    if implementation == "triton" and not target.interpreted:
        return _run_on_gpu(op, direction, spec, operands, config, target)
    return _run_in_callback(op, direction, spec, operands, implementation, config, target)


def _run_in_callback(
    op: Op, direction: str, spec: Any, operands: tuple[Any, ...], implementation: str, config: Any, target: Target
) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(operands)
    shapes = _result_shapes(op, direction, spec, operands)
    present = [shape is not None for shape in shapes]

    def call_back(*arrays: Any) -> tuple[np.ndarray, ...]:
        restored = jax.tree.unflatten(tree, [np.asarray(array) for array in arrays])
        results = on_host.execute(op, direction, spec, restored, implementation, config, target)
        return tuple(
            np.ascontiguousarray(result, shape.dtype)
            for result, shape in zip(results, shapes, strict=True)
            if shape is not None and result is not None
        )

    wanted = tuple(shape for shape in shapes if shape is not None)
    results = iter(jax.pure_callback(call_back, wanted, *leaves, vmap_method="sequential"))
    return tuple(next(results) if there else None for there in present)


def _result_shapes(op: Op, direction: str, spec: Any, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    if direction == "backward":
        present = plans.present_gradients(op, spec, operands[0])
        return tuple(
            jax.ShapeDtypeStruct(array.shape, array.dtype) if there else None
            for array, there in zip(operands[0], present, strict=True)
        )
    shapes = op.module("spec").output_shapes(spec, *operands)
    return tuple(None if shape is None else jax.ShapeDtypeStruct(shape[0], jnp.dtype(shape[1])) for shape in shapes)


def _run_on_gpu(
    op: Op, direction: str, spec: Any, operands: tuple[Any, ...], config: Any, target: Target
) -> tuple[Any, ...]:
    plan = plans.make(op, direction, spec, config, plans.map_arrays(_describe, operands))
    return plans.collect(op, direction, plan, _launch(plan, plans.by_name(op, operands), target))


def _launch(plan: Plan, arrays: dict[str, Any], target: Target) -> tuple[Any, ...]:
    """Each launch as a jax-triton call. All numbers are constants here, as JAX's shapes are."""
    memory = dict(arrays)
    described = {**plan.outputs, **plan.scratch}
    for launch in plan.launches:
        if not all(launch.grid):  # nothing to compute: its outputs have no elements
            memory |= {name: jnp.zeros(described[name].shape, described[name].dtype) for name in launch.outputs}
            continue
        for name in set(launch.inputs).intersection(described).difference(memory):  # a first part of it is written
            memory[name] = jnp.zeros(described[name].shape, described[name].dtype)
        results = _call(launch, described, target)({name: memory[name] for name in launch.inputs if name})
        memory.update(zip(launch.outputs, results, strict=True))
    return tuple(memory[name] for name in plan.outputs)


def _call(launch: Launch, described: dict[str, Array], target: Target) -> Callable[[dict[str, Any]], Any]:
    """A launch as a function of its arrays; under `vmap`, which jax-triton has not, one call after another."""
    jax_triton = _jax_triton()
    present = [name for name in launch.inputs if name]

    def call(arrays: dict[str, Any]) -> Any:
        return jax_triton.triton_call(
            *(arrays[name] if name else 1 for name in launch.inputs),  # the kernels never read an absent array
            kernel=launch.kernel,
            out_shape=[_struct(described[name]) for name in launch.outputs],
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            compute_capability=target.capability or None,
            input_output_aliases={
                present.index(name): number for number, name in enumerate(launch.outputs) if name in present
            },
            **launch.numbers,
            **{**launch.constants, **launch.without_memory},
        )

    return jax.custom_batching.sequential_vmap(call)


def _jax_triton() -> Any:
    """jax-triton, whose import switches off Triton's cache of compiled kernels, without which torch cannot launch."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if folder is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = folder
    return jax_triton


def _describe(array: Any) -> Array:
    return contiguous(array.shape, array.dtype.name)


def _struct(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype))


def execute_on_host(
    op: Op, direction: str, spec: Any, operands: tuple[Any, ...], config: Any, target: Target
) -> tuple[Any, ...]:
    """A Pallas kernel on NumPy arrays, in its interpreter: what NumPy and torch callers on a CPU get."""
    arrays = jax.tree.map(jnp.asarray, operands)
    results = _jitted(op, direction, spec, config, target)(arrays)
    return tuple(None if result is None else np.asarray(result) for result in results)


@lru_cache(maxsize=1024)
def _jitted(op: Op, direction: str, spec: Any, config: Any, target: Target) -> Callable[..., Any]:
    function = getattr(op.module("pallas"), direction)
    return jax.jit(lambda operands: function(spec, config, target, *operands))
