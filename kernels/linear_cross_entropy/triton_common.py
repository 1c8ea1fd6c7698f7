"""What forward and backward of linear cross-entropy share on a GPU: a tile of logits, and how it is launched."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..tiles.launch import Array
from ..tiles.triton_expressions import tanh
from ..tiles.triton_products import indices, shrink, strides, warps, wide
from ..tiles.triton_tiles import advance
from .spec import IGNORED, LinearCrossEntropySpec
from .tiles import LinearCrossEntropyTiles

NO_TOKEN = tl.constexpr(IGNORED)
AT_ONCE = tl.constexpr(32)  # columns of a tile of sums that are taken from the matrix unit


@triton.jit
def products(
    hidden, weight, counted, cols_exist, features,
    hidden_row, hidden_col, weight_row, weight_col,
    EVEN_V: tl.constexpr, EVEN_F: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_V] in float32 of the rows at `hidden` and those at `weight`; 0 of a row that does not count."""
    inner = indices(BLOCK_F, WIDE)
    hidden_offsets = indices(BLOCK_T, WIDE)[:, None] * hidden_row + inner[None, :] * hidden_col  # [BLOCK_T, BLOCK_F]
    weight_offsets = inner[:, None] * weight_col + indices(BLOCK_V, WIDE)[None, :] * weight_row  # [BLOCK_F, BLOCK_V]
    sums = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, features, BLOCK_F):
        hidden_mask = counted[:, None]
        if not EVEN_F:
            hidden_mask = hidden_mask & (inner < features - start)[None, :]
        hidden_tile = tl.load(hidden + hidden_offsets, mask=hidden_mask, other=0.0)
        if EVEN_V and EVEN_F:
            weight_tile = tl.load(weight + weight_offsets)
        else:
            weight_mask = cols_exist[None, :]
            if not EVEN_F:
                weight_mask = weight_mask & (inner < features - start)[:, None]
            weight_tile = tl.load(weight + weight_offsets, mask=weight_mask, other=0.0)
        sums = tl.dot(hidden_tile, weight_tile, sums, input_precision="ieee")
        hidden = advance(hidden, BLOCK_F, hidden_col)
        weight = advance(weight, BLOCK_F, weight_col)
    return sums


@triton.jit
def cap(raw, softcap, CAPPED: tl.constexpr):
    """The logits of raw products, and tanh(raw / softcap) of a capped one, from which its slope follows."""
    if CAPPED:
        bent = tanh(raw / softcap)
        logits = bent * softcap
    else:
        bent = raw
        logits = raw
    return logits, bent


@triton.jit
def per_token(pointer, batch, first, count, batch_stride, stride, other, BLOCK: tl.constexpr):
    """[BLOCK] of an array [batch, tokens] of any strides, from token `first`; past its end `other`."""
    tokens = tl.arange(0, BLOCK)
    pointer = advance(advance(pointer, batch, batch_stride), first, stride)
    return tl.load(pointer + tokens.to(tl.int64) * stride, mask=tokens < count - first, other=other)


def logits_arguments(
    spec: LinearCrossEntropySpec, tiles: LinearCrossEntropyTiles, arrays: dict[str, Array]
) -> dict[str, Any]:
    """The arguments of a launch that have to do with tiles of logits: numbers, constants, warps and stages."""
    hidden, weight = arrays["hidden"], arrays["weight"]
    (_, tokens, features), vocab = hidden.shape, weight.shape[1]
    block_t = shrink("block_tokens", tiles.block_tokens, tokens)
    block_v = shrink("block_vocab", tiles.block_vocab, vocab)
    block_f = shrink("block_features", tiles.block_features, features)
    return {
        "numbers": {
            "tokens": tokens,
            "vocab": vocab,
            "features": features,
            "softcap": 0.0 if spec.softcap is None else spec.softcap,
            **strides("hidden", hidden),
            **strides("weight", weight),
            **strides("targets", arrays["targets"], "batch", "row"),
        },
        "constants": {
            "CAPPED": spec.softcap is not None,
            "EVEN_V": vocab % block_v == 0,
            "EVEN_F": features % block_f == 0,
            "WIDE": wide((hidden, block_t, block_f), (weight, block_v, block_f)),
            "BLOCK_T": block_t,
            "BLOCK_V": block_v,
            "BLOCK_F": block_f,
        },
        "num_warps": warps(tiles.num_warps, tiles.block_tokens * tiles.block_vocab // (block_t * block_v)),
        "num_stages": tiles.num_stages,
        "dot_dtype": spec.dtype,
    }
