"""Ops of JAX arrays on many devices: `shard_map` around each call, its specs read from the table of roles.

Inside, each device calls the same public function on its parts. What is summed over devices in the backward is what
`shard_map` sums: the gradients of arrays that lie whole along an axis which splits others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from crosstile import calls, dispatch, mods
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.quantization import Quantized
from crosstile.sharding import ROLES, OpRoles, Roles, Sharding

Axes = tuple[str, ...]
FEATURES = "features"


def call(sharding: Sharding, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The public function of whole arrays, as one program of all devices."""
    name = function.__name__
    if name == "matmul":
        return _matmul(function, arguments)
    _check(name, arguments)
    if name == "attention":
        from crosstile.sharding_attention import attention

        return attention(sharding, function, arguments)
    if name == "linear_cross_entropy":
        from crosstile.sharding_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(sharding, arguments)
    return _by_roles(sharding, function, arguments, ROLES[name])


def _check(name: str, arguments: dict[str, Any]) -> None:
    """Raise what a call on one device would: the whole arrays do not fit."""
    options = {key: value for key, value in arguments.items() if key not in ("implementation", "config")}
    jax.eval_shape(lambda: [calls.PREPARE[name](**options), None][1])


def run(
    sharding: Sharding,
    body: Callable[[dict[str, Any]], Any],
    arrays: dict[str, Any],
    specs: dict[str, Any],
    out_specs: Any,
    features: Mapping[str, int] | None = None,
) -> Any:
    """The body of each device's parts of the arrays, whose ops run on these alone.

    `features` are arrays of which a dimension comes in shards, that are gathered before the body.
    """
    shards = {}
    for name, dimension in (features or {}).items():
        axes = sharding.dividing("features", arrays[name].shape[dimension])
        if sharding.devices(axes) > 1:
            shards[name] = (dimension, axes)
            others = [*specs[name], *[None] * (arrays[name].ndim - len(specs[name]))]
            specs = {**specs, name: PartitionSpec(*others[:dimension], axes, *others[dimension + 1 :])}

    def alone(parts: dict[str, Any]) -> Any:
        for name, (dimension, axes) in shards.items():
            parts = {**parts, name: jax.lax.all_gather(parts[name], axes, axis=dimension, tiled=True)}
        with dispatch.spread_over(None):
            return body(parts)

    mapped = jax.shard_map(alone, mesh=sharding.mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False)
    return mapped(jax.tree.map(jnp.asarray, arrays))


def spec(*axes: Axes) -> PartitionSpec:
    """Of each dimension the axes that split it."""
    return PartitionSpec(*(found or None for found in axes))


def spec_of(array: Any, roles: Roles, axes: dict[str, Axes]) -> PartitionSpec:
    """The same by roles; a dimension of size 1, which broadcasts, is whole."""
    return spec(*(axes.get(role or "", ()) if size > 1 else () for role, size in zip(roles, array.shape, strict=True)))


def of_rank(roles: Any, rank: int) -> Roles:
    """An array's roles, which may be listed by rank."""
    if not isinstance(roles, dict):
        return roles  # type: ignore[no-any-return]
    return roles[rank] if rank in roles else (None,) * rank


def start(axes: Axes, size: int) -> Any:
    """Where this device's part of that size begins in a dimension that these axes split."""
    return jax.lax.axis_index(axes) * size if axes else 0


def of_whole(options: dict[str, Any], places: dict[int, Any]) -> dict[str, Any]:
    """The options, whose mods are given places in the whole arrays: `places[axis]` are a device's b, h, i or j."""
    held = {axis: mods.array(array.astype(jnp.int32)) for axis, array in places.items()}

    def moved(mod: Callable[..., Any], lead: int) -> Callable[..., Any]:
        def of_part(*values: Any) -> Any:
            indices = enumerate(values[lead:])
            return mod(*values[:lead], *(held[axis][index] if axis in held else index for axis, index in indices))

        return of_part

    found = {}
    for name, lead in (("score_mod", 1), ("mask_mod", 0)):
        if options.get(name) is not None:
            found[name] = moved(options[name], lead)
    return options | found


def _matmul(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if arguments["implementation"] not in (None, "library"):
        raise UnsupportedError(
            f"implementation={arguments['implementation']!r} cannot run matmul in a sharded block: there XLA splits "
            "its own product and overlaps it with the collectives, and what is named would run on whole matrices"
        )
    return function(**arguments | {"implementation": "library", "config": None})


def _by_roles(sharding: Sharding, function: Callable[..., Any], arguments: dict[str, Any], roles: OpRoles) -> Any:
    """A call whose devices need nothing of each other."""
    arrays = {name: arguments[name] for name in roles.arguments if arguments.get(name) is not None}
    for name, array in arrays.items():
        if isinstance(array, Quantized):
            raise UnsupportedError(f"{name}: a Quantized weight cannot be split among devices in {function.__name__}")
    if arguments.get("dropout"):
        raise UnsupportedError(
            f"dropout: {function.__name__} has none in a sharded block: a kernel does not know places in the whole"
        )
    if "k" in arrays or "k_pages" in arrays:
        repeat_keys(sharding, arrays)
    placed = list(_placed(arrays, roles))
    axes = {
        role: sharding.dividing(role, *_sizes(role, placed))
        for role in {role for _, found in placed for role in found if role and role != FEATURES}
    }
    features = {name: of.index(FEATURES) for name, of in roles.arguments.items() if FEATURES in of and name in arrays}
    specs = {
        name: type(array)(spec_of(one, of, axes) for one, of in _placed({name: array}, roles))
        if isinstance(array, tuple | list)
        else spec_of(*next(_placed({name: array}, roles)), axes)
        for name, array in arrays.items()
    }
    rest = {name: value for name, value in arguments.items() if name not in arrays}

    def body(parts: dict[str, Any]) -> Any:
        options = rest
        if "q" in parts and (heads := axes.get("heads")):
            count = parts["q"].shape[-2]
            options = of_whole(rest, {1: start(heads, count) + jnp.arange(count)})
        return function(**options, **parts)

    first = next(iter(arrays.values()))
    several = isinstance(first, tuple | list) or arguments.get("return_lse") or arguments.get("residual") is not None
    rank = len((first[0] if isinstance(first, tuple | list) else first).shape)
    found = tuple(spec(*(axes.get(role or "", ()) for role in of_rank(of, rank))) for of in roles.results)
    return run(sharding, body, arrays, specs, found if several else found[0], features)


def _placed(arrays: dict[str, Any], roles: OpRoles) -> Iterator[tuple[Any, Roles]]:
    """Each array with its roles, those of a pair too."""
    for name, array in arrays.items():
        of = roles.arguments[name]
        if isinstance(array, tuple | list):
            for one, its in zip(array, of, strict=True):
                yield one, of_rank(its, len(one.shape))
        else:
            several = isinstance(of, tuple) and of and isinstance(of[0], tuple)
            yield array, of_rank(of[0] if several else of, len(array.shape))


def _sizes(role: str, placed: list[tuple[Any, Roles]]) -> list[int]:
    """Of the dimensions with that role, but those that broadcast."""
    return [
        size
        for array, roles in placed
        for one, size in zip(roles, array.shape, strict=True)
        if one == role and size > 1
    ] or [1]


def repeat_keys(sharding: Sharding, arrays: dict[str, Any], ways: int = 1) -> Axes:
    """Repeat the heads of keys as often as it takes for the axes of heads to divide them; return these axes.

    ways is by what the heads of each device are to be divided once more.
    """
    names = [name for name in ("k", "v", "k_pages", "v_pages", "k_scales", "v_scales") if name in arrays]
    q_heads, kv_heads = arrays["q"].shape[-2], arrays[names[0]].shape[-2]
    axes = sharding.dividing("heads", q_heads)
    parts = sharding.devices(axes) * ways
    groups = q_heads // kv_heads
    times = next((n for n in range(1, groups + 1) if groups % n == 0 and kv_heads * n % parts == 0), 1)
    if times > 1:
        for name in names:
            arrays[name] = jnp.repeat(jnp.asarray(arrays[name]), times, axis=-1 if name.endswith("scales") else -2)
    return axes
