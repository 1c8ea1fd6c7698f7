"""The public functions, one an op: check the arguments, make the spec, dispatch. The docstrings are the manual.

All arrays of a call come from one framework (NumPy, torch or JAX); results come back in it, on the same device and
differentiable there. `implementation` is "numpy", "triton", "pallas", "library" (the framework's own op) or None (see
`crosstile.dispatch`); `config` is the op's tile configuration, None for the library's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosstile import (
    arguments,
    dispatch,
    glu_arguments,
    grouped_arguments,
    norm_arguments,
    quantized_arguments,
    sharding,
)
from crosstile.quantization import Quantized


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
    dropout: float | None = None,
    dropout_seed: Any = None,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    scale_block: int | None = None,
    out_dtype: Any = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """Scaled dot-product attention, `softmax(scale * q @ k^T) @ v`, without the scores ever reaching memory.

    Query i stands at key `i' = i + kv_len - q_len` (aligned bottom-right), with the lengths of its own batch item where
    q_lengths or kv_lengths gives them. A score is scaled, capped, changed by score_mod, and biased, in this order; a
    key is seen where causality, the window, the lengths, mask, segment_ids and mask_mod all show it.

    Args:
        q: `[batch, q_len, q_heads, head_dim]`, float32, float16, bfloat16 or float8_e4m3fn, any strides.
        k: `[batch, kv_len, kv_heads, head_dim]`; `q_heads` is a multiple of `kv_heads` (grouped queries).
        v: `[batch, kv_len, kv_heads, v_dim]`; `v_dim` may differ from `head_dim`.
        causal: query i sees key j where `j <= i'`.
        window: (left, right): query i sees key j where `i' - left <= j <= i' + right`; None for a side is unbounded.
        scale: of the scores; None means `1 / sqrt(head_dim)`.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them.
        bias: a float array that broadcasts to `[batch, q_heads, q_len, kv_len]`, added to the scores; differentiable,
            its gradient summed over what was broadcast. -inf hides a key.
        mask: a bool array that broadcasts to the same; True = attend.
        segment_ids: int `[batch, length]`, or a pair (of the queries, of the keys); equal ids see each other. Like
            mask and the arrays that a mask_mod reads they may be NumPy's beside q of torch or JAX: then the host knows
            them, and the kernels skip the tiles that they hide.
        q_lengths: int `[batch]`; queries from there on are padding, and give zeros.
        kv_lengths: int `[batch]`; keys from there on are padding, and are not seen.
        sinks: `[q_heads]` logits that join each softmax's denominator and carry no value (Xiao et al.,
            arXiv:2309.17453); differentiable.
        score_mod: `f(score, b, h, i, j)`, a changed score; see `crosstile.mods`.
        mask_mod: `f(b, h, i, j)`, whether query i sees key j; see `crosstile.mods`.
        dropout: the share of the weights that is dropped, from 0 to less than 1; those that stay are divided by
            `1 - dropout`. The logsumexp is that of all. None drops nothing.
        dropout_seed: an integer of up to 64 bits, or an integer array of one, or of its two words [2]: which weights
            are dropped is a function of it and of (b, h, i, j), in every implementation and on every chip
            (`kernels/tiles/philox.py`).
        q_scale: of float8_e4m3fn arrays, by what q was divided: float `[batch, q_heads]`, or with scale_block
            `[batch, q_heads, blocks]`; None is 1. Such arrays have a forward only, on sm_90, sm_100, gfx950 and v7x.
        k_scale: that of k, by key head.
        v_scale: that of v, by key head.
        scale_block: the tokens that share a scale; None: a head's all.
        out_dtype: of the result of float8 arrays: bfloat16 (None), float16 or float32.
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
    if dispatch.spreading():
        return sharding.call(attention, locals())
    beside: dict[str, Any] = {}
    nothing = (
        softcap is bias is mask is segment_ids is q_lengths is kv_lengths is sinks is score_mod is mask_mod is None
    )
    if not (nothing and q_scale is k_scale is v_scale is scale_block is out_dtype is None and not dropout):
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
            "dropout": dropout or None,
            "dropout_seed": dropout_seed if dropout else None,
            "q_scale": q_scale,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "scale_block": scale_block,
            "out_dtype": out_dtype,
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
    dropout: float | None = None,
    dropout_seed: Any = None,
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
    if dispatch.spreading():
        return sharding.call(varlen_attention, locals())
    beside = {
        "softcap": softcap,
        "bias": bias,
        "mask": mask,
        "sinks": sinks,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
        "dropout": dropout or None,
        "dropout_seed": dropout_seed if dropout else None,
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
    precision: str | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """`activation(a @ b + bias) + residual`, in one kernel.

    Args:
        a: `[..., m, k]`, float32, float16 or bfloat16, any strides.
        b: `[k, n]`, or `[..., k, n]` whose leading dimensions broadcast with a's; a's dtype, or a `Quantized` weight of
            `quantize`, which has no gradient, and whose rounding of a the gradient of a passes as if it were none.
        bias: `[n]`, added before the activation; a's dtype.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu", computed in float32.
        residual: broadcasts to the result, added after the activation; a's dtype.
        out_dtype: of the result, a dtype of the arrays' framework or its name; None means a's dtype.
        precision: how float32 is multiplied, forward and backward: None, as float32; or from narrower parts that the
            matrix units take, with an error of a product beside `|a| @ |b|` of at most 2**-9 ("tf32"), 2**-14
            ("bf16x3"), 2**-20 ("tf32x3") or 2**-22 ("bf16x6"). AMD GPUs have no tf32, and TPUs none either; there
            None is "bf16x6". "library" and "numpy" multiply float32 whatever it says.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `MatmulConfig`, the tiles of this call; beside a `Quantized` a `QuantizedMatmulConfig`.

    Returns:
        `[..., m, n]` in `out_dtype`, summed in float32; differentiable in a, b, bias and residual.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that is not a float.
        ValueError: shapes that do not fit, an unknown activation or precision, or a precision with arrays other than
            float32; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    >>> import numpy as np
    >>> a, b = np.ones((2, 3, 4), np.float32), np.ones((4, 5), np.float32)
    >>> matmul(a, b, bias=-6 * np.ones(5, np.float32), activation="relu", residual=np.ones(5, np.float32)).max()
    np.float32(1.0)
    """
    if dispatch.spreading():
        return sharding.call(matmul, locals())
    epilogue = {"bias": bias, "activation": activation, "residual": residual, "out_dtype": out_dtype}
    if isinstance(b, Quantized):
        of_codes, arrays = quantized_arguments.prepare_quantized_matmul(a, b, **epilogue, precision=precision)
        return dispatch.run(dispatch.OPS["quantized_matmul"], of_codes, arrays, implementation, config)[0]
    spec, arrays = arguments.prepare_matmul(a, b, **epilogue, precision=precision)
    return dispatch.run(dispatch.OPS["matmul"], spec, arrays, implementation, config)[0]


def glu_matmul(
    x: Any,
    w_gate: Any,
    w_up: Any,
    *,
    activation: str = "silu",
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """`activation(x @ w_gate) * (x @ w_up)`, in one kernel that reads x once.

    Args:
        x: `[..., m, k]`, float32, float16 or bfloat16, any strides.
        w_gate: `[k, n]`, x's dtype, any strides: the weight `[n, k]` of a `torch.nn.Linear` comes as `weight.T`.
        w_up: `[k, n]`, the same.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu", computed in float32.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `GluMatmulConfig`, the tiles of this call.

    Returns:
        `[..., m, n]` of x's dtype, summed and gated in float32 and rounded once; differentiable in x, w_gate and w_up.
        A call that is to be differentiated also keeps both products, in x's dtype.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that is not a float.
        ValueError: shapes that do not fit, or an unknown activation; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202).

    >>> import numpy as np
    >>> x, w_gate, w_up = np.ones((2, 3)), np.eye(3, 4), 2 * np.ones((3, 4))
    >>> glu_matmul(x, w_gate, w_up, activation="relu")[0].tolist()
    [6.0, 6.0, 6.0, 0.0]
    """
    if dispatch.spreading():
        return sharding.call(glu_matmul, locals())
    spec, arrays = glu_arguments.prepare_glu_matmul(x, w_gate, w_up, activation=activation)
    return dispatch.run(dispatch.OPS["glu_matmul"], spec, arrays, implementation, config)[0]


def grouped_matmul(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    *,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """Each group of rows of lhs times a matrix of its own, in one kernel: the experts of a mixture.

    The first `group_sizes[0]` rows are multiplied with `rhs[0]`, the next `group_sizes[1]` with `rhs[1]`, and so on.
    The sizes are read on the device, and never by the host.

    Args:
        lhs: `[tokens, k]`, float32, float16 or bfloat16, any strides.
        rhs: `[groups, k, n]`, lhs' dtype, any strides: weights `[groups, n, k]` come as `weights.swapaxes(1, 2)`. Or
            what `crosstile.quantize` made of it, without activations.
        group_sizes: int `[groups]`, none negative, some may be 0; their sum is at most tokens. (Of NumPy's arrays that
            is checked. Elsewhere a negative size counts as 0, and rows that lhs does not have are left out.)
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `GroupedMatmulConfig`, the tiles of this call.

    Returns:
        `[tokens, n]` of lhs' dtype, summed in float32; differentiable in lhs and rhs, of which a quantised one is
        frozen. The rows past the sum of the sizes are 0, and so are their gradients, whatever these rows hold; the
        gradient of an empty group's matrix is 0.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that cannot be.
        ValueError: shapes or sizes that do not fit; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Gale et al., "MegaBlocks" (arXiv:2211.15841), who give experts products of their own sizes.

    >>> import numpy as np
    >>> lhs, rhs = np.ones((4, 2)), np.stack([np.eye(2), 5 * np.eye(2), 7 * np.eye(2)])
    >>> grouped_matmul(lhs, rhs, np.array([1, 0, 2]))[:, 0].tolist()
    [1.0, 7.0, 7.0, 0.0]
    """
    if dispatch.spreading():
        return sharding.call(grouped_matmul, locals())
    spec, arrays = grouped_arguments.prepare_grouped_matmul(lhs, rhs, group_sizes)
    return dispatch.run(dispatch.OPS["grouped_matmul"], spec, arrays, implementation, config)[0]


def grouped_glu_matmul(
    x: Any,
    w_gate: Any,
    w_up: Any,
    group_sizes: Any,
    *,
    activation: str = "silu",
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """`activation(x @ w_gate) * (x @ w_up)` with matrices of each group's own, in one kernel that reads x once.

    Args:
        x: `[tokens, k]`, float32, float16 or bfloat16, any strides; its rows in groups as `grouped_matmul` has them.
        w_gate: `[groups, k, n]`, x's dtype, any strides; or what `crosstile.quantize` made of it, without activations.
        w_up: `[groups, k, n]`, the same, quantised alike.
        group_sizes: int `[groups]`, as for `grouped_matmul`.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu", computed in float32.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `GroupedMatmulConfig`, the tiles of this call.

    Returns:
        `[tokens, n]` of x's dtype, summed and gated in float32 and rounded once; 0 in the rows past the sum of the
        sizes; differentiable in x, w_gate and w_up. A call that is to be differentiated also keeps both products.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that cannot be.
        ValueError: shapes or sizes that do not fit, or an unknown activation; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202), as the experts of a mixture.

    >>> import numpy as np
    >>> x, w_gate, w_up = np.ones((3, 2)), np.stack([np.eye(2), -np.eye(2)]), np.ones((2, 2, 2))
    >>> grouped_glu_matmul(x, w_gate, w_up, np.array([1, 1]), activation="relu")[:, 0].tolist()
    [2.0, 0.0, 0.0]
    """
    if dispatch.spreading():
        return sharding.call(grouped_glu_matmul, locals())
    spec, arrays = grouped_arguments.prepare_grouped_glu_matmul(x, w_gate, w_up, group_sizes, activation=activation)
    return dispatch.run(dispatch.OPS["grouped_matmul"], spec, arrays, implementation, config)[0]


def rms_norm(
    x: Any,
    weight: Any,
    *,
    eps: float = 1e-6,
    residual: Any = None,
    zero_centered: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """`x / sqrt(mean(x^2) + eps) * weight` along the last dimension, in one kernel.

    Args:
        x: `[..., hidden]`, float32, float16 or bfloat16, any strides.
        weight: `[hidden]`, x's dtype.
        eps: added under the root, from 0.
        residual: x's shape and dtype. Then `x + residual`, rounded to x's dtype, is normalised, and returned too: the
            residual stream of a transformer moves on without a kernel of its own.
        zero_centered: rows are scaled by `1 + weight`, as Gemma's are.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `NormConfig`, the tiles of this call.

    Returns:
        y of x's shape and dtype, or with a residual (y, `x + residual`); computed in float32, rounded once,
        differentiable in x, weight and residual.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that is not a float.
        ValueError: shapes that do not fit; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467).

    >>> import numpy as np
    >>> x = np.array([[3.0, 4.0]])
    >>> y, summed = rms_norm(x, np.ones(2), eps=0.0, residual=x)
    >>> y.round(4).tolist(), summed.tolist()
    ([[0.8485, 1.1314]], [[6.0, 8.0]])
    """
    if dispatch.spreading():
        return sharding.call(rms_norm, locals())
    spec, arrays = norm_arguments.prepare_rms_norm(x, weight, eps=eps, residual=residual, zero_centered=zero_centered)
    y, summed = dispatch.run(dispatch.OPS["norm"], spec, arrays, implementation, config)
    return y if residual is None else (y, summed.reshape(x.shape))


def layer_norm(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    residual: Any = None,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` along the last dimension, in one kernel.

    Args:
        x: `[..., hidden]`, float32, float16 or bfloat16, any strides.
        weight: `[hidden]`, x's dtype.
        bias: `[hidden]`, x's dtype, or None.
        eps: added under the root, from 0.
        residual: x's shape and dtype. Then `x + residual`, rounded to x's dtype, is normalised, and returned too.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `NormConfig`, the tiles of this call.

    Returns:
        y of x's shape and dtype, or with a residual (y, `x + residual`); computed in float32, rounded once,
        differentiable in x, weight, bias and residual. The variance is that of the whole row (divided by hidden).

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that is not a float.
        ValueError: shapes that do not fit; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Ba, Kiros & Hinton, "Layer Normalization" (arXiv:1607.06450).

    >>> import numpy as np
    >>> layer_norm(np.array([1.0, 3.0]), np.ones(2), np.array([5.0, 5.0]), eps=0.0).tolist()
    [4.0, 6.0]
    """
    if dispatch.spreading():
        return sharding.call(layer_norm, locals())
    spec, arrays = norm_arguments.prepare_layer_norm(x, weight, bias, eps=eps, residual=residual)
    y, summed = dispatch.run(dispatch.OPS["norm"], spec, arrays, implementation, config)
    return y if residual is None else (y, summed.reshape(x.shape))


def rotary(
    x: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    scaling: Any = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """Rotary position embedding: pair j of a head at position p turned by the angle `p * frequency(j)`, in one kernel.

    The frequency of pair j is `base ** (-2 j / rotary_dim)`, stretched by scaling. Frequencies and angles are float32
    and computed as Hugging Face transformers does, since models are trained on their rounding.

    Args:
        x: `[batch, length, heads, head_dim]`, float32, float16 or bfloat16, any strides; or a pair (q, k) of these, of
            different numbers of heads, which one kernel rotates together.
        positions: int `[batch, length]`, or `[length]` for all alike.
        base: of the frequencies, also known as rope_theta.
        scaling: None, or a `Llama3Scaling`, `YarnScaling` or `LinearScaling` of `crosstile.kernels.rotary.spec`, or the
            `rope_scaling` (`rope_parameters`) dict of a Hugging Face config. rope_theta in it is not read: pass base.
        interleaved: a pair is two neighbours, (2 j, 2 j + 1), as in GPT-J; otherwise (j, j + rotary_dim / 2), as in
            GPT-NeoX and Llama.
        rotary_dim: how many leading elements of each head are rotated; the others pass as they are. None means all.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `RotaryConfig`, the tiles of this call.

    Returns:
        x rotated, of its shape and dtype, or the pair; computed in float32, rounded once, differentiable in x.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that cannot be.
        ValueError: shapes that do not fit, or a scaling that lacks something; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Su et al., "RoFormer" (arXiv:2104.09864).

    >>> import numpy as np
    >>> x = np.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rotary(x, np.array([1])).ravel().round(4).tolist()  # (cos 1, sin 1)
    [0.5403, 0.8415]
    """
    if dispatch.spreading():
        return sharding.call(rotary, locals())
    from crosstile.rotary_arguments import prepare_rotary  # which needs NumPy

    spec, arrays = prepare_rotary(
        x, positions, base=base, scaling=scaling, interleaved=interleaved, rotary_dim=rotary_dim
    )
    rotated, rotated_k = dispatch.run(dispatch.OPS["rotary"], spec, arrays, implementation, config)
    return (rotated, rotated_k) if isinstance(x, tuple | list) else rotated
