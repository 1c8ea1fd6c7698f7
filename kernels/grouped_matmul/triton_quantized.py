"""The GPU kernels of quantised matrices, dequantised tile by tile in registers: the product, its gate, and dlhs.

A step reads rows of codes. Of formats with two codes a byte they are two tiles of weights, each multiplied by columns
of the left operand of its own, so that nothing is interleaved. A tile of weights lies within one group along k: its
scales are a row. The tiles' rows are those of the list that `triton_schedule.py` makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..tiles.formats import FORMATS, HALF
from ..tiles.launch import Array, Launch, contiguous
from ..tiles.triton_formats import ROWS_APART, as_bytes, is_packed, weights_of
from ..tiles.triton_formats import place as rows_of_codes
from ..tiles.triton_gate import store_gated
from ..tiles.triton_products import indices, shrink, store, strides, warps, wide
from ..tiles.triton_tiles import advance
from .spec import GroupedMatmulSpec
from .tiles import GroupedMatmulTiles
from .triton_rows import place
from .triton_schedule import entry

Named = Mapping[str, Array]
MATRICES = ("rhs", "rhs_up")


@triton.jit(do_not_specialize=["tokens", "slots"])
def _quantized(
    left, right, scales, zeros, right_up, scales_up, zeros_up, tiles, kept, out,
    tokens, n, k, groups, slots, scale_groups,
    left_batch, left_row, left_col, right_batch, right_group, right_row, right_col,
    scales_batch, scales_group, scales_row, scales_col, zeros_batch, zeros_group, zeros_row, zeros_col,
    right_up_batch, right_up_group, right_up_row, right_up_col,
    scales_up_batch, scales_up_group, scales_up_row, scales_up_col,
    zeros_up_batch, zeros_up_group, zeros_up_row, zeros_up_col,
    FORMAT: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SAVES: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `left @ w[group]`, BLOCK_K rows of codes a step, or of what two of them make."""
    batch, slot, col = place(slots, n, BLOCK_N, GROUP_M)
    group, row, end, _ = entry(tiles, batch, slots, slot)
    if row >= end:
        return
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    rows_exist = indices(BLOCK_M, WIDE) < end - row
    cols_exist = cols < tl.where(group < groups, n - col, 0)  # the rows of nobody are sums of nothing
    left = advance(advance(left, batch, left_batch), row, left_row)
    left_offsets = indices(BLOCK_M, WIDE)[:, None] * left_row + inner[None, :] * left_col  # [BLOCK_M, BLOCK_K]
    right = _of_group(as_bytes(right), batch, group, col, right_batch, right_group, right_col)
    offsets = inner[:, None] * right_row + cols[None, :] * right_col  # [BLOCK_K, BLOCK_N]
    scales = _of_group(scales, batch, group, col, scales_batch, scales_group, scales_col) + cols * scales_col
    if HAS_ZEROS:
        zeros = _of_group(as_bytes(zeros), batch, group, col, zeros_batch, zeros_group, zeros_col) + cols * zeros_col
    if GATED:
        right_up = _of_group(as_bytes(right_up), batch, group, col, right_up_batch, right_up_group, right_up_col)
        offsets_up = inner[:, None] * right_up_row + cols[None, :] * right_up_col  # [BLOCK_K, BLOCK_N]
        scales_up = _of_group(scales_up, batch, group, col, scales_up_batch, scales_up_group, scales_up_col)
        scales_up += cols * scales_up_col
        if HAS_ZEROS:
            zeros_up = _of_group(as_bytes(zeros_up), batch, group, col, zeros_up_batch, zeros_up_group, zeros_up_col)
            zeros_up += cols * zeros_up_col

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if GATED else 0
    packed: tl.constexpr = is_packed(FORMAT)
    length = tl.where(group < groups, tl.cdiv(k, 2 * ROWS_APART) * ROWS_APART if packed else k, 0)
    for step in range(tl.cdiv(length, BLOCK_K)):
        code_row, first = rows_of_codes(step, FORMAT, BLOCK_K)
        mask = cols_exist[None, :]
        if not EVEN_K and not packed:
            mask = mask & (inner < k - first)[:, None]
        codes = tl.load(advance(right, code_row, right_row) + offsets, mask=mask, other=0)
        if GATED:
            codes_up = tl.load(advance(right_up, code_row, right_up_row) + offsets_up, mask=mask, other=0)
        for high in tl.static_range(2 if packed else 1):
            start = first + high * ROWS_APART
            left_mask = rows_exist[:, None]
            if not EVEN_K:
                left_mask = left_mask & (inner < k - start)[None, :]
            left_tile = tl.load(advance(left, start, left_col) + left_offsets, mask=left_mask, other=0.0)
            w = weights_of(
                codes, scales, zeros, start, cols_exist, scale_groups, scales_row, zeros_row,
                FORMAT, GROUP_SIZE, HAS_ZEROS, high, GROUP_SIZE > 0, left_tile.dtype,
            )  # fmt: skip
            sums = tl.dot(left_tile, w, sums, input_precision="ieee")
            if GATED:
                w_up = weights_of(
                    codes_up, scales_up, zeros_up, start, cols_exist, scale_groups, scales_up_row, zeros_up_row,
                    FORMAT, GROUP_SIZE, HAS_ZEROS, high, GROUP_SIZE > 0, left_tile.dtype,
                )  # fmt: skip
                sums_up = tl.dot(left_tile, w_up, sums_up, input_precision="ieee")

    if not GROUP_SIZE:  # one scale a column: after the sum, where it rounds no weight
        sums *= tl.load(scales, mask=cols_exist, other=0.0).to(tl.float32)[None, :]
        if GATED:
            sums_up *= tl.load(scales_up, mask=cols_exist, other=0.0).to(tl.float32)[None, :]
    if GATED:
        store_gated(sums, sums_up, kept, out, batch, row, col, tokens, n, end, ACTIVATION, SAVES, WIDE)
    else:
        store(sums, out, batch, row, col, tokens, n, end, WIDE)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _quantized_dlhs(
    grad, right, scales, zeros, grad_up, right_up, scales_up, zeros_up, tiles, out,
    tokens, n, k, groups, slots, scale_groups, code_rows,
    grad_batch, grad_row, grad_col, right_batch, right_group, right_row, right_col,
    scales_batch, scales_group, scales_row, scales_col, zeros_batch, zeros_group, zeros_row, zeros_col,
    grad_up_batch, grad_up_row, grad_up_col, right_up_batch, right_up_group, right_up_row, right_up_col,
    scales_up_batch, scales_up_group, scales_up_row, scales_up_col,
    zeros_up_batch, zeros_up_group, zeros_up_row, zeros_up_col,
    FORMAT: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, TWO: tl.constexpr,
    EVEN_N: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The columns of `grad @ w[group]^T` that BLOCK_K rows of codes stand for, [BLOCK_M, BLOCK_K] or, packed, twice.

    If there are TWO, plus those of `grad_up @ w_up[group]^T`.
    """
    batch, slot, code_row = place(slots, code_rows, BLOCK_K, GROUP_M)
    group, row, end, _ = entry(tiles, batch, slots, slot)
    if row >= end:
        return
    first = rows_of_codes(code_row // BLOCK_K, FORMAT, BLOCK_K)[1]
    length = tl.where(group < groups, n, 0)  # the rows of nobody are sums of nothing
    low = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_K], tl.float32) if is_packed(FORMAT) else 0
    low, high = _add_transposed(
        low, high, advance(advance(grad, batch, grad_batch), row, grad_row),
        _of_group(as_bytes(right), batch, group, code_row, right_batch, right_group, right_row),
        _of_group(scales, batch, group, 0, scales_batch, scales_group, scales_row),
        _of_group(as_bytes(zeros), batch, group, 0, zeros_batch, zeros_group, zeros_row) if HAS_ZEROS else 0,
        end - row, code_rows - code_row, first, length, scale_groups, grad_row, grad_col, right_row, right_col,
        scales_row, scales_col, zeros_row, zeros_col,
        FORMAT, GROUP_SIZE, HAS_ZEROS, EVEN_N, WIDE, BLOCK_N,
    )  # fmt: skip
    if TWO:
        low, high = _add_transposed(
            low, high, advance(advance(grad_up, batch, grad_up_batch), row, grad_up_row),
            _of_group(as_bytes(right_up), batch, group, code_row, right_up_batch, right_up_group, right_up_row),
            _of_group(scales_up, batch, group, 0, scales_up_batch, scales_up_group, scales_up_row),
            _of_group(as_bytes(zeros_up), batch, group, 0, zeros_up_batch, zeros_up_group, zeros_up_row)
            if HAS_ZEROS else 0,
            end - row, code_rows - code_row, first, length, scale_groups, grad_up_row, grad_up_col,
            right_up_row, right_up_col, scales_up_row, scales_up_col, zeros_up_row, zeros_up_col,
            FORMAT, GROUP_SIZE, HAS_ZEROS, EVEN_N, WIDE, BLOCK_N,
        )  # fmt: skip
    store(low, out, batch, row, first, tokens, k, end, WIDE)
    if is_packed(FORMAT):
        store(high, out, batch, row, first + ROWS_APART, tokens, k, end, WIDE)


@triton.jit
def _add_transposed(
    low, high, grad, right, scales, zeros, rows_left, codes_left, first, n, scale_groups,
    grad_row, grad_col, right_row, right_col, scales_row, scales_col, zeros_row, zeros_col,
    FORMAT: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, EVEN_N: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add `grad @ w^T` of the rows of codes at `right`, of which the low halves begin at row `first`, to both sums."""
    cols = indices(BLOCK_N, WIDE)
    inner = indices(low.shape[1], WIDE)
    rows = indices(low.shape[0], WIDE)
    grad_offsets = rows[:, None] * grad_row + cols[None, :] * grad_col  # [BLOCK_M, BLOCK_N]
    offsets = inner[:, None] * right_row + cols[None, :] * right_col  # [BLOCK_K, BLOCK_N]
    for start in range(0, n, BLOCK_N):
        cols_exist = cols < n - start
        grad_mask = (rows < rows_left)[:, None]
        mask = (inner < codes_left)[:, None]
        if not EVEN_N:
            grad_mask = grad_mask & cols_exist[None, :]
            mask = mask & cols_exist[None, :]
        tile = tl.load(advance(grad, start, grad_col) + grad_offsets, mask=grad_mask, other=0.0)
        codes = tl.load(advance(right, start, right_col) + offsets, mask=mask, other=0)
        of_columns = advance(scales, start, scales_col) + cols * scales_col
        zeros_of_columns = advance(zeros, start, zeros_col) + cols * zeros_col if HAS_ZEROS else 0
        w = weights_of(
            codes, of_columns, zeros_of_columns, first, cols_exist, scale_groups, scales_row, zeros_row,
            FORMAT, GROUP_SIZE, HAS_ZEROS, False, True, tile.dtype,
        )  # fmt: skip
        low = tl.dot(tile, tl.trans(w), low, input_precision="ieee")
        if is_packed(FORMAT):
            w = weights_of(
                codes, of_columns, zeros_of_columns, first + ROWS_APART, cols_exist, scale_groups, scales_row,
                zeros_row, FORMAT, GROUP_SIZE, HAS_ZEROS, True, True, tile.dtype,
            )  # fmt: skip
            high = tl.dot(tile, tl.trans(w), high, input_precision="ieee")
    return low, high


@triton.jit
def _of_group(pointer, batch, group, index, batch_stride, group_stride, stride):
    """The pointer to a group's matrix, `index` rows or columns on."""
    return advance(advance(advance(pointer, batch, batch_stride), group, group_stride), index, stride)


# Launches


def product_launch(
    spec: GroupedMatmulSpec, tiles: GroupedMatmulTiles, block_m: int, schedule: Array, inputs: Named, name: str
) -> Launch:
    """The launch of the forward; inputs are lhs and what there is of the matrices, name is that of the list."""
    lhs, rhs = inputs["lhs"], inputs["rhs"]
    (_, _, k), n = lhs.shape, rhs.shape[3]
    gated, packed = "rhs_up" in inputs, FORMATS[spec.format or ""].packed
    block_n, block_k = shrink("block_n", tiles.block_n, n), _code_rows(spec, tiles.block_k, rhs.shape[2])
    rights = [inputs[name] for name in MATRICES if name in inputs]
    pieces = [(lhs, block_m, block_k), (contiguous((*lhs.shape[:2], n), ""), block_m, block_n)]
    launch = _launch(spec, tiles, (block_m, block_n, block_k), schedule, pieces, rights)
    launch["numbers"] |= strides("left", lhs) | {"tokens": lhs.shape[1], "n": n, "k": k, **_numbers(inputs)}
    launch["constants"] |= {
        "GATED": gated,
        "ACTIVATION": spec.activation,
        "SAVES": spec.save_preactivations,
        "HAS_ZEROS": "rhs_zeros" in inputs,
        "EVEN_K": k % (2 * HALF if packed else block_k) == 0,
    }
    outputs = ("preactivations", "out") if spec.save_preactivations else ("out",)
    return Launch(
        _quantized,
        grid=(lhs.shape[0] * schedule.shape[1] * triton.cdiv(n, block_n),),
        inputs=("lhs", *_names(inputs), name, *([] if spec.save_preactivations else [""])),
        outputs=outputs,
        dot_dtype=lhs.dtype,
        **launch,
    )


def dlhs_launch(
    spec: GroupedMatmulSpec, tiles: GroupedMatmulTiles, block_m: int, schedule: Array, grads: Named, matrices: Named,
    lhs: Array, name: str,
) -> Launch:  # fmt: skip
    """The launch of dlhs from the gradient of the product, or those of both; name is that of the list."""
    (grad, *grad_up), code_rows, n = grads.values(), matrices["rhs"].shape[2], matrices["rhs"].shape[3]
    block_n, block_k = shrink("block_n", tiles.block_n, n), _code_rows(spec, tiles.block_k, code_rows)
    rights = [matrices[name] for name in MATRICES if name in matrices]
    pieces = [(array, block_m, block_n) for array in grads.values()] + [(contiguous(lhs.shape, ""), block_m, block_k)]
    launch = _launch(spec, tiles, (block_m, block_n, block_k), schedule, pieces, rights)
    launch["numbers"] |= strides("grad", grad) | strides("grad_up", grad_up[0] if grad_up else None)
    launch["numbers"] |= {"tokens": lhs.shape[1], "n": n, "k": lhs.shape[2], "code_rows": code_rows}
    launch["numbers"] |= _numbers(matrices)
    launch["constants"] |= {
        "TWO": bool(grad_up),
        "HAS_ZEROS": "rhs_zeros" in matrices,
        "EVEN_N": n % block_n == 0,
    }
    grad_name, *grad_up_name = grads
    names = _names(matrices)
    return Launch(
        _quantized_dlhs,
        grid=(lhs.shape[0] * schedule.shape[1] * triton.cdiv(code_rows, block_k),),
        inputs=(grad_name, *names[:3], *(grad_up_name or [""]), *names[3:], name),
        outputs=("dlhs",),
        dot_dtype=grad.dtype,
        **launch,
    )


def _launch(
    spec: GroupedMatmulSpec, tiles: GroupedMatmulTiles, blocks: tuple[int, int, int], schedule: Array,
    pieces: list[tuple[Array, int, int]], rights: list[Array],
) -> dict[str, Any]:  # fmt: skip
    """What both launches have."""
    block_m, block_n, block_k = blocks
    pieces = pieces + [(right, block_k, block_n) for right in rights]
    return {
        "numbers": {"groups": rights[0].shape[1], "slots": schedule.shape[1]},
        "constants": {
            "FORMAT": spec.format,
            "GROUP_SIZE": spec.group_size,
            "WIDE": wide(*pieces),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_M": tiles.group_m,
        },
        "num_warps": warps(tiles.num_warps, tiles.block_m * tiles.block_n // (block_m * block_n)),
        "num_stages": tiles.num_stages,
    }


def _names(matrices: Named) -> tuple[str, ...]:
    """Of codes, scales and zeros of both matrices, "" for an absent one."""
    names = [f"{matrix}{part}" for matrix in MATRICES for part in ("", "_scales", "_zeros")]
    return tuple(name if name in matrices else "" for name in names)


def _numbers(matrices: Named) -> dict[str, int]:
    """The strides of both matrices' arrays, and how many scales a column has."""
    numbers = {"scale_groups": matrices["rhs_scales"].shape[2]}
    for matrix, suffix in zip(MATRICES, ("", "_up"), strict=True):
        for part, name in (("", "right"), ("_scales", "scales"), ("_zeros", "zeros")):
            array = matrices.get(f"{matrix}{part}")
            numbers |= strides(f"{name}{suffix}", array, "batch", "group", "row", "col")
    return numbers


def _code_rows(spec: GroupedMatmulSpec, block_k: int, rows: int) -> int:
    """How many rows of codes a step takes: they stay within a group of k that has one scale, and within a half."""
    limits = (spec.group_size, HALF if FORMATS[spec.format or ""].packed else 0)
    return min([shrink("block_k", block_k, rows), *filter(None, limits)])
