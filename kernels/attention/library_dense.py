"""Attention from small ops that torch and jax.numpy name alike, with the scores whole.

What is hidden is selected away before it meets a product: a product of 0 with NaN is NaN, in a gradient too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, NamedTuple

from ..tiles.expressions import INDICES, SCORE, Expression, children, evaluate, plane
from ..tiles.philox import kept
from .spec import AttentionInputs, AttentionSpec


class Framework(NamedTuple):
    """What differs between torch and JAX.

    Attributes:
        xp: torch or jax.numpy.
        functions: makes the table of what an expression's ops mean.
        constant: the same array, without a gradient.
        place: the arguments that put a new array where the others are.
        word: an integer, or an array of them, as a type that holds 32 bits without a sign.
    """

    xp: Any
    functions: Callable[[], dict[str, Callable[..., Any]]]
    constant: Callable[[Any], Any]
    place: dict[str, Any]
    word: Callable[[Any], Any]


def attend(framework: Framework, spec: AttentionSpec, arrays: AttentionInputs) -> tuple[Any, Any]:
    """out and, where the spec asks for it, lse; computed in float32, or float64 where q is."""
    xp = framework.xp
    (batch, q_len, q_heads, _), (_, kv_len, kv_heads, _) = arrays.q.shape, arrays.k.shape
    wide = wide_type(xp, spec)
    values = readable(framework, spec, arrays)
    seen = visible(framework, spec, arrays, values)
    q, k = (cast(array, wide) for array in (queries_seeing(xp, seen, arrays.q), keys_seen(xp, seen, arrays.k)))
    grouped = q.reshape(batch, q_len, kv_heads, q_heads // kv_heads, spec.head_dim)
    scores = xp.einsum("bihgd,bjhd->bhgij", grouped, k).reshape(batch, q_heads, q_len, kv_len) * spec.softmax_scale
    changed = scores
    if spec.score is not None:
        changed, seen = evaluated(framework, spec, spec.score, values | {SCORE: scores}, seen)
    scores = xp.broadcast_to(cast(xp.where(seen, changed, -inf), wide), scores.shape)

    sinks = None if arrays.sinks is None else cast(arrays.sinks, wide)[:, :, None]
    peak = _peak(xp, framework.constant(scores), None if sinks is None else framework.constant(sinks))
    weights = xp.exp(scores - peak[..., None])  # [batch, q_heads, q_len, kv_len]
    total = weights.sum(-1) if sinks is None else weights.sum(-1) + xp.exp(sinks - peak)
    nothing = total == 0
    total = xp.where(nothing, 1.0, total)
    lse = xp.where(nothing, -inf, peak + xp.log(total))

    if spec.dropout:
        seed, *places = (framework.word(x) for x in (arrays.dropout_seed, *(values[name,] for name in INDICES)))
        stay = kept(seed, spec.dropout, tuple(places), framework.word, xp.where)  # type: ignore[arg-type]
        weights = xp.where(stay, weights / (1 - spec.dropout), 0)
    if spec.weight is not None:
        weights = weights * evaluate(spec.weight, values, framework.functions())
    v = cast(keys_seen(xp, seen, arrays.v), wide)
    grouped_weights = weights.reshape(batch, kv_heads, q_heads // kv_heads, q_len, kv_len)
    out = xp.einsum("bhgij,bjhd->bihgd", grouped_weights, v).reshape(batch, q_len, q_heads, spec.v_dim)
    out = queries_seeing(xp, seen, out / xp.swapaxes(total, 1, 2)[..., None])
    if arrays.value_scales is not None:
        out = out * arrays.value_scales[:, None, :, None]
    return cast(out, getattr(xp, spec.out_dtype)), lse if spec.return_lse else None


def readable(framework: Framework, spec: AttentionSpec, arrays: AttentionInputs) -> dict[Expression, Any]:
    """What expressions read: the indices, and the planes, of floats in the type that is computed in."""
    xp, wide = framework.xp, wide_type(framework.xp, spec)
    (batch, q_len, q_heads, _), kv_len = arrays.q.shape, arrays.k.shape[1]
    found: dict[Expression, Any] = {}
    for axis, (name, size) in enumerate(zip(INDICES, (batch, q_heads, q_len, kv_len), strict=True)):
        index = xp.arange(size, dtype=xp.int32, **framework.place)
        found[name,] = index.reshape([-1 if at == axis else 1 for at in range(4)])
    for slot, array in enumerate(arrays.planes):
        if array is not None:
            value = array if array.dtype in (xp.bool, xp.int32) else cast(array, wide)
            found[plane(slot)] = value if slot in spec.plane_gradients else framework.constant(value)
    return found


def visible(
    framework: Framework, spec: AttentionSpec, arrays: AttentionInputs, values: Mapping[Expression, Any]
) -> Any:
    """bool [batch or 1, q_heads or 1, q_len, kv_len]: what the window, the lengths and the mask show."""
    q_len, kv_len = arrays.q.shape[1], arrays.k.shape[1]
    i, j = values["i",], values["j",]
    q_length, kv_length = (
        size if lengths is None else framework.xp.clip(lengths, 0, size)[:, None, None, None]
        for lengths, size in ((arrays.q_lengths, q_len), (arrays.kv_lengths, kv_len))
    )
    aligned = i + (kv_length - q_length)
    seen = (i < q_length) & (j < kv_length)
    if spec.left is not None:
        seen = seen & (j >= aligned - spec.left)
    if spec.right is not None:
        seen = seen & (j <= aligned + spec.right)
    if spec.mask is not None:
        seen = seen & evaluate(spec.mask, values, framework.functions())
    return seen


def evaluated(
    framework: Framework, spec: AttentionSpec, expression: Expression, values: dict[Expression, Any], seen: Any
) -> tuple[Any, Any]:
    """What a score expression gives, and what is seen where that is not -inf.

    An expression's slope may be NaN where it is hidden, as of a logarithm of the distance to a key that comes later. So
    what it reads passes through `where(seen, x, x without a gradient)`, which selects the gradient on its way back.
    """
    functions = framework.functions()
    moving = [leaf for leaf in values if leaf == SCORE or (leaf[0] == "plane" and leaf[1] in spec.plane_gradients)]
    fixed = values | {leaf: framework.constant(values[leaf]) for leaf in moving}
    if _may_hide(expression):
        seen = seen & (evaluate(expression, fixed, functions) != -inf)
    selected = fixed | {leaf: framework.xp.where(seen, values[leaf], fixed[leaf]) for leaf in moving}
    return evaluate(expression, selected, functions), seen


def queries_seeing(xp: Any, seen: Any, array: Any) -> Any:
    """[batch, q_len, q_heads, dim] with 0 where the query sees no key."""
    return xp.where(xp.swapaxes(seen.any(3), 1, 2)[..., None], array, 0)


def keys_seen(xp: Any, seen: Any, array: Any) -> Any:
    """[batch, kv_len, kv_heads, dim] with 0 where no query sees the key."""
    seen = seen.any(2)  # [batch or 1, q_heads or 1, kv_len]
    if seen.shape[1] > 1:
        kv_heads = array.shape[2]
        seen = seen.reshape(seen.shape[0], kv_heads, seen.shape[1] // kv_heads, seen.shape[2]).any(2)
    return xp.where(xp.swapaxes(seen, 1, 2)[..., None], array, 0)


def wide_type(xp: Any, spec: AttentionSpec) -> Any:
    """The type that is computed in."""
    return xp.float64 if spec.dtype == "float64" else xp.float32


def cast(array: Any, dtype: Any) -> Any:
    """The array in that type."""
    return array.astype(dtype) if hasattr(array, "aval") else array.to(dtype)


def _may_hide(score: Expression) -> bool:
    """Whether an expression of finite scores may be -inf: not if it reads no plane and has no op with a pole."""
    if score[0] == "const":
        return bool(abs(score[1]) == inf)
    return score[0] in ("plane", "div", "log") or any(map(_may_hide, children(score)))


def _peak(xp: Any, scores: Any, sinks: Any) -> Any:
    """The largest of each row and its sink [batch, q_heads, q_len], or 0 where there is none."""
    peak = xp.amax(scores, -1) if scores.shape[-1] else scores.sum(-1) - inf
    peak = peak if sinks is None else xp.maximum(peak, sinks)
    return xp.where(peak == -inf, 0.0, peak)
