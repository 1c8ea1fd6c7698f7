"""What a framework's learner is: one training step, its state, and how it goes to disk. The loop is in `train`.

Both are AdamW in float32 with weight decay on the matrices alone; the model computes in the recipe's precision, from a
copy of the weights that is made inside of what is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .arrays import Tree, cast, tree_map_with_path
from .config import Config
from .packing import Batch
from .recipe import Recipe
from .shapes import is_matrix

NOT_TRAINED = "correction_bias"  # experts are chosen by it, and no gradient reaches it


@dataclass(frozen=True)
class Step:
    """What a step measured before it changed the weights.

    Attributes:
        loss: of its batch, in nats a token; with the z-loss and the experts' balance, where they have a weight.
        gradient_norm: before clipping.
    """

    loss: float
    gradient_norm: float


class Learner(Protocol):
    """Parameters with an optimizer."""

    @property
    def params(self) -> Tree:
        """The weights, float32, a list of all layers."""

    def step(self, batch: Batch, rate: float) -> Step:
        """Take a step at that learning rate."""

    def evaluate(self, batch: Batch) -> float:
        """The loss on another batch, in nats a token."""

    def state(self) -> Tree:
        """All that a resumed run needs: a tree of arrays, for `state_torch` or `state_jax`."""

    def restore(self, state: Tree) -> None:
        """Take up another's `state`, which has this one's shapes and places."""


def make_learner(recipe: Recipe, params: Tree, config: Config) -> Learner:
    """The learner of the recipe's framework, of float32 parameters, which it takes over.

    Raises:
        ValueError: the recipe asks for more devices than this process has a way to use.
    """
    if recipe.framework == "jax":
        from .learner_jax import JaxLearner

        return JaxLearner(params, config, recipe)
    from .learner_torch import TorchLearner

    return TorchLearner(params, config, recipe)


def in_precision(params: Tree, precision: str) -> Tree:
    """The weights in which the model computes; that by which experts are chosen stays as it is."""
    return tree_map_with_path(
        lambda path, array: array if path.endswith(NOT_TRAINED) else cast(array, precision), params
    )


def is_decayed(path: str) -> bool:
    """Whether weight decay takes that parameter: a matrix, or the embedding."""
    name = path.rpartition(".")[2]
    return is_matrix(name) or name == "embedding"
