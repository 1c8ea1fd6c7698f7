"""Matmul with its epilogue inside, for NVIDIA and AMD GPUs.

One kernel does every product. Forward it computes `activation(a @ b + bias) + residual`; backward it is called
again with the strides of `a` and `b` swapped, `da = dz @ b^T` and `db = a^T @ dz`, so no operand is ever copied or
transposed in memory. dz, the gradient of `a @ b + bias`, comes from one elementwise kernel, which on its way
sums the columns of each tile for dbias; a last small kernel adds those sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_activations import activate, derivative
from ..tiles.triton_products import (
    element,
    grouped,
    halves,
    indices,
    shrink,
    strides,
    transposed,
    warps,
    wide,
)
from ..tiles.triton_tiles import advance
from .spec import MatmulSpec
from .tiles import MatmulConfig

ELEMENTWISE_ROWS, ELEMENTWISE_COLS = 64, 128  # the tile of the kernels that only read, scale and sum
EPILOGUE_COLS = tl.constexpr(32)


def supports(spec: MatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    return tuple(triton_reasons(target, dtype=spec.dtype, out_dtype=spec.out_dtype))


def forward(
    spec: MatmulSpec, config: MatmulConfig, a: Array, b: Array, bias: Array | None, residual: Array | None
) -> Plan:
    """Launches that write out, and the preactivation where the spec asks for it."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    outputs = {"out": contiguous(shape, spec.out_dtype)}
    if spec.save_preactivation:
        outputs["preactivation"] = contiguous(shape, spec.dtype)
    launch = _product(config, ("a", a), ("b", b), tuple(outputs), bias, residual, spec.activation)
    return Plan((launch,), _present(a=a, b=b, bias=bias, residual=residual), outputs)


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
    launches.append(_product(config, (dz_name, dz), ("b", transposed(b)), ("da",)))
    launches.append(_product(config, ("a", transposed(a)), (dz_name, dz), ("db",)))
    read = _present(a=a, b=b, dout=dout, preactivation=preactivation if spec.activation else None)
    return Plan(tuple(launches), read, results, scratch)


@triton.jit(do_not_specialize=["m"])
def _matmul(
    a, b, bias, residual, preactivation, out,
    m, n, k,
    a_batch, a_row, a_col, b_batch, b_row, b_col,
    bias_batch, bias_col, residual_batch, residual_row, residual_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGNED_M: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of `activation(a @ b + bias) + residual`, and of `a @ b + bias` where it is kept."""
    if ALIGNED_M:
        m = m // 16 * 16  # m is not specialised on, so that its changes compile nothing: tell what the plan knows of it
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    batch = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = grouped(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N  # of the tile's first element, from where all offsets count

    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    rows_exist = rows < m - row
    cols_exist = cols < n - col
    a = advance(advance(a, batch, a_batch), row, a_row)
    b = advance(advance(b, batch, b_batch), col, b_col)
    a_offsets = rows[:, None] * a_row + inner[None, :] * a_col  # [BLOCK_M, BLOCK_K]
    b_offsets = inner[:, None] * b_row + cols[None, :] * b_col  # [BLOCK_K, BLOCK_N]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        a_mask = rows_exist[:, None]
        b_mask = cols_exist[None, :]
        if not EVEN_K:
            # One comparison a step keeps the loop in one piece, which the compilers pipeline; a peeled tail would be
            # a second copy of the dot and of its buffers.
            inner_exists = inner < k - start
            a_mask = a_mask & inner_exists[None, :]
            b_mask = b_mask & inner_exists[:, None]
        a_tile = tl.load(a + a_offsets, mask=a_mask, other=0.0)
        b_tile = tl.load(b + b_offsets, mask=b_mask, other=0.0)
        sums = tl.dot(a_tile, b_tile, sums, input_precision="ieee")
        a = advance(a, BLOCK_K, a_col)
        b = advance(b, BLOCK_K, b_row)

    if HAS_BIAS:
        bias = advance(bias, batch, bias_batch)
    if HAS_RESIDUAL:
        residual = advance(advance(residual, batch, residual_batch), row, residual_row)
    _epilogue(
        sums, bias, residual, preactivation, out, batch, row, col, m, n,
        bias_col, residual_row, residual_col, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE,
    )  # fmt: skip


@triton.jit
def _epilogue(
    sums, bias, residual, preactivation, out, batch, row, col, m, n, bias_col, residual_row, residual_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SAVES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Finish and store a tile of sums whose first element is (row, col); bias and residual stand at (row, 0).

    A wide tile goes by halves: residual, activation and addresses of all of it at once would not fit the registers.
    """
    if sums.shape[1] > EPILOGUE_COLS:
        left, right = halves(sums)
        _epilogue(
            left, bias, residual, preactivation, out, batch, row, col, m, n,
            bias_col, residual_row, residual_col, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE,
        )  # fmt: skip
        _epilogue(
            right, bias, residual, preactivation, out, batch, row, col + left.shape[1], m, n,
            bias_col, residual_row, residual_col, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SAVES, WIDE,
        )  # fmt: skip
    else:
        rows = indices(sums.shape[0], WIDE)
        cols = indices(sums.shape[1], WIDE)
        cols_exist = cols < n - col
        exists = (rows < m - row)[:, None] & cols_exist[None, :]
        offsets = rows[:, None] * n + cols[None, :]
        if HAS_BIAS:
            bias = advance(bias, col, bias_col)
            sums += tl.load(bias + cols * bias_col, mask=cols_exist, other=0.0).to(tl.float32)[None, :]
        if SAVES:
            preactivation = element(preactivation, batch, row, col, m, n)
            tl.store(preactivation + offsets, sums.to(preactivation.dtype.element_ty), mask=exists)
        result = activate(sums, ACTIVATION)
        if HAS_RESIDUAL:
            residual = advance(residual, col, residual_col)
            residual_offsets = rows[:, None] * residual_row + cols[None, :] * residual_col
            result += tl.load(residual + residual_offsets, mask=exists, other=0.0).to(tl.float32)
        out = element(out, batch, row, col, m, n)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=exists)


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


def _product(
    config: MatmulConfig,
    a: tuple[str, Array],
    b: tuple[str, Array],
    outputs: tuple[str, ...],
    bias: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
) -> Launch:
    """The launch of `a @ b` and its epilogue, for two named arrays of any strides."""
    (a_name, a_array), (b_name, b_array) = a, b
    batch, m, k = a_array.shape
    n = b_array.shape[2]
    block_m, block_n = shrink("block_m", config.block_m, m), shrink("block_n", config.block_n, n)
    block_k = shrink("block_k", config.block_k, k)
    saves = "preactivation" in outputs
    # Parameters of absent arrays get one that is there, and are not touched.
    arrays = (a_name, b_name, a_name if bias is None else "bias", a_name if residual is None else "residual")
    out = contiguous((batch, m, n), "")
    tiles = [(a_array, block_m, block_k), (b_array, block_k, block_n), (out, block_m, block_n)]
    if residual is not None:
        tiles.append((residual, block_m, block_n))
    shrunk = config.block_m * config.block_n // (block_m * block_n)
    return Launch(
        _matmul,
        (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        inputs=arrays if saves else (*arrays, a_name),
        outputs=("preactivation", "out") if saves else outputs,
        numbers={
            "m": m,
            "n": n,
            "k": k,
            **strides("a", a_array),
            **strides("b", b_array),
            **strides("residual", residual),
            **strides("bias", bias, "batch", "col"),
        },
        constants={
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "HAS_RESIDUAL": residual is not None,
            "SAVES": saves,
            "EVEN_K": k % block_k == 0,
            "ALIGNED_M": a_array.strides[1] == 1 and m % 16 == 0,  # loads of a run along m only then
            "WIDE": wide(*tiles),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_M": config.group_m,
        },
        num_warps=warps(config.num_warps, shrunk),
        num_stages=config.num_stages,
        dot_dtype=a_array.dtype,
    )


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
