"""crosstile's ops on torch's DTensors: each runs on the shards of its device, between redistributions that it needs.

The table of `crosstile.sharding` gives each dimension of each array a role. On each axis of the mesh the first array
that is split, along a dimension that the op can be split by, decides the role that the axis splits; the other arrays
are brought to the same, or lie whole. The result is split by that role, or is a sum still to be taken where the role
was contracted. An array that lies whole where others are split has a gradient that is a sum still to be taken
(`Partial`), which autograd takes where it must. A plain tensor among DTensors counts as whole on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional

from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.sharding import ROLES, OpRoles, Roles, Sharding

SPLIT = ("batch", "sequence", "rows", "heads", "columns", "vocab", "contracted")  # roles that an axis may split
SUMMED = ("contracted",)  # those of these whose parts add up to the result
HEADS = {"heads": "kv_heads"}  # roles that are split with another
_RANKS = range(1, 9)


def _product_roles() -> OpRoles:
    """Those of matmul at every rank: leading dimensions by their place before the last but one, the rows'."""

    def leading(rank: int, first: int, *roles: str) -> Roles:
        names = ("sequence", "batch", *(f"batch {at}" for at in _RANKS))
        return (*reversed(names[first : first + rank - len(roles)]), *roles)

    a = {rank: leading(rank, 0, "contracted") for rank in _RANKS}
    b = {rank: leading(rank, 1, "contracted", "columns") for rank in _RANKS[1:]}
    rows = {rank: leading(rank, 0, "columns") for rank in _RANKS}
    return OpRoles({"a": a, "b": b, "bias": ("columns",), "residual": rows}, (rows,))


_GROUPED = ROLES["grouped_matmul"]
ON_DTENSORS: dict[str, OpRoles] = {
    **ROLES,
    "matmul": _product_roles(),
    "grouped_matmul": OpRoles(
        {**_GROUPED.arguments, "lhs": (None, "contracted"), "rhs": (None, "contracted", "columns")}, _GROUPED.results
    ),
}
"""The table of roles, with the products whose sum DTensors can cut."""


def is_dtensor(array: Any) -> bool:
    """Whether an array, or the first of a pair, is a DTensor."""
    return isinstance(array[0] if isinstance(array, tuple | list) and array else array, DTensor)


def call(sharding: Sharding, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """That public function of these arguments, of which some are DTensors; itself where none is."""
    name = function.__name__
    if not any(is_dtensor(value) for value in arguments.values()):
        return function(**arguments)
    if name == "attention":
        from crosstile.dtensor_attention import attention

        return attention(sharding, function, arguments)
    if name not in ON_DTENSORS:
        raise UnsupportedError(f"{name} takes no DTensors, which {', '.join(ON_DTENSORS)} do: give it local tensors")
    return _CALLS.get(name, _on_shards)(name, function, arguments)


def _on_shards(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    shards = Shards(name, {key: arguments.get(key) for key in ON_DTENSORS[name].arguments})
    _check_heads(name, shards, arguments)
    results = function(**arguments | shards.locals())
    if isinstance(results, tuple):
        return tuple(shards.wrap(result, at) for at, result in enumerate(results))
    return shards.wrap(results, 0)


def _check_heads(name: str, shards: Shards, arguments: dict[str, Any]) -> None:
    """What an attention other than `attention` cannot have where its heads are split."""
    over = prod(shards.mesh.size(axis) for axis in shards.axes("heads"))
    if "kv_heads" not in shards.sizes or over == 1:
        return
    if shards.sizes["kv_heads"] % over:
        raise UnsupportedError(
            f"k: its {shards.sizes['kv_heads']} heads are not a multiple of the {over} devices of q's"
        )
    for key in ("score_mod", "mask_mod", "dropout"):
        if arguments.get(key):
            raise UnsupportedError(f"{key}: it reads places in the whole arrays, and {name} has heads that are split")


class Shards:
    """The arrays of one call, and for each axis of the mesh the role that it splits (None: nothing).

    Attributes:
        mesh: that of the DTensors.
        roles: of each axis.
        arrays: the DTensors, plain tensors made such, None where there is none.
    """

    def __init__(self, name: str, arrays: dict[str, Any]) -> None:
        self._roles = ON_DTENSORS[name]
        self.mesh = _mesh(arrays)
        whole = [Replicate()] * self.mesh.ndim
        self.arrays = {
            key: DTensor.from_local(array, self.mesh, whole, run_check=False) if _is_plain(array) else array
            for key, array in arrays.items()
        }
        for key, array in self.arrays.items():
            if array is not None and not isinstance(array, DTensor):
                raise UnsupportedError(f"{key}: got {type(array).__name__}; beside DTensors it must be a tensor")
        self._named = {
            key: _of_rank(_arguments(self._roles, key), array.ndim)
            for key, array in self.arrays.items()
            if array is not None
        }
        leading = ("a", "b") if name == "matmul" else tuple(self._named)[:1]
        self._rank = max(self.arrays[key].ndim for key in leading)
        self.sizes: dict[str, int] = {}
        for key, roles in self._named.items():
            for role, size in zip(roles, self.arrays[key].shape, strict=True):
                if role:
                    self.sizes[role] = max(size, self.sizes.get(role, 0))
        self.roles = [self._role(axis) for axis in range(self.mesh.ndim)]

    def _role(self, axis: int) -> str | None:
        for key, roles in self._named.items():
            placement = self.arrays[key].placements[axis]
            if isinstance(placement, Shard):
                role = roles[placement.dim]
                if role and self.arrays[key].shape[placement.dim] > 1 and role.partition(" ")[0] in SPLIT:
                    return role
        return None

    def placements(self, key: str) -> list[Placement]:
        """Where the op wants that array."""
        return [self._placement(key, role) for role in self.roles]

    def _placement(self, key: str, role: str | None) -> Placement:
        for dim, (one, size) in enumerate(zip(self._named[key], self.arrays[key].shape, strict=True)):
            if role and one in (role, HEADS.get(role, role)) and size > 1:
                return Shard(dim)
        return Replicate()

    def local(self, key: str, placements: list[Placement] | None = None) -> Tensor:
        """This device's part of that array."""
        placements = placements or self.placements(key)
        gradient = [
            Partial() if role and isinstance(placement, Replicate) else placement
            for role, placement in zip(self.roles, placements, strict=True)
        ]
        return to_local(self.arrays[key], placements, gradient)

    def locals(self) -> dict[str, Tensor]:
        """Those of all arrays."""
        return {key: self.local(key) for key in self._named}

    def wrap(self, result: Tensor, at: int) -> DTensor:
        """The DTensor of which a result is this device's part."""
        roles = _of_rank(self._roles.results[at], self._rank, result.ndim)
        placements: list[Placement] = []
        for role in self.roles:
            if role and role in roles:
                placements.append(Shard(roles.index(role)))
            else:
                placements.append(Partial() if role in SUMMED else Replicate())
        shape = [
            self.sizes[role] if role and role in self.roles else size
            for role, size in zip(roles, result.shape, strict=True)
        ]
        return from_local(result, self.mesh, placements, shape)

    def axes(self, *roles: str) -> list[int]:
        """The axes that split one of those roles."""
        return [axis for axis, role in enumerate(self.roles) if role in roles]

    def start(self, key: str, placements: Iterable[Placement], dim: int) -> int:
        """Where this device's part of a dimension begins."""
        return int(compute_local_shape_and_global_offset(self.arrays[key].shape, self.mesh, tuple(placements))[1][dim])


def to_local(array: DTensor, placements: list[Placement], gradient: list[Placement]) -> Tensor:
    """This device's part under those placements; `gradient` says what its gradient is of the whole's."""
    return array.redistribute(placements=placements).to_local(grad_placements=gradient)


def from_local(local: Tensor, mesh: DeviceMesh, placements: list[Placement], shape: Iterable[int]) -> DTensor:
    """The DTensor of that shape whose part on this device is `local`."""
    whole = torch.empty(tuple(shape), device="meta")
    local = local.contiguous()  # views of the DTensor go by the whole's strides
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _matmul(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A product whose sum is cut on some axis has its bias, activation and residual after the sum."""
    if not isinstance(arguments["b"], Tensor):
        raise UnsupportedError("b: got a Quantized weight; beside DTensors it must be a tensor")
    shards = Shards(name, {key: arguments.get(key) for key in ("a", "b")})
    after = {key: arguments.get(key) for key in ("bias", "activation", "residual")}
    if not shards.axes("contracted") or all(value is None for value in after.values()):
        return _on_shards(name, function, arguments)
    cut = shards.wrap(function(**arguments | dict.fromkeys(after) | shards.locals()), 0)
    whole = [Replicate() if isinstance(placement, Partial) else placement for placement in cut.placements]
    out: Any = cut.redistribute(placements=whole)
    if after["bias"] is not None:
        out = out + _beside(after["bias"], out)
    if after["activation"]:
        out = _ACTIVATIONS[after["activation"]](out)
    return out if after["residual"] is None else out + _beside(after["residual"], out)


_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def _beside(array: Tensor, out: DTensor) -> DTensor:
    """An array that is added to `out`, in its dtype."""
    if not isinstance(array, DTensor):
        array = DTensor.from_local(array, out.device_mesh, [Replicate()] * out.device_mesh.ndim, run_check=False)
    return cast(DTensor, array.to(out.dtype))


def _rotary(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Queries and keys in one launch where they are split alike, else in two."""
    x = arguments["x"]
    if not isinstance(x, tuple | list):
        return _rotated(name, function, arguments)[0]
    q, k = x
    alike = isinstance(q, DTensor) and isinstance(k, DTensor) and q.placements == k.placements
    if not alike:
        return tuple(_rotated(name, function, arguments | {"x": part})[0] for part in x)
    return _rotated(name, function, arguments | {"x": q}, k)


def _rotated(name: str, function: Callable[..., Any], arguments: dict[str, Any], *more: DTensor) -> tuple[DTensor, ...]:
    x, positions = arguments["x"], arguments["positions"]
    if positions.ndim == 1:
        positions = positions[None]
    every = [Shards(name, {"x": one, "positions": positions}) for one in (x, *more)]
    parts = [shards.local("x") for shards in every]
    local = every[0].local("positions")
    results = function(
        **arguments | {"x": tuple(parts) if more else parts[0], "positions": local.expand(len(parts[0]), -1)}
    )
    return tuple(shards.wrap(one, 0) for shards, one in zip(every, results if more else [results], strict=True))


def _cross_entropy(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The loss of all rows, of which each device has some, and of all logits, of which each has some."""
    from crosstile.cross_entropy import linear_cross_entropy_shard, merge_cross_entropy

    shards = Shards(name, {key: arguments[key] for key in ("hidden", "weight", "targets")})
    hidden, weight, targets = (shards.local(key) for key in ("hidden", "weight", "targets"))
    beside = {key: value for key, value in arguments.items() if key not in ("hidden", "weight", "targets")}
    reduction = beside.pop("reduction", "mean")
    ignored = beside.get("ignore_index", -100)
    over = shards.axes("vocab")
    if not over:
        losses = function(hidden, weight, targets, **beside, reduction="none")
    else:
        of_shard = {key: value for key, value in beside.items() if key not in ("label_smoothing", "z_loss")}
        of_loss = {key: beside[key] for key in ("ignore_index", "label_smoothing", "z_loss") if key in beside}
        start = shards.start("weight", shards.placements("weight"), 0)
        sums = bool(beside.get("label_smoothing"))
        if len(weight):
            parts = linear_cross_entropy_shard(
                hidden, weight, targets, vocab_start=start, return_logit_sum=sums, **of_shard
            )
        else:
            parts = _of_no_logits(hidden, weight)[: 2 + sums]
        every = [_of_all(part, shards.mesh, over) for part in parts]
        losses = merge_cross_entropy(
            *every, targets=targets, vocab=shards.arrays["weight"].shape[0], **of_loss, reduction="none"
        )
    if reduction == "none":
        return shards.wrap(losses, 0)
    placements = [Partial() if role in ("batch", "sequence") else Replicate() for role in shards.roles]
    whole = [Replicate()] * shards.mesh.ndim
    total = DTensor.from_local(losses.sum(), shards.mesh, placements, run_check=False).redistribute(placements=whole)
    if reduction == "sum":
        return total
    counted = (targets != ignored).sum().to(losses.dtype)
    count = DTensor.from_local(counted, shards.mesh, placements, run_check=False).redistribute(placements=whole)
    return total / count.clamp(min=1)


def _of_no_logits(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What a shard without rows of the weight knows; autograd goes through it as it does on other devices."""
    nothing = torch.where(torch.zeros_like(hidden, dtype=torch.bool), hidden, 0.0).sum(-1) + weight.sum()
    nothing = nothing.to(torch.promote_types(hidden.dtype, torch.float32))
    return nothing - torch.inf, nothing, nothing


def _of_all(part: Tensor, mesh: DeviceMesh, axes: list[int]) -> list[Tensor]:
    """That part of every device along some axes; the gradient of each goes back to its device."""
    placements: list[Placement] = [Shard(0) if axis in axes else Replicate() for axis in range(mesh.ndim)]
    count = prod(mesh.size(axis) for axis in axes)
    stacked = from_local(part[None], mesh, placements, (count, *part.shape))
    whole: list[Placement] = [Replicate()] * mesh.ndim
    return list(to_local(stacked, whole, whole).unbind(0))


_CALLS: dict[str, Callable[..., Any]] = {
    "matmul": _matmul,
    "rotary": _rotary,
    "linear_cross_entropy": _cross_entropy,
}


def _mesh(arrays: dict[str, Any]) -> DeviceMesh:
    meshes = {key: array.device_mesh for key, array in arrays.items() if isinstance(array, DTensor)}
    first, mesh = next(iter(meshes.items()))
    for key, other in meshes.items():
        if other != mesh:
            raise ValueError(f"{key}: its mesh is {other}; it must be that of {first}, {mesh}")
    return mesh


def names_of(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of a mesh's axes."""
    return mesh.mesh_dim_names or ()


def _is_plain(array: Any) -> bool:
    return isinstance(array, Tensor) and not isinstance(array, DTensor)


def _arguments(roles: OpRoles, key: str) -> Any:
    """The roles of an argument; of a pair those of the first, and of segment ids by the names that they have here."""
    if key in _SEGMENTS:
        return roles.arguments["segment_ids"][_SEGMENTS.index(key)]
    found = roles.arguments[key]
    return found[0] if isinstance(found, tuple) and found and isinstance(found[0], tuple) else found


_SEGMENTS = ("q_segments", "k_segments")


def _of_rank(roles: Any, rank: int, length: int | None = None) -> Roles:
    """The roles of an array of that rank; without any where the table has no such rank."""
    found = roles.get(rank) if isinstance(roles, Mapping) else roles
    return (None,) * (rank if length is None else length) if found is None else found
