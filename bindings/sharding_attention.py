"""Attention of JAX arrays on many devices: batch and heads apart, sequences in one of three forms.

gather      each device has all keys and values, and a piece of the queries
ulysses     pieces of the sequence are exchanged for heads, and back (DeepSpeed-Ulysses, arXiv:2309.14509)
ring        keys and values are passed on: see `ring_jax`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from crosstile import mods
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.sharding import ROLES, Sharding, balanced_order
from crosstile.sharding_jax import Axes, of_rank, of_whole, repeat_keys, run, spec, spec_of, start

_REFUSED = {
    "dropout": "which weights are dropped follows from places in the whole arrays, which a kernel does not know",
    "q_scale": "float8 has a forward only",
    "k_scale": "float8 has a forward only",
    "v_scale": "float8 has a forward only",
}
_NOT_IN_A_RING = ("bias", "mask", "q_lengths", "kv_lengths", "score_mod", "mask_mod")


@dataclass(frozen=True)
class Layout:
    """How one call is spread.

    Attributes:
        batch, heads, context: the mesh axes that split these.
        devices: how many pieces context makes of a sequence.
        form: "gather", "ulysses" or "ring".
        balanced: whether a device has pieces r and `2 * devices - 1 - r` of `2 * devices`, and not piece r of devices.
    """

    batch: Axes
    heads: Axes
    context: Axes
    devices: int
    form: str
    balanced: bool


def attention(sharding: Sharding, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """`crosstile.attention` of whole arrays."""
    for name, reason in _REFUSED.items():
        if arguments[name]:
            raise UnsupportedError(f"{name}: attention has none in a sharded block: {reason}")
    arrays = {name: arguments[name] for name in ROLES["attention"].arguments if arguments[name] is not None}
    options = {name: value for name, value in arguments.items() if name not in arrays}
    if "segment_ids" in arrays:
        pair = arrays["segment_ids"]
        arrays["segment_ids"] = tuple(pair) if isinstance(pair, tuple | list) else (pair, pair)
    layout = _layout(sharding, arrays, options)
    specs = _specs(layout, arrays)
    out = spec(layout.batch, layout.context, layout.heads, ())
    lse = spec(layout.batch, layout.heads, layout.context)

    def body(parts: dict[str, Any]) -> Any:
        if layout.form == "ring":
            from crosstile.ring_jax import ring

            return ring(function, layout, options, parts)
        form = {"gather": _gathered, "ulysses": _exchanged}[layout.form]
        return form(function, layout, options, parts, arrays)

    return run(sharding, body, arrays, specs, (out, lse) if options["return_lse"] else out)


def _layout(sharding: Sharding, arrays: dict[str, Any], options: dict[str, Any]) -> Layout:
    """What splits the call, for which keys' heads may be repeated."""
    (batch, q_len, q_heads, _), kv_len = arrays["q"].shape, arrays["k"].shape[1]
    context = sharding.dividing("sequence", q_len, kv_len)
    devices = sharding.devices(context)
    if sharding.balanced and sharding.devices(sharding.axes["sequence"]) > 1 and q_len % (2 * devices):
        raise ValueError(f"q: length is {q_len}; in a balanced order it must be a multiple of 2 * {devices}")
    form, balanced = sharding.context_form if devices > 1 else "gather", sharding.balanced and devices > 1
    heads = sharding.dividing("heads", q_heads)
    if form == "ulysses" and q_heads // sharding.devices(heads) % devices:
        form = "gather"
    if form == "ring" and not _fits_a_ring(q_len == kv_len, balanced, arrays, options):
        form = "gather"
    repeat_keys(sharding, arrays, devices if form == "ulysses" else 1)
    return Layout(sharding.dividing("batch", batch), heads, context, devices, form, balanced)


def _fits_a_ring(square: bool, balanced: bool, arrays: dict[str, Any], options: dict[str, Any]) -> bool:
    windowed = options["window"] not in (None, (None, None))
    beside = any(arrays.get(name) is not None or options.get(name) is not None for name in _NOT_IN_A_RING)
    return square and not beside and not (balanced and windowed)


def _specs(layout: Layout, arrays: dict[str, Any]) -> dict[str, Any]:
    """How each array is split. In the exchange heads of what is no sequence are split by the context axes too."""
    exchanged = layout.form == "ulysses"
    axes: dict[str, Axes] = {
        "batch": layout.batch,
        "heads": layout.heads,
        "kv_heads": layout.heads,
        "sequence": layout.context,
        "keys": layout.context,
    }
    beside = axes | {"keys": ()}
    if exchanged:
        beside |= {"heads": (*layout.heads, *layout.context), "sequence": ()}
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        roles = ROLES["attention"].arguments[name]
        if name == "segment_ids":
            kept = beside if exchanged or layout.form == "gather" else axes
            queries = beside if exchanged else axes
            found[name] = tuple(
                spec_of(one, its, with_) for one, its, with_ in zip(array, roles, (queries, kept), strict=True)
            )
        else:
            found[name] = spec_of(array, of_rank(roles, array.ndim), axes if name in ("q", "k", "v") else beside)
    return found


def _exchanged(
    call: Callable[..., Any], layout: Layout, options: dict[str, Any], parts: dict[str, Any], whole: dict[str, Any]
) -> Any:
    """Whole sequences of fewer heads on each device."""

    def exchange(array: Any, split: int, joined: int) -> Any:
        return jax.lax.all_to_all(array, layout.context, split, joined, tiled=True)

    parts = parts | {name: exchange(parts[name], 2, 1) for name in "qkv"}
    rows, _, count, _ = parts["q"].shape
    places = {} if not layout.batch else {0: start(layout.batch, rows) + jnp.arange(rows)}
    places[1] = start((*layout.heads, *layout.context), count) + jnp.arange(count)
    result = call(**of_whole(options, places) | parts)
    out, lse = result if options["return_lse"] else (result, None)
    out = exchange(out, 1, 2)
    return (out, exchange(lse, 2, 1)) if options["return_lse"] else out


def _gathered(
    call: Callable[..., Any], layout: Layout, options: dict[str, Any], parts: dict[str, Any], whole: dict[str, Any]
) -> Any:
    """A piece of the queries, or in a balanced order two, with all keys."""
    if not layout.context:
        return call(**of_whole(options, _places(layout, parts["q"], 0)) | parts)
    q_len, kv_len = whole["q"].shape[1], whole["k"].shape[1]
    keys = {name: jax.lax.all_gather(parts[name], layout.context, axis=1, tiled=True) for name in "kv"}
    rank, size = jax.lax.axis_index(layout.context), q_len // layout.devices
    if not layout.balanced:
        return _piece(call, layout, options, parts | keys, rank * size, (q_len, kv_len))
    keys = {name: array[:, _natural(kv_len, layout.devices)] for name, array in keys.items()}
    parts = parts | keys | _in_natural_order(parts, whole, layout.devices)
    half = size // 2
    results = [
        _piece(call, layout, options, _queries(parts, whole, at * half, half), piece * half, (q_len, kv_len))
        for at, piece in enumerate((rank, 2 * layout.devices - 1 - rank))
    ]
    if not options["return_lse"]:
        return jnp.concatenate(results, 1)
    outs, lses = zip(*results, strict=True)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 2)


def _natural(length: int, devices: int) -> Any:
    """Where each token lies in a balanced order."""
    return jnp.argsort(jnp.array(balanced_order(length, devices)))


def _in_natural_order(parts: dict[str, Any], whole: dict[str, Any], devices: int) -> dict[str, Any]:
    """What lies beside all keys, as these."""
    found: dict[str, Any] = {}
    for name in ("bias", "mask"):
        if name in parts and parts[name].shape[-1] > 1:
            found[name] = parts[name][..., _natural(parts[name].shape[-1], devices)]
    if "segment_ids" in parts:
        queries, keys = parts["segment_ids"]
        found["segment_ids"] = (queries, keys[:, _natural(keys.shape[1], devices)])
    return found


def _queries(parts: dict[str, Any], whole: dict[str, Any], first: int, count: int) -> dict[str, Any]:
    """The parts with a slice of the queries."""
    chosen = slice(first, first + count)
    found = parts | {"q": parts["q"][:, chosen]}
    for name in ("bias", "mask"):
        if name in parts and parts[name].ndim > 1 and parts[name].shape[-2] > 1:
            found[name] = parts[name][..., chosen, :]
    if "segment_ids" in parts:
        found["segment_ids"] = (parts["segment_ids"][0][:, chosen], parts["segment_ids"][1])
    return found


def _piece(
    call: Callable[..., Any],
    layout: Layout,
    options: dict[str, Any],
    parts: dict[str, Any],
    first: Any,
    lengths: tuple[int, int],
) -> Any:
    """Queries from `first` on of a sequence, with all its keys.

    Causal queries end where their own lengths say that the keys end; so all later ones are cut off. Other windows
    become a mask over the queries' places.
    """
    batch, count = parts["q"].shape[:2]
    q_len, kv_len = (
        jnp.broadcast_to(jnp.asarray(parts.get(name, size), jnp.int32), (batch,))
        for name, size in zip(("q_lengths", "kv_lengths"), lengths, strict=True)
    )
    moved = of_whole(options, _places(layout, parts["q"], first))
    left, right = options["window"] or (None, None)
    if options["causal"]:
        right = 0
    here = jnp.clip(q_len - first, 0, count)
    padded = {"q_lengths": here} if "q_lengths" in parts else {}
    if right == 0:
        seen = jnp.clip(kv_len - q_len + first + here, 0, lengths[1])
        return call(**moved | parts | padded | {"kv_lengths": seen})
    if left is not None or right is not None:
        stands = mods.array(jnp.arange(count) + (first + kv_len - q_len)[:, None])
        user = moved["mask_mod"]

        def near(b: Any, h: Any, i: Any, j: Any) -> Any:
            seen = [] if left is None else [j >= stands[b, i] - left]
            seen += [] if right is None else [j <= stands[b, i] + right]
            seen += [] if user is None else [user(b, h, i, j)]
            return seen[0] if len(seen) == 1 else mods.fold("and", seen)

        moved |= {"window": None, "mask_mod": near}
    return call(**moved | parts | padded)


def _places(layout: Layout, q: Any, first: Any) -> dict[int, Any]:
    """The places of the device's batch items, heads and queries in the whole arrays, of what is split."""
    batch, count, heads, _ = q.shape
    found = {0: start(layout.batch, batch) + jnp.arange(batch)} if layout.batch else {}
    if layout.heads:
        found[1] = start(layout.heads, heads) + jnp.arange(heads)
    if layout.context:
        found[2] = first + jnp.arange(count)
    return found
