"""TPU kernels that round activations to 8 bits, a scale a row, and multiply codes by codes in 8 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.formats import FORMATS, SMALLEST_SCALE
from ..tiles.pallas_epilogue import finish
from ..tiles.pallas_formats import ROWS as ROWS_OF_BYTES
from ..tiles.pallas_tiles import LANES, call_params, elementwise_piece, in_chunks, in_pieces, whole_or_fit
from ..tiles.targets import Target
from .tiles import QuantizedMatmulTiles

ROWS, COLUMNS = 256, 2048  # the tile of the kernels that only read and round


def rounded_rows(a_format: str, target: Target, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a [batch, m, k] as codes, and the scales of its rows, float32 [batch, m, 1]."""
    batch, m, k = a.shape
    kind = jnp.dtype(FORMATS[a_format].storage)
    if not a.size:
        return jnp.zeros(a.shape, kind), jnp.full((batch, m, 1), SMALLEST_SCALE, jnp.float32)
    rows, columns = (size if size <= block else block for size, block in ((m, ROWS), (k, COLUMNS)))
    tile = pl.BlockSpec((None, rows, columns), lambda b, i, s: (b, i, s))
    by_row = pl.BlockSpec((None, rows, 1), lambda b, i, s: (b, i, 0))
    grid = (batch, pl.cdiv(m, rows), pl.cdiv(k, columns))
    piece = ROWS_OF_BYTES, elementwise_piece(target)[1] // 2
    scales = pl.pallas_call(
        partial(_scale_kernel, name=a_format, k=k, steps=grid[2], piece=piece),
        grid=grid,
        in_specs=[tile],
        out_specs=by_row,
        out_shape=jax.ShapeDtypeStruct((batch, m, 1), jnp.float32),
        name="quantized_matmul_scales",
        **call_params(target, ("parallel", "parallel", "arbitrary")),
    )(a)
    codes = pl.pallas_call(
        partial(_round_kernel, name=a_format, piece=piece),
        grid=grid,
        in_specs=[tile, by_row],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(a.shape, kind),
        name="quantized_matmul_round",
        **call_params(target, ("parallel", "parallel", "parallel")),
    )(a, scales)
    return codes, scales


def _scale_kernel(a_ref: Any, scales_ref: Any, *, name: str, k: int, steps: int, piece: tuple[int, int]) -> None:
    """The scales of rows, [rows, 1], seen tile of columns by tile; NaN of what is not finite."""
    step, columns = pl.program_id(2), a_ref.shape[1]

    @pl.when(step == 0)
    def _start() -> None:
        scales_ref[...] = jnp.zeros_like(scales_ref)

    def widen(rows: Any, cols: Any) -> None:
        size = jnp.abs(a_ref[rows, cols].astype(jnp.float32))
        size = jnp.where(size < jnp.inf, size, jnp.inf)  # a NaN too: not every maximum keeps it
        if k % columns:  # what lies past the array is garbage
            column = step * columns + cols.start + lax.broadcasted_iota(jnp.int32, size.shape, 1)
            size = jnp.where(column < k, size, 0)
        scales_ref[rows, :] = jnp.maximum(scales_ref[rows, :], jnp.max(size, axis=1, keepdims=True))

    in_pieces(a_ref.shape, piece, widen)

    @pl.when(step == steps - 1)
    def _end() -> None:
        top = scales_ref[...]
        scale = jnp.maximum(top * (1 / FORMATS[name].largest), SMALLEST_SCALE)
        scales_ref[...] = jnp.where(top < jnp.inf, scale, jnp.nan)


def _round_kernel(a_ref: Any, scales_ref: Any, codes_ref: Any, *, name: str, piece: tuple[int, int]) -> None:
    """One tile of codes: the nearest, of two equally near the even one."""
    largest = FORMATS[name].largest

    def write(rows: Any, cols: Any) -> None:
        quotients = a_ref[rows, cols].astype(jnp.float32) / scales_ref[rows, :]
        quotients = jnp.clip(jnp.where(jnp.isnan(quotients), 0, quotients), -largest, largest)
        if name == "int8":
            quotients = jnp.round(quotients).astype(jnp.int32)
        codes_ref[rows, cols] = quotients.astype(codes_ref.dtype)

    in_pieces(a_ref.shape, piece, write)


def product_of_codes(
    tiles: QuantizedMatmulTiles,
    target: Target,
    codes: jax.Array,
    row_scales: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    out_dtype: str,
    saved_dtype: str | None,
    *,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: str | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The product of codes [batch, m, k] and values [batch, n, k], scaled and with its epilogue."""
    (batch, m, k), n = codes.shape, values.shape[1]
    out = jax.ShapeDtypeStruct((batch, m, n), jnp.dtype(out_dtype))
    saved = None if saved_dtype is None else jax.ShapeDtypeStruct(out.shape, jnp.dtype(saved_dtype))
    if 0 in out.shape:
        return jnp.zeros(out.shape, out.dtype), (None if saved is None else jnp.zeros(saved.shape, saved.dtype))
    if k == 0:  # a sum of nothing: one zero gives the same
        codes, values, k = jnp.zeros((batch, m, 1), codes.dtype), jnp.zeros((batch, n, 1), values.dtype), 1
    named = zip(
        ("block_m", "block_n", "block_k"), (tiles.block_m, tiles.block_n, tiles.block_k), (m, n, k), strict=True
    )
    block_m, block_n, block_k = (whole_or_fit(name, block, size, target) for name, block, size in named)
    steps = pl.cdiv(k, block_k)
    tile = pl.BlockSpec((None, block_m, block_n), lambda b, i, j, s: (b, i, j))
    by_column = pl.BlockSpec((None, 1, block_n), lambda b, i, j, s: (b, 0, j))
    results = pl.pallas_call(
        partial(
            _codes_kernel,
            activation=activation,
            steps=steps,
            tail=k - (steps - 1) * block_k,
            columns=target.matrix_unit or LANES,
            piece=elementwise_piece(target),
        ),
        grid=(batch, pl.cdiv(m, block_m), pl.cdiv(n, block_n), steps),
        in_specs=[
            pl.BlockSpec((None, block_m, block_k), lambda b, i, j, s: (b, i, s)),
            pl.BlockSpec((None, block_m, 1), lambda b, i, j, s: (b, i, 0)),
            pl.BlockSpec((None, block_n, block_k), lambda b, i, j, s: (b, j, s)),
            by_column,
            None if bias is None else by_column,
            None if residual is None else tile,
        ],
        out_specs=[tile, None if saved is None else tile],
        out_shape=[out, saved],
        scratch_shapes={"sums_ref": pltpu.VMEM((block_m, block_n), _sum_dtype(codes.dtype))},
        name="quantized_matmul_forward",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(codes, row_scales, values, scales, None if bias is None else bias[:, None, :], residual)
    return results[0], results[1]


def _codes_kernel(
    codes_ref: Any,
    row_scales_ref: Any,
    values_ref: Any,
    scales_ref: Any,
    bias_ref: Any | None,
    residual_ref: Any | None,
    out_ref: Any,
    preactivation_ref: Any | None,
    *,
    sums_ref: Any,
    activation: str | None,
    steps: int,
    tail: int,
    columns: int,
    piece: tuple[int, int],
) -> None:
    """One step along k of one tile [m, n], of codes [m, k] and values [n, k]."""
    step, block_k = pl.program_id(3), codes_ref.shape[1]

    def multiply(length: int) -> None:
        def multiply_columns(cols: Any) -> None:
            product = lax.dot_general(
                codes_ref[:, :length],
                values_ref[cols, :length],
                (((1,), (1,)), ((), ())),
                preferred_element_type=sums_ref.dtype,
            )
            sums_ref[:, cols] = product if steps == 1 else product + jnp.where(step == 0, 0, sums_ref[:, cols])

        in_chunks(out_ref.shape[1], columns, multiply_columns)

    if tail == block_k:
        multiply(block_k)
    else:
        pl.when(step < steps - 1)(lambda: multiply(block_k))
        pl.when(step == steps - 1)(lambda: multiply(tail))

    def store(rows: Any, cols: Any) -> None:
        z = sums_ref[rows, cols].astype(jnp.float32) * row_scales_ref[rows, :] * scales_ref[:, cols].astype(jnp.float32)
        finish(z, rows, cols, bias_ref, residual_ref, out_ref, preactivation_ref, activation)

    pl.when(step == steps - 1)(lambda: in_pieces(out_ref.shape, piece, store))


def _sum_dtype(codes: Any) -> Any:
    return jnp.int32 if codes == jnp.int8 else jnp.float32
