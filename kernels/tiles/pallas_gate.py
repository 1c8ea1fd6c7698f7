"""dz, what the backward of two gated products begins with, on TPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .pallas_activations import activate, derivative
from .pallas_tiles import call_params, elementwise_piece, in_pieces
from .targets import Target

ELEMENTWISE_ROWS, ELEMENTWISE_COLS = 256, 512  # the tile of the kernel that only reads, bends and scales


def dz_of_gate(
    activation: str, target: Target, dout: jax.Array, preactivations: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of gate and of up, [batch, m, n] each, of preactivations [batch, 2, m, n] that hold both."""
    batch, m, n = dout.shape
    struct = jax.ShapeDtypeStruct(dout.shape, preactivations.dtype)
    if 0 in dout.shape:
        return jnp.zeros(struct.shape, struct.dtype), jnp.zeros(struct.shape, struct.dtype)
    block_m, block_n = min(ELEMENTWISE_ROWS, m), min(ELEMENTWISE_COLS, n)
    tile = pl.BlockSpec((None, block_m, block_n), lambda b, i, j: (b, i, j))
    dz_gate, dz_up = pl.pallas_call(
        partial(_kernel, activation=activation, piece=elementwise_piece(target)),
        grid=(batch, pl.cdiv(m, block_m), pl.cdiv(n, block_n)),
        in_specs=[tile, pl.BlockSpec((None, 2, block_m, block_n), lambda b, i, j: (b, 0, i, j))],
        out_specs=[tile, tile],
        out_shape=[struct, struct],
        name="dz_of_gate",
        **call_params(target, ("parallel", "parallel", "parallel")),
    )(dout, preactivations)
    return dz_gate, dz_up


def _kernel(
    dout_ref: Any, preactivations_ref: Any, dz_gate_ref: Any, dz_up_ref: Any, *, activation: str, piece: tuple[int, int]
) -> None:
    """One tile [m, n] of dz_gate and of dz_up."""

    def bend(rows: Any, cols: Any) -> None:
        dout = dout_ref[rows, cols].astype(jnp.float32)
        gate, up = (preactivations_ref[half, rows, cols].astype(jnp.float32) for half in (0, 1))
        dz_gate_ref[rows, cols] = (dout * up * derivative(activation, gate)).astype(dz_gate_ref.dtype)
        dz_up_ref[rows, cols] = (dout * activate(activation, gate)).astype(dz_up_ref.dtype)

    in_pieces(dout_ref.shape, piece, bend)
