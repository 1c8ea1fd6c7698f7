"""The gradients of attention's planes and sinks on GPUs.

A program owns a tile of the plane's own shape and goes through all the scores that read it, however many batch items,
heads, queries or keys share it, so that sums come out in one order. The weights are recomputed from lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.expressions import SCORE, plane
from ..tiles.launch import Array, Launch, contiguous
from ..tiles.triton_expressions import evaluate, indices, load_planes, score_constant
from ..tiles.triton_philox import kept
from ..tiles.triton_tiles import LOG2_E, advance, head_columns, kv_ranges, load_rows, load_tile
from .spec import AttentionInputs, AttentionSpec
from .tiles import AttentionTiles
from .triton_common import score_constants, score_numbers, sink_strides, size_constants, slope_of, strides_of
from .triton_programs import length_of, rows_of_sequence
from .triton_weights import weigh

_SUMMED = 512  # numbers at a time


@triton.jit
def _gather_dplane(
    acc, q_tile, q_rest, dout_tile, lse_tile, delta_tile, keys, values, seed, kept_share,
    planes, plane_strides, place, score_scale,
    start, end, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
):  # fmt: skip
    """Add what the keys in [start, end) send back. `place` is (sequence, head, first row)."""
    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    k, k_row, k_column = keys
    v, v_row, v_column = values
    for first in tl.range(start, end, BLOCK_KV, num_stages=1, disable_licm=True):
        k_tile = load_tile(k, first, kv_len, k_row, k_column, BLOCK_KV, FIRST, True, WIDE)
        v_tile = load_tile(v, first, kv_len, v_row, v_column, BLOCK_KV, V_DIM, True, WIDE)
        here = (place[0], place[1], place[2], first)
        at = indices(here, BLOCK_Q, BLOCK_KV, False)
        tiles = load_planes(
            planes, plane_strides, here, q_len, kv_len, SLOTS, BLOCK_Q, BLOCK_KV, True, False, WIDE_PLANES
        )
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if FIRST < HEAD_DIM:
            k_rest = load_tile(
                k + FIRST * k_column, first, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM - FIRST, True, WIDE
            )
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        weights, raw = weigh(
            scores, lse_tile, at, tiles, score_scale, 1.0, q_len, kv_len, LEFT, RIGHT, SCORE, MASK, True, 1
        )
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        if DROPOUT is not None:
            stay = kept(seed, here, DROPOUT, BLOCK_Q, BLOCK_KV, False)
            dweights = tl.where(stay, dweights / kept_share, 0.0)
        change = weights * (dweights - delta_tile[:, None])
        if SLOPE is not None:
            change = change * evaluate(SLOPE, raw, at, tiles)
        acc += tl.where(weights != 0.0, change, 0.0)
    return acc


@triton.jit(do_not_specialize=["q_size", "kv_size", "sequences", "items"])
def _dplane_kernel(
    q, k, v, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_k, seed,
    plane0, plane1, plane2, plane3, plane4, plane5, dout, log2_lse, delta, dplane,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column,
    v_batch, v_row, v_head, v_column, dout_batch, dout_row, dout_head, dout_column,
    plane0_batch, plane0_head, plane0_row, plane0_column, plane1_batch, plane1_head, plane1_row, plane1_column,
    plane2_batch, plane2_head, plane2_row, plane2_column, plane3_batch, plane3_head, plane3_row, plane3_column,
    plane4_batch, plane4_head, plane4_row, plane4_column, plane5_batch, plane5_head, plane5_row, plane5_column,
    score_scale, kept_share, q_size, kv_size, q_heads, sequences, items, rows, columns,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr, VARIES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr, WIDE_PLANES: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of a plane [items, heads, rows, columns], summed where VARIES says that it is 1."""
    planes = (plane0, plane1, plane2, plane3, plane4, plane5)
    plane_strides = (
        (plane0_batch, plane0_head, plane0_row, plane0_column), (plane1_batch, plane1_head, plane1_row, plane1_column),
        (plane2_batch, plane2_head, plane2_row, plane2_column), (plane3_batch, plane3_head, plane3_row, plane3_column),
        (plane4_batch, plane4_head, plane4_row, plane4_column), (plane5_batch, plane5_head, plane5_row, plane5_column),
    )  # fmt: skip
    FIRST: tl.constexpr = head_columns(HEAD_DIM)
    part = tl.program_id(0)
    row_begin, row_end, part = _part(part, VARIES[2], q_size, rows, BLOCK_Q)
    column_begin, column_end, part = _part(part, VARIES[3], kv_size, columns, BLOCK_KV)
    head_begin, head_end, part = _part(part, VARIES[1], q_heads, q_heads, 1)
    item_begin, item_end, part = _part(part, VARIES[0], items, items, 1)

    acc = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)
    for item in tl.range(item_begin, item_end, disable_licm=True):
        q_first = 0
        kv_first = 0
        batch = item
        if PACKED:
            batch = 0
            q_first, q_len = rows_of_sequence(cu_seqlens_q, sequences, item, q_size)
            kv_first, kv_len = rows_of_sequence(cu_seqlens_k, sequences, item, kv_size)
        else:
            q_len = length_of(q_lengths, item, q_size, Q_LENGTHS)
            kv_len = length_of(kv_lengths, item, kv_size, KV_LENGTHS)
        for head in tl.range(head_begin, head_end, disable_licm=True):
            q_of_head = advance(advance(advance(q, batch, q_batch), head, q_head), q_first, q_row)
            dout_of_head = advance(advance(advance(dout, batch, dout_batch), head, dout_head), q_first, dout_row)
            keys = (
                advance(advance(advance(k, batch, k_batch), head // GROUP, k_head), kv_first, k_row),
                k_row,
                k_column,
            )
            values = (
                advance(advance(advance(v, batch, v_batch), head // GROUP, v_head), kv_first, v_row), v_row, v_column
            )  # fmt: skip
            lse_of_head = advance(log2_lse, batch * q_heads + head, q_size) + q_first
            delta_of_head = advance(delta, batch * q_heads + head, q_size) + q_first
            for first_row in tl.range(row_begin, tl.minimum(row_end, q_len), BLOCK_Q, num_stages=1, disable_licm=True):
                q_tile = load_tile(q_of_head, first_row, q_len, q_row, q_column, BLOCK_Q, FIRST, True, WIDE)
                q_rest = q_tile
                if FIRST < HEAD_DIM:
                    q_rest = load_tile(
                        q_of_head + FIRST * q_column, first_row, q_len, q_row, q_column,
                        BLOCK_Q, HEAD_DIM - FIRST, True, WIDE,
                    )  # fmt: skip
                dout_tile = load_tile(dout_of_head, first_row, q_len, dout_row, dout_column, BLOCK_Q, V_DIM, True, WIDE)
                lse_tile = load_rows(lse_of_head, first_row, q_len, 1, float("inf"), BLOCK_Q)
                delta_tile = load_rows(delta_of_head, first_row, q_len, 1, 0.0, BLOCK_Q)
                start, _, _, end = kv_ranges(first_row, q_len, kv_len, LEFT, RIGHT, False, BLOCK_Q, BLOCK_KV)
                acc = _gather_dplane(
                    acc, q_tile, q_rest, dout_tile, lse_tile, delta_tile, keys, values, seed, kept_share,
                    planes, plane_strides, (item, head, first_row), score_scale,
                    tl.maximum(column_begin, start), tl.minimum(column_end, end), q_len, kv_len,
                    HEAD_DIM, V_DIM, LEFT, RIGHT, SCORE, MASK, SLOPE, SLOTS, DROPOUT,
                    BLOCK_Q, BLOCK_KV, WIDE, WIDE_PLANES,
                )  # fmt: skip

    plane_head = head_begin
    plane_row = tl.cast(item_begin, tl.int64)
    if VARIES[1]:
        plane_row = plane_row * q_heads
    plane_row = (plane_row + plane_head) * rows + row_begin
    if VARIES[2]:
        down = tl.arange(0, BLOCK_Q)[:, None]
    else:
        acc = tl.sum(acc, axis=0, keep_dims=True)
        down = tl.zeros([1, 1], tl.int32)
    if VARIES[3]:
        along = tl.arange(0, BLOCK_KV)[None, :]
    else:
        acc = tl.sum(acc, axis=1, keep_dims=True)
        along = tl.zeros([1, 1], tl.int32)
    pointers = advance(dplane, plane_row, columns) + column_begin + (down.to(tl.int64) * columns + along)
    exist = (row_begin + down < rows) & (column_begin + along < columns)
    tl.store(pointers, acc.to(dplane.dtype.element_ty), mask=exist)


@triton.jit
def _part(part, VARIES: tl.constexpr, size, plane_size, BLOCK: tl.constexpr):
    """(begin, end, rest): the part of a dimension that this program adds up, all of it where the plane is 1."""
    begin = 0
    end = size
    if VARIES:
        parts = tl.cdiv(plane_size, BLOCK)
        begin = part % parts * BLOCK
        end = tl.minimum(begin + BLOCK, plane_size)
        part = part // parts
    return begin, end, part


def _tiles(spec: AttentionSpec, tiles: AttentionTiles) -> AttentionTiles:
    """Those of dq, made smaller: the gradient of a tile of scores stays in registers beside the scores."""
    warps = 8 if max(spec.head_dim, spec.v_dim) > 64 else 4
    return AttentionTiles(min(tiles.block_q, 64), min(tiles.block_kv, 32), warps, 1)


def dplane_launches(
    spec: AttentionSpec,
    dq_tiles: AttentionTiles,
    inputs: AttentionInputs,
    dout: Array,
    reads: tuple[str, ...],
    slot: int,
) -> tuple[list[Launch], dict[str, Array]]:
    """The gradient of one plane, and the scratch of it; `reads` are the names of what the kernel of dq reads.

    One of a number for all queries and keys would have a program a head, or one: it is made of one of a number a query.
    """
    tiles = _tiles(spec, dq_tiles)
    name, shape = f"dplane{slot}", inputs.planes[slot].shape
    packed = inputs.cu_seqlens_q is not None
    sums: list[Launch] = []
    scratch: dict[str, Array] = {}
    if shape[2] == shape[3] == 1:
        total, name, rows = name, f"{name}_rows", spec.max_seqlen_q if packed else inputs.q.shape[1]
        shape = *shape[:2], rows, 1
        scratch[name] = contiguous(shape, "float32")
        sums.append(Launch(_sum_kernel, (shape[0] * shape[1],), (name,), (total,), {"size": rows}, {"BLOCK": _SUMMED}))
    numbers = {
        **strides_of(q=inputs.q, k=inputs.k, v=inputs.v, dout=dout),
        **score_numbers(spec, inputs),
        "score_scale": spec.softmax_scale,
        "kept_share": 1 - spec.dropout if spec.dropout else None,
        "q_heads": inputs.q.shape[2],
        "items": inputs.cu_seqlens_q.shape[0] - 1 if packed else inputs.q.shape[0],
        "rows": shape[2],
        "columns": shape[3],
    }
    constants = {
        **score_constants(spec, inputs),
        **size_constants(spec, tiles, inputs, dout),
        "SCORE": score_constant(spec.score or SCORE),
        "SLOPE": slope_of(spec, plane(slot)),
        "VARIES": tuple(size != 1 for size in shape),
    }
    grid = (shape[0] * shape[1] * triton.cdiv(shape[2], tiles.block_q) * triton.cdiv(shape[3], tiles.block_kv),)
    how = tiles.num_warps, tiles.num_stages, spec.dtype
    return [Launch(_dplane_kernel, grid, reads, (name,), numbers, constants, *how), *sums], scratch


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(rows, total, size, BLOCK: tl.constexpr):
    """The sum of one run of `size` numbers."""
    rows = advance(rows, tl.program_id(0), size)
    found = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        found += load_rows(rows, first, size, 1, 0.0, BLOCK)
    tl.store(total + tl.program_id(0), tl.sum(found, axis=0).to(total.dtype.element_ty))


@triton.jit(do_not_specialize=["q_size"])
def _dsinks_kernel(sinks, log2_lse, delta, dsinks, sinks_batch, sinks_head, q_size, q_heads, BLOCK_Q: tl.constexpr):
    """The gradient of the sink of one head, -sum(exp(sink - lse) * delta)."""
    head = tl.program_id(0) % q_heads
    batch = tl.program_id(0) // q_heads
    sink = tl.load(sinks + batch * sinks_batch + head * sinks_head) * LOG2_E
    log2_lse = advance(log2_lse, tl.program_id(0), q_size)
    delta = advance(delta, tl.program_id(0), q_size)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, q_size, BLOCK_Q):
        lse_tile = load_rows(log2_lse, first, q_size, 1, float("inf"), BLOCK_Q)
        total += tl.exp2(sink - lse_tile) * load_rows(delta, first, q_size, 1, 0.0, BLOCK_Q)
    tl.store(dsinks + tl.program_id(0), -tl.sum(total, axis=0))


def dsinks_launch(inputs: AttentionInputs) -> Launch:
    """The gradient of the sinks, one program a sink."""
    numbers = {**sink_strides(inputs), "q_size": inputs.q.shape[1], "q_heads": inputs.q.shape[2]}
    grid = (inputs.q.shape[0] * inputs.q.shape[2],)
    reads = ("sinks", "log2_lse", "delta")
    return Launch(_dsinks_kernel, grid, reads, ("dsinks",), numbers, {"BLOCK_Q": _SUMMED})


def gradient_arrays(spec: AttentionSpec, inputs: AttentionInputs) -> dict[str, Array]:
    """Those of the sinks and of the planes that want one, by name."""
    found = {} if inputs.sinks is None else {"dsinks": contiguous(inputs.sinks.shape, inputs.sinks.dtype)}
    for slot in spec.plane_gradients:
        array = inputs.planes[slot]
        if array is not None:
            found[f"dplane{slot}"] = contiguous(array.shape, array.dtype)
    return found
