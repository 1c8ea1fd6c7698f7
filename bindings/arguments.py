"""The arguments of the public functions: checked, and made into a spec and the arrays that kernels take.

An error names the argument, what it was and what it must be, and comes before any kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import isfinite, prod
from typing import Any

from crosstile import dispatch
from crosstile.kernels.attention.spec import FLOAT8, INPUTS, AttentionInputs, AttentionSpec
from crosstile.kernels.matmul.spec import ACTIVATIONS, PRECISIONS, MatmulSpec
from crosstile.kernels.tiles.expressions import SCORE

FLOATS = ("float32", "float16", "bfloat16", "float64")
FLOATS_AND_8 = (*FLOATS, FLOAT8)
_WIDEST = 2**30  # of a window's sides: kernels add indices in 32 bits
_NOTHING_BESIDE = (None,) * (len(INPUTS) - 3)


def prepare_varlen_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> tuple[AttentionSpec, tuple[Any, ...]]:
    """The spec and the arrays of packed sequences: a batch of one, with where each sequence starts."""
    for name, array, form in (("q", q, "heads, head_dim"), ("k", k, "heads, head_dim"), ("v", v, "heads, v_dim")):
        check_rank(name, getattr(array, "shape", ()), 3, f"[tokens, {form}]")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_count(name, bound)
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    for name, array in starts.items():
        check_integers(name, array, q)
        check_rank(name, array.shape, 1, "[sequences + 1]")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or not cu_seqlens_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_k: got {show(cu_seqlens_k.shape)} where cu_seqlens_q is {show(cu_seqlens_q.shape)}; both "
            "must be [sequences + 1]"
        )
    options |= starts | {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    return prepare_attention(q[None], k[None], v[None], **options)


def prepare_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **beside: Any,
) -> tuple[AttentionSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    dtype = common_dtype(("q", "k", "v"), (q, k, v), FLOATS_AND_8)
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
            check_rank(name, shape, 4, "[batch, length, heads, head_dim]; a single sequence wants array[None]")
    batch, _, q_heads, head_dim = q_shape
    k_batch, kv_len, kv_heads, k_dim = k_shape
    v_batch, v_len, v_heads, v_dim = v_shape
    if k_batch != batch or v_batch != batch:
        name, shape = ("k", k_shape) if k_batch != batch else ("v", v_shape)
        raise ValueError(f"{name}: batch is {shape[0]} in {show(shape)}; it must be {batch}, as in q {show(q_shape)}")
    if k_dim != head_dim:
        raise ValueError(f"k: head_dim is {k_dim} in {show(k_shape)}; it must be {head_dim}, as in q {show(q_shape)}")
    if v_len != kv_len or v_heads != kv_heads:
        raise ValueError(f"v: got {show(v_shape)}; its length and heads must be those of k {show(k_shape)}")
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"k: kv_heads is {kv_heads}, which does not divide q_heads {q_heads}; "
            f"q_heads must be a multiple of kv_heads"
        )
    if head_dim == 0 or v_dim == 0:
        raise ValueError(f"{'v' if head_dim else 'q'}: the last dimension is 0; it must be at least 1")
    if scale is not None:
        scale = check_scale(scale)
    left, right = (None, None) if window is None else check_window(window)
    spec = AttentionSpec(dtype, head_dim, v_dim, causal, scale, return_lse, left, right)
    if all(value is None for value in beside.values()) and dtype != FLOAT8:  # the fast way
        return spec, (q, k, v, *_NOTHING_BESIDE)
    spec = replace(spec, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    return _prepare_beside(spec, q, k, v, **beside)


def _prepare_beside(
    spec: AttentionSpec,
    q: Any,
    k: Any,
    v: Any,
    *,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    sinks: Any = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    dropout: float | None = None,
    dropout_seed: Any = None,
    **of_float8: Any,
) -> tuple[AttentionSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call that has more than q, k and v."""
    from crosstile.scores import Scores

    framework = dispatch.framework_of(("q",), (q,))
    side = dispatch.glue(framework)
    (batch, q_len, q_heads, _), kv_len = q.shape, k.shape[1]
    shape = (batch, q_heads, q_len, kv_len)
    if cu_seqlens_q is not None:
        shape = (cu_seqlens_q.shape[0] - 1, q_heads, spec.max_seqlen_q, spec.max_seqlen_k)
    scores = Scores(framework, q, shape)
    value_scales = None
    if spec.is_float8 or any(value is not None for value in of_float8.values()):
        from crosstile.float8 import apply_scales

        spec, value_scales = apply_scales(spec, scores, (q, k, v), **of_float8)
    if softcap is not None:
        scores.cap(check_softcap(softcap))
    if score_mod is not None:
        scores.modify(score_mod)
    if bias is not None:
        scores.add(bias)
    if mask is not None:
        scores.see(mask)
    if segment_ids is not None:
        scores.see_segments(*(segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)))
    if mask_mod is not None:
        scores.see_where(mask_mod)
    lengths = {"q_lengths": q_lengths, "kv_lengths": kv_lengths}
    for name, array in lengths.items():
        if array is not None:
            check_integers(name, array, q)
            if tuple(array.shape) != (batch,):
                raise ValueError(f"{name}: got {show(array.shape)}; it must be [batch] = [{batch}]")
    integers = (q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k)
    if sinks is not None:
        sinks = check_sinks(sinks, q, side)
    spec = replace(
        spec,
        score=None if scores.score == SCORE else scores.score,
        mask=scores.mask,
        plane_gradients=scores.gradients,
        dropout=dropout or 0.0,
        has_lengths=q_lengths is not None or kv_lengths is not None,
        same_tokens=cu_seqlens_q is not None and cu_seqlens_q is cu_seqlens_k,
        weight=scores.weight,
    )
    by_item = [None if array is None else side.as_int32(array) for array in integers]
    planes = {f"plane{slot}": array for slot, array in enumerate(scores.planes)}
    seed = check_dropout(dropout, dropout_seed, q, side) if dropout else None
    return spec, AttentionInputs(*(q, k, v, *by_item, sinks, value_scales, seed), **planes)


def prepare_matmul(
    a: Any,
    b: Any,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    out_dtype: Any = None,
    precision: str | None = None,
) -> tuple[MatmulSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    dtype = common_dtype(("a", "b", "bias", "residual"), (a, b, bias, residual))
    a_shape, b_shape = a.shape, b.shape
    check_product(a_shape, b_shape)
    name = check_epilogue(a_shape, b_shape, bias, activation, residual, dtype if out_dtype is None else out_dtype)
    if precision is not None:
        check_precision(precision, dtype)
    return MatmulSpec(dtype, name, activation, precision=precision), (a, b, bias, residual)


def canonical_as_it_is(xp: Any, spec: Any, arrays: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """The arrays are canonical as they come."""
    return spec, arrays, ()


def canonical_matmul(xp: Any, spec: Any, arrays: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """The arrays with one leading batch each, and the shape to give the result.

    With b `[k, n]` all of a's leading dimensions become rows; else a and b broadcast, without a copy if strides allow.
    """
    a, b, bias, residual = arrays
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if len(b.shape) == 2:
        lead, batch, rows = a.shape[:-2], 1, prod(a.shape[:-1])
        b = b[None]
    else:
        lead = broadcast_shape("b", b.shape[:-2], a.shape[:-2])
        batch, rows = prod(lead), m
        b = xp.broadcast_to(b, (*lead, k, n)).reshape(batch, k, n)
        a = xp.broadcast_to(a, (*lead, m, k))
    shape = (*lead, m, n)
    a = a.reshape(batch, rows, k)
    if bias is not None:
        bias = xp.broadcast_to(bias, (batch, n))
    if residual is not None:
        residual = xp.broadcast_to(residual, shape).reshape(batch, rows, n)
    return spec, (a, b, bias, residual), shape


# ---- Checks


def check_product(a_shape: Any, b_shape: Any) -> None:
    """Refuse shapes that `a @ b` has not."""
    if len(a_shape) < 2:
        raise ValueError(f"a: got rank {len(a_shape)}, {show(a_shape)}; it must be [..., m, k] (a vector: a[None])")
    if len(b_shape) < 2:
        raise ValueError(f"b: got rank {len(b_shape)}, {show(b_shape)}; it must be [k, n] or [..., k, n]")
    if a_shape[-1] != b_shape[-2]:
        raise ValueError(f"b: k is {b_shape[-2]} in {show(b_shape)}; it must be {a_shape[-1]}, as in a {show(a_shape)}")


def check_epilogue(a_shape: Any, b_shape: Any, bias: Any, activation: str | None, residual: Any, out_dtype: Any) -> str:
    """The name of the result's dtype; refuses what cannot follow a product of these shapes."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; it must be None or one of {', '.join(ACTIVATIONS)}")
    lead = a_shape[:-2] if len(b_shape) == 2 else broadcast_shape("b", b_shape[:-2], a_shape[:-2])
    if bias is not None and tuple(bias.shape) != (b_shape[-1],):
        raise ValueError(f"bias: got {show(bias.shape)}; it must be [n] = [{b_shape[-1]}]")
    if residual is not None:
        whole = (*lead, a_shape[-2], b_shape[-1])
        if broadcast_shape("residual", residual.shape, whole) != whole:
            raise ValueError(f"residual: got {show(residual.shape)}; it must broadcast to the result, {show(whole)}")
    name = dtype_name(out_dtype)
    if name not in FLOATS:
        raise ValueError(f"out_dtype: got {out_dtype!r}; it must be one of {', '.join(FLOATS)}")
    return name


def check_precision(precision: Any, dtype: str) -> None:
    """Refuse a precision that there is not, or of arrays other than float32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}; it must be None or one of {', '.join(PRECISIONS)}")
    if dtype != "float32":
        raise ValueError(
            f"precision: got {precision!r} with {dtype} arrays; it must be None, for it says how float32 is multiplied"
        )


def constant(number: Any) -> Any:
    """The number, as a constant where torch.compile has made a symbol of it: what lies in a set must be known."""
    (known,) = {number}
    return known


def check_sinks(sinks: Any, q: Any, side: Any) -> Any:
    """The sinks as float32 [batch, q_heads]."""
    dispatch.framework_of(("q", "sinks"), (q, sinks))
    if dtype_name(sinks.dtype) not in FLOATS:
        raise TypeError(f"sinks: dtype is {dtype_name(sinks.dtype)}; it must be a float: convert it first")
    if tuple(sinks.shape) != (q.shape[2],):
        raise ValueError(f"sinks: got {show(sinks.shape)}; it must be [q_heads] = [{q.shape[2]}]")
    return side.spread(sinks, (q.shape[0], q.shape[2]), "float64" if dtype_name(q.dtype) == "float64" else "float32")


def check_dropout(dropout: Any, seed: Any, q: Any, side: Any) -> Any:
    """The seed as two words of 32 bits in an int32 array."""
    if isinstance(dropout, bool) or not hasattr(dropout, "__float__"):
        raise TypeError(f"dropout: got {type(dropout).__name__}; it must be a number")
    if not 0 <= float(dropout) < 1:
        raise ValueError(f"dropout: got {float(dropout)}; it must be at least 0 and less than 1")
    if seed is None:
        raise ValueError("dropout_seed: got None; with dropout it must be an integer, another one in every step")
    if not hasattr(seed, "dtype"):
        check_count("dropout_seed", seed)
        return side.words([_signed(seed), _signed(seed >> 32)], q)
    check_integers("dropout_seed", seed, q)
    if tuple(seed.shape) not in ((), (2,)):
        raise ValueError(
            f"dropout_seed: got {show(seed.shape)}; it must be one integer [], or two words of 32 bits [2]"
        )
    return side.words(seed, q)


def _signed(word: int) -> int:
    """The lowest 32 bits as an int32 has them."""
    word = word % 2**32
    return word - 2**32 if word >= 2**31 else word


def check_integers(name: str, array: Any, q: Any) -> None:
    """Refuse an array that is not of integers, or of another framework than q."""
    dispatch.framework_of(("q", name), (q, array))
    kind = dtype_name(array.dtype)
    if not kind.startswith(("int", "uint")):
        raise TypeError(f"{name}: dtype is {kind}; it must be an integer: convert it first")


def check_count(name: str, value: Any) -> None:
    """Refuse what is not a whole number from 0."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {type(value).__name__}; it must be an integer")
    if value < 0:
        raise ValueError(f"{name}: got {value}; it must not be negative")


def check_window(window: Any) -> tuple[int | None, int | None]:
    """The two sides of a window."""
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window: got {window!r}; it must be a pair (left, right), None for a side that is unbounded")
    for side, size in zip(("left", "right"), window, strict=True):
        if size is not None:
            check_count(f"window, {side}", size)
    left, right = (None if size is None else min(size, _WIDEST) for size in window)
    return left, right


def check_softcap(softcap: Any) -> float:
    """The cap as a float."""
    if isinstance(softcap, bool) or not hasattr(softcap, "__float__"):
        raise TypeError(f"softcap: got {type(softcap).__name__}; it must be a number or None")
    value = float(softcap)
    if not (isfinite(value) and value > 0):
        raise ValueError(f"softcap: got {value}; it must be finite and greater than 0 (None leaves the scores)")
    return value


def common_dtype(names: tuple[str, ...], arrays: tuple[Any, ...], kinds: tuple[str, ...] = FLOATS) -> str:
    """The dtype's name. Raises TypeError naming the array that differs, in framework or in dtype."""
    dtype = getattr(arrays[0], "dtype", None)
    for array in arrays[1:]:
        if array is not None and getattr(array, "dtype", None) is not dtype:
            break
    else:
        if dtype is not None and (name := _name_of(dtype)) in kinds:
            return name
    return _check_dtypes(names, arrays, kinds)


def _check_dtypes(names: tuple[str, ...], arrays: tuple[Any, ...], kinds: tuple[str, ...]) -> str:
    dispatch.framework_of(names, arrays)
    first = dtype_name(arrays[0].dtype)
    for name, array in zip(names, arrays, strict=True):
        if array is None:
            continue
        dtype = dtype_name(array.dtype)
        if dtype not in kinds:
            raise TypeError(f"{name}: dtype is {dtype}; it must be one of {', '.join(kinds)}: convert it first")
        if dtype != first:
            raise TypeError(f"{name}: dtype is {dtype}; it must be {first}, as {names[0]} is: convert one of them")
    return first


@dispatch.constant_in_compile
def _name_of(dtype: Any) -> str:
    return _cached_name(dtype)


@cache
def _cached_name(dtype: Any) -> str:
    return dtype_name(dtype)


def dtype_name(dtype: Any) -> str:
    """ "float32" from a dtype of any framework, or from its name."""
    if isinstance(dtype, str):
        return dtype
    return getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")


def check_rank(argument: str, shape: Any, rank: int, form: str) -> None:
    """Refuse an array of another rank; form says what it must be."""
    if len(shape) != rank:
        raise ValueError(f"{argument}: got rank {len(shape)}, {show(shape)}; it must have rank {rank}, {form}")


def check_scale(scale: Any) -> float:
    """The scale as a float."""
    if isinstance(scale, bool) or not hasattr(scale, "__float__"):
        raise TypeError(f"scale: got {type(scale).__name__}; it must be a number or None")
    value = float(scale)
    if not isfinite(value):
        raise ValueError(f"scale: got {value}; it must be finite")
    return value


def broadcast_shape(argument: str, shape: Any, other: Any) -> tuple[int, ...]:
    """The common shape of two. Raises ValueError naming the argument."""
    rank = max(len(shape), len(other))
    left = (1,) * (rank - len(shape)) + tuple(shape)
    right = (1,) * (rank - len(other)) + tuple(other)
    for x, y in zip(left, right, strict=True):
        if x != y and x != 1 and y != 1:
            raise ValueError(f"{argument}: {show(shape)} does not broadcast with {show(other)}")
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))


def show(shape: Any) -> str:
    """A shape as messages write it."""
    return "[" + ", ".join(map(str, shape)) + "]"
