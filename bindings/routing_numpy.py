"""What routing needs of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


def wide(array: Any) -> Any:
    """In float64 if it is, else in float32."""
    return array if array.dtype == np.float64 else array.astype(np.float32)


def narrow(array: Any, like: Any) -> Any:
    """In the dtype of another."""
    return array.astype(like.dtype)


def as_int32(array: Any) -> Any:
    """As numbers of experts are returned."""
    return array.astype(np.int32)


def sum(array: Any, axis: int, keep: bool = False) -> Any:
    """Along one axis."""
    return array.sum(axis=axis, keepdims=keep)


def scores(logits: Any, score: str) -> Any:
    """The softmax of each row, or the sigmoid of each element."""
    if score == "sigmoid":
        return 0.5 * (1 + np.tanh(0.5 * logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(axis=1, keepdims=True)


def chosen(values: Any, count: int) -> Any:
    """The numbers of the highest of each row, the highest first and of equals the first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


def pick(values: Any, numbers: Any) -> Any:
    """The elements of each row at those places of it."""
    return np.take_along_axis(values, numbers, axis=1)


def sort(experts: Any, groups: int) -> tuple[Any, Any, Any]:
    """(order, inverse, sizes): of the copies by expert, those of nobody last."""
    known = np.where((experts < 0) | (experts >= groups), groups, experts)
    order = np.argsort(known, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    ends = np.searchsorted(known[order], np.arange(groups), side="right")
    return order, inverse, np.diff(ends, prepend=0).astype(np.int32)


def take(array: Any, order: Any, inverse: Any, copies: int) -> Any:
    """Row `order[r] // copies` of the array, for every r."""
    return array[order // copies]
