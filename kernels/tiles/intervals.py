"""Interval arithmetic of expressions: of each value the bounds between which it must lie, over many boxes at once.

Truth is an interval of 0 and 1: certain where both ends agree. Bounds hold whether a kernel computes in float32 or the
definition in float64, so they are widened by what a chip may round; what may be NaN, infinite or overflow is UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .expressions import INDICES, Expression, children

_MAX = {"bool": 1.0, "int": float(2**31 - 1), "float": float(np.finfo(np.float32).max)}
_ARITHMETIC_ERROR, _FUNCTION_ERROR = 2.0**-20, 2.0**-13  # generous: chips round division and exp less well
_OF_INTEGERS = ("neg", "abs", "add", "sub", "mul", "floordiv", "mod", "min", "max")  # that give an integer
_TINY = float(np.finfo(np.float32).tiny)  # a chip may flush what is smaller to 0


class Interval(NamedTuple):
    """A value in each box.

    Attributes:
        lo, hi: float64 [boxes], or one for all; -inf and inf where it is unknown, which NaN is as well.
        kind: "bool", "int" (int32) or "float".
        stuck: where a smaller box would know no more. Too few are slow, and too many lose what could be known.
    """

    lo: Any
    hi: Any
    kind: str
    stuck: Any = False


UNKNOWN = Interval(-np.inf, np.inf, "float", True)
Rule = Callable[..., Interval]


def bounds_of(expression: Expression, values: Mapping[Expression, Interval]) -> Interval:
    """What the expression can be, where `values` has what its leaves can be, or other parts of it."""
    with np.errstate(all="ignore"):
        return _value(expression, {repr(part): value for part, value in values.items()})


def _value(part: Expression, known: dict[str, Interval]) -> Interval:
    """A part that occurs twice is computed once. It is known by its text: 1, 1.0 and True are equal, but not alike."""
    text = repr(part)
    if text not in known:
        known[text] = _of_number(part[1]) if part[0] == "const" else _apply(part, known)
    return known[text]


def _of_number(x: float | int | bool) -> Interval:
    kind = "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "float"
    return bounded(float(x), float(x), kind)


def swept(expression: Expression, indices: Mapping[Expression, int]) -> dict[Expression, Interval]:
    """The remainders in it of which no box tells more than another, for `bounds_of`.

    Where the dividend takes in more than the divisor within any tile, all remainders are possible there. Without this a
    mask of every other key would be looked at tile by tile, to find all of them partial. `indices` has how many values
    an index has in a whole tile.
    """
    found = {}
    for part in children(expression):
        found.update(swept(part, indices))
    if expression[0] == "mod" and _whole(expression) and expression[2][0] == "const":
        dividend, divisor = expression[1:]
        if 2 <= divisor[1] <= _width(dividend, indices):
            found[expression] = Interval(0.0, divisor[1] - 1.0, "int", True)
    return found


def _whole(expression: Expression) -> bool:
    """Whether it is made of indices and integers alone."""
    op, below = expression[0], children(expression)
    if below:
        return op in _OF_INTEGERS and all(map(_whole, below))
    return op in INDICES or (op == "const" and isinstance(expression[1], int))


def _width(expression: Expression, indices: Mapping[Expression, int]) -> int:
    """How many integers its interval holds in a whole tile, or fewer."""
    op, below = expression[0], children(expression)
    if op == "neg":
        return _width(below[0], indices)
    if op in ("add", "sub"):
        return sum(_width(part, indices) for part in below) - 1
    if op == "floordiv" and below[1][0] == "const" and below[1][1] >= 1:
        return max(1, _width(below[0], indices) // below[1][1])
    return indices.get(expression, 1)


def truth(x: Interval) -> Interval:
    """Whether it is not 0."""
    if x.kind == "bool":
        return x
    return Interval(1.0 * ((x.lo > 0) | (x.hi < 0)), 1.0 - ((x.lo == 0) & (x.hi == 0)), "bool", x.stuck)


def bounded(lo: Any, hi: Any, kind: str, error: float = 0.0) -> Interval:
    """The interval, widened to what rounding can make of it, and unknown where it leaves its type's range.

    A bound that float32 has exactly stays where it is, since rounding keeps order, unless the op has an error itself.
    """
    if kind == "float":
        lo, hi = (_rounded(bound, sign, error) for bound, sign in ((lo, -1), (hi, 1)))
    sound = (lo >= -_MAX[kind]) & (hi <= _MAX[kind])  # false of NaN
    return Interval(np.where(sound, lo, -np.inf), np.where(sound, hi, np.inf), kind)


def _rounded(bound: Any, sign: int, error: float) -> Any:
    inexact = (error > 0) | (np.float32(bound) != bound)
    return np.where(inexact, bound + sign * (np.abs(bound) * max(error, _ARITHMETIC_ERROR) + _TINY), bound)


def _apply(whole: Expression, known: dict[str, Interval]) -> Interval:
    """The rule of an op, and whether its result is stuck: if its operands are, or one that decides alone."""
    op, parts = whole[0], [_value(part, known) for part in children(whole)]
    if op not in _RULES:
        return UNKNOWN
    result = _RULES[op](*parts)
    if result is UNKNOWN:
        return result
    stuck = np.True_
    for part in parts:
        stuck = stuck & (part.stuck | (part.lo == part.hi))
    if op not in ("and", "or", "not", "where"):  # in which another operand can decide
        for part in parts:
            stuck = stuck | part.stuck & np.isinf(part.lo)
    return result._replace(stuck=stuck & (result.lo != result.hi))


# ---- Rules


def _common(*parts: Interval) -> tuple[list[Interval], str]:
    """Operands converted to the kind that they have in common; integers past 2**24 round as they become floats."""
    kind = next(kind for kind in ("float", "int", "bool") if any(part.kind == kind for part in parts))
    if kind == "float":
        return [part if part.kind == kind else bounded(part.lo, part.hi, kind) for part in parts], kind
    return list(parts), kind


def _corners(function: Any, x: Interval, y: Interval) -> tuple[Any, Any]:
    """The bounds of a function that rises or falls all along each operand: its extremes lie in the corners."""
    a, b, c, d = (function(end, other) for end in (x.lo, x.hi) for other in (y.lo, y.hi))
    return np.minimum(np.minimum(a, b), np.minimum(c, d)), np.maximum(np.maximum(a, b), np.maximum(c, d))


def _arithmetic(function: Any, error: float = 0.0) -> Rule:
    def rule(x: Interval, y: Interval) -> Interval:
        (x, y), kind = _common(x, y)
        if kind == "bool":  # NumPy and the chips do not agree what it means
            return UNKNOWN
        return bounded(*_corners(function, x, y), kind, error if kind == "float" else 0.0)

    return rule


def _extreme(function: Any) -> Rule:
    def rule(x: Interval, y: Interval) -> Interval:
        (x, y), kind = _common(x, y)
        return bounded(*_corners(function, x, y), kind)

    return rule


def _div(x: Interval, y: Interval) -> Interval:
    (x, y, _), _ = _common(x, y, UNKNOWN)
    return bounded(*_corners(np.divide, x, _not_zero(y)), "float", _ARITHMETIC_ERROR)


def _floordiv(x: Interval, y: Interval) -> Interval:
    if "float" not in (x.kind, y.kind):
        return _arithmetic(lambda a, b: np.floor(a / b))(x, _not_zero(y))
    quotient = _div(x, y)
    return bounded(np.floor(quotient.lo), np.floor(quotient.hi), "float")


def _mod(x: Interval, y: Interval) -> Interval:
    """Of integers: between 0 and the divisor, and as x itself where all of x lies between two multiples."""
    if "float" in (x.kind, y.kind) or x.kind == y.kind == "bool":
        return UNKNOWN
    y = _not_zero(y)
    first, last = _corners(lambda a, b: np.floor(a / b), x, y)
    a, b = first * y.lo, first * y.hi
    lo, hi = np.minimum(y.lo + 1, 0), np.maximum(y.hi - 1, 0)
    lo = np.where(first == last, np.maximum(lo, x.lo - np.maximum(a, b)), lo)
    hi = np.where(first == last, np.minimum(hi, x.hi - np.minimum(a, b)), hi)
    return bounded(lo, hi, "int")


def _not_zero(y: Interval) -> Interval:
    """NaN, which makes a quotient unknown, where it can be 0."""
    zero = (y.lo <= 0) & (y.hi >= 0)
    return y._replace(lo=np.where(zero, np.nan, y.lo), hi=np.where(zero, np.nan, y.hi))


def _neg(x: Interval) -> Interval:
    return UNKNOWN if x.kind == "bool" else bounded(-x.hi, -x.lo, x.kind)


def _abs(x: Interval) -> Interval:
    least = np.maximum(0, np.maximum(x.lo, -x.hi))
    return UNKNOWN if x.kind == "bool" else bounded(least, np.maximum(-x.lo, x.hi), x.kind)


def _rising(function: Any, least: float, greatest: float) -> Rule:
    """A function that rises all along and never leaves its own bounds; it is NaN out of its domain."""

    def rule(x: Interval) -> Interval:
        (x, _), _ = _common(x, UNKNOWN)
        lo, hi = function(x.lo) - _FUNCTION_ERROR, function(x.hi) + _FUNCTION_ERROR
        wide = bounded(lo, hi, "float", _FUNCTION_ERROR)
        known = np.isfinite(x.lo) & np.isfinite(wide.lo)  # tanh bounds even what may be NaN
        lo, hi = np.maximum(wide.lo, least), np.minimum(wide.hi, greatest)
        return Interval(np.where(known, lo, -np.inf), np.where(known, hi, np.inf), "float")

    return rule


def _less(or_equal: bool) -> Rule:
    compare = np.less_equal if or_equal else np.less

    def rule(x: Interval, y: Interval) -> Interval:
        (x, y), _ = _common(x, y)
        return Interval(1.0 * compare(x.hi, y.lo), 1.0 * compare(x.lo, y.hi), "bool")

    return rule


def _swapped(rule: Rule) -> Rule:
    return lambda x, y: rule(y, x)


def _eq(x: Interval, y: Interval) -> Interval:
    (x, y), _ = _common(x, y)
    same = (x.lo == x.hi) & (y.lo == y.hi) & (x.lo == y.lo)
    return Interval(1.0 * same, 1.0 * ((x.lo <= y.hi) & (y.lo <= x.hi)), "bool")


def _not(x: Interval) -> Interval:
    x = truth(x)
    return Interval(1 - x.hi, 1 - x.lo, "bool")


def _logical(function: Any) -> Rule:
    def rule(x: Interval, y: Interval) -> Interval:
        x, y = truth(x), truth(y)
        return Interval(function(x.lo, y.lo), function(x.hi, y.hi), "bool")

    return rule


def _where(condition: Interval, x: Interval, y: Interval) -> Interval:
    condition, ((x, y), kind) = truth(condition), _common(x, y)
    lo, hi = (
        np.where(condition.lo > 0, first, np.where(condition.hi > 0, either(first, second), second))
        for either, first, second in ((np.minimum, x.lo, y.lo), (np.maximum, x.hi, y.hi))
    )
    return Interval(lo, hi, kind)


_RULES: dict[str, Rule] = {
    "neg": _neg,
    "abs": _abs,
    "exp": _rising(np.exp, 0.0, np.inf),
    "log": _rising(np.log, -np.inf, np.inf),
    "sqrt": _rising(np.sqrt, 0.0, np.inf),
    "tanh": _rising(np.tanh, -1.0, 1.0),
    "not": _not,
    "add": _arithmetic(np.add),
    "sub": _arithmetic(np.subtract),
    "mul": _arithmetic(np.multiply),
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "min": _extreme(np.minimum),
    "max": _extreme(np.maximum),
    "lt": _less(or_equal=False),
    "le": _less(or_equal=True),
    "gt": _swapped(_less(or_equal=False)),
    "ge": _swapped(_less(or_equal=True)),
    "eq": _eq,
    "ne": lambda x, y: _not(_eq(x, y)),
    "and": _logical(np.minimum),
    "or": _logical(np.maximum),
    "where": _where,
}
