"""What routing needs of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide(array: Tensor) -> Tensor:
    """In float64 if it is, else in float32."""
    return array if array.dtype == torch.float64 else array.float()


def narrow(array: Tensor, like: Tensor) -> Tensor:
    """In the dtype of another."""
    return array.to(like.dtype)


def as_int32(array: Tensor) -> Tensor:
    """As numbers of experts are returned."""
    return array.to(torch.int32)


def sum(array: Tensor, axis: int, keep: bool = False) -> Tensor:
    """Along one axis."""
    return array.sum(dim=axis, keepdim=keep)


def scores(logits: Tensor, score: str) -> Tensor:
    """The softmax of each row, or the sigmoid of each element."""
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(dim=1)


def chosen(values: Tensor, count: int) -> Tensor:
    """The numbers of the highest of each row, the highest first and of equals the first (`topk` takes any of these)."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def pick(values: Tensor, numbers: Tensor) -> Tensor:
    """The elements of each row at those places of it."""
    return values.gather(1, numbers)


def sort(experts: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, inverse, sizes): of the copies by expert, those of nobody last."""
    experts = experts.long()
    known, order = torch.where((experts < 0) | (experts >= groups), groups, experts).sort(stable=True)
    places = torch.arange(order.shape[0], device=order.device)
    inverse = torch.empty_like(order).scatter(0, order, places)
    ends = torch.searchsorted(known, torch.arange(groups, device=order.device), right=True)
    return order, inverse, torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.int32)


def take(array: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """Row `order[r] // copies` of the array, for every r."""
    found: Tensor = _Take.apply(array, order, inverse, copies)
    return found


class _Take(torch.autograd.Function):
    """Each row `copies` times, in some order. The gradient looks the copies of a row up, and sums them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(array: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        return array[order // copies]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, inverse, ctx.copies = inputs
        ctx.save_for_backward(inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (inverse,) = ctx.saved_tensors
        found = gradient[inverse]
        if ctx.copies > 1:
            found = found.reshape(inverse.shape[0] // ctx.copies, ctx.copies, gradient.shape[1]).sum(dim=1)
        return found, None, None, None
