"""The reference transformer of crosstile: one definition for NumPy, torch and JAX, with training and generation.

>>> import numpy as np
>>> from crosstile.models import Config, forward, init
>>> config = Config.demo()
>>> forward(init(config, framework="numpy"), np.zeros((1, 8), np.int32), config).shape
(1, 8, 256)
"""

from typing import TYPE_CHECKING, Any

from .checkpoint import load, save
from .config import Config
from .generate import generate
from .tokenizer import load_tokenizer
from .train import Result, train
from .transformer import forward, init, loss, quantize

if TYPE_CHECKING:
    from .module import Transformer

__all__ = [
    "Config",
    "Result",
    "Transformer",
    "forward",
    "generate",
    "init",
    "load",
    "load_tokenizer",
    "loss",
    "quantize",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    """`Transformer`, which needs torch, when it is first asked for."""
    if name == "Transformer":
        from .module import Transformer

        return Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
