"""The problems that `crosstile verify` sets: small, of odd sizes, in each framework and in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

import crosstile
from crosstile import mods
from crosstile.calls import PREPARE

from .case import Arrays, Case, Frameworks
from .grouped_cases import GROUPED
from .quantized_cases import QUANTIZED_CASES
from .row_cases import ROWS

_OPERANDS = ("a", "b", "bias", "residual")


@dataclass(frozen=True)
class AttentionCase(Case):
    """q `[batch, q_len, q_heads, head_dim]` against kv_len keys; causal is aligned bottom-right."""

    op: ClassVar[str] = "attention"

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
class FeaturesCase(AttentionCase):
    """The same with a window to the left, a softcap, sinks, and ALiBi's slopes as a score_mod."""

    window: int
    softcap: float

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The inputs, and under "dout" the gradient of the result."""
        rng = np.random.default_rng(1)
        beside = {"sinks": rng.standard_normal(self.q_heads), "slopes": 0.1 * rng.standard_normal(self.q_heads)}
        return {**super().arrays(), **{name: array.astype(np.float32) for name, array in beside.items()}}

    def reference(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The result and the gradients in float64."""
        from crosstile.kernels.attention import reference
        from crosstile.kernels.attention.spec import INPUTS

        spec, inputs = PREPARE["attention"](*(arrays[name] for name in "qkv"), **self._options(arrays))
        spec = replace(spec, plane_gradients=(0,))  # the slopes, for which NumPy does not ask
        outputs = reference.forward(spec, *inputs)
        found: Arrays = dict(
            zip(INPUTS, reference.backward(spec, inputs, outputs, (arrays["dout"], None)), strict=True)
        )
        found |= {"sinks": found["sinks"].sum(axis=0), "slopes": found["plane0"].ravel()}
        return {"out": outputs[0], **{f"d{name}": found[name] for name in self._names}}

    def run(self, side: Frameworks, arrays: Arrays, function: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The same from a framework."""
        out, gradients = side.pull_back(function, [arrays[name] for name in self._names], arrays["dout"])
        named = {"out": out, **{f"d{name}": gradient for name, gradient in zip(self._names, gradients, strict=True)}}
        return {name: side.to_numpy(array) for name, array in named.items()}

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""

        def attention(q: Any, k: Any, v: Any, sinks: Any, slopes: Any) -> Any:
            options = self._options({"sinks": sinks, "slopes": slopes})
            return crosstile.attention(q, k, v, **options, implementation=implementation)

        return attention

    def own(self, side: Frameworks) -> Callable[..., Any]:
        """The framework's own ops, put together by the library."""
        return self.public("library")

    def terms(self, name: str) -> int:
        """The gradients of sinks and slopes are sums over all queries, or scores, of a head."""
        scores = self.batch * self.q_len * self.kv_len
        return scores if name in ("dsinks", "dslopes") else 1

    @property
    def _names(self) -> tuple[str, ...]:
        return (*"qkv", "sinks", "slopes")

    def _options(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "window": (self.window, None),
            "softcap": self.softcap,
            "sinks": arrays["sinks"],
            "score_mod": mods.alibi(arrays["slopes"]),
        }


@dataclass(frozen=True)
class PagedCase(Case):
    """Decoding, or prefill in chunks, from pages in any order: q_len new tokens of sequences of those lengths."""

    op: ClassVar[str] = "paged_attention"

    lengths: tuple[int, ...]
    q_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The inputs; NaN in the pages where no key is."""
        rng = np.random.default_rng(0)
        most = -(-max(self.lengths) // self.page_size)
        table = rng.permutation(len(self.lengths) * most).reshape(len(self.lengths), most).astype(np.int32)
        k_pages, v_pages = rng.standard_normal((2, table.size, self.page_size, self.kv_heads, self.head_dim))
        for pages, length in zip(table, self.lengths, strict=True):
            for page, number in zip(pages, range(most), strict=True):
                used = min(max(length - number * self.page_size, 0), self.page_size)
                k_pages[page, used:] = v_pages[page, used:] = np.nan
        q = rng.standard_normal((len(self.lengths), self.q_len, self.q_heads, self.head_dim))
        floats = {"q": q, "k_pages": k_pages, "v_pages": v_pages}
        integers = {"page_table": table, "lengths": np.array(self.lengths, np.int32)}
        return {**{name: array.astype(np.float32) for name, array in floats.items()}, **integers}

    def reference(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The result in float64; there are no gradients."""
        return {"out": self.public("numpy")(**arrays)}

    def run(self, side: Frameworks, arrays: Arrays, function: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The same from a framework."""
        return {"out": side.to_numpy(function(**arrays))}

    def public(self, implementation: str) -> Callable[..., Any]:
        """crosstile's op with that implementation."""
        return partial(crosstile.paged_attention, implementation=implementation)

    def own(self, side: Frameworks) -> Callable[..., Any]:
        """The framework's own ops, put together by the library."""
        return self.public("library")


@dataclass(frozen=True)
class MatmulCase(Case):
    """`activation(a[m, k] @ b[k, n] + bias) + residual`."""

    op: ClassVar[str] = "matmul"

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


QUICK = (
    "causal, grouped, d 40", "window, softcap, sinks, ALiBi", "decoding from pages", "silu, 37×80→51",
    "gated, 21×40→51", "groups of 9, 0, 20, 1, 41×40→51",
    "rms_norm with a residual, 13×80", "halves, d 40", "softcap, smoothing, 37×40→90",
)  # fmt: skip

CASES: tuple[Case, ...] = (
    AttentionCase(
        "causal, grouped, d 40", batch=1, q_len=45, kv_len=77, q_heads=4, kv_heads=2, head_dim=40, causal=True
    ),
    AttentionCase("whole, d 64", batch=2, q_len=64, kv_len=50, q_heads=2, kv_heads=2, head_dim=64, causal=False),
    FeaturesCase(
        "window, softcap, sinks, ALiBi", batch=1, q_len=45, kv_len=61, q_heads=4, kv_heads=2, head_dim=32, causal=True,
        window=20, softcap=3.0,
    ),
    PagedCase("decoding from pages", lengths=(50, 7, 64), q_len=1, q_heads=6, kv_heads=2, head_dim=32, page_size=16),
    PagedCase("chunks from pages", lengths=(50, 33), q_len=12, q_heads=4, kv_heads=2, head_dim=40, page_size=32),
    MatmulCase("silu, 37×80→51", m=37, k=80, n=51, activation="silu"),
    MatmulCase("gelu_tanh, 64×45→96", m=64, k=45, n=96, activation="gelu_tanh"),
    *GROUPED,
    *ROWS,
    *QUANTIZED_CASES,
)  # fmt: skip
