"""RMS norm and layer norm for NVIDIA and AMD GPUs: the forward. `triton_backward` has the gradients.

A program normalises BLOCK_ROWS rows. Rows of up to BLOCK_COLS columns stay in registers between their statistics and
the result; longer rows are walked twice, the sum with the residual formed anew the second time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_products import indices, strides
from ..tiles.triton_tiles import advance
from .spec import NormSpec
from .tiles import NormConfig
from .triton_backward import backward
from .triton_common import (
    block_of,
    flags_of,
    load_scale,
    load_tile,
    moments,
    place_of,
    walked_moments,
)

__all__ = ["backward", "forward", "supports"]


def supports(spec: NormSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    return tuple(triton_reasons(target, dtype=spec.dtype))


def forward(
    spec: NormSpec, config: NormConfig, x: Array, weight: Array, bias: Array | None, residual: Array | None
) -> Plan:
    """The launch that writes y and, where there is a residual, summed."""
    batch, rows, hidden = x.shape
    outputs = {"y": contiguous(x.shape, spec.dtype)}
    if residual is not None:
        outputs["summed"] = contiguous(x.shape, spec.dtype)
    read = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    block = block_of(spec, config, rows, read)
    names = tuple("" if array is None else name for name, array in read.items())
    launch = Launch(
        _forward,
        (batch * triton.cdiv(rows, block["BLOCK_ROWS"]) if hidden else 0,),
        inputs=names if residual is not None else (*names, ""),
        outputs=("summed", "y") if residual is not None else ("y",),
        numbers={
            "row_count": rows,
            "eps": spec.eps,
            **strides("x", x),
            **strides("weight", weight, "batch", "col"),
            **strides("bias", bias, "batch", "col"),
            **strides("residual", residual),
        },
        constants={
            **flags_of(spec),
            "HAS_BIAS": bias is not None,
            "HAS_RESIDUAL": residual is not None,
            **block,
        },
        num_warps=config.num_warps,
    )
    return Plan((launch,), {name: array for name, array in read.items() if array is not None}, outputs)


@triton.jit(do_not_specialize=["row_count"])
def _forward(
    x, weight, bias, residual, summed, y,
    row_count, eps,
    x_batch, x_row, x_col, weight_batch, weight_col, bias_batch, bias_col,
    residual_batch, residual_row, residual_col,
    CENTERS: tl.constexpr, ZERO_CENTERED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS rows of y and of summed; a tile is [BLOCK_ROWS, BLOCK_COLS]."""
    batch, row = place_of(row_count, BLOCK_ROWS)
    rows_exist = (indices(BLOCK_ROWS, WIDE) < row_count - row)[:, None]
    source = (advance(advance(x, batch, x_batch), row, x_row), x_row, x_col)
    added = source
    if HAS_RESIDUAL:
        added = (advance(advance(residual, batch, residual_batch), row, residual_row), residual_row, residual_col)
    weight = advance(weight, batch, weight_batch)
    if HAS_BIAS:
        bias = advance(bias, batch, bias_batch)
    first = (tl.cast(batch, tl.int64) * row_count + row) * HIDDEN

    if HIDDEN <= BLOCK_COLS:
        tile = load_tile(source, added, 0, rows_exist, HAS_RESIDUAL, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS)
        mean, factor = moments(tile, eps, CENTERS, HIDDEN)
        _finish(
            tile, mean, factor, weight, bias, summed, y, first, 0, rows_exist, weight_col, bias_col,
            CENTERS, ZERO_CENTERED, HAS_BIAS, HAS_RESIDUAL, HIDDEN, WIDE,
        )  # fmt: skip
    else:
        mean, factor = walked_moments(
            source, added, rows_exist, eps, CENTERS, HAS_RESIDUAL, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS
        )
        for col in range(0, HIDDEN, BLOCK_COLS):
            tile = load_tile(source, added, col, rows_exist, HAS_RESIDUAL, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS)
            _finish(
                tile, mean, factor, weight, bias, summed, y, first, col, rows_exist, weight_col, bias_col,
                CENTERS, ZERO_CENTERED, HAS_BIAS, HAS_RESIDUAL, HIDDEN, WIDE,
            )  # fmt: skip


@triton.jit
def _finish(
    tile, mean, factor, weight, bias, summed, y, first, col, rows_exist, weight_col, bias_col,
    CENTERS: tl.constexpr, ZERO_CENTERED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store a tile whose first column is `col`, and the same normalised; mean and factor are [BLOCK_ROWS, 1]."""
    cols = col + indices(tile.shape[1], WIDE)
    offsets = indices(tile.shape[0], WIDE)[:, None] * HIDDEN + cols[None, :]
    exists = rows_exist & (cols < HIDDEN)[None, :]
    if HAS_RESIDUAL:
        tl.store(summed + first + offsets, tile.to(summed.dtype.element_ty), mask=exists)
    if CENTERS:
        tile -= mean
    result = tile * factor * load_scale(weight, weight_col, cols, ZERO_CENTERED, HIDDEN)
    if HAS_BIAS:
        result += tl.load(bias + cols * bias_col, mask=cols < HIDDEN, other=0.0).to(tl.float32)[None, :]
    tl.store(y + first + offsets, result.to(y.dtype.element_ty), mask=exists)
