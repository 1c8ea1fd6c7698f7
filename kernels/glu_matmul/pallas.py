"""glu_matmul for TPUs.

Two products of the same left operand are one kernel, which reads it once: forward `x @ w_gate` and `x @ w_up`, with the
gate in its last step, and backward `dw_gate = x^T @ dz_gate` and `dw_up = x^T @ dz_up`. dz, the gradients of both
preactivations, come from one elementwise kernel. `dx = dz_gate @ w_gate^T + dz_up @ w_up^T` is one kernel
with one accumulator. Nothing is transposed in memory: a turned operand is contracted along its other axis.

A grid step multiplies blocks into float32 sums in VMEM; the last step along k finishes the tile. Blocks that stick out
of an array hold garbage there. Along m and n it reaches only what is never stored; along k it would reach everything,
so the last step reads no further than k.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_activations import activate
from ..tiles.pallas_gate import dz_of_gate
from ..tiles.pallas_tiles import (
    LANES,
    LOW_PRODUCTS,
    PRODUCTS_AT_ONCE,
    call_params,
    contract,
    elementwise_piece,
    few_registers,
    in_chunks,
    in_pieces,
    split_parts,
    turned_piece,
    whole_or_fit,
)
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import Target
from .spec import GluMatmulSpec
from .tiles import GluMatmulConfig, GluMatmulTiles


def supports(spec: GluMatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Forward and backward are alike."""
    return tuple(pallas_reasons(target, dtype=spec.dtype))


def forward(
    spec: GluMatmulSpec, config: GluMatmulConfig, target: Target, x: jax.Array, w_gate: jax.Array, w_up: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """out, and the preactivations where the spec asks for them."""
    (batch, m, k), n = x.shape, w_gate.shape[2]
    out = jax.ShapeDtypeStruct((batch, m, n), x.dtype)
    kept = jax.ShapeDtypeStruct((batch, 2, m, n), x.dtype) if spec.save_preactivations else None
    if not (batch and m and n and k):  # nothing to write, or sums of nothing
        return jnp.zeros(out.shape, out.dtype), (None if kept is None else jnp.zeros(kept.shape, kept.dtype))
    blocks = _blocks(config.forward, (m, n, k), target)
    weight = pl.BlockSpec((None, blocks[2], blocks[1]), lambda b, i, j, s: (b, s, j))
    both = pl.BlockSpec((None, 2, *blocks[:2]), lambda b, i, j, s: (b, 0, i, j))
    results = pl.pallas_call(
        partial(_pair_kernel, activation=spec.activation, turned=None, **_steps(k, blocks[2], target)),
        grid=(batch, pl.cdiv(m, blocks[0]), pl.cdiv(n, blocks[1]), pl.cdiv(k, blocks[2])),
        in_specs=[pl.BlockSpec((None, blocks[0], blocks[2]), lambda b, i, j, s: (b, i, s)), weight, weight],
        out_specs=[None if kept is None else both, pl.BlockSpec((None, *blocks[:2]), lambda b, i, j, s: (b, i, j))],
        out_shape=[kept, out],
        scratch_shapes=_pair_scratch(blocks, x.dtype, turned=False),
        name="glu_matmul_forward",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(x, w_gate, w_up)
    return results[1], results[0]


def backward(
    spec: GluMatmulSpec,
    config: GluMatmulConfig,
    target: Target,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    outputs: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, None],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dx, dw_gate, dw_up."""
    x, w_gate, w_up = inputs
    if not (x.size and w_gate.size):
        return jnp.zeros_like(x), jnp.zeros_like(w_gate), jnp.zeros_like(w_up)
    dz = dz_of_gate(spec.activation, target, gradients[0], outputs[1])
    dw_gate, dw_up = _dw(config.dw, target, x, dz)
    return _dx(config.dx, target, dz, w_gate, w_up), dw_gate, dw_up


def _dw(tiles: GluMatmulTiles, target: Target, x: jax.Array, dz: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """`x^T @ dz_gate` and `x^T @ dz_up`, of x [batch, k, m] and dz [batch, k, n]: names as this product has them."""
    (batch, k, m), n = x.shape, dz[0].shape[2]
    block_m, block_n, block_k = blocks = _blocks(tiles, (m, n, k), target)
    right = pl.BlockSpec((None, block_k, block_n), lambda b, i, j, s: (b, s, j))
    found: list[jax.Array] = pl.pallas_call(
        partial(_pair_kernel, activation=None, turned=turned_piece(target, x.dtype), **_steps(k, block_k, target)),
        grid=(batch, pl.cdiv(m, block_m), pl.cdiv(n, block_n), pl.cdiv(k, block_k)),
        in_specs=[pl.BlockSpec((None, block_k, block_m), lambda b, i, j, s: (b, s, i)), right, right],
        out_specs=[pl.BlockSpec((None, block_m, block_n), lambda b, i, j, s: (b, i, j))] * 2,
        out_shape=[jax.ShapeDtypeStruct((batch, m, n), x.dtype)] * 2,
        scratch_shapes=_pair_scratch(blocks, x.dtype, turned=True),
        name="glu_matmul_dw",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(x, *dz)
    return found


def _dx(
    tiles: GluMatmulTiles, target: Target, dz: tuple[jax.Array, jax.Array], w_gate: jax.Array, w_up: jax.Array
) -> jax.Array:
    """`dz_gate @ w_gate^T + dz_up @ w_up^T`, of dz [batch, m, k] and weights [batch, n, k]."""
    (batch, m, k), dtype, n = dz[0].shape, dz[0].dtype, w_gate.shape[1]
    block_m, block_n, block_k = _blocks(tiles, (m, n, k), target)
    left = pl.BlockSpec((None, block_m, block_k), lambda b, i, j, s: (b, i, s))
    weight = pl.BlockSpec((None, block_n, block_k), lambda b, i, j, s: (b, j, s))
    scratch = {"sums_ref": pltpu.VMEM((block_m, block_n), jnp.float32)}
    if dtype == jnp.float32:
        scratch["low_ref"] = scratch["sums_ref"]
        scratch["left_parts"] = pltpu.VMEM((3, block_m, block_k), jnp.bfloat16)
        scratch["right_parts"] = pltpu.VMEM((3, block_n, block_k), jnp.bfloat16)
    dx: jax.Array = pl.pallas_call(
        partial(_dx_kernel, **_steps(k, block_k, target)),
        grid=(batch, pl.cdiv(m, block_m), pl.cdiv(n, block_n), pl.cdiv(k, block_k)),
        in_specs=[left, left, weight, weight],
        out_specs=pl.BlockSpec((None, block_m, block_n), lambda b, i, j, s: (b, i, j)),
        out_shape=jax.ShapeDtypeStruct((batch, m, n), dtype),
        scratch_shapes=scratch,
        name="glu_matmul_dx",
        **call_params(target, ("parallel", "parallel", "parallel", "arbitrary")),
    )(*dz, w_gate, w_up)
    return dx


def _pair_kernel(
    left_ref: Any,
    first_ref: Any,
    second_ref: Any,
    kept_ref: Any,
    out_ref: Any,
    *,
    first_sums: Any,
    second_sums: Any,
    first_low: Any | None = None,
    second_low: Any | None = None,
    left_parts: Any | None = None,
    right_parts: Any | None = None,
    activation: str | None,
    turned: tuple[int, int] | None,
    **steps: Any,
) -> None:
    """One step along k of a tile [m, n] of `left @ first` and of `left @ second`; left is [k, m] if turned.

    With an activation they are gate and up: out is what they make, and kept [2, m, n] has both where it is there.
    Without one they are the results, kept and out.
    """
    step, piece = pl.program_id(3), steps["piece"]

    def store_first(first: jax.Array, rows: Any, cols: Any) -> None:
        kept_ref[rows, cols] = first.astype(kept_ref.dtype)

    def store_second(second: jax.Array, rows: Any, cols: Any) -> None:
        if activation is None:
            out_ref[rows, cols] = second.astype(out_ref.dtype)
            return
        first = _total(first_sums, first_low, rows, cols)
        out_ref[rows, cols] = (activate(activation, first) * second).astype(out_ref.dtype)
        if kept_ref is not None:
            kept_ref[0, rows, cols] = first.astype(kept_ref.dtype)
            kept_ref[1, rows, cols] = second.astype(kept_ref.dtype)

    lefts = [left_ref] if left_parts is None else split_parts(left_ref, left_parts, turned or piece, bool(turned))
    for right_ref, sums, low, store in (
        (first_ref, first_sums, first_low, None if activation else store_first),
        (second_ref, second_sums, second_low, store_second),
    ):
        rights = [right_ref] if right_parts is None else split_parts(right_ref, right_parts, piece)
        _add_product((sums, low), lefts, rights, (1, 0), step == 0, store, **steps)


def _dx_kernel(
    dz_gate_ref: Any,
    dz_up_ref: Any,
    w_gate_ref: Any,
    w_up_ref: Any,
    dx_ref: Any,
    *,
    sums_ref: Any,
    low_ref: Any | None = None,
    left_parts: Any | None = None,
    right_parts: Any | None = None,
    **steps: Any,
) -> None:
    """One step along k of a tile [m, n] of dx, of dz [m, k] and weights [n, k]."""
    step, piece = pl.program_id(3), steps["piece"]

    def store(sums: jax.Array, rows: Any, cols: Any) -> None:
        dx_ref[rows, cols] = sums.astype(dx_ref.dtype)

    for half, (left_ref, weight_ref) in enumerate(((dz_gate_ref, w_gate_ref), (dz_up_ref, w_up_ref))):
        lefts = [left_ref] if left_parts is None else split_parts(left_ref, left_parts, piece)
        rights = [weight_ref] if right_parts is None else split_parts(weight_ref, right_parts, piece)
        at_end = store if half == 1 else None
        _add_product((sums_ref, low_ref), lefts, rights, (1, 1), (step == 0) & (half == 0), at_end, **steps)


def _add_product(
    sums_refs: tuple[Any, Any | None],
    lefts: list[Any],
    rights: list[Any],
    axes: tuple[int, int],
    begins: Any,
    store: Any | None,
    *,
    count: int,
    tail: int,
    columns: int,
    at_once: int,
    piece: tuple[int, int],
) -> None:
    """Add a step's product to the sums, or begin them; `store` is given the finished ones in the last step.

    float32 operands come in parts. The products of the lower parts have sums of their own: those of an infinity are
    NaN, and do not count. Without such the last sums go to `store` as they come, and are not written.
    """
    sums_ref, low_ref = sums_refs
    step, block_k = pl.program_id(3), lefts[0].shape[1]
    at_once = at_once if low_ref is None else 1
    directly = store if low_ref is None else None

    def multiply(length: int, last: bool) -> None:
        def add(total_ref: Any, pair: tuple[int, int], cols: Any, begins: Any) -> jax.Array:
            right = rights[pair[1]][:length, cols] if axes[1] == 0 else rights[pair[1]][cols, :length]
            product = contract(lefts[pair[0]][:, :length], right, axes)
            return product + jnp.where(begins, 0, total_ref[:, cols])

        def some_columns(cols: Any) -> None:
            sums = add(sums_ref, (0, 0), cols, begins)
            if last and directly is not None:
                directly(sums, slice(None), cols)
                return
            sums_ref[:, cols] = sums
            if low_ref is not None:
                for index, pair in enumerate(LOW_PRODUCTS):
                    low_ref[:, cols] = add(low_ref, pair, cols, begins & (index == 0))

        # As many columns at a time as the matrix unit holds: a whole tile's products would not fit the registers.
        in_chunks(sums_ref.shape[1], columns, some_columns, at_once)

    if count == 1:
        multiply(tail, last=True)
    elif tail == block_k and directly is None:
        multiply(block_k, last=False)
    else:
        pl.when(step < count - 1)(lambda: multiply(block_k, last=False))
        pl.when(step == count - 1)(lambda: multiply(tail, last=True))
    if store is not None and directly is None:

        def finish(rows: Any, cols: Any) -> None:
            store(_total(sums_ref, low_ref, rows, cols), rows, cols)

        pl.when(step == count - 1)(lambda: in_pieces(sums_ref.shape, piece, finish))


def _total(sums_ref: Any, low_ref: Any | None, rows: Any, cols: Any) -> jax.Array:
    """A piece of a finished product."""
    total: jax.Array = sums_ref[rows, cols]
    if low_ref is None:
        return total
    low = low_ref[rows, cols]
    return total + jnp.where(jnp.isnan(low), 0, low)


def _blocks(tiles: GluMatmulTiles, sizes: tuple[int, int, int], target: Target) -> tuple[int, int, int]:
    """Along m, n and k: the whole of a dimension if the block holds it, else blocks of even size."""
    named = zip(("block_m", "block_n", "block_k"), (tiles.block_m, tiles.block_n, tiles.block_k), sizes, strict=True)
    m, n, k = (whole_or_fit(name, block, size, target) for name, block, size in named)
    return m, n, k


def _steps(k: int, block_k: int, target: Target) -> dict[str, Any]:
    """How a kernel goes along k, and through its tile."""
    count = pl.cdiv(k, block_k)
    return {
        "count": count,
        "tail": k - (count - 1) * block_k,
        "columns": target.matrix_unit or LANES,
        "at_once": 1 if few_registers(target) else PRODUCTS_AT_ONCE // 2,  # each is compiled for two matrices
        "piece": elementwise_piece(target),
    }


def _pair_scratch(blocks: tuple[int, int, int], dtype: Any, turned: bool) -> dict[str, Any]:
    """Sums of both products, and the operands as they are multiplied: turned round, and float32 as three bfloat16."""
    block_m, block_n, block_k = blocks
    names = ["first_sums", "second_sums"]
    scratch = {}
    if dtype == jnp.float32:
        names += ["first_low", "second_low"]
        scratch["left_parts"] = pltpu.VMEM((3, block_m, block_k), jnp.bfloat16)
        scratch["right_parts"] = pltpu.VMEM((3, block_k, block_n), jnp.bfloat16)
    elif turned:
        scratch["left_parts"] = pltpu.VMEM((1, block_m, block_k), dtype)
    return scratch | {name: pltpu.VMEM((block_m, block_n), jnp.float32) for name in names}
