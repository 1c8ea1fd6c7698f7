"""What routing needs of JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def wide(array: Any) -> Any:
    """In float64 if it is, else in float32."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def narrow(array: Any, like: Any) -> Any:
    """In the dtype of another."""
    return array.astype(like.dtype)


def as_int32(array: Any) -> Any:
    """As numbers of experts are returned."""
    return array.astype(jnp.int32)


def sum(array: Any, axis: int, keep: bool = False) -> Any:
    """Along one axis."""
    return array.sum(axis=axis, keepdims=keep)


def scores(logits: Any, score: str) -> Any:
    """The softmax of each row, or the sigmoid of each element."""
    return jax.nn.sigmoid(logits) if score == "sigmoid" else jax.nn.softmax(logits, axis=1)


def chosen(values: Any, count: int) -> Any:
    """The numbers of the highest of each row, the highest first and of equals the first."""
    return jax.lax.top_k(jax.lax.stop_gradient(values), count)[1]


def pick(values: Any, numbers: Any) -> Any:
    """The elements of each row at those places of it."""
    return jnp.take_along_axis(values, numbers, axis=1)


def sort(experts: Any, groups: int) -> tuple[Any, Any, Any]:
    """(order, inverse, sizes): of the copies by expert, those of nobody last."""
    known = jnp.where((experts < 0) | (experts >= groups), groups, experts).astype(jnp.int32)
    order = jnp.argsort(known, stable=True).astype(jnp.int32)
    places = jnp.arange(order.shape[0], dtype=jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
    ends = jnp.searchsorted(known[order], jnp.arange(groups), side="right")
    return order, inverse, jnp.diff(ends, prepend=0).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def take(array: Any, order: Any, inverse: Any, copies: int) -> Any:
    """Row `order[r] // copies` of the array, for every r."""
    return array[order // copies]


def _forward(array: Any, order: Any, inverse: Any, copies: int) -> tuple[Any, Any]:
    return take(array, order, inverse, copies), inverse


def _backward(copies: int, inverse: Any, gradient: Any) -> tuple[Any, None, None]:
    """Look the copies of a row up, and sum them."""
    found = gradient[inverse]
    if copies > 1:
        found = found.reshape(inverse.shape[0] // copies, copies, gradient.shape[1])
        found = found.astype(jnp.promote_types(found.dtype, jnp.float32)).sum(axis=1).astype(gradient.dtype)
    return found, None, None


take.defvjp(_forward, _backward)
