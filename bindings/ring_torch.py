"""Causal attention in a ring: each device keeps its queries, and keys and values pass by (arXiv:2310.01889).

The forward keeps its own arrays alone. The backward passes keys and values around once more, computes each part again,
and lets the gradients of keys and values travel with them, home at last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crosstile.merge import merge_attention

Part = tuple[Tensor, Tensor]  # out and its logsumexp


@dataclass(frozen=True)
class Ring:
    """What is the same for all parts.

    Attributes:
        function: `crosstile.attention` of local tensors.
        options: of it, without causal and window.
        group: the devices, in the order of the sequence.
        balanced: whether a device has the pieces r and 2 n - 1 - r, else one.
        left: how many keys before its own a query sees; None is all.
        q_segments: int `[batch, local length]`, the documents of this device's tokens.
        k_segments: int `[batch, length]`, those of all, device by device.
    """

    function: Callable[..., Any]
    options: dict[str, Any]
    group: Any
    balanced: bool
    left: int | None
    q_segments: Tensor | None
    k_segments: Tensor | None

    @property
    def size(self) -> int:
        """How many devices there are."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.get_rank(self.group)

    def pieces(self, device: int) -> list[int]:
        """The pieces of the sequence that a device has."""
        return [device, 2 * self.size - 1 - device] if self.balanced else [device]

    def part(self, source: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Part | None:
        """This device's queries over the keys of another; None where they see none. Its own count the sinks."""
        length = q.shape[1] // len(self.pieces(source))
        own = source == self.rank
        if own and self.left is None:
            return self._attend(q, k, v, source, slice(None), slice(None), causal=True, sinks=sinks)
        outs = [
            self._piece(at, piece, source, length, q, k, v, sinks if own else None)
            for at, piece in enumerate(self.pieces(self.rank))
        ]
        if all(out is None for out in outs):
            return None
        like = next(out for out in outs if out is not None)
        whole = [
            (torch.zeros_like(like[0]), torch.full_like(like[1], -torch.inf)) if out is None else out for out in outs
        ]
        return torch.cat([out for out, _ in whole], 1), torch.cat([lse for _, lse in whole], 2)

    def _piece(
        self, at: int, piece: int, source: int, length: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Part | None:
        """One piece of the queries over the pieces of the keys that it sees."""
        rows = slice(at * length, (at + 1) * length)
        parts = []
        for number, other in enumerate(self.pieces(source)):
            ahead = (piece - other) * length
            if ahead < 0 or (self.left is not None and ahead - length >= self.left):
                continue
            columns = slice(number * length, (number + 1) * length)
            window = None if self.left is None else (self.left, 0)
            options: dict[str, Any] = {}
            if not ahead:
                options = {"causal": True, "window": window}
            elif self.left is not None and ahead + length - 1 > self.left:
                options = {"mask_mod": partial(_within, ahead, self.left)}
            options["sinks"] = sinks if not ahead else None
            parts.append(self._attend(q, k, v, source, rows, columns, **options))
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else merge_attention(*zip(*parts, strict=True))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, source: int, rows: slice, columns: slice, **options: Any
    ) -> Part:
        segments = None
        if self.q_segments is not None and self.k_segments is not None:
            theirs = self.k_segments.chunk(self.size, 1)[source]
            segments = (self.q_segments[:, rows], theirs[:, columns])
        out, lse = self.function(
            q[:, rows],
            k[:, columns],
            v[:, columns],
            segment_ids=segments,
            return_lse=True,
            **self.options,
            **options,
        )
        return out.to(lse.dtype), lse

    def sources(self) -> list[int]:
        """Whose keys are here at each step."""
        return [(self.rank - step) % self.size for step in range(self.size)]

    def passed(self, arrays: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to pass arrays on; what is returned waits for those of the device before."""
        if self.size == 1:
            return lambda: arrays
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        received = [torch.empty_like(array, memory_format=torch.contiguous_format) for array in arrays]
        ops = []
        for sent, got in zip(arrays, received, strict=True):
            ops.append(dist.P2POp(dist.isend, sent.contiguous(), after, self.group))
            ops.append(dist.P2POp(dist.irecv, got, before, self.group))
        works = dist.batch_isend_irecv(ops)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return wait


def ring_attention(ring: Ring, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Part:
    """Attention of this device's queries `[batch, local length, heads, dim]` over all keys, and its logsumexp."""
    out, lse = _RingAttention.apply(ring, q, k, v, sinks)
    return out, lse


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Part:
        own_k, own_v = k, v
        merged: Part | None = None
        for step, source in enumerate(ring.sources()):
            last = step == ring.size - 1
            following = None if last else ring.passed([k, v])
            part = ring.part(source, q, k, v, sinks)
            if part is not None:
                merged = part if merged is None else merge_attention(*zip(merged, part, strict=True))
            if following:
                k, v = following()
        assert merged is not None  # a device sees its own keys
        out, lse = merged
        ctx.ring = ring
        ctx.save_for_backward(q, own_k, own_v, sinks, out, lse)
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
        ring: Ring = ctx.ring
        q, k, v, sinks, out, lse = ctx.saved_tensors
        d_out = d_out.to(lse.dtype)
        seen = torch.where(lse == -torch.inf, 0.0, lse)
        offset = d_lse - (d_out * out).sum(-1).transpose(1, 2)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        d_sinks = None if sinks is None else torch.zeros_like(sinks)
        dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
        for step, source in enumerate(ring.sources()):
            following = None if step == ring.size - 1 else ring.passed([k, v])
            found = _gradients(ring, source, (q, k, v, sinks), d_out, seen, offset)
            if found is not None:
                dq, dk, dv = dq + found[0], dk + found[1], dv + found[2]
                if d_sinks is not None and source == ring.rank:
                    d_sinks = found[3]
            dk, dv = ring.passed([dk, dv])()
            if following:
                k, v = following()
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks


def _gradients(
    ring: Ring, source: int, arrays: tuple[Any, ...], d_out: Tensor, lse: Tensor, offset: Tensor
) -> tuple[Any, ...] | None:
    """Those of one part, which is computed again: of `out = sum(exp(lse_s - lse) * out_s)` and of `lse`."""
    with torch.enable_grad():
        inputs: list[Any] = [None if array is None else array.detach().requires_grad_() for array in arrays]
        q, k, v, sinks = inputs
        part = ring.part(source, q, k, v, sinks if source == ring.rank else None)
        if part is None:
            return None
        part_out, part_lse = part
    weight = torch.exp(part_lse.detach() - lse)
    d_part = weight.transpose(1, 2)[..., None] * d_out
    d_part_lse = weight * ((d_out * part_out.detach()).sum(-1).transpose(1, 2) + offset)
    wanted = [array for array in inputs if array is not None]
    found = list(torch.autograd.grad([part_out, part_lse], wanted, [d_part, d_part_lse], allow_unused=True))
    return tuple(0 if gradient is None else gradient for gradient in found)


def _within(ahead: int, left: int, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Whether query i, which stands that far ahead of the keys, sees key j through its window."""
    return j >= i + (ahead - left)
