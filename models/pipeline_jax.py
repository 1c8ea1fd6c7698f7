"""A pipeline in JAX: each stage has some of the layers, and microbatches go from one to the next.

All stages are one program. A buffer holds a microbatch for each, along the axis "stage"; a tick runs every stage on its
own (`jax.vmap` over the stages, of which each device has one) and hands the results on, which XLA makes a
collective-permute (GSPMD, arXiv:2105.04663, section 3.3). After `microbatches + stages - 1` ticks all have passed all
stages. The backward is JAX's, of the ticks in their reverse order: the schedule is GPipe's (arXiv:1811.06965).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from . import stacking
from .arrays import Array, Tree
from .config import Config

AXIS = "stage"


@dataclass(frozen=True)
class Pipeline:
    """How stacked layers are run: see `stacking.scan`.

    Attributes:
        run: a layer, on the rows of a microbatch.
        stages: how many there are.
        microbatches: into how many the rows of the batch are cut, which they divide.
        inside: says where the buffer `[stages, rows, seq, ...]` lies.
        around: the same of the whole batch `[batch, seq, ...]` before and after.
        counted: cuts what nobody counts from `[layers, rows, seq, experts]`.
    """

    run: stacking.Run
    stages: int
    microbatches: int
    inside: Callable[[Array], Array]
    around: Callable[[Array], Array]
    counted: Callable[[Array], Array]

    def __call__(self, *_: Any) -> tuple[Array, Array | None]:
        """Raises ValueError: a layer alone has no stages."""
        raise ValueError("params: its layers are a list; a pipeline needs them stacked: see `stacking.stack`")

    def scan(
        self, layers: list[Tree], x: Array, config: Config, positions: Array, segments: Array | None, long: bool
    ) -> tuple[Array, list[Array]]:
        """What `stacking.scan` gives: x through all layers, and their routers' logits."""
        layers = jax.tree.map(lambda array: array.reshape(self.stages, -1, *array.shape[1:]), layers)

        def stage(layers: list[Tree], held: tuple[Array, Array | None]) -> tuple[Array, list[Array]]:
            return stacking.scan(self.run, layers, held[0], config, positions, held[1], long)

        stages = jax.vmap(stage, spmd_axis_name=AXIS)

        def tick(held: Any, entering: Any) -> tuple[Any, tuple[Array, list[Array]]]:
            held = jax.tree.map(self._enter, entering, held)
            x, routers = stages(layers, held)
            return jax.tree.map(lambda array: jnp.roll(array, 1, axis=0), (x, held[1])), (self.inside(x), routers)

        entering = jax.tree.map(self._microbatches, (self.around(x), segments))
        anything = jax.tree.map(lambda array: jax.lax.stop_gradient(array[0]), entering)
        _, (out, routers) = jax.lax.scan(tick, anything, entering)
        out = self._finished(out).swapaxes(0, 1).reshape(x.shape)
        return self.around(out), [self._routed(router, x) for router in routers]

    def _microbatches(self, array: Array) -> Array:
        """`[ticks, stages, rows, ...]` of `[batch, ...]`: a device's rows stay with it.

        After the last microbatch it enters again, and does not come out any more. Each stage has a copy, so that the
        gradients of these are summed over stages once, and not in each tick.
        """
        apart = array.reshape(-1, self.microbatches, *array.shape[1:]).swapaxes(0, 1)
        ticks = apart[jnp.minimum(jnp.arange(self.microbatches + self.stages - 1), self.microbatches - 1)]
        return jax.vmap(self.inside)(jnp.repeat(ticks[:, None], self.stages, axis=1))

    def _enter(self, entering: Array, held: Array) -> Array:
        """What each stage holds: the first the microbatch that enters."""
        is_first = jnp.arange(self.stages).reshape(-1, *[1] * (held.ndim - 1)) == 0
        return self.inside(jnp.where(is_first, entering, held))

    def _finished(self, out: Array) -> Array:
        """Of `[ticks, stages, ...]` what the last stage makes of each microbatch."""
        return out[self.stages - 1 :, -1]

    def _routed(self, router: Array, x: Array) -> Array:
        """Of `[ticks, stages, layers * rows * seq, experts]` what is no bubble, `[tokens, experts]`."""
        real = jax.vmap(self._without_bubbles, (0, 1), spmd_axis_name=AXIS)(jnp.arange(self.stages), router)
        rows, experts = x.shape[0] // self.microbatches, router.shape[-1]
        real = real.reshape(self.stages, self.microbatches, -1, rows, x.shape[1], experts)
        whole = jnp.moveaxis(real, 1, 3).reshape(-1, *x.shape[:2], experts)
        return self.counted(whole).reshape(-1, experts)

    def _without_bubbles(self, stage: Array, ticks: Array) -> Array:
        """The ticks in which a stage has a microbatch: stage s has the first in tick s."""
        return jax.lax.dynamic_slice_in_dim(ticks, stage, self.microbatches)
