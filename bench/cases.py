"""The problems that `crosstile verify` sets: small, of odd sizes, in each framework and in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np

import crosstile

Arrays = dict[str, Any]
_OPERANDS = ("a", "b", "bias", "residual")


class Frameworks(Protocol):
    """What verification asks of a framework."""

    name: str

    def round(self, array: np.ndarray, dtype: str) -> Any:
        """The array in that precision, as the framework's."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """In float64."""

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

        return torch.from_numpy(array).to(getattr(torch, dtype))

    def to_numpy(self, array: Any) -> np.ndarray:
        return array.detach().double().numpy()

    def pull_back(
        self, function: Callable[..., Any], inputs: Sequence[Any], gradient: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        import torch

        leaves = [array.detach().clone().requires_grad_() for array in inputs]
        out = function(*leaves)
        return out, torch.autograd.grad(out, leaves, gradient)

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

        return jnp.asarray(array, jnp.float32).astype(dtype)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array.astype("float32"), np.float64)

    def pull_back(
        self, function: Callable[..., Any], inputs: Sequence[Any], gradient: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        import jax

        out, pull = jax.vjp(function, *inputs)
        return out, pull(gradient)

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
class AttentionCase:
    """q `[batch, q_len, q_heads, head_dim]` against kv_len keys; causal is aligned bottom-right."""

    op: ClassVar[str] = "attention"

    name: str
    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The inputs, and under "dout" the gradient of the result."""
        rng = np.random.default_rng(0)
        queries = (self.batch, self.q_len, self.q_heads, self.head_dim)
        keys = (self.batch, self.kv_len, self.kv_heads, self.head_dim)
        shapes = {"q": queries, "k": keys, "v": keys, "dout": queries}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def reference(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The result and the gradients in float64."""
        from crosstile.kernels.attention import reference
        from crosstile.kernels.attention.spec import INPUTS, AttentionSpec

        spec = AttentionSpec("float64", self.head_dim, self.head_dim, causal=self.causal)
        inputs = (arrays["q"], arrays["k"], arrays["v"])
        outputs = reference.forward(spec, *inputs)
        gradients = reference.backward(spec, inputs, outputs, (arrays["dout"], None))
        named = {f"d{name}": grad for name, grad in zip(INPUTS, gradients, strict=True) if grad is not None}
        return {"out": outputs[0], **named}

    def run(self, side: Frameworks, arrays: Arrays, function: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The same from a framework."""
        out, gradients = side.pull_back(function, [arrays[name] for name in "qkv"], arrays["dout"])
        named = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
        return {name: side.to_numpy(array) for name, array in named.items()}

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""
        return partial(crosstile.attention, causal=self.causal, implementation=implementation)

    def own(self, side: Frameworks) -> Callable[..., Any]:
        """The framework's own op."""
        visible = np.ones((self.q_len, self.kv_len), bool)
        visible = np.tril(visible, self.kv_len - self.q_len) if self.causal else visible
        return lambda q, k, v: side.attention(q, k, v, visible)


@dataclass(frozen=True)
class MatmulCase:
    """`activation(a[m, k] @ b[k, n] + bias) + residual`."""

    op: ClassVar[str] = "matmul"

    name: str
    m: int
    k: int
    n: int
    activation: str | None

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The inputs, and under "dout" the gradient of the result."""
        rng = np.random.default_rng(0)
        result = (self.m, self.n)
        shapes = {"a": (self.m, self.k), "b": (self.k, self.n), "bias": (self.n,), "residual": result, "dout": result}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def reference(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The result and the gradients in float64."""
        from crosstile.kernels.matmul import reference
        from crosstile.kernels.matmul.spec import MatmulSpec

        spec = MatmulSpec("float64", "float64", self.activation, save_preactivation=True)
        a, b, bias, residual = (arrays[name][None] for name in _OPERANDS)
        outputs = reference.forward(spec, a, b, bias, residual)
        gradients = reference.backward(spec, (a, b, bias, residual), outputs, (arrays["dout"][None], None))
        named = {f"d{name}": grad[0] for name, grad in zip(_OPERANDS, gradients, strict=True) if grad is not None}
        return {"out": outputs[0][0], **named}

    def run(self, side: Frameworks, arrays: Arrays, function: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The same from a framework."""
        out, gradients = side.pull_back(function, [arrays[name] for name in _OPERANDS], arrays["dout"])
        named = {"out": out, **{f"d{name}": grad for name, grad in zip(_OPERANDS, gradients, strict=True)}}
        return {name: side.to_numpy(array) for name, array in named.items()}

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""

        def matmul(a: Any, b: Any, bias: Any, residual: Any) -> Any:
            rest = {"activation": self.activation, "residual": residual, "implementation": implementation}
            return crosstile.matmul(a, b, bias=bias, **rest)

        return matmul

    def own(self, side: Frameworks) -> Callable[..., Any]:
        """The framework's own ops."""
        return lambda a, b, bias, residual: side.activate(self.activation, a @ b + bias) + residual


Case = AttentionCase | MatmulCase

QUICK = ("causal, grouped, d 40", "silu, 37×80→51")

CASES: tuple[Case, ...] = (
    AttentionCase(
        "causal, grouped, d 40", batch=1, q_len=45, kv_len=77, q_heads=4, kv_heads=2, head_dim=40, causal=True
    ),
    AttentionCase("whole, d 64", batch=2, q_len=64, kv_len=50, q_heads=2, kv_heads=2, head_dim=64, causal=False),
    MatmulCase("silu, 37×80→51", m=37, k=80, n=51, activation="silu"),
    MatmulCase("gelu_tanh, 64×45→96", m=64, k=45, n=96, activation="gelu_tanh"),
)
