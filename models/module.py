"""The transformer as a `torch.nn.Module`, for optimizers, hooks and wrappers that want one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint, transformer
from .arrays import Tree
from .config import Config
from .stacking import Run


class Layer(nn.Module):
    """The parameters of one layer, and a call that runs it: what hooks and `fully_shard` take hold of."""

    def __init__(self, weights: Tree, run: Run = transformer.block) -> None:
        """`run` is called with the weights and the arguments of the layer: see `transformer.last_layer`."""
        super().__init__()
        self.run = run
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        """What the layer makes of the stream, and its router's logits."""
        return self.run(weights_of(self), x, *rest)


class Transformer(nn.Module):
    """A transformer whose parameters are those of `crosstile.models.transformer`, under the same names.

    >>> model = Transformer(Config.demo())
    >>> import torch
    >>> model(torch.zeros(1, 8, dtype=torch.int32)).shape
    torch.Size([1, 8, 256])
    >>> next(iter(model.state_dict()))
    'embedding'
    """

    def __init__(self, config: Config, seed: int = 0, params: Tree | None = None, run: Run = transformer.block) -> None:
        """Random weights of that seed, or those of `params`, which are shared, not copied; `run` runs a layer."""
        super().__init__()
        self.config = config
        params = transformer.init(config, seed, "torch") if params is None else params
        for name, value in params.items():
            if name == "layers":
                self.layers = nn.ModuleList(Layer(layer, run) for layer in value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: str | None = None, device: Any = None) -> Transformer:
        """The model of a Hugging Face checkpoint."""
        params, config = checkpoint.load(folder, "torch", dtype, device)
        return cls(config, params=params)

    @property
    def params(self) -> Tree:
        """The tree that the pure functions take; its leaves are this module's parameters."""
        return {**weights_of(self), "layers": [weights_of(layer) for layer in self.layers]}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int `[batch, seq]` -> float32 logits `[batch, seq, vocab]`."""
        x, _ = transformer.last_layer(self.callable_params(), tokens, self.config, run=call_layer)
        return transformer.logits(weights_of(self), x, self.config)

    def callable_params(self, of_root: Callable[[Tree], Tree] = lambda weights: weights) -> Tree:
        """The tree with the layers' modules in the place of their weights, which `call_layer` runs."""
        return {**of_root(weights_of(self)), "layers": list(self.layers)}


def weights_of(module: nn.Module) -> Tree:
    """The parameters of a module without those of its children."""
    return dict(module.named_parameters(recurse=False))


def call_layer(layer: Layer, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """Run a layer as the module that it is."""
    out: tuple[Tensor, Tensor | None] = layer(x, *rest)
    return out
