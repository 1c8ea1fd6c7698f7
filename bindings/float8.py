"""float8 queries, keys and values of attention: their scales become planes beside the scores, and one factor a head.

A scale that a block of tokens has is repeated to one a token, which costs 4 bytes beside the key's head_dim. Those of
queries and keys multiply the scores; those of values multiply the weights, as shares of a head's largest, which
multiplies the result: so that what is rounded to float8 stays in its range.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crosstile import arguments, dispatch
from crosstile.kernels.attention.spec import FLOAT8, AttentionSpec
from crosstile.scores import Scores


def apply_scales(
    spec: AttentionSpec,
    scores: Scores,
    arrays: tuple[Any, Any, Any],
    *,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    scale_block: int | None = None,
    out_dtype: Any = None,
) -> tuple[AttentionSpec, Any]:
    """The spec with the result's dtype, and the values' factor [batch, q_heads], if they have one."""
    if not spec.is_float8:
        given = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "out_dtype": out_dtype}
        name = next((name for name, value in given.items() if value is not None), "scale_block")
        raise ValueError(f"{name}: it is for {FLOAT8} arrays, and q is {spec.dtype}; leave it out")
    if spec.max_seqlen_q is not None:
        raise ValueError(f"q: dtype is {FLOAT8}, which packed sequences cannot be yet: use attention with kv_lengths")
    if scale_block is not None:
        arguments.check_count("scale_block", scale_block)
        if not scale_block:
            raise ValueError("scale_block: got 0; it must be at least 1 token")
    dtype = "bfloat16" if out_dtype is None else arguments.dtype_name(out_dtype)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"out_dtype: got {dtype}; it must be bfloat16, float16 or float32")
    q, k, v = arrays
    group = q.shape[2] // k.shape[2]
    queries = _by_token("q_scale", q_scale, q, 1, scale_block)
    keys = _by_token("k_scale", k_scale, k, group, scale_block)
    values = _by_token("v_scale", v_scale, v, group, scale_block)
    scores.scale(None if queries is None else queries[..., None], None if keys is None else keys[:, :, None, :])
    factor = None
    if values is not None:
        factor = scores.glue.largest(values)
        if values.shape[2] > 1:
            divisor = scores.glue.functions()["max"](factor, 1e-30)
            scores.weigh((values / divisor[..., None])[:, :, None, :])
    return replace(spec, result_dtype=dtype), factor


def _by_token(name: str, scale: Any, array: Any, group: int, block: int | None) -> Any:
    """A scale as float32 [batch, q_heads, length], or [..., 1] where all tokens have the same."""
    if scale is None:
        return None
    side = dispatch.glue(dispatch.framework_of(("q", name), (array, scale)))
    if arguments.dtype_name(scale.dtype) not in arguments.FLOATS:
        raise TypeError(f"{name}: dtype is {arguments.dtype_name(scale.dtype)}; it must be a float: convert it first")
    batch, length, heads, _ = array.shape
    blocks = 1 if block is None else -(-length // block)
    wanted = (batch, heads) if block is None else (batch, heads, blocks)
    if tuple(scale.shape) != wanted:
        form = "[batch, heads]" if block is None else "[batch, heads, blocks of scale_block tokens]"
        raise ValueError(f"{name}: got {arguments.show(scale.shape)}; it must be {form} = {arguments.show(wanted)}")
    scale = scale.reshape(batch, heads, 1, blocks, 1)
    if block is None:
        return side.spread(scale, (batch, heads, group, 1, 1), "float32").reshape(batch, heads * group, 1)
    by_token = side.spread(scale, (batch, heads, group, blocks, block), "float32")
    return by_token.reshape(batch, heads * group, blocks * block)[:, :, :length]
