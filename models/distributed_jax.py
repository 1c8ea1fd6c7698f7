"""The model on many devices in JAX: where its arrays lie, its loss, and a training step that is one program of all.

XLA partitions the program for the mesh (`jax.jit` with a `NamedSharding` for each array); the ops that are kernels run
on each device's part (`crosstile.sharded`). The model is `transformer`, unchanged: `sharding` says what splits which
parameter, and a hook around each layer says where its result lies.

    initialize()                                                  # where there is more than one process
    parallel = Parallel(fsdp=4, tensor=2)
    mesh = make_mesh(parallel)
    params = place(stack(params, config), config, parallel, mesh)
    state = jax.jit(optimizer.init)(params)
    step = train_step(config, parallel, mesh, optimizer)
    params, state, loss = step(params, state, tokens)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import crosstile
from crosstile import dispatch
from crosstile.sharding import balanced_order
from crosstile.sharding_experts import WEIGHTS
from crosstile.sharding_experts import experts as spread_experts

from . import transformer
from .arrays import Array, Tree
from .config import Config, Experts, Layer
from .learners import in_precision
from .mlp import choose, of_experts, shared
from .pipeline_jax import AXIS, Pipeline
from .remat import remat as recomputed
from .sharding import AXES, RULES, Parallel, parameter_splits
from .stacking import Run, period
from .targets import IGNORED, within_documents

STREAM = (RULES["batch"], ("context", "tensor"))  # of `[batch, seq, hidden]` between and within layers
_COORDINATOR = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Make this process one of many: `jax.distributed.initialize`, before anything else asks JAX for its devices.

    Under Slurm, Open MPI and on TPU pods (Cloud, GKE) JAX learns from its surroundings who the others are. Elsewhere
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.

    Raises:
        ValueError: some of the three are set and others are not.
    """
    given = [os.environ.get(name) for name in _COORDINATOR]
    if not any(given):
        jax.distributed.initialize()
        return
    if not all(given):
        missing = ", ".join(name for name, value in zip(_COORDINATOR, given, strict=True) if not value)
        raise ValueError(f"{missing}: not set, while others of {', '.join(_COORDINATOR)} are; set all three or none")
    address, count, process = given
    jax.distributed.initialize(address, int(count or 1), int(process or 0))


def make_mesh(parallel: Parallel, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices in an array with the axes of `sharding.AXES`, tensor the innermost; None takes all there are.

    Raises:
        ValueError: more or fewer devices than `parallel` has.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != parallel.devices:
        raise ValueError(
            f"parallel: it has {parallel.devices} devices, and there are {len(devices)}: "
            "change stage, data, fsdp, expert, context or tensor, or pass as many devices"
        )
    sizes = tuple(parallel.sizes.values())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shardings(config: Config, parallel: Parallel, mesh: Mesh, stacked: bool = True) -> Tree:
    """Where each parameter lies, a `NamedSharding` in the place of each; of layers that are stacked, if they repeat."""
    splits = parameter_splits(config, parallel)
    repeats = stacked and period(config) < config.num_layers
    layers = splits["layers"][: period(config)] if repeats else splits["layers"]

    def place(split: Any, lead: tuple[Any, ...] = ()) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*lead, *(axes or None for axes in split)))

    lead = (AXIS if parallel.stage > 1 else None,) * repeats
    placed = [{name: place(split, lead) for name, split in layer.items()} for layer in layers]
    return {**{name: place(split) for name, split in splits.items() if name != "layers"}, "layers": placed}


def place(params: Tree, config: Config, parallel: Parallel, mesh: Mesh) -> Tree:
    """The parameters on the devices; in every process the same whole arrays are given."""
    stacked = len(params["layers"]) != config.num_layers
    return jax.tree.map(_put, params, shardings(config, parallel, mesh, stacked))


def _put(array: Any, sharding: NamedSharding) -> Any:
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def state_shardings(state: Tree, params: Tree, mesh: Mesh) -> Tree:
    """Where an optimizer's state lies: an array that is kept for a parameter lies as it does, others are whole.

    Args:
        state: of the optimizer, arrays or shapes.
        params: the `shardings` of the parameters.
        mesh: for what is whole.
    """
    places = dict(jax.tree_util.tree_leaves_with_path(params))

    def of(path: Any, leaf: Any) -> NamedSharding:
        found = next((sharding for ending, sharding in places.items() if path[-len(ending) :] == ending), None)
        fits = found is not None and len(found.spec) <= leaf.ndim
        return found if fits and found is not None else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, state)


def loss(
    params: Tree,
    tokens: Array,
    config: Config,
    parallel: Parallel,
    mesh: Mesh,
    *,
    segments: Array | None = None,
    z_loss: float = 0.0,
    remat: str = "none",
    balanced: bool | None = None,
) -> Array:
    """`transformer.loss` on all devices of the mesh, to be called under `jax.jit`: the same number and gradients.

    Args:
        params: the tree, its arrays as `shardings` says; its layers may be stacked.
        tokens: int `[batch, seq + 1]`. Rows and tokens are added, which nobody counts, where devices do not divide it.
        config: of the model.
        parallel: what `mesh` was made of.
        mesh: from `make_mesh`, or of a topology whose devices are not here.
        segments: as `transformer.loss` has them.
        z_loss: the same.
        remat: what a layer computes again in its backward: see `models.remat`.
        balanced: whether a device has an early and a late piece of a sequence that is split, so that causality leaves
            all as much to do. None: where the form is not "ulysses".
    """
    if balanced is None:
        balanced = parallel.context_form != "ulysses"
    balanced = balanced and parallel.context > 1
    targets, inputs = jnp.asarray(tokens[:, 1:], jnp.int32), jnp.asarray(tokens[:, :-1], jnp.int32)
    if segments is not None:
        targets, segments = within_documents(targets, segments), jnp.asarray(segments[:, :-1])
    batch, length = inputs.shape
    outside, features = RULES["batch outside layers"], RULES["embed outside layers"]
    columns = parallel.context * (2 if balanced else 1)
    whole = length + -length % columns
    order = np.array(balanced_order(whole, parallel.context)) if balanced else np.arange(whole)

    def spread(array: Array, fill: int, batch_axes: tuple[str, ...] = RULES["batch"]) -> Array:
        array = jnp.pad(array, ((0, -batch % parallel.batch_parts), (0, whole - length)), constant_values=fill)
        return _constrained(array[:, order] if balanced else array, mesh, (batch_axes, ("context",)))

    options: dict[str, Any] = {"context_form": parallel.context_form, "balanced": balanced}
    counted = partial(_counted, kept=(batch, np.argsort(order)[:length]))
    pipelined = parallel.stage > 1
    layer = partial(_run, mesh=mesh, options=options, counted=None if pipelined else counted)
    run: Run = recomputed(remat, "jax", layer)
    if pipelined:
        inside, around = (
            partial(_constrained, mesh=mesh, splits=splits) for splits in (((AXIS,), *STREAM), (outside, STREAM[1]))
        )
        run = Pipeline(run, parallel.stage, parallel.microbatch_count, inside, around, counted)
    with crosstile.sharded(mesh, batch=outside, features=features, **options):
        return transformer.loss_of_targets(
            params,
            spread(inputs, 0),
            spread(targets, IGNORED, outside),
            config,
            positions=jnp.asarray(order, jnp.int32),
            segments=None if segments is None else spread(segments, 0),
            z_loss=z_loss,
            run=run,
        )


def _run(
    weights: Tree,
    x: Array,
    layer: Layer,
    config: Config,
    positions: Array,
    segments: Array | None,
    long: bool,
    *,
    mesh: Mesh,
    options: dict[str, Any],
    counted: Callable[[Array], Array] | None,
) -> tuple[Array, Array | None]:
    """A layer, whose stream lies in pieces, and the logits of its router, those that count if it is said which."""
    x = constrain(x, mesh)
    with crosstile.sharded(mesh, stages=AXIS, **options):
        x, router = transformer.block(weights, x, layer, config, positions, segments, long, mixture)
    if router is not None and counted:
        router = counted(router.reshape(*x.shape[:2], -1)).reshape(-1, router.shape[-1])
    return constrain(x, mesh), router


def _counted(router: Array, *, kept: tuple[int, np.ndarray]) -> Array:
    """Of logits `[..., rows, seq, experts]` those of no row and no token that was added."""
    batch, columns = kept
    return router[..., :batch, :, :][..., columns, :]


def constrain(x: Array, mesh: Mesh) -> Array:
    """The stream `[batch, seq, hidden]` in pieces of rows and sequences, these again over the devices of tensor.

    So norms and sums run on a piece each, and a product's sum over tensor is scattered where it was reduced and copied
    (Korthikanti et al., arXiv:2205.05198).
    """
    return _constrained(x, mesh, STREAM)


def _constrained(array: Array, mesh: Mesh, splits: tuple[tuple[str, ...], ...]) -> Array:
    """The array, of whose first dimensions each is split by as many of its axes as divide it."""
    found = []
    for axes, size in zip(splits, array.shape, strict=False):
        chosen: tuple[str, ...] = ()
        for axis in axes:
            if size % prod(mesh.shape[one] for one in (*chosen, axis)) == 0:
                chosen = (*chosen, axis)
        found.append(chosen or None)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*found)))


def mixture(weights: Tree, h: Array, config: Config, experts: Experts) -> tuple[Array, Array]:
    """`mlp.mixture` in a `sharded` block: each device has some of the experts, and tokens come to them."""
    logits = crosstile.matmul(h, weights["router"], bias=weights.get("router_bias"), out_dtype="float32")
    out = spread_experts(
        dispatch.spreading(),
        lambda logits, correction: choose(logits, correction, experts),
        lambda own, rows, sizes, owners: of_experts(own, rows, sizes, owners, config, experts),
        h,
        logits,
        {name: weights[name] for name in WEIGHTS if name in weights},
        weights.get("correction_bias"),
    )
    if experts.shared_size:
        out = out + shared(weights, h, config, experts)
    return out, logits.reshape(-1, experts.count)


def train_step(
    config: Config,
    parallel: Parallel,
    mesh: Mesh,
    optimizer: Any,
    *,
    precision: str = "float32",
    z_loss: float = 0.0,
    remat: str = "none",
    balanced: bool | None = None,
    stacked: bool = True,
) -> Callable[..., tuple[Tree, Tree, Array]]:
    """A jitted `(params, state, tokens, segments=None) -> (params, state, loss)`; it overwrites the first two.

    Args:
        config: of the model.
        parallel: what `mesh` was made of.
        mesh: from `make_mesh`.
        optimizer: optax's; its state lies as the parameters do.
        precision: to compute in; parameters, gradients and state keep their dtype.
        z_loss, remat, balanced: see `loss`.
        stacked: whether layers that repeat are stacked.
    """

    def update(params: Tree, state: Any, tokens: Array, segments: Array | None = None) -> tuple[Tree, Any, Array]:
        def of(params: Tree) -> Array:
            narrow = in_precision(params, precision)
            options: dict[str, Any] = {"z_loss": z_loss, "remat": remat, "balanced": balanced}
            return loss(narrow, tokens, config, parallel, mesh, segments=segments, **options)

        value, gradients = jax.value_and_grad(of)(params)
        changes, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda array, change: array + change.astype(array.dtype), params, changes)
        places = shardings(config, parallel, mesh, stacked)
        params = jax.lax.with_sharding_constraint(params, places)
        return params, jax.lax.with_sharding_constraint(state, state_shardings(state, places, mesh)), value

    return jax.jit(update, donate_argnums=(0, 1))
