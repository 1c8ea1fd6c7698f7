"""The kernel of the gradients of keys and values on GPUs: a program owns a tile of keys of one key head."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.triton_expressions import evaluate, indices, load_planes
from ..tiles.triton_philox import kept
from ..tiles.triton_tiles import (
    advance,
    described,
    head_columns,
    load_head_tile,
    load_rows,
    load_tile,
    padded,
    q_ranges,
    q_ranges_of_runs,
    rows_exist,
    store_tile,
)
from .triton_programs import runs_of, sequence_of, tile_head_batch, within_run
from .triton_weights import weigh


@triton.jit
def _gather_dkv(
    dk, dk_rest, dv, given, planes, plane_strides, place, scales, start, end, q_size, q_len, kv_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MASKED: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add what the queries in [start, end) of each head of the group send back to a tile of keys.

    Scores are transposed, [BLOCK_KV, BLOCK_Q], so that the weights stay in registers for the second product. One loop
    runs through all the heads, which keeps loads in flight from one head to the next. To leave the registers to the two
    accumulators, the masked loop, which has few steps, is not pipelined, and nothing is moved out of the loops.
    `place` is (sequence, first head, first column).
    """
    # The end of either sequence needs no mask: a query past it has lse +inf, a key past it is not stored.
    WINDOW: tl.constexpr = MASKED and (LEFT is not None or RIGHT is not None)
    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    k_tile, k_rest, v_tile, queries, douts, log2_lse, delta, seed, kept_share = given
    q, q_row, q_head, q_column = queries
    dout, dout_row, dout_head, dout_column = douts
    score_scale, log2_scale = scales
    tiles = (end - start) // BLOCK_Q
    if tiles > 0:
        for step in tl.range(0, GROUP * tiles, num_stages=1 if MASKED else None, disable_licm=True):
            member = step // tiles if GROUP > 1 else 0
            first = start + (step - member * tiles) * BLOCK_Q
            q_tile = load_head_tile(
                q, member, first, q_len, q_head, q_row, q_column, BLOCK_Q, FIRST, MASKED, WIDE, DESCRIPTORS
            )
            dout_tile = load_head_tile(
                dout, member, first, q_len, dout_head, dout_row, dout_column, BLOCK_Q, V_DIM, MASKED, WIDE, DESCRIPTORS
            )
            lse_tile = load_rows(advance(log2_lse, member, q_size), first, q_len, 1, float("inf"), BLOCK_Q, MASKED)
            delta_tile = load_rows(advance(delta, member, q_size), first, q_len, 1, 0.0, BLOCK_Q, MASKED)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            if FIRST < HEAD_DIM:
                q_rest = load_head_tile(
                    q + FIRST * q_column, member, first, q_len, q_head, q_row, q_column,
                    BLOCK_Q, HEAD_DIM - FIRST, MASKED, WIDE, False,
                )  # fmt: skip
                scores = tl.dot(k_rest, tl.trans(q_rest), scores, input_precision="ieee")
            dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            here = (place[0], place[1] + member, first, place[2])
            at = indices(here, BLOCK_Q, BLOCK_KV, True)
            plane_tiles = load_planes(
                planes, plane_strides, here, q_len, kv_len, SLOTS, BLOCK_Q, BLOCK_KV, MASKED, True, WIDE_PLANES
            )
            weights, raw = weigh(
                scores, lse_tile, at, plane_tiles, score_scale, log2_scale, q_len, kv_len,
                LEFT, RIGHT, SCORE, MASK, WINDOW, 0,
            )  # fmt: skip
            dropped = weights
            if DROPOUT is not None:
                stay = kept(seed, here, DROPOUT, BLOCK_Q, BLOCK_KV, True)
                dropped = tl.where(stay, weights, 0.0)
                dweights = tl.where(stay, dweights / kept_share, 0.0)
            dv = tl.dot(dropped.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            dscores = weights * (dweights - delta_tile[None, :])
            if SLOPE is not None:
                dscores = tl.where(weights != 0.0, dscores * evaluate(SLOPE, raw, at, plane_tiles), 0.0)
            dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
            if FIRST < HEAD_DIM:
                dk_rest = tl.dot(dscores.to(q_rest.dtype), q_rest, dk_rest, input_precision="ieee")
    return dk, dk_rest, dv


@triton.jit
def _walk_dkv(
    dk, dk_rest, dv, given, planes, plane_strides, place, scales, ranges, q_size, q_len, kv_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    RUNS: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Gather from the queries of all ranges: (start, full_start, full_end, end), as `q_ranges` gives them."""
    start, full_start, full_end, end = ranges
    FULL_MASK: tl.constexpr = None if RUNS else MASK
    dk, dk_rest, dv = _gather_dkv(
        dk, dk_rest, dv, given, planes, plane_strides, place, scales, start, full_start, q_size, q_len, kv_len,
        GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, True, SCORE, MASK, SLOPE, SLOTS, DROPOUT,
        BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
    )  # fmt: skip
    dk, dk_rest, dv = _gather_dkv(
        dk, dk_rest, dv, given, planes, plane_strides, place, scales, full_start, full_end, q_size, q_len, kv_len,
        GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, False, SCORE, FULL_MASK, SLOPE, SLOTS, DROPOUT,
        BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
    )  # fmt: skip
    if LEFT is not None or RUNS:
        dk, dk_rest, dv = _gather_dkv(
            dk, dk_rest, dv, given, planes, plane_strides, place, scales, full_end, end, q_size, q_len, kv_len,
            GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, True, SCORE, MASK, SLOPE, SLOTS, DROPOUT,
            BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
        )  # fmt: skip
    return dk, dk_rest, dv


@triton.jit(do_not_specialize=["q_size", "kv_size", "sequences", "together"])
def dkv_kernel(
    q, k, v, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k, seed, runs,
    plane0, plane1, plane2, plane3, plane4, plane5, dout, log2_lse, delta, dk, dv,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column,
    v_batch, v_row, v_head, v_column, dout_batch, dout_row, dout_head, dout_column,
    plane0_batch, plane0_head, plane0_row, plane0_column, plane1_batch, plane1_head, plane1_row, plane1_column,
    plane2_batch, plane2_head, plane2_row, plane2_column, plane3_batch, plane3_head, plane3_row, plane3_column,
    plane4_batch, plane4_head, plane4_row, plane4_column, plane5_batch, plane5_head, plane5_row, plane5_column,
    scale, score_scale, log2_scale, kept_share, q_size, kv_size, kv_heads, sequences, together,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    RUNS: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_KV keys of one key head, summed over the GROUP query heads that share it."""
    planes = (plane0, plane1, plane2, plane3, plane4, plane5)
    plane_strides = (
        (plane0_batch, plane0_head, plane0_row, plane0_column), (plane1_batch, plane1_head, plane1_row, plane1_column),
        (plane2_batch, plane2_head, plane2_row, plane2_column), (plane3_batch, plane3_head, plane3_row, plane3_column),
        (plane4_batch, plane4_head, plane4_row, plane4_column), (plane5_batch, plane5_head, plane5_row, plane5_column),
    )  # fmt: skip
    tile, kv_head, batch = tile_head_batch(kv_size, kv_heads, sequences, together, BLOCK_KV, PACKED)
    tile, item, q_first, q_len, kv_first, kv_len = sequence_of(
        tile, batch, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k, sequences, q_size, kv_size,
        True, Q_LENGTHS, KV_LENGTHS, PACKED, BLOCK_KV,
    )  # fmt: skip
    first_column = tile * BLOCK_KV
    first_head = kv_head * GROUP
    k = advance(advance(k, batch, k_batch), kv_head, k_head)
    v = advance(advance(v, batch, v_batch), kv_head, v_head)
    q = advance(advance(q, batch, q_batch), first_head, q_head)
    dout = advance(advance(dout, batch, dout_batch), first_head, dout_head)
    log2_lse = advance(log2_lse, batch * kv_heads * GROUP + first_head, q_size)
    delta = advance(delta, batch * kv_heads * GROUP + first_head, q_size)
    if PACKED:
        k = advance(k, kv_first, k_row)
        v = advance(v, kv_first, v_row)
        q = advance(q, q_first, q_row)
        dout = advance(dout, q_first, dout_row)
        log2_lse = log2_lse + q_first
        delta = delta + q_first

    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    if DESCRIPTORS:
        q = described(q, GROUP, q_len, q_head, q_row, BLOCK_Q, HEAD_DIM)
        k = described(k, 1, kv_len, k_row, k_row, BLOCK_KV, HEAD_DIM)
        v = described(v, 1, kv_len, v_row, v_row, BLOCK_KV, V_DIM)
        dout = described(dout, GROUP, q_len, dout_head, dout_row, BLOCK_Q, V_DIM)
    k_tile = load_head_tile(k, 0, first_column, kv_len, 0, k_row, k_column, BLOCK_KV, FIRST, True, WIDE, DESCRIPTORS)
    v_tile = load_head_tile(v, 0, first_column, kv_len, 0, v_row, v_column, BLOCK_KV, V_DIM, True, WIDE, DESCRIPTORS)
    dk_tile = tl.zeros([BLOCK_KV, padded(FIRST)], tl.float32)
    k_rest = k_tile
    dk_rest = tl.full((), 0.0, tl.float32)
    if FIRST < HEAD_DIM:
        k = k + FIRST * k_column
        k_rest = load_tile(k, first_column, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM - FIRST, True, WIDE)
        dk_rest = tl.zeros([BLOCK_KV, padded(HEAD_DIM - FIRST)], tl.float32)
    dv_tile = tl.zeros([BLOCK_KV, padded(V_DIM)], tl.float32)

    queries = (q, q_row, q_head, q_column)
    douts = (dout, dout_row, dout_head, dout_column)
    given = (k_tile, k_rest, v_tile, queries, douts, log2_lse, delta, seed, kept_share)
    place = (item, first_head, first_column)
    scales = (score_scale, log2_scale)
    if RUNS:
        ranges = q_ranges_of_runs(first_column, q_len, kv_len, LEFT, RIGHT, KV_LENGTHS or PACKED, BLOCK_Q, BLOCK_KV)
        first_run, end_run = runs_of(runs, item, first_head, tile, sequences, PACKED)
        for run in tl.range(first_run, end_run, 2, num_stages=1):
            dk_tile, dk_rest, dv_tile = _walk_dkv(
                dk_tile, dk_rest, dv_tile, given, planes, plane_strides, place, scales,
                within_run(runs, run, ranges[0], ranges[1], ranges[2], ranges[3], BLOCK_Q), q_size, q_len, kv_len,
                GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, RUNS, SCORE, MASK, SLOPE, SLOTS, DROPOUT,
                BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
            )  # fmt: skip
    else:
        ranges = q_ranges(first_column, q_len, kv_len, LEFT, RIGHT, KV_LENGTHS or PACKED, BLOCK_Q, BLOCK_KV)
        dk_tile, dk_rest, dv_tile = _walk_dkv(
            dk_tile, dk_rest, dv_tile, given, planes, plane_strides, place, scales, ranges, q_size, q_len, kv_len,
            GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, RUNS, SCORE, MASK, SLOPE, SLOTS, DROPOUT,
            BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
        )  # fmt: skip

    if DROPOUT is not None:
        dv_tile = dv_tile / kept_share
    if KV_LENGTHS:  # a key past the length is seen by no query
        exist = rows_exist(first_column, kv_len, BLOCK_KV)[:, None]
        dk_tile = tl.where(exist, dk_tile, 0.0)
        dk_rest = tl.where(exist, dk_rest, 0.0)
        dv_tile = tl.where(exist, dv_tile, 0.0)
    kv_rows = batch * tl.cast(kv_size, tl.int64)
    rows_written = kv_size
    if PACKED:
        kv_rows += kv_first
        rows_written = kv_len
    dk = advance(advance(dk, kv_rows, kv_heads * HEAD_DIM), kv_head, HEAD_DIM)
    dv = advance(advance(dv, kv_rows, kv_heads * V_DIM), kv_head, V_DIM)
    store_tile(dk, dk_tile * scale, first_column, rows_written, kv_heads * HEAD_DIM, BLOCK_KV, FIRST, WIDE)
    if FIRST < HEAD_DIM:
        dk = dk + FIRST
        dk_rest = dk_rest * scale
        store_tile(dk, dk_rest, first_column, rows_written, kv_heads * HEAD_DIM, BLOCK_KV, HEAD_DIM - FIRST, WIDE)
    store_tile(dv, dv_tile, first_column, rows_written, kv_heads * V_DIM, BLOCK_KV, V_DIM, WIDE)
