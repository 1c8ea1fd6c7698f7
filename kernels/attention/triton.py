"""Attention on GPUs, forward and backward, after FlashAttention-2 (Dao, arXiv:2307.08691).

Every program owns one tile of one head and walks the other sequence. Tiles in which every query sees every key take no
mask, those that the diagonal or the end of a sequence cuts do, and those in which no query sees a key are never read.
Nothing is added atomically, so two runs agree to the bit.

A loop stands in an `if` that it runs at all: without it the accumulators that it would skip and those that it leaves in
flight meet in the same registers, and on sm_90 ptxas then waits for every single wgmma.

Scores are exponentiated in base 2: `exp(scale * s) == exp2(scale * log2(e) * s)`.
"""

from __future__ import annotations

from math import e, log2

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.targets import Target
from ..tiles.triton_tiles import (
    LN_2,
    LOG2_E,
    advance,
    kv_ranges,
    load_rows,
    load_tile,
    needs_wide_offsets,
    online_softmax,
    padded,
    q_ranges,
    rows_exist,
    store_tile,
    visible,
)
from .spec import MAX_HEAD_DIM, AttentionSpec
from .tiles import AttentionConfig, AttentionTiles

_PREPARE_ROWS = 32
_DTYPES = ("float16", "bfloat16", "float32")


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
    if spec.dtype == "bfloat16" and target.interpreted:
        reasons.append(
            "Triton 3.9's interpreter computes bfloat16 wrongly; use float16 or float32 here, or run on a GPU."
        )
    for name, size in (("head_dim", spec.head_dim), ("v_dim", spec.v_dim)):
        if not 1 <= size <= MAX_HEAD_DIM:
            reasons.append(
                f"The Triton kernels keep a whole head on chip: {name} is {size}, and it must be 1 to {MAX_HEAD_DIM}; "
                "use implementation='library'."
            )
    return tuple(reasons)


@triton.jit
def _tile_head_batch(length, heads, BLOCK: tl.constexpr):
    """This program's tile of the sequence, its head and its batch item; the tiles of a head share it in cache."""
    program = tl.program_id(0)
    tiles = tl.cdiv(length, BLOCK)
    return program % tiles, program // tiles % heads, program // tiles // heads


# Forward


@triton.jit
def _attend(
    acc, total, peak, q_tile, k, v, k_row, k_column, v_row, v_column, log2_scale, first_row, start, end, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries attend to the keys in [start, end)."""
    if start < end:
        for first in range(start, end, BLOCK_KV):
            k_tile = load_tile(k, first, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM, MASKED, WIDE)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_Q, BLOCK_KV]
            if MASKED:
                queries = (first_row + tl.arange(0, BLOCK_Q))[:, None]
                keys = (first + tl.arange(0, BLOCK_KV))[None, :]
                scores = tl.where(visible(queries, keys, q_len, kv_len, CAUSAL), scores, float("-inf"))
            weights, rescale, peak, total = online_softmax(scores, peak, total, log2_scale, MASKED)
            v_tile = load_tile(v, first, kv_len, v_row, v_column, BLOCK_KV, V_DIM, MASKED, WIDE)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def _forward_kernel(
    q, k, v, out, lse,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column, v_batch, v_row, v_head, v_column,
    log2_scale, q_len, kv_len, q_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_Q queries of one head."""
    tile, head, batch = _tile_head_batch(q_len, q_heads, BLOCK_Q)
    if CAUSAL:
        tile = tl.cdiv(q_len, BLOCK_Q) - 1 - tile  # the last tiles see the most keys: begin with them
    first_row = tile * BLOCK_Q
    q = advance(advance(q, batch, q_batch), head, q_head)
    k = advance(advance(k, batch, k_batch), head // GROUP, k_head)
    v = advance(advance(v, batch, v_batch), head // GROUP, v_head)

    q_tile = load_tile(q, first_row, q_len, q_row, q_column, BLOCK_Q, HEAD_DIM, True, WIDE)
    if NEGATE:  # for a negative scale: the peak of the scaled scores is the scaled peak only for a positive one
        q_tile = -q_tile
    acc = tl.zeros([BLOCK_Q, padded(V_DIM)], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)

    full, end = kv_ranges(first_row, q_len, kv_len, CAUSAL, BLOCK_Q, BLOCK_KV)
    acc, total, peak = _attend(
        acc, total, peak, q_tile, k, v, k_row, k_column, v_row, v_column, log2_scale,
        first_row, 0, full, q_len, kv_len, HEAD_DIM, V_DIM, CAUSAL, False, BLOCK_Q, BLOCK_KV, WIDE,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q_tile, k, v, k_row, k_column, v_row, v_column, log2_scale,
        first_row, full, end, q_len, kv_len, HEAD_DIM, V_DIM, CAUSAL, True, BLOCK_Q, BLOCK_KV, WIDE,
    )  # fmt: skip

    # A row that saw no key has total 0 and peak -inf: its output is 0, its lse -inf.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = advance(advance(out, batch * tl.cast(q_len, tl.int64), q_heads * V_DIM), head, V_DIM)
    store_tile(out, acc, first_row, q_len, q_heads * V_DIM, BLOCK_Q, V_DIM, WIDE)
    lse_rows = advance(lse, batch * q_heads + head, q_len) + first_row + tl.arange(0, BLOCK_Q)
    tl.store(lse_rows, (peak + tl.log2(total)) * LN_2, mask=rows_exist(first_row, q_len, BLOCK_Q))


def forward(spec: AttentionSpec, config: AttentionConfig, q: Array, k: Array, v: Array) -> Plan:
    """out `[batch, q_len, q_heads, v_dim]` and lse `[batch, q_heads, q_len]`."""
    batch, q_len, q_heads, _ = q.shape
    kv_len = k.shape[1]
    tiles = _checked(config.forward, "forward")
    outputs = {
        "out": contiguous((batch, q_len, q_heads, spec.v_dim), spec.dtype),
        "lse": contiguous((batch, q_heads, q_len), "float32"),
    }
    numbers = {
        **_strides(q=q, k=k, v=v),
        "log2_scale": max(abs(spec.softmax_scale) * log2(e), 1e-30),  # not 0, for 0 * -inf is not -inf
        **{"q_len": q_len, "kv_len": kv_len, "q_heads": q_heads},
    }
    constants = {**_constants(spec, tiles, q, k, v, outputs["out"]), "NEGATE": spec.softmax_scale < 0}
    grid = (triton.cdiv(q_len, tiles.block_q) * q_heads * batch,)
    how = tiles.num_warps, tiles.num_stages, spec.dtype
    launch = Launch(_forward_kernel, grid, ("q", "k", "v"), ("out", "lse"), numbers, constants, *how)
    return Plan((launch,), {"q": q, "k": k, "v": v}, outputs)


# Backward: recompute the weights from lse, then the gradients of keys and values, then that of queries


@triton.jit(do_not_specialize=["q_len"])
def _prepare_kernel(
    out, lse, dout, dlse, log2_lse, delta,
    out_batch, out_row, out_head, out_column, lse_batch, lse_head, lse_row,
    dout_batch, dout_row, dout_head, dout_column, dlse_batch, dlse_head, dlse_row, q_len, q_heads,
    V_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of each query: lse in base 2, and delta = sum(out * dout) - dlse.

    A query that saw no key gets lse +inf, so that its weights `exp2(score - lse)` are 0 and not NaN.
    """
    tile, head, batch = _tile_head_batch(q_len, q_heads, BLOCK_Q)
    first_row = tile * BLOCK_Q
    exist = rows_exist(first_row, q_len, BLOCK_Q)
    out = advance(advance(out, batch, out_batch), head, out_head)
    dout = advance(advance(dout, batch, dout_batch), head, dout_head)
    lse = advance(advance(lse, batch, lse_batch), head, lse_head)

    out_tile = load_tile(out, first_row, q_len, out_row, out_column, BLOCK_Q, V_DIM, True, WIDE)
    dout_tile = load_tile(dout, first_row, q_len, dout_row, dout_column, BLOCK_Q, V_DIM, True, WIDE)
    lse_tile = load_rows(lse, first_row, q_len, lse_row, 0.0, BLOCK_Q)
    empty = lse_tile == float("-inf")
    delta_tile = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), axis=1)
    if dlse is not None:
        dlse = advance(advance(dlse, batch, dlse_batch), head, dlse_head)
        delta_tile -= load_rows(dlse, first_row, q_len, dlse_row, 0.0, BLOCK_Q)

    rows = first_row + tl.arange(0, BLOCK_Q)
    log2_lse = advance(log2_lse, batch * q_heads + head, q_len)
    delta = advance(delta, batch * q_heads + head, q_len)
    tl.store(log2_lse + rows, tl.where(empty, float("inf"), lse_tile * LOG2_E), mask=exist)
    tl.store(delta + rows, tl.where(empty, 0.0, delta_tile), mask=exist)


@triton.jit
def _gather_dkv(
    dk, dv, k_tile, v_tile, q, dout, q_row, q_head, q_column, dout_row, dout_head, dout_column, log2_lse, delta,
    log2_scale, first_column, start, end, q_len, kv_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add what the queries in [start, end) of each head of the group send back to a tile of keys.

    Scores are transposed, [BLOCK_KV, BLOCK_Q], so that the weights stay in registers for the second product. One loop
    runs through all the heads, which keeps loads in flight from one head to the next. To leave the registers to the two
    accumulators, the masked loop, which has few steps, is not pipelined, and nothing is moved out of the loops.
    """
    tiles = (end - start) // BLOCK_Q
    if tiles > 0:
        for step in tl.range(0, GROUP * tiles, num_stages=1 if MASKED else None, disable_licm=True):
            member = step // tiles if GROUP > 1 else 0
            first = start + (step - member * tiles) * BLOCK_Q
            q_of_head = advance(q, member, q_head)
            dout_of_head = advance(dout, member, dout_head)
            q_tile = load_tile(q_of_head, first, q_len, q_row, q_column, BLOCK_Q, HEAD_DIM, MASKED, WIDE)
            dout_tile = load_tile(dout_of_head, first, q_len, dout_row, dout_column, BLOCK_Q, V_DIM, MASKED, WIDE)
            # The end of either sequence needs no mask: a query past it has lse +inf, a key past it is not stored.
            lse_tile = load_rows(advance(log2_lse, member, q_len), first, q_len, 1, float("inf"), BLOCK_Q, MASKED)
            delta_tile = load_rows(advance(delta, member, q_len), first, q_len, 1, 0.0, BLOCK_Q, MASKED)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            weights = tl.exp2(scores * log2_scale - lse_tile[None, :])
            if MASKED and CAUSAL:
                queries = (first + tl.arange(0, BLOCK_Q))[None, :]
                keys = (first_column + tl.arange(0, BLOCK_KV))[:, None]
                weights = tl.where(visible(queries, keys, q_len, kv_len, CAUSAL), weights, 0.0)
            dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            dscores = weights * (dweights - delta_tile[None, :])
            dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def _dkv_kernel(
    q, k, v, dout, log2_lse, delta, dk, dv,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column,
    v_batch, v_row, v_head, v_column, dout_batch, dout_row, dout_head, dout_column,
    scale, log2_scale, q_len, kv_len, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_KV keys of one key head, summed over the GROUP query heads that share it."""
    tile, kv_head, batch = _tile_head_batch(kv_len, kv_heads, BLOCK_KV)
    first_column = tile * BLOCK_KV
    first_head = kv_head * GROUP
    k = advance(advance(k, batch, k_batch), kv_head, k_head)
    v = advance(advance(v, batch, v_batch), kv_head, v_head)
    q = advance(advance(q, batch, q_batch), first_head, q_head)
    dout = advance(advance(dout, batch, dout_batch), first_head, dout_head)
    log2_lse = advance(log2_lse, batch * kv_heads * GROUP + first_head, q_len)
    delta = advance(delta, batch * kv_heads * GROUP + first_head, q_len)

    k_tile = load_tile(k, first_column, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM, True, WIDE)
    v_tile = load_tile(v, first_column, kv_len, v_row, v_column, BLOCK_KV, V_DIM, True, WIDE)
    dk_tile = tl.zeros([BLOCK_KV, padded(HEAD_DIM)], tl.float32)
    dv_tile = tl.zeros([BLOCK_KV, padded(V_DIM)], tl.float32)

    start, full = q_ranges(first_column, q_len, kv_len, CAUSAL, BLOCK_Q, BLOCK_KV)
    dk_tile, dv_tile = _gather_dkv(
        dk_tile, dv_tile, k_tile, v_tile, q, dout, q_row, q_head, q_column, dout_row, dout_head, dout_column, log2_lse,
        delta, log2_scale, first_column, start, full, q_len, kv_len,
        GROUP, HEAD_DIM, V_DIM, CAUSAL, True, BLOCK_Q, BLOCK_KV, WIDE,
    )  # fmt: skip
    dk_tile, dv_tile = _gather_dkv(
        dk_tile, dv_tile, k_tile, v_tile, q, dout, q_row, q_head, q_column, dout_row, dout_head, dout_column, log2_lse,
        delta, log2_scale, first_column, full, q_len, q_len, kv_len,
        GROUP, HEAD_DIM, V_DIM, CAUSAL, False, BLOCK_Q, BLOCK_KV, WIDE,
    )  # fmt: skip

    kv_rows = batch * tl.cast(kv_len, tl.int64)
    dk = advance(advance(dk, kv_rows, kv_heads * HEAD_DIM), kv_head, HEAD_DIM)
    dv = advance(advance(dv, kv_rows, kv_heads * V_DIM), kv_head, V_DIM)
    store_tile(dk, dk_tile * scale, first_column, kv_len, kv_heads * HEAD_DIM, BLOCK_KV, HEAD_DIM, WIDE)
    store_tile(dv, dv_tile, first_column, kv_len, kv_heads * V_DIM, BLOCK_KV, V_DIM, WIDE)


@triton.jit
def _gather_dq(
    dq, q_tile, dout_tile, lse_tile, delta_tile, k, v, k_row, k_column, v_row, v_column, log2_scale,
    first_row, start, end, q_len, kv_len,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add what the keys in [start, end) send back to a tile of queries. Tiles are [BLOCK_Q, BLOCK_KV]."""
    if start < end:
        for first in range(start, end, BLOCK_KV):
            k_tile = load_tile(k, first, kv_len, k_row, k_column, BLOCK_KV, HEAD_DIM, MASKED, WIDE)
            v_tile = load_tile(v, first, kv_len, v_row, v_column, BLOCK_KV, V_DIM, MASKED, WIDE)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            weights = tl.exp2(scores * log2_scale - lse_tile[:, None])
            if MASKED:
                queries = (first_row + tl.arange(0, BLOCK_Q))[:, None]
                keys = (first + tl.arange(0, BLOCK_KV))[None, :]
                weights = tl.where(visible(queries, keys, q_len, kv_len, CAUSAL), weights, 0.0)
            dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            dscores = weights * (dweights - delta_tile[:, None])
            dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def _dq_kernel(
    q, k, v, dout, log2_lse, delta, dq,
    q_batch, q_row, q_head, q_column, k_batch, k_row, k_head, k_column,
    v_batch, v_row, v_head, v_column, dout_batch, dout_row, dout_head, dout_column,
    scale, log2_scale, q_len, kv_len, q_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_Q queries of one head."""
    tile, head, batch = _tile_head_batch(q_len, q_heads, BLOCK_Q)
    if CAUSAL:
        tile = tl.cdiv(q_len, BLOCK_Q) - 1 - tile  # as in the forward: the longest first
    first_row = tile * BLOCK_Q
    q = advance(advance(q, batch, q_batch), head, q_head)
    k = advance(advance(k, batch, k_batch), head // GROUP, k_head)
    v = advance(advance(v, batch, v_batch), head // GROUP, v_head)
    dout = advance(advance(dout, batch, dout_batch), head, dout_head)
    log2_lse = advance(log2_lse, batch * q_heads + head, q_len)
    delta = advance(delta, batch * q_heads + head, q_len)

    q_tile = load_tile(q, first_row, q_len, q_row, q_column, BLOCK_Q, HEAD_DIM, True, WIDE)
    dout_tile = load_tile(dout, first_row, q_len, dout_row, dout_column, BLOCK_Q, V_DIM, True, WIDE)
    lse_tile = load_rows(log2_lse, first_row, q_len, 1, float("inf"), BLOCK_Q)
    delta_tile = load_rows(delta, first_row, q_len, 1, 0.0, BLOCK_Q)
    dq_tile = tl.zeros([BLOCK_Q, padded(HEAD_DIM)], tl.float32)

    full, end = kv_ranges(first_row, q_len, kv_len, CAUSAL, BLOCK_Q, BLOCK_KV)
    dq_tile = _gather_dq(
        dq_tile, q_tile, dout_tile, lse_tile, delta_tile, k, v, k_row, k_column, v_row, v_column, log2_scale,
        first_row, 0, full, q_len, kv_len, HEAD_DIM, V_DIM, CAUSAL, False, BLOCK_Q, BLOCK_KV, WIDE,
    )  # fmt: skip
    dq_tile = _gather_dq(
        dq_tile, q_tile, dout_tile, lse_tile, delta_tile, k, v, k_row, k_column, v_row, v_column, log2_scale,
        first_row, full, end, q_len, kv_len, HEAD_DIM, V_DIM, CAUSAL, True, BLOCK_Q, BLOCK_KV, WIDE,
    )  # fmt: skip
    dq = advance(advance(dq, batch * tl.cast(q_len, tl.int64), q_heads * HEAD_DIM), head, HEAD_DIM)
    store_tile(dq, dq_tile * scale, first_row, q_len, q_heads * HEAD_DIM, BLOCK_Q, HEAD_DIM, WIDE)


def backward(
    spec: AttentionSpec,
    config: AttentionConfig,
    inputs: tuple[Array, Array, Array],
    outputs: tuple[Array, Array],
    gradients: tuple[Array, Array | None],
) -> Plan:
    """dq, dk and dv, shaped as q, k and v, from the gradients of out and lse (None: zero)."""
    q, k, v = inputs
    out, lse = outputs
    dout, dlse = gradients
    batch, q_len, q_heads, _ = q.shape
    _, kv_len, kv_heads, _ = k.shape
    arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    if dlse is not None:
        arrays["dlse"] = dlse
    results = {name: contiguous(array.shape, spec.dtype) for name, array in (("dq", q), ("dk", k), ("dv", v))}
    scratch = {name: contiguous((batch, q_heads, q_len), "float32") for name in ("log2_lse", "delta")}

    prepare = Launch(
        _prepare_kernel,
        (triton.cdiv(q_len, _PREPARE_ROWS) * q_heads * batch,),
        ("out", "lse", "dout", "dlse" if dlse is not None else ""),
        ("log2_lse", "delta"),
        {**_strides(out=out, dout=dout, lse=lse, dlse=dlse), "q_len": q_len, "q_heads": q_heads},
        {"V_DIM": spec.v_dim, "BLOCK_Q": _PREPARE_ROWS, "WIDE": _wide(_PREPARE_ROWS, out, dout)},
    )
    reads = ("q", "k", "v", "dout", "log2_lse", "delta")
    numbers = {
        **_strides(q=q, k=k, v=v, dout=dout),
        **{"scale": spec.softmax_scale, "log2_scale": spec.softmax_scale * log2(e), "q_len": q_len, "kv_len": kv_len},
    }
    tiles = _checked(config.dkv, "dkv")
    grid = (triton.cdiv(kv_len, tiles.block_kv) * kv_heads * batch,)
    constants = _constants(spec, tiles, q, k, v, dout, results["dk"], results["dv"])
    how = tiles.num_warps, tiles.num_stages, spec.dtype
    dkv = Launch(_dkv_kernel, grid, reads, ("dk", "dv"), {**numbers, "kv_heads": kv_heads}, constants, *how)

    tiles = _checked(config.dq, "dq")
    grid = (triton.cdiv(q_len, tiles.block_q) * q_heads * batch,)
    constants = _constants(spec, tiles, q, k, v, dout, results["dq"])
    how = tiles.num_warps, tiles.num_stages, spec.dtype
    dq = Launch(_dq_kernel, grid, reads, ("dq",), {**numbers, "q_heads": q_heads}, constants, *how)
    return Plan((prepare, dkv, dq), arrays, results, scratch)


def _strides(**arrays: Array | None) -> dict[str, int]:
    """The strides of arrays [batch, row, head, column] or [batch, head, row] as the kernels name them; absent: 0."""
    strides: dict[str, int] = {}
    for name, array in arrays.items():
        axes = ("batch", "row", "head", "column") if array and len(array.shape) == 4 else ("batch", "head", "row")
        strides |= {f"{name}_{axis}": array.strides[i] if array else 0 for i, axis in enumerate(axes)}
    return strides


def _constants(spec: AttentionSpec, tiles: AttentionTiles, q: Array, k: Array, v: Array, *others: Array) -> dict:
    return {
        "GROUP": q.shape[2] // max(k.shape[2], 1),
        "HEAD_DIM": spec.head_dim,
        "V_DIM": spec.v_dim,
        "CAUSAL": spec.causal,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "WIDE": _wide(max(tiles.block_q, tiles.block_kv), q, k, v, *others),
    }


def _wide(rows: int, *arrays: Array) -> bool:
    """Whether offsets inside a tile of that many rows of any of the arrays need 64 bits."""
    return needs_wide_offsets((rows, padded(array.shape[3]), array.strides[1], array.strides[3]) for array in arrays)


def _checked(tiles: AttentionTiles, name: str) -> AttentionTiles:
    for field, size in (("block_q", tiles.block_q), ("block_kv", tiles.block_kv)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"config.{name}.{field}: got {size}; it must be a power of two, and 16 or more on a GPU")
    return tiles
