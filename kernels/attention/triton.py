"""Attention on GPUs, forward and backward, after FlashAttention-2 (Dao, arXiv:2307.08691).

Every program owns one tile of one head and walks the other sequence. Tiles in which every query sees every key take no
mask, those that the edge of a window or the end of a sequence cuts do, and those in which no query sees a key are never
read. Nothing is added atomically, so two runs agree to the bit. What a call leaves out costs nothing: lengths, sinks,
planes and expressions are constants of a kernel, and absent ones leave no instruction.

A loop stands in an `if` that it runs at all: without it the accumulators that it would skip and those that it leaves in
flight meet in the same registers, and on sm_90 ptxas then waits for every single wgmma.

Scores are exponentiated in base 2: `exp(scale * s) == exp2(scale * log2(e) * s)`.
"""

from __future__ import annotations

from math import e, log2
from typing import Any

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.targets import Target
from ..tiles.triton_expressions import constant, evaluate, indices, load_planes, truth
from ..tiles.triton_philox import kept
from ..tiles.triton_tiles import (
    LN_2,
    LOG2_E,
    advance,
    described,
    head_columns,
    kv_ranges,
    load_head_tile,
    load_tile,
    online_softmax,
    padded,
    rows_exist,
    store_tile,
    visible,
)
from .sparsity import differs_by_head, with_runs
from .spec import FLOAT8, INPUTS, AttentionInputs, AttentionSpec
from .tiles import AttentionConfig
from .triton_backward import backward
from .triton_common import (
    arrays_of,
    by_addresses,
    by_descriptors,
    checked,
    names_of,
    programs,
    score_constants,
    score_numbers,
    sink_strides,
    size_constants,
    strides_of,
)
from .triton_programs import runs_of, sequence_of, tile_head_batch_of_axes, within_run

__all__ = ["backward", "completed", "forward", "supports"]

_DTYPES = ("float16", "bfloat16", "float32", FLOAT8)
_WITH_FLOAT8 = ("sm_90", "sm_100", "gfx950", "interpret")
_MAX_HEAD_DIM = 576, 256  # in 16 and in 32 bits


def supports(spec: AttentionSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run, () if they can; forward and backward alike."""
    reasons = []
    if target.is_tpu:
        reasons.append(f"Triton compiles for GPUs, and the target is {target.name}; use implementation='pallas'.")
    if spec.dtype not in _DTYPES:
        reasons.append(
            f"The Triton kernels compute in {', '.join(_DTYPES)}, and the arrays are {spec.dtype}; "
            "cast them, or use implementation='library'."
        )
    if spec.is_float8 and target.name not in _WITH_FLOAT8:
        reasons.append(
            f"{target.name} has no products of {FLOAT8}"
            + (" (its own float8 is e4m3fnuz)" if target.name == "gfx942" else "")
            + f"; {', '.join(_WITH_FLOAT8[:-1])} have: multiply by the scales and cast to bfloat16."
        )
    if spec.is_float8 and needs_grad:
        reasons.append(f"{FLOAT8} has no backward; cast q, k and v to bfloat16, or wrap the call in no_grad.")
    limit = _MAX_HEAD_DIM[spec.dtype == "float32" and not target.interpreted]
    for name, size in (("head_dim", spec.head_dim), ("v_dim", spec.v_dim)):
        if not 1 <= size <= limit:
            reasons.append(
                f"The Triton kernels keep a whole head on chip: {name} is {size}, and it must be 1 to {limit}; "
                "use implementation='library'."
            )
    return tuple(reasons)


@triton.jit
def _attend(
    acc, total, peak, given, planes, plane_strides, place, scales, start, end, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOTS: tl.constexpr, DROPOUT: tl.constexpr,
    WEIGHT: tl.constexpr, EXPONENT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries attend to the keys in [start, end). `place` is (sequence, head, first row)."""
    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    SOME_HIDDEN: tl.constexpr = MASKED or MASK is not None or SCORE is not None
    LEAN: tl.constexpr = LEFT is not None or MASK is not None or SCORE is not None
    q_tile, q_rest, keys, values, seed = given
    k, k_row, k_column = keys
    v, v_row, v_column = values
    score_scale, log2_scale = scales
    if start < end:
        for first in tl.range(start, end, BLOCK_KV, num_stages=1 if MASKED and LEAN else None, disable_licm=LEAN):
            k_tile = load_head_tile(k, 0, first, kv_len, 0, k_row, k_column, BLOCK_KV, FIRST, MASKED, WIDE, DESCRIPTORS)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_Q, BLOCK_KV]
            if FIRST < HEAD_DIM:
                k_rest = load_tile(
                    k + FIRST * k_column, first, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM - FIRST, MASKED, WIDE
                )
                scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
            here = (place[0], place[1], place[2], first)
            at = indices(here, BLOCK_Q, BLOCK_KV, False)
            tiles = load_planes(
                planes, plane_strides, here, q_len, kv_len, SLOTS, BLOCK_Q, BLOCK_KV, MASKED, False, WIDE_PLANES
            )
            raw = scores
            if SCORE is not None:
                raw = scores * score_scale
                scores = evaluate(SCORE, raw, at, tiles)
            if MASK is not None:
                scores = tl.where(truth(evaluate(MASK, raw, at, tiles)), scores, float("-inf"))
            if MASKED:
                scores = tl.where(visible(at[2], at[3], q_len, kv_len, LEFT, RIGHT), scores, float("-inf"))
            weights, rescale, peak, total = online_softmax(scores, peak, total, log2_scale, SOME_HIDDEN, EXPONENT)
            if WEIGHT is not None:
                weights = weights * evaluate(WEIGHT, raw, at, tiles)
            if DROPOUT is not None:
                weights = tl.where(kept(seed, here, DROPOUT, BLOCK_Q, BLOCK_KV, False), weights, 0.0)
            v_tile = load_head_tile(v, 0, first, kv_len, 0, v_row, v_column, BLOCK_KV, V_DIM, MASKED, WIDE, DESCRIPTORS)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit
def _walk(
    acc, total, peak, given, planes, plane_strides, place, scales, ranges, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, RUNS: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOTS: tl.constexpr, DROPOUT: tl.constexpr,
    WEIGHT: tl.constexpr, EXPONENT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of all ranges: (start, full_start, full_end, end), as `kv_ranges` gives them."""
    start, full_start, full_end, end = ranges
    FULL_MASK: tl.constexpr = None if RUNS else MASK
    if LEFT is not None or RUNS:
        acc, total, peak = _attend(
            acc, total, peak, given, planes, plane_strides, place, scales, start, full_start, q_len, kv_len,
            HEAD_DIM, V_DIM, LEFT, RIGHT, True, SCORE, MASK, SLOTS, DROPOUT, WEIGHT, EXPONENT,
            BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, given, planes, plane_strides, place, scales, full_start, full_end, q_len, kv_len,
        HEAD_DIM, V_DIM, LEFT, RIGHT, False, SCORE, FULL_MASK, SLOTS, DROPOUT, WEIGHT, EXPONENT,
        BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, given, planes, plane_strides, place, scales, full_end, end, q_len, kv_len,
        HEAD_DIM, V_DIM, LEFT, RIGHT, True, SCORE, MASK, SLOTS, DROPOUT, WEIGHT, EXPONENT,
        BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
    )  # fmt: skip
    return acc, total, peak


@triton.jit(do_not_specialize=["q_size", "kv_size", "sequences"])
def _forward_kernel(
    q, k, v, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k, sinks, value_scales, seed, runs,
    plane0, plane1, plane2, plane3, plane4, plane5, out, lse,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column, v_batch, v_row, v_head, v_column,
    sinks_batch, sinks_head,
    plane0_batch, plane0_head, plane0_row, plane0_column, plane1_batch, plane1_head, plane1_row, plane1_column,
    plane2_batch, plane2_head, plane2_row, plane2_column, plane3_batch, plane3_head, plane3_row, plane3_column,
    plane4_batch, plane4_head, plane4_row, plane4_column, plane5_batch, plane5_head, plane5_row, plane5_column,
    score_scale, log2_scale, kept_share, q_size, kv_size, q_heads, sequences,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    LONGEST: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr,
    VALUE_SCALES: tl.constexpr, RUNS: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr, WEIGHT: tl.constexpr, EXPONENT: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_Q queries of one head."""
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
    if PACKED:
        q = advance(q, q_first, q_row)
        k = advance(k, kv_first, k_row)
        v = advance(v, kv_first, v_row)

    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    q_tile = load_tile(q, first_row, q_len, q_row, q_column, BLOCK_Q, FIRST, True, WIDE)
    q_rest = q_tile
    if FIRST < HEAD_DIM:
        q_rest = load_tile(
            q + FIRST * q_column, first_row, q_len, q_row, q_column, BLOCK_Q, HEAD_DIM - FIRST, True, WIDE
        )
    if NEGATE:  # for a negative scale: the peak of the scaled scores is the scaled peak only for a positive one
        q_tile = (-q_tile.to(tl.float32)).to(q_tile.dtype)
        q_rest = (-q_rest.to(tl.float32)).to(q_rest.dtype)
    acc = tl.zeros([BLOCK_Q, padded(V_DIM)], tl.float32)
    first_total = 0.0
    first_peak = float("-inf")
    if SINKS:
        ONE: tl.constexpr = 2.0**EXPONENT
        first_peak = tl.load(sinks + batch * sinks_batch + head * sinks_head) * LOG2_E
        if PACKED:
            first_peak = tl.where(item < sequences, first_peak, float("-inf"))
        first_total = tl.where(first_peak == float("-inf"), 0.0, ONE)
    total = tl.full([BLOCK_Q], first_total, tl.float32)
    peak = tl.full([BLOCK_Q], first_peak, tl.float32)

    if DESCRIPTORS:
        k = described(k, 1, kv_len, k_row, k_row, BLOCK_KV, HEAD_DIM)
        v = described(v, 1, kv_len, v_row, v_row, BLOCK_KV, V_DIM)
    given = (q_tile, q_rest, (k, k_row, k_column), (v, v_row, v_column), seed)
    place = (item, head, first_row)
    scales = (score_scale, log2_scale)
    ranges = kv_ranges(first_row, q_len, kv_len, LEFT, RIGHT, Q_LENGTHS or PACKED, BLOCK_Q, BLOCK_KV)
    if RUNS:
        first_run, end_run = runs_of(runs, item, head, tile, sequences, PACKED)
        for run in tl.range(first_run, end_run, 2, num_stages=1):
            acc, total, peak = _walk(
                acc, total, peak, given, planes, plane_strides, place, scales,
                within_run(runs, run, ranges[0], ranges[1], ranges[2], ranges[3], BLOCK_KV), q_len, kv_len,
                HEAD_DIM, V_DIM, LEFT, RIGHT, RUNS, SCORE, MASK, SLOTS, DROPOUT, WEIGHT, EXPONENT,
                BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
            )  # fmt: skip
    else:
        acc, total, peak = _walk(
            acc, total, peak, given, planes, plane_strides, place, scales, ranges, q_len, kv_len,
            HEAD_DIM, V_DIM, LEFT, RIGHT, RUNS, SCORE, MASK, SLOTS, DROPOUT, WEIGHT, EXPONENT,
            BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES, DESCRIPTORS,
        )  # fmt: skip

    if Q_LENGTHS:  # a query past the length sees no key
        exist = rows_exist(first_row, q_len, BLOCK_Q)
        acc = tl.where(exist[:, None], acc, 0.0)
        total = tl.where(exist, total, first_total)
        peak = tl.where(exist, peak, first_peak)
    # A row that saw no key has total 0 and peak -inf: its output is 0, its lse -inf.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if DROPOUT is not None:
        acc = acc / kept_share
    if VALUE_SCALES:
        acc = acc * tl.load(value_scales + batch * q_heads + head)
    out = advance(advance(out, batch * tl.cast(q_size, tl.int64), q_heads * V_DIM), head, V_DIM)
    rows_written = q_size
    if PACKED:
        out = advance(out, q_first, q_heads * V_DIM)
        rows_written = q_len
    store_tile(out, acc, first_row, rows_written, q_heads * V_DIM, BLOCK_Q, V_DIM, WIDE)
    lse = advance(lse, batch * q_heads + head, q_size)
    if PACKED:
        lse = lse + q_first
    tl.store(
        lse + first_row + tl.arange(0, BLOCK_Q),
        (peak + tl.log2(total) - EXPONENT) * LN_2 if EXPONENT else (peak + tl.log2(total)) * LN_2,
        mask=rows_exist(first_row, rows_written, BLOCK_Q),
    )


def completed(spec: AttentionSpec, config: AttentionConfig, target: Target, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with what the host can say of the mask, from the planes that are NumPy's.

    The kernel of dk and dv goes through all the query heads that share a key head at once, which then must see alike.
    """
    tiles = {"forward_runs": config.forward, "dkv_runs": config.dkv, "dq_runs": config.dq}
    blocks = {name: (each.block_q, each.block_kv) for name, each in tiles.items()}
    found = with_runs(spec, AttentionInputs(*inputs), blocks)
    shared = found.q.shape[2] != found.k.shape[2]
    if shared and found.dkv_runs is not None and differs_by_head(found.dkv_runs):
        return found._replace(dkv_runs=None)
    return found


def forward(spec: AttentionSpec, config: AttentionConfig, *inputs: Array | None) -> Plan:
    """out `[batch, q_len, q_heads, v_dim]` and lse `[batch, q_heads, q_len]`."""
    given = AttentionInputs(*inputs)
    arrays = arrays_of(given)
    batch, q_len, q_heads, _ = given.q.shape
    tiles = checked(config.forward, "forward")
    outputs = {
        "out": contiguous((batch, q_len, q_heads, spec.v_dim), spec.out_dtype),
        "lse": contiguous((batch, q_heads, q_len), "float32"),
    }
    log2_scale = log2(e) * (abs(spec.softmax_scale) if spec.score is None else 1.0)
    numbers = {
        **strides_of(q=given.q, k=given.k, v=given.v),
        **sink_strides(given),
        **score_numbers(spec, given),
        "log2_scale": max(log2_scale, 1e-30),  # not 0, for 0 * -inf is not -inf
        "kept_share": 1 - spec.dropout if spec.dropout else None,
        "q_heads": q_heads,
    }
    constants = {
        **score_constants(spec, given),
        **size_constants(spec, tiles, given, outputs["out"]),
        "SINKS": given.sinks is not None,
        "VALUE_SCALES": given.value_scales is not None,
        "RUNS": given.forward_runs is not None,
        "WEIGHT": constant(spec.weight),
        "EXPONENT": spec.weight_exponent,
        "NEGATE": spec.score is None and spec.softmax_scale < 0,
        "DESCRIPTORS": by_descriptors(tiles, given.k, given.v),
    }
    grid = programs(spec, tiles, given, by_keys=False)
    constants["LONGEST"] = len(grid) == 3
    how = tiles.num_warps, tiles.num_stages, spec.dtype, by_addresses(constants)
    reads = names_of(arrays, *(name for name in INPUTS if name not in ("dkv_runs", "dq_runs")))
    launch = Launch(_forward_kernel, grid, reads, ("out", "lse"), numbers, constants, *how)
    return Plan((launch,), arrays, outputs)
