"""Partial results of attention joined by their logsumexp, by the framework's own operations.

Each part saw other keys with the same queries, as in ring attention (Liu et al., arXiv:2310.01889), Flash-Decoding, or
a prefix that many sequences share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from crosstile import dispatch

_FLOATS = ("float32", "float16", "bfloat16", "float64")


def merge_attention(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    """The attention over all keys, from results of the same queries over disjoint sets of them.

    Args:
        outs: the parts, each `[batch, q_len, q_heads, v_dim]`, as `attention(..., return_lse=True)` returns them (or
            `[tokens, q_heads, v_dim]`, as `varlen_attention` does).
        lses: their logsumexps, each `[batch, q_heads, q_len]` (or `[q_heads, tokens]`), natural logarithm. Sinks may
            be counted in one part only.

    Returns:
        out, like each part, and lse, float32 like each logsumexp; differentiable in all parts, and to be merged again.
        A query that saw no key in any part gives 0 and -inf, and zero gradients.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that is not a float.
        ValueError: no part, or shapes that do not fit; the message names the part.

    >>> import numpy as np
    >>> from crosstile import attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 6, 2, 8))
    >>> parts = [attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 4), slice(4, 6))]
    >>> out, lse = merge_attention(*zip(*parts, strict=True))
    >>> whole, whole_lse = attention(q, k, v, return_lse=True)
    >>> bool(np.allclose(out, whole) and np.allclose(lse, whole_lse))
    True
    """
    xp = _namespace(_check(outs, lses))
    wide = "float64" if _name(outs[0].dtype) == "float64" else "float32"
    lses = [xp.astype(lse, wide) for lse in lses]
    peak = xp.constant(reduce(xp.maximum, lses))
    blind = peak == -float("inf")  # seen by no part
    weights = [xp.exp(lse - xp.where(blind, 0.0, peak)) for lse in lses]
    total = xp.where(blind, 1.0, sum(weights[1:], weights[0]))
    out: Any = 0
    for part, weight, lse in zip(outs, weights, lses, strict=True):
        seen = xp.swap(lse > -float("inf"))[..., None]  # what a blind part holds does not count, NaN neither
        out = out + xp.swap(weight / total)[..., None] * xp.where(seen, xp.astype(part, wide), 0.0)
    lse = xp.where(blind, -float("inf"), xp.where(blind, 0.0, peak) + xp.log(total))
    return xp.astype(out, _name(outs[0].dtype)), lse


def _check(outs: Sequence[Any], lses: Sequence[Any]) -> str:
    """The framework of all parts."""
    if not len(outs) or len(outs) != len(lses):
        raise ValueError(f"lses: got {len(lses)} for {len(outs)} outs; there must be one for each, and at least one")
    names = (*(f"outs[{at}]" for at in range(len(outs))), *(f"lses[{at}]" for at in range(len(lses))))
    framework = dispatch.framework_of(names, (*outs, *lses))
    first, (*lead, q_len, heads, _) = _name(outs[0].dtype), _shape("outs[0]", outs[0])
    for at, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if _name(out.dtype) not in _FLOATS or _name(out.dtype) != first:
            wanted = first if first in _FLOATS else f"one of {', '.join(_FLOATS)}"
            raise TypeError(f"outs[{at}]: dtype is {_name(out.dtype)}; it must be {wanted}: convert it first")
        if _name(lse.dtype) not in _FLOATS:
            raise TypeError(f"lses[{at}]: dtype is {_name(lse.dtype)}; it must be a float: convert it first")
        if tuple(out.shape) != tuple(outs[0].shape):
            raise ValueError(f"outs[{at}]: got {list(out.shape)}; it must be {list(outs[0].shape)}, as outs[0] is")
        if tuple(lse.shape) != (*lead, heads, q_len):
            shape = [*lead, heads, q_len]
            raise ValueError(f"lses[{at}]: got {list(lse.shape)}; it must be [batch, q_heads, q_len] = {shape}")
    return framework


def _shape(name: str, out: Any) -> tuple[int, ...]:
    if len(out.shape) not in (3, 4):
        raise ValueError(f"{name}: got {list(out.shape)}; it must be [batch, q_len, q_heads, v_dim]")
    return tuple(out.shape)


def _name(dtype: Any) -> str:
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


class _Arrays:
    """NumPy's functions or jax.numpy's, by the few names that are needed."""

    def __init__(self, xp: Any) -> None:
        self.maximum, self.where, self.exp, self.log = xp.maximum, xp.where, xp.exp, xp.log

    def astype(self, array: Any, dtype: str) -> Any:
        return array.astype(dtype)

    def swap(self, array: Any) -> Any:
        """`[..., q_heads, q_len]` to `[..., q_len, q_heads]`."""
        return array.swapaxes(-1, -2)

    def constant(self, array: Any) -> Any:
        """The array, for which no gradient is wanted."""
        return array


class _Jax(_Arrays):
    def constant(self, array: Any) -> Any:
        import jax

        return jax.lax.stop_gradient(array)


class _Torch(_Arrays):
    def astype(self, array: Any, dtype: str) -> Any:
        import torch

        return array.to(getattr(torch, dtype))

    def constant(self, array: Any) -> Any:
        return array.detach()


def _namespace(framework: str) -> _Arrays:
    if framework == "torch":
        import torch

        return _Torch(torch)
    if framework == "jax":
        import jax.numpy

        return _Jax(jax.numpy)
    import numpy

    return _Arrays(numpy)
