"""The transformer as a `torch.nn.Module`, for optimizers, hooks and wrappers that want one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint, transformer
from .arrays import Tree
from .config import Config


class Transformer(nn.Module):
    """A transformer whose parameters are those of `crosstile.models.transformer`, under the same names.

    >>> model = Transformer(Config.demo())
    >>> import torch
    >>> model(torch.zeros(1, 8, dtype=torch.int32)).shape
    torch.Size([1, 8, 256])
    >>> next(iter(model.state_dict()))
    'embedding'
    """

    def __init__(self, config: Config, seed: int = 0, params: Tree | None = None) -> None:
        """Random weights of that seed, or those of `params`, which are shared, not copied."""
        super().__init__()
        self.config = config
        params = transformer.init(config, seed, "torch") if params is None else params
        for name, value in params.items():
            if name == "layers":
                self.layers = nn.ModuleList(nn.ParameterDict(layer) for layer in value)
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
        layers = [dict(layer.named_parameters()) for layer in self.layers]
        return {**dict(self.named_parameters(recurse=False)), "layers": layers}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int `[batch, seq]` -> float32 logits `[batch, seq, vocab]`."""
        return transformer.forward(self.params, tokens, self.config)
