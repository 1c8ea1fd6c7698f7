"""Scores and masks written in Python: attention's `score_mod(score, b, h, i, j)` and `mask_mod(b, h, i, j)`.

A mod is called once, with stand-ins for the score, the batch item, the query head, the query and the key (each counted
from 0 in its own sequence), and what it does to them is recorded. Every implementation then computes the same: NumPy,
the GPU kernel and the TPU kernel. A mod uses operators, the functions of this module, and arrays of the call's
framework that are wrapped by `array` and indexed by the stand-ins. Mods written for torch's `flex_attention`, with
torch's functions and tensors indexed by the stand-ins, are recorded as they are.

>>> import numpy as np
>>> import crosstile
>>> from crosstile import mods
>>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
>>> slopes = mods.array(np.array([0.5, 0.25], np.float32))
>>> out = crosstile.attention(q, k, v, score_mod=lambda score, b, h, i, j: score + slopes[h] * (j - i))

After FlexAttention (Dong et al., arXiv:2412.05496), whose mods mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from crosstile.kernels.tiles.expressions import INDICES, LOGICAL, SCORE, Expression, children, const

__all__ = [
    "Value", "abs", "alibi", "all_of", "any_of", "array", "causal", "dilated", "document", "exp", "log", "maximum",
    "minimum", "prefix", "relative", "sliding_window", "sqrt", "tanh", "tanh_softcap", "trace", "where",
]  # fmt: skip

Mod = Callable[..., Any]


class Value:
    """A number that the kernel will have: it records what is done to it. `&`, `|` and `~` stand for and, or and not."""

    if TYPE_CHECKING:  # all operators are set below

        def __add__(self, other: Any) -> Value: ...
        def __mul__(self, other: Any) -> Value: ...
        def __rmul__(self, other: Any) -> Value: ...
        def __truediv__(self, other: Any) -> Value: ...
        def __rtruediv__(self, other: Any) -> Value: ...

    def __init__(self, expression: Expression) -> None:
        self.expression = expression

    def __bool__(self) -> bool:
        raise TypeError(
            "a mod is recorded, not run, so that its values are not known yet: use & | ~ and crosstile.mods.where in "
            "place of and, or, not and if"
        )

    def __repr__(self) -> str:
        return f"Value({self.expression})"

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's functions of a Value record what those of this module do; a tensor indexed by one is a look-up."""
        from crosstile.torch_mods import FUNCTIONS

        name = getattr(function, "__name__", str(function))
        if name not in FUNCTIONS:
            raise TypeError(f"torch.{name}: a mod cannot use it; crosstile.mods has {', '.join(__all__)}")
        return FUNCTIONS[name](*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """torch's functions as the methods of a tensor."""
        from crosstile.torch_mods import FUNCTIONS

        if name.startswith("_") or name not in FUNCTIONS:
            raise AttributeError(f"{name}: what a mod is given has no such attribute; see crosstile.mods")
        return partial(FUNCTIONS[name], self)

    @property
    def device(self) -> None:
        """None, which torch takes for the default; a mod's arrays go where the call's are."""
        return None

    def __pow__(self, power: Any) -> Value:
        if power == 0.5:
            return sqrt(self)
        if not isinstance(power, int) or not 1 <= power <= 8:
            raise TypeError(f"a mod raises to the powers 0.5 and 1 to 8, and this is {power!r}")
        return fold("mul", [self] * power)


def _binary(op: str, swapped: bool = False) -> Callable[[Value, Any], Value]:
    def method(self: Value, other: Any) -> Value:
        return apply(op, other, self) if swapped else apply(op, self, other)

    return method


for _name, _op in {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floordiv", "mod": "mod", "and": "and",
    "or": "or",
}.items():  # fmt: skip
    setattr(Value, f"__{_name}__", _binary(_op))
    setattr(Value, f"__r{_name}__", _binary(_op, swapped=True))
for _op in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_op}__", _binary(_op))
for _name, _op in {"neg": "neg", "abs": "abs", "invert": "not"}.items():
    setattr(Value, f"__{_name}__", lambda self, _op=_op: apply(_op, self))


class Captured:
    """An array that a mod reads: index it by as many stand-ins, or expressions of them, as it has dimensions.

    An index past either end reads the first or the last element, as where a mask hides what it would have been.
    `table[h, i]` may be written `table[h][i]`.
    """

    def __init__(self, held: Any, indices: tuple[Any, ...] = ()) -> None:
        self.held = held
        self.indices = indices

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captured) and self.held is other.held  # so that equal look-ups are one

    def __hash__(self) -> int:
        return id(self.held)

    def __getitem__(self, index: Any) -> Any:
        indices = (*self.indices, *(index if isinstance(index, tuple) else (index,)))
        rank = len(self.held.shape)
        if len(indices) > rank:
            raise ValueError(f"a mod indexes an array of rank {rank} with {len(indices)} indices; it must give {rank}")
        if len(indices) < rank:
            return Captured(self.held, indices)
        return Value(("load", Captured(self.held), *(expression_of(part) for part in indices)))


def array(held: Any) -> Captured:
    """An array for a mod to read: of the call's framework, which differentiates it, or NumPy's, which is constant."""
    return held if isinstance(held, Captured) else Captured(held)


def where(condition: Any, x: Any, y: Any) -> Value:
    """x where the condition holds, else y."""
    return apply("where", condition, x, y)


def minimum(x: Any, y: Any) -> Value:
    """The smaller of two."""
    return apply("min", x, y)


def maximum(x: Any, y: Any) -> Value:
    """The larger of two."""
    return apply("max", x, y)


def abs(x: Any) -> Value:
    """The absolute value."""
    return apply("abs", x)


def exp(x: Any) -> Value:
    """e to the power x."""
    return apply("exp", x)


def log(x: Any) -> Value:
    """The natural logarithm."""
    return apply("log", x)


def sqrt(x: Any) -> Value:
    """The square root."""
    return apply("sqrt", x)


def tanh(x: Any) -> Value:
    """The hyperbolic tangent."""
    return apply("tanh", x)


# ---- Masks and scores to use as they are


def all_of(*masks: Mod) -> Mod:
    """A key is seen where every mask shows it."""
    return lambda b, h, i, j: fold("and", [mask(b, h, i, j) for mask in masks])


def any_of(*masks: Mod) -> Mod:
    """A key is seen where at least one mask shows it."""
    return lambda b, h, i, j: fold("or", [mask(b, h, i, j) for mask in masks])


def causal(offset: int = 0) -> Mod:
    """Query i sees key j where `j <= i + offset`; for the alignment of `causal=True` the offset is kv_len - q_len."""
    return lambda b, h, i, j: j <= i + offset


def sliding_window(left: int, right: int = 0) -> Mod:
    """Query i sees the keys from `i - left` to `i + right`."""
    return lambda b, h, i, j: (j >= i - left) & (j <= i + right)


def dilated(step: int) -> Mod:
    """Query i sees every key whose distance from it is a multiple of the step."""
    return lambda b, h, i, j: (i - j) % step == 0


def prefix(length: int) -> Mod:
    """The prefix LM: all see the first `length` keys, and the keys up to their own."""
    return lambda b, h, i, j: (j < length) | (j <= i)


def document(ids: Any) -> Mod:
    """A query sees the keys of its own document: ids `[tokens]`, or `[batch, tokens]`, an integer for each token."""
    held = array(ids)
    if len(held.held.shape) == 1:
        return lambda b, h, i, j: held[i] == held[j]
    return lambda b, h, i, j: held[b, i] == held[b, j]


def alibi(slopes: Any) -> Mod:
    """Adds `slopes[h] * (j - i)` (Press et al., arXiv:2108.12409); slopes `[q_heads]`."""
    held = array(slopes)
    return lambda score, b, h, i, j: score + held[h] * (j - i)


def relative(table: Any, offset: int) -> Mod:
    """Adds `table[h, j - i + offset]`, a learnt bias of the distance; table `[q_heads, distances]`."""
    held = array(table)
    return lambda score, b, h, i, j: score + held[h, j - i + offset]


def tanh_softcap(cap: float) -> Mod:
    """`cap * tanh(score / cap)`, as Gemma 2 has it (arXiv:2408.00118)."""
    return lambda score, b, h, i, j: cap * tanh(score / cap)


# ---- Recording


def trace(mod: Mod, argument: str) -> Expression:
    """What a mod computes, as an expression with `("load", captured, index, ...)` where it reads an array.

    argument is "score_mod" or "mask_mod". Raises TypeError or ValueError naming it where the mod cannot be recorded.
    """
    indices = [Value((name,)) for name in INDICES]
    result = mod(Value(SCORE), *indices) if argument == "score_mod" else mod(*indices)
    if not isinstance(result, Value | int | float):
        raise TypeError(
            f"{argument}: it returned {type(result).__name__}; it must return what it makes of its arguments by "
            "operators and the functions of crosstile.mods"
        )
    expression = expression_of(result)
    if (expression[0] in LOGICAL or isinstance(expression[-1], bool)) and argument == "score_mod":
        raise TypeError("score_mod: it returned a truth value; it must return a score (masks go to mask_mod)")
    return expression


def loads(expression: Expression) -> list[Expression]:
    """The parts of an expression that read an array, innermost first."""
    found: list[Expression] = []
    below = expression[2:] if expression[0] == "load" else children(expression)
    for part in below:
        found += [load for load in loads(part) if load not in found]
    if expression[0] == "load":
        found.append(expression)
    return found


def fold(op: str, parts: Sequence[Any]) -> Value:
    """The op between all of them."""
    result = parts[0]
    for part in parts[1:]:
        result = apply(op, result, part)
    return result


def apply(op: str, *operands: Any) -> Value:
    """The op of an expression, of stand-ins and numbers."""
    parts = [expression_of(operand) for operand in operands]
    neutral = {"and": const(True), "or": const(False)}.get(op)
    if neutral in parts:
        parts.remove(neutral)
        return Value(parts[0])
    return Value((op, *parts))


def expression_of(operand: Any) -> Expression:
    """What stands for a number, a stand-in or an array of one number."""
    if isinstance(operand, Value):
        return operand.expression
    if isinstance(operand, bool | int | float):
        return const(operand)
    if hasattr(operand, "shape") and not operand.shape:  # an array of one number
        return Captured(operand)[()].expression
    if isinstance(operand, Captured):
        rank = len(operand.held.shape)
        raise TypeError(
            f"a mod indexes an array of rank {rank} with {len(operand.indices)} indices; it must give {rank}"
        )
    raise TypeError(
        f"a mod met {type(operand).__name__}; it takes numbers, its own arguments, and arrays as crosstile.mods.array"
    )
