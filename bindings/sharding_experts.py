"""Experts of JAX arrays on many devices: each has some of them, and some of the columns of each.

Tokens are gathered along the axes that split both rows and experts; a device runs those of its own experts, and the
sums go back to the tokens' devices. No token is dropped and every size is known before the program runs. With E devices
along these axes and k experts a token, E / k times as much travels as where tokens go to their experts alone, and the
rows that a device holds are those of all E, as they must be where one device may be sent all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crosstile.routing import permute, unpermute
from crosstile.sharding import Roles, Sharding
from crosstile.sharding_jax import FEATURES, Axes, run, spec

WEIGHTS: dict[str, Roles] = {
    "w_gate": ("experts", FEATURES, "columns"),
    "w_up": ("experts", FEATURES, "columns"),
    "w_down": ("experts", "columns", FEATURES),
    "b_gate": ("experts", "columns"),
    "b_up": ("experts", "columns"),
    "b_down": ("experts", None),
}
_ADDED_ONCE = "b_down"


def experts(
    sharding: Sharding,
    choose: Callable[[Any, Any], tuple[Any, Any]],
    products: Callable[..., Any],
    x: Any,
    logits: Any,
    weights: dict[str, Any],
    bias: Any = None,
) -> Any:
    """The sum of each token's experts, weighted.

    Args:
        sharding: from `crosstile.sharding.sharded`.
        choose: (logits `[tokens, groups]`, bias) to the shares and the numbers of each token's experts.
        products: (weights, rows, sizes, owners) to what experts make of their rows.
        x: `[batch, length, hidden]`, or without a length.
        logits: of the router, `[batch, length, groups]`.
        weights: of all experts, by the names of `WEIGHTS`.
        bias: `[groups]` of the choice, or None.
    """
    groups, inner = weights["w_down"].shape[:2]
    of_experts, columns = sharding.dividing("experts", groups), sharding.dividing("columns", inner)
    axes = {"experts": of_experts, "columns": columns}
    lead = [sharding.dividing(role, size) for role, size in zip(("batch", "sequence"), x.shape[:-1], strict=False)]
    gathered = tuple(axis for axis in of_experts if axis in lead[0])
    summed = tuple(axis for axis in (*of_experts, *columns) if axis not in gathered)
    arrays = {"x": x, "logits": logits, **weights, **({} if bias is None else {"bias": bias})}
    specs = {
        "x": spec(*lead, ()),
        "logits": spec(*lead, ()),
        "bias": spec(()),
        **{name: spec(*(axes.get(role or "", ()) for role in WEIGHTS[name])) for name in weights},
    }
    features = {name: WEIGHTS[name].index(FEATURES) for name in weights if FEATURES in WEIGHTS[name]}

    def body(parts: dict[str, Any]) -> Any:
        rows = parts["x"].reshape(-1, x.shape[-1])
        shares, chosen = choose(parts["logits"].reshape(-1, groups), parts.get("bias"))
        if gathered:
            rows, shares, chosen = (
                jax.lax.all_gather(array, gathered, axis=0, tiled=True) for array in (rows, shares, chosen)
            )
        own = _once({name: parts[name] for name in weights}, columns)
        out = _own(products, own, rows, shares, chosen, of_experts)
        if gathered:
            out = jax.lax.psum_scatter(out, gathered, scatter_dimension=0, tiled=True)
        return (jax.lax.psum(out, summed) if summed else out).reshape(parts["x"].shape)

    return run(sharding, body, arrays, {name: specs[name] for name in arrays}, spec(*lead, ()), features)


def _once(weights: dict[str, Any], columns: Axes) -> dict[str, Any]:
    """The weights, of which the sum over columns counts what has none of them once."""
    if not columns or _ADDED_ONCE not in weights:
        return weights
    first = jax.lax.axis_index(columns) == 0
    return weights | {_ADDED_ONCE: weights[_ADDED_ONCE] * first.astype(weights[_ADDED_ONCE].dtype)}


def _own(products: Callable[..., Any], weights: dict[str, Any], rows: Any, shares: Any, chosen: Any, axes: Axes) -> Any:
    """What this device's experts add to each row."""
    count = weights["w_down"].shape[0]
    local = chosen - (jax.lax.axis_index(axes) * count if axes else 0)
    mine = (local >= 0) & (local < count)
    local = jnp.where(mine, local, count)
    sorted_rows, sizes, places = permute(rows, local, count)
    owners = jnp.minimum(local.reshape(-1)[places.order], count - 1)  # others' rows have a share of 0
    made = products(weights, sorted_rows, sizes, owners)
    return unpermute(made, jnp.where(mine, shares, 0), places)
