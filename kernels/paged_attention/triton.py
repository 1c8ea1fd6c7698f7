"""Paged attention on GPUs: FlashAttention-2's forward (Dao, arXiv:2307.08691) over keys found through a page table
(Kwon et al., "PagedAttention", arXiv:2309.06180).

The rows of a tile are the queries of all heads that share a key head, so that a key is read once for all of them. Where
that makes too few programs to fill a GPU, the keys of a sequence are split among several ("Flash-Decoding", Dao et al.,
2023), and a second kernel merges what they found by its logsumexp.

Lengths are read by the kernels: no length, and no number of pages, is compiled in. Scores are in base 2.
"""

from __future__ import annotations

from math import e, log2
from typing import Any

import triton
import triton.language as tl

from ..tiles.errors import UnsupportedError
from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.targets import Target
from ..tiles.triton_tiles import LN_2, LOG2_E, advance, needs_wide_offsets, online_softmax, padded
from .spec import (
    MAX_HEAD_DIM,
    PAGE_SIZES,
    QUANTIZED,
    PagedAttentionInputs,
    PagedAttentionSpec,
    no_gradient,
    output_shapes,
)
from .tiles import PagedAttentionConfig, PagedAttentionTiles, split_count

_DTYPES = ("float16", "bfloat16", "float32")
_FLOAT8_TARGETS = ("sm_90", "sm_100", "gfx950", "interpret")
_MERGED_SPLITS = 32  # at a time


def supports(spec: PagedAttentionSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run, () if they can."""
    reasons = []
    if needs_grad:
        reasons.append(f"{no_gradient().capitalize()}.")
    if target.is_tpu:
        reasons.append(f"Triton compiles for GPUs, and the target is {target.name}; use implementation='pallas'.")
    if spec.dtype not in _DTYPES:
        reasons.append(
            f"The Triton kernels compute in {', '.join(_DTYPES)}, and q is {spec.dtype}; "
            "cast it, or use implementation='library'."
        )
    if spec.page_dtype == QUANTIZED[1] and target.name not in _FLOAT8_TARGETS:
        reasons.append(
            f"Pages of {spec.page_dtype} are read by {', '.join(_FLOAT8_TARGETS)}, and the target is {target.name}; "
            "use int8 pages there, or implementation='library'."
        )
    for name, size in (("head_dim", spec.head_dim), ("v_dim", spec.v_dim)):
        if not 1 <= size <= MAX_HEAD_DIM:
            reasons.append(
                f"The Triton kernels keep a whole head on chip: {name} is {size}, and it must be 1 to {MAX_HEAD_DIM}; "
                "use implementation='library'."
            )
    return tuple(reasons)


@triton.jit
def _tanh(x):
    """tanh in float32; near 0 by its series, where the quotient would cancel."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    shrunk = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    quotient = (1 - shrunk) / (1 + shrunk)
    return tl.where(square < 0.09, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _length(lengths, batch, stride, most):
    """This batch item's entry of an array of lengths, kept in [0, most]; most where there is no array."""
    if lengths is None:
        length = most
    else:
        length = tl.minimum(tl.maximum(tl.load(advance(lengths, batch, stride)), 0), most)
    return length


@triton.jit
def _scale(scales, head, stride):
    if scales is None:
        scale = 1.0
    else:
        scale = tl.load(advance(scales, head, stride))
    return scale


@triton.jit
def _load_keys(
    pages, page_table, first, start, end, page_stride, row_stride, column_stride, table_entry,
    COLUMNS: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_KV, padded(COLUMNS)] of the keys from `first`; those outside [start, end) read as 0, as do their pages.

    A page's address takes 64 bits, a row's inside it 32 unless WIDE.
    """
    WIDTH: tl.constexpr = padded(COLUMNS)
    keys = first + tl.arange(0, BLOCK_KV)
    exist = keys < end
    if WINDOW:
        exist = exist & (keys >= start)
    rows = keys % PAGE_SIZE
    columns = tl.arange(0, WIDTH)
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    if BLOCK_KV <= PAGE_SIZE:
        # One page for all: a tile that is walked at all has keys in [start, end), so that its page is in use.
        pointers = advance(pages, tl.load(advance(page_table, first // PAGE_SIZE, table_entry)), page_stride) + offsets
    else:
        entries = page_table + (keys // PAGE_SIZE).to(tl.int64) * table_entry
        if MASKED:
            page = tl.load(entries, mask=exist, other=0)
        else:
            page = tl.load(entries)
        pointers = (pages + page.to(tl.int64) * page_stride)[:, None] + offsets
    if MASKED:
        mask = exist[:, None]
        if COLUMNS != WIDTH:
            mask = mask & (columns < COLUMNS)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif COLUMNS != WIDTH:
        tile = tl.load(pointers, mask=(columns < COLUMNS)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _attend(
    acc, total, peak, q_tile, k_pages, v_pages, page_table, k_page, k_row, k_column, v_page, v_row, v_column,
    table_entry, score_scale, log2_cap, row_start, row_end, lo, hi, start, end,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, BLOCK_KV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Let a tile of rows attend to the tiles of keys in [lo, hi)."""
    if lo < hi:
        for first in tl.range(lo, hi, BLOCK_KV, disable_licm=MASKED):
            k_tile = _load_keys(
                k_pages, page_table, first, start, end, k_page, k_row, k_column, table_entry,
                HEAD_DIM, PAGE_SIZE, WINDOW, MASKED, BLOCK_KV, WIDE,
            )  # fmt: skip
            scores = tl.dot(q_tile, tl.trans(k_tile.to(q_tile.dtype)), input_precision="ieee")  # [rows, BLOCK_KV]
            scores = scores * score_scale
            if SOFTCAP:
                scores = _tanh(scores) * log2_cap
            if MASKED:
                keys = (first + tl.arange(0, BLOCK_KV))[None, :]
                seen = keys < row_end[:, None]
                if WINDOW:
                    seen = seen & (keys >= row_start[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            weights, rescale, peak, total = online_softmax(scores, peak, total, 1.0, MASKED)
            v_tile = _load_keys(
                v_pages, page_table, first, start, end, v_page, v_row, v_column, table_entry,
                V_DIM, PAGE_SIZE, WINDOW, MASKED, BLOCK_KV, WIDE,
            )  # fmt: skip
            weights = weights.to(q_tile.dtype)
            acc = tl.dot(weights, v_tile.to(q_tile.dtype), acc * rescale[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit
def _ranges(
    first_query, last_query, offset, length, window_left,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """(start, end, full_start, full_end) of a tile of queries, whose last may come before its first: it sees nothing.

    Some query sees a key in [start, end), and every query each key in [full_start, full_end), which are whole tiles.
    """
    start = 0
    full_start = 0
    end = length
    full_end = length
    if CAUSAL:
        end = tl.minimum(last_query + offset + 1, length)
        full_end = tl.minimum(first_query + offset + 1, length)
    if WINDOW:
        start = tl.maximum(first_query + offset - window_left, 0)
        full_start = tl.cdiv(tl.maximum(last_query + offset - window_left, 0), BLOCK_KV) * BLOCK_KV
    if last_query < first_query:
        end = 0
    end = tl.maximum(end, start)
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_KV * BLOCK_KV, full_start)
    return start, end, full_start, full_end


@triton.jit(do_not_specialize=["q_len", "max_keys", "splits", "window_left"])
def _attend_kernel(
    q, k_pages, v_pages, page_table, lengths, q_lengths, k_scales, v_scales, sinks, out, lse,
    q_batch, q_row, q_head, q_column, k_page, k_row, k_head, k_column, v_page, v_row, v_head, v_column,
    table_batch, table_entry, lengths_batch, q_lengths_batch, k_scales_head, v_scales_head, sinks_batch, sinks_head,
    score_scale, log2_cap, window_left, q_len, max_keys, kv_heads, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KV: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_ROWS rows of one key head, a row being a query of one of its heads.

    With SPLIT only a part of the keys is seen. out [batch, splits, q_len, q_heads, v_dim] and lse [batch, splits,
    q_len, q_heads] are then float32, lse in base 2, and out is left as it is where lse is -inf.
    """
    row_tiles = tl.cdiv(q_len * GROUP, BLOCK_ROWS)
    tile = tl.program_id(0) % row_tiles
    kv_head = tl.program_id(0) // row_tiles % kv_heads
    batch = tl.program_id(0) // row_tiles // kv_heads
    split = tl.program_id(1)
    rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    q_length = _length(q_lengths, batch, q_lengths_batch, q_len)
    length = _length(lengths, batch, lengths_batch, max_keys)
    real = query < q_length

    columns = tl.arange(0, padded(HEAD_DIM)).to(tl.int64)
    q_rows = advance(q, batch, q_batch) + query.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    q_mask = real[:, None] & (columns < HEAD_DIM)[None, :]
    q_tile = tl.load(q_rows[:, None] + columns[None, :] * q_column, mask=q_mask, other=0.0)

    # The sink is what a row has seen before any key; of a sequence's parts the first has it.
    first_peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    first_total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks is not None:
        sink = tl.load(
            advance(sinks, batch, sinks_batch) + head.to(tl.int64) * sinks_head, mask=query < q_len, other=0.0
        )
        first_peak = tl.where(split == 0, sink * LOG2_E, float("-inf"))
        first_total = tl.where(first_peak == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_ROWS, padded(V_DIM)], tl.float32)
    peak = first_peak
    total = first_total

    first_query = tile * BLOCK_ROWS // GROUP
    last_query = tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP, q_length - 1)
    start, end, full_start, full_end = _ranges(
        first_query, last_query, length - q_length, length, window_left, CAUSAL, WINDOW, BLOCK_KV
    )
    # A row sees the keys in [row_start, row_end): one comparison a score, or two.
    aligned = query + (length - q_length)
    row_start = aligned
    row_end = tl.full([BLOCK_ROWS], end, tl.int32)
    if CAUSAL:
        row_end = tl.minimum(aligned + 1, end)
    if WINDOW:
        row_start = tl.maximum(aligned - window_left, start)
    lo = start // BLOCK_KV * BLOCK_KV
    hi = tl.cdiv(end, BLOCK_KV) * BLOCK_KV
    if SPLIT:
        part = tl.cdiv((hi - lo) // BLOCK_KV, splits) * BLOCK_KV
        lo = tl.minimum(lo + split * part, hi)
        hi = tl.minimum(lo + part, hi)
    k_pages = advance(k_pages, kv_head, k_head)
    v_pages = advance(v_pages, kv_head, v_head)
    page_table = advance(page_table, batch, table_batch)
    score_scale = score_scale * _scale(k_scales, kv_head, k_scales_head)
    if WINDOW:
        acc, total, peak = _attend(
            acc, total, peak, q_tile, k_pages, v_pages, page_table, k_page, k_row, k_column, v_page, v_row, v_column,
            table_entry, score_scale, log2_cap, row_start, row_end, lo, tl.minimum(hi, full_start), start, end,
            HEAD_DIM, V_DIM, PAGE_SIZE, WINDOW, SOFTCAP, True, BLOCK_KV, WIDE,
        )  # fmt: skip
        lo = tl.maximum(lo, full_start)
    acc, total, peak = _attend(
        acc, total, peak, q_tile, k_pages, v_pages, page_table, k_page, k_row, k_column, v_page, v_row, v_column,
        table_entry, score_scale, log2_cap, row_start, row_end, lo, tl.minimum(hi, full_end), start, end,
        HEAD_DIM, V_DIM, PAGE_SIZE, WINDOW, SOFTCAP, False, BLOCK_KV, WIDE,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q_tile, k_pages, v_pages, page_table, k_page, k_row, k_column, v_page, v_row, v_column,
        table_entry, score_scale, log2_cap, row_start, row_end, tl.maximum(lo, full_end), hi, start, end,
        HEAD_DIM, V_DIM, PAGE_SIZE, WINDOW, SOFTCAP, True, BLOCK_KV, WIDE,
    )  # fmt: skip

    # A row past its sequence's queries has seen nothing, whatever was computed for it.
    peak = tl.where(real, peak, first_peak)
    total = tl.where(real, total, first_total)
    acc = acc * (_scale(v_scales, kv_head, v_scales_head) / tl.where(total == 0.0, 1.0, total))[:, None]
    acc = tl.where(real[:, None], acc, 0.0)
    log2_lse = peak + tl.log2(total)
    exist = query < q_len
    part = batch
    if SPLIT:
        part = batch * splits + split
    at = (part.to(tl.int64) * q_len + query) * (kv_heads * GROUP) + head  # of [..., q_len, q_heads]
    v_columns = tl.arange(0, padded(V_DIM))
    store = exist
    if SPLIT:
        store = exist & (log2_lse != float("-inf"))
        tl.store(lse + at, log2_lse, mask=exist)
    else:
        lse_row = (part.to(tl.int64) * (kv_heads * GROUP) + head) * q_len + query
        tl.store(lse + lse_row, log2_lse * LN_2, mask=exist)
    pointers = out + (at * V_DIM)[:, None] + v_columns[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=store[:, None] & (v_columns < V_DIM)[None, :])


@triton.jit(do_not_specialize=["q_len", "splits"])
def _merge_kernel(parts, parts_lse, out, lse, q_len, q_heads, splits, V_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """One row of out and lse from its parts [splits, v_dim], which weigh `2 ** parts_lse`."""
    row = tl.program_id(0)  # of [batch, q_len, q_heads]
    rows = q_len * q_heads
    batch = row // rows
    columns = tl.arange(0, padded(V_DIM))
    acc = tl.zeros([padded(V_DIM)], tl.float32)
    total = 0.0
    peak = float("-inf")
    for first in range(0, splits, BLOCK_SPLITS):
        numbers = first + tl.arange(0, BLOCK_SPLITS)
        at = (batch * splits + numbers).to(tl.int64) * rows + row % rows
        part_lse = tl.load(parts_lse + at, mask=numbers < splits, other=float("-inf"))
        saw = part_lse != float("-inf")
        mask = saw[:, None] & (columns < V_DIM)[None, :]
        part = tl.load(parts + (at * V_DIM)[:, None] + columns[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(part_lse, axis=0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(part_lse - base)
        rescale = tl.exp2(peak - base)
        acc = acc * rescale + tl.sum(part * weights[:, None], axis=0)
        total = total * rescale + tl.sum(weights, axis=0)
        peak = new_peak
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row.to(tl.int64) * V_DIM + columns, acc.to(out.dtype.element_ty), mask=columns < V_DIM)
    at = (batch.to(tl.int64) * q_heads + row % q_heads) * q_len + row % rows // q_heads
    tl.store(lse + at, (peak + tl.log2(total)) * LN_2)


def forward(spec: PagedAttentionSpec, config: PagedAttentionConfig, *inputs: Array | None) -> Plan:
    """out `[batch, q_len, q_heads, v_dim]` and lse `[batch, q_heads, q_len]`."""
    named = PagedAttentionInputs(*inputs)
    (batch, q_len, q_heads, _), (_, page_size, kv_heads, _) = named.q.shape, named.k_pages.shape
    group, max_keys = q_heads // kv_heads, named.page_table.shape[1] * page_size
    if page_size not in PAGE_SIZES:
        raise ValueError(f"k_pages: page_size is {page_size}; it must be one of {', '.join(map(str, PAGE_SIZES))}")
    rows = group * q_len
    tiles = _checked(config.decode, "decode")
    if rows > tiles.block_rows:
        tiles = _checked(config.prefill, "prefill")
    block_rows = min(tiles.block_rows, padded(max(rows, 1)))
    programs = triton.cdiv(rows, block_rows) * kv_heads * batch
    splits = split_count(programs, triton.cdiv(max_keys, tiles.block_kv), config.programs)

    outputs = {
        name: contiguous(*shape)
        for name, shape in zip(("out", "lse"), output_shapes(spec, named.q, named.k_pages, named.v_pages), strict=True)
    }
    scratch = {}
    if splits > 1:
        scratch["parts"] = contiguous((batch, splits, q_len, q_heads, spec.v_dim), "float32")
        scratch["parts_lse"] = contiguous((batch, splits, q_len, q_heads), "float32")
    written = tuple(scratch) or ("out", "lse")
    attend = Launch(
        _attend_kernel,
        (programs, splits),
        tuple("" if array is None else name for name, array in named._asdict().items()),
        written,
        {
            **_strides(named),
            **_scales(spec),
            "q_len": q_len,
            "max_keys": max_keys,
            "kv_heads": kv_heads,
            "splits": splits,
        },
        {
            "GROUP": group,
            "HEAD_DIM": spec.head_dim,
            "V_DIM": spec.v_dim,
            "PAGE_SIZE": page_size,
            "CAUSAL": spec.causal,
            "WINDOW": spec.window_left is not None,
            "SOFTCAP": spec.softcap is not None,
            "SPLIT": splits > 1,
            "BLOCK_ROWS": block_rows,
            "BLOCK_KV": tiles.block_kv,
            "WIDE": _wide(named.k_pages, named.v_pages),
        },
        tiles.num_warps,
        tiles.num_stages,
        spec.dtype,
    )
    launches = [attend]
    if splits > 1:
        numbers = {"q_len": q_len, "q_heads": q_heads, "splits": splits}
        constants = {"V_DIM": spec.v_dim, "BLOCK_SPLITS": _MERGED_SPLITS}
        grid = (batch * q_len * q_heads,)
        launches.append(Launch(_merge_kernel, grid, written, ("out", "lse"), numbers, constants))
    arrays = {name: array for name, array in named._asdict().items() if array is not None}
    return Plan(tuple(launches), arrays, outputs, scratch)


def backward(*arguments: Any) -> Plan:
    """There is none."""
    raise UnsupportedError(no_gradient())


def _scales(spec: PagedAttentionSpec) -> dict[str, float | int]:
    """What multiplies a product before and after its softcap, in base 2, and the window."""
    scale, cap = spec.softmax_scale, spec.softcap
    return {
        "score_scale": scale * log2(e) if cap is None else scale / cap,
        "log2_cap": 0.0 if cap is None else cap * log2(e),
        "window_left": 0 if spec.window_left is None else spec.window_left,
    }


def _strides(arrays: PagedAttentionInputs) -> dict[str, int]:
    """The strides of the arrays as the kernel names them; absent: 0."""
    axes = {
        "q": ("q_batch", "q_row", "q_head", "q_column"),
        "k_pages": ("k_page", "k_row", "k_head", "k_column"),
        "v_pages": ("v_page", "v_row", "v_head", "v_column"),
        "page_table": ("table_batch", "table_entry"),
        "lengths": ("lengths_batch",),
        "q_lengths": ("q_lengths_batch",),
        "k_scales": ("k_scales_head",),
        "v_scales": ("v_scales_head",),
        "sinks": ("sinks_batch", "sinks_head"),
    }
    strides: dict[str, int] = {}
    for array, names in axes.items():
        there = getattr(arrays, array)
        strides |= zip(names, there.strides if there else (0,) * len(names), strict=True)
    return strides


def _wide(*pages: Array) -> bool:
    """Whether an offset inside a page needs 64 bits."""
    return needs_wide_offsets(
        (array.shape[1], padded(array.shape[3]), array.strides[1], array.strides[3]) for array in pages
    )


def _checked(tiles: PagedAttentionTiles, name: str) -> PagedAttentionTiles:
    for field, size in (("block_rows", tiles.block_rows), ("block_kv", tiles.block_kv)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"config.{name}.{field}: got {size}; it must be a power of two, and 16 or more on a GPU")
    return tiles
