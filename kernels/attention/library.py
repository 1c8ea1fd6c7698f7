"""Attention by the framework's own op: torch's `scaled_dot_product_attention`, XLA's `dot_product_attention`.

Differentiable as the framework differentiates it. Masks and biases reach the framework's op as one array, built here;
what that op cannot do (the logsumexp, sinks, other changes of the scores) is built from smaller ops.
"""

from __future__ import annotations

from math import inf
from typing import Any

from ..tiles.expressions import SCORE, Expression, functions_of, leaves
from . import library_dense as dense
from . import library_packed as packed
from .library_dense import Framework
from .spec import AttentionInputs, AttentionSpec


def forward(spec: AttentionSpec, q: Any, k: Any, v: Any, *others: Any) -> tuple[Any, Any]:
    """out and, where the spec asks for it, lse."""
    in_torch = type(q).__module__.startswith("torch") or not hasattr(q, "aval")
    if _is_plain(spec, *others) and k.shape[1]:
        if in_torch:
            return _torch(spec, q, k, v), None
        if spec.v_dim == spec.head_dim and (not spec.causal or q.shape[1] == k.shape[1]):
            return _jax(spec, q, k, v), None
    return _forward(_torch_framework(q) if in_torch else _jax_framework(), spec, AttentionInputs(q, k, v, *others))


def _is_plain(
    spec: AttentionSpec,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    sinks: Any = None,
    *planes: Any,
) -> bool:
    """Whether the call has nothing but q, k, v, a scale and causality; what nothing reads does not count."""
    return (
        not spec.return_lse
        and not spec.dropout
        and not spec.is_float8
        and spec.score is spec.mask is spec.window_left is spec.window_right is None
        and q_lengths is kv_lengths is cu_seqlens_q is sinks is None
    )


def _torch(spec: AttentionSpec, q: Any, k: Any, v: Any) -> Any:
    import torch

    scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention
    q_len, kv_len = q.shape[1], k.shape[1]
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210 (a bool, where torch.compile has a SymBool)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not spec.causal or q_len == 1:
        out = scaled_dot_product_attention(q, k, v, scale=spec.scale, enable_gqa=grouped)
    elif q_len == kv_len:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
    elif q_len > kv_len:  # the first queries see no key; the others are a square
        blind = q.new_zeros((*q.shape[:2], q_len - kv_len, spec.v_dim))
        seen = q[:, :, q_len - kv_len :]
        out = scaled_dot_product_attention(seen, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
        out = torch.cat((blind, out), dim=2)
    else:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _jax(spec: AttentionSpec, q: Any, k: Any, v: Any) -> Any:
    import jax

    return jax.nn.dot_product_attention(q, k, v, scale=spec.softmax_scale, is_causal=spec.causal)


def _forward(framework: Framework, spec: AttentionSpec, arrays: AttentionInputs) -> tuple[Any, Any]:
    """A call that has more: by the framework's op if it is nothing but masks and a bias."""
    if arrays.cu_seqlens_q is not None:
        return packed.pack(framework, arrays, *_forward(framework, spec, packed.unpack(framework, spec, arrays)))
    if spec.return_lse or spec.dropout or spec.is_float8 or arrays.sinks is not None or not arrays.k.shape[1]:
        return dense.attend(framework, spec, arrays)
    added = None if spec.score is None else _added(spec.score)
    own = _torch_masked if framework.xp.__name__ == "torch" else _jax_masked
    if (spec.score is not None and added is None) or not _fits(own, spec, arrays, added):
        return dense.attend(framework, spec, arrays)
    values = dense.readable(framework, spec, arrays)
    seen, bias = dense.visible(framework, spec, arrays, values), None
    if added is not None and added[0] == "plane":
        bias = arrays.planes[added[1]]  # in its own type
        seen = seen & (bias != -inf)
    elif added is not None:
        bias, seen = dense.evaluated(framework, spec, added, values, seen)
    q = dense.queries_seeing(framework.xp, seen, arrays.q)
    k, v = (dense.keys_seen(framework.xp, seen, array) for array in (arrays.k, arrays.v))
    return dense.queries_seeing(framework.xp, seen, own(spec, q, k, v, seen, bias)), None


def _fits(own: Any, spec: AttentionSpec, arrays: AttentionInputs, added: Expression | None) -> bool:
    """Whether the framework's op takes these arrays as exactly as smaller ops do."""
    if own is _jax_masked:
        return spec.v_dim == spec.head_dim and spec.dtype != "float64"  # its softmax is in float32
    if added is None or spec.dtype in ("float32", "float64"):
        return True
    return added[0] == "plane" and bool(arrays.planes[added[1]].dtype == arrays.q.dtype)  # it wants a bias in q's type


def _torch_masked(spec: AttentionSpec, q: Any, k: Any, v: Any, seen: Any, bias: Any) -> Any:
    """A query that sees nothing is let see everything, lest its softmax be NaN; the caller takes its result away."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    sees = seen.any(dim=3, keepdim=True)
    mask = seen | ~sees if bias is None else torch.where(seen, bias, torch.where(sees, -inf, 0.0)).to(q.dtype)
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210 (as above)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _jax_masked(spec: AttentionSpec, q: Any, k: Any, v: Any, seen: Any, bias: Any) -> Any:
    """A query that sees nothing gives a mean; the caller takes it away."""
    import jax

    bias = None if bias is None else jax.numpy.where(seen, bias, 0)
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=seen, scale=spec.softmax_scale)


def _added(score: Expression) -> Expression | None:
    """What the expression adds to the score; None if it does anything else."""
    if score[0] == "sub":
        score = ("add", score[1], ("neg", score[2]))
    if score[0] != "add":
        return None
    first, second = sorted(score[1:], key=lambda part: SCORE not in leaves(part))
    if SCORE in leaves(second):
        return None
    if first == SCORE:
        return second
    deeper = _added(first)
    return None if deeper is None else ("add", deeper, second)


def _torch_framework(q: Any) -> Framework:
    import torch

    from ..tiles.torch_functions import functions_of_torch

    def word(x: Any) -> Any:
        return x & 0xFFFFFFFF if isinstance(x, int) else x.to(torch.int64) & 0xFFFFFFFF

    return Framework(torch, functions_of_torch, torch.Tensor.detach, {"device": q.device}, word)


def _jax_framework() -> Framework:
    import jax

    def word(x: Any) -> Any:
        return jax.numpy.uint32(x) if isinstance(x, int) else x.astype(jax.numpy.uint32)

    return Framework(jax.numpy, lambda: functions_of(jax.numpy), jax.lax.stop_gradient, {}, word)
