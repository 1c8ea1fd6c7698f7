"""Problems of the ops whose peer is the library: gated products, norms, the rotary embedding, linear cross-entropy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

import crosstile

from .case import Arrays, Case, Frameworks, TorchSide


@dataclass(frozen=True)
class RowsCase(Case):
    """A call of which all float arrays are differentiated. The peer is the library: the framework's own ops."""

    @abstractmethod
    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the float arrays, and under "dout" that of the result."""

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The inputs, and under "dout" the gradient of the result."""
        rng = np.random.default_rng(0)
        return {name: rng.standard_normal(size).astype(np.float32) for name, size in self.sizes().items()}

    def reference(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The result and the gradients of the definition in float64."""
        side = TorchSide()
        return self.run(
            side, {name: side.round(array, "float64") for name, array in arrays.items()}, self.public("numpy")
        )

    def run(self, side: Frameworks, arrays: Arrays, function: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The same from a framework."""
        names = [name for name in self.sizes() if name != "dout"]
        out, gradients = side.pull_back(function, [arrays[name] for name in names], arrays["dout"])
        named = {"out": out, **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}
        return {name: side.to_numpy(array) for name, array in named.items()}

    def own(self, side: Frameworks) -> Callable[..., Any]:
        """The framework's own ops, put together by the library."""
        return self.public("library")


@dataclass(frozen=True)
class GluCase(RowsCase):
    """`activation(x @ w_gate) * (x @ w_up)`."""

    op: ClassVar[str] = "glu_matmul"

    m: int
    k: int
    n: int
    activation: str

    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the float arrays."""
        weight = (self.k, self.n)
        return {"x": (self.m, self.k), "w_gate": weight, "w_up": weight, "dout": (self.m, self.n)}

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""
        return partial(crosstile.glu_matmul, activation=self.activation, implementation=implementation)


@dataclass(frozen=True)
class NormCase(RowsCase):
    """rms_norm of x + residual, or with a bias layer_norm."""

    op: ClassVar[str] = "norm"

    rows: int
    hidden: int
    bias: bool

    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the float arrays."""
        rows, columns = (self.rows, self.hidden), (self.hidden,)
        return {
            "x": rows,
            "residual": rows,
            "weight": columns,
            **({"bias": columns} if self.bias else {}),
            "dout": rows,
        }

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""

        def norm(x: Any, residual: Any, weight: Any, *bias: Any) -> Any:
            function = crosstile.layer_norm if self.bias else crosstile.rms_norm
            y, summed = function(x, weight, *bias, residual=residual, implementation=implementation)
            return y + summed

        return norm

    def terms(self, name: str) -> int:
        """A weight's gradient is a sum over the rows."""
        return self.rows if name in ("dweight", "dbias") else 1


@dataclass(frozen=True)
class RotaryCase(RowsCase):
    """q and k, turned by where they stand."""

    op: ClassVar[str] = "rotary"

    length: int
    head_dim: int
    interleaved: bool

    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the float arrays."""
        return dict.fromkeys(("x", "dout"), (2, self.length, 3, self.head_dim))

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""

        def rotary(x: Any) -> Any:
            positions = _integers(7 * np.arange(self.length, dtype=np.int32), x)
            return crosstile.rotary(x, positions, interleaved=self.interleaved, implementation=implementation)

        return rotary


@dataclass(frozen=True)
class CrossEntropyCase(RowsCase):
    """The mean loss of tokens, of which every fifth is ignored."""

    op: ClassVar[str] = "linear_cross_entropy"

    tokens: int
    features: int
    vocab: int
    softcap: float

    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the float arrays."""
        return {"hidden": (self.tokens, self.features), "weight": (self.vocab, self.features), "dout": ()}

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""
        targets = np.arange(self.tokens, dtype=np.int32) * 7 % self.vocab
        targets[::5] = -100

        def loss(hidden: Any, weight: Any) -> Any:
            options: dict[str, Any] = {"label_smoothing": 0.1, "implementation": implementation}
            return crosstile.linear_cross_entropy(
                hidden, weight, _integers(targets, hidden), softcap=self.softcap, **options
            )

        return loss


def _integers(values: np.ndarray, like: Any) -> Any:
    """The values as an array of the framework that the other is of."""
    if type(like).__module__.startswith("torch"):
        import torch

        return torch.asarray(values)
    import jax.numpy as jnp

    return jnp.asarray(values)


ROWS = (
    GluCase("gated, 21×40→51", m=21, k=40, n=51, activation="silu"),
    NormCase("rms_norm with a residual, 13×80", rows=13, hidden=80, bias=False),
    NormCase("layer_norm with a residual, 33×65", rows=33, hidden=65, bias=True),
    RotaryCase("halves, d 40", length=19, head_dim=40, interleaved=False),
    RotaryCase("interleaved, d 32", length=11, head_dim=32, interleaved=True),
    CrossEntropyCase("softcap, smoothing, 37×40→90", tokens=37, features=40, vocab=90, softcap=5.0),
)
