"""torch's fused AdamW around the model."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from . import transformer
from .arrays import Tree, tree_leaves, tree_map_with_path
from .config import Config
from .learners import NOT_TRAINED, Step, in_precision, is_decayed
from .packing import Batch
from .recipe import Recipe
from .remat import remat

Loss = Callable[[Batch, float], torch.Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchLearner:
    """See `learners.Learner`."""

    def __init__(self, params: Tree, config: Config, recipe: Recipe) -> None:
        self._config, self._recipe = config, recipe
        # Stored by rows, not by columns as `checkpoint.load` leaves them for generation: a step takes a hundredth less.
        params = tree_map_with_path(lambda _, array: array.contiguous(), params)
        self._params, self._loss = one_device(params, config, recipe)
        if recipe.parallel.devices > 1:
            self._params, self._loss = many_devices(params, config, recipe)
        trained = {path: array for path, array in tree_leaves(self._params).items() if not path.endswith(NOT_TRAINED)}
        self._leaves = {path: array.requires_grad_() for path, array in trained.items()}
        options = recipe.optimizer
        groups = [
            {
                "params": [array for path, array in self._leaves.items() if is_decayed(path) == decayed],
                "weight_decay": options.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=1.0, betas=options.betas, eps=options.eps, fused=True)
        self._steps = 0

    @property
    def params(self) -> Tree:
        """See `Learner`."""
        return self._params

    def step(self, batch: Batch, rate: float) -> Step:
        """See `Learner`."""
        options = self._recipe.optimizer
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self._params["embedding"].device)
        for part, share in batch.cut(options.accumulate):
            loss = share * self._loss(part, options.z_loss)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._leaves.values(), options.clip or inf)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        return Step(total.item(), float(norm.full_tensor() if isinstance(norm, DTensor) else norm))

    def evaluate(self, batch: Batch) -> float:
        """See `Learner`."""
        with torch.no_grad():
            return self._loss(batch, 0.0).item()

    def state(self) -> Tree:
        """See `Learner`: by flat names, `params.layers.0.wq` and its moments."""
        found: dict[str, Any] = {f"params.{path}": array.detach() for path, array in tree_leaves(self._params).items()}
        for path, array in self._leaves.items():
            kept = self._optimizer.state.get(array) or {name: torch.zeros_like(array) for name in _MOMENTS}
            found |= {f"{name}.{path}": kept[name].detach() for name in _MOMENTS}
        return {**found, "steps": torch.tensor(self._steps)}

    def restore(self, state: Tree) -> None:
        """See `Learner`."""
        self._steps = int(state["steps"])
        with torch.no_grad():
            for path, array in tree_leaves(self._params).items():
                array.copy_(state[f"params.{path}"])
        for path, array in self._leaves.items():
            moments = {name: state[f"{name}.{path}"] for name in _MOMENTS}
            steps = torch.tensor(float(self._steps), device=array.device)
            self._optimizer.state[array] = {"step": steps, **moments}


def one_device(params: Tree, config: Config, recipe: Recipe) -> tuple[Tree, Loss]:
    """The parameters, and the loss of a batch."""
    layer = torch.compile(transformer.block) if recipe.compile else transformer.block
    run = remat(recipe.remat, "torch", layer)

    def loss(batch: Batch, z_loss: float) -> torch.Tensor:
        device = params["embedding"].device
        tokens, segments = (
            None if one is None else torch.as_tensor(one, device=device) for one in (batch.tokens, batch.segments)
        )
        narrow = in_precision(params, recipe.precision)
        found: torch.Tensor = transformer.loss(narrow, tokens, config, segments=segments, z_loss=z_loss, run=run)
        return found

    return params, loss


def many_devices(params: Tree, config: Config, recipe: Recipe) -> tuple[Tree, Loss]:
    """The same over the processes of the default group, the parameters in shards."""
    from .distributed_torch import shard

    if recipe.compile:
        raise ValueError("compile: got true; on many devices torch runs the layers as they are, so set it to false")
    precision = None if recipe.precision == "float32" else recipe.precision
    model = shard(config, recipe.parallel, params=params, remat=recipe.remat, precision=precision)
    return model.params, lambda batch, z_loss: model.loss(batch.tokens, batch.segments, z_loss)
