"""Expressions of scores and masks (`expressions.py`) inside GPU kernels.

A kernel has the expression as a constant, and unfolds it while it is compiled: each op becomes one instruction on a
tile. Values keep the shape along which they vary, `[rows, 1]`, `[1, columns]` or a scalar, until they meet another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expressions import SCORE, Expression, children, leaves, planes
from .triton_tiles import advance


def constant(expression: Expression | None) -> Expression | None:
    """The expression as a kernel's constant: its numbers say their type, for 1, 1.0 and True are one key of a cache."""
    if expression is None:
        return None
    if expression[0] == "const":
        return type(expression[1]).__name__, expression[1]
    below = children(expression)
    return (expression[0], *map(constant, below)) if below else expression


def score_constant(expression: Expression | None) -> Expression | None:
    """`constant`, as a tile of float32 even if it does not depend on the score."""
    if expression is None or SCORE in leaves(expression):
        return constant(expression)
    return ("add", ("zeros",), constant(expression))


def slots(*expressions: Expression | None) -> tuple[int, ...]:
    """The planes that any of the expressions reads."""
    return tuple(sorted({slot for expression in expressions for slot in planes(expression)}))


@triton.constexpr_function
def among(slot, slots):
    """Whether the plane is one that the kernel reads."""
    return slot in slots


# Planes: arrays [batch, head, row, column] beside the scores, with the stride None along which they do not vary


@triton.jit
def _plane_tile(
    pointer, strides, place, q_len, kv_len,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, CHECK: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    item, head, first_row, first_column = place
    if strides[0] is not None:
        pointer = advance(pointer, item, strides[0])
    if strides[1] is not None:
        pointer = advance(pointer, head, strides[1])
    if strides[2] is None and strides[3] is None:
        tile = tl.load(pointer)
    else:
        rows = tl.expand_dims(tl.arange(0, BLOCK_Q), 0 if TRANSPOSED else 1)
        columns = tl.expand_dims(tl.arange(0, BLOCK_KV), 1 if TRANSPOSED else 0)
        mask = tl.full((), True, tl.int1)
        if strides[2] is not None and (CHECK or not TRANSPOSED):
            mask = mask & (first_row + rows >= 0) & (first_row + rows < q_len)
        if strides[3] is not None and (CHECK or TRANSPOSED):
            mask = mask & (first_column + columns < kv_len)
        if WIDE:
            rows = rows.to(tl.int64)
            columns = columns.to(tl.int64)
        if strides[2] is None:
            pointers = advance(pointer, first_column, strides[3]) + columns * strides[3]
        elif strides[3] is None:
            pointers = advance(pointer, first_row, strides[2]) + rows * strides[2]
        else:
            pointer = advance(advance(pointer, first_row, strides[2]), first_column, strides[3])
            pointers = pointer + (rows * strides[2] + columns * strides[3])
        tile = tl.load(pointers, mask=tl.broadcast_to(mask, pointers.shape), other=0)
    if tile.dtype.is_floating():
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_planes(
    pointers, strides, place, q_len, kv_len, SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, CHECK: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the planes in SLOTS hold for a tile of scores whose first is at `place`, (item, head, row, column).

    What lies outside reads as 0. Without CHECK the columns, or the rows if TRANSPOSED, are known to exist: a mask along
    the dimension in which memory is contiguous would split a load into single elements.
    """
    return (
        _plane_tile(pointers[0], strides[0], place, q_len, kv_len, BLOCK_Q, BLOCK_KV, CHECK, TRANSPOSED, WIDE)
        if among(0, SLOTS)
        else None,
        _plane_tile(pointers[1], strides[1], place, q_len, kv_len, BLOCK_Q, BLOCK_KV, CHECK, TRANSPOSED, WIDE)
        if among(1, SLOTS)
        else None,
        _plane_tile(pointers[2], strides[2], place, q_len, kv_len, BLOCK_Q, BLOCK_KV, CHECK, TRANSPOSED, WIDE)
        if among(2, SLOTS)
        else None,
        _plane_tile(pointers[3], strides[3], place, q_len, kv_len, BLOCK_Q, BLOCK_KV, CHECK, TRANSPOSED, WIDE)
        if among(3, SLOTS)
        else None,
        _plane_tile(pointers[4], strides[4], place, q_len, kv_len, BLOCK_Q, BLOCK_KV, CHECK, TRANSPOSED, WIDE)
        if among(4, SLOTS)
        else None,
        _plane_tile(pointers[5], strides[5], place, q_len, kv_len, BLOCK_Q, BLOCK_KV, CHECK, TRANSPOSED, WIDE)
        if among(5, SLOTS)
        else None,
    )


@triton.jit
def indices(place, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(b, h, i, j) of a tile of scores, [BLOCK_Q, BLOCK_KV] unless TRANSPOSED."""
    item, head, first_row, first_column = place
    rows = tl.expand_dims(first_row + tl.arange(0, BLOCK_Q), 0 if TRANSPOSED else 1)
    columns = tl.expand_dims(first_column + tl.arange(0, BLOCK_KV), 1 if TRANSPOSED else 0)
    return item, head, rows, columns


# Values


@triton.jit
def evaluate(EXPRESSION: tl.constexpr, score, at, planes):
    """The expression of the scaled `score`, the indices `at`, and what `load_planes` returned."""
    OP: tl.constexpr = EXPRESSION[0]
    if OP == "score":
        value = score
    elif OP == "zeros":
        value = tl.zeros_like(score)
    elif OP == "b":
        value = at[0]
    elif OP == "h":
        value = at[1]
    elif OP == "i":
        value = at[2]
    elif OP == "j":
        value = at[3]
    elif OP == "plane":
        value = planes[EXPRESSION[1]]
    elif OP == "float":
        value = tl.full((), EXPRESSION[1], tl.float32)
    elif OP == "int":
        value = tl.full((), EXPRESSION[1], tl.int32)
    elif OP == "bool":
        value = tl.full((), EXPRESSION[1], tl.int1)
    elif OP == "where":
        condition = truth(evaluate(EXPRESSION[1], score, at, planes))
        value = tl.where(
            condition, evaluate(EXPRESSION[2], score, at, planes), evaluate(EXPRESSION[3], score, at, planes)
        )
    else:
        x = evaluate(EXPRESSION[1], score, at, planes)
        if len(EXPRESSION) == 2:
            value = _unary(OP, x)
        else:
            value = _binary(OP, x, evaluate(EXPRESSION[2], score, at, planes))
    return value


@triton.jit
def truth(x):
    """Whether it is not 0."""
    if x.dtype == tl.int1:
        return x
    else:
        return x != 0


@triton.jit
def _number(x):
    """Arithmetic takes a truth value as 0 or 1."""
    if x.dtype == tl.int1:
        return x.to(tl.int32)
    else:
        return x


@triton.jit
def _unary(OP: tl.constexpr, x):
    if OP == "not":
        value = truth(x) == 0
    elif OP == "neg":
        value = -_number(x)
    elif OP == "abs":
        value = tl.abs(_number(x))
    elif OP == "exp":
        value = tl.exp(_number(x).to(tl.float32))
    elif OP == "log":
        value = tl.log(_number(x).to(tl.float32))
    elif OP == "sqrt":
        value = tl.sqrt(_number(x).to(tl.float32))
    else:
        tl.static_assert(OP == "tanh")
        value = tanh(_number(x).to(tl.float32))
    return value


@triton.jit
def _binary(OP: tl.constexpr, x, y):
    if OP == "and":
        value = truth(x) & truth(y)
    elif OP == "or":
        value = truth(x) | truth(y)
    else:
        x = _number(x)
        y = _number(y)
        if OP == "add":
            value = x + y
        elif OP == "sub":
            value = x - y
        elif OP == "mul":
            value = x * y
        elif OP == "div":
            value = x.to(tl.float32) / y.to(tl.float32)
        elif OP == "floordiv":
            value = _floor_divide(x, y)
        elif OP == "mod":
            value = _modulo(x, y)
        elif OP == "min":
            value = tl.minimum(x, y)
        elif OP == "max":
            value = tl.maximum(x, y)
        elif OP == "lt":
            value = x < y
        elif OP == "le":
            value = x <= y
        elif OP == "gt":
            value = x > y
        elif OP == "ge":
            value = x >= y
        elif OP == "eq":
            value = x == y
        else:
            tl.static_assert(OP == "ne")
            value = x != y
    return value


@triton.jit
def _floor_divide(x, y):
    """Towards minus infinity; Triton's own division of integers goes towards 0."""
    if x.dtype.is_int() and y.dtype.is_int():
        quotient = x // y
        remainder = x - quotient * y
        value = quotient - ((remainder != 0) & ((remainder ^ y) < 0)).to(tl.int32)
    else:
        value = tl.floor(tl.div_rn(x.to(tl.float32), y.to(tl.float32)))
    return value


@triton.jit
def _modulo(x, y):
    """With the sign of y."""
    if x.dtype.is_int() and y.dtype.is_int():
        remainder = x - x // y * y
        value = remainder + tl.where((remainder != 0) & ((remainder ^ y) < 0), y, 0)
    else:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        value = x - tl.floor(tl.div_rn(x, y)) * y
    return value


@triton.jit
def tanh(x):
    """In float32, within a few ulps: a polynomial near 0, where the other form cancels (Cephes, tanhf)."""
    square = x * x
    series = -5.70498872745e-3
    series = series * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, series * square * x + x, tl.where(x < 0.0, -far, far))
