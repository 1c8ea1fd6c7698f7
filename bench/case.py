"""What a problem of `crosstile verify` is, and what it asks of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

Arrays = dict[str, Any]


class Frameworks(Protocol):
    """What verification asks of a framework."""

    name: str

    def round(self, array: np.ndarray, dtype: str) -> Any:
        """The array as the framework's, floats in that precision."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """As NumPy's, floats in float64."""

    def pull_back(
        self, function: Callable[..., Any], inputs: Sequence[Any], gradient: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        """The function's result, and the gradients of its inputs."""

    def attention(self, q: Any, k: Any, v: Any, visible: np.ndarray) -> Any:
        """The framework's own attention, in the layout of crosstile."""

    def activate(self, name: str | None, x: Any) -> Any:
        """The framework's own activation."""


class TorchSide:
    """torch on the CPU."""

    name = "torch"

    def round(self, array: np.ndarray, dtype: str) -> Any:
        import torch

        tensor = torch.from_numpy(array)
        return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor

    def to_numpy(self, array: Any) -> np.ndarray:
        return array.detach().double().numpy() if array.is_floating_point() else array.numpy()

    def pull_back(
        self, function: Callable[..., Any], inputs: Sequence[Any], gradient: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        import torch

        leaves = [array.detach().clone().requires_grad_() for array in inputs]
        out = function(*leaves)
        return out, torch.autograd.grad(out, leaves, gradient.to(out.dtype))

    def attention(self, q: Any, k: Any, v: Any, visible: np.ndarray) -> Any:
        import torch

        q, k, v = (array.transpose(1, 2) for array in (q, k, v))
        mask = torch.from_numpy(visible)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    def activate(self, name: str | None, x: Any) -> Any:
        import torch.nn.functional as F

        if name == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        return getattr(F, name)(x) if name else x


class JaxSide:
    """JAX on the CPU."""

    name = "jax"

    def round(self, array: np.ndarray, dtype: str) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(array).astype(dtype) if array.dtype.kind == "f" else jnp.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array) if array.dtype.kind == "i" else np.asarray(array.astype("float32"), np.float64)

    def pull_back(
        self, function: Callable[..., Any], inputs: Sequence[Any], gradient: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        import jax

        out, pull = jax.vjp(function, *inputs)
        return out, pull(gradient.astype(out.dtype))

    def attention(self, q: Any, k: Any, v: Any, visible: np.ndarray) -> Any:
        import jax

        return jax.nn.dot_product_attention(q, k, v, mask=visible[None, None])

    def activate(self, name: str | None, x: Any) -> Any:
        import jax

        if name in ("gelu", "gelu_tanh"):
            return jax.nn.gelu(x, approximate=name == "gelu_tanh")
        return getattr(jax.nn, name)(x) if name else x


def frameworks(names: Sequence[str]) -> Iterator[Frameworks]:
    """Those of that name; nothing is imported yet."""
    return (side for side in (TorchSide(), JaxSide()) if side.name in names)


@dataclass(frozen=True)
class Case(ABC):
    """One problem of an op; `op` is its folder in `crosstile.kernels`."""

    op: ClassVar[str]

    name: str

    @abstractmethod
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The inputs, and under "dout" the gradient of the result."""

    @abstractmethod
    def reference(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The result and the gradients, if it has any, in float64."""

    @abstractmethod
    def run(self, side: Frameworks, arrays: Arrays, function: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The same from a framework."""

    @abstractmethod
    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""

    @abstractmethod
    def own(self, side: Frameworks) -> Callable[..., Any]:
        """The framework's own op, or ops."""

    def terms(self, name: str) -> int:
        """Of how many values a result is a sum beyond those of the op itself: see `compare`."""
        return 1
