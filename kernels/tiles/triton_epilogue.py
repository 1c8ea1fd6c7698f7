"""What follows a product in the same kernel, `activation(sums + bias) + residual`, and what precedes its backward.

Arrays are those of matmul: out and preactivation contiguous `[batch, m, n]`, bias `[batch, n]` and residual
`[batch, m, n]` of any strides.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .launch import Array, Launch, contiguous
from .triton_activations import activate, derivative
from .triton_products import EPILOGUE_COLS, element, halves, indices, shrink, strides, wide
from .triton_tiles import advance

DESCRIBED_COLS = tl.constexpr(64)  # of 16 bits each: the widest row that the copy engine swizzles
ELEMENTWISE_ROWS, ELEMENTWISE_COLS = 64, 128  # the tile of the kernels that only read, scale and sum


@triton.jit
def epilogue(
    sums, bias, residual, preactivation, out, batch, row, col, m, n,
    bias_batch, bias_col, residual_batch, residual_row, residual_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    WIDE: tl.constexpr, DESCRIBED: tl.constexpr = False,
):  # fmt: skip
    """Finish and store a tile of float32 sums whose first element is (row, col).

    A wide tile goes by halves: residual, activation and addresses of all of it at once would not fit the registers.
    DESCRIBED outputs are descriptors of one matrix, by which the copy engine stores DESCRIBED_COLS columns at a time.
    """
    COLS: tl.constexpr = DESCRIBED_COLS if DESCRIBED else EPILOGUE_COLS
    if sums.shape[1] > COLS:
        left, right = halves(sums)
        epilogue(
            left, bias, residual, preactivation, out, batch, row, col, m, n,
            bias_batch, bias_col, residual_batch, residual_row, residual_col,
            ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE, DESCRIBED,
        )  # fmt: skip
        epilogue(
            right, bias, residual, preactivation, out, batch, row, col + left.shape[1], m, n,
            bias_batch, bias_col, residual_batch, residual_row, residual_col,
            ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE, DESCRIBED,
        )  # fmt: skip
    else:
        rows = indices(sums.shape[0], WIDE)
        cols = indices(sums.shape[1], WIDE)
        cols_exist = cols < n - col
        exists = (rows < m - row)[:, None] & cols_exist[None, :]
        offsets = rows[:, None] * n + cols[None, :]
        if HAS_BIAS:
            bias = advance(advance(bias, batch, bias_batch), col, bias_col)
            sums += tl.load(bias + cols * bias_col, mask=cols_exist, other=0.0).to(tl.float32)[None, :]
        if SAVES:
            if DESCRIBED:
                preactivation.store([row, col], sums.to(preactivation.dtype))
            else:
                preactivation = element(preactivation, batch, row, col, m, n)
                tl.store(preactivation + offsets, sums.to(preactivation.dtype.element_ty), mask=exists)
        result = activate(sums, ACTIVATION)
        if HAS_RESIDUAL:
            residual = advance(advance(advance(residual, batch, residual_batch), row, residual_row), col, residual_col)
            residual_offsets = rows[:, None] * residual_row + cols[None, :] * residual_col
            result += tl.load(residual + residual_offsets, mask=exists, other=0.0).to(tl.float32)
        if DESCRIBED:
            out.store([row, col], result.to(out.dtype))
        else:
            out = element(out, batch, row, col, m, n)
            tl.store(out + offsets, result.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["m"])
def _finish(
    partial, bias, residual, preactivation, out, m, n, batches,
    bias_batch, bias_col, residual_batch, residual_row, residual_col,
    SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SAVES: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the result: the sums of all splits, [splits * batches, m, n], added in order, and the epilogue."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_m = tl.cdiv(m, BLOCK_M)
    col = tl.program_id(0) % tiles_n * BLOCK_N
    row = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    batch = tl.program_id(0) // (tiles_n * tiles_m)
    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    exists = (rows < m - row)[:, None] & (cols < n - col)[None, :]
    offsets = rows[:, None] * n + cols[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(SPLITS):
        plane = element(partial, split * batches + batch, row, col, m, n)
        sums += tl.load(plane + offsets, mask=exists, other=0.0)
    epilogue(
        sums, bias, residual, preactivation, out, batch, row, col, m, n,
        bias_batch, bias_col, residual_batch, residual_row, residual_col,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def _dz(
    dout, preactivation, dresidual, dz, sums,
    m, n, dout_batch, dout_row, dout_col,
    ACTIVATION: tl.constexpr, WRITES_DRESIDUAL: tl.constexpr, WRITES_DZ: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `dz = dout * activation'(preactivation)`, and the sum of each of its columns.

    dout has any strides; the others are contiguous [batch, m, n], and sums [batch, tiles_m, n].
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    batch = tl.program_id(0) // (tiles_m * tiles_n)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N

    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    cols_exist = cols < n - col
    exists = (rows < m - row)[:, None] & cols_exist[None, :]
    offsets = rows[:, None] * n + cols[None, :]
    dout = advance(advance(advance(dout, batch, dout_batch), row, dout_row), col, dout_col)
    gradient = tl.load(dout + rows[:, None] * dout_row + cols[None, :] * dout_col, mask=exists, other=0.0)
    result = gradient.to(tl.float32)
    if ACTIVATION is not None:
        preactivation = element(preactivation, batch, row, col, m, n)
        z = tl.load(preactivation + offsets, mask=exists, other=0.0).to(tl.float32)
        result *= derivative(z, ACTIVATION)

    tl.store(element(sums, batch, tile_m, col, tiles_m, n) + cols, tl.sum(result, axis=0), mask=cols_exist)
    if WRITES_DZ:
        dz = element(dz, batch, row, col, m, n)
        tl.store(dz + offsets, result.to(dz.dtype.element_ty), mask=exists)
    if WRITES_DRESIDUAL:
        dresidual = element(dresidual, batch, row, col, m, n)
        tl.store(dresidual + offsets, gradient.to(dresidual.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["tiles"])
def _sum_tiles(sums, dbias, tiles, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dbias of BLOCK_N columns: the sums [tiles, n] of the tiles above each other, added in a fixed order."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0) // tiles_n
    col = tl.program_id(0) % tiles_n * BLOCK_N
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    sums = element(sums, batch, 0, col, tiles, n)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tiles, BLOCK_M):
        exists = (rows < tiles - start)[:, None] & (cols < n - col)[None, :]
        total += tl.load(sums + rows[:, None] * n + cols[None, :], mask=exists, other=0.0)
        sums = advance(sums, BLOCK_M, n)
    dbias = element(dbias, batch, 0, col, 1, n)
    tl.store(dbias + cols, tl.sum(total, axis=0).to(dbias.dtype.element_ty), mask=cols < n - col)


# Launches


def finish_launch(
    shape: tuple[int, int, int], splits: int, outputs: tuple[str, ...], bias: Array | None, residual: Array | None,
    activation: str | None,
) -> Launch:  # fmt: skip
    """The launch that adds the sums "partial" of all splits, and finishes out [batch, m, n]."""
    batch, m, n = shape
    block_m, block_n = shrink("rows", 16, m), shrink("cols", ELEMENTWISE_COLS, n)
    return Launch(
        _finish,
        (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        inputs=("partial", *operands_of(bias, residual, outputs)),
        outputs=outputs,
        numbers={"m": m, "n": n, "batches": batch, **numbers_of(bias, residual)},
        constants={
            "SPLITS": splits,
            **constants_of(bias, residual, outputs, activation),
            "WIDE": wide(
                *((array, block_m, block_n) for array in (contiguous(shape, ""), residual) if array is not None)
            ),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
    )


def operands_of(bias: Array | None, residual: Array | None, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Names of an epilogue's inputs, "" for an absent one; last the preactivation's where it is not written."""
    names = ("" if bias is None else "bias", "" if residual is None else "residual")
    return names if "preactivation" in outputs else (*names, "")


def numbers_of(bias: Array | None, residual: Array | None) -> dict[str, int]:
    """An epilogue's strides."""
    return strides("bias", bias, "batch", "col") | strides("residual", residual)


def constants_of(
    bias: Array | None, residual: Array | None, outputs: tuple[str, ...], activation: str | None
) -> dict[str, object]:
    """An epilogue's constants."""
    return {
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "SAVES": "preactivation" in outputs,
    }


@dataclass(frozen=True)
class Gradient:
    """How a backward comes by dz, the gradient of `sums + bias`, and by those of bias and residual.

    Attributes:
        name, dz: of the array that is dz: of one of its own, or of dresidual or dout, where they are the same.
        launches: what writes it, dbias and dresidual.
        outputs: dbias and dresidual, if the input was there.
        scratch: the arrays between the launches.
    """

    name: str
    dz: Array
    launches: tuple[Launch, ...]
    outputs: dict[str, Array]
    scratch: dict[str, Array]


def epilogue_gradient(
    dtype: str, activation: str | None, dout: Array, bias: Array | None, residual: Array | None
) -> Gradient:
    """One launch that reads dout, and the preactivation of an activation, and one that adds the sums for dbias."""
    outputs = {} if bias is None else {"dbias": contiguous(bias.shape, dtype)}
    if residual is not None:
        outputs["dresidual"] = contiguous(residual.shape, dtype)
    # Without an activation dz is the gradient of the residual; where nothing is cast either, it is dout.
    same_as_dresidual = activation is None and residual is not None
    same_as_dout = activation is None and residual is None and dout.dtype == dtype
    if same_as_dout and bias is None:
        return Gradient("dout", dout, (), {}, {})
    name = "dresidual" if same_as_dresidual else "dout" if same_as_dout else "dz"
    dz = dout if same_as_dout else contiguous(dout.shape, dtype)
    sums = contiguous((dout.shape[0], triton.cdiv(dout.shape[1], _dz_tile(dout)[0]), dout.shape[2]), "float32")
    written = {
        "dresidual": None if residual is None or same_as_dresidual else "dresidual",
        "dz": None if same_as_dout else name,
        "sums": "sums",
    }
    launches = (_dz_launch(activation, dout, written), *(() if bias is None else (_sum_launch(sums),)))
    return Gradient(name, dz, launches, outputs, {"sums": sums} | ({"dz": dz} if name == "dz" else {}))


def _dz_tile(dout: Array) -> tuple[int, int]:
    _, m, n = dout.shape
    return shrink("rows", ELEMENTWISE_ROWS, m), shrink("cols", ELEMENTWISE_COLS, n)


def _dz_launch(activation: str | None, dout: Array, written: dict[str, str | None]) -> Launch:
    """The launch that reads dout once and writes those of dresidual, dz and the sums of columns that have a name."""
    (batch, m, n), (block_m, block_n) = dout.shape, _dz_tile(dout)
    outputs = tuple(name for name in written.values() if name)
    return Launch(
        _dz,
        (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        inputs=("dout", "preactivation" if activation else "", *[""] * (len(written) - len(outputs))),
        outputs=outputs,
        numbers={"m": m, "n": n, **strides("dout", dout)},
        constants={
            "ACTIVATION": activation,
            "WRITES_DRESIDUAL": written["dresidual"] is not None,
            "WRITES_DZ": written["dz"] is not None,
            "WIDE": wide((dout, block_m, block_n), (contiguous(dout.shape, ""), block_m, block_n)),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        num_warps=8,
    )


def _sum_launch(sums: Array) -> Launch:
    """The launch that adds the sums of columns [batch, tiles, n] into dbias."""
    batch, tiles, n = sums.shape
    block_m, block_n = shrink("rows", ELEMENTWISE_ROWS, tiles), shrink("cols", ELEMENTWISE_COLS // 2, n)
    return Launch(
        _sum_tiles,
        (batch * triton.cdiv(n, block_n),),
        inputs=("sums",),
        outputs=("dbias",),
        numbers={"tiles": tiles, "n": n},
        constants={"BLOCK_M": block_m, "BLOCK_N": block_n},
    )
