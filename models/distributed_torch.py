"""torch on many devices: FSDP2 a layer at a time, and tensor, expert and context parallelism on DTensors.

Every array of the model is a DTensor over one mesh. `sharding.parameter_splits` says where parameters lie along
"tensor" and "expert", and which dimension `fully_shard` cuts along "fsdp" and "context"; the ops do the rest, inside
`crosstile.sharded`. A loss is the mean over all tokens of all devices, and so are its gradients.

    torchrun --nproc-per-node 8 train.py

    torch.distributed.init_process_group()
    model = shard(config, Parallel(fsdp=4, tensor=2))
    optimizer = torch.optim.AdamW(model.parameters())
    model.loss(tokens).backward()  # the same int [batch, seq + 1] on every process
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    DataParallelMeshDims,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.functional import pad

import crosstile
from crosstile.dtensor import names_of
from crosstile.sharding import balanced_order

from . import transformer
from .arrays import Tree
from .config import Config
from .distributed_experts import balance, spread_mixture
from .learners import NOT_TRAINED
from .module import Layer, Transformer, call_layer, weights_of
from .remat import remat as recomputed
from .sharding import RULES, Parallel, parameter_splits
from .targets import IGNORED, within_documents

ORDER = ("data", "expert", "fsdp", "context", "tensor")  # of the mesh: fsdp and context cut parameters together
BATCH = tuple(axis for axis in ORDER if axis in RULES["batch"])
CUT = RULES["embed"]


def make_mesh(parallel: Parallel, device_type: str | None = None) -> DeviceMesh:
    """The mesh of the axes that have more than one device, and "fsdp"; over the processes of the default group.

    Raises:
        RuntimeError: there is no default group.
        ValueError: there are not as many processes; stages.
    """
    _check_stages(parallel)
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group() first, under torchrun"
        )
    if dist.get_world_size() != parallel.devices:
        raise ValueError(
            f"parallel: it has {parallel.devices} devices, and there are {dist.get_world_size()} processes: "
            "start as many, or change data, fsdp, expert, context or tensor"
        )
    axes = tuple(axis for axis in ORDER if parallel.sizes[axis] > 1 or axis == "fsdp")
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return _mesh(kind, tuple(parallel.sizes[axis] for axis in axes), axes, dist.group.WORLD)


@cache
def _mesh(kind: str, sizes: tuple[int, ...], axes: tuple[str, ...], _: Any) -> DeviceMesh:
    """One mesh for all that ask: `fully_shard` wants the very object that parameters lie on."""
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=axes)
    without = [tuple(axis for axis in axes if axis != one) for one in ("", "tensor", "data")]
    for summed in dict.fromkeys(without):
        if len(summed) > 1:
            mesh[summed]._flatten()  # so that a sum over all devices, rows or shards is one collective
    return mesh


def shard(
    config: Config,
    parallel: Parallel,
    *,
    params: Tree | None = None,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
    remat: str = "none",
    precision: str | None = None,
    balanced: bool | None = None,
) -> ShardedTransformer:
    """The model, spread over the processes of the default group.

    Args:
        config: of the model.
        parallel: how many devices each axis has.
        params: the whole tree, the same in every process; None draws it by `seed`.
        seed: of random parameters.
        mesh: from `make_mesh`; None makes it.
        remat: what a layer computes again in its backward: see `models.remat`.
        precision: "bfloat16" or "float16" to compute in; parameters, gradients that are summed over devices, and the
            optimizer stay in their dtype. None computes in theirs.
        balanced: whether a device has an early and a late piece of a sequence that is split, which makes causal
            attention alike for all. None: where the form is not "ulysses".

    Raises:
        ValueError: more or fewer processes than `parallel` has devices; heads that "ulysses" cannot split; stages.
    """
    _check_stages(parallel)
    _check_heads(config, parallel)
    mesh = mesh or make_mesh(parallel)
    params = transformer.init(config, seed, "torch") if params is None else params
    if balanced is None:
        balanced = parallel.context > 1 and parallel.context_form != "ulysses"
    model = ShardedTransformer(config, params, parallel, mesh, remat, balanced)
    cut = tuple(axis for axis in CUT if axis in names_of(mesh))
    options: dict[str, Any] = {
        "mesh": mesh,
        "dp_mesh_dims": DataParallelMeshDims(shard=cut, replicate="data" if "data" in names_of(mesh) else None),
    }
    if precision:
        kind = getattr(torch, precision)
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)
    splits = parameter_splits(config, parallel)
    frozen: set[nn.Parameter] = set()
    for module, split in (*zip(model.layers, splits["layers"], strict=True), (model, splits)):  # one after the other
        dims = _place(module, split, mesh)
        frozen |= {parameter for parameter in weights_of(module).values() if not parameter.requires_grad}
        sharded: Any = fully_shard(module, **options, ignored_params=frozen, shard_placement_fn=partial(_cut, dims))
        sharded.set_gradient_divide_factor(1.0)  # the loss is a mean over all devices already
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, "loss")
    return model


class ShardedTransformer(Transformer):
    """What `shard` makes: a `Transformer` with the same names, whose parameters are DTensors."""

    def __init__(
        self, config: Config, params: Tree, parallel: Parallel, mesh: DeviceMesh, remat: str, balanced: bool
    ) -> None:
        super().__init__(config, params=params, run=recomputed(remat, "torch", self._run_layer))
        self.parallel, self.mesh, self.balanced = parallel, mesh, balanced

    def loss(self, tokens: Any, segments: Any = None, z_loss: float = 0.0) -> Tensor:
        """`transformer.loss` of tokens `[batch, seq + 1]`, which every process has whole; its gradients are whole too.

        Rows and tokens are added that nobody counts where the devices do not divide the batch or the sequence.
        """
        device = self.mesh.device_type
        tokens = torch.as_tensor(tokens, device=device)
        targets, inputs = tokens[:, 1:].long(), tokens[:, :-1]
        if segments is not None:
            segments = torch.as_tensor(segments, device=device)
            targets, segments = within_documents(targets, segments), segments[:, :-1]
        counted = torch.ones_like(inputs, dtype=torch.bool)
        params = self.callable_params(self._settle)
        routers: list[Tensor] = []

        def run(layer: Layer, x: DTensor, *rest: Any) -> tuple[Tensor, None]:
            out, router = call_layer(layer, x.redistribute(placements=self.stream), *rest)
            routers.extend([] if router is None else [router])
            return out, None

        with self.spread():
            result = transformer.loss_of_targets(
                params,
                self._spread(inputs),
                self._spread(targets, IGNORED),
                self.config,
                positions=self._positions(inputs.shape[1]),
                segments=None if segments is None else self._spread(segments),
                z_loss=z_loss,
                run=run,
            )
        if routers and self.config.experts and self.config.experts.loss:
            result = result + balance(routers, self._spread(counted), self.config)
        return result.to_local().clone()  # `fully_shard` warns of views

    def forward(self, tokens: Any) -> Tensor:
        """The logits `[batch, seq, vocab]` of tokens int `[batch, seq]`, which every process has whole."""
        tokens = torch.as_tensor(tokens, device=self.mesh.device_type)
        batch, length = tokens.shape

        def run(layer: Layer, x: DTensor, *rest: Any) -> tuple[Tensor, None]:
            return call_layer(layer, x.redistribute(placements=self.stream), *rest)[0], None

        params = self.callable_params(self._settle)
        with self.spread():
            positions = self._positions(length)
            x, _ = transformer.last_layer(params, self._spread(tokens), self.config, positions=positions, run=run)
            whole = transformer.logits(params, x, self.config).full_tensor()
        order = torch.argsort(positions.full_tensor())
        return whole[:batch, order[:length]]

    @contextmanager
    def spread(self) -> Iterator[None]:
        """`crosstile.sharded` over the mesh; what is a constant among DTensors counts as whole."""
        sharded = crosstile.sharded(self.mesh, context_form=self.parallel.context_form, balanced=self.balanced)
        with sharded, implicit_replication():
            yield

    @property
    def stream(self) -> list[Placement]:
        """Where arrays `[batch, seq, ...]` lie."""
        return _placements(self.mesh, (BATCH, ("context",)))

    def _run_layer(self, weights: Tree, *rest: Any) -> tuple[DTensor, DTensor | None]:
        with self.spread():  # also where a backward runs the layer once more
            x, router = partial(transformer.block, experts=spread_mixture)(self._settle(weights), *rest)
            return x.redistribute(placements=self.stream), router

    def _settle(self, weights: Tree) -> Tree:
        return {name: _Settled.apply(array) for name, array in weights.items()}

    def _spread(self, array: Tensor, fill: Any = 0) -> DTensor:
        """An array `[batch, seq]`, filled up to what the devices divide and put in their order."""
        rows, columns = -array.shape[0] % self.parallel.batch_devices, -array.shape[1] % self._columns
        array = pad(array, (0, columns, 0, rows), value=fill)
        if self.balanced:
            array = array[:, balanced_order(array.shape[1], self.parallel.context)]
        return distribute_tensor(array.contiguous(), self.mesh, self.stream, src_data_rank=None)

    def _positions(self, length: int) -> DTensor:
        length += -length % self._columns
        order = balanced_order(length, self.parallel.context) if self.balanced else list(range(length))
        array = torch.tensor(order, dtype=torch.int32, device=self.mesh.device_type)
        return distribute_tensor(array, self.mesh, _placements(self.mesh, (("context",),)), src_data_rank=None)

    @property
    def _columns(self) -> int:
        return self.parallel.context * (2 if self.balanced else 1)


class _Settled(torch.autograd.Function):
    """A parameter; its gradient is left as a sum that `fully_shard` takes along its axes, and lies as it elsewhere."""

    @staticmethod
    def forward(ctx: Any, array: DTensor) -> DTensor:
        ctx.placements = array.placements
        on_cpu = array.device.type == "cpu"  # where `fully_shard` could not free what an interpreter reads as NumPy's
        return cast(DTensor, array.clone() if on_cpu else array.view_as(array))

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> DTensor:
        mesh = gradient.device_mesh
        taken = [axis in (*CUT, "data") for axis in names_of(mesh)]
        left = [
            had if late and isinstance(had, Partial) else Replicate() if late else wanted
            for late, had, wanted in zip(taken, gradient.placements, ctx.placements, strict=True)
        ]
        gradient = gradient.redistribute(placements=left)
        whole = [axis for axis, late in enumerate(taken) if late and isinstance(left[axis], Replicate)]
        local = gradient.to_local()
        if any(mesh.get_local_rank(axis) for axis in whole):
            local = torch.zeros_like(local)
        sums = [Partial() if late else placement for late, placement in zip(taken, left, strict=True)]
        return DTensor.from_local(local, mesh, sums, run_check=False, shape=gradient.shape, stride=gradient.stride())


def _place(module: nn.Module, splits: Tree, mesh: DeviceMesh) -> dict[nn.Parameter, int]:
    """Put each parameter of a module on the mesh, and find the dimension that `fully_shard` is to cut."""
    cut = {axis for axis in CUT if axis in names_of(mesh)}
    found = {}
    for name, parameter in weights_of(module).items():
        placements = _placements(mesh, splits[name], ("expert", "tensor"))
        array = distribute_tensor(parameter.detach().contiguous(), mesh, placements, src_data_rank=None)
        placed = nn.Parameter(array, requires_grad=not name.endswith(NOT_TRAINED))
        module.register_parameter(name, placed)
        found[placed] = next((dim for dim, axes in enumerate(splits[name]) if cut <= set(axes)), 0)
    return found


def _cut(dims: dict[nn.Parameter, int], parameter: nn.Parameter) -> Shard:
    return Shard(dims[parameter])


def _placements(mesh: DeviceMesh, split: tuple[tuple[str, ...], ...], only: tuple[str, ...] = ORDER) -> list[Placement]:
    """Of each axis of the mesh the dimension that it splits."""
    dims = {axis: dim for dim, axes in enumerate(split) for axis in axes if axis in only}
    return [Shard(dims[axis]) if axis in dims else Replicate() for axis in names_of(mesh)]


def _check_stages(parallel: Parallel) -> None:
    if parallel.stage > 1:
        raise ValueError(
            f"stage: got {parallel.stage}; in torch it must be 1: shard the layers over fsdp instead, or train in JAX"
        )


def _check_heads(config: Config, parallel: Parallel) -> None:
    over = parallel.tensor if config.num_heads % parallel.tensor == 0 else 1
    if parallel.context_form == "ulysses" and config.num_heads // over % parallel.context:
        raise ValueError(
            f"context: got {parallel.context} with {config.num_heads} heads, {config.num_heads // over} on a device; "
            "'ulysses' needs a divisor of these: choose 'gather' or 'ring'"
        )
