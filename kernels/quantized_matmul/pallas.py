"""Matmul with a quantised weight, for TPUs.

A grid step turns a block of codes into numbers in VMEM, and multiplies a block of a by them into float32 sums; the last
step along k finishes the tile. `da = dz @ w^T` is the same kernel, which contracts the block along its other axis. A
scale that a whole column shares never reaches the weights: it multiplies the sums, or in the backward dz. Codes are
then exact in bfloat16, as MX weights are with their scales.

Activations rounded to 8 bits are codes that one kernel finds the scales of, and another writes; a third multiplies them
by the weight's codes in the matrix unit's own 8 bits.

Blocks that stick out of an array hold garbage there. Along m and n it reaches only what is never stored; along k it
would reach everything, so the last step reads no further than k.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.formats import FORMATS, HALF
from ..tiles.pallas_epilogue import finish, gradients_of
from ..tiles.pallas_formats import as_int8, code_piece, dequantise
from ..tiles.pallas_tiles import (
    LANES,
    LOW_PRODUCTS,
    SUBLANES,
    call_params,
    contract,
    elementwise_piece,
    in_chunks,
    in_pieces,
    round_up,
    whole_or_fit,
    write_parts,
)
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import Target
from .pallas_codes import product_of_codes, rounded_rows
from .spec import QuantizedMatmulSpec
from .tiles import FEW, QuantizedMatmulConfig, QuantizedMatmulTiles

_A_FORMATS = {  # where the matrix unit multiplies codes of that format
    "int8": ("v5e", "v5p", "v6e", "interpret"),
    "float8_e4m3fn": ("v7x", "interpret"),
    "mxfp8": (),
}
SUM_STEP = 512  # of a sum that is multiplied at once: the partial sums of more would not fit the registers

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]


def supports(spec: QuantizedMatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Forward and backward are alike."""
    reasons = pallas_reasons(target, dtype=spec.dtype, out_dtype=spec.out_dtype)
    if spec.a_format is not None and not target.is_gpu and target.name not in _A_FORMATS[spec.a_format]:
        chips = ", ".join(name for name in _A_FORMATS[spec.a_format] if name != "interpret") or "none of the TPUs"
        reasons.append(
            f"activations: got {spec.a_format}, of which {target.name} has no products ({chips} has); "
            "quantise the weight without activations"
        )
    return tuple(reasons)


def forward(
    spec: QuantizedMatmulSpec,
    config: QuantizedMatmulConfig,
    target: Target,
    a: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """out, and the preactivation where the spec asks for it."""
    saved = spec.dtype if spec.save_preactivation else None
    tiles = config.few if a.shape[1] <= FEW else config.forward
    if spec.a_format is None:
        return _product(
            spec,
            tiles,
            target,
            a,
            (values, scales, zeros),
            spec.out_dtype,
            saved,
            bias=bias,
            residual=residual,
            activation=spec.activation,
        )
    codes, row_scales = rounded_rows(spec.a_format, target, a)
    return product_of_codes(
        tiles,
        target,
        codes,
        row_scales,
        values,
        scales,
        spec.out_dtype,
        saved,
        bias=bias,
        residual=residual,
        activation=spec.activation,
    )


def backward(
    spec: QuantizedMatmulSpec,
    config: QuantizedMatmulConfig,
    target: Target,
    inputs: Inputs,
    outputs: tuple[jax.Array, jax.Array | None],
    gradients: tuple[jax.Array, None],
) -> tuple[jax.Array | None, ...]:
    """da, nothing for the weight's three arrays, dbias and dresidual; the last two are None where the input was."""
    a, values, scales, zeros, bias, residual = inputs
    dz, dbias, dresidual = gradients_of(spec.dtype, spec.activation, target, gradients[0], outputs[1], bias is not None)
    da, _ = _product(spec, config.da, target, dz, (values, scales, zeros), spec.dtype, k=a.shape[2])
    return da, None, None, None, dbias, (None if residual is None else dresidual)


def _product(
    spec: QuantizedMatmulSpec,
    tiles: QuantizedMatmulTiles,
    target: Target,
    left: jax.Array,
    weight: tuple[jax.Array, jax.Array, jax.Array | None],
    out_dtype: str,
    saved_dtype: str | None = None,
    *,
    k: int | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`left @ w` with its epilogue, and the preactivation if it has a dtype; or, where k is given, `left @ w^T`.

    left is [batch, m, k], or [batch, m, n] for the transpose. Blocks are cut along m, k and n, whichever of k and n is
    summed; "rows" are those of the weight's numbers, w [k, n], or [n, k] of a weight for rounded activations.
    """
    values, scales, zeros = as_int8(weight[0]), as_int8(weight[1]), weight[2]
    if zeros is not None:  # in a dtype of which a block may have eight rows, as the scales' are
        zeros = zeros.astype(jnp.bfloat16)
    turned, transposes = spec.a_format is not None, k is not None
    batch, m, summed = left.shape
    n = values.shape[1 if turned else 2]
    k = summed if k is None else k
    out_columns = k if transposes else n
    out = jax.ShapeDtypeStruct((batch, m, out_columns), jnp.dtype(out_dtype))
    saved = None if saved_dtype is None else jax.ShapeDtypeStruct(out.shape, jnp.dtype(saved_dtype))
    if 0 in out.shape or (transposes and not summed):
        return jnp.zeros(out.shape, out.dtype), (None if saved is None else jnp.zeros(saved.shape, saved.dtype))
    if summed == 0:  # a sum of nothing: one zero gives the same
        left = jnp.zeros((batch, m, 1), left.dtype)
        values = jnp.zeros((batch, max(values.shape[1], 1), n), values.dtype)
        k = summed = 1

    sizes = _blocks(tiles, spec, (m, n, k), target)
    block_m, block_n, block_k = sizes
    packed, scaled = FORMATS[spec.format].packed, bool(spec.group_size)
    code_rows = -(-block_k // (2 * HALF)) * HALF if packed else block_k
    number_rows = 2 * code_rows if packed else block_k
    block_out, block_sum = (block_k, block_n) if transposes else (block_n, block_k)
    steps = pl.cdiv(summed, block_sum)

    def of_weight(rows: int) -> pl.BlockSpec:
        """A block of an array [rows of k, n], by the grid's tile of columns j and step s."""
        if transposes:
            return pl.BlockSpec((None, rows, block_n), lambda b, i, j, s: (b, j, s))
        return pl.BlockSpec((None, rows, block_n), lambda b, i, j, s: (b, s, j))

    def by_column(transposed: bool) -> pl.BlockSpec:
        """A block of an array [1, n], n along the sum or along the result."""
        return pl.BlockSpec((None, 1, block_n), lambda b, i, j, s: (b, 0, s if transposed else j))

    values_spec = of_weight(code_rows)
    if turned:
        values_spec = pl.BlockSpec((None, block_n, block_k), lambda b, i, j, s: (b, s, j))
    group_rows = min(scales.shape[1], -(-number_rows // spec.group_size)) if scaled else 1
    scale_spec = of_weight(group_rows) if scaled else by_column(transposes)
    zeros_spec = of_weight(group_rows) if scaled else by_column(transposes)
    tile = pl.BlockSpec((None, block_m, block_out), lambda b, i, j, s: (b, i, j))
    of_bias = pl.BlockSpec((None, 1, block_out), lambda b, i, j, s: (b, 0, j))

    wide = left.dtype == jnp.float32
    exact = not scaled or FORMATS[spec.format].block_scales  # in bfloat16
    part_dtype = jnp.bfloat16 if wide else left.dtype
    number_shape = (block_n, block_k) if turned else (number_rows, block_n)
    scratch = {
        "sums_ref": pltpu.VMEM((block_m, block_out), jnp.float32),
        "w_parts": pltpu.VMEM((3 if wide and not exact else 1, *number_shape), part_dtype),
    }
    if wide or (transposes and not scaled):
        scratch["left_parts"] = pltpu.VMEM((3 if wide else 1, block_m, block_sum), part_dtype)
    if wide:
        scratch["low_ref"] = scratch["sums_ref"]
    kernel = partial(
        _product_kernel,
        name=spec.format,
        group_size=spec.group_size,
        axis=1 if transposes and not turned else 0,
        scales_left=transposes and not scaled,
        activation=activation,
        steps=steps,
        tail=summed - (steps - 1) * block_sum,
        columns=target.matrix_unit or LANES,
        piece=elementwise_piece(target),
        codes_piece=code_piece(target),
    )
    results = pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(m, block_m), pl.cdiv(out_columns, block_out), steps),
        in_specs=[
            pl.BlockSpec((None, block_m, block_sum), lambda b, i, j, s: (b, i, s)),
            values_spec,
            scale_spec,
            None if zeros is None else zeros_spec,
            None if bias is None else of_bias,
            None if residual is None else tile,
        ],
        out_specs=[tile, None if saved is None else tile],
        out_shape=[out, saved],
        scratch_shapes=scratch,
        name="quantized_matmul_da" if transposes else "quantized_matmul_forward",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(left, values, scales, zeros, None if bias is None else bias[:, None, :], residual)
    return results[0], results[1]


def _product_kernel(
    left_ref: Any,
    values_ref: Any,
    scales_ref: Any,
    zeros_ref: Any | None,
    bias_ref: Any | None,
    residual_ref: Any | None,
    out_ref: Any,
    preactivation_ref: Any | None,
    *,
    sums_ref: Any,
    w_parts: Any,
    left_parts: Any | None = None,
    low_ref: Any | None = None,
    name: str,
    group_size: int,
    axis: int,
    scales_left: bool,
    activation: str | None,
    steps: int,
    tail: int,
    columns: int,
    piece: tuple[int, int],
    codes_piece: tuple[int, int],
) -> None:
    """One step of one tile [m, columns] of a product: left [m, sum], and the weight contracted along its `axis`.

    scales are [groups, n] of the block, or [1, n], which multiply the sums, or left where n is summed (scales_left).
    """
    step = pl.program_id(3)
    dequantise(values_ref, scales_ref if group_size else None, zeros_ref, w_parts, name, group_size, codes_piece)
    lefts = [left_ref]
    if left_parts is not None:

        def split(rows: Any, cols: Any) -> None:
            left = left_ref[rows, cols].astype(jnp.float32)
            write_parts(left_parts, rows, cols, left * scales_ref[:, cols] if scales_left else left)

        in_pieces(left_ref.shape, piece, split)
        lefts = [left_parts.at[index] for index in range(left_parts.shape[0])]
    pairs = [(p, q) for p, q in LOW_PRODUCTS if q < w_parts.shape[0]] if low_ref is not None else []

    def multiply(length: int) -> None:
        """Add the product over the first `length` of this step to the sums."""

        def add(total_ref: Any, p: int, q: int, inner: slice, cols: Any, first: bool) -> None:
            right = w_parts[q, inner, cols] if axis == 0 else w_parts[q, cols, inner]
            product = contract(lefts[p][:, inner], right, (1, axis))
            if first:
                total_ref[:, cols] = product if steps == 1 else product + jnp.where(step == 0, 0, total_ref[:, cols])
            else:
                total_ref[:, cols] += product

        def multiply_columns(cols: Any) -> None:
            for start in range(0, length, SUM_STEP):
                inner = slice(start, min(start + SUM_STEP, length))
                add(sums_ref, 0, 0, inner, cols, first=start == 0)
                for index, (p, q) in enumerate(pairs):
                    add(low_ref, p, q, inner, cols, first=start == index == 0)

        # As many columns at a time as the matrix unit holds: a whole tile's products would not fit the registers.
        in_chunks(out_ref.shape[1], columns, multiply_columns)

    block = left_ref.shape[1]
    if tail == block:
        multiply(block)
    else:
        pl.when(step < steps - 1)(lambda: multiply(block))
        pl.when(step == steps - 1)(lambda: multiply(tail))

    def store(rows: Any, cols: Any) -> None:
        z = sums_ref[rows, cols]
        if low_ref is not None:
            low = low_ref[rows, cols]
            z += jnp.where(jnp.isnan(low), 0, low)  # the lower parts of an infinity are NaN, and do not count
        if not group_size and not scales_left:
            z *= scales_ref[:, cols].astype(jnp.float32)
        finish(z, rows, cols, bias_ref, residual_ref, out_ref, preactivation_ref, activation)

    pl.when(step == steps - 1)(lambda: in_pieces(out_ref.shape, piece, store))


def _blocks(
    tiles: QuantizedMatmulTiles, spec: QuantizedMatmulSpec, sizes: tuple[int, int, int], target: Target
) -> tuple[int, int, int]:
    """Along m, n and k: the whole of a dimension if the block holds it, else blocks of even size along m and n.

    A block along k is as long as a block of scales has groups.
    """
    (m, n, k), packed = sizes, FORMATS[spec.format].packed and spec.a_format is None
    block_m, block_n = (
        whole_or_fit(name, block, size, target)
        for name, block, size in (("block_m", tiles.block_m, m), ("block_n", tiles.block_n, n))
    )
    block_k = tiles.block_k * (2 if packed else 1)
    scale_rows = 32 if FORMATS[spec.format].block_scales else SUBLANES
    unit = max(spec.group_size * scale_rows, 2 * HALF if packed else LANES)
    return block_m, block_n, min(k, round_up(block_k, unit))
