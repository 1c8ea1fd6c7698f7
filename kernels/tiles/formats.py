"""The formats of quantised weights and activations: what a code stands for, which scale it has, and where it lies.

A weight w `[..., k, n]` becomes codes, and scales that a group of k or a whole column shares:
`w ~ (code - zero) * scale`. Everything here is NumPy's, torch's or JAX's functions alike (`xp` is the module), in
float32.

| format | codes | scale of a group with largest |w| | error of one weight, at most |
|---|---|---|---|
| int8 | -127 .. 127 | largest / 127 | scale / 2 |
| int8, zero points | -128 .. 127 | (max(w, 0) - min(w, 0)) / 255 | scale / 2 |
| int4 | -7 .. 7 (-8 can be read) | largest / 7 | scale / 2 |
| int4, zero points | 0 .. 15 | (max(w, 0) - min(w, 0)) / 15 | scale / 2 |
| float8_e4m3fn | 3 bits of mantissa, at most 448 | largest / 448 | max(abs(w) / 2**4, scale / 2**10) |
| mxfp8 | the same, in groups of 32 | least power of two, largest <= 448 * scale | the same |
| mxfp4 | 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, in groups of 32 | least power of two, largest <= 6 * scale
  | max(abs(w) / 2**2, scale / 2**2) |

Why these bounds hold. An integer code is w / scale (plus the zero) rounded, which is off by 1/2 at most. Nothing is
clipped by more: without zero points |w| / scale is at most the largest code, and with them rounding the zero moves both
ends of the range by 1/2 at most. A float with b bits of mantissa is spaced 2**-b times its power of two, so rounding is
off by 2**-(b + 1) of the value at most (b = 3: 2**-4, b = 1: 2**-2), and below the smallest normal number by half the
spacing there (2**-9 and 1/2). A scale that is a power of two moves no bits; others round the quotient once more, as
does the product: `WEIGHT_ROUNDING` of the value more. `error_bound` is the table as an array.

A product's error is then at most `abs(a) @ error_bound`, whatever the weights.

MX formats are those of the OCP Microscaling Formats specification 1.0 (arXiv:2310.10537), whose scales are bytes e8m0,
`2 ** (byte - 127)`, 255 a NaN. The specification leaves open how a scale is chosen; its example saturates values up to
1/4, here nothing does. Group scales of integers are bfloat16, rounded up, so that no code is clipped: half the bytes of
float32, at the price of steps that are 1/128 wider at most. Column scales are float32.

A NaN or an infinity in w makes its group NaN, and no other.

How codes lie in memory:

* `values [..., k, n]`, scales `[..., groups, n]`: the scales of a group are a row of numbers that every chip spreads
  down the columns for nothing. Where arrays have strides, values have k innermost in memory: the neighbours that a
  GPU's matrix instructions want in one register are then one load; any strides give the same. Formats of 4 bits have
  two rows in one: of 256 rows, row r is the low half of the bytes of row r, and row r + 128 the high half. Both halves
  are then rows as they are, beside columns of a that are as they are: nothing is interleaved, not even across a TPU's
  lanes, of which there are 128.
* weights for quantised activations, `values [..., n, k]`: k is innermost, since instructions of 8 bits and less
  multiply rows by rows. Of a byte of 4-bit codes the low half is the even k, as those instructions read it. Scales of
  MX groups are `[..., n, groups]` then.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import frexp
from typing import Any

import ml_dtypes
import numpy as np

from .launch import Array

HALF = 128  # rows of codes of 4 bits lie this far from the row that shares their bytes
GROUP_SIZES = (32, 64, 128)
MX_GROUP = 32
SMALLEST_SCALE = 2.0**-126  # a smaller one would not be a normal float32
WEIGHT_ROUNDING = 2.0**-22
E8M0_BIAS, E8M0_NAN = 127, 255


@dataclass(frozen=True)
class Format:
    """One way to write numbers.

    Attributes:
        bits: of a code.
        largest: the greatest magnitude of a code's value.
        mantissa: bits of a float's mantissa; None for integers.
        smallest_exponent: of a normal float.
        storage: the dtype of `values`.
        block_scales: whether it is an MX format: scales that are powers of two, of groups of 32.
    """

    name: str
    bits: int
    largest: float
    mantissa: int | None = None
    smallest_exponent: int = 0
    storage: str = "int8"
    block_scales: bool = False

    @property
    def packed(self) -> bool:
        """Whether a byte holds two codes."""
        return self.bits == 4


FORMATS = {
    each.name: each
    for each in (
        Format("int8", 8, 127),
        Format("int4", 4, 7, storage="uint8"),
        Format("float8_e4m3fn", 8, 448, 3, -6, "float8_e4m3fn"),
        Format("mxfp8", 8, 448, 3, -6, "float8_e4m3fn", block_scales=True),
        Format("mxfp4", 4, 6, 1, 0, "uint8", block_scales=True),
    )
}
ACTIVATIONS = {  # what activations may be beside weights of a format
    "int8": ("int8",),
    "float8_e4m3fn": ("float8_e4m3fn",),
    "mxfp8": ("mxfp8", "mxfp4"),
}


def quantized(xp: Any, w: Any, form: Format, group_size: int, zero_points: bool = False) -> tuple[Any, Any, Any | None]:
    """Codes `[..., k, n]`, scales `[..., groups, n]` and zeros like the scales, or None.

    group_size 0 is one group of the whole k. Codes are one a number: int8, e4m3, or the four bits of int4 and mxfp4 in
    uint8. int4's are 0 .. 15, of which 8 stands for zero where no zero point says otherwise.
    """
    # Scales are products with a constant, not quotients by one, which compilers turn into products as they like.
    groups = _grouped(xp, cast(w, "float32"), group_size)  # [..., groups, size, n]
    low, high = xp.amin(groups, -2), xp.amax(groups, -2)
    largest = xp.maximum(-low, high)
    if form.block_scales:
        scales = _block_scale(xp, largest, form.largest)
        divisor = _kept_finite(xp, e8m0_value(xp, scales))[..., None, :]
        return _ungrouped(_to_codes(xp, groups / divisor, form), w.shape), scales, None
    if not zero_points:
        scales = _kept_scale(xp, largest * (1 / form.largest), rounded_up=group_size > 0)
        codes = _to_codes(xp, groups / _kept_finite(xp, scales)[..., None, :], form)
        return _ungrouped(codes, w.shape), _stored_scale(scales, group_size), None
    first, levels = (-128, 255) if form.bits == 8 else (0, 15)
    low, high = xp.clip(low, None, 0), xp.clip(high, 0, None)
    scales = _kept_scale(xp, (high - low) * (1 / levels), rounded_up=group_size > 0)
    divisor = _kept_finite(xp, scales)
    zeros = _without_nan(xp, xp.clip(xp.round(-low / divisor) + first, first, first + levels))
    codes = xp.round(groups / divisor[..., None, :]) + zeros[..., None, :]
    codes = _without_nan(xp, xp.clip(codes, first, first + levels))
    codes, zeros = cast(codes, form.storage), cast(zeros, form.storage)
    return _ungrouped(codes, w.shape), _stored_scale(scales, group_size), zeros


def dequantized(
    xp: Any, codes: Any, scales: Any, zeros: Any | None, form: Format, group_size: int, dtype: str = "float32"
) -> Any:
    """The weights `[..., k, n]` that codes stand for, in float32 or float64."""
    k = codes.shape[-2]
    factor = cast(e8m0_value(xp, scales) if form.block_scales else scales, dtype)
    if zeros is None:
        values = code_values(xp, codes, form, dtype)
    else:
        values = cast(codes, dtype) - spread(xp, cast(zeros, dtype), group_size, k)
    return values * spread(xp, factor, group_size, k)


def error_bound(xp: Any, w: Any, scales: Any, form: Format, group_size: int) -> Any:
    """How far a weight may be from what it was, at most, as float64 `[..., k, n]`: the table above."""
    size = xp.abs(cast(w, "float64"))
    factor = cast(e8m0_value(xp, scales) if form.block_scales else scales, "float64")
    step = spread(xp, factor, group_size, w.shape[-2])
    bound = step / 2
    if form.mantissa is not None:
        spacing = 2.0 ** (form.smallest_exponent - form.mantissa)
        bound = xp.maximum(size * 2.0 ** -(form.mantissa + 1), step * spacing / 2)
    return bound + WEIGHT_ROUNDING * (size + step)


def quantized_rows(xp: Any, a: Any, kind: str) -> tuple[Any, Any]:
    """Activations `[..., m, k]` as codes of that kind, and scales `[..., m, 1]`, or `[..., m, groups]` of mxfp8."""
    form = FORMATS[kind]
    codes, scales, _ = quantized(xp, swapped(a), form, MX_GROUP if form.block_scales else 0)
    return swapped(codes), swapped(scales)


def dequantized_rows(xp: Any, codes: Any, scales: Any, kind: str, dtype: str = "float32") -> Any:
    """The activations `[..., m, k]` that those stand for."""
    form = FORMATS[kind]
    group_size = MX_GROUP if form.block_scales else 0
    return swapped(dequantized(xp, swapped(codes), swapped(scales), None, form, group_size, dtype))


# ---- Arrays as they are kept


def stored(
    xp: Any, w: Any, form: Format, group_size: int, zero_points: bool = False, turned: bool = False
) -> tuple[Any, Any, Any | None]:
    """values, scales and zeros of a weight `[..., k, n]`, as the module's text has them; turned for activations."""
    codes, scales, zeros = quantized(xp, w, form, group_size, zero_points)
    if not turned:
        codes = packed_rows(xp, codes) if form.packed else codes
        return swapped(contiguous(swapped(codes))), scales, zeros
    codes = contiguous(swapped(codes))
    scales = contiguous(swapped(scales)) if form.block_scales else scales
    return contiguous(packed_pairs(xp, codes) if form.packed else codes), scales, zeros


def stored_shapes(
    form: Format, group_size: int, k: int, n: int, turned: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of values and of scales."""
    groups = group_count(k, group_size)
    if turned:
        return (n, -(-k // 2) if form.packed else k), ((n, groups) if form.block_scales else (groups, n))
    return (-(-k // (2 * HALF)) * HALF if form.packed else k, n), (groups, n)


def weights(
    xp: Any, arrays: tuple[Any, Any, Any | None], form: Format, group_size: int, k: int, turned: bool, dtype: str
) -> Any:
    """The weight `[..., k, n]` in float32 or float64 that (values, scales, zeros) stand for; `stored` made them."""
    values, scales, zeros = arrays
    if turned:
        codes = swapped(unpacked_pairs(xp, values, k) if form.packed else values)
        scales = swapped(scales) if form.block_scales else scales
    else:
        codes = unpacked_rows(xp, values, k) if form.packed else values
    return dequantized(xp, codes, scales, zeros, form, group_size, dtype)


# ---- Codes


def code_values(xp: Any, codes: Any, form: Format, dtype: str = "float32") -> Any:
    """What codes stand for before the scale, where there are no zero points."""
    if form.name == "mxfp4":
        codes = cast(codes, "int32")
        magnitude = codes & 7
        # Twice the value: 0, 1, 2, 3, then 2 and 3 doubled, and doubled again.
        doubled = xp.where(magnitude < 4, magnitude, xp.where(magnitude < 6, 2 * magnitude - 4, 4 * magnitude - 16))
        values = cast(doubled, dtype) / 2
        return xp.where(codes >= 8, -values, values)
    values = cast(codes, dtype)
    return values - 8 if form.name == "int4" else values


def _to_codes(xp: Any, quotients: Any, form: Format) -> Any:
    """The codes nearest to numbers; where two are equally near, the even one."""
    if form.mantissa is None:
        codes = _without_nan(xp, xp.clip(xp.round(quotients), -form.largest, form.largest))
        return cast(codes + 8, "uint8") if form.bits == 4 else cast(codes, "int8")
    rounded = _without_nan(xp, xp.clip(_round_to_float(xp, quotients, form), -form.largest, form.largest))
    if form.bits == 8:
        return cast(rounded, "float8_e4m3fn")
    size = xp.abs(rounded)
    magnitude = xp.where(size < 2, 2 * size, xp.where(size < 4, size + 2, size / 2 + 4))
    return cast(xp.where(rounded < 0, magnitude + 8, magnitude), "uint8")


def _round_to_float(xp: Any, values: Any, form: Format) -> Any:
    """float32 numbers rounded to the format's floats as if there were no largest.

    By hand, since frameworks convert to float8 in two roundings, or let what is too large become NaN.
    """
    _, exponent = xp.frexp(values)  # of a mantissa from 1/2
    step = _power_of_two(xp.clip(exponent - 1, form.smallest_exponent, 64) - form.mantissa)
    return xp.round(values / step) * step


def packed_rows(xp: Any, codes: Any) -> Any:
    """4-bit codes `[..., k, n]`, two to a byte: `[..., 128 * ceil(k / 256), n]`, as the module's text has it."""
    *lead, k, n = codes.shape
    blocks = -(-k // (2 * HALF))
    codes = _pad_rows(xp, codes, blocks * 2 * HALF - k).reshape(*lead, blocks, 2, HALF, n)
    return (codes[..., 0, :, :] | codes[..., 1, :, :] << 4).reshape(*lead, blocks * HALF, n)


def unpacked_rows(xp: Any, values: Any, k: int) -> Any:
    """The first k codes that `packed_rows` packed, `[..., k, n]`."""
    *lead, rows, n = values.shape
    blocks = values.reshape(*lead, rows // HALF, 1, HALF, n)
    return xp.concatenate([blocks & 15, blocks >> 4], -3).reshape(*lead, 2 * rows, n)[..., :k, :]


def packed_pairs(xp: Any, codes: Any) -> Any:
    """4-bit codes `[..., n, k]`, two neighbours to a byte, the even one in the low half: `[..., n, ceil(k / 2)]`."""
    *lead, n, k = codes.shape
    pairs = swapped(_pad_rows(xp, swapped(codes), k % 2)).reshape(*lead, n, -(-k // 2), 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def unpacked_pairs(xp: Any, values: Any, k: int) -> Any:
    """The first k codes that `packed_pairs` packed, `[..., n, k]`."""
    *lead, n, width = values.shape
    return xp.stack([values & 15, values >> 4], -1).reshape(*lead, n, 2 * width)[..., :k]


# ---- Scales


def e8m0_value(xp: Any, scales: Any) -> Any:
    """`2 ** (byte - 127)` in float32, of which the least is not a normal number; 255 is NaN."""
    byte = cast(scales, "int32")
    special = (byte == 0) | (byte == E8M0_NAN)
    return _as_float32(byte << 23 | cast(special, "int32") << 22)


def _block_scale(xp: Any, largest: Any, top: float) -> Any:
    """The byte of the least power of two with which largest is at most `top`."""
    mantissa, exponent = xp.frexp(largest)
    top_mantissa, top_exponent = frexp(top)
    exponent = xp.where(mantissa > top_mantissa, exponent + 1, exponent) - top_exponent
    # A byte of 0 would be no normal float32, and TPUs have no others.
    biased = xp.clip(xp.where(largest > 0, exponent + E8M0_BIAS, 1), 1, E8M0_NAN - 1)
    return cast(xp.where(xp.isfinite(largest), biased, E8M0_NAN), "uint8")


def _kept_scale(xp: Any, span: Any, rounded_up: bool) -> Any:
    """A float32 scale, one that bfloat16 has where it is rounded up; NaN where the span is not finite."""
    scale = xp.clip(span, SMALLEST_SCALE, None)
    if rounded_up:
        narrow = cast(cast(scale, "bfloat16"), "float32")
        above = cast(cast(scale * (1 + 2.0**-8), "bfloat16"), "float32")
        scale = xp.where(narrow < scale, above, narrow)
    return xp.where(xp.isfinite(span), scale, float("nan"))


def _stored_scale(scales: Any, group_size: int) -> Any:
    return cast(scales, "bfloat16") if group_size else scales


def _kept_finite(xp: Any, scales: Any) -> Any:
    """By what to divide: by 1 where the scale is NaN, since such codes count for nothing."""
    return xp.where(xp.isnan(scales), 1.0, scales)


def _without_nan(xp: Any, codes: Any) -> Any:
    """With 0 for NaN, whose conversion to an integer could be anything."""
    return xp.where(xp.isnan(codes), 0.0, codes)


def _power_of_two(exponent: Any) -> Any:
    """`2 ** exponent` of a normal float32, exactly, which not every framework's pow and ldexp give."""
    return _as_float32(cast(exponent, "int32") + E8M0_BIAS << 23)


# ---- Groups


def group_count(k: int, group_size: int) -> int:
    """How many groups k numbers have, at least one; the last may be short."""
    return max(1, -(-k // group_size)) if group_size else 1


def _grouped(xp: Any, w: Any, group_size: int) -> Any:
    """`[..., k, n]` as `[..., groups, size, n]`, with zeros after the last: they widen no range that holds zero."""
    *lead, k, n = w.shape
    count, size = group_count(k, group_size), max(1, group_size or k)
    return _pad_rows(xp, w, count * size - k).reshape(*lead, count, size, n)


def _ungrouped(groups: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `_grouped`."""
    *lead, count, size, n = groups.shape
    return groups.reshape(*lead, count * size, n)[..., : shape[-2], :]


def spread(xp: Any, scales: Any, group_size: int, k: int) -> Any:
    """What groups have, `[..., groups, n]`, for each of k rows: `[..., k, n]`, or `[..., 1, n]` of one group."""
    if not group_size:
        return scales
    *lead, count, n = scales.shape
    rows = xp.broadcast_to(scales[..., :, None, :], (*lead, count, group_size, n))
    return rows.reshape(*lead, count * group_size, n)[..., :k, :]


def swapped(array: Any) -> Any:
    """The view with its last two axes swapped."""
    return array.swapaxes(-1, -2)


def contiguous(array: Any) -> Any:
    """Row-major, as kernels read fastest."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array)
    return array.contiguous() if hasattr(array, "contiguous") else array  # JAX arrays are


def _pad_rows(xp: Any, array: Any, rows: int) -> Any:
    """With that many rows of zeros below."""
    if not rows:
        return array
    if xp.__name__ == "torch":
        return xp.nn.functional.pad(array, (0, 0, 0, rows))
    return xp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, rows), (0, 0)])


# ---- Frameworks


def cast(array: Any, dtype: str) -> Any:
    """The array in that dtype, in its own framework."""
    if hasattr(array, "astype"):
        return array.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    return array.to(getattr(sys.modules["torch"], dtype))


def bytes_of(codes: Any) -> Any:
    """Codes of float8 as bytes, of any framework or as a plan knows them: not every GPU's compiler has a float8."""
    if isinstance(codes, Array):
        return replace(codes, dtype="uint8")
    return codes.view("uint8" if hasattr(codes, "astype") else sys.modules["torch"].uint8)


def _as_float32(bits: Any) -> Any:
    """The float32 numbers of those int32 bits."""
    if hasattr(bits, "astype"):
        return bits.view(np.float32)
    return bits.view(sys.modules["torch"].float32)
