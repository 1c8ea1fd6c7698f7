"""Matmul with its epilogue inside, for TPUs.

One kernel does every product: forward `activation(a @ b + bias) + residual`, backward `da = dz @ b^T` and
`db = a^T @ dz`, where the operand named transposed is read as it lies and contracted along its other axis, so that
nothing is transposed in memory. dz, the gradient of `a @ b + bias`, and dbias come from one elementwise kernel.

A grid step multiplies a tile of a by a tile of b into a float32 accumulator in VMEM; the last step along k finishes
the tile. Blocks that stick out of an array hold garbage there. Along m and n it reaches only what is never stored;
along k it would reach everything, so the last step reads no further than k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_activations import activate, derivative
from ..tiles.pallas_tiles import LANES, call_params, contract, fit_block
from ..tiles.targets import Target
from .spec import MatmulSpec
from .tiles import MatmulConfig

DTYPES = ("float32", "bfloat16")  # what the TPU compiler multiplies; interpreted, float16 too
CHUNK_ROWS, CHUNK_COLS = 16, 512  # of a tile that an elementwise loop holds in registers at a time
ELEMENTWISE_ROWS, ELEMENTWISE_COLS = 512, 512  # the tile of the kernel that only reads, scales and sums


def supports(spec: MatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Forward and backward are alike."""
    reasons = []
    if target.is_gpu:
        reasons.append(f"target: got {target.name}; Pallas kernels here are for TPUs, use implementation='triton'")
    for name, dtype in (("dtype", spec.dtype), ("out_dtype", spec.out_dtype)):
        if dtype == "float16" and target.is_tpu:
            reasons.append(f"{name}: got float16, which the compiler of TPU {target.name} does not take; use bfloat16")
        elif dtype not in (*DTYPES, "float16"):
            reasons.append(f"{name}: got {dtype}; it must be one of {', '.join(DTYPES)}")
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
    dtypes = (spec.out_dtype, spec.dtype) if spec.save_preactivation else (spec.out_dtype,)
    results = _product(config, target, a, b, dtypes, bias=bias, residual=residual, activation=spec.activation)
    return results[0], (results[1] if spec.save_preactivation else None)


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
    dout = gradients[0]
    dtype = jnp.dtype(spec.dtype)
    dz = dout.astype(dtype)
    dresidual = None if residual is None else dz
    sums = None
    if spec.activation is not None or bias is not None:
        dz, sums = _dz(spec, target, dout, outputs[1])
    (da,) = _product(config, target, dz, b, (dtype,), transpose_b=True)
    (db,) = _product(config, target, a, dz, (dtype,), transpose_a=True)
    return da, db, (None if bias is None else sums.astype(dtype)), dresidual


def _product(
    config: MatmulConfig,
    target: Target,
    a: jax.Array,
    b: jax.Array,
    dtypes: tuple[Any, ...],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
) -> tuple[jax.Array, ...]:
    """`a @ b` with its epilogue in dtypes[0], and the preactivation in dtypes[1] if there is one.

    a is [batch, m, k], or [batch, k, m] to be transposed; b is [batch, k, n], or [batch, n, k].
    """
    a_k, b_k = (1 if transpose_a else 2), (2 if transpose_b else 1)
    batch, m, n, k = a.shape[0], a.shape[3 - a_k], b.shape[3 - b_k], a.shape[a_k]
    if 0 in (batch, m, n):
        return tuple(jnp.zeros((batch, m, n), dtype) for dtype in dtypes)
    if k == 0:  # a sum of nothing: one zero gives the same
        a, b = (jnp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype) for x, axis in ((a, a_k), (b, b_k)))
        k = 1
    block_m, block_n, block_k = (
        size if size <= block else fit_block(name, block, size, target)
        for name, block, size in (
            ("block_m", config.block_m, m),
            ("block_n", config.block_n, n),
            ("block_k", config.block_k, k),
        )
    )
    steps = pl.cdiv(k, block_k)
    tile = pl.BlockSpec((None, block_m, block_n), lambda b, i, j, s: (b, i, j))
    operands, specs = (
        [a, b],
        [
            pl.BlockSpec((None, block_k, block_m), lambda b, i, j, s: (b, s, i))
            if transpose_a
            else pl.BlockSpec((None, block_m, block_k), lambda b, i, j, s: (b, i, s)),
            pl.BlockSpec((None, block_n, block_k), lambda b, i, j, s: (b, j, s))
            if transpose_b
            else pl.BlockSpec((None, block_k, block_n), lambda b, i, j, s: (b, s, j)),
        ],
    )
    if bias is not None:
        operands.append(bias[:, None, :])
        specs.append(pl.BlockSpec((None, 1, block_n), lambda b, i, j, s: (b, 0, j)))
    if residual is not None:
        operands.append(residual)
        specs.append(tile)
    scratch = [pltpu.VMEM((block_m, block_n), jnp.float32)]
    if transpose_a:
        scratch.append(pltpu.VMEM((block_m, block_k), a.dtype))
    kernel = partial(
        _product_kernel,
        activation=activation,
        has_bias=bias is not None,
        has_residual=residual is not None,
        saves=len(dtypes) > 1,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        steps=steps,
        tail=k - (steps - 1) * block_k,
        columns=target.matrix_unit or LANES,
    )
    return tuple(
        pl.pallas_call(
            kernel,
            grid=(batch, pl.cdiv(m, block_m), pl.cdiv(n, block_n), steps),
            in_specs=specs,
            out_specs=[tile] * len(dtypes),
            out_shape=[jax.ShapeDtypeStruct((batch, m, n), dtype) for dtype in dtypes],
            scratch_shapes=scratch,
            name="matmul",
            **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
        )(*operands)
    )


def _product_kernel(
    a_ref: Any,
    b_ref: Any,
    *refs: Any,
    activation: str | None,
    has_bias: bool,
    has_residual: bool,
    saves: bool,
    transpose_a: bool,
    transpose_b: bool,
    steps: int,
    tail: int,
    columns: int,
) -> None:
    """One step along k of one tile [m, n].

    refs: bias [1, n] and residual [m, n] where given; out and, if kept, the preactivation; the float32 sums [m, n] and,
    for a transposed a, room for its block turned round.
    """
    rest = iter(refs)
    bias_ref = next(rest) if has_bias else None
    residual_ref = next(rest) if has_residual else None
    out_ref = next(rest)
    preactivation_ref = next(rest) if saves else None
    sums_ref = next(rest)
    step = pl.program_id(3)
    if transpose_a:
        a_ref = _turned(a_ref, next(rest))
    block_k = a_ref.shape[1]

    def multiply(length: int) -> None:
        """Add the product over the first `length` of this step's k to the sums."""

        def multiply_columns(cols: Any) -> None:
            if transpose_b:
                product = contract(a_ref[:, :length], b_ref[cols, :length], (1, 1))
            else:
                product = contract(a_ref[:, :length], b_ref[:length, cols], (1, 0))
            # Adding to zero at the first step costs less than a pass that writes zeros.
            sums_ref[:, cols] = product if steps == 1 else product + jnp.where(step == 0, 0, sums_ref[:, cols])

        # As many columns at a time as the matrix unit holds: a whole tile's products would not fit the registers.
        _in_chunks(out_ref.shape[1], columns, multiply_columns)

    if tail == block_k:
        multiply(block_k)
    else:
        pl.when(step < steps - 1)(lambda: multiply(block_k))
        pl.when(step == steps - 1)(lambda: multiply(tail))

    def finish(rows: Any, cols: Any) -> None:
        z = sums_ref[rows, cols]
        if bias_ref is not None:
            z += bias_ref[:, cols].astype(jnp.float32)
        if preactivation_ref is not None:
            preactivation_ref[rows, cols] = z.astype(preactivation_ref.dtype)
        out = activate(activation, z)
        if residual_ref is not None:
            out += residual_ref[rows, cols].astype(jnp.float32)
        out_ref[rows, cols] = out.astype(out_ref.dtype)

    pl.when(step == steps - 1)(lambda: _in_pieces(out_ref.shape, finish))


def _turned(block_ref: Any, turned_ref: Any) -> Any:
    """A block [k, m] written as [m, k] into another."""

    def turn(rows: Any) -> None:
        turned_ref[rows, :] = block_ref[:, rows].T

    _in_chunks(turned_ref.shape[0], LANES, turn)
    return turned_ref


def _dz(
    spec: MatmulSpec, target: Target, dout: jax.Array, preactivation: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`dz = dout * activation'(preactivation)` [batch, m, n], and its sums along m, float32 [batch, n]."""
    batch, m, n = dout.shape
    if 0 in dout.shape:
        return dout.astype(spec.dtype), jnp.zeros((batch, n), jnp.float32)
    block_m, block_n = min(ELEMENTWISE_ROWS, m), min(ELEMENTWISE_COLS, n)
    tile = pl.BlockSpec((None, block_m, block_n), lambda b, j, i: (b, i, j))
    results = pl.pallas_call(
        partial(_dz_kernel, activation=spec.activation, m=m),
        grid=(batch, pl.cdiv(n, block_n), pl.cdiv(m, block_m)),
        in_specs=[tile] if preactivation is None else [tile, tile],
        out_specs=[pl.BlockSpec((None, 1, block_n), lambda b, j, i: (b, 0, j)), tile],
        out_shape=[
            jax.ShapeDtypeStruct((batch, 1, n), jnp.float32),
            jax.ShapeDtypeStruct((batch, m, n), jnp.dtype(spec.dtype)),
        ],
        name="matmul_dz",
        **call_params(target, ("parallel", "parallel", "arbitrary")),
    )(*([dout] if preactivation is None else [dout, preactivation]))
    return results[1], results[0][:, 0]


def _dz_kernel(dout_ref: Any, *refs: Any, activation: str | None, m: int) -> None:
    """One tile of dz; the sums [1, n] of its columns are added to those of the tiles above."""
    *preactivation_ref, sums_ref, dz_ref = refs
    first = pl.program_id(2) * dz_ref.shape[0]

    @pl.when(first == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def scale(rows: Any, cols: Any) -> None:
        dz = dout_ref[rows, cols].astype(jnp.float32)
        if activation is not None:
            dz *= derivative(activation, preactivation_ref[0][rows, cols].astype(jnp.float32))
        dz_ref[rows, cols] = dz.astype(dz_ref.dtype)
        if m % dz_ref.shape[0]:  # rows past the array are garbage
            row = first + rows.start + lax.broadcasted_iota(jnp.int32, dz.shape, 0)
            dz = jnp.where(row < m, dz, 0)
        sums_ref[:, cols] += jnp.sum(dz, axis=0, keepdims=True)

    _in_pieces(dz_ref.shape, scale)


def _in_pieces(shape: tuple[int, int], body: Callable[[Any, Any], None]) -> None:
    """Run an elementwise body on pieces of a tile, small enough to stay in registers from load to store."""
    _in_chunks(shape[0], CHUNK_ROWS, lambda rows: _in_chunks(shape[1], CHUNK_COLS, lambda cols: body(rows, cols)))


def _in_chunks(size: int, chunk: int, body: Callable[[Any], None]) -> None:
    """Run the body on slices of that many rows or columns, and on what is left."""

    def step(index: jax.Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(index * chunk, chunk), chunk))

    if size // chunk == 1:
        body(pl.ds(0, chunk))
    elif size > chunk:
        lax.fori_loop(0, size // chunk, step, None)
    if size % chunk:
        body(pl.ds(size // chunk * chunk, size % chunk))
