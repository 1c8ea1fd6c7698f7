"""Layers as one program: JAX compiles a stack of equal layers once, and scans over their weights.

A stacked tree has in the place of its list of layers a shorter one: its entry i holds the arrays of layers i, i + n,
i + 2 n, ... as one array each `[layers / n, ...]`, where n, the period, is the fewest layers after which they repeat
(2 where every other has a window).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .arrays import Array, Tree, namespace
from .config import Config

Run = Callable[..., tuple[Array, Array | None]]


def period(config: Config) -> int:
    """The fewest layers after which they repeat; all of them where they do not."""
    layers, count = config.layers, config.num_layers
    return next(n for n in range(1, count + 1) if count % n == 0 and layers == layers[:n] * (count // n))


def is_stacked(layers: list[Tree], config: Config) -> bool:
    """Whether these are stacked."""
    return len(layers) != config.num_layers


def stack(params: Tree, config: Config) -> Tree:
    """The tree with its layers stacked; itself where they do not repeat."""
    n = period(config)
    if n == config.num_layers:
        return params
    layers = params["layers"]
    xp = namespace(params["embedding"])
    stacked = [{name: xp.stack([layer[name] for layer in layers[i::n]]) for name in layers[i]} for i in range(n)]
    return {**params, "layers": stacked}


def unstack(params: Tree, config: Config) -> Tree:
    """The tree with a list of all layers."""
    layers = params["layers"]
    if not is_stacked(layers, config):
        return params
    n = len(layers)
    return {
        **params,
        "layers": [{name: array[i // n] for name, array in layers[i % n].items()} for i in range(config.num_layers)],
    }


def scan(
    run: Run, layers: list[Tree], x: Array, config: Config, positions: Array, segments: Array | None, long: bool
) -> tuple[Array, list[Array]]:
    """x through all stacked layers, and their routers' logits `[tokens, experts]`, one array a place of the period.

    A `run` that has a `scan` of its own says how: a pipeline.
    """
    if own := getattr(run, "scan", None):
        return own(layers, x, config, positions, segments, long)  # type: ignore[no-any-return]
    import jax

    def step(x: Array, weights: list[Tree]) -> tuple[Array, Any]:
        routers = []
        for one, layer in zip(weights, config.layers, strict=False):
            x, router = run(one, x, layer, config, positions, segments, long)
            routers.append(router)
        return x, routers

    x, routers = jax.lax.scan(step, x, layers)
    return x, [router.reshape(-1, router.shape[-1]) for router in routers if router is not None]
