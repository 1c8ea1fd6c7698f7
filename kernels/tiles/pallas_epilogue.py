"""What follows a product in the same TPU kernel, `activation(sums + bias) + residual`, and dz of its backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .pallas_activations import activate, derivative
from .pallas_tiles import LANES, call_params, elementwise_piece, few_registers, in_pieces
from .targets import Target

ELEMENTWISE_ROWS, ELEMENTWISE_COLS = 512, 512  # the tile of the kernel that only reads, scales and sums


def finish(
    z: jax.Array,
    rows: Any,
    cols: Any,
    bias_ref: Any | None,
    residual_ref: Any | None,
    out_ref: Any,
    preactivation_ref: Any | None,
    activation: str | None,
) -> None:
    """Store a piece of a tile from its float32 sums z: bias is [1, n], the others [m, n]."""
    if bias_ref is not None:
        z = z + bias_ref[:, cols].astype(jnp.float32)
    if preactivation_ref is not None:
        preactivation_ref[rows, cols] = z.astype(preactivation_ref.dtype)
    out = activate(activation, z)
    if residual_ref is not None:
        out = out + residual_ref[rows, cols].astype(jnp.float32)
    out_ref[rows, cols] = out.astype(out_ref.dtype)


def gradients_of(
    dtype: str, activation: str | None, target: Target, dout: jax.Array, preactivation: jax.Array | None, bias: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """dz, the gradient of `sums + bias`, dbias [batch, n] if there is a bias, and dresidual."""
    dresidual = dout.astype(dtype)
    if activation is None and not bias:
        return dresidual, None, dresidual
    dz, sums = _dz(dtype, activation, target, dout, None if activation is None else preactivation)
    return (dresidual if dz is None else dz), (sums.astype(dtype) if bias else None), dresidual


def piece_of(shape: tuple[int, ...], target: Target) -> tuple[int, int]:
    """The piece of a loop over tiles of [batch, m, n]: smaller where registers are few and the last ones are masked."""
    rows, columns = elementwise_piece(target)
    masked = shape[1] % rows or shape[2] % LANES
    return (rows // 2 if masked and few_registers(target) else rows), columns


def _dz(
    dtype: str, activation: str | None, target: Target, dout: jax.Array, preactivation: jax.Array | None
) -> tuple[jax.Array | None, jax.Array]:
    """`dz = dout * activation'(preactivation)` [batch, m, n], and its sums along m, float32 [batch, n].

    Without an activation dz is None: it is dout.
    """
    batch, m, n = dout.shape
    struct = None if preactivation is None else jax.ShapeDtypeStruct((batch, m, n), jnp.dtype(dtype))
    if 0 in dout.shape:
        return (None if struct is None else dout.astype(struct.dtype)), jnp.zeros((batch, n), jnp.float32)
    block_m, block_n = min(ELEMENTWISE_ROWS, m), min(ELEMENTWISE_COLS, n)
    tile = pl.BlockSpec((None, block_m, block_n), lambda b, j, i: (b, i, j))
    optional = None if struct is None else tile
    sums, dz = pl.pallas_call(
        partial(_dz_kernel, activation=activation, m=m, piece=piece_of(dout.shape, target)),
        grid=(batch, pl.cdiv(n, block_n), pl.cdiv(m, block_m)),
        in_specs=[tile, optional],
        out_specs=[pl.BlockSpec((None, 1, block_n), lambda b, j, i: (b, 0, j)), optional],
        out_shape=[jax.ShapeDtypeStruct((batch, 1, n), jnp.float32), struct],
        name="dz",
        **call_params(target, ("parallel", "parallel", "arbitrary")),
    )(dout, preactivation)
    return dz, sums[:, 0]


def _dz_kernel(
    dout_ref: Any,
    preactivation_ref: Any | None,
    sums_ref: Any,
    dz_ref: Any | None,
    *,
    activation: str | None,
    m: int,
    piece: tuple[int, int],
) -> None:
    """One tile of dz; the sums [1, n] of its columns are added to those of the tiles above."""
    block_m = dout_ref.shape[0]
    first = pl.program_id(2) * block_m

    @pl.when(first == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def scale(rows: Any, cols: Any) -> None:
        dz = dout_ref[rows, cols].astype(jnp.float32)
        if activation is not None and preactivation_ref is not None and dz_ref is not None:
            dz *= derivative(activation, preactivation_ref[rows, cols].astype(jnp.float32))
            dz_ref[rows, cols] = dz.astype(dz_ref.dtype)
        if m % block_m:  # rows past the array are garbage
            row = first + rows.start + lax.broadcasted_iota(jnp.int32, dz.shape, 0)
            dz = jnp.where(row < m, dz, 0)
        sums_ref[:, cols] += jnp.sum(dz, axis=0, keepdims=True)

    in_pieces(dout_ref.shape, piece, scale)
