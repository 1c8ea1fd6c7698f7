"""What follows two products in the same GPU kernel, `activation(gate) * up`, and dz, what their backward begins with.

Arrays are those of gated products: preactivations are gate and up in one contiguous array `[batch, 2, m, n]`, out and
the two dz are contiguous `[batch, m, n]`, dout has any strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Array, Launch, contiguous
from .triton_activations import activate, derivative
from .triton_products import EPILOGUE_COLS, element, halves, indices, shrink, store, strides, wide
from .triton_tiles import advance

ELEMENTWISE_ROWS, ELEMENTWISE_COLS = 32, 128  # the tile of the kernel that only reads, bends and scales


@triton.jit
def store_gated(
    gate, up, kept, out, batch, row, col, m, n, end,
    ACTIVATION: tl.constexpr, SAVES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store what tiles of gate and up make, whose first element is (row, col), and both where they are kept.

    Rows from `end` on stay as they are. Wide tiles go by halves: the activation and addresses of all of them at once
    would not fit the registers.
    """
    if gate.shape[1] > EPILOGUE_COLS:
        gate_left, gate_right = halves(gate)
        up_left, up_right = halves(up)
        store_gated(gate_left, up_left, kept, out, batch, row, col, m, n, end, ACTIVATION, SAVES, WIDE)
        col += gate_left.shape[1]
        store_gated(gate_right, up_right, kept, out, batch, row, col, m, n, end, ACTIVATION, SAVES, WIDE)
    else:
        if SAVES:
            store(gate, kept, 2 * batch, row, col, m, n, end, WIDE)
            store(up, kept, 2 * batch + 1, row, col, m, n, end, WIDE)
        store(activate(gate, ACTIVATION) * up, out, batch, row, col, m, n, end, WIDE)


@triton.jit(do_not_specialize=["m"])
def _dz_of_gate(
    dout, preactivations, dz_gate, dz_up,
    m, n, dout_batch, dout_row, dout_col,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N]: dz_gate is `dout * up * activation'(gate)`, and dz_up `dout * activation(gate)`."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0) // (tiles_m * tiles_n)
    row = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    exists = (rows < m - row)[:, None] & (cols < n - col)[None, :]
    offsets = rows[:, None] * n + cols[None, :]
    dout = advance(advance(advance(dout, batch, dout_batch), row, dout_row), col, dout_col)
    gradient = tl.load(dout + rows[:, None] * dout_row + cols[None, :] * dout_col, mask=exists, other=0.0)
    gradient = gradient.to(tl.float32)
    gate = tl.load(element(preactivations, 2 * batch, row, col, m, n) + offsets, mask=exists, other=0.0)
    gate = gate.to(tl.float32)
    up = tl.load(element(preactivations, 2 * batch + 1, row, col, m, n) + offsets, mask=exists, other=0.0)
    dgate = gradient * up.to(tl.float32) * derivative(gate, ACTIVATION)
    dup = gradient * activate(gate, ACTIVATION)
    tl.store(element(dz_gate, batch, row, col, m, n) + offsets, dgate.to(dz_gate.dtype.element_ty), mask=exists)
    tl.store(element(dz_up, batch, row, col, m, n) + offsets, dup.to(dz_up.dtype.element_ty), mask=exists)


def dz_launch(activation: str, dout: Array) -> Launch:
    """The launch that reads dout and the preactivations once, and writes dz_gate and dz_up."""
    batch, m, n = dout.shape
    block_m, block_n = shrink("rows", ELEMENTWISE_ROWS, m), shrink("cols", ELEMENTWISE_COLS, n)
    return Launch(
        _dz_of_gate,
        (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        inputs=("dout", "preactivations"),
        outputs=("dz_gate", "dz_up"),
        numbers={"m": m, "n": n, **strides("dout", dout)},
        constants={
            "ACTIVATION": activation,
            "WIDE": wide((dout, block_m, block_n), (contiguous(dout.shape, ""), block_m, block_n)),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
    )
