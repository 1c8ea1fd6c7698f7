"""Small problems of attention, one a feature and a few of several, as a kernel is given them and as an oracle is."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from oracles import seen_by_loop

from crosstile.kernels.attention.spec import INPUTS, AttentionSpec, differentiable
from crosstile.kernels.tiles.expressions import SCORE, Expression, const, plane

Array = np.ndarray


@dataclass
class Problem:
    """What a kernel is given: a spec and arrays by name; and an oracle: the call's options.

    Attributes:
        shape: batch, q_len, kv_len, q_heads, kv_heads, head_dim, v_dim.
    """

    rng: np.random.Generator
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch, q_len, kv_len, q_heads, kv_heads, head_dim, v_dim = self.shape
        shapes = {
            "q": (batch, q_len, q_heads, head_dim),
            "k": (batch, kv_len, kv_heads, head_dim),
            "v": (batch, kv_len, kv_heads, v_dim),
            "dout": (batch, q_len, q_heads, v_dim),
            "dlse": (batch, q_heads, q_len),
        }
        draws = {name: self.rng.standard_normal(shape) for name, shape in shapes.items()}
        self.gradients = draws.pop("dout"), draws.pop("dlse")
        self.arrays = draws | self.arrays

    def spec(self, dtype: str, **more: Any) -> AttentionSpec:
        return AttentionSpec(dtype, self.shape[5], self.shape[6], **{"return_lse": True, **self.options, **more})

    def inputs(self) -> tuple[Array | None, ...]:
        return tuple(self.arrays.get(name) for name in INPUTS)

    def differentiable(self) -> list[str]:
        return [name for name in differentiable(self.spec("float64")) if name in self.arrays]

    def changes_score(self, expression: Expression) -> None:
        """The expression in place of the score that was."""
        self.options["score"] = expression

    def adds_bias(self, shape: tuple[int, ...], hidden: float = 0.0) -> None:
        """A differentiable bias of that shape, a part of it -inf, in the next plane."""
        slot = sum(name.startswith("plane") for name in self.arrays)
        bias = np.where(self.rng.random(shape) < hidden, -np.inf, self.rng.standard_normal(shape))
        self.arrays[f"plane{slot}"] = self.oracle["bias"] = bias
        self.changes_score(("add", self.options.get("score", SCORE), plane(slot)))
        self.options["plane_gradients"] = (slot,)

    def has_mask(self, shape: tuple[int, ...], visible: float) -> None:
        """A boolean mask of that shape, that part of it True."""
        slot = sum(name.startswith("plane") for name in self.arrays)
        self.arrays[f"plane{slot}"] = self.oracle["mask"] = self.rng.random(shape) < visible
        self.options["mask"] = plane(slot)

    def has_segments(self, queries: Any, keys: Any) -> None:
        """Segment ids `[batch, length]`."""
        slot = sum(name.startswith("plane") for name in self.arrays)
        ids = np.array(queries, np.int32), np.array(keys, np.int32)
        self.oracle["segment_ids"] = ids
        self.arrays[f"plane{slot}"], self.arrays[f"plane{slot + 1}"] = ids[0][:, None, :, None], ids[1][:, None, None]
        self.options["mask"] = ("eq", plane(slot), plane(slot + 1))

    def has_window(self, left: int | None, right: int | None) -> None:
        self.options |= {"window_left": left, "window_right": right}
        self.oracle["window"] = left, right

    def is_causal(self) -> None:
        self.options["causal"] = self.oracle["causal"] = True

    def has_lengths(self, queries: list[int] | None, keys: list[int] | None) -> None:
        for name, lengths in (("q_lengths", queries), ("kv_lengths", keys)):
            if lengths is not None:
                self.arrays[name] = self.oracle[name] = np.array(lengths, np.int32)

    def has_sinks(self) -> None:
        self.arrays["sinks"] = self.oracle["sinks"] = self.rng.standard_normal((self.shape[0], self.shape[3]))

    def is_capped(self, softcap: float) -> None:
        self.oracle["softcap"] = softcap
        self.changes_score(("mul", ("tanh", ("mul", SCORE, const(1 / softcap))), const(softcap)))


SHAPE = (2, 6, 9, 4, 2, 5, 5)
MORE_QUERIES = (2, 9, 4, 4, 2, 5, 5)


def _of(*steps: Callable[[Problem], Any], shape: tuple[int, ...] = SHAPE) -> Callable[[np.random.Generator], Problem]:
    def make(rng: np.random.Generator) -> Problem:
        problem = Problem(rng, shape)
        for step in steps:
            step(problem)
        return problem

    return make


FEATURES: dict[str, Callable[[np.random.Generator], Problem]] = {
    "window": _of(lambda p: p.has_window(1, 2)),
    "window to the left": _of(lambda p: p.has_window(2, None), shape=MORE_QUERIES),
    "window of one key": _of(lambda p: p.has_window(0, 0)),
    "window to the right, causal": _of(lambda p: p.has_window(None, 3), Problem.is_causal),
    "lengths": _of(lambda p: p.has_lengths([6, 2], [4, 9])),
    "lengths 0 and 1": _of(lambda p: p.has_lengths([6, 1], [0, 1])),
    "no queries, and lengths past the size": _of(lambda p: p.has_lengths([0, 99], [-3, 99])),
    "query lengths, causal": _of(lambda p: p.has_lengths([3, 6], None), Problem.is_causal),
    "key lengths, causal": _of(lambda p: p.has_lengths(None, [2, 8]), Problem.is_causal),
    "mask": _of(lambda p: p.has_mask((2, 4, 6, 9), 0.2)),
    "mask of keys": _of(lambda p: p.has_mask((2, 1, 1, 9), 0.5)),
    "segments": _of(
        lambda p: p.has_segments([[0, 0, 1, 1, 2, 7], [1] * 6], [[0, 1, 1, 1, 1, 2, 2, 2, 2], [2] * 5 + [1] * 4])
    ),
    "softcap": _of(lambda p: p.is_capped(0.7)),
    "bias": _of(lambda p: p.adds_bias((2, 4, 6, 9), hidden=0.3)),
    "bias of heads and keys": _of(lambda p: p.adds_bias((1, 4, 1, 9))),
    "bias of queries": _of(lambda p: p.adds_bias((2, 1, 6, 1))),
    "bias that hides all": _of(lambda p: p.adds_bias((1, 1, 6, 1), hidden=0.5)),
    "sinks": _of(Problem.has_sinks),
    "sinks on rows without keys": _of(Problem.has_sinks, Problem.is_causal, shape=MORE_QUERIES),
    "softcap, bias, mask": _of(
        lambda p: p.is_capped(0.7),
        lambda p: p.adds_bias((1, 4, 6, 9), hidden=0.2),
        lambda p: p.has_mask((2, 1, 6, 9), 0.6),
    ),
    "lengths, window, sinks": _of(
        lambda p: p.has_lengths([6, 3], [2, 7]), lambda p: p.has_window(1, 1), Problem.has_sinks
    ),
    "bias, lengths, causal": _of(
        lambda p: p.adds_bias((2, 4, 1, 9), hidden=0.2), lambda p: p.has_lengths([5, 6], [9, 3]), Problem.is_causal
    ),
}


def problem_of(*steps: Callable[[Problem], Any], shape: tuple[int, ...]) -> Callable[[], Problem]:
    """What makes a problem of that shape, the same each time, changed by these steps."""

    def make() -> Problem:
        problem = Problem(np.random.default_rng(0), shape)
        for step in steps:
            step(problem)
        return problem

    return make


@dataclass
class PackedProblem(Problem):
    """Packed sequences of these lengths, and a few tokens more that no sequence has."""

    q_lens: tuple[int, ...] = (4, 0, 1, 3, 0)
    kv_lens: tuple[int, ...] = (3, 2, 1, 5, 0)

    def __post_init__(self) -> None:
        self.starts = [np.cumsum((0, *lengths)).astype(np.int32) for lengths in (self.q_lens, self.kv_lens)]
        self.shape = (1, int(self.starts[0][-1]) + 2, int(self.starts[1][-1]) + 3, *self.shape[3:])
        super().__post_init__()
        self.arrays |= {"cu_seqlens_q": self.starts[0], "cu_seqlens_k": self.starts[1]}
        self.options |= {"max_seqlen_q": max(self.q_lens, default=0), "max_seqlen_k": max(self.kv_lens, default=0)}


def _packed(*steps: Callable[[Any], Any]) -> Callable[[np.random.Generator], PackedProblem]:
    def make(rng: np.random.Generator) -> PackedProblem:
        problem = PackedProblem(rng, SHAPE)
        for step in steps:
            step(problem)
        return problem

    return make


PACKED: dict[str, Callable[[np.random.Generator], PackedProblem]] = {
    "packed": _packed(),
    "packed, causal": _packed(Problem.is_causal),
    "packed, window, sinks": _packed(lambda p: p.has_window(1, 1), Problem.has_sinks),
    "packed, bias": _packed(lambda p: p.adds_bias((5, 4, 4, 5), hidden=0.2)),
    "packed, bias of heads and keys": _packed(lambda p: p.adds_bias((1, 4, 1, 5)), Problem.is_causal),
}


def _much_hidden(rng: np.random.Generator) -> tuple[Problem, Problem]:
    """Lengths, causality, and a mask of keys; a bias, and a factor whose slope is NaN for keys that come later."""
    problem = Problem(rng, SHAPE)
    problem.has_lengths([5, 3], [8, 2])
    problem.is_causal()
    shown = seen_by_loop((2, 6, 9), **problem.oracle)
    problem.has_mask((2, 4, 1, 9), 0.6)
    problem.arrays["plane1"] = rng.random((2, 4, 6, 9)) + 0.5
    distance = ("sub", ("add", ("i",), const(4)), ("j",))
    problem.changes_score(("mul", SCORE, ("log", ("mul", plane(1), distance))))
    problem.adds_bias((2, 4, 6, 9))
    problem.options["plane_gradients"] = (1, 2)
    return _spoilt(problem, shown & problem.arrays["plane0"])


def _hidden_by_a_window(rng: np.random.Generator) -> tuple[Problem, Problem]:
    """Masks and a bias alone, which a framework's own op takes too; the first keys are of no window."""
    problem = Problem(rng, (2, 6, 12, 4, 2, 5, 5), {"return_lse": False})
    problem.has_window(2, 1)
    problem.has_lengths(None, [12, 8])
    shown = seen_by_loop((2, 6, 12), **problem.oracle)
    problem.has_mask((2, 4, 6, 12), 0.7)
    problem.adds_bias((2, 4, 6, 12))
    problem.gradients = problem.gradients[0], np.zeros_like(problem.gradients[1])
    return _spoilt(problem, shown & problem.arrays["plane0"])


def _hidden_past_the_sequences(rng: np.random.Generator) -> tuple[Problem, Problem]:
    problem = PackedProblem(rng, SHAPE)
    problem.adds_bias((5, 4, 4, 5))
    problem.has_sinks()
    pairs = zip(problem.q_lens, problem.kv_lens, strict=True)
    shown = np.stack([np.multiply.outer(np.arange(4) < rows, np.arange(5) < columns) for rows, columns in pairs])
    spoilt = _spoilt(problem, np.broadcast_to(shown[:, None], (5, 4, 4, 5)), of_arrays=False)
    dout, dlse = (array.copy() for array in problem.gradients)
    for array, end in (("q", problem.starts[0][-1]), ("k", problem.starts[1][-1]), ("v", problem.starts[1][-1])):
        spoilt[1].arrays[array] = problem.arrays[array].copy()
        spoilt[1].arrays[array][:, end:] = np.nan
    dout[:, problem.starts[0][-1] :], dlse[..., problem.starts[0][-1] :] = np.nan, np.nan
    spoilt[1].gradients = dout, dlse
    return spoilt


def _spoilt(problem: Any, shown: Array, of_arrays: bool = True) -> tuple[Any, Any]:
    """The problem, and again with NaN and infinities where nothing is shown (bool [batch, q_heads, q_len, kv_len])."""
    spoilt = copy(problem)

    def spoil(array: Array, keep: Array) -> Array:
        return np.where(keep, array, problem.rng.choice([np.nan, np.inf, -np.inf], array.shape))

    planes = {name for name, array in problem.arrays.items() if name.startswith("plane") and array.dtype == np.float64}
    spoilt.arrays = problem.arrays | {name: spoil(problem.arrays[name], shown) for name in planes}
    if of_arrays:
        batch, q_heads, _, kv_len = shown.shape
        kv_heads = problem.shape[4]
        queries = shown.any(axis=3).swapaxes(1, 2)[..., None]
        keys = shown.any(axis=2).reshape(batch, kv_heads, q_heads // kv_heads, kv_len).any(axis=2)
        keys = keys.swapaxes(1, 2)[..., None]
        spoilt.arrays |= {name: spoil(problem.arrays[name], queries if name == "q" else keys) for name in "qkv"}
        dout, dlse = problem.gradients
        spoilt.gradients = spoil(dout, queries), spoil(dlse, queries[..., 0].swapaxes(1, 2))
    return problem, spoilt


SPOILT: dict[str, Callable[[np.random.Generator], tuple[Problem, Problem]]] = {
    "much": _much_hidden,
    "by a window": _hidden_by_a_window,
    "past the sequences": _hidden_past_the_sequences,
}

__all__ = ["FEATURES", "MORE_QUERIES", "PACKED", "SHAPE", "SPOILT", "PackedProblem", "Problem"]
