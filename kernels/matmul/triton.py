"""Matmul with its epilogue inside, for NVIDIA and AMD GPUs.

One kernel does every product (`triton_product.py`). Forward it computes `activation(a @ b + bias) + residual`; backward
it is called again with the strides of `a` and `b` swapped, `da = dz @ b^T` and `db = a^T @ dz`, so no operand is ever
copied or transposed in memory. dz, the gradient of `a @ b + bias`, comes from one elementwise kernel, which on its way
sums the columns of each tile for dbias; a last small kernel adds those sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_activations import derivative
from ..tiles.triton_products import element, indices, shrink, strides, transposed, wide
from ..tiles.triton_tiles import advance
from .spec import MatmulSpec
from .tiles import MatmulConfig
from .triton_launches import Product

ELEMENTWISE_ROWS, ELEMENTWISE_COLS = 64, 128  # the tile of the kernels that only read, scale and sum
PRECISIONS = {"cuda": ("tf32", "tf32x3", "bf16x3", "bf16x6"), "rocm": ("bf16x3", "bf16x6")}


def supports(spec: MatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    reasons = triton_reasons(target, dtype=spec.dtype, out_dtype=spec.out_dtype)
    there = PRECISIONS.get(target.platform, PRECISIONS["cuda"])
    if spec.precision is not None and spec.precision not in there:
        reasons.append(
            f"precision: got {spec.precision}; {target.name} multiplies float32 as {', '.join(there)} or None"
        )
    return tuple(reasons)


def forward(
    spec: MatmulSpec, config: MatmulConfig, a: Array, b: Array, bias: Array | None, residual: Array | None
) -> Plan:
    """Launches that write out, and the preactivation where the spec asks for it."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    outputs = {"out": contiguous(shape, spec.out_dtype)}
    if spec.save_preactivation:
        outputs["preactivation"] = contiguous(shape, spec.dtype)
    product = Product(("a", a), ("b", b), tuple(outputs)[::-1], bias, residual, spec.activation, spec.precision)
    launches, scratch = product.launches(config)
    return Plan(launches, _present(a=a, b=b, bias=bias, residual=residual), outputs, scratch)


def backward(
    spec: MatmulSpec,
    config: MatmulConfig,
    inputs: tuple[Array, Array, Array | None, Array | None],
    outputs: tuple[Array, Array | None],
    gradients: tuple[Array, None],
) -> Plan:
    """Launches that write da, db and, where the input was there, dbias and dresidual."""
    a, b, bias, residual = inputs
    preactivation, dout = outputs[1], gradients[0]
    batch, m, n = dout.shape
    results = {"da": contiguous(a.shape, spec.dtype), "db": contiguous(b.shape, spec.dtype)}
    if bias is not None:
        results["dbias"] = contiguous(bias.shape, spec.dtype)
    if residual is not None:
        results["dresidual"] = contiguous(residual.shape, spec.dtype)

    # Without an activation dz is the gradient of the residual; where nothing is cast either, it is dout.
    same_as_dresidual = spec.activation is None and residual is not None
    same_as_dout = spec.activation is None and residual is None and spec.out_dtype == spec.dtype
    dz_name = "dresidual" if same_as_dresidual else "dout" if same_as_dout else "dz"
    dz = dout if same_as_dout else contiguous(dout.shape, spec.dtype)
    scratch = {"dz": dz} if dz_name == "dz" else {}

    launches = []
    if bias is not None or not same_as_dout:
        scratch["sums"] = contiguous((batch, triton.cdiv(m, ELEMENTWISE_ROWS), n), "float32")
        written = {
            "dresidual": None if residual is None or same_as_dresidual else "dresidual",
            "dz": None if same_as_dout else dz_name,
            "sums": "sums",
        }
        launches.append(_dz_launch(spec.activation, dout, written))
    if bias is not None:
        launches.append(_sum_launch(scratch["sums"]))
    for product in (
        Product((dz_name, dz), ("b", transposed(b)), ("da",), precision=spec.precision),
        Product(("a", transposed(a)), (dz_name, dz), ("db",), precision=spec.precision),
    ):
        of_product, parts = product.launches(config)
        launches.extend(of_product)
        scratch |= parts
    read = _present(a=a, b=b, dout=dout, preactivation=preactivation if spec.activation else None)
    return Plan(tuple(launches), read, results, scratch)


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


def _dz_launch(activation: str | None, dout: Array, written: dict[str, str | None]) -> Launch:
    """The launch that reads dout once and writes those of dresidual, dz and the sums of columns that have a name."""
    batch, m, n = dout.shape
    block_m, block_n = shrink("rows", ELEMENTWISE_ROWS, m), shrink("cols", ELEMENTWISE_COLS, n)
    outputs = tuple(name for name in written.values() if name)
    return Launch(
        _dz,
        (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        inputs=("dout", "preactivation" if activation else "dout", *["dout"] * (len(written) - len(outputs))),
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


def _present(**arrays: Array | None) -> dict[str, Array]:
    return {name: array for name, array in arrays.items() if array is not None}
