"""Quantised weights and activations in GPU kernels: codes to numbers and back, in registers.

`formats.py` says what the formats are. FORMAT is a name there, and codes are bytes as they lie in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import E8M0_BIAS, E8M0_NAN, FORMATS, HALF, MX_GROUP, SMALLEST_SCALE
from .triton_tiles import advance

ROWS_APART = tl.constexpr(HALF)  # of two codes that share a byte
GROUP = tl.constexpr(MX_GROUP)
BIAS = tl.constexpr(E8M0_BIAS)
NOT_A_NUMBER = tl.constexpr(E8M0_NAN)
LEAST_SCALE = tl.constexpr(SMALLEST_SCALE)
# Bits of a narrow float stand in a wide one for a value that lacks the difference of the exponents' biases.
E4M3_TO_FLOAT16, E4M3_TO_BFLOAT16 = tl.constexpr(2.0**8), tl.constexpr(2.0**120)
E2M1_TO_FLOAT16, E2M1_TO_BFLOAT16 = tl.constexpr(2.0**14), tl.constexpr(2.0**126)


@triton.constexpr_function
def is_packed(name: str) -> bool:
    """Whether a byte holds two codes."""
    return FORMATS[name].packed


@triton.constexpr_function
def has_block_scales(name: str) -> bool:
    """Whether scales are bytes e8m0."""
    return FORMATS[name].block_scales


@triton.constexpr_function
def is_integer(name: str) -> bool:
    """Whether codes are integers."""
    return FORMATS[name].mantissa is None


@triton.constexpr_function
def largest(name: str) -> float:
    """The greatest magnitude of a code."""
    return FORMATS[name].largest


@triton.jit
def as_bytes(pointer):
    """A pointer to codes of any dtype, as bytes: not every GPU knows float8, and none needs to, to read it."""
    return pointer.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def place(step, FORMAT: tl.constexpr, ROWS: tl.constexpr):
    """(row of values, first k) of ROWS rows of codes; the high halves' k is `ROWS_APART` further on."""
    row = step * ROWS
    if is_packed(FORMAT):
        first = row // ROWS_APART * (2 * ROWS_APART) + row % ROWS_APART
    else:
        first = row
    return row, first


@triton.jit
def numbers_of(codes, zeros, FORMAT: tl.constexpr, HIGH: tl.constexpr, HAS_ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """What a tile of bytes stands for before the scale, exactly; HIGH: its high halves. zeros broadcast to it.

    Codes become floats by their bits, two to a register, which conversions would not.
    """
    if FORMAT == "int8":
        codes = codes.to(tl.int8, bitcast=True)
        if HAS_ZEROS:
            codes = codes.to(tl.int16) - zeros.to(tl.int8, bitcast=True).to(tl.int16)
        numbers = codes.to(DTYPE)
    elif FORMAT == "int4":
        numbers = _above_a_power_of_two(_half(codes, HIGH), DTYPE)
        if HAS_ZEROS:
            numbers -= _above_a_power_of_two(zeros, DTYPE)
        else:
            numbers -= _above_a_power_of_two(tl.full([1, 1], 8, tl.uint8), DTYPE)
    elif FORMAT == "mxfp4":
        codes = _half(codes, HIGH).to(tl.uint16)
        if DTYPE == tl.bfloat16:
            bits = ((codes & 8) << 12) | ((codes & 7) << 6)
            numbers = bits.to(tl.bfloat16, bitcast=True) * E2M1_TO_BFLOAT16
        else:
            bits = ((codes & 8) << 12) | ((codes & 7) << 9)
            numbers = (bits.to(tl.float16, bitcast=True) * E2M1_TO_FLOAT16).to(DTYPE)
    else:
        codes = codes.to(tl.uint16)
        is_nan = (codes & 0x7F) == 0x7F
        if DTYPE == tl.bfloat16:
            bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 4)
            bits = tl.where(is_nan, 0x7FC0, bits).to(tl.uint16)
            numbers = bits.to(tl.bfloat16, bitcast=True) * E4M3_TO_BFLOAT16
        else:
            bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
            bits = tl.where(is_nan, 0x7E00, bits).to(tl.uint16)
            numbers = (bits.to(tl.float16, bitcast=True) * E4M3_TO_FLOAT16).to(DTYPE)
    return numbers


@triton.jit
def _above_a_power_of_two(codes, DTYPE: tl.constexpr):
    """Small integers plus 128 (bfloat16) or 1024 (float16), in whose last bits they stand; as they are in float32."""
    if DTYPE == tl.bfloat16:
        numbers = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    elif DTYPE == tl.float16:
        numbers = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    else:
        numbers = codes.to(DTYPE)
    return numbers


@triton.jit
def _half(codes, HIGH: tl.constexpr):
    """The four bits of each byte's half."""
    return codes >> 4 if HIGH else codes & 15


@triton.jit
def scaled(numbers, scales, DTYPE: tl.constexpr):
    """`numbers * scales`, rounded once to DTYPE."""
    if scales.dtype == DTYPE:
        product = numbers * scales
    else:
        product = (numbers.to(tl.float32) * scales.to(tl.float32)).to(DTYPE)
    return product


@triton.jit
def scale_of(stored, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Scales as they are stored, as floats; powers of two as bfloat16 where the weights are, else as float32."""
    if has_block_scales(FORMAT):
        byte = stored.to(tl.int32)
        special = tl.where((byte == 0) | (byte == NOT_A_NUMBER), 1 << 22, 0)
        bits = (byte << 23) | special
        if DTYPE == tl.bfloat16:
            scale = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            scale = bits.to(tl.float32, bitcast=True)
    else:
        scale = stored
    return scale


@triton.jit
def weights_of(
    codes, scales, zeros, first, exists, groups, scales_row, zeros_row,
    FORMAT: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, HIGH: tl.constexpr,
    SCALED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of weights [k, n] whose first row is `first`; scales and zeros point to those of its columns."""
    # Past the end of k there is no group, and nothing of the left operand either.
    group = tl.minimum(first // GROUP_SIZE, groups - 1) if GROUP_SIZE else 0
    zero = 0
    if HAS_ZEROS:
        zero = tl.load(advance(zeros, group, zeros_row), mask=exists, other=0)[None, :]
    weights = numbers_of(codes, zero, FORMAT, HIGH, HAS_ZEROS, DTYPE)
    if SCALED:
        stored = tl.load(advance(scales, group, scales_row), mask=exists, other=0)
        weights = scaled(weights, scale_of(stored, FORMAT, DTYPE)[None, :], DTYPE)
    return weights


# From numbers to codes


@triton.jit
def row_scale(top, FORMAT: tl.constexpr):
    """The scale of numbers of which `top` is the greatest magnitude; NaN where that is not finite."""
    inverse: tl.constexpr = 1.0 / largest(FORMAT)
    scale = tl.maximum(top * inverse, LEAST_SCALE)
    return tl.where(top < float("inf"), scale, float("nan"))


@triton.jit
def block_scale(top, FORMAT: tl.constexpr):
    """The byte of the least power of two with which `top` is in the format's range; 255 where top is not finite."""
    bits = top.to(tl.int32, bitcast=True)
    # 448 is 1.75 * 2 ** 8: a mantissa above that needs one more.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    byte = tl.minimum(tl.maximum(exponent, 1), 254)
    tl.static_assert(FORMAT == "mxfp8")
    return tl.where(top < float("inf"), byte, NOT_A_NUMBER)


@triton.jit
def codes_of(quotients, FORMAT: tl.constexpr):
    """The codes nearest to numbers, of the format's own dtype; where two are equally near, the even one."""
    if FORMAT == "int8":
        # Adding 1.5 * 2 ** 23 leaves no bits for a fraction, rounded to the nearest even as every sum is.
        near = tl.minimum(tl.maximum(quotients, -127.0), 127.0) + 12582912.0
        codes = (near - 12582912.0).to(tl.int8)
    else:
        near = tl.minimum(tl.maximum(quotients, -448.0), 448.0)
        codes = near.to(tl.float8e4nv)
    return codes
