"""The gradients of attention on GPUs: of keys and values in one kernel, of queries in another, each in its own tiles.

Both recompute the weights from lse. What every row needs of it is prepared once, by a small kernel before them.
"""

from __future__ import annotations

from math import e, log2

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.triton_expressions import evaluate, indices, load_planes
from ..tiles.triton_tiles import (
    advance,
    head_columns,
    kv_ranges,
    load_rows,
    load_tile,
    padded,
    q_ranges,
    rows_exist,
    sequence_of,
    store_tile,
    tile_head_batch,
)
from .spec import INPUTS, AttentionInputs, AttentionSpec
from .tiles import AttentionConfig
from .triton_common import (
    arrays_of,
    checked,
    names_of,
    programs,
    score_constants,
    score_numbers,
    size_constants,
    slope_of,
    strides_of,
)
from .triton_planes import dplane_launch, dsinks_launch, gradient_arrays
from .triton_weights import prepare_launch, weigh


@triton.jit
def _gather_dkv(
    dk, dk_rest, dv, k_tile, k_rest, v_tile, queries, douts, log2_lse, delta,
    planes, plane_strides, place, score_scale, log2_scale,
    start, end, q_size, q_len, kv_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    MASKED: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
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
    q, q_row, q_head, q_column = queries
    dout, dout_row, dout_head, dout_column = douts
    tiles = (end - start) // BLOCK_Q
    if tiles > 0:
        for step in tl.range(0, GROUP * tiles, num_stages=1 if MASKED else None, disable_licm=True):
            member = step // tiles if GROUP > 1 else 0
            first = start + (step - member * tiles) * BLOCK_Q
            q_of_head = advance(q, member, q_head)
            dout_of_head = advance(dout, member, dout_head)
            q_tile = load_tile(q_of_head, first, q_len, q_row, q_column, BLOCK_Q, FIRST, MASKED, WIDE)
            dout_tile = load_tile(dout_of_head, first, q_len, dout_row, dout_column, BLOCK_Q, V_DIM, MASKED, WIDE)
            lse_tile = load_rows(advance(log2_lse, member, q_size), first, q_len, 1, float("inf"), BLOCK_Q, MASKED)
            delta_tile = load_rows(advance(delta, member, q_size), first, q_len, 1, 0.0, BLOCK_Q, MASKED)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            if FIRST < HEAD_DIM:
                q_of_head += FIRST * q_column
                q_rest = load_tile(q_of_head, first, q_len, q_row, q_column, BLOCK_Q, HEAD_DIM - FIRST, MASKED, WIDE)
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
            dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            dscores = weights * (dweights - delta_tile[None, :])
            if SLOPE is not None:
                dscores = tl.where(weights != 0.0, dscores * evaluate(SLOPE, raw, at, plane_tiles), 0.0)
            dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
            if FIRST < HEAD_DIM:
                dk_rest = tl.dot(dscores.to(q_rest.dtype), q_rest, dk_rest, input_precision="ieee")
    return dk, dk_rest, dv


@triton.jit(do_not_specialize=["q_size", "kv_size", "sequences"])
def _dkv_kernel(
    q, k, v, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k,
    plane0, plane1, plane2, plane3, plane4, plane5, dout, log2_lse, delta, dk, dv,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column,
    v_batch, v_row, v_head, v_column, dout_batch, dout_row, dout_head, dout_column,
    plane0_batch, plane0_head, plane0_row, plane0_column, plane1_batch, plane1_head, plane1_row, plane1_column,
    plane2_batch, plane2_head, plane2_row, plane2_column, plane3_batch, plane3_head, plane3_row, plane3_column,
    plane4_batch, plane4_head, plane4_row, plane4_column, plane5_batch, plane5_head, plane5_row, plane5_column,
    scale, score_scale, log2_scale, q_size, kv_size, kv_heads, sequences,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_KV keys of one key head, summed over the GROUP query heads that share it."""
    planes = (plane0, plane1, plane2, plane3, plane4, plane5)
    plane_strides = (
        (plane0_batch, plane0_head, plane0_row, plane0_column), (plane1_batch, plane1_head, plane1_row, plane1_column),
        (plane2_batch, plane2_head, plane2_row, plane2_column), (plane3_batch, plane3_head, plane3_row, plane3_column),
        (plane4_batch, plane4_head, plane4_row, plane4_column), (plane5_batch, plane5_head, plane5_row, plane5_column),
    )  # fmt: skip
    tile, kv_head, batch = tile_head_batch(kv_size, kv_heads, sequences, BLOCK_KV, PACKED)
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
    k_tile = load_tile(k, first_column, kv_len, k_row, k_column, BLOCK_KV, FIRST, True, WIDE)
    v_tile = load_tile(v, first_column, kv_len, v_row, v_column, BLOCK_KV, V_DIM, True, WIDE)
    dk_tile = tl.zeros([BLOCK_KV, padded(FIRST)], tl.float32)
    k_rest = k_tile
    dk_rest = tl.full((), 0.0, tl.float32)
    if FIRST < HEAD_DIM:
        k = k + FIRST * k_column
        k_rest = load_tile(k, first_column, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM - FIRST, True, WIDE)
        dk_rest = tl.zeros([BLOCK_KV, padded(HEAD_DIM - FIRST)], tl.float32)
    dv_tile = tl.zeros([BLOCK_KV, padded(V_DIM)], tl.float32)

    place = (item, first_head, first_column)
    queries = (q, q_row, q_head, q_column)
    douts = (dout, dout_row, dout_head, dout_column)
    start, full_start, full_end, end = q_ranges(
        first_column, q_len, kv_len, LEFT, RIGHT, KV_LENGTHS or PACKED, BLOCK_Q, BLOCK_KV
    )
    dk_tile, dk_rest, dv_tile = _gather_dkv(
        dk_tile, dk_rest, dv_tile, k_tile, k_rest, v_tile, queries, douts, log2_lse, delta,
        planes, plane_strides, place, score_scale,
        log2_scale, start, full_start, q_size, q_len, kv_len, GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, True,
        SCORE, MASK, SLOPE, SLOTS, BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES,
    )  # fmt: skip
    dk_tile, dk_rest, dv_tile = _gather_dkv(
        dk_tile, dk_rest, dv_tile, k_tile, k_rest, v_tile, queries, douts, log2_lse, delta,
        planes, plane_strides, place, score_scale,
        log2_scale, full_start, full_end, q_size, q_len, kv_len, GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, False,
        SCORE, MASK, SLOPE, SLOTS, BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES,
    )  # fmt: skip
    if LEFT is not None:
        dk_tile, dk_rest, dv_tile = _gather_dkv(
            dk_tile, dk_rest, dv_tile, k_tile, k_rest, v_tile, queries, douts, log2_lse, delta,
            planes, plane_strides, place,
            score_scale, log2_scale, full_end, end, q_size, q_len, kv_len, GROUP, HEAD_DIM, V_DIM, LEFT, RIGHT, True,
            SCORE, MASK, SLOPE, SLOTS, BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES,
        )  # fmt: skip

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


@triton.jit
def _gather_dq(
    dq, dq_rest, q_tile, q_rest, dout_tile, lse_tile, delta_tile, keys, values,
    planes, plane_strides, place, score_scale, log2_scale,
    start, end, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
):  # fmt: skip
    """Add what the keys in [start, end) send back to a tile of queries. Tiles are [BLOCK_Q, BLOCK_KV].

    `place` is (sequence, head, first row).
    """
    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    LEAN: tl.constexpr = LEFT is not None or MASK is not None or SCORE is not None
    k, k_row, k_column = keys
    v, v_row, v_column = values
    if start < end:
        for first in tl.range(start, end, BLOCK_KV, num_stages=1 if MASKED and LEAN else None, disable_licm=LEAN):
            k_tile = load_tile(k, first, kv_len, k_row, k_column, BLOCK_KV, FIRST, MASKED, WIDE)
            v_tile = load_tile(v, first, kv_len, v_row, v_column, BLOCK_KV, V_DIM, MASKED, WIDE)
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
            dscores = weights * (dweights - delta_tile[:, None])
            if SLOPE is not None:
                dscores = tl.where(weights != 0.0, dscores * evaluate(SLOPE, raw, at, plane_tiles), 0.0)
            dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
            if FIRST < HEAD_DIM:
                dq_rest = tl.dot(dscores.to(k_rest.dtype), k_rest, dq_rest, input_precision="ieee")
    return dq, dq_rest


@triton.jit(do_not_specialize=["q_size", "kv_size", "sequences"])
def _dq_kernel(
    q, k, v, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k,
    plane0, plane1, plane2, plane3, plane4, plane5, dout, log2_lse, delta, dq,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column,
    v_batch, v_row, v_head, v_column, dout_batch, dout_row, dout_head, dout_column,
    plane0_batch, plane0_head, plane0_row, plane0_column, plane1_batch, plane1_head, plane1_row, plane1_column,
    plane2_batch, plane2_head, plane2_row, plane2_column, plane3_batch, plane3_head, plane3_row, plane3_column,
    plane4_batch, plane4_head, plane4_row, plane4_column, plane5_batch, plane5_head, plane5_row, plane5_column,
    scale, score_scale, log2_scale, q_size, kv_size, q_heads, sequences,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_Q queries of one head."""
    planes = (plane0, plane1, plane2, plane3, plane4, plane5)
    plane_strides = (
        (plane0_batch, plane0_head, plane0_row, plane0_column), (plane1_batch, plane1_head, plane1_row, plane1_column),
        (plane2_batch, plane2_head, plane2_row, plane2_column), (plane3_batch, plane3_head, plane3_row, plane3_column),
        (plane4_batch, plane4_head, plane4_row, plane4_column), (plane5_batch, plane5_head, plane5_row, plane5_column),
    )  # fmt: skip
    tile, head, batch = tile_head_batch(q_size, q_heads, sequences, BLOCK_Q, PACKED)
    if RIGHT is not None and LEFT is None and not PACKED:
        tile = tl.cdiv(q_size, BLOCK_Q) - 1 - tile  # as in the forward: the longest first
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

    place = (item, head, first_row)
    keys = (k, k_row, k_column)
    values = (v, v_row, v_column)
    start, full_start, full_end, end = kv_ranges(
        first_row, q_len, kv_len, LEFT, RIGHT, Q_LENGTHS or PACKED, BLOCK_Q, BLOCK_KV
    )
    if LEFT is not None:
        dq_tile, dq_rest = _gather_dq(
            dq_tile, dq_rest, q_tile, q_rest, dout_tile, lse_tile, delta_tile, keys, values,
            planes, plane_strides, place, score_scale,
            log2_scale, start, full_start, q_len, kv_len, HEAD_DIM, V_DIM, LEFT, RIGHT, True,
            SCORE, MASK, SLOPE, SLOTS, BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES,
        )  # fmt: skip
    dq_tile, dq_rest = _gather_dq(
        dq_tile, dq_rest, q_tile, q_rest, dout_tile, lse_tile, delta_tile, keys, values,
        planes, plane_strides, place, score_scale,
        log2_scale, full_start, full_end, q_len, kv_len, HEAD_DIM, V_DIM, LEFT, RIGHT, False,
        SCORE, MASK, SLOPE, SLOTS, BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES,
    )  # fmt: skip
    dq_tile, dq_rest = _gather_dq(
        dq_tile, dq_rest, q_tile, q_rest, dout_tile, lse_tile, delta_tile, keys, values,
        planes, plane_strides, place, score_scale,
        log2_scale, full_end, end, q_len, kv_len, HEAD_DIM, V_DIM, LEFT, RIGHT, True,
        SCORE, MASK, SLOPE, SLOTS, BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES,
    )  # fmt: skip
    q_rows = batch * tl.cast(q_size, tl.int64)
    rows_written = q_size
    if PACKED:
        q_rows += q_first
        rows_written = q_len
    dq = advance(advance(dq, q_rows, q_heads * HEAD_DIM), head, HEAD_DIM)
    store_tile(dq, dq_tile * scale, first_row, rows_written, q_heads * HEAD_DIM, BLOCK_Q, FIRST, WIDE)
    if FIRST < HEAD_DIM:
        dq = dq + FIRST
        store_tile(dq, dq_rest * scale, first_row, rows_written, q_heads * HEAD_DIM, BLOCK_Q, HEAD_DIM - FIRST, WIDE)


def backward(
    spec: AttentionSpec,
    config: AttentionConfig,
    inputs: tuple[Array | None, ...],
    outputs: tuple[Array, Array],
    gradients: tuple[Array, Array | None],
) -> Plan:
    """The gradients of all inputs that have one, each shaped as its input, from those of out and lse (None: zero)."""
    given = AttentionInputs(*inputs)
    out, lse = outputs
    dout, dlse = gradients
    q, k, v = given[:3]
    batch, q_size, q_heads, _ = q.shape
    _, kv_size, kv_heads, _ = k.shape
    arrays = {**arrays_of(given), "out": out, "lse": lse, "dout": dout}
    if dlse is not None:
        arrays["dlse"] = dlse
    results = {name: contiguous(array.shape, spec.dtype) for name, array in (("dq", q), ("dk", k), ("dv", v))}
    scratch = {name: contiguous((batch, q_heads, q_size), "float32") for name in ("log2_lse", "delta")}

    prepare = prepare_launch(spec, given, outputs, gradients)
    reads = names_of({**arrays, **scratch}, *(name for name in INPUTS if name != "sinks"), "dout", "log2_lse", "delta")
    expressed = spec.score is not None or spec.mask is not None
    numbers = {
        **strides_of(q=q, k=k, v=v, dout=dout),
        **score_numbers(spec, given),
        "scale": spec.softmax_scale,
        "log2_scale": None if expressed else spec.softmax_scale * log2(e),
    }
    options = {**score_constants(spec, given), "SLOPE": slope_of(spec)}
    tiles = checked(config.dkv, "dkv")
    grid = programs(kv_size, tiles.block_kv, kv_heads, given)
    constants = {**options, **size_constants(spec, tiles, given, dout, results["dk"], results["dv"])}
    how = tiles.num_warps, tiles.num_stages, spec.dtype
    dkv = Launch(_dkv_kernel, grid, reads, ("dk", "dv"), {**numbers, "kv_heads": kv_heads}, constants, *how)

    tiles = checked(config.dq, "dq")
    grid = programs(q_size, tiles.block_q, q_heads, given)
    constants = {**options, **size_constants(spec, tiles, given, dout, results["dq"])}
    how = tiles.num_warps, tiles.num_stages, spec.dtype
    dq = Launch(_dq_kernel, grid, reads, ("dq",), {**numbers, "q_heads": q_heads}, constants, *how)
    launches = [prepare, dkv, dq]
    if given.sinks is not None:
        launches.append(dsinks_launch(given))
    launches += [
        dplane_launch(spec, tiles, given, dout, reads, slot)
        for slot in spec.plane_gradients
        if given.planes[slot] is not None
    ]
    return Plan(tuple(launches), arrays, {**results, **gradient_arrays(spec, given)}, scratch)
