"""The public functions, one an op: check the arguments, make the spec, dispatch. The docstrings are the manual.

All arrays of a call come from one framework (NumPy, torch or JAX); results come back in it, on the same device and
differentiable there. `implementation` is "numpy", "triton", "pallas", "library" (the framework's own op) or None (see
`crosstile.dispatch`); `config` is the op's tile configuration, None for the library's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosstile import arguments, dispatch


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    sinks: Any = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """Scaled dot-product attention, `softmax(scale * q @ k^T) @ v`, without the scores ever reaching memory.

    Query i stands at key `i' = i + kv_len - q_len` (aligned bottom-right), with the lengths of its own batch item where
    q_lengths or kv_lengths gives them. A score is scaled, capped, changed by score_mod, and biased, in this order; a
    key is seen where causality, the window, the lengths, mask, segment_ids and mask_mod all show it.

    Args:
        q: `[batch, q_len, q_heads, head_dim]`, float32, float16 or bfloat16, any strides.
        k: `[batch, kv_len, kv_heads, head_dim]`; `q_heads` is a multiple of `kv_heads` (grouped queries).
        v: `[batch, kv_len, kv_heads, v_dim]`; `v_dim` may differ from `head_dim`.
        causal: query i sees key j where `j <= i'`.
        window: (left, right): query i sees key j where `i' - left <= j <= i' + right`; None for a side is unbounded.
        scale: of the scores; None means `1 / sqrt(head_dim)`.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them.
        bias: a float array that broadcasts to `[batch, q_heads, q_len, kv_len]`, added to the scores; differentiable,
            its gradient summed over what was broadcast. -inf hides a key.
        mask: a bool array that broadcasts to the same; True = attend.
        segment_ids: int `[batch, length]`, or a pair (of the queries, of the keys); equal ids see each other.
        q_lengths: int `[batch]`; queries from there on are padding, and give zeros.
        kv_lengths: int `[batch]`; keys from there on are padding, and are not seen.
        sinks: `[q_heads]` logits that join each softmax's denominator and carry no value (Xiao et al.,
            arXiv:2309.17453); differentiable.
        score_mod: `f(score, b, h, i, j)`, a changed score; see `crosstile.mods`.
        mask_mod: `f(b, h, i, j)`, whether query i sees key j; see `crosstile.mods`.
        return_lse: also return the logsumexp of each query's scores.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: an `AttentionConfig`, the tiles of this call.

    Returns:
        out `[batch, q_len, q_heads, v_dim]` in q's dtype; with `return_lse` also lse, float32 `[batch, q_heads,
        q_len]`, the natural logarithm, sinks included, differentiable. A query that sees no key gives out 0 and lse
        -inf (without sinks). NaN reaches nothing from padded rows of q, k and v, nor from hidden places of bias and
        mask. (A NaN in a value that a window or a mask hides from some queries of a kernel's tile reaches the tile.)

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that cannot be.
        ValueError: shapes that do not fit; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 3, 4, 8))
    >>> k, v = rng.standard_normal((2, 1, 5, 2, 8))
    >>> out, lse = attention(q, k, v, causal=True, window=(2, 0), sinks=np.zeros(4), return_lse=True)
    >>> out.shape, lse.shape
    ((1, 3, 4, 8), (1, 4, 3))
    """
    beside = {
        "softcap": softcap,
        "bias": bias,
        "mask": mask,
        "segment_ids": segment_ids,
        "q_lengths": q_lengths,
        "kv_lengths": kv_lengths,
        "sinks": sinks,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
    }
    spec, arrays = arguments.prepare_attention(
        q, k, v, causal=causal, window=window, scale=scale, return_lse=return_lse, **beside
    )
    outputs = dispatch.run(dispatch.OPS["attention"], spec, arrays, implementation, config)
    return outputs if return_lse else outputs[0]


def varlen_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    sinks: Any = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """Attention of sequences packed one after the other, each on its own; the options are those of `attention`.

    Args:
        q: `[tokens, q_heads, head_dim]`; sequence s is the rows from `cu_seqlens_q[s]` up to `cu_seqlens_q[s + 1]`.
        k: `[kv_tokens, kv_heads, head_dim]`, packed by cu_seqlens_k.
        v: `[kv_tokens, kv_heads, v_dim]`.
        cu_seqlens_q: int `[sequences + 1]`, rising from 0; a sequence may be empty.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: no sequence has more queries. Arrays of bias and mask, and kernels on a TPU, are sized by it.
        max_seqlen_k: no sequence has more keys.
        bias: broadcasts to `[sequences, q_heads, max_seqlen_q, max_seqlen_k]`; b, i and j count in each sequence.
        mask: the same, bool.

    Returns:
        out `[tokens, q_heads, v_dim]`; with `return_lse` also lse, float32 `[q_heads, tokens]`. Tokens past the last
        sequence give zeros, and a logsumexp of -inf.

    >>> import numpy as np
    >>> q = k = v = np.ones((6, 2, 8), np.float32)
    >>> starts = np.array([0, 4, 4, 5])
    >>> out = varlen_attention(q, k, v, starts, starts, max_seqlen_q=4, max_seqlen_k=4, causal=True)
    >>> out[:, 0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    """
    beside = {
        "softcap": softcap,
        "bias": bias,
        "mask": mask,
        "sinks": sinks,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
    }
    options = {"causal": causal, "window": window, "scale": scale, "return_lse": return_lse, **beside}
    lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    spec, arrays = arguments.prepare_varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **lengths, **options)
    out, lse = dispatch.run(dispatch.OPS["attention"], spec, arrays, implementation, config)
    return (out[0], lse[0]) if return_lse else out[0]


def matmul(
    a: Any,
    b: Any,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    out_dtype: Any = None,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """`activation(a @ b + bias) + residual`, in one kernel.

    Args:
        a: `[..., m, k]`, float32, float16 or bfloat16, any strides.
        b: `[k, n]`, or `[..., k, n]` whose leading dimensions broadcast with a's.
        bias: `[n]`, added before the activation; a's dtype.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu", computed in float32.
        residual: broadcasts to the result, added after the activation; a's dtype.
        out_dtype: of the result, a dtype of the arrays' framework or its name; None means a's dtype.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `MatmulConfig`, the tiles of this call.

    Returns:
        `[..., m, n]` in `out_dtype`, summed in float32; differentiable in a, b, bias and residual.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that is not a float.
        ValueError: shapes that do not fit, or an unknown activation; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    >>> import numpy as np
    >>> a, b = np.ones((2, 3, 4), np.float32), np.ones((4, 5), np.float32)
    >>> matmul(a, b, bias=-6 * np.ones(5, np.float32), activation="relu", residual=np.ones(5, np.float32)).max()
    np.float32(1.0)
    """
    spec, arrays = arguments.prepare_matmul(
        a, b, bias=bias, activation=activation, residual=residual, out_dtype=out_dtype
    )
    return dispatch.run(dispatch.OPS["matmul"], spec, arrays, implementation, config)[0]
