"""Answers to what the ops compute that owe nothing to crosstile, and the rule that errors are held to.

The answers come from torch's own ops and autograd, in any precision. In float64 they are what the NumPy definition is
checked against; in the kernel's precision their error is the measure of the error that a kernel may make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from crosstile.bench.verify import EPSILON, compare

Arrays = dict[str, np.ndarray]


def visible_by_loop(q_len: int, kv_len: int, causal: bool) -> np.ndarray:
    """bool [q_len, kv_len], by the words of the definition: query i sees key j where j <= i + kv_len - q_len."""
    visible = np.zeros((q_len, kv_len), bool)
    for i in range(q_len):
        for j in range(kv_len):
            visible[i, j] = not causal or j <= i + kv_len - q_len
    return visible


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array's values in that precision, as float64."""
    return torch.from_numpy(np.array(array, np.float64)).to(getattr(torch, dtype)).double().numpy()


def attention_by_torch(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dtype: str = "float64",
) -> Arrays:
    """out, lse, dq, dk and dv by scaled_dot_product_attention, logsumexp and autograd, computed in `dtype`."""
    leaves = [_leaf(array, dtype) for array in (q, k, v)]
    heads_first = [array.transpose(1, 2) for array in leaves]
    group = q.shape[2] // k.shape[2]
    tq, tk, tv = heads_first[0], *(array.repeat_interleave(group, dim=1) for array in heads_first[1:])
    mask = torch.from_numpy(visible_by_loop(q.shape[1], k.shape[1], causal))
    scale = q.shape[3] ** -0.5 if scale is None else scale

    sees = mask.any(dim=1)
    wide = torch.float64 if dtype == "float64" else torch.float32
    scores = tq.to(wide) @ tk.to(wide).transpose(2, 3) * scale
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(~sees[:, None], 0)
    if mask.shape[1]:
        lse = torch.logsumexp(scores, dim=3).masked_fill(~sees, float("-inf"))
        out = functional.scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, scale=scale)
        out = torch.where(sees[:, None], out, 0)
    else:
        lse = scores.new_full(scores.shape[:3], float("-inf")) + 0 * scores.sum()
        out = 0 * tq.sum(dim=3, keepdim=True) + tv.new_zeros(tv.shape[3])
    loss = (out.transpose(1, 2) * _tensor(dout, dtype)).to(wide).sum()
    if dlse is not None:
        loss = loss + (torch.where(sees, lse, 0) * _tensor(dlse, "float64").to(wide)).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, map(_to_numpy, (out.transpose(1, 2), lse, *gradients)), strict=True))


def matmul_by_torch(
    a: np.ndarray,
    b: np.ndarray,
    dout: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    activation: str | None = None,
    dtype: str = "float64",
) -> Arrays:
    """out, da, db and, where the input is there, dbias and dresidual, computed in `dtype`."""
    inputs = {"a": a, "b": b, "bias": bias, "residual": residual}
    leaves = {name: _leaf(array, dtype) for name, array in inputs.items() if array is not None}
    out = leaves["a"] @ leaves["b"]
    if bias is not None:
        out = out + leaves["bias"]
    out = ACTIVATIONS[activation](out)
    if residual is not None:
        out = out + leaves["residual"]
    gradients = torch.autograd.grad(out, list(leaves.values()), _tensor(dout, dtype))
    named = {f"d{name}": _to_numpy(gradient) for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": _to_numpy(out), **named}


ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def multiples(ours: Mapping[str, Any], theirs: Arrays, exact: Arrays, dtype: str) -> dict[str, float]:
    """Each result's error as a multiple of the allowed one; over 1 is wrong."""
    return {
        name: compare(np.asarray(result, np.float64), theirs[name], exact[name], "float32" if name == "lse" else dtype)[
            1
        ]
        for name, result in ours.items()
    }


def assert_within(ours: Mapping[str, Any], theirs: Arrays, exact: Arrays, dtype: str) -> None:
    """The rule: at most twice the error of the framework's own op in the same precision, plus a floor in ulps."""
    excess = {name: multiple for name, multiple in multiples(ours, theirs, exact, dtype).items() if not multiple <= 1}
    assert not excess, f"errors as multiples of the allowed: {excess}"


def assert_equal_in_float64(ours: Mapping[str, np.ndarray], exact: Arrays, ulps: int = 256) -> None:
    """Equal but for the order of float64 sums: to so many units of the largest value, -inf in the same places."""
    for name, result in ours.items():
        expected = exact[name]
        assert result.shape == expected.shape, name
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(result[~finite], expected[~finite], err_msg=name)
        largest = np.abs(expected[finite]).max(initial=0)
        np.testing.assert_allclose(
            result[finite], expected[finite], rtol=0, atol=ulps * 2.0**-52 * max(largest, 1e-3), err_msg=name
        )


def finite_differences(function: Callable[..., float], arrays: Arrays, name: str, step: float = 1e-5) -> np.ndarray:
    """The gradient of a scalar function of named arrays by central differences, an element at a time."""
    gradient = np.zeros_like(arrays[name])
    for index in np.ndindex(gradient.shape):
        values = []
        for sign in (1, -1):
            moved = arrays[name].copy()
            moved[index] += sign * step
            values.append(function(**{**arrays, name: moved}))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float64)).to(getattr(torch, dtype))


def _leaf(array: np.ndarray, dtype: str) -> torch.Tensor:
    return _tensor(array, dtype).requires_grad_()


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


__all__ = [
    "ACTIVATIONS",
    "EPSILON",
    "Arrays",
    "assert_equal_in_float64",
    "assert_within",
    "attention_by_torch",
    "finite_differences",
    "matmul_by_torch",
    "multiples",
    "rounded",
    "visible_by_loop",
]
