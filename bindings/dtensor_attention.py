"""Attention on DTensors: batch and heads split freely, and the sequence along one axis of the mesh in three forms.

gather     every device brings all keys and values to itself
ring       devices pass keys and values on, and merge by logsumexp (arXiv:2310.01889): see `crosstile.ring_torch`
ulysses    devices exchange pieces of the sequence for heads, and back (arXiv:2309.14509)

A balanced sequence lies in the order of `crosstile.sharding.balanced_order`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from crosstile.dtensor import Shards
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.ring_torch import Ring, ring_attention
from crosstile.sharding import Sharding


def attention(sharding: Sharding, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """`crosstile.attention`, which `function` is on local tensors, of DTensors."""
    if arguments.get("dropout"):
        raise UnsupportedError(
            "dropout: which weights are dropped follows from their place in whole arrays, not shards"
        )
    segments = arguments.pop("segment_ids", None)
    q_segments, k_segments = segments if isinstance(segments, tuple | list) else (segments, segments)
    named = {"q": arguments.pop("q"), "k": arguments.pop("k"), "v": arguments.pop("v")}
    beside = {key: arguments.pop(key, None) for key in ("bias", "mask", "q_lengths", "kv_lengths", "sinks")}
    for key in ("q_scale", "k_scale", "v_scale"):
        if arguments.get(key) is not None:
            raise UnsupportedError(f"{key}: float8 arrays with scales are not split: give attention local tensors")
    shards = Shards("attention", {**named, **beside, "q_segments": q_segments, "k_segments": k_segments})
    _split_like_values(shards)
    form, balanced = sharding.context_form, sharding.balanced
    across = shards.axes("sequence")
    if len(across) > 1:
        raise UnsupportedError("q: its sequence is split along two axes of the mesh; it can be along one")
    gathered = not across or form == "gather"
    keys = _keys_placements(shards, gathered)
    local = _Local(
        q=shards.local("q"),
        k=_heads_of_queries(shards, keys, shards.local("k", keys)),
        v=_heads_of_queries(shards, keys, shards.local("v", keys)),
        beside={key: shards.local(key) for key, value in beside.items() if value is not None},
        q_segments=None if q_segments is None else shards.local("q_segments"),
        k_segments=None if k_segments is None else shards.local("k_segments"),
        starts=tuple(shards.start("q", shards.placements("q"), dim) for dim in (0, 2, 1)),
    )
    if not across:
        out, lse = local.attend(function, arguments)
    else:
        _check_on_split_sequence(form, arguments, beside, shards, balanced)
        group = shards.mesh.get_group(across[0])
        if form == "gather":
            n = dist.get_world_size(group) if balanced else 1
            out, lse = local.attend_gathered(function, arguments, n, dist.get_rank(group), shards)
        elif form == "ring":
            out, lse = local.attend_in_ring(function, arguments, group, balanced)
        else:
            out, lse = local.attend_by_heads(function, arguments, group)
    return shards.wrap(out, 0) if lse is None else (shards.wrap(out, 0), shards.wrap(lse, 1))


@dataclass
class _Local:
    """This device's arrays, and where its queries begin in the whole: (batch, head, row)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beside: dict[str, Tensor]
    q_segments: Tensor | None
    k_segments: Tensor | None
    starts: tuple[int, ...]

    def attend(self, function: Callable[..., Any], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Over all keys; the logsumexp if it is wanted."""
        segments = None if self.q_segments is None else (self.q_segments, self.k_segments)
        options = {**options, **_moved_mods(options, *self.starts)}
        found = function(self.q, self.k, self.v, segment_ids=segments, **options, **self.beside)
        return found if options.get("return_lse") else (found, None)

    def attend_gathered(
        self, function: Callable[..., Any], options: dict[str, Any], n: int, rank: int, shards: Shards
    ) -> tuple[Tensor, Tensor | None]:
        """Over the keys up to the last that a piece of the queries sees, which aligns it bottom-right."""
        k, v, k_segments, length = self.k, self.v, self.k_segments, self.q.shape[1]
        starts = [self.starts[2]]
        if n > 1:
            length //= 2
            starts = [rank * length, (2 * n - 1 - rank) * length]
            k, v = in_order(k, n), in_order(v, n)
            k_segments = None if k_segments is None else in_order(k_segments, n)
        more = k.shape[1] - shards.sizes["sequence"]
        parts = []
        for at, start in enumerate(starts):
            rows = slice(at * length, (at + 1) * length)
            end = start + length + more if options.get("causal") else k.shape[1]
            piece = _Local(
                self.q[:, rows],
                k[:, :end],
                v[:, :end],
                {key: _plane_part(key, array, rows, end) for key, array in self.beside.items()},
                None if self.q_segments is None else self.q_segments[:, rows],
                None if k_segments is None else k_segments[:, :end],
                (*self.starts[:2], start),
            )
            parts.append(piece.attend(function, options))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2) if options.get("return_lse") else None

    def attend_in_ring(
        self, function: Callable[..., Any], options: dict[str, Any], group: Any, balanced: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Over each device's keys in turn."""
        left = (options.get("window") or (None, None))[0]
        kept = {
            key: value for key, value in options.items() if key not in ("causal", "window", "mask_mod", "return_lse")
        }
        ring = Ring(function, kept, group, balanced, left, self.q_segments, self.k_segments)
        out, lse = ring_attention(ring, self.q, self.k, self.v, self.beside.get("sinks"))
        return out, lse if options.get("return_lse") else None

    def attend_by_heads(
        self, function: Callable[..., Any], options: dict[str, Any], group: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Over all keys, for some of the heads."""
        n, rank = dist.get_world_size(group), dist.get_rank(group)
        heads = self.q.shape[2]
        if heads % n:
            raise ValueError(
                f"q: got {heads} heads on a device; ulysses needs a multiple of the {n} devices of context"
            )
        k, v = (_repeated(array, heads, n) for array in (self.k, self.v))
        q, k, v = (exchange(array, group, split=2, join=1) for array in (self.q, k, v))
        own = slice(rank * (heads // n), (rank + 1) * (heads // n))
        sinks = {key: array[own] for key, array in self.beside.items()}
        q_segments = None if self.q_segments is None else _all_pieces(self.q_segments, group)
        whole = _Local(q, k, v, sinks, q_segments, self.k_segments, (self.starts[0], self.starts[1] + own.start, 0))
        out, lse = whole.attend(function, options)
        out = exchange(out, group, split=1, join=2)
        return out, None if lse is None else exchange(lse, group, split=2, join=1)


def in_order(array: Tensor, n: int) -> Tensor:
    """A balanced sequence `[batch, length, ...]` of n devices in its own order."""
    pieces = array.chunk(2 * n, 1)
    return torch.cat([pieces[2 * at if at < n else 2 * (2 * n - 1 - at) + 1] for at in range(2 * n)], 1)


class _Exchange(torch.autograd.Function):
    """Each device gives each a piece along `split`, and joins what it gets along `join`."""

    @staticmethod
    def forward(ctx: Any, array: Tensor, group: Any, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        sent = torch.stack(array.chunk(dist.get_world_size(group), split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Exchange.apply(gradient, ctx.group, ctx.join, ctx.split), None, None, None


def exchange(array: Tensor, group: Any, split: int, join: int) -> Tensor:
    """A dimension that was whole split over the group, and one that was split whole."""
    found: Tensor = _Exchange.apply(array, group, split, join)
    return found


def _all_pieces(array: Tensor, group: Any) -> Tensor:
    """`[batch, length]` of all devices of the group, one after the other."""
    parts = [torch.empty_like(array) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, array.contiguous(), group=group)
    return torch.cat(parts, 1)


def _repeated(array: Tensor, heads: int, n: int) -> Tensor:
    """Keys' heads `[batch, length, kv_heads, dim]`, each as often as n devices need to have some of them."""
    kv_heads = array.shape[2]
    return array if kv_heads % n == 0 else array.repeat_interleave(heads // kv_heads, 2)


def _split_like_values(shards: Shards) -> None:
    """Where keys or values alone are split by heads, the queries are too."""
    for axis in range(shards.mesh.ndim):
        placements = [shards.arrays[key].placements[axis] for key in ("k", "v")]
        if shards.roles[axis] is None and Shard(2) in placements:
            shards.roles[axis] = "heads"


def _keys_placements(shards: Shards, gathered: bool) -> list[Placement]:
    """Where keys and values lie: their heads with their queries', whole where these cannot be split alike."""
    over = prod(shards.mesh.size(axis) for axis in shards.axes("heads"))
    alike = shards.sizes["kv_heads"] % over == 0
    places: dict[str | None, Placement] = {
        "batch": Shard(0),
        "heads": Shard(2) if alike else Replicate(),
        "sequence": Replicate() if gathered else Shard(1),
    }
    return [places.get(role, Replicate()) for role in shards.roles]


def _heads_of_queries(shards: Shards, keys: list[Placement], array: Tensor) -> Tensor:
    """Of all heads of keys or values those that this device's queries read, in as few copies as there can be."""
    if not shards.axes("heads") or Shard(2) in keys:
        return array
    placements = shards.placements("q")
    group = shards.sizes["heads"] // shards.sizes["kv_heads"]
    first = shards.start("q", placements, 2)
    count = shards.local("q", placements).shape[2]
    owners = [(first + head) // group for head in range(count)]
    once = sorted(set(owners)) or [0]  # no head at all can be over one
    if owners == [one for one in once for _ in range(count // len(once))]:
        return array[:, :, once[0] : once[-1] + 1]
    return torch.cat([array[:, :, one : one + 1] for one in owners], 2)


def _moved_mods(options: dict[str, Any], batch: int, head: int, row: int) -> dict[str, Any]:
    """score_mod and mask_mod, which read places in the whole arrays."""
    score_mod, mask_mod = options.get("score_mod"), options.get("mask_mod")
    moved: dict[str, Any] = {}
    if score_mod is not None:
        moved["score_mod"] = lambda score, b, h, i, j: score_mod(score, b + batch, h + head, i + row, j)
    if mask_mod is not None:
        moved["mask_mod"] = lambda b, h, i, j: mask_mod(b + batch, h + head, i + row, j)
    return moved


def _plane_part(key: str, array: Tensor, rows: slice, end: int) -> Tensor:
    """Of an array over the scores some rows and the keys up to an end."""
    if key not in ("bias", "mask"):
        return array
    if array.shape[-1] > 1:
        array = array[..., :end]
    return array[..., rows, :] if array.shape[-2] > 1 else array


def _check_on_split_sequence(
    form: str, options: dict[str, Any], beside: dict[str, Any], shards: Shards, balanced: bool
) -> None:
    """What a split sequence cannot have, in that form."""
    causal, window = bool(options.get("causal")), options.get("window") or (None, None)
    same = shards.sizes["sequence"] == shards.sizes["keys"]
    refused = [key for key in ("q_lengths", "kv_lengths") if beside[key] is not None]
    if form != "gather":
        refused += [key for key in ("bias", "mask") if beside[key] is not None]
    if form == "ring":
        refused += [key for key in ("score_mod", "mask_mod") if options.get(key) is not None]
    if refused:
        raise UnsupportedError(f"{refused[0]}: a sequence that is split in the form {form!r} cannot have it")
    if form != "ulysses" and not causal and window != (None, None):
        raise UnsupportedError("window: without causal it needs a whole sequence: choose the form 'ulysses'")
    if form != "gather" or balanced:
        if not same:
            raise UnsupportedError("k: a sequence that is split must have as many keys as queries here")
        if form == "ring" and not causal:
            raise UnsupportedError("causal: got False; the ring is for causal attention: choose another form")
        n = shards.mesh.size(shards.axes("sequence")[0]) * (2 if balanced else 1)
        if shards.sizes["sequence"] % n:
            raise ValueError(f"q: its length is {shards.sizes['sequence']}; it must be a multiple of {n}: pad it")
