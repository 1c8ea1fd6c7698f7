"""Attention under the names, arguments and layouts of other libraries, so that existing code switches with one line.

`from crosstile.drop_ins import scaled_dot_product_attention` in place of torch's; and so `flex_attention`,
`flash_attn_func`, `flash_attn_varlen_func`, jax.nn's `dot_product_attention`, and `register_with_transformers` for
`attn_implementation="crosstile"`. An option that cannot be honoured is an `UnsupportedError` that names it. What runs
is chosen as ever: by device, by `crosstile.use`, or by the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from crosstile import mods
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.ops import attention, varlen_attention
from crosstile.torch_mods import mask_mod_of, recorded
from crosstile.transformers import register_with_transformers

__all__ = [
    "dot_product_attention", "flash_attn_func", "flash_attn_varlen_func", "flex_attention",
    "register_with_transformers", "scaled_dot_product_attention",
]  # fmt: skip


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: `[..., q_heads, q_len, head_dim]`, any number of leading dimensions, or none at all.
        key: `[..., kv_heads, kv_len, head_dim]`; what stands before the length broadcasts with query's.
        value: `[..., kv_heads, kv_len, v_dim]`.
        attn_mask: broadcasts to `[..., q_heads, q_len, kv_len]`; bool (True = attend), or a float that is added.
        dropout_p: the share of the weights that is dropped, by a seed from torch's generator; not the same ones.
        is_causal: aligned top-left, as torch's is: query i sees key j where `j <= i`.
        scale: None means `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer heads in key and value than in query.

    Returns:
        `[..., q_heads, q_len, v_dim]`.
    """
    from crosstile.torch import drawn_dropout

    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: got one beside is_causal=True; give one of the two")
    lead, arrays = _with_one_batch(query, key, value, enable_gqa)
    (_, heads, q_len, _), kv_len = arrays[0].shape, arrays[1].shape[2]
    seen: dict[str, Any] = {}
    if is_causal:
        seen = _from_top_left(q_len, kv_len, True, None)
    if attn_mask is not None:
        name = "mask" if "bool" in str(attn_mask.dtype) else "bias"
        seen = {name: _flat(attn_mask, lead, heads) if attn_mask.dim() > 3 else attn_mask}
    seen |= drawn_dropout(dropout_p, query)
    q, k, v = (array.transpose(1, 2) for array in arrays)
    out = attention(q, k, v, scale=scale, **seen)
    out = out.transpose(1, 2)
    return out.reshape(*lead, *(() if query.dim() == key.dim() == 2 else (heads,)), q_len, out.shape[-1])


def _with_one_batch(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The leading dimensions, and the three as `[batch, heads, length, dim]`."""
    import torch

    arrays = (query, key, value)
    for name, array in zip(("query", "key", "value"), arrays, strict=True):
        if array.dim() < 2:
            raise ValueError(f"{name}: got rank {array.dim()}, {list(array.shape)}; it must have rank 2 or more")
    lead = tuple(torch.broadcast_shapes(*(array.shape[:-3] for array in arrays)))
    heads = [array.shape[-3] if array.dim() > 2 else 1 for array in arrays]
    if not enable_gqa and heads != [heads[0]] * 3:
        if any(count not in (1, max(heads)) for count in heads):
            raise ValueError(f"key: heads are {heads[1]} where query has {heads[0]}; enable_gqa=True allows fewer")
        heads = [max(heads)] * 3
    return lead, tuple(_flat(array, lead, count) for array, count in zip(arrays, heads, strict=True))


def _flat(array: Any, lead: tuple[int, ...], heads: int) -> Any:
    """`[..., heads or 1, m, n]` as `[batch, heads or 1, m, n]`, with those leading dimensions as the batch."""
    if array.dim() == 4 and array.shape[:-3] == lead and array.shape[1] == heads:
        return array
    m, n = array.shape[-2:]
    return array.expand(*lead, heads, m, n).reshape(prod(lead), heads, m, n)


def flex_attention(
    query: Any,
    key: Any,
    value: Any,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention`; nothing needs to be compiled for it.

    Args:
        query: `[batch, q_heads, q_len, head_dim]`.
        key: `[batch, kv_heads, kv_len, head_dim]`; a batch of 1 serves every query.
        value: `[batch, kv_heads, kv_len, v_dim]`.
        score_mod: `f(score, b, h, q_idx, kv_idx)`, of operators, torch's pointwise functions and captured tensors (they
            are differentiable); it is recorded, as `crosstile.mods` says.
        block_mask: a torch BlockMask; its mask_mod is recorded, its blocks are not used.
        scale: None means `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer heads in key and value than in query.
        return_lse: also return the logsumexp, `[batch, q_heads, q_len]`, natural logarithm.
        kernel_options: of torch's own kernels, which are not run: those that torch documents are accepted.
        return_aux: an AuxRequest; of the logsumexp only.

    Returns:
        `[batch, q_heads, q_len, v_dim]`, or a pair of it and the logsumexp, or an AuxOutput.
    """
    from torch.nn.attention.flex_attention import AuxOutput, FlexKernelOptions

    if return_lse and return_aux is not None:
        raise ValueError("return_lse: got it beside return_aux; give one of the two")
    if return_aux is not None and return_aux.max_scores:
        raise UnsupportedError("return_aux: crosstile does not keep max_scores; ask for lse only")
    for name in kernel_options or ():
        if name.removeprefix("fwd_").removeprefix("bwd_") not in FlexKernelOptions.__annotations__:
            raise UnsupportedError(f"kernel_options: {name} is not one that torch documents")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key: heads are {key.shape[1]} where query has {query.shape[1]}; enable_gqa=True allows fewer"
        )
    mask_mod = None if block_mask is None else mask_mod_of(block_mask, query.shape[2], key.shape[2])
    if score_mod is not None:
        recorded(score_mod, "score_mod")
    if key.shape[0] == 1:
        key, value = (array.expand(query.shape[0], *array.shape[1:]) for array in (key, value))
    wants_lse = return_lse or (return_aux is not None and return_aux.lse)
    arrays = (array.transpose(1, 2) for array in (query, key, value))
    results = attention(*arrays, scale=scale, score_mod=score_mod, mask_mod=mask_mod, return_lse=wants_lse)
    out, lse = results if wants_lse else (results, None)
    out = out.transpose(1, 2)
    if return_aux is not None:
        return out, AuxOutput(lse=lse)
    return (out, lse) if return_lse else out


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn.flash_attn_func` of FlashAttention 2.

    Args:
        q: `[batch, q_len, q_heads, head_dim]`.
        k: `[batch, kv_len, kv_heads, head_dim]`.
        v: `[batch, kv_len, kv_heads, v_dim]`.
        dropout_p: the share of the weights that is dropped, by a seed from torch's generator.
        softmax_scale: None means `1 / sqrt(head_dim)`.
        causal: aligned bottom-right.
        window_size: (left, right), both inclusive, aligned bottom-right; -1 is unbounded.
        softcap: 0 is none.
        alibi_slopes: `[q_heads]` or `[batch, q_heads]`; adds `-slope * |i + kv_len - q_len - j|`.
        deterministic: it always is.
        return_attn_probs: return (out, logsumexp `[batch, q_heads, q_len]`, None).

    Returns:
        `[batch, q_len, q_heads, v_dim]`.
    """
    options = _flash_options(q, dropout_p, softmax_scale, causal, window_size, softcap, return_attn_probs)
    if alibi_slopes is not None:
        options["score_mod"] = _flash_alibi(alibi_slopes, k.shape[1] - q.shape[1])
    result = attention(q, k, v, **options)
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """`flash_attn.flash_attn_varlen_func` of FlashAttention 2; the options are those of `flash_attn_func`.

    Args:
        q: `[tokens, q_heads, head_dim]`, sequences packed one after the other.
        k: `[kv_tokens, kv_heads, head_dim]`.
        v: `[kv_tokens, kv_heads, v_dim]`.
        cu_seqlens_q: int `[sequences + 1]`, where each sequence starts, and the end.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: the longest sequence's number of queries.
        max_seqlen_k: and of keys.
        alibi_slopes: `[q_heads]` or `[sequences, q_heads]`.
        return_attn_probs: return (out, logsumexp `[q_heads, tokens]`, None).
        block_table: must be None: keys in pages are `crosstile.paged_attention`.

    Returns:
        `[tokens, q_heads, v_dim]`.
    """
    if block_table is not None:
        raise UnsupportedError(
            "block_table: this function takes packed keys only; pages go to crosstile.paged_attention"
        )
    options = _flash_options(q, dropout_p, softmax_scale, causal, window_size, softcap, return_attn_probs)
    if alibi_slopes is not None:
        lengths_q, lengths_k = (starts[1:] - starts[:-1] for starts in (cu_seqlens_q, cu_seqlens_k))
        options["score_mod"] = _flash_alibi(alibi_slopes, mods.array(lengths_k - lengths_q))
    options |= {"max_seqlen_q": int(max_seqlen_q), "max_seqlen_k": int(max_seqlen_k)}
    result = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    return (*result, None) if return_attn_probs else result


def _flash_options(
    q: Any,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_attn_probs: bool,
) -> dict[str, Any]:
    from crosstile.torch import drawn_dropout

    left, right = (None if size < 0 else size for size in window_size)
    return {
        "causal": causal,
        "window": None if left is None and right is None else (left, right),
        "scale": softmax_scale,
        "softcap": softcap or None,
        "return_lse": return_attn_probs,
        **drawn_dropout(dropout_p, q),
    }


def _flash_alibi(slopes: Any, offset: Any) -> mods.Mod:
    """`-slope * |i + offset - j|`; offset is a number, or an array with one for each sequence."""
    held = mods.array(slopes)

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        slope = held[h] if len(held.held.shape) == 1 else held[b, h]
        moved = i + (offset[b] if isinstance(offset, mods.Captured) else offset)
        return score - slope * abs(moved - j)

    return score_mod


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`.

    Args:
        query: `[batch, q_len, q_heads, head_dim]`, or without batch.
        key: `[batch, kv_len, kv_heads, head_dim]`, or without batch.
        value: `[batch, kv_len, kv_heads, v_dim]`, or without batch.
        bias: broadcasts to `[batch, q_heads, q_len, kv_len]`; added to the scaled scores.
        mask: bool, the same; True = attend.
        scale: None means `1 / sqrt(head_dim)`.
        is_causal: aligned top-left, as JAX's is: query i sees key j where `j <= i`, whatever the lengths.
        query_seq_lengths: int `[batch]`.
        key_value_seq_lengths: int `[batch]`.
        local_window_size: (left, right), or one number for both: `i - left <= j <= i + right`.
        implementation: None, "xla" or "cudnn": accepted, and it chooses nothing.
        return_residual: also return the logsumexp, `[batch, q_len, q_heads]` in key's dtype, without a gradient.

    Returns:
        Shaped like query, with v_dim.
    """
    import jax
    import jax.numpy as jnp

    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"implementation: got {implementation!r}; it must be None, 'xla' or 'cudnn'")

    def in_four_dimensions(array: Any) -> Any:
        return None if array is None else jnp.asarray(array).reshape((1,) * (4 - jnp.ndim(array)) + jnp.shape(array))

    without_batch = jnp.ndim(query) == 3
    q, k, v, bias, mask = map(in_four_dimensions, (query, key, value, bias, mask))
    window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    same_lengths = query_seq_lengths is key_value_seq_lengths
    results = attention(
        q,
        k,
        v,
        bias=bias,
        mask=mask,
        scale=scale,
        q_lengths=None if query_seq_lengths is None else jnp.asarray(query_seq_lengths),
        kv_lengths=None if key_value_seq_lengths is None else jnp.asarray(key_value_seq_lengths),
        return_lse=return_residual,
        **_from_top_left(q.shape[1], k.shape[1], is_causal, window, same_lengths),
    )
    if not return_residual:
        return results[0] if without_batch else results
    out, lse = results
    residual = jax.lax.stop_gradient(lse.swapaxes(1, 2).astype(k.dtype))
    return (out[0], residual[0]) if without_batch else (out, residual)


def _from_top_left(
    q_len: int, kv_len: int, causal: bool, window: tuple[int, int] | None, same_lengths: bool = True
) -> dict[str, Any]:
    """`attention`'s options for causality and a window where query i stands at key i (its own are bottom-right)."""
    if not causal and window is None:
        return {}
    if q_len == kv_len and same_lengths:
        return {"causal": causal, "window": window}
    masks = [mods.causal()] if causal else []
    masks += [] if window is None else [mods.sliding_window(*window)]
    return {"mask_mod": mods.all_of(*masks)}
