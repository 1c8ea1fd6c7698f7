"""One training step in each framework: gradients, clipping, AdamW. The loop around it is in `train`.

Both are AdamW with betas 0.9 and 0.95, weight decay on the matrices alone, and gradients clipped to a global norm of 1.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from . import transformer
from .arrays import Tree, from_numpy, to_numpy, tree_leaves, tree_map_with_path
from .config import Config

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
NOT_TRAINED = "correction_bias"  # experts are chosen by it, and no gradient reaches it


class Learner(Protocol):
    """Parameters with an optimizer."""

    params: Tree

    def step(self, tokens: np.ndarray) -> float:
        """Take a step on int32 `[batch, seq + 1]`, and return the loss before it, in nats."""

    def evaluate(self, tokens: np.ndarray) -> float:
        """The loss on other tokens."""

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """All that `restore` needs beside the parameters."""

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take up what another's `optimizer_state` gave."""


class TorchLearner:
    """torch's fused AdamW."""

    def __init__(self, params: Tree, config: Config, learning_rates: np.ndarray) -> None:
        import torch

        self.params, self._config, self._learning_rates = params, config, learning_rates
        trained = {path: array for path, array in tree_leaves(params).items() if not path.endswith(NOT_TRAINED)}
        self._leaves = {path: array.requires_grad_() for path, array in trained.items()}
        matrices = [array for array in self._leaves.values() if array.ndim > 1]
        vectors = [array for array in self._leaves.values() if array.ndim == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, fused=True)
        self._torch, self._step = torch, 0

    def step(self, tokens: np.ndarray) -> float:
        """See `Learner`."""
        for group in self._optimizer.param_groups:
            group["lr"] = float(self._learning_rates[self._step])
        loss = transformer.loss(self.params, self._place(tokens), self._config)
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._leaves.values(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        return loss.item()

    def evaluate(self, tokens: np.ndarray) -> float:
        """See `Learner`."""
        with self._torch.no_grad():
            return transformer.loss(self.params, self._place(tokens), self._config).item()

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """See `Learner`."""
        moments = {path: self._optimizer.state[array] for path, array in self._leaves.items()}
        return {f"{path}.{name}": to_numpy(x) for path, state in moments.items() for name, x in state.items()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """See `Learner`."""
        for path, array in self._leaves.items():
            names = ("step", "exp_avg", "exp_avg_sq")
            self._optimizer.state[array] = {
                name: self._torch.tensor(state[f"{path}.{name}"], device=array.device) for name in names
            }
            self._step = int(state[f"{path}.step"])

    def _place(self, tokens: np.ndarray) -> Any:
        return self._torch.as_tensor(tokens, device=self.params["embedding"].device)


class JaxLearner:
    """optax's AdamW, the whole step in one program."""

    def __init__(self, params: Tree, config: Config, learning_rates: np.ndarray) -> None:
        import jax
        import optax

        table = jax.numpy.asarray(learning_rates, jax.numpy.float32)
        optimizer = optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.adamw(
                lambda step: table[step],
                *BETAS,
                weight_decay=WEIGHT_DECAY,
                mask=lambda params: tree_map_with_path(lambda _, array: array.ndim > 1, params),
            ),
        )

        def update(params: Tree, state: Any, tokens: Any) -> tuple[Tree, Any, Any]:
            loss, gradients = jax.value_and_grad(transformer.loss)(params, tokens, config)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        self.params = params
        self._state = optimizer.init(params)
        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._loss = jax.jit(lambda params, tokens: transformer.loss(params, tokens, config))
        self._tree = jax.tree_util

    def step(self, tokens: np.ndarray) -> float:
        """See `Learner`."""
        self.params, self._state, loss = self._update(self.params, self._state, tokens)
        return float(loss)

    def evaluate(self, tokens: np.ndarray) -> float:
        """See `Learner`."""
        return float(self._loss(self.params, tokens))

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """See `Learner`."""
        leaves, _ = self._tree.tree_flatten_with_path(self._state)
        return {self._tree.keystr(path): to_numpy(array) for path, array in leaves}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """See `Learner`."""
        self._state = self._tree.tree_map_with_path(
            lambda path, array: from_numpy(state[self._tree.keystr(path)], "jax", str(array.dtype)), self._state
        )


LEARNERS: dict[str, type[TorchLearner] | type[JaxLearner]] = {"torch": TorchLearner, "jax": JaxLearner}
