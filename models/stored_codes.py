"""Checkpoints whose matrices are codes already, read into `crosstile.Quantized` without a loss.

* "mxfp4", GPT-OSS's: `NAME_blocks` uint8 `[..., out, in / 32, 16]`, two neighbours of `in` to a byte, and `NAME_scales`
  uint8 `[..., out, in / 32]`, powers of two (e8m0).
* "fp8", DeepSeek's: NAME is float8_e4m3fn `[out, in]`, and `NAME_scale_inv` float32 has a scale for each square of 128.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import crosstile
from crosstile.kernels.tiles.formats import MX_GROUP, bytes_of, packed_rows, swapped, unpacked_pairs

from .arrays import Array, framework_of, namespace
from .names import Place

METHODS = ("mxfp4", "fp8")
BLOCK = 128  # of fp8


def method_of(fields: Mapping[str, Any]) -> str | None:
    """How the matrices of that config.json are stored; None as numbers. Raises ValueError for other ways."""
    options = fields.get("quantization_config")
    if not options:
        return None
    method = options.get("quant_method")
    if method not in METHODS:
        raise ValueError(
            f"quantization_config: got quant_method {method!r}; it must be one of {', '.join(METHODS)}. Save the "
            "checkpoint with its weights as numbers, and let load(..., quantize=) make codes of them"
        )
    if method == "fp8" and list(options.get("weight_block_size") or ()) != [BLOCK, BLOCK]:
        raise ValueError(
            f"quantization_config: got weight_block_size {options.get('weight_block_size')}; it must be "
            f"[{BLOCK}, {BLOCK}], the squares that share a scale"
        )
    return str(method)


def parts_of(name: str, method: str | None, files: Collection[str]) -> tuple[str, ...]:
    """The tensors that hold that one: its codes and scales, or itself alone."""
    pairs = {"mxfp4": (f"{name}_blocks", f"{name}_scales"), "fp8": (name, f"{name}_scale_inv")}
    pair = pairs.get(method or "", (name,))
    return pair if pair[-1] in files else (name,)


def decode(pairs: Sequence[Sequence[Array]], place: Place, method: str, dtype: str) -> dict[str, crosstile.Quantized]:
    """The parameters of a place, from the codes and scales of each of its tensors; dtype is that of the weights."""
    read = _mxfp4 if method == "mxfp4" else _fp8
    codes, scales = zip(*(read(*pair) for pair in pairs), strict=True)
    found = {}
    of_codes, of_scales = place.split(codes), place.split(scales)
    for path, shape in zip(place.paths, place.shapes, strict=True):
        values, k = of_codes[path], shape[-2]
        if tuple(values.shape) != shape:
            raise ValueError(f"{path}: its codes are of {list(values.shape)}; config.json makes it {list(shape)}")
        if method == "mxfp4":
            packed = packed_rows(namespace(values), values)
            found[path] = crosstile.Quantized(packed, of_scales[path], None, "mxfp4", k, MX_GROUP, None, dtype)
        else:
            values = _as_float8(values)
            found[path] = crosstile.Quantized(values, of_scales[path], None, "float8_e4m3fn", k, BLOCK, None, dtype)
    return found


def _mxfp4(blocks: Array, scales: Array) -> tuple[Array, Array]:
    """Codes `[..., in, out]`, one a byte, and scales `[..., in / 32, out]`: such tensors are not transposed."""
    whole = blocks.reshape(*blocks.shape[:-2], -1)
    return swapped(unpacked_pairs(namespace(blocks), whole, 2 * whole.shape[-1])), swapped(scales)


def _fp8(codes: Array, scales: Array) -> tuple[Array, Array]:
    """Codes `[out, in]` as bytes, and scales `[out, in / 128]`: those of its square for each row."""
    rows, columns = scales.shape
    each = namespace(scales).broadcast_to(scales[:, None], (rows, BLOCK, columns)).reshape(-1, columns)
    return bytes_of(codes), each[: codes.shape[0]]


def _as_float8(codes: Array) -> Array:
    """Bytes as the numbers that they are."""
    if framework_of(codes) == "torch":
        import torch

        return codes.view(torch.float8_e4m3fn)
    import ml_dtypes

    return codes.view(ml_dtypes.float8_e4m3fn)
