"""Ring attention in JAX: keys and values go from device to device, and what each step gives is merged by logsumexp.

The forward keeps a device's own arrays and result alone. The backward passes keys on once more, with their gradients,
and runs each step's attention again: less memory for a forward more (Liu et al., arXiv:2310.01889).

In a balanced order (Brandon et al., "Striped Attention", arXiv:2311.09431, have the idea; the two pieces are those of
zigzag rings) a step of causal attention is half a square on every device: all its queries against the earlier half of
keys from before it, or its later half of queries against all keys from after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crosstile import dispatch, mods
from crosstile.merge import merge_attention

Result = tuple[Any, Any]  # out and lse
EMPTY = object()  # in the place of options: nothing is seen


def ring(function: Callable[..., Any], layout: Any, options: dict[str, Any], parts: dict[str, Any]) -> Any:
    """Attention of a device's queries over the keys of all devices along `layout.context`; q and k of one length."""
    devices, context = layout.devices, layout.context
    size = parts["q"].shape[1]
    unbounded = not options["causal"] and options["window"] in (None, (None, None))
    common = {name: value for name, value in options.items() if name not in ("sinks", "segment_ids")}
    common |= {"causal": False, "window": None, "return_lse": True}
    steps = [_options(options, step, devices, size, layout.balanced) for step in range(devices)]
    last = max(step for step in range(devices) if steps[step] != (EMPTY, EMPTY))
    segments = parts.get("segment_ids")

    def attend(q: Any, k: Any, v: Any, sinks: Any, ids: Any, **changed: Any) -> Result:
        with dispatch.spread_over(None):  # a backward is traced after `sharding_jax.run` has ended
            out, lse = function(q, k, v, **common | changed, sinks=sinks, segment_ids=ids)
        return out.astype(jnp.promote_types(out.dtype, jnp.float32)), lse

    def attend_step(step: int, q: Any, k: Any, v: Any, sinks: Any, ids: Any) -> Result:
        """The device's queries against the keys of the device `step` places before it."""
        sinks = sinks if _is_first(step) else None
        before = jax.lax.axis_index(context) >= step
        if layout.balanced and step and not unbounded:
            return _half_of(attend, before, q, k, v, ids)
        branches = [_branch(attend, changed, q, k, v, sinks, ids) for changed in steps[step]]
        return branches[0]() if steps[step][0] == steps[step][1] else jax.lax.cond(before, *branches)

    def pass_on(arrays: Any, places: int) -> Any:
        order = [(device, (device + places) % devices) for device in range(devices)]
        return jax.tree.map(lambda array: jax.lax.ppermute(array, context, order), arrays)

    @jax.custom_vjp
    def whole(q: Any, k: Any, v: Any, sinks: Any, ids: Any) -> Result:
        found, travelling = None, (k, v, None if ids is None else ids[1])
        for step in range(last + 1):
            if step:
                travelling = pass_on(travelling, 1)
            k, v, key_ids = travelling
            new = attend_step(step, q, k, v, sinks, _pair(ids, key_ids))
            found = new if found is None else merge_attention(*zip(found, new, strict=True))
        out, lse = found  # type: ignore[misc]
        return out.astype(q.dtype), lse

    def forward(q: Any, k: Any, v: Any, sinks: Any, ids: Any) -> Any:
        out, lse = whole(q, k, v, sinks, ids)
        return (out, lse), (q, k, v, sinks, ids, out, lse)

    def backward(saved: Any, gradients: Result) -> Any:
        q, k, v, sinks, ids, out, lse = saved
        wide = jnp.promote_types(q.dtype, jnp.float32)
        dout, dlse = gradients[0].astype(wide), gradients[1]
        sums = jax.tree.map(lambda array: jnp.zeros(array.shape, wide), (q, sinks))
        travelling = (k, v, None if ids is None else ids[1])
        key_sums = jax.tree.map(lambda array: jnp.zeros(array.shape, wide), (k, v))
        for step in range(last + 1):
            if step:
                travelling, key_sums = pass_on((travelling, key_sums), 1)
            k, v, key_ids = travelling

            def of_step(q: Any, k: Any, v: Any, sinks: Any, step: int = step, key_ids: Any = key_ids) -> Result:
                return attend_step(step, q, k, v, sinks, _pair(ids, key_ids))

            part, pull = jax.vjp(of_step, q, k, v, sinks)
            dq, dk, dv, dsinks = pull(_gradients_of_part(part, (out, lse), (dout, dlse)))
            sums = _added(sums, (dq, dsinks))
            key_sums = _added(key_sums, (dk, dv))
        if last:
            key_sums = pass_on(key_sums, devices - last)
        dq, dsinks, dk, dv = (
            None if like is None else total.astype(like.dtype)
            for total, like in zip((*sums, *key_sums), (q, sinks, k, v), strict=True)
        )
        return dq, dk, dv, dsinks, None

    whole.defvjp(forward, backward)
    out, lse = whole(parts["q"], parts["k"], parts["v"], parts.get("sinks"), segments)
    return (out, lse) if options["return_lse"] else out


def _is_first(step: int) -> bool:
    """Whether it is the step that counts the sinks."""
    return step == 0


def _options(options: dict[str, Any], step: int, devices: int, size: int, balanced: bool) -> tuple[Any, Any]:
    """What a step's attention sees, where its keys lie before the device's queries and where they lie after them."""
    left, right = options["window"] or (None, None)
    if options["causal"]:
        right = 0
    if balanced:  # without a window
        return ({"causal": options["causal"]},) * 2 if step == 0 else ({}, {})
    return tuple(  # type: ignore[return-value]
        _window(left, right, size, distance * size) for distance in (step, step - devices if step else 0)
    )


def _window(left: int | None, right: int | None, size: int, distance: int) -> Any:
    """The options of a square whose queries stand `distance` keys further than they lie."""
    first = None if left is None else distance - left  # the first key of query 0
    last = None if right is None else distance + right
    if (first is not None and first >= size) or (last is not None and last <= -size):
        return EMPTY
    first = None if first is None or first <= 1 - size else first
    last = None if last is None or last >= size - 1 else last
    if first is None and last == 0:
        return {"causal": True}
    if (first is None or first <= 0) and (last is None or last >= 0):
        return {"window": (None if first is None else -first, last)}
    return {"mask_mod": _Between(first, last)}


class _Between:
    """A mask of keys from `first` to `last` places after the query."""

    def __init__(self, first: int | None, last: int | None) -> None:
        self._bounds = first, last

    def __call__(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        first, last = self._bounds
        seen = ([] if first is None else [j >= i + first]) + ([] if last is None else [j <= i + last])
        return mods.fold("and", seen) if len(seen) > 1 else seen[0]


def _branch(attend: Callable[..., Result], changed: Any, q: Any, k: Any, v: Any, sinks: Any, ids: Any) -> Any:
    if changed is EMPTY:
        return lambda: _nothing(q, v)
    return lambda: attend(q, k, v, sinks, ids, **changed)


def _half_of(attend: Callable[..., Result], before: Any, q: Any, k: Any, v: Any, ids: Any) -> Result:
    """A step of a balanced ring: all queries on the first half of keys, or the second half of queries on all keys."""
    half = q.shape[1] // 2

    def earlier_keys() -> Result:
        pair = None if ids is None else (ids[0], ids[1][:, :half])
        return attend(q, k[:, :half], v[:, :half], None, pair)

    def later_queries() -> Result:
        pair = None if ids is None else (ids[0][:, half:], ids[1])
        nothing, found = _nothing(q[:, :half], v), attend(q[:, half:], k, v, None, pair)
        return jnp.concatenate([nothing[0], found[0]], 1), jnp.concatenate([nothing[1], found[1]], 2)

    return jax.lax.cond(before, earlier_keys, later_queries)  # type: ignore[no-any-return]


def _nothing(q: Any, v: Any) -> Result:
    """The attention of queries that see no key."""
    batch, length, heads, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros((batch, length, heads, v.shape[-1]), wide), jnp.full((batch, heads, length), -jnp.inf, wide)


def _pair(ids: Any, key_ids: Any) -> Any:
    return None if ids is None else (ids[0], key_ids)


def _gradients_of_part(part: Result, merged: Result, gradients: Result) -> Result:
    """What reaches a part's out and lse from those of the merged: it has the share `exp(lse of part - lse)` in them."""
    (out, lse), (merged_out, merged_lse), (dout, dlse) = part, merged, gradients
    share = jnp.where(lse > -jnp.inf, jnp.exp(lse - jnp.where(lse > -jnp.inf, merged_lse, 0)), 0)
    change = (dout * (out - merged_out.astype(dout.dtype))).sum(-1).swapaxes(1, 2)
    return share.swapaxes(1, 2)[..., None] * dout, share * (change + dlse)


def _added(sums: Any, gradients: Any) -> Any:
    return jax.tree.map(lambda total, gradient: total + gradient.astype(total.dtype), sums, gradients)
