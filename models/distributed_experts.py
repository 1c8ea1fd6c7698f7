"""Experts on many torch devices: rows travel to the devices of their experts, and what these make of them back.

Each device routes its own tokens. Along "expert" it sends each row to the device that has its expert, as many as there
are: none is dropped, and none is padded, for which the host must learn the counts. Along "tensor" each device has a
part of every expert's inner columns, and the parts are summed at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

import crosstile
from crosstile.dtensor import names_of
from crosstile.routing import permute, route, unpermute

from .arrays import Tree
from .config import Config, Experts
from .mlp import choose, of_experts, shared

_OF_EXPERTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


def spread_mixture(weights: Tree, h: DTensor, config: Config, experts: Experts) -> tuple[DTensor, DTensor]:
    """`mlp.mixture` of DTensors: the result like h, and the router's logits `[batch, seq, count]`."""
    mesh, names = h.device_mesh, names_of(h.device_mesh)
    logits = crosstile.matmul(h, weights["router"], bias=weights.get("router_bias"), out_dtype="float32")
    parts = "tensor" in names and isinstance(weights["w_down"].placements[names.index("tensor")], Shard)
    summed: list[Placement] = [
        Partial() if axis == "tensor" and parts else placement
        for axis, placement in zip(names, h.placements, strict=True)
    ]
    tokens = h.to_local(grad_placements=summed)
    rows_of_logits = logits.to_local(grad_placements=summed).reshape(-1, experts.count)
    correction = weights.get("correction_bias")
    shares, chosen = choose(rows_of_logits, None if correction is None else correction.to_local(), experts)
    rows, sizes, places = permute(tokens.reshape(-1, h.shape[-1]), chosen, experts.count)
    own = {name: _own(weights[name], parts) for name in _OF_EXPERTS if name in weights}
    if parts and "b_down" in own and mesh.get_local_rank("tensor"):
        own["b_down"] = own["b_down"] * 0  # it counts once in the sum of the parts
    if "expert" in names and len(own["w_up"]) < experts.count:
        rows = _elsewhere(own, rows, sizes, mesh.get_group("expert"), config, experts)
    else:
        rows = of_experts(own, rows, sizes, chosen.reshape(-1)[places.order], config, experts)
    out = unpermute(rows, shares, places).reshape(tokens.shape)
    made = DTensor.from_local(out, mesh, summed, run_check=False, shape=h.shape, stride=h.stride())
    made = made.redistribute(placements=h.placements)
    return (made + shared(weights, h, config, experts) if experts.shared_size else made), logits


def balance(routers: list[Any], counted: DTensor, config: Config) -> DTensor:
    """The weight of the experts' balance times `load_balancing_loss` of all counted tokens, from each layer's logits.

    counted is bool `[batch, seq]`.
    """
    experts = config.experts
    assert experts is not None  # there are routers
    mesh = counted.device_mesh
    parts = [Partial() if isinstance(placement, Shard) else Replicate() for placement in counted.placements]
    whole = [Replicate()] * mesh.ndim
    mask = counted.to_local().reshape(-1, 1)
    probabilities, taken = [], []
    for router in routers:
        logits = router.to_local().reshape(-1, experts.count)
        _, chosen = route(logits, experts.per_token)
        probabilities.append((logits.softmax(-1) * mask).sum(0))
        taken.append((torch.nn.functional.one_hot(chosen.long(), experts.count).sum(1) * mask).sum(0))

    def everywhere(array: Tensor) -> DTensor:
        return DTensor.from_local(array, mesh, parts, run_check=False).redistribute(placements=whole)

    tokens = everywhere(mask.sum() * len(routers))
    shares, means = (
        everywhere(sum(taken[1:], taken[0])) / tokens,
        everywhere(sum(probabilities[1:], probabilities[0])) / tokens,
    )
    found: DTensor = experts.loss * experts.count * (shares * means).sum()  # type: ignore[assignment]
    return found


def _own(array: DTensor, parts: bool) -> Tensor:
    """This device's part of an expert's parameter, whose gradient is a sum over the devices that share it."""
    gradient: list[Placement] = []
    for axis, placement in zip(names_of(array.device_mesh), array.placements, strict=True):
        alike = axis == "tensor" and not parts
        gradient.append(Partial() if isinstance(placement, Replicate) and not alike else placement)
    return array.to_local(grad_placements=gradient)


def _elsewhere(own: Tree, rows: Tensor, sizes: Tensor, group: Any, config: Config, experts: Experts) -> Tensor:
    """Rows, sorted by expert, through experts of which each device of the group has as many."""
    devices = dist.get_world_size(group)
    sent = sizes.long().reshape(devices, -1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent.contiguous(), group=group)
    out, back = sent.sum(1).tolist(), received.sum(1).tolist()
    here = _Exchanged.apply(rows, out, back, group)
    count = sent.shape[1]
    owners = torch.arange(count, device=rows.device).repeat(devices).repeat_interleave(received.flatten())
    sorted_rows, sizes_here, places = permute(here, owners[:, None], count)
    made = of_experts(own, sorted_rows, sizes_here, owners[places.order], config, experts)
    once = torch.ones(len(owners), 1, dtype=made.dtype, device=made.device)
    return _Exchanged.apply(unpermute(made, once, places), back, out, group)  # type: ignore[no-any-return]


class _Exchanged(torch.autograd.Function):
    """`sent[r]` rows to each device r of the group, in their order, and `received[r]` from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Exchanged.apply(gradient, ctx.received, ctx.sent, ctx.group), None, None, None
