"""Linear cross-entropy in JAX, a tile of logits at a time; see `library.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .spec import IGNORED, LinearCrossEntropySpec

TOKENS, ROWS = 512, 1024  # of a tile of logits


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(
    spec: LinearCrossEntropySpec, hidden: jax.Array, weight: jax.Array, targets: jax.Array
) -> tuple[jax.Array, ...]:
    """lse, target_logit and, where the spec asks for it, logit_sum."""
    return _of_each_item(partial(_statistics, spec), hidden, weight, targets)


def _forward(spec: LinearCrossEntropySpec, *inputs: jax.Array) -> tuple[Any, Any]:
    results = statistics(spec, *inputs)
    return results, (*inputs, results[0])


def _backward(spec: LinearCrossEntropySpec, saved: Any, gradients: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    dhidden, dweight = _of_each_item(partial(_gradients, spec), *saved, *gradients)
    return dhidden, dweight, np.zeros(saved[2].shape, jax.dtypes.float0)


statistics.defvjp(_forward, _backward)


def _of_each_item(function: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The function of every item of the batch. Most often there is one, whose results XLA then writes in place."""
    if arrays[0].shape[0] != 1:
        return jax.vmap(function)(*arrays)
    return tuple(result[None] for result in function(*(array[0] for array in arrays)))


def _statistics(
    spec: LinearCrossEntropySpec, hidden: jax.Array, weight: jax.Array, targets: jax.Array
) -> tuple[jax.Array, ...]:
    """Of one batch item: each [tokens]."""
    counted = targets != IGNORED

    def take_in(row: Any, rows: int, first: Any, tokens: int, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, found, whole = (_cut(array, first, tokens) for array in so_far)
        logits, _ = _logits(spec, _cut(hidden, first, tokens), _cut(weight, row, rows))
        is_target = (_cut(targets, first, tokens) - row)[:, None] == jnp.arange(rows)
        new_peak = jnp.maximum(peak, logits.max(axis=1))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[:, None]).sum(axis=1)
        found += jnp.where(is_target, logits, 0).sum(axis=1)
        parts = (new_peak, total, found, whole + logits.sum(axis=1) if spec.sums else whole)
        return tuple(_paste(array, part, first) for array, part in zip(so_far, parts, strict=True))

    nothing = jnp.zeros(targets.shape, _wide(hidden))
    start = (nothing - jnp.inf, nothing, nothing, nothing)
    peak, total, found, whole = _over_tiles(weight.shape[0], targets.shape[0], take_in, start)
    results = (peak + jnp.log(total), found, whole)
    return tuple(jnp.where(counted, row, 0) for row in results[: 2 + spec.sums])


def _gradients(
    spec: LinearCrossEntropySpec,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    lse: jax.Array,
    dlse: jax.Array,
    dtarget: jax.Array,
    dsum: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """dhidden and dweight of one batch item."""
    wide = _wide(hidden)

    def of_rows(row: Any, rows: int, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block = _cut(weight, row, rows)

        def add(first: Any, tokens: int, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dhidden, dblock = sums
            target, scale, one = (_cut(array, first, tokens)[:, None] for array in (targets, dlse, dtarget))
            counted = target != IGNORED
            visible = jnp.where(counted, _cut(hidden, first, tokens), 0)
            logits, slope = _logits(spec, visible, block)
            gradient = jnp.exp(logits - _cut(lse, first, tokens)[:, None]) * scale
            gradient += jnp.where(target - row == jnp.arange(rows), one, 0)
            if dsum is not None:
                gradient += _cut(dsum, first, tokens)[:, None]
            gradient = jnp.where(counted, gradient * slope, 0).astype(hidden.dtype)
            part = _cut(dhidden, first, tokens) + jnp.matmul(gradient, block, preferred_element_type=wide)
            return _paste(dhidden, part, first), dblock + jnp.matmul(gradient.T, visible, preferred_element_type=wide)

        dhidden, dweight = sums
        dhidden, dblock = _over(targets.shape[0], TOKENS, add, (dhidden, jnp.zeros(block.shape, wide)))
        return dhidden, _paste(dweight, dblock.astype(weight.dtype), row)

    sums = (jnp.zeros(hidden.shape, wide), jnp.zeros(weight.shape, weight.dtype))
    dhidden, dweight = _over(weight.shape[0], ROWS, of_rows, sums)
    return dhidden.astype(hidden.dtype), dweight


def _logits(spec: LinearCrossEntropySpec, hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """A tile of logits, and their slope."""
    raw = jnp.matmul(hidden, weight.T, preferred_element_type=_wide(hidden))
    if spec.softcap is None:
        return raw, 1.0
    bent = jnp.tanh(raw / spec.softcap)
    return bent * spec.softcap, 1 - bent * bent


def _over_tiles(vocab: int, tokens: int, body: Callable[..., Any], carry: Any) -> Any:
    """Carry something through `body(row, rows, first, tokens, carry)` of every tile."""

    def of_rows(row: Any, rows: int, carry: Any) -> Any:
        return _over(tokens, TOKENS, partial(body, row, rows), carry)

    return _over(vocab, ROWS, of_rows, carry)


def _over(size: int, part: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """Carry something through `body(start, length, carry)` of parts, and of what is left: lengths are static."""
    whole = size // part
    if size % part:  # first, since XLA would copy what a loop has made before it changed it again
        carry = body(whole * part, size % part, carry)
    if not whole:
        return carry
    return lax.fori_loop(0, whole, lambda at, carry: body(at * part, part, carry), carry)


def _cut(array: jax.Array, start: Any, size: int) -> jax.Array:
    """Some rows. Behind the barrier, XLA for a CPU does not widen the whole array instead."""
    return lax.optimization_barrier(lax.dynamic_slice_in_dim(array, start, size))


def _paste(array: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, part, start, 0)


def _wide(array: jax.Array) -> Any:
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32
