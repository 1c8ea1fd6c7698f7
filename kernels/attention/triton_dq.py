"""The kernel of the gradient of queries on GPUs: a program owns a tile of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.triton_expressions import evaluate, indices, load_planes
from ..tiles.triton_philox import kept
from ..tiles.triton_tiles import (
    advance,
    described,
    head_columns,
    kv_ranges,
    load_head_tile,
    load_rows,
    load_tile,
    padded,
    rows_exist,
    store_tile,
)
from .triton_programs import runs_of, sequence_of, tile_head_batch_of_axes, within_run
from .triton_weights import weigh


@triton.jit
def _gather_dq(
    dq, dq_rest, exact, given, planes, plane_strides, place, scales, start, end, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr, DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add what the keys in [start, end) send back to a tile of queries. Tiles are [BLOCK_Q, BLOCK_KV].

    `place` is (sequence, head, first row).
    """
    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    LEAN: tl.constexpr = LEFT is not None or MASK is not None or SCORE is not None
    q_tile, q_rest, dout_tile, lse_tile, delta_tile, keys, values, seed, kept_share = given
    k, k_row, k_column = keys
    v, v_row, v_column = values
    score_scale, log2_scale = scales
    if start < end:
        for first in tl.range(start, end, BLOCK_KV, num_stages=1 if MASKED and LEAN else None, disable_licm=LEAN):
            k_tile = load_head_tile(k, 0, first, kv_len, 0, k_row, k_column, BLOCK_KV, FIRST, MASKED, WIDE, DESCRIPTORS)
            v_tile = load_head_tile(v, 0, first, kv_len, 0, v_row, v_column, BLOCK_KV, V_DIM, MASKED, WIDE, DESCRIPTORS)
            here = (place[0], place[1], place[2], first)
            at = indices(here, BLOCK_Q, BLOCK_KV, False)
            plane_tiles = load_planes(
                planes, plane_strides, here, q_len, kv_len, SLOTS, BLOCK_Q, BLOCK_KV, MASKED, False, WIDE_PLANES
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if FIRST < HEAD_DIM:
                k_rest = load_tile(
                    k + FIRST * k_column, first, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM - FIRST, MASKED, WIDE
                )
                scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
            weights, raw = weigh(
                scores, lse_tile, at, plane_tiles, score_scale, log2_scale, q_len, kv_len,
                LEFT, RIGHT, SCORE, MASK, MASKED, 1,
            )  # fmt: skip
            dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            if DROPOUT is not None:
                stay = kept(seed, here, DROPOUT, BLOCK_Q, BLOCK_KV, False)
                dweights = tl.where(stay, dweights / kept_share, 0.0)
            if EXACT:
                exact += tl.sum(tl.where(weights != 0.0, weights * dweights, 0.0), axis=1)
            dscores = weights * (dweights - delta_tile[:, None])
            if SLOPE is not None:
                dscores = tl.where(weights != 0.0, dscores * evaluate(SLOPE, raw, at, plane_tiles), 0.0)
            dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
            if FIRST < HEAD_DIM:
                dq_rest = tl.dot(dscores.to(k_rest.dtype), k_rest, dq_rest, input_precision="ieee")
    return dq, dq_rest, exact


@triton.jit
def _walk_dq(
    dq, dq_rest, exact, given, planes, plane_strides, place, scales, ranges, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    RUNS: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Gather from the keys of all ranges: (start, full_start, full_end, end), as `kv_ranges` gives them."""
    start, full_start, full_end, end = ranges
    FULL_MASK: tl.constexpr = None if RUNS else MASK
    if LEFT is not None or RUNS:
        dq, dq_rest, exact = _gather_dq(
            dq, dq_rest, exact, given, planes, plane_strides, place, scales, start, full_start, q_len, kv_len,
            HEAD_DIM, V_DIM, LEFT, RIGHT, True, SCORE, MASK, SLOPE, SLOTS, DROPOUT, EXACT,
            BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
        )  # fmt: skip
    dq, dq_rest, exact = _gather_dq(
        dq, dq_rest, exact, given, planes, plane_strides, place, scales, full_start, full_end, q_len, kv_len,
        HEAD_DIM, V_DIM, LEFT, RIGHT, False, SCORE, FULL_MASK, SLOPE, SLOTS, DROPOUT, EXACT,
        BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
    )  # fmt: skip
    dq, dq_rest, exact = _gather_dq(
        dq, dq_rest, exact, given, planes, plane_strides, place, scales, full_end, end, q_len, kv_len,
        HEAD_DIM, V_DIM, LEFT, RIGHT, True, SCORE, MASK, SLOPE, SLOTS, DROPOUT, EXACT,
        BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
    )  # fmt: skip
    return dq, dq_rest, exact


@triton.jit(do_not_specialize=["q_size", "kv_size", "sequences"])
def dq_kernel(
    q, k, v, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k, seed, runs,
    plane0, plane1, plane2, plane3, plane4, plane5, dout, log2_lse, delta, dlse, exact_delta, dq,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column,
    v_batch, v_row, v_head, v_column, dout_batch, dout_row, dout_head, dout_column, dlse_batch, dlse_head, dlse_row,
    plane0_batch, plane0_head, plane0_row, plane0_column, plane1_batch, plane1_head, plane1_row, plane1_column,
    plane2_batch, plane2_head, plane2_row, plane2_column, plane3_batch, plane3_head, plane3_row, plane3_column,
    plane4_batch, plane4_head, plane4_row, plane4_column, plane5_batch, plane5_head, plane5_row, plane5_column,
    scale, score_scale, log2_scale, kept_share, q_size, kv_size, q_heads, sequences,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    LONGEST: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    RUNS: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_Q queries of one head, and with EXACT their delta, summed from weights that nothing has rounded."""
    planes = (plane0, plane1, plane2, plane3, plane4, plane5)
    plane_strides = (
        (plane0_batch, plane0_head, plane0_row, plane0_column), (plane1_batch, plane1_head, plane1_row, plane1_column),
        (plane2_batch, plane2_head, plane2_row, plane2_column), (plane3_batch, plane3_head, plane3_row, plane3_column),
        (plane4_batch, plane4_head, plane4_row, plane4_column), (plane5_batch, plane5_head, plane5_row, plane5_column),
    )  # fmt: skip
    tile, head, batch = tile_head_batch_of_axes(q_size, q_heads, sequences, BLOCK_Q, PACKED, LONGEST)
    tile, item, q_first, q_len, kv_first, kv_len = sequence_of(
        tile, batch, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k, sequences, q_size, kv_size,
        False, Q_LENGTHS, KV_LENGTHS, PACKED, BLOCK_Q,
    )  # fmt: skip
    first_row = tile * BLOCK_Q
    q = advance(advance(q, batch, q_batch), head, q_head)
    k = advance(advance(k, batch, k_batch), head // GROUP, k_head)
    v = advance(advance(v, batch, v_batch), head // GROUP, v_head)
    dout = advance(advance(dout, batch, dout_batch), head, dout_head)
    log2_lse = advance(log2_lse, batch * q_heads + head, q_size)
    delta = advance(delta, batch * q_heads + head, q_size)
    if PACKED:
        q = advance(q, q_first, q_row)
        k = advance(k, kv_first, k_row)
        v = advance(v, kv_first, v_row)
        dout = advance(dout, q_first, dout_row)
        log2_lse = log2_lse + q_first
        delta = delta + q_first

    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    q_tile = load_tile(q, first_row, q_len, q_row, q_column, BLOCK_Q, FIRST, True, WIDE)
    dout_tile = load_tile(dout, first_row, q_len, dout_row, dout_column, BLOCK_Q, V_DIM, True, WIDE)
    lse_tile = load_rows(log2_lse, first_row, q_len, 1, float("inf"), BLOCK_Q)
    delta_tile = load_rows(delta, first_row, q_len, 1, 0.0, BLOCK_Q)
    dq_tile = tl.zeros([BLOCK_Q, padded(FIRST)], tl.float32)
    q_rest = q_tile
    dq_rest = tl.full((), 0.0, tl.float32)
    if FIRST < HEAD_DIM:
        q = q + FIRST * q_column
        q_rest = load_tile(q, first_row, q_len, q_row, q_column, BLOCK_Q, HEAD_DIM - FIRST, True, WIDE)
        dq_rest = tl.zeros([BLOCK_Q, padded(HEAD_DIM - FIRST)], tl.float32)
    exact = tl.zeros([BLOCK_Q], tl.float32) if EXACT else tl.full((), 0.0, tl.float32)

    if DESCRIPTORS:
        k = described(k, 1, kv_len, k_row, k_row, BLOCK_KV, HEAD_DIM)
        v = described(v, 1, kv_len, v_row, v_row, BLOCK_KV, V_DIM)
    given = (
        q_tile,
        q_rest,
        dout_tile,
        lse_tile,
        delta_tile,
        (k, k_row, k_column),
        (v, v_row, v_column),
        seed,
        kept_share,
    )
    place = (item, head, first_row)
    scales = (score_scale, log2_scale)
    ranges = kv_ranges(first_row, q_len, kv_len, LEFT, RIGHT, Q_LENGTHS or PACKED, BLOCK_Q, BLOCK_KV)
    if RUNS:
        first_run, end_run = runs_of(runs, item, head, tile, sequences, PACKED)
        for run in tl.range(first_run, end_run, 2, num_stages=1):
            dq_tile, dq_rest, exact = _walk_dq(
                dq_tile, dq_rest, exact, given, planes, plane_strides, place, scales,
                within_run(runs, run, ranges[0], ranges[1], ranges[2], ranges[3], BLOCK_KV), q_len, kv_len,
                HEAD_DIM, V_DIM, LEFT, RIGHT, RUNS, SCORE, MASK, SLOPE, SLOTS, DROPOUT, EXACT,
                BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
            )  # fmt: skip
    else:
        dq_tile, dq_rest, exact = _walk_dq(
            dq_tile, dq_rest, exact, given, planes, plane_strides, place, scales, ranges, q_len, kv_len,
            HEAD_DIM, V_DIM, LEFT, RIGHT, RUNS, SCORE, MASK, SLOPE, SLOTS, DROPOUT, EXACT,
            BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
        )  # fmt: skip
    q_rows = batch * tl.cast(q_size, tl.int64)
    rows_written = q_size
    if PACKED:
        q_rows += q_first
        rows_written = q_len
    if EXACT:
        if dlse is not None:
            dlse = advance(advance(advance(dlse, batch, dlse_batch), head, dlse_head), q_first, dlse_row)
            exact -= load_rows(dlse, first_row, q_len, dlse_row, 0.0, BLOCK_Q)
        exact_delta = advance(exact_delta, batch * q_heads + head, q_size) + q_first + first_row
        tl.store(exact_delta + tl.arange(0, BLOCK_Q), exact, mask=rows_exist(first_row, rows_written, BLOCK_Q))
    dq = advance(advance(dq, q_rows, q_heads * HEAD_DIM), head, HEAD_DIM)
    store_tile(dq, dq_tile * scale, first_row, rows_written, q_heads * HEAD_DIM, BLOCK_Q, FIRST, WIDE)
    if FIRST < HEAD_DIM:
        dq = dq + FIRST
        store_tile(dq, dq_rest * scale, first_row, rows_written, q_heads * HEAD_DIM, BLOCK_Q, HEAD_DIM - FIRST, WIDE)
