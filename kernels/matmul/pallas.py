"""Matmul with its epilogue inside, for TPUs.

One kernel does every product: forward `activation(a @ b + bias) + residual`, backward `da = dz @ b^T` and
`db = a^T @ dz`, where the operand named transposed is read as it lies and contracted along its other axis, so that
nothing is transposed in memory. dz, the gradient of `a @ b + bias`, and dbias come from one elementwise kernel.

A grid step multiplies a tile of a by a tile of b into a float32 accumulator in VMEM; the last step along k finishes
the tile, and where all tiles are whole copies it out strip by strip (`pallas_strips.py`). Blocks that stick out of an
array hold garbage there. Along m and n it reaches only what is never stored; along k it would reach everything, so the
last step reads no further than k.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_epilogue import finish, gradients_of, piece_of
from ..tiles.pallas_strips import Strips, in_strips
from ..tiles.pallas_tiles import (
    LANES,
    LOW_PRODUCTS,
    PRODUCTS_AT_ONCE,
    call_params,
    contract,
    in_chunks,
    in_pieces,
    split_parts,
    turned_piece,
    whole_or_fit,
)
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import MIB, Target
from .spec import MatmulSpec
from .tiles import MatmulConfig, of_rows

PRECISIONS = ("bf16x3", "bf16x6")
_PRODUCTS_A_STRIP = 2  # scheduled together: where a copy begins the matrix unit waits


def supports(spec: MatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Forward and backward are alike."""
    reasons = pallas_reasons(target, dtype=spec.dtype, out_dtype=spec.out_dtype)
    if spec.precision is not None and spec.precision not in PRECISIONS:
        reasons.append(
            f"precision: got {spec.precision}; a TPU multiplies float32 as {', '.join(PRECISIONS)} or None (bf16x6)"
        )
    return tuple(reasons)


def forward(
    spec: MatmulSpec,
    config: MatmulConfig,
    target: Target,
    a: jax.Array,
    b: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """out, and the preactivation where the spec asks for it."""
    saved = spec.dtype if spec.save_preactivation else None
    return _product(
        config,
        target,
        a,
        b,
        spec.out_dtype,
        saved,
        precision=spec.precision,
        bias=bias,
        residual=residual,
        activation=spec.activation,
    )


def backward(
    spec: MatmulSpec,
    config: MatmulConfig,
    target: Target,
    inputs: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None],
    outputs: tuple[jax.Array, jax.Array | None],
    gradients: tuple[jax.Array, None],
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """da, db, dbias, dresidual; the last two are None where the input was."""
    a, b, bias, residual = inputs
    dz, dbias, dresidual = gradients_of(spec.dtype, spec.activation, target, gradients[0], outputs[1], bias is not None)
    da, _ = _product(config, target, dz, b, spec.dtype, precision=spec.precision, transpose_b=True)
    db, _ = _product(config, target, a, dz, spec.dtype, precision=spec.precision, transpose_a=True)
    return da, db, dbias, (None if residual is None else dresidual)


def _product(
    config: MatmulConfig,
    target: Target,
    a: jax.Array,
    b: jax.Array,
    out_dtype: str,
    saved_dtype: str | None = None,
    *,
    precision: str | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`a @ b` with its epilogue, and the preactivation if it has a dtype.

    a is [batch, m, k], or [batch, k, m] to be transposed; b is [batch, k, n], or [batch, n, k].
    """
    a_k, b_k = (1 if transpose_a else 2), (2 if transpose_b else 1)
    batch, m, n, k = a.shape[0], a.shape[3 - a_k], b.shape[3 - b_k], a.shape[a_k]
    out = jax.ShapeDtypeStruct((batch, m, n), jnp.dtype(out_dtype))
    saved = None if saved_dtype is None else jax.ShapeDtypeStruct((batch, m, n), jnp.dtype(saved_dtype))
    if 0 in out.shape:
        return jnp.zeros(out.shape, out.dtype), (None if saved is None else jnp.zeros(saved.shape, saved.dtype))
    if k == 0:  # a sum of nothing: one zero gives the same
        a, b = (jnp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype) for x, axis in ((a, a_k), (b, b_k)))
        k = 1

    config = of_rows(config, m)
    block_m = whole_or_fit("block_m", config.block_m, m, target)
    block_n = whole_or_fit("block_n", config.block_n, n, target)
    block_k = whole_or_fit("block_k", config.block_k, k, target)
    steps = pl.cdiv(k, block_k)
    whole = (block_m, block_n, block_k) == (m, n, k)
    items = _items(batch, (m * k + k * n + m * n) * 4, target) if whole else 1
    a_spec = pl.BlockSpec((items, block_m, block_k), lambda b, i, j, s: (b, i, s))
    b_spec = pl.BlockSpec((items, block_k, block_n), lambda b, i, j, s: (b, s, j))
    if transpose_a:
        a_spec = pl.BlockSpec((items, block_k, block_m), lambda b, i, j, s: (b, s, i))
    if transpose_b:
        b_spec = pl.BlockSpec((items, block_n, block_k), lambda b, i, j, s: (b, j, s))
    bias_spec = pl.BlockSpec((items, 1, block_n), lambda b, i, j, s: (b, 0, j))
    tile = pl.BlockSpec((items, block_m, block_n), lambda b, i, j, s: (b, i, j))

    scratch = {"sums_ref": pltpu.VMEM((block_m, block_n), jnp.float32)}
    if a.dtype == jnp.float32:
        parts = 2 if precision == "bf16x3" else 3
        scratch["a_parts"] = pltpu.VMEM((parts, block_m, block_k), jnp.bfloat16)
        b_tile = (block_n, block_k) if transpose_b else (block_k, block_n)
        scratch["b_parts"] = pltpu.VMEM((parts, *b_tile), jnp.bfloat16)
        scratch["low_ref"] = scratch["sums_ref"]
    elif transpose_a:
        scratch["a_parts"] = pltpu.VMEM((1, block_m, block_k), a.dtype)
    grid = (pl.cdiv(batch, items), pl.cdiv(m, block_m), pl.cdiv(n, block_n), steps)
    streams = items == 1 and a.dtype != jnp.float32 and in_strips((m, n), (block_m, block_n), target)
    run, store = _each_item, tile
    if streams:
        run, store = partial(_by_strips, tiles=grid[:3], waits=target.siblings > 0), pl.BlockSpec(memory_space=pl.ANY)
        made = [result and pltpu.VMEM((block_m, block_n), result.dtype) for result in (out, saved)]
        scratch |= {"made_refs": made, "done": pltpu.SemaphoreType.DMA((2,))}
    one_item = partial(
        _product_kernel,
        activation=activation,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        steps=steps,
        tail=k - (steps - 1) * block_k,
        columns=target.matrix_unit or LANES,
        piece=piece_of(out.shape, target),
        turned=turned_piece(target, a.dtype),
    )
    results = pl.pallas_call(
        partial(run, one_item),
        grid=grid,
        in_specs=[a_spec, b_spec, None if bias is None else bias_spec, None if residual is None else tile],
        out_specs=[store, None if saved is None else store],
        out_shape=[out, saved],
        scratch_shapes=scratch,
        name="matmul",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(a, b, None if bias is None else bias[:, None, :], residual)
    return results[0], results[1]


def _items(batch: int, item_bytes: int, target: Target) -> int:
    """How many small matrices of a batch a step of the grid takes, so that it has more to do than a step costs."""
    room = 2**16 if target.interpreted else MIB
    return max(1, min(batch, room // item_bytes))


def _each_item(kernel: Any, *refs: Any, **scratch: Any) -> None:
    """Run the kernel on each item of the blocks, whose first axis is the batch; the scratch serves each in turn."""

    step = pl.program_id(3)  # read here, for an interpreter does not know it in a loop

    def run(item: Any) -> None:
        kernel(step, *(None if ref is None else ref.at[item] for ref in refs), **scratch)

    count = refs[0].shape[0]
    if count == 1:
        run(0)
    else:
        lax.fori_loop(0, count, lambda item, _: run(item), None)


def _by_strips(
    kernel: Any,
    *refs: Any,
    made_refs: list[Any],
    done: Any,
    tiles: tuple[int, int, int],
    waits: bool,
    **scratch: Any,
) -> None:
    """Run the kernel on the one item of the blocks, with tiles of its results in VMEM, which it copies out."""
    place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    strips = Strips(made_refs, refs[-2:], done, place, tiles, waits)
    kernel(pl.program_id(3), *(None if ref is None else ref.at[0] for ref in refs[:-2]), *made_refs, strips, **scratch)


def _product_kernel(
    step: Any,
    a_ref: Any,
    b_ref: Any,
    bias_ref: Any | None,
    residual_ref: Any | None,
    out_ref: Any,
    preactivation_ref: Any | None,
    strips: Strips | None = None,
    *,
    sums_ref: Any,
    a_parts: Any | None = None,
    b_parts: Any | None = None,
    low_ref: Any | None = None,
    activation: str | None,
    transpose_a: bool,
    transpose_b: bool,
    steps: int,
    tail: int,
    columns: int,
    piece: tuple[int, int],
    turned: tuple[int, int],
) -> None:
    """One step along k of one tile [m, n]: bias [1, n], residual, out, preactivation and sums [m, n].

    a is used as it lies, or first written to a_parts: turned round, and float32 as a sum of three bfloat16.
    """
    a_refs = [a_ref] if a_parts is None else split_parts(a_ref, a_parts, turned if transpose_a else piece, transpose_a)
    b_refs = [b_ref] if b_parts is None else split_parts(b_ref, b_parts, piece)

    def multiply(length: int, last: bool) -> None:
        """Add the product over the first `length` of this step's k to the sums; the last step's are the result."""

        def add(total_ref: Any, p: int, q: int, cols: Any, first: bool) -> jax.Array:
            a_tile = a_refs[p][:, :length]
            if transpose_b:
                product = contract(a_tile, b_refs[q][cols, :length], (1, 1))
            else:
                product = contract(a_tile, b_refs[q][:length, cols], (1, 0))
            if not first:
                return product + total_ref[:, cols]
            # adding to zero at the first step costs less than a pass that writes zeros
            return product if steps == 1 else product + jnp.where(step == 0, 0, total_ref[:, cols])

        def multiply_columns(cols: Any) -> None:
            total = add(sums_ref, 0, 0, cols, first=True)
            if low_ref is None and last:
                finish(total, slice(None), cols, bias_ref, residual_ref, out_ref, preactivation_ref, activation)
                return
            sums_ref[:, cols] = total
            if low_ref is not None:
                lower = LOW_PRODUCTS if len(a_refs) == 3 else LOW_PRODUCTS[-2:]  # of three parts, or of two
                for index, (p, q) in enumerate(lower):
                    low_ref[:, cols] = add(low_ref, p, q, cols, first=index == 0)

        def multiply_strip(strips: Strips, cols: Any) -> None:
            in_chunks(cols.size, columns, multiply_columns, _PRODUCTS_A_STRIP, cols.start)
            strips.store(cols)

        # As many columns at a time as the matrix unit holds: a whole tile's products would not fit the registers.
        if last and strips is not None:
            strips.begin()
            in_chunks(out_ref.shape[1], columns * _PRODUCTS_A_STRIP, partial(multiply_strip, strips))
            strips.end()
        else:
            in_chunks(out_ref.shape[1], columns, multiply_columns, 1 if low_ref is not None else PRODUCTS_AT_ONCE)

    block_k = a_ref.shape[0 if transpose_a else 1]
    if steps == 1:
        multiply(tail, last=True)
    else:
        pl.when(step < steps - 1)(lambda: multiply(block_k, last=False))
        pl.when(step == steps - 1)(lambda: multiply(tail, last=True))
    if low_ref is None:
        return

    def store(rows: Any, cols: Any) -> None:
        low = low_ref[rows, cols]
        z = sums_ref[rows, cols] + jnp.where(jnp.isnan(low), 0, low)  # the lower parts of an infinity are NaN
        finish(z, rows, cols, bias_ref, residual_ref, out_ref, preactivation_ref, activation)

    pl.when(step == steps - 1)(lambda: in_pieces(out_ref.shape, piece, store))
