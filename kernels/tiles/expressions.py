"""Scores and masks as expressions: one tree of tuples that NumPy, Triton and Pallas evaluate alike.

An expression is `(op, *arguments)`. Leaves are `("score",)`, the indices `("b",)`, `("h",)`, `("i",)`, `("j",)`, a
number `("const", 0.5)` and `("plane", 2)`, the third of the arrays that stand beside the scores. Each plane is `[batch,
q_heads, q_len, kv_len]` with 1 for every dimension that it does not vary along. Tuples are hashable, and plain data: an
expression can be a field of a spec, a constant of a kernel, and as text an argument of a torch op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from json import loads
from typing import Any

Expression = tuple[Any, ...]

SCORE: Expression = ("score",)
INDICES = ("b", "h", "i", "j")  # batch item, query head, query, key: from 0 in each sequence
UNARY = ("neg", "abs", "exp", "log", "sqrt", "tanh", "not")
BINARY = ("add", "sub", "mul", "div", "floordiv", "mod", "min", "max", "lt", "le", "gt", "ge", "eq", "ne", "and", "or")
LOGICAL = ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not")
_LEAVES = ("score", *INDICES, "const", "plane")


def const(value: float | int | bool) -> Expression:
    """A number, as one of Python's own."""
    kind = bool if isinstance(value, bool) else int if isinstance(value, int) else float
    return ("const", kind(value))


def plane(slot: int) -> Expression:
    """What the plane of that number holds at (b, h, i, j)."""
    return ("plane", slot)


def children(expression: Expression) -> tuple[Expression, ...]:
    """The operands: none of a leaf."""
    return () if expression[0] in _LEAVES else expression[1:]


def leaves(expression: Expression) -> frozenset[Expression]:
    """Every leaf in it but the numbers."""
    below = children(expression)
    if below:
        return frozenset().union(*map(leaves, below))
    return frozenset() if expression[0] == "const" else frozenset({expression})


def planes(expression: Expression | None) -> tuple[int, ...]:
    """The slots of the planes it reads, in order."""
    found = () if expression is None else leaves(expression)
    return tuple(sorted(leaf[1] for leaf in found if leaf[0] == "plane"))


def replace(expression: Expression, known: Mapping[Expression, Expression]) -> Expression:
    """The expression with leaves, or whole parts, replaced."""
    if expression in known:
        return known[expression]
    below = children(expression)
    return (expression[0], *(replace(part, known) for part in below)) if below else expression


def evaluate(expression: Expression, values: Mapping[Expression, Any], functions: Any) -> Any:
    """Its value, where `values` has the leaves' and `functions` the op's names: see `functions_of`.

    A part that occurs twice is computed once.
    """
    return _value(expression, dict(values), functions)


def _value(part: Expression, known: dict[Expression, Any], functions: Any) -> Any:
    if part[0] == "const":
        return part[1]
    if part not in known:
        known[part] = functions[part[0]](*(_value(operand, known, functions) for operand in part[1:]))
    return known[part]


def functions_of(xp: Any) -> dict[str, Callable[..., Any]]:
    """What each op means for NumPy's or jax.numpy's arrays. Integers divide towards minus infinity."""
    return {
        "neg": lambda x: -x,
        "abs": xp.abs,
        "exp": xp.exp,
        "log": xp.log,
        "sqrt": xp.sqrt,
        "tanh": xp.tanh,
        "not": xp.logical_not,
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
        "div": lambda x, y: x / y,
        "floordiv": lambda x, y: x // y,
        "mod": lambda x, y: x % y,
        "min": xp.minimum,
        "max": xp.maximum,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "and": xp.logical_and,
        "or": xp.logical_or,
        "where": xp.where,
    }


@lru_cache(maxsize=1024)
def derivative(expression: Expression, variable: Expression) -> Expression:
    """The derivative by a leaf, simplified; `("const", 0.0)` where it does not depend on it.

    Where a function has a corner, the mean of its slopes: 0 for abs at 0, 1/2 for the larger of two equals.
    """
    if expression == variable:
        return const(1.0)
    if variable not in leaves(expression):
        return const(0.0)
    op, below = expression[0], children(expression)
    if op == "where":
        return _where(below[0], derivative(below[1], variable), derivative(below[2], variable))
    slopes = _slopes(op, expression, below)
    total = const(0.0)
    for part, slope in zip(below, slopes, strict=True):
        total = _add(total, _mul(slope, derivative(part, variable)))
    return total


def _slopes(op: str, whole: Expression, parts: tuple[Expression, ...]) -> tuple[Expression, ...]:
    """The partial derivatives of one op by its operands."""
    one, minus, half, zero = const(1.0), const(-1.0), const(0.5), const(0.0)
    x, y = parts[0], parts[-1]
    if op in ("min", "max"):
        first, second = (x, y) if op == "max" else (y, x)
        slope = _where(("gt", first, second), one, _where(("eq", first, second), half, zero))
        return slope, ("sub", one, slope)
    simple: dict[str, Callable[[], tuple[Expression, ...]]] = {
        "neg": lambda: (minus,),
        "abs": lambda: (_where(("gt", x, zero), one, _where(("lt", x, zero), minus, zero)),),
        "exp": lambda: (whole,),
        "log": lambda: (("div", one, x),),
        "sqrt": lambda: (("div", half, whole),),
        "tanh": lambda: (("sub", one, ("mul", whole, whole)),),
        "add": lambda: (one, one),
        "sub": lambda: (one, minus),
        "mul": lambda: (y, x),
        "div": lambda: (("div", one, y), ("neg", ("div", whole, y))),
        "mod": lambda: (one, ("neg", ("floordiv", x, y))),
    }
    return simple[op]() if op in simple else (zero,) * len(parts)


def _add(x: Expression, y: Expression) -> Expression:
    if x == const(0.0):
        return y
    return x if y == const(0.0) else ("add", x, y)


def _mul(x: Expression, y: Expression) -> Expression:
    if const(0.0) in (x, y):
        return const(0.0)
    if x == const(1.0):
        return y
    return x if y == const(1.0) else ("mul", x, y)


def _where(condition: Expression, x: Expression, y: Expression) -> Expression:
    return x if x == y else ("where", condition, x, y)


_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "eq": "==", "ne": "!=", "and": "&", "or": "|",
}  # fmt: skip


def show(expression: Expression) -> str:
    """As a person writes it.

    >>> show(("add", ("mul", SCORE, const(2.0)), plane(0)))
    '((score * 2.0) + plane0)'
    """
    op, below = expression[0], children(expression)
    if not below:
        return str(expression[1]) if op == "const" else "".join(map(str, expression))
    if op in _SIGNS:
        return f"({show(below[0])} {_SIGNS[op]} {show(below[1])})"
    return f"{op}({', '.join(map(show, below))})"


def text_of(part: Any) -> str:
    """An expression as JSON, infinities among it, written in steps that torch.compile can trace."""
    if isinstance(part, tuple):
        return "[" + ", ".join([text_of(inner) for inner in part]) + "]"
    if isinstance(part, str):
        return f'"{part}"'
    if isinstance(part, bool):
        return "true" if part else "false"
    return {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(repr(part), repr(part))


def parse(text: str) -> Expression:
    """The inverse of `text_of`."""
    return _as_tuples(loads(text))


def _as_tuples(part: Any) -> Any:
    return tuple(map(_as_tuples, part)) if isinstance(part, list) else part
