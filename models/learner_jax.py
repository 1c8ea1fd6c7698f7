"""optax's AdamW around the model: a step is one program, micro-batches and layers are scanned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import transformer
from .arrays import Tree, tree_map_with_path
from .config import Config
from .learners import Step, in_precision, is_decayed
from .packing import Batch
from .recipe import Optimizer, Recipe
from .remat import remat
from .stacking import stack, unstack

Loss = Callable[..., Any]
Placed = Callable[[Tree, Tree], tuple[Tree, Tree]]


class JaxLearner:
    """See `learners.Learner`."""

    def __init__(self, params: Tree, config: Config, recipe: Recipe) -> None:
        self._config, self._accumulate = config, recipe.optimizer.accumulate
        optimizer = adamw(recipe.optimizer)
        params = stack(params, config)
        spread = many_devices if recipe.parallel.devices > 1 else one_device
        self._stacked, self._state, loss, placed = spread(params, config, recipe, optimizer)

        def update(params: Tree, state: Any, parts: Any, rate: Any) -> tuple[Tree, Any, Any, Any]:
            total, gradients = accumulated(partial(loss, z_loss=recipe.optimizer.z_loss), params, parts)
            changes, state = optimizer.update(gradients, state, params)
            params = jax.tree.map(lambda array, change: array - rate * change, params, changes)
            return *placed(params, state), total, norm(gradients)

        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._loss = jax.jit(partial(loss, z_loss=0.0))

    @property
    def params(self) -> Tree:
        """See `Learner`."""
        return unstack(self._stacked, self._config)

    def step(self, batch: Batch, rate: float) -> Step:
        """See `Learner`."""
        parts = in_parts(batch, self._accumulate)
        self._stacked, self._state, loss, norm = self._update(self._stacked, self._state, parts, np.float32(rate))
        return Step(float(loss), float(norm))

    def evaluate(self, batch: Batch) -> float:
        """See `Learner`."""
        return float(self._loss(self._stacked, batch.tokens, batch.segments))

    def state(self) -> Tree:
        """See `Learner`: the layers stacked as the program has them."""
        adam = self._state[1]
        return {"params": self._stacked, "exp_avg": adam.mu, "exp_avg_sq": adam.nu, "steps": adam.count}

    def restore(self, state: Tree) -> None:
        """See `Learner`."""
        first, adam, *rest = self._state
        adam = adam._replace(mu=state["exp_avg"], nu=state["exp_avg_sq"], count=state["steps"])
        self._stacked, self._state = state["params"], (first, adam, *rest)


def one_device(params: Tree, config: Config, recipe: Recipe, optimizer: Any) -> tuple[Tree, Tree, Loss, Placed]:
    """The parameters, the optimizer's state, the loss, and what keeps the first two in their places."""
    run = remat(recipe.remat, "jax", transformer.block)

    def loss(params: Tree, tokens: Any, segments: Any, z_loss: float) -> Any:
        narrow = in_precision(params, recipe.precision)
        return transformer.loss(narrow, tokens, config, segments=segments, z_loss=z_loss, run=run)

    return params, optimizer.init(params), loss, lambda params, state: (params, state)


def many_devices(params: Tree, config: Config, recipe: Recipe, optimizer: Any) -> tuple[Tree, Tree, Loss, Placed]:
    """The same over all devices of all processes, in shards."""
    from . import distributed_jax as spread

    parallel = recipe.parallel
    mesh = spread.make_mesh(parallel)
    places = spread.shardings(config, parallel, mesh)
    params = spread.place(params, config, parallel, mesh)
    of_state = spread.state_shardings(jax.eval_shape(optimizer.init, params), places, mesh)

    def loss(params: Tree, tokens: Any, segments: Any, z_loss: float) -> Any:
        narrow = in_precision(params, recipe.precision)
        options: dict[str, Any] = {"segments": segments, "z_loss": z_loss, "remat": recipe.remat}
        return spread.loss(narrow, tokens, config, parallel, mesh, **options)

    def placed(params: Tree, state: Tree) -> tuple[Tree, Tree]:
        constrain = jax.lax.with_sharding_constraint
        return constrain(params, places), constrain(state, of_state)

    return params, jax.jit(optimizer.init, out_shardings=of_state)(params), loss, placed


def adamw(options: Optimizer) -> optax.GradientTransformation:
    """What a step subtracts from the parameters, to be multiplied by the learning rate."""

    def mask(params: Tree) -> Tree:
        return tree_map_with_path(lambda path, _: is_decayed(path), params)

    return optax.chain(
        optax.clip_by_global_norm(options.clip) if options.clip else optax.identity(),
        optax.scale_by_adam(*options.betas, eps=options.eps),
        optax.add_decayed_weights(options.weight_decay, mask),
    )


def norm(tree: Tree) -> Any:
    """The root of the sum of all squares."""
    return jnp.sqrt(sum(jnp.vdot(array, array) for array in jax.tree.leaves(tree)))


def in_parts(batch: Batch, count: int) -> tuple[Any, Any, Any]:
    """Tokens and segments `[count, rows / count, seq + 1]`, and the share of each part in the loss, `[count]`."""
    shares = np.array([share for _, share in batch.cut(count)], np.float32)
    tokens, segments = (
        None if one is None else one.reshape(count, -1, one.shape[-1]) for one in (batch.tokens, batch.segments)
    )
    return tokens, segments, shares


def accumulated(loss: Any, params: Tree, parts: tuple[Any, Any, Any]) -> tuple[Any, Tree]:
    """The loss of all parts together and its gradients, one part after another in memory."""

    def weighted(params: Tree, tokens: Any, segments: Any, share: Any) -> Any:
        return share * loss(params, tokens, segments)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(weighted)(params, *part)), None

    if len(parts[2]) == 1:
        return jax.value_and_grad(weighted)(params, *jax.tree.map(lambda one: one[0], parts))  # type: ignore[no-any-return]
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, parts)[0]  # type: ignore[no-any-return]
