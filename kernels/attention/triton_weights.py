"""The weights of a tile of scores, recomputed from the logsumexp: what the backward begins with."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch
from ..tiles.triton_expressions import evaluate, truth
from ..tiles.triton_tiles import LOG2_E, advance, load_rows, load_tile, rows_exist, visible
from .spec import AttentionInputs, AttentionSpec
from .triton_common import strides_of, wide
from .triton_programs import length_of, tile_head_batch

_PREPARE_ROWS = 32


@triton.jit(do_not_specialize=["q_size"])
def _prepare_kernel(
    q_lengths, out, lse, dout, dlse, log2_lse, delta,
    out_batch, out_row, out_head, out_column, lse_batch, lse_head, lse_row,
    dout_batch, dout_row, dout_head, dout_column, dlse_batch, dlse_head, dlse_row, q_size, q_heads,
    V_DIM: tl.constexpr, Q_LENGTHS: tl.constexpr, DLSE: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of each query: lse in base 2, and delta = sum(out * dout) - dlse.

    A query that saw no key gets lse +inf, so that its weights `exp2(score - lse)` are 0 and not NaN.
    """
    tile, head, batch = tile_head_batch(q_size, q_heads, 0, None, BLOCK_Q, False)
    first_row = tile * BLOCK_Q
    exist = rows_exist(first_row, q_size, BLOCK_Q)
    q_len = length_of(q_lengths, batch, q_size, Q_LENGTHS)
    out = advance(advance(out, batch, out_batch), head, out_head)
    dout = advance(advance(dout, batch, dout_batch), head, dout_head)
    lse = advance(advance(lse, batch, lse_batch), head, lse_head)

    out_tile = load_tile(out, first_row, q_len, out_row, out_column, BLOCK_Q, V_DIM, True, WIDE)
    dout_tile = load_tile(dout, first_row, q_len, dout_row, dout_column, BLOCK_Q, V_DIM, True, WIDE)
    lse_tile = load_rows(lse, first_row, q_size, lse_row, 0.0, BLOCK_Q)
    empty = lse_tile == float("-inf")
    delta_tile = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), axis=1)
    if DLSE:
        dlse = advance(advance(dlse, batch, dlse_batch), head, dlse_head)
        delta_tile -= load_rows(dlse, first_row, q_size, dlse_row, 0.0, BLOCK_Q)

    rows = first_row + tl.arange(0, BLOCK_Q)
    log2_lse = advance(log2_lse, batch * q_heads + head, q_size)
    delta = advance(delta, batch * q_heads + head, q_size)
    tl.store(log2_lse + rows, tl.where(empty, float("inf"), lse_tile * LOG2_E), mask=exist)
    tl.store(delta + rows, tl.where(empty, 0.0, delta_tile), mask=exist)


def prepare_launch(
    spec: AttentionSpec, inputs: AttentionInputs, outputs: tuple[Array, Array], gradients: tuple[Array, Array | None]
) -> Launch:
    """log2_lse and delta, float32 [batch, q_heads, q_len], of the outputs and their gradients."""
    (out, lse), (dout, dlse) = outputs, gradients
    batch, q_size, q_heads, _ = inputs.q.shape
    return Launch(
        _prepare_kernel,
        (triton.cdiv(q_size, _PREPARE_ROWS) * q_heads * batch,),
        ("" if inputs.q_lengths is None else "q_lengths", "out", "lse", "dout", "" if dlse is None else "dlse"),
        ("log2_lse", "delta"),
        {**strides_of(out=out, dout=dout, lse=lse, dlse=dlse), "q_size": q_size, "q_heads": q_heads},
        {
            "V_DIM": spec.v_dim,
            "Q_LENGTHS": inputs.q_lengths is not None,
            "DLSE": dlse is not None,
            "BLOCK_Q": _PREPARE_ROWS,
            "WIDE": wide(_PREPARE_ROWS, out, dout),
        },
    )


@triton.jit
def weigh(
    scores, lse_rows, at, planes, score_scale, log2_scale, q_len, kv_len,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """(weights, scaled scores) of a tile of scores; `lse_rows` [BLOCK_Q] is in base 2, and AXIS the axis of keys.

    A weight that is not seen is 0, whatever its score. Without an expression the scores are not scaled. One mask is
    applied after the other, for masks that wait to be joined would fill a wave's scalar registers.
    """
    if SCORE is not None or MASK is not None:
        scores = scores * score_scale
        changed = scores
        if SCORE is not None:
            exist = tl.expand_dims(lse_rows, AXIS) < float("inf")
            changed = tl.where(exist, evaluate(SCORE, scores, at, planes), float("-inf"))
        if MASK is not None:
            changed = tl.where(truth(evaluate(MASK, scores, at, planes)), changed, float("-inf"))
        if MASKED:
            changed = tl.where(visible(at[2], at[3], q_len, kv_len, LEFT, RIGHT), changed, float("-inf"))
        weights = tl.exp2(changed * LOG2_E - tl.expand_dims(lse_rows, AXIS))
    else:
        weights = tl.exp2(scores * log2_scale - tl.expand_dims(lse_rows, AXIS))
        if MASKED:
            weights = tl.where(visible(at[2], at[3], q_len, kv_len, LEFT, RIGHT), weights, 0.0)
    return weights, scores
