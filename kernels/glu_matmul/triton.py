"""glu_matmul for NVIDIA and AMD GPUs.

Two products of the same left operand are one kernel, which reads it once: forward `x @ w_gate` and `x @ w_up`, with the
gate in its epilogue, and backward `dw_gate = x^T @ dz_gate` and `dw_up = x^T @ dz_up`. dz_gate and dz_up, the gradients
of the preactivations, come from one elementwise kernel. `dx = dz_gate @ w_gate^T + dz_up @ w_up^T` is one kernel with
one accumulator. Operands are transposed by their strides: nothing is copied.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_gate import dz_launch, store_gated
from ..tiles.triton_products import (
    add_product,
    element,
    grouped,
    has_runs,
    shrink,
    store,
    strides,
    transposed,
    two_products,
    warps,
    wide,
)
from ..tiles.triton_tiles import advance
from .spec import GluMatmulSpec
from .tiles import GluMatmulConfig, GluMatmulTiles


def supports(spec: GluMatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    return tuple(triton_reasons(target, dtype=spec.dtype))


def forward(spec: GluMatmulSpec, config: GluMatmulConfig, x: Array, w_gate: Array, w_up: Array) -> Plan:
    """The launch that writes out, and the preactivations where the spec asks for them."""
    batch, m, n = x.shape[0], x.shape[1], w_gate.shape[2]
    outputs = {"out": contiguous((batch, m, n), spec.dtype)}
    if spec.save_preactivations:
        outputs["preactivations"] = contiguous((batch, 2, m, n), spec.dtype)
    inputs = {"x": x, "w_gate": w_gate, "w_up": w_up}
    written = ("preactivations", "out") if spec.save_preactivations else ("out",)
    return Plan((_pair_launch(config.forward, inputs, written, spec.activation),), inputs, outputs)


def backward(
    spec: GluMatmulSpec,
    config: GluMatmulConfig,
    inputs: tuple[Array, Array, Array],
    outputs: tuple[Array, Array],
    gradients: tuple[Array, None],
) -> Plan:
    """Launches that write dx, dw_gate and dw_up."""
    x, w_gate, w_up = inputs
    dout = gradients[0]
    dz = contiguous(dout.shape, spec.dtype)
    results = {"dx": x, "dw_gate": w_gate, "dw_up": w_up}
    launches = (
        dz_launch(spec.activation, dout),
        _dx_launch(config.dx, dz, {"w_gate": transposed(w_gate), "w_up": transposed(w_up)}),
        _pair_launch(config.dw, {"x": transposed(x), "dz_gate": dz, "dz_up": dz}, ("dw_gate", "dw_up"), None),
    )
    return Plan(
        launches,
        {"x": x, "w_gate": w_gate, "w_up": w_up, "dout": dout, "preactivations": outputs[1]},
        {name: contiguous(array.shape, spec.dtype) for name, array in results.items()},
        {"dz_gate": dz, "dz_up": dz},
    )


@triton.jit(do_not_specialize=["m"])
def _pair(
    left, first, second, kept, out,
    m, n, k,
    left_batch, left_row, left_col, first_batch, first_row, first_col, second_batch, second_row, second_col,
    ACTIVATION: tl.constexpr, SAVES: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED_M: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `left @ first` and of `left @ second`.

    With an activation they are gate and up: out is what they make, and kept [batch, 2, m, n] has both if it SAVES.
    Without one they are the results, kept and out.
    """
    if ALIGNED_M:
        m = m // 16 * 16  # m is not specialised on, so that its changes compile nothing: tell what the plan knows of it
    batch, row, col = _place(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_sums, second_sums = two_products(
        advance(advance(left, batch, left_batch), row, left_row),
        advance(advance(first, batch, first_batch), col, first_col),
        advance(advance(second, batch, second_batch), col, second_col),
        m - row, n - col, k, left_row, left_col, first_row, first_col, second_row, second_col,
        EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if ACTIVATION is None:
        store(first_sums, kept, batch, row, col, m, n, m, WIDE)
        store(second_sums, out, batch, row, col, m, n, m, WIDE)
    else:
        store_gated(first_sums, second_sums, kept, out, batch, row, col, m, n, m, ACTIVATION, SAVES, WIDE)


@triton.jit(do_not_specialize=["m"])
def _dx(
    dz_gate, w_gate, dz_up, w_up, dx,
    m, n, k,
    gate_batch, gate_row, gate_col, up_batch, up_row, up_col,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `dz_gate @ w_gate + dz_up @ w_up`, of contiguous dz [m, k] and turned weights."""
    batch, row, col = _place(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = add_product(
        sums, element(dz_gate, batch, row, 0, m, k), advance(advance(w_gate, batch, gate_batch), col, gate_col),
        m - row, n - col, k, k, 1, gate_row, gate_col, "ieee", EVEN_K, WIDE, BLOCK_K,
    )  # fmt: skip
    sums = add_product(
        sums, element(dz_up, batch, row, 0, m, k), advance(advance(w_up, batch, up_batch), col, up_col),
        m - row, n - col, k, k, 1, up_row, up_col, "ieee", EVEN_K, WIDE, BLOCK_K,
    )  # fmt: skip
    store(sums, dx, batch, row, col, m, n, m, WIDE)


@triton.jit
def _place(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(batch, row, col) of the first element of this program's tile."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = grouped(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    return batch, tile_m * BLOCK_M, tile_n * BLOCK_N


def _pair_launch(
    tiles: GluMatmulTiles, inputs: dict[str, Array], written: tuple[str, ...], activation: str | None
) -> Launch:
    """The launch of two products: of the first input with the second, and with the third; of any strides."""
    left, first, second = inputs.values()
    out = contiguous((left.shape[0], left.shape[1], first.shape[2]), "")
    of_tiles = _products(tiles, left, (first, second), out)
    of_tiles["constants"] |= {
        "ACTIVATION": activation,
        "SAVES": activation is not None and len(written) == 2,
        "ALIGNED_M": left.strides[1] == 1 and left.shape[1] % 16 == 0,  # loads of a run along m only then
    }
    of_tiles["numbers"] |= strides("left", left) | strides("first", first) | strides("second", second)
    names = tuple(inputs)
    return Launch(_pair, inputs=names if len(written) == 2 else (*names, ""), outputs=written, **of_tiles)


def _dx_launch(tiles: GluMatmulTiles, dz: Array, turned: dict[str, Array]) -> Launch:
    """The launch of `dz_gate @ w_gate^T + dz_up @ w_up^T`, of contiguous dz and weights of any strides."""
    w_gate, w_up = turned.values()
    out = contiguous((*dz.shape[:2], w_gate.shape[2]), "")
    of_tiles = _products(tiles, dz, (w_gate, w_up), out)
    of_tiles["numbers"] |= strides("gate", w_gate) | strides("up", w_up)
    return Launch(_dx, inputs=("dz_gate", "w_gate", "dz_up", "w_up"), outputs=("dx",), **of_tiles)


def _products(tiles: GluMatmulTiles, left: Array, rights: tuple[Array, Array], out: Array) -> dict[str, Any]:
    """The arguments of a launch that have to do with its tiles."""
    (batch, m, n), k = out.shape, left.shape[2]
    block_m, block_n = shrink("block_m", tiles.block_m, m), shrink("block_n", tiles.block_n, n)
    block_k = shrink("block_k", tiles.block_k, k)
    shrunk = tiles.block_m * tiles.block_n // (block_m * block_n)
    if not all(map(has_runs, (left, *rights, out))):
        # Each element has an address of its own: those of a large step do not fit the registers, nor does a large
        # tile fit the shared memory on its way to the store.
        block_n, block_k = min(block_n, 128), 16
    pieces = [(left, block_m, block_k), *((right, block_k, block_n) for right in rights), (out, block_m, block_n)]
    return {
        "grid": (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        "numbers": {"m": m, "n": n, "k": k},
        "constants": {
            "EVEN_K": k % block_k == 0,
            "WIDE": wide(*pieces),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_M": tiles.group_m,
        },
        "num_warps": warps(tiles.num_warps, shrunk),
        "num_stages": tiles.num_stages,
        "dot_dtype": left.dtype,
    }
