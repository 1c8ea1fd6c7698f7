"""The gradients of the norms on GPUs.

A fixed number of programs takes the rows in turn. Each writes dx, and sums what its rows add to dweight and dbias; a
last small kernel adds these sums in a fixed order. Where rows are longer than a tile, one kernel writes dx and the
statistics of each row, and a second one sums, over columns that do fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.triton_products import indices, strides
from ..tiles.triton_tiles import advance, needs_wide_offsets
from .spec import NormSpec
from .tiles import NormConfig
from .triton_common import (
    block_of,
    flags_of,
    load_columns,
    load_scale,
    moments,
    place_of,
    walked_moments,
)

SUM_ROWS, SUM_COLS = 16, 128  # the tile of the kernels that only sum columns


def backward(
    spec: NormSpec,
    config: NormConfig,
    inputs: tuple[Array, Array, Array | None, Array | None],
    outputs: tuple[Array, Array | None],
    gradients: tuple[Array, Array | None],
) -> Plan:
    """Launches that write dx, dweight and, where the input was there, dbias and dresidual."""
    x, weight, bias, residual = inputs
    dy, dsummed = gradients
    source = ("x", x) if outputs[1] is None else ("summed", outputs[1])
    read = {source[0]: source[1], "weight": weight, "dy": dy}
    if dsummed is not None:
        read["dsummed"] = dsummed
    written = {"dx": x, "dweight": weight}
    if bias is not None:
        written["dbias"] = bias
    if residual is not None:
        written["dresidual"] = residual
    results = {name: contiguous(array.shape, spec.dtype) for name, array in written.items()}

    block = block_of(spec, config, x.shape[1], {"x": source[1], "weight": weight, "dy": dy, "dsummed": dsummed})
    scratch: dict[str, Array] = {}
    if spec.hidden <= block["BLOCK_COLS"]:
        launches = [_whole_launch(spec, config, block, source, read, results, scratch)]
    else:
        launches = _walking_launches(spec, config, block, source, read, results, scratch)
    launches.append(_add_launch(scratch["sums"], bias is not None))
    return Plan(tuple(launches), read, results, scratch)


@triton.jit(do_not_specialize=["row_count", "parts"])
def _whole(
    x, weight, dy, dsummed, dresidual, dx, sums,
    row_count, parts, eps,
    x_batch, x_row, x_col, weight_batch, weight_col, dy_batch, dy_row, dy_col,
    dsummed_batch, dsummed_row, dsummed_col,
    CENTERS: tl.constexpr, ZERO_CENTERED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DSUMMED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx of every tile of rows `part, part + parts, ...` of one batch, and their part of dweight and dbias.

    Tiles hold whole rows, [BLOCK_ROWS, BLOCK_COLS]. sums is [batch, parts, 1 + HAS_BIAS, HIDDEN].
    """
    batch = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    x = advance(x, batch, x_batch)
    dy = advance(dy, batch, dy_batch)
    if HAS_DSUMMED:
        dsummed = advance(dsummed, batch, dsummed_batch)
    cols = indices(BLOCK_COLS, WIDE)
    scale = load_scale(advance(weight, batch, weight_batch), weight_col, cols, ZERO_CENTERED, HIDDEN)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile_index in range(part, tl.cdiv(row_count, BLOCK_ROWS), parts):
        row = tile_index * BLOCK_ROWS
        rows_exist = (indices(BLOCK_ROWS, WIDE) < row_count - row)[:, None]
        source = (advance(x, row, x_row), x_row, x_col)
        tile = load_columns(source, 0, rows_exist, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS).to(tl.float32)
        arriving = (advance(dy, row, dy_row), dy_row, dy_col)
        gradient = load_columns(arriving, 0, rows_exist, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS).to(tl.float32)
        mean, factor = moments(tile, eps, CENTERS, HIDDEN)
        if CENTERS:
            tile = tl.where((cols < HIDDEN)[None, :], tile - mean, 0.0)
        tile *= factor
        # Without eps the factor of a row that is not there is infinite.
        dweight += tl.where(rows_exist, gradient * tile, 0.0)
        if HAS_BIAS:
            dbias += gradient
        gradient *= scale
        along = tl.sum(gradient * tile, axis=1, keep_dims=True) / HIDDEN
        level = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        if CENTERS:
            level = tl.sum(gradient, axis=1, keep_dims=True) / HIDDEN
        beside = source
        if HAS_DSUMMED:
            beside = (advance(dsummed, row, dsummed_row), dsummed_row, dsummed_col)
        _store_dx(
            tile, gradient, along, level, factor, beside, dresidual, dx, (batch, row, 0), row_count, rows_exist,
            HAS_DSUMMED, HAS_RESIDUAL, HIDDEN, WIDE,
        )  # fmt: skip
    sums += (tl.cast(batch, tl.int64) * parts + part) * (HIDDEN * (1 + HAS_BIAS))
    tl.store(sums + cols, tl.sum(dweight, axis=0), mask=cols < HIDDEN)
    if HAS_BIAS:
        tl.store(sums + HIDDEN + cols, tl.sum(dbias, axis=0), mask=cols < HIDDEN)


@triton.jit
def _store_dx(
    tile, gradient, along, level, factor, beside, dresidual, dx, place, row_count, rows_exist,
    HAS_DSUMMED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`factor * (gradient - level - tile * along)`, and what arrives at the sum beside, at place (batch, row, column).

    tile holds normalised rows, gradient what arrives at them; along and level, the means over a row of their product
    and of the gradient, are [ROWS, 1].
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    result = (gradient - level - tile * along) * factor
    if HAS_DSUMMED:
        result += load_columns(beside, place[2], rows_exist, HIDDEN, WIDE, ROWS, COLS).to(tl.float32)
    cols = place[2] + indices(COLS, WIDE)
    offsets = (tl.cast(place[0], tl.int64) * row_count + place[1]) * HIDDEN + (
        indices(ROWS, WIDE)[:, None] * HIDDEN + cols[None, :]
    )
    exists = rows_exist & (cols < HIDDEN)[None, :]
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=exists)
    if HAS_RESIDUAL:
        tl.store(dresidual + offsets, result.to(dresidual.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["row_count"])
def _walking(
    x, weight, dy, dsummed, dresidual, dx, statistics,
    row_count, eps,
    x_batch, x_row, x_col, weight_batch, weight_col, dy_batch, dy_row, dy_col,
    dsummed_batch, dsummed_row, dsummed_col,
    CENTERS: tl.constexpr, ZERO_CENTERED: tl.constexpr, HAS_DSUMMED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_ROWS rows longer than a tile, and their mean and factor, in statistics [batch, 2, rows]."""
    batch, row = place_of(row_count, BLOCK_ROWS)
    rows_exist = (indices(BLOCK_ROWS, WIDE) < row_count - row)[:, None]
    source = (advance(advance(x, batch, x_batch), row, x_row), x_row, x_col)
    arriving = (advance(advance(dy, batch, dy_batch), row, dy_row), dy_row, dy_col)
    beside = source
    if HAS_DSUMMED:
        beside = (advance(advance(dsummed, batch, dsummed_batch), row, dsummed_row), dsummed_row, dsummed_col)
    weight = advance(weight, batch, weight_batch)
    mean, factor = walked_moments(source, source, rows_exist, eps, CENTERS, False, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS)

    along = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    level = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    for col in range(0, HIDDEN, BLOCK_COLS):
        tile, gradient = _normalised(
            source, arriving, mean, factor, weight, weight_col, col, rows_exist,
            ZERO_CENTERED, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        along += tl.sum(gradient * tile, axis=1, keep_dims=True) / HIDDEN
        if CENTERS:
            level += tl.sum(gradient, axis=1, keep_dims=True) / HIDDEN
    for col in range(0, HIDDEN, BLOCK_COLS):
        tile, gradient = _normalised(
            source, arriving, mean, factor, weight, weight_col, col, rows_exist,
            ZERO_CENTERED, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        _store_dx(
            tile, gradient, along, level, factor, beside, dresidual, dx, (batch, row, col), row_count, rows_exist,
            HAS_DSUMMED, HAS_RESIDUAL, HIDDEN, WIDE,
        )  # fmt: skip
    statistics += tl.cast(batch, tl.int64) * 2 * row_count + row + indices(BLOCK_ROWS, WIDE)[:, None]
    tl.store(statistics, mean, mask=rows_exist)
    tl.store(statistics + row_count, factor, mask=rows_exist)


@triton.jit
def _normalised(
    source, arriving, mean, factor, weight, weight_col, col, rows_exist,
    ZERO_CENTERED: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The normalised rows and the gradient that arrives at them, float32 [ROWS, COLS] from column `col`.

    Past the end of a row the gradient is 0, and the other is not used.
    """
    tile = load_columns(source, col, rows_exist, HIDDEN, WIDE, ROWS, COLS).to(tl.float32)
    gradient = load_columns(arriving, col, rows_exist, HIDDEN, WIDE, ROWS, COLS).to(tl.float32)
    scale = load_scale(weight, weight_col, col + indices(COLS, WIDE), ZERO_CENTERED, HIDDEN)
    exists = rows_exist & (tl.arange(0, COLS) < HIDDEN - col)[None, :]
    return tl.where(exists, (tile - mean) * factor, 0.0), gradient * scale


@triton.jit(do_not_specialize=["row_count", "parts"])
def _sum_rows(
    x, dy, statistics, sums,
    row_count, parts,
    x_batch, x_row, x_col, dy_batch, dy_row, dy_col,
    HAS_BIAS: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """What the tiles of rows `part, part + parts, ...` add to dweight and dbias in BLOCK_COLS columns."""
    tiles_n = tl.cdiv(HIDDEN, BLOCK_COLS)
    col = tl.program_id(0) % tiles_n * BLOCK_COLS
    part = tl.program_id(0) // tiles_n % parts
    batch = tl.program_id(0) // (tiles_n * parts)
    x = advance(x, batch, x_batch)
    dy = advance(dy, batch, dy_batch)
    statistics = advance(statistics, batch, 2 * row_count)
    rows = indices(BLOCK_ROWS, WIDE)[:, None]
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile_index in range(part, tl.cdiv(row_count, BLOCK_ROWS), parts):
        row = tile_index * BLOCK_ROWS
        rows_exist = rows < row_count - row
        source = (advance(x, row, x_row), x_row, x_col)
        arriving = (advance(dy, row, dy_row), dy_row, dy_col)
        tile = load_columns(source, col, rows_exist, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS).to(tl.float32)
        gradient = load_columns(arriving, col, rows_exist, HIDDEN, WIDE, BLOCK_ROWS, BLOCK_COLS).to(tl.float32)
        mean = tl.load(statistics + row + rows, mask=rows_exist, other=0.0)
        factor = tl.load(statistics + row_count + row + rows, mask=rows_exist, other=0.0)
        dweight += gradient * ((tile - mean) * factor)
        if HAS_BIAS:
            dbias += gradient
    cols = indices(BLOCK_COLS, WIDE)
    sums += (tl.cast(batch, tl.int64) * parts + part) * (HIDDEN * (1 + HAS_BIAS)) + col
    tl.store(sums + cols, tl.sum(dweight, axis=0), mask=cols < HIDDEN - col)
    if HAS_BIAS:
        tl.store(sums + HIDDEN + cols, tl.sum(dbias, axis=0), mask=cols < HIDDEN - col)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(
    sums, dbias, dweight, parts,
    HAS_BIAS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of BLOCK_COLS columns: the parts' sums added, in a fixed order."""
    tiles_n = tl.cdiv(HIDDEN, BLOCK_COLS)
    batch = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first = advance(sums, batch, parts * (HIDDEN * (1 + HAS_BIAS)))
    dweight += tl.cast(batch, tl.int64) * HIDDEN + cols
    total = _added(first, cols, parts, 1 + HAS_BIAS, HIDDEN, BLOCK_ROWS, BLOCK_COLS)
    tl.store(dweight, total.to(dweight.dtype.element_ty), mask=cols < HIDDEN)
    if HAS_BIAS:
        dbias += tl.cast(batch, tl.int64) * HIDDEN + cols
        total = _added(first + HIDDEN, cols, parts, 2, HIDDEN, BLOCK_ROWS, BLOCK_COLS)
        tl.store(dbias, total.to(dbias.dtype.element_ty), mask=cols < HIDDEN)


@triton.jit
def _added(
    sums, cols, parts, KINDS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """[BLOCK_COLS], the sum over parts of one kind in sums [parts, KINDS, HIDDEN]."""
    rows = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for part in range(0, parts, BLOCK_ROWS):
        exists = (rows < parts - part)[:, None] & (cols < HIDDEN)[None, :]
        total += tl.load(sums + rows[:, None] * (KINDS * HIDDEN) + cols[None, :], mask=exists, other=0.0)
        sums = advance(sums, BLOCK_ROWS, KINDS * HIDDEN)
    return tl.sum(total, axis=0)


def _whole_launch(
    spec: NormSpec,
    config: NormConfig,
    block: dict[str, int],
    source: tuple[str, Array],
    read: dict[str, Array],
    results: dict[str, Array],
    scratch: dict[str, Array],
) -> Launch:
    """The launch that writes dx, dresidual and the parts' sums, of rows that fit a tile."""
    batch, rows, hidden = source[1].shape
    parts = min(config.partials, triton.cdiv(rows, block["BLOCK_ROWS"]))
    has_bias = "dbias" in results
    scratch["sums"] = contiguous((batch, parts, 1 + has_bias, hidden), "float32")
    inputs, outputs, numbers, constants = _dx_operands(spec, source, read, results)
    return Launch(
        _whole,
        (batch * parts if hidden else 0,),
        inputs=inputs,
        outputs=(*outputs, "sums"),
        numbers={"row_count": rows, "parts": parts, "eps": spec.eps, **numbers},
        constants={**constants, "HAS_BIAS": has_bias, **block},
        num_warps=config.num_warps,
    )


def _walking_launches(
    spec: NormSpec,
    config: NormConfig,
    block: dict[str, int],
    source: tuple[str, Array],
    read: dict[str, Array],
    results: dict[str, Array],
    scratch: dict[str, Array],
) -> list[Launch]:
    """The launches that write dx, dresidual and the parts' sums, of rows longer than a tile."""
    batch, rows, hidden = source[1].shape
    parts = min(config.partials, triton.cdiv(rows, SUM_ROWS))
    has_bias = "dbias" in results
    scratch["statistics"] = contiguous((batch, 2, rows), "float32")
    scratch["sums"] = contiguous((batch, parts, 1 + has_bias, hidden), "float32")
    inputs, outputs, numbers, constants = _dx_operands(spec, source, read, results)
    walking = Launch(
        _walking,
        (batch * triton.cdiv(rows, block["BLOCK_ROWS"]),),
        inputs=inputs,
        outputs=(*outputs, "statistics"),
        numbers={"row_count": rows, "eps": spec.eps, **numbers},
        constants={**constants, **block},
        num_warps=config.num_warps,
    )
    reached = [(SUM_ROWS, hidden + SUM_COLS, *array.strides[1:]) for array in (source[1], read["dy"])]
    summing = Launch(
        _sum_rows,
        (batch * parts * triton.cdiv(hidden, SUM_COLS),),
        inputs=(source[0], "dy", "statistics"),
        outputs=("sums",),
        numbers={"row_count": rows, "parts": parts, **strides("x", source[1]), **strides("dy", read["dy"])},
        constants={
            "HAS_BIAS": has_bias,
            "HIDDEN": hidden,
            "WIDE": needs_wide_offsets(reached),
            "BLOCK_ROWS": SUM_ROWS,
            "BLOCK_COLS": SUM_COLS,
        },
    )
    return [walking, summing]


def _dx_operands(
    spec: NormSpec, source: tuple[str, Array], read: dict[str, Array], results: dict[str, Array]
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int], dict[str, bool]]:
    """Inputs, outputs, numbers and constants that both kernels of dx begin with."""
    dsummed = read.get("dsummed")
    has_residual = "dresidual" in results
    inputs = (source[0], "weight", "dy", "" if dsummed is None else "dsummed", *[""] * (not has_residual))
    outputs = ("dresidual", "dx") if has_residual else ("dx",)
    numbers = {
        **strides("x", source[1]),
        **strides("weight", read["weight"], "batch", "col"),
        **strides("dy", read["dy"]),
        **strides("dsummed", dsummed),
    }
    return inputs, outputs, numbers, flags_of(spec) | {"HAS_DSUMMED": dsummed is not None, "HAS_RESIDUAL": has_residual}


def _add_launch(sums: Array, has_bias: bool) -> Launch:
    """The launch that adds the parts' sums into dweight and dbias."""
    batch, parts, _, hidden = sums.shape
    return Launch(
        _add_parts,
        (batch * triton.cdiv(hidden, SUM_COLS),),
        inputs=("sums",) if has_bias else ("sums", ""),
        outputs=("dbias", "dweight") if has_bias else ("dweight",),
        numbers={"parts": parts},
        constants={
            "HAS_BIAS": has_bias,
            "HIDDEN": hidden,
            "BLOCK_ROWS": SUM_ROWS,
            "BLOCK_COLS": SUM_COLS,
        },
    )
