"""Attention to a cache of keys and values in pages: the public function, and the checks of its arguments."""

from __future__ import annotations

from typing import Any

from crosstile import arguments, dispatch, sharding
from crosstile.arguments import dtype_name, show
from crosstile.kernels.paged_attention.spec import PAGE_SIZES, QUANTIZED, PagedAttentionInputs, PagedAttentionSpec


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    *,
    q_lengths: Any = None,
    k_scales: Any = None,
    v_scales: Any = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """Attention of the newest tokens to a cache of keys and values in pages: decoding, and prefill in chunks.

    Key j of batch item b lies in row `j % page_size` of page `page_table[b, j // page_size]`. The item's queries are
    the last of its sequence: query i stands at key `i' = i + lengths[b] - q_lengths[b]`, so the keys of the queries'
    own tokens are written to the cache first, and counted in `lengths`.

    Only what some query sees is read. A table may hold anything past the pages in use, negative or huge, and pages may
    hold NaN where no key is.

    Args:
        q: `[batch, q_heads, head_dim]` for one token each, or `[batch, q_len, q_heads, head_dim]` for a chunk; float32,
            float16 or bfloat16, any strides.
        k_pages: `[num_pages, page_size, kv_heads, head_dim]`, page_size 16, 32, 64, 128 or 256; q's dtype, or int8 or
            float8_e4m3fn. `q_heads` is a multiple of `kv_heads` (grouped queries).
        v_pages: `[num_pages, page_size, kv_heads, v_dim]`, k_pages' dtype; `v_dim` may differ from `head_dim`.
        page_table: int `[batch, max_pages]`, the pages of each batch item in order; entries in use are page numbers,
            and a TPU reads the nearest page for any other.
        lengths: int `[batch]`, how many keys of each item are in the cache, from 0 to `max_pages * page_size`.
        q_lengths: int `[batch]`, how many of the q_len rows are queries; the others are padding, and give zeros. None
            means all.
        k_scales: `[kv_heads]`, a float; what lies in k_pages is multiplied by it. None is 1.
        v_scales: the same of v_pages.
        causal: query i sees key j where `j <= i'`; it makes no difference to one token.
        window: (left, right): query i sees key j where `i' - left <= j`; None for a side is unbounded. Causality is
            the only bound on the right there is.
        scale: of the scores; None means `1 / sqrt(head_dim)`.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them.
        sinks: `[q_heads]` logits that join each softmax's denominator and carry no value.
        return_lse: also return the logsumexp of each query's scores.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `PagedAttentionConfig`, the tiles of this call.

    Returns:
        out in q's dtype and shape, but for its last dimension, v_dim; with `return_lse` also lse, float32 `[batch,
        q_heads]` or `[batch, q_heads, q_len]`, the natural logarithm, sinks included. A query that sees no key gives
        out 0 and lse -inf (without sinks). It is for inference: only implementation="library" is differentiable.

    Raises:
        TypeError: arrays of two frameworks, or of a dtype that cannot be.
        ValueError: shapes that do not fit; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Kwon et al., "PagedAttention" (arXiv:2309.06180); keys split among programs as in Flash-Decoding.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> k_pages, v_pages = rng.standard_normal((2, 5, 16, 2, 8))  # 5 pages of 16 keys
    >>> page_table = np.array([[3, 1], [4, -1]])
    >>> out = paged_attention(rng.standard_normal((2, 4, 8)), k_pages, v_pages, page_table, np.array([20, 7]))
    >>> out.shape
    (2, 4, 8)
    """
    if dispatch.spreading():
        return sharding.call(paged_attention, locals())
    spec, arrays = prepare_paged_attention(
        q, k_pages, v_pages, page_table, lengths, q_lengths=q_lengths, k_scales=k_scales, v_scales=v_scales,
        causal=causal, window=window, scale=scale, softcap=softcap, sinks=sinks, return_lse=return_lse,
    )  # fmt: skip
    out, lse = dispatch.run(dispatch.OPS["paged_attention"], spec, arrays, implementation, config)
    if len(q.shape) == 3:
        out, lse = out[:, 0], lse[:, :, 0]
    return (out, lse) if return_lse else out


def prepare_paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    *,
    q_lengths: Any = None,
    k_scales: Any = None,
    v_scales: Any = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    return_lse: bool = False,
) -> tuple[PagedAttentionSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs; q gets its dimension of queries."""
    dtype = arguments.common_dtype(("q",), (q,))
    framework = dispatch.framework_of(("q", "k_pages", "v_pages"), (q, k_pages, v_pages))
    side = dispatch.glue(framework)
    if len(q.shape) == 3:
        q = q[:, None]
    arguments.check_rank("q", q.shape, 4, "[batch, q_len, q_heads, head_dim], or 3 for one token each")
    _check_pages(q, k_pages, v_pages, dtype)
    page_table, lengths = _integers("page_table", page_table, q, side), _integers("lengths", lengths, q, side)
    q_lengths = None if q_lengths is None else _integers("q_lengths", q_lengths, q, side)
    k_scales = _scales("k_scales", k_scales, q, k_pages, side)
    v_scales = _scales("v_scales", v_scales, q, k_pages, side)
    spec = PagedAttentionSpec(
        dtype,
        dtype_name(k_pages.dtype),
        q.shape[3],
        v_pages.shape[3],
        causal,
        None if scale is None else arguments.check_scale(scale),
        return_lse,
        None if window is None else _left(window, causal),
        None if softcap is None else arguments.check_softcap(softcap),
    )
    sinks = None if sinks is None else arguments.check_sinks(sinks, q, side)
    return spec, PagedAttentionInputs(q, k_pages, v_pages, page_table, lengths, q_lengths, k_scales, v_scales, sinks)


def _check_pages(q: Any, k_pages: Any, v_pages: Any, dtype: str) -> None:
    for name, pages, dim in (("k_pages", k_pages, "head_dim"), ("v_pages", v_pages, "v_dim")):
        kind = dtype_name(pages.dtype)
        if kind != dtype and kind not in QUANTIZED:
            raise TypeError(f"{name}: dtype is {kind}; it must be {dtype}, as q is, or {' or '.join(QUANTIZED)}")
        if pages.dtype != k_pages.dtype:
            raise TypeError(f"{name}: dtype is {kind}; it must be {dtype_name(k_pages.dtype)}, as k_pages is")
        arguments.check_rank(name, pages.shape, 4, f"[num_pages, page_size, kv_heads, {dim}]")
    (_, _, q_heads, head_dim), (_, page_size, kv_heads, k_dim) = q.shape, k_pages.shape
    if page_size not in PAGE_SIZES:
        raise ValueError(f"k_pages: page_size is {page_size}; it must be one of {', '.join(map(str, PAGE_SIZES))}")
    if k_dim != head_dim:
        raise ValueError(
            f"k_pages: head_dim is {k_dim} in {show(k_pages.shape)}; it must be {head_dim}, as in q {show(q.shape)}"
        )
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(
            f"v_pages: got {show(v_pages.shape)}; its pages, rows and heads must be those of k_pages "
            f"{show(k_pages.shape)}"
        )
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"k_pages: kv_heads is {kv_heads}, which does not divide q_heads {q_heads}; "
            "q_heads must be a multiple of kv_heads"
        )
    if head_dim == 0 or v_pages.shape[3] == 0:
        raise ValueError(f"{'v_pages' if head_dim else 'q'}: the last dimension is 0; it must be at least 1")


def _integers(name: str, array: Any, q: Any, side: Any) -> Any:
    """The page table or lengths, checked, as int32."""
    arguments.check_integers(name, array, q)
    form, rank = ("[batch, max_pages]", 2) if name == "page_table" else ("[batch]", 1)
    arguments.check_rank(name, array.shape, rank, form)
    if array.shape[0] != q.shape[0]:
        raise ValueError(f"{name}: got {show(array.shape)}; it must be {form} with batch {q.shape[0]}, as in q")
    return side.as_int32(array)


def _scales(name: str, scales: Any, q: Any, k_pages: Any, side: Any) -> Any:
    """float32 [kv_heads], or None."""
    if scales is None:
        return None
    dispatch.framework_of(("q", name), (q, scales))
    if (kind := dtype_name(scales.dtype)) not in arguments.FLOATS:
        raise TypeError(f"{name}: dtype is {kind}; it must be a float: convert it first")
    if tuple(scales.shape) != (k_pages.shape[2],):
        raise ValueError(f"{name}: got {show(scales.shape)}; it must be [kv_heads] = [{k_pages.shape[2]}]")
    return side.spread(scales, tuple(scales.shape), "float64" if dtype_name(q.dtype) == "float64" else "float32")


def _left(window: Any, causal: bool) -> int | None:
    left, right = arguments.check_window(window)
    if right is not None and not causal:
        raise ValueError(f"window: the right side is {right}; without causal it must be None")
    return left
