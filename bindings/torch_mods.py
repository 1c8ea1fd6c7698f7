"""Mods that were written for torch: what its functions, and the methods of its tensors, mean for a `mods.Value`.

Nothing here imports torch: a `Value` is asked for a function by its name (`Value.__torch_function__`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log as natural_log
from typing import Any

from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.kernels.tiles.expressions import INDICES, LOGICAL, Expression, const
from crosstile.mods import (
    Mod,
    Value,
    abs,
    apply,
    array,
    exp,
    expression_of,
    log,
    maximum,
    minimum,
    sqrt,
    tanh,
    trace,
    where,
)

WHOLE = 1 << 30  # the block size of a BlockMask of one block


def recorded(mod: Mod, argument: str) -> Expression:
    """A mod's expression. Raises UnsupportedError, naming the argument, where it cannot be recorded."""
    try:
        return trace(mod, "score_mod" if argument == "score_mod" else "mask_mod")
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UnsupportedError(f"{argument}: crosstile cannot record it. {error}") from error


def mask_mod_of(block_mask: Any, q_len: int, kv_len: int) -> Mod | None:
    """The mask_mod of torch's BlockMask; None if it shows everything."""
    if max(block_mask.BLOCK_SIZE) < WHOLE and tuple(block_mask.shape[-2:]) != (q_len, kv_len):
        raise ValueError(
            f"block_mask: it was made for lengths {list(block_mask.shape[-2:])}; they must be those of query and key, "
            f"[{q_len}, {kv_len}]"
        )
    mask_mod: Mod = block_mask.mask_mod
    if recorded(mask_mod, "block_mask") != const(True):
        return mask_mod
    if block_mask.sparsity() > 0:
        raise UnsupportedError("block_mask: crosstile reads its mask_mod, and this one has blocks only")
    return None


# ---- torch's functions by their names


def _kind(expression: Expression) -> str:
    """ "bool", "int" or "float"."""
    op = expression[0]
    if op in LOGICAL:
        return "bool"
    if op in INDICES:
        return "int"
    if op == "const":
        return type(expression[1]).__name__
    if op == "load":
        name = str(expression[1].held.dtype).removeprefix("torch.")
        return name if name == "bool" else "int" if name.startswith(("int", "uint")) else "float"
    if op in ("score", "div", "exp", "log", "sqrt", "tanh"):
        return "float"
    kinds = [_kind(part) for part in (expression[2:] if op == "where" else expression[1:])]
    return "float" if "float" in kinds else "int" if "int" in kinds else "bool"


def _cast(x: Any, *kinds: Any, **options: Any) -> Value:
    """`x.to(...)`: a dtype counts, a device does not. Kernels compute in float32, whatever the float's width."""
    value = Value(expression_of(x))
    for kind in (*kinds, *options.values()):
        name = _kind(kind.expression) if isinstance(kind, Value) else str(kind).removeprefix("torch.")
        have = _kind(value.expression)
        if name == "bool" and have != "bool":
            value = apply("ne", value, 0)
        elif name.startswith(("int", "uint")) and have == "float":
            raise TypeError("a mod cannot round a float to an integer")
        elif name.startswith(("int", "uint", "float", "bfloat")) and have == "bool":
            value = where(value, *((1, 0) if "int" in name else (1.0, 0.0)))
    return value


def _filled(number: int) -> Callable[..., Value]:
    def fill(like: Any, size: Any = (), *, dtype: Any = None, **options: Any) -> Value:
        if size != ():
            raise TypeError("a mod makes single numbers only; the size must be ()")
        return _cast(bool(number) if "bool" in str(dtype) else number, dtype)

    return fill


def _clamp(x: Any, min: Any = None, max: Any = None) -> Value:
    x = x if min is None else maximum(x, min)
    return x if max is None else minimum(x, max)


def _divide(x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "trunc":
        raise TypeError("a mod divides towards minus infinity: rounding_mode='floor'")
    return apply("div" if rounding_mode is None else "floordiv", x, y)


_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "truediv": "div", "floordiv": "floordiv", "mod": "mod",
    "and": "and", "or": "or", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Value]] = {
    **{f"__{name}__": partial(apply, op) for name, op in _BINARY.items()},
    **{f"__r{name}__": (lambda x, y, op=op: apply(op, y, x)) for name, op in _BINARY.items()},
    **{name: partial(apply, op) for name, op in _BINARY.items() if name not in ("and", "or", "truediv")},
    "rsub": lambda x, y: apply("sub", y, x),
    "subtract": partial(apply, "sub"),
    "multiply": partial(apply, "mul"),
    "div": _divide,
    "divide": _divide,
    "true_divide": partial(apply, "div"),
    "floor_divide": partial(apply, "floordiv"),
    "remainder": partial(apply, "mod"),
    "neg": partial(apply, "neg"),
    "pow": lambda x, power: x**power,
    "square": lambda x: x * x,
    "bitwise_and": partial(apply, "and"),
    "bitwise_or": partial(apply, "or"),
    "bitwise_not": partial(apply, "not"),
    "logical_and": partial(apply, "and"),
    "logical_or": partial(apply, "or"),
    "logical_not": partial(apply, "not"),
    "where": where,
    "__getitem__": lambda held, index: array(held)[index],
    "masked_fill": lambda x, mask, value: where(mask, value, x),
    "abs": abs,
    "exp": exp,
    "exp2": lambda x: exp(x * natural_log(2)),
    "log": log,
    "log2": lambda x: log(x) / natural_log(2),
    "sqrt": sqrt,
    "rsqrt": lambda x: 1 / sqrt(x),
    "tanh": tanh,
    "sigmoid": lambda x: 0.5 * tanh(0.5 * x) + 0.5,
    "relu": lambda x: maximum(x, 0),
    "maximum": maximum,
    "minimum": minimum,
    "max": maximum,
    "min": minimum,
    "clamp": _clamp,
    "clip": _clamp,
    "to": _cast,
    "type": _cast,
    "type_as": _cast,
    **{name: (lambda x: _cast(x, "float")) for name in ("float", "double", "half", "bfloat16")},
    "int": lambda x: _cast(x, "int"),
    "long": lambda x: _cast(x, "int"),
    "bool": lambda x: _cast(x, "bool"),
    "new_ones": _filled(1),
    "new_zeros": _filled(0),
    "ones_like": lambda x, **options: _cast(1, options.get("dtype") or x),
    "zeros_like": lambda x, **options: _cast(0, options.get("dtype") or x),
    "full_like": lambda x, number, **options: Value(const(number)),
}
