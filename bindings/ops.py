"""The public functions, one an op: check the arguments, make the spec, dispatch. The docstrings are the manual.

All arrays of a call come from one framework (NumPy, torch or JAX); results come back in it, on the same device and
differentiable there. `implementation` is "numpy", "triton", "pallas", "library" (the framework's own op) or None (see
`crosstile.dispatch`); `config` is the op's tile configuration, None for the library's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, prod
from typing import Any

from crosstile import dispatch
from crosstile.kernels.attention.spec import AttentionSpec
from crosstile.kernels.matmul.spec import ACTIVATIONS, MatmulSpec

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_dtype_names: dict[Any, str] = {}  # of the dtypes that were accepted before


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """Scaled dot-product attention, `softmax(scale * q @ k^T) @ v`, without the scores ever reaching memory.

    Args:
        q: `[batch, q_len, q_heads, head_dim]`, float32, float16 or bfloat16, any strides.
        k: `[batch, kv_len, kv_heads, head_dim]`; `q_heads` is a multiple of `kv_heads` (grouped queries).
        v: `[batch, kv_len, kv_heads, v_dim]`; `v_dim` may differ from `head_dim`.
        causal: query i sees key j where `j <= i + kv_len - q_len` (aligned bottom-right).
        scale: of the scores; None means `1 / sqrt(head_dim)`.
        return_lse: also return the logsumexp of each query's scores.
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: an `AttentionConfig`, the tiles of this call.

    Returns:
        out `[batch, q_len, q_heads, v_dim]` in q's dtype; with `return_lse` also lse `[batch, q_heads, q_len]`,
        float32, natural logarithm, differentiable. A query that sees no key gives out 0, lse -inf and gradients of 0.

    Raises:
        TypeError: arrays of two frameworks, or of a dtype that is not a float.
        ValueError: shapes that do not fit; the message names the argument and what it must be.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Dao et al., "FlashAttention" (arXiv:2205.14135) and "FlashAttention-2" (arXiv:2307.08691); grouped
    queries by Ainslie et al. (arXiv:2305.13245).

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 3, 4, 8))
    >>> k, v = rng.standard_normal((2, 1, 5, 2, 8))
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((1, 3, 4, 8), (1, 4, 3))
    """
    spec, arrays = _prepare_attention(q, k, v, causal=causal, scale=scale, return_lse=return_lse)
    outputs = dispatch.run(dispatch.OPS["attention"], spec, arrays, implementation, config)
    return outputs if return_lse else outputs[0]


def _prepare_attention(
    q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None, return_lse: bool = False
) -> tuple[AttentionSpec, tuple[Any, ...]]:
    dtype = _common_dtype(("q", "k", "v"), (q, k, v))
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
            _check_rank(name, shape, 4, "[batch, length, heads, head_dim]; a single sequence wants array[None]")
    batch, _, q_heads, head_dim = q_shape
    k_batch, kv_len, kv_heads, k_dim = k_shape
    v_batch, v_len, v_heads, v_dim = v_shape
    if k_batch != batch or v_batch != batch:
        name, shape = ("k", k_shape) if k_batch != batch else ("v", v_shape)
        raise ValueError(f"{name}: batch is {shape[0]} in {_show(shape)}; it must be {batch}, as in q {_show(q_shape)}")
    if k_dim != head_dim:
        raise ValueError(f"k: head_dim is {k_dim} in {_show(k_shape)}; it must be {head_dim}, as in q {_show(q_shape)}")
    if v_len != kv_len or v_heads != kv_heads:
        raise ValueError(f"v: got {_show(v_shape)}; its length and heads must be those of k {_show(k_shape)}")
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"k: kv_heads is {kv_heads}, which does not divide q_heads {q_heads}; "
            f"q_heads must be a multiple of kv_heads"
        )
    if head_dim == 0 or v_dim == 0:
        raise ValueError(f"{'v' if head_dim else 'q'}: the last dimension is 0; it must be at least 1")
    if scale is not None:
        scale = _check_scale(scale)
    return AttentionSpec(dtype, head_dim, v_dim, causal, scale, return_lse), (q, k, v)


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
    spec, arrays = _prepare_matmul(a, b, bias=bias, activation=activation, residual=residual, out_dtype=out_dtype)
    return dispatch.run(dispatch.OPS["matmul"], spec, arrays, implementation, config)[0]


def _prepare_matmul(
    a: Any, b: Any, *, bias: Any = None, activation: str | None = None, residual: Any = None, out_dtype: Any = None
) -> tuple[MatmulSpec, tuple[Any, ...]]:
    dtype = _common_dtype(("a", "b", "bias", "residual"), (a, b, bias, residual))
    a_shape, b_shape = a.shape, b.shape
    if len(a_shape) < 2:
        raise ValueError(f"a: got rank {len(a_shape)}, {_show(a_shape)}; it must be [..., m, k] (a vector: a[None])")
    if len(b_shape) < 2:
        raise ValueError(f"b: got rank {len(b_shape)}, {_show(b_shape)}; it must be [k, n] or [..., k, n]")
    if a_shape[-1] != b_shape[-2]:
        raise ValueError(
            f"b: k is {b_shape[-2]} in {_show(b_shape)}; it must be {a_shape[-1]}, as in a {_show(a_shape)}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; it must be None or one of {', '.join(ACTIVATIONS)}")
    lead = a_shape[:-2] if len(b_shape) == 2 else _broadcast("b", b_shape[:-2], a_shape[:-2])
    if bias is not None and tuple(bias.shape) != (b_shape[-1],):
        raise ValueError(f"bias: got {_show(bias.shape)}; it must be [n] = [{b_shape[-1]}]")
    if residual is not None:
        whole = (*lead, a_shape[-2], b_shape[-1])
        if _broadcast("residual", residual.shape, whole) != whole:
            raise ValueError(f"residual: got {_show(residual.shape)}; it must broadcast to the result, {_show(whole)}")
    name = dtype if out_dtype is None else _dtype_name(out_dtype)
    if name not in _FLOATS:
        raise ValueError(f"out_dtype: got {out_dtype!r}; it must be one of {', '.join(_FLOATS)}")
    return MatmulSpec(dtype, name, activation), (a, b, bias, residual)


PREPARE: dict[str, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    "attention": _prepare_attention,
    "matmul": _prepare_matmul,
}


def canonical_attention(xp: Any, spec: Any, arrays: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """Attention's arrays are canonical as they come."""
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
        lead = _broadcast("b", b.shape[:-2], a.shape[:-2])
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


CANONICAL: dict[str, Callable[..., Any]] = {"attention": canonical_attention, "matmul": canonical_matmul}


def _common_dtype(names: tuple[str, ...], arrays: tuple[Any, ...]) -> str:
    """The dtype's name. Raises TypeError naming the array that differs, in framework or in dtype."""
    dtype = getattr(arrays[0], "dtype", None)
    for array in arrays[1:]:
        if array is not None and getattr(array, "dtype", None) is not dtype:
            break
    else:
        if dtype is not None and (name := _dtype_names.get(dtype)) is not None:
            return name
    return _check_dtypes(names, arrays)


def _check_dtypes(names: tuple[str, ...], arrays: tuple[Any, ...]) -> str:
    dispatch.framework_of(names, arrays)
    first = _dtype_name(arrays[0].dtype)
    for name, array in zip(names, arrays, strict=True):
        if array is None:
            continue
        dtype = _dtype_name(array.dtype)
        if dtype not in _FLOATS:
            raise TypeError(f"{name}: dtype is {dtype}; it must be one of {', '.join(_FLOATS)}: convert it first")
        if dtype != first:
            raise TypeError(f"{name}: dtype is {dtype}; it must be {first}, as {names[0]} is: convert one of them")
    _dtype_names[arrays[0].dtype] = first
    return first


def _dtype_name(dtype: Any) -> str:
    """ "float32" from a dtype of any framework, or from its name."""
    if isinstance(dtype, str):
        return dtype
    return getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")


def _check_rank(argument: str, shape: Any, rank: int, form: str) -> None:
    if len(shape) != rank:
        raise ValueError(f"{argument}: got rank {len(shape)}, {_show(shape)}; it must have rank {rank}, {form}")


def _check_scale(scale: Any) -> float:
    if isinstance(scale, bool) or not hasattr(scale, "__float__"):
        raise TypeError(f"scale: got {type(scale).__name__}; it must be a number or None")
    value = float(scale)
    if not isfinite(value):
        raise ValueError(f"scale: got {value}; it must be finite")
    return value


def _broadcast(argument: str, shape: Any, other: Any) -> tuple[int, ...]:
    """The common shape of two. Raises ValueError naming the argument."""
    rank = max(len(shape), len(other))
    left = (1,) * (rank - len(shape)) + tuple(shape)
    right = (1,) * (rank - len(other)) + tuple(other)
    for x, y in zip(left, right, strict=True):
        if x != y and x != 1 and y != 1:
            raise ValueError(f"{argument}: {_show(shape)} does not broadcast with {_show(other)}")
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))


def _show(shape: Any) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
