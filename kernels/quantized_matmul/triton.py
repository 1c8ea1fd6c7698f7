"""Matmul with a quantised weight, for NVIDIA and AMD GPUs: the launches of a forward and of a backward.

A weight alone is dequantised tile by tile in registers, in the forward and in `da = dz @ w^T` (`triton_weights.py`).
Where a is rounded too, one small kernel does that, and codes are multiplied by codes (`triton_codes.py`). Where few
tiles would leave most of the chip idle, several programs share the steps of one along k, and a last kernel adds their
sums in order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton

from ..tiles.formats import FORMATS, HALF, MX_GROUP, bytes_of, group_count
from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_epilogue import constants_of, epilogue_gradient, finish_launch, numbers_of, operands_of
from ..tiles.triton_products import shrink, strides, transposed, warps, wide
from .spec import QuantizedMatmulSpec
from .tiles import FEW, QuantizedMatmulConfig, QuantizedMatmulTiles, splits_of
from .triton_codes import product_of_codes, round_blocks, round_rows
from .triton_weights import product, product_with_transpose

_A_FORMATS = {  # where the matrix units multiply codes of that format
    "int8": ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950"),
    "float8_e4m3fn": ("sm_90", "sm_100", "gfx950"),
    "mxfp8": ("sm_100", "gfx950"),
}
_WITHOUT = {
    ("float8_e4m3fn", "sm_80"): "A100 multiplies no float8",
    ("float8_e4m3fn", "gfx942"): "MI300X multiplies another float8, e4m3fnuz",
}

_LEAST_STEP = 64  # of k, that instructions of 4 bits multiply

Arrays = tuple[Array, Array, Array, Array | None, Array | None, Array | None]


def supports(spec: QuantizedMatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    reasons = triton_reasons(target, dtype=spec.dtype, out_dtype=spec.out_dtype)
    if target.is_gpu and spec.a_format is not None and target.name not in _A_FORMATS[spec.a_format]:
        why = _WITHOUT.get((spec.a_format, target.name), f"{target.name} has no products with scales of blocks")
        reasons.append(f"activations: got {spec.a_format}, and {why}; quantise the weight without activations")
    return tuple(reasons)


def completed(
    spec: QuantizedMatmulSpec, config: QuantizedMatmulConfig, target: Target, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The inputs with float8 codes as bytes, for not every GPU's compiler knows float8, and reading needs no more."""
    if spec.a_format is not None or FORMATS[spec.format].storage != "float8_e4m3fn":
        return inputs
    a, values, *rest = inputs
    return (a, bytes_of(values), *rest)


def forward(
    spec: QuantizedMatmulSpec,
    config: QuantizedMatmulConfig,
    a: Array,
    values: Array,
    scales: Array,
    zeros: Array | None,
    bias: Array | None,
    residual: Array | None,
) -> Plan:
    """Launches that write out, and the preactivation where the spec asks for it."""
    shape = (a.shape[0], a.shape[1], values.shape[2 if spec.a_format is None else 1])
    outputs = {"out": contiguous(shape, spec.out_dtype)}
    if spec.save_preactivation:
        outputs["preactivation"] = contiguous(shape, spec.dtype)
    named = tuple(outputs)[::-1]
    tiles = _fitted(config.few if shape[1] <= FEW else config.forward, spec, (shape[1], shape[2], a.shape[2]))
    steps = triton.cdiv(_code_rows(spec, a.shape[2]), tiles.block_k)
    splits = splits_of(config, _tile_count(tiles, shape), steps)
    read = _present(a=a, values=values, scales=scales, zeros=zeros, bias=bias, residual=residual)
    launches: list[Launch] = []
    scratch: dict[str, Array] = {}
    if spec.a_format is not None:
        rounding, scratch = _rounding_launch(spec.a_format, a)
        launches.append(rounding)
    if splits == 1:
        launches.append(_product_launch(spec, tiles, read, shape, named, splits))
    else:
        scratch["partial"] = contiguous((splits * shape[0], *shape[1:]), "float32")
        launches.append(_product_launch(spec, tiles, read, shape, ("partial",), splits))
        launches.append(finish_launch(shape, splits, named, bias, residual, spec.activation))
    return Plan(tuple(launches), read, outputs, scratch)


def backward(
    spec: QuantizedMatmulSpec,
    config: QuantizedMatmulConfig,
    inputs: Arrays,
    outputs: tuple[Array, Array | None],
    gradients: tuple[Array, None],
) -> Plan:
    """Launches that write da and, where the input was there, dbias and dresidual."""
    a, values, scales, zeros, bias, residual = inputs
    preactivation, dout = outputs[1], gradients[0]
    of_epilogue = epilogue_gradient(spec.dtype, spec.activation, dout, bias, residual)
    da = _da_launch(spec, config.da, (of_epilogue.name, of_epilogue.dz), values, scales, zeros, a.shape[2])
    read = _present(values=values, scales=scales, zeros=zeros, dout=dout)
    if spec.activation is not None and preactivation is not None:
        read["preactivation"] = preactivation
    results = {"da": contiguous(a.shape, spec.dtype), **of_epilogue.outputs}
    return Plan((*of_epilogue.launches, da), read, results, of_epilogue.scratch)


def _rounding_launch(a_format: str, a: Array) -> tuple[Launch, dict[str, Array]]:
    """The launch that rounds a to codes, and the two arrays that it writes."""
    batch, m, k = a.shape
    form = FORMATS[a_format]
    numbers = {"rows": m, "k": k, **strides("a", a)}
    constants: dict[str, Any] = {"FORMAT": a_format}
    if form.block_scales:
        block_m, block_k = shrink("rows", 16, m), max(MX_GROUP, shrink("columns", 128, k))
        groups = group_count(k, MX_GROUP)
        written = {"codes": contiguous(a.shape, form.storage), "a_scales": contiguous((batch, m, groups), "uint8")}
        numbers["groups"] = groups
        constants |= {"BLOCK_M": block_m, "BLOCK_K": block_k, "WIDE": wide((a, block_m, block_k))}
        grid, kernel = batch * triton.cdiv(m, block_m) * triton.cdiv(max(k, 1), block_k), round_blocks
    else:
        block_k = shrink("columns", 2048, k)
        written = {"codes": contiguous(a.shape, form.storage), "a_scales": contiguous((batch, m), "float32")}
        constants |= {"BLOCK_K": block_k, "WIDE": wide((a, 1, block_k))}
        grid, kernel = batch * m, round_rows
    return Launch(kernel, (grid,), ("a",), tuple(written), numbers, constants), written


def _product_launch(
    spec: QuantizedMatmulSpec,
    tiles: QuantizedMatmulTiles,
    read: dict[str, Array],
    shape: tuple[int, int, int],
    outputs: tuple[str, ...],
    splits: int,
) -> Launch:
    """The launch of a product: finished, or cut into parts of its sums."""
    a, values, scales = read["a"], read["values"], read["scales"]
    bias, residual = (read.get(name) if splits == 1 else None for name in ("bias", "residual"))
    block_m, block_n, block_k = tiles.block_m, tiles.block_n, tiles.block_k
    result, k = contiguous(shape, ""), a.shape[2]
    rounded = spec.a_format is not None
    groups_axis = 2 if rounded and FORMATS[spec.format].block_scales else 1
    pieces = [(a, block_m, block_k), (result, block_m, block_n)]
    pieces.append((transposed(values) if rounded else values, block_k, block_n))
    beside = [array for array in (scales, read.get("zeros")) if array is not None]
    pieces += [(array, block_n, 1) if groups_axis == 2 else (array, 1, block_n) for array in beside]
    if residual is not None:
        pieces.append((residual, block_m, block_n))
    numbers = {
        "m": shape[1],
        "n": shape[2],
        "k": k,
        "groups": scales.shape[groups_axis],
        "batches": shape[0],
        **strides("values", values),
        **strides("scales", scales),
        **numbers_of(bias, residual),
    }
    constants = {
        "FORMAT": spec.format,
        **constants_of(bias, residual, outputs, spec.activation if splits == 1 else None),
        "EVEN_K": k % (2 * HALF if FORMATS[spec.format].packed and not rounded else block_k) == 0,
        "WIDE": wide(*pieces),
        "SPLITS": splits,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": tiles.group_m,
    }
    if rounded:
        names: tuple[str, ...] = ("codes", "a_scales", "values", "scales")
        constants["A_FORMAT"] = spec.a_format
    else:
        names = ("a", "values", "scales", "zeros" if "zeros" in read else "")
        numbers |= strides("a", a) | strides("zeros", read.get("zeros"))
        constants |= {
            "GROUP_SIZE": spec.group_size,
            "HAS_ZEROS": "zeros" in read,
            "ALIGNED_M": a.strides[1] == 1 and shape[1] % 16 == 0,  # loads of a run along m only then
        }
    return Launch(
        product_of_codes if rounded else product,
        (splits * _tile_count(tiles, shape),),
        inputs=(*names, *operands_of(bias, residual, outputs)),
        outputs=outputs,
        numbers=numbers,
        constants=constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        dot_dtype=FORMATS[spec.a_format].storage if spec.a_format is not None else a.dtype,
    )


def _da_launch(
    spec: QuantizedMatmulSpec,
    tiles: QuantizedMatmulTiles,
    dz: tuple[str, Array],
    values: Array,
    scales: Array,
    zeros: Array | None,
    k: int,
) -> Launch:
    """The launch of `da = dz @ w^T`."""
    (batch, m, n), form = dz[1].shape, FORMATS[spec.format]
    turned = spec.a_format is not None
    pairs = turned and form.packed
    if turned:
        values, scales = transposed(values), transposed(scales) if form.block_scales else scales
    tiles = _fitted(tiles, replace(spec, a_format=None), (m, n, k))
    block_m, block_n, block_k = tiles.block_m, tiles.block_n, tiles.block_k
    if pairs:  # neighbours along k, of one group
        block_k = min(block_k, MX_GROUP // 2)
    code_rows = values.shape[1]
    tile_count = batch * triton.cdiv(m, block_m) * triton.cdiv(code_rows, block_k)
    pieces = [(dz[1], block_m, block_n), (values, block_k, block_n), (contiguous((1, m, 2 * k), ""), block_m, block_k)]
    pieces += [(array, 1, block_n) for array in (scales, zeros) if array is not None]
    return Launch(
        product_with_transpose,
        (tile_count,),
        inputs=(dz[0], "values", "scales", "zeros" if zeros is not None else ""),
        outputs=("da",),
        numbers={
            "m": m,
            "n": n,
            "k": k,
            "groups": scales.shape[1],
            "code_rows": code_rows,
            **strides("dz", dz[1]),
            **strides("values", values),
            **strides("scales", scales),
            **strides("zeros", zeros),
        },
        constants={
            "FORMAT": spec.format,
            "GROUP_SIZE": spec.group_size,
            "HAS_ZEROS": zeros is not None,
            "PAIRS": pairs,
            "EVEN_N": n % block_n == 0,
            "WIDE": wide(*pieces),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_M": tiles.group_m,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        dot_dtype=dz[1].dtype,
    )


def _fitted(
    tiles: QuantizedMatmulTiles, spec: QuantizedMatmulSpec, sizes: tuple[int, int, int]
) -> QuantizedMatmulTiles:
    """The tiles for arrays of m, n and k."""
    m, n, k = sizes
    block_m, block_n = shrink("block_m", tiles.block_m, max(m, tiles.least_m)), shrink("block_n", tiles.block_n, n)
    block_k = shrink("block_k", tiles.block_k, _code_rows(spec, k))
    if spec.a_format is not None:
        block_k = max(block_k, _LEAST_STEP)
    else:
        limits = (spec.group_size, HALF if FORMATS[spec.format].packed else 0)
        block_k = min([block_k, *filter(None, limits)])
    shrunk = tiles.block_m * tiles.block_n // (block_m * block_n)
    num_warps = warps(tiles.num_warps, shrunk)
    return replace(tiles, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps)


def _code_rows(spec: QuantizedMatmulSpec, k: int) -> int:
    """How many rows of codes a sum along k walks: of a weight alone two codes may share a row."""
    packed = FORMATS[spec.format].packed and spec.a_format is None
    return triton.cdiv(k, 2 * HALF) * HALF if packed else k


def _tile_count(tiles: QuantizedMatmulTiles, shape: tuple[int, int, int]) -> int:
    return shape[0] * triton.cdiv(shape[1], tiles.block_m) * triton.cdiv(shape[2], tiles.block_n)


def _present(**arrays: Array | None) -> dict[str, Array]:
    return {name: array for name, array in arrays.items() if array is not None}
