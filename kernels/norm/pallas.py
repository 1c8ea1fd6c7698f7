"""RMS norm and layer norm for TPUs.

A grid step has whole rows in VMEM, `[block_rows, hidden]` of every array. It goes through them a few rows at a time,
and through these in chunks of columns that fit the vector registers: once for each statistic, and once for the result.
The backward adds what its rows give to dweight and dbias to sums that stay in VMEM from one step to the next.

Blocks that stick out of an array hold garbage rows there, which are not stored, and are left out of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..tiles.pallas_tiles import LANES, SUBLANES, call_params, few_registers, fold, in_chunks
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import MIB, Target
from ..tiles.tpu_blocks import vmem_budget
from .spec import NormSpec
from .tiles import NormConfig

ROWS = 16  # of a block that are worked on at a time: a tile of bfloat16 is as high
_ARRAYS = 4  # that a backward has a block of: x, dy, dsummed and dx


def supports(spec: NormSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can."""
    reasons = pallas_reasons(target, dtype=spec.dtype)
    if target.is_tpu and spec.hidden > (most := _longest_row(spec, target)):
        reasons.append(
            f"x: its last dimension is {spec.hidden}; the Pallas kernels keep whole rows in VMEM, and {target.name} "
            f"has room for {most}: use implementation='library'"
        )
    return tuple(reasons)


def _longest_row(spec: NormSpec, target: Target) -> int:
    """The longest row of which ROWS fit VMEM in every array, beside weight and bias and their sums; all of it twice."""
    item_bytes = 4 if spec.dtype == "float32" else 2
    return (vmem_budget(target) - MIB) // (2 * (ROWS * _ARRAYS * item_bytes + 2 * SUBLANES * 4 + 2 * SUBLANES * 4))


def forward(
    spec: NormSpec,
    config: NormConfig,
    target: Target,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """y, and summed where there is a residual."""
    struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if 0 in x.shape:
        return jnp.zeros_like(x), (None if residual is None else jnp.zeros_like(x))
    batch, rows, hidden = x.shape
    block_rows = _block_rows(config, rows)
    tile = pl.BlockSpec((None, block_rows, hidden), lambda b, i: (b, i, 0))
    line = pl.BlockSpec((None, 1, hidden), lambda b, i: (b, 0, 0))
    y, summed = pl.pallas_call(
        partial(_forward_kernel, spec=spec, width=256 if few_registers(target) else 512),
        grid=(batch, pl.cdiv(rows, block_rows)),
        in_specs=[tile, line, None if bias is None else line, None if residual is None else tile],
        out_specs=[tile, None if residual is None else tile],
        out_shape=[struct, None if residual is None else struct],
        name="norm",
        **call_params(target, ("parallel", "parallel")),
    )(x, weight[:, None], None if bias is None else bias[:, None], residual)
    return y, summed


def backward(
    spec: NormSpec,
    config: NormConfig,
    target: Target,
    inputs: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None],
    outputs: tuple[jax.Array, jax.Array | None],
    gradients: tuple[jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """dx, dweight, dbias, dresidual; the last two are None where the input was. dresidual is dx."""
    x, weight, bias, residual = inputs
    dy, dsummed = gradients
    summed = x if outputs[1] is None else outputs[1]
    batch, rows, hidden = x.shape
    if 0 in x.shape:
        dbias = None if bias is None else jnp.zeros_like(bias)
        return jnp.zeros_like(x), jnp.zeros_like(weight), dbias, (None if residual is None else jnp.zeros_like(x))

    block_rows = _block_rows(config, rows)
    blocks = pl.cdiv(rows, block_rows)
    parts = 2 if blocks % 2 == 0 else 1  # chips with two cores give each its own sums
    tile = pl.BlockSpec((None, block_rows, hidden), lambda b, p, i: (b, p * (blocks // parts) + i, 0))
    line = pl.BlockSpec((None, 1, hidden), lambda b, p, i: (b, 0, 0))
    sums = pl.BlockSpec((None, None, SUBLANES, hidden), lambda b, p, i: (b, p, 0, 0))
    sums_struct = jax.ShapeDtypeStruct((batch, parts, SUBLANES, hidden), jnp.float32)
    dx, dweight, dbias = pl.pallas_call(
        partial(_backward_kernel, spec=spec, rows=rows, width=128 if few_registers(target) else 512),
        grid=(batch, parts, blocks // parts),
        in_specs=[tile, line, tile, None if dsummed is None else tile],
        out_specs=[tile, sums, None if bias is None else sums],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            sums_struct,
            None if bias is None else sums_struct,
        ],
        name="norm_backward",
        **call_params(target, ("parallel", "parallel", "arbitrary")),
    )(summed, weight[:, None], dy, dsummed)

    def total(sums: jax.Array) -> jax.Array:
        return sums.sum(axis=(1, 2)).astype(x.dtype)

    return dx, total(dweight), (None if bias is None else total(dbias)), (None if residual is None else dx)


def _forward_kernel(
    x_ref: Any,
    weight_ref: Any,
    bias_ref: Any | None,
    residual_ref: Any | None,
    y_ref: Any,
    summed_ref: Any | None,
    *,
    spec: NormSpec,
    width: int,
) -> None:
    """Rows [block_rows, hidden]; weight and bias are [1, hidden]."""
    block_rows, hidden = x_ref.shape
    source_ref = x_ref if summed_ref is None else summed_ref

    def some_rows(rows: Any) -> None:
        if summed_ref is not None and residual_ref is not None:

            def add(cols: Any) -> None:
                total = x_ref[rows, cols].astype(jnp.float32) + residual_ref[rows, cols].astype(jnp.float32)
                summed_ref[rows, cols] = total.astype(summed_ref.dtype)

            in_chunks(hidden, width, add)
        mean, factor = _moments(spec, source_ref, rows, width)

        def finish(cols: Any) -> None:
            result = (source_ref[rows, cols].astype(jnp.float32) - mean) * factor * _scale(spec, weight_ref, cols)
            if bias_ref is not None:
                result += bias_ref[:, cols].astype(jnp.float32)
            y_ref[rows, cols] = result.astype(y_ref.dtype)

        in_chunks(hidden, width, finish)

    in_chunks(block_rows, ROWS, some_rows)


def _backward_kernel(
    x_ref: Any,
    weight_ref: Any,
    dy_ref: Any,
    dsummed_ref: Any | None,
    dx_ref: Any,
    dweight_ref: Any,
    dbias_ref: Any | None,
    *,
    spec: NormSpec,
    rows: int,
    width: int,
) -> None:
    """Rows [block_rows, hidden] of dx; sums [SUBLANES, hidden] of every eighth row of this part's blocks."""
    block_rows, hidden = x_ref.shape
    first = (pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)) * block_rows

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        for sums_ref in (dweight_ref, dbias_ref):
            if sums_ref is not None:
                in_chunks(hidden, width, partial(_clear, sums_ref))

    def some_rows(at: Any) -> None:
        mean, factor = _moments(spec, x_ref, at, width)

        def normalised(cols: Any) -> tuple[jax.Array, jax.Array]:
            """Rows, and the gradient that arrives at them before it is scaled."""
            return (x_ref[at, cols].astype(jnp.float32) - mean) * factor, dy_ref[at, cols].astype(jnp.float32)

        def products(cols: Any) -> tuple[jax.Array, ...]:
            tile, gradient = normalised(cols)
            gradient *= _scale(spec, weight_ref, cols)
            return (gradient * tile, gradient) if spec.centers else (gradient * tile,)

        along, *level = (total / hidden for total in _row_sums((at.size, hidden), width, products, 1 + spec.centers))

        def finish(cols: Any) -> None:
            tile, gradient = normalised(cols)
            left = rows - first - at.start if rows % block_rows else None
            _add_rows(dweight_ref, cols, gradient * tile, left)
            if dbias_ref is not None:
                _add_rows(dbias_ref, cols, gradient, left)
            result = gradient * _scale(spec, weight_ref, cols) - tile * along
            result = (result - level[0] if level else result) * factor
            if dsummed_ref is not None:
                result += dsummed_ref[at, cols].astype(jnp.float32)
            dx_ref[at, cols] = result.astype(dx_ref.dtype)

        in_chunks(hidden, width, finish)

    in_chunks(block_rows, ROWS, some_rows)


def _clear(sums_ref: Any, cols: Any) -> None:
    sums_ref[:, cols] = jnp.zeros((SUBLANES, cols.size), sums_ref.dtype)


def _add_rows(sums_ref: Any, cols: Any, tile: jax.Array, left: jax.Array | None) -> None:
    """Add the rows of a tile, or only the first `left` of them, to SUBLANES sums."""
    if left is not None:
        tile = jnp.where(lax.broadcasted_iota(jnp.int32, tile.shape, 0) < left, tile, 0)
    if tile.shape[0] % SUBLANES == 0:
        sums_ref[:, cols] += jnp.sum(fold(tile), axis=0)
    else:
        sums_ref[pl.ds(0, 1), cols] += jnp.sum(tile, axis=0, keepdims=True)


def _moments(spec: NormSpec, source_ref: Any, rows: Any, width: int) -> tuple[jax.Array | float, jax.Array]:
    """Of whole rows the mean (0 if it is not subtracted) and the factor, [rows, 1]."""
    shape = (rows.size, source_ref.shape[1])
    mean: jax.Array | float = 0.0
    if spec.centers:
        (total,) = _row_sums(shape, width, lambda cols: (source_ref[rows, cols].astype(jnp.float32),))
        mean = total / shape[1]

    def squares(cols: Any) -> tuple[jax.Array, ...]:
        apart = source_ref[rows, cols].astype(jnp.float32) - mean
        return (apart * apart,)

    (total,) = _row_sums(shape, width, squares)
    return mean, lax.rsqrt(total / shape[1] + spec.eps)


def _scale(spec: NormSpec, weight_ref: Any, cols: Any) -> jax.Array:
    """What normalised columns are multiplied by, [1, cols]."""
    scale: jax.Array = weight_ref[:, cols].astype(jnp.float32)
    return 1.0 + scale if spec.zero_centered else scale


def _row_sums(
    shape: tuple[int, int], width: int, terms: Callable[[Any], tuple[jax.Array, ...]], count: int = 1
) -> tuple[jax.Array, ...]:
    """The sums [rows, 1] along rows of that shape of `count` terms, each of which comes as [rows, columns].

    Whole lanes are added to whole lanes, and only their sum along a row: that step takes a detour over another unit.
    """
    rows, hidden = shape

    def step(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found = terms(pl.ds(pl.multiple_of(index * width, width), width))
        return tuple(total + _fold_lanes(term) for total, term in zip(sums, found, strict=True))

    zeros = tuple(jnp.zeros((rows, LANES), jnp.float32) for _ in range(count))
    sums = lax.fori_loop(0, hidden // width, step, zeros) if hidden >= width else zeros
    totals = tuple(jnp.sum(total, axis=1, keepdims=True) for total in sums)
    if hidden % width:
        rest = terms(pl.ds(hidden // width * width, hidden % width))
        totals = tuple(total + jnp.sum(term, axis=1, keepdims=True) for total, term in zip(totals, rest, strict=True))
    return totals


def _fold_lanes(term: jax.Array) -> jax.Array:
    """[rows, n * LANES] -> [rows, LANES], the sum of the n."""
    total = term[:, :LANES]
    for start in range(LANES, term.shape[1], LANES):
        total += term[:, start : start + LANES]
    return total


def _block_rows(config: NormConfig, rows: int) -> int:
    """All rows if a block holds them, else blocks of whole tiles."""
    if config.block_rows < 1 or config.block_rows % ROWS:
        raise ValueError(f"config: block_rows is {config.block_rows}; it must be a positive multiple of {ROWS}")
    return min(config.block_rows, rows)
