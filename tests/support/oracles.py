"""Answers to what the ops compute that owe nothing to crosstile, and the rule that errors are held to.

The answers come from torch's own ops and autograd, in any precision. In float64 they are what the NumPy definition is
checked against; in the kernel's precision their error is the measure of the error that a kernel may make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from crosstile.bench.verify import EPSILON, compare

Arrays = dict[str, np.ndarray]


def visible_by_loop(
    q_len: int, kv_len: int, causal: bool, window: tuple[int | None, int | None] | None = None
) -> np.ndarray:
    """bool [q_len, kv_len], by the words of the definition: query i sees key j where j <= i + kv_len - q_len."""
    left, right = window or (None, None)
    visible = np.zeros((q_len, kv_len), bool)
    for i in range(q_len):
        stands_at = i + kv_len - q_len
        for j in range(kv_len):
            visible[i, j] = (
                (not causal or j <= stands_at)
                and (left is None or stands_at - left <= j)
                and (right is None or j <= stands_at + right)
            )
    return visible


def seen_by_loop(
    sizes: tuple[int, int, int],
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    segment_ids: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """bool [batch, 1, q_len, kv_len] of sizes (batch, q_len, kv_len): `visible_by_loop` of each item's own lengths."""
    batch, q_len, kv_len = sizes
    seen = np.zeros((batch, 1, q_len, kv_len), bool)
    for b in range(batch):
        rows = q_len if q_lengths is None else min(max(int(q_lengths[b]), 0), q_len)
        columns = kv_len if kv_lengths is None else min(max(int(kv_lengths[b]), 0), kv_len)
        seen[b, 0, :rows, :columns] = visible_by_loop(rows, columns, causal, window)
        if segment_ids is not None:
            seen[b, 0] &= np.equal.outer(segment_ids[0][b], segment_ids[1][b])
    return seen


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
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    segment_ids: tuple[np.ndarray, np.ndarray] | None = None,
    mask: np.ndarray | None = None,
    softcap: float | None = None,
    bias: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> Arrays:
    """out, lse, dq, dk and dv by scaled_dot_product_attention, logsumexp and autograd, computed in `dtype`.

    With a bias also dbias, with sinks (`[q_heads]` or `[batch, q_heads]`) dsinks, both in float32 or wider. A softcap
    or sinks are beyond torch's op: then out is a softmax of scores rounded to `dtype`, with a column of sinks.
    """
    (batch, q_len, q_heads, _), kv_len = q.shape, k.shape[1]
    wide = torch.float64 if dtype == "float64" else torch.float32
    leaves = {name: _leaf(array, dtype) for name, array in {"q": q, "k": k, "v": v}.items()}
    beside = {"bias": bias, "sinks": sinks}
    leaves |= {name: _tensor(x, "float64").to(wide).requires_grad_() for name, x in beside.items() if x is not None}
    tq, tk, tv = (leaves[name].transpose(1, 2) for name in "qkv")
    tk, tv = (array.repeat_interleave(q_heads // k.shape[2], dim=1) for array in (tk, tv))
    scale = q.shape[3] ** -0.5 if scale is None else scale

    seen = seen_by_loop((batch, q_len, kv_len), causal, window, q_lengths, kv_lengths, segment_ids)
    if mask is not None:
        seen = seen & mask
    if bias is not None:
        seen = seen & (bias > -np.inf)
    see = torch.from_numpy(seen)
    sees = see.any(dim=3, keepdim=True)

    def scores(tq: torch.Tensor, tk: torch.Tensor) -> torch.Tensor:
        """With one more column, of the sinks; 0 where a row would else be all -inf."""
        found = (tq @ tk.transpose(2, 3)).to(wide) * scale
        found = found if softcap is None else softcap * torch.tanh(found / softcap)
        found = found if bias is None else found + torch.where(see, leaves["bias"], 0)
        found = found.masked_fill(~see, float("-inf"))
        if sinks is None:
            return found.masked_fill(~sees, 0)
        column = leaves["sinks"].expand(batch, q_heads)[:, :, None, None].expand(-1, -1, q_len, 1)
        return torch.cat((found, column), dim=3)

    whole = scores(tq.to(wide), tk.to(wide))
    if whole.shape[3]:
        lse = torch.logsumexp(whole, dim=3)
        lse = lse if sinks is not None else lse.masked_fill(~sees[..., 0], float("-inf"))
    else:
        lse = whole.new_full(whole.shape[:3], float("-inf")) + 0 * whole.sum()
    if not kv_len:
        out = 0 * tq.sum(dim=3, keepdim=True) + tv.new_zeros(tv.shape[3])
    elif softcap is None and sinks is None:
        added = see if bias is None else torch.where(sees, torch.where(see, leaves["bias"], float("-inf")), 0)
        out = functional.scaled_dot_product_attention(tq, tk, tv, attn_mask=added, scale=scale)
    else:
        out = torch.softmax(scores(tq, tk), dim=3)[..., :kv_len].to(tv.dtype) @ tv
    out = torch.where(sees, out, 0).transpose(1, 2)
    loss = (out * _tensor(dout, dtype)).to(wide).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse > float("-inf"), lse, 0) * _tensor(dlse, "float64").to(wide)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = {f"d{name}": _to_numpy(gradient) for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": _to_numpy(out), "lse": _to_numpy(lse), **named}


def packed_attention_by_torch(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray,
    starts_q: Sequence[int],
    starts_k: Sequence[int],
    *,
    bias: np.ndarray | None = None,
    **options: Any,
) -> Arrays:
    """`attention_by_torch` of each packed sequence alone, with its part of a bias; other options are shared."""
    whole: Arrays = {"out": np.zeros_like(dout), "lse": np.full_like(dlse, -np.inf)}
    whole |= {"dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    for number in range(len(starts_q) - 1):
        rows = slice(starts_q[number], starts_q[number + 1])
        columns = slice(starts_k[number], starts_k[number + 1])
        if bias is not None:
            index = [slice(None)] * 4
            for axis, part in ((0, slice(number, number + 1)), (2, _extent(rows)), (3, _extent(columns))):
                index[axis] = part if bias.shape[axis] > 1 else slice(None)
            options["bias"] = bias[tuple(index)]
        alone = attention_by_torch(q[:, rows], k[:, columns], v[:, columns], dout[:, rows], dlse[..., rows], **options)
        whole["out"][:, rows], whole["lse"][..., rows] = alone["out"], alone["lse"]
        whole["dq"][:, rows], whole["dk"][:, columns], whole["dv"][:, columns] = (alone[f"d{name}"] for name in "qkv")
        if bias is not None:
            whole.setdefault("dbias", np.zeros_like(bias))[tuple(index)] += alone["dbias"]
        if "dsinks" in alone:
            whole["dsinks"] = whole.get("dsinks", 0) + alone["dsinks"]
    return whole


def _extent(rows: slice) -> slice:
    return slice(0, rows.stop - rows.start)


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
    "packed_attention_by_torch",
    "rounded",
    "seen_by_loop",
    "visible_by_loop",
]
