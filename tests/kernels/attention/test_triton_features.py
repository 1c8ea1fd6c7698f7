"""What a call of the Triton attention kernels may add, interpreted in float32 against the definition in float64.

Tolerance: an error at most twice that of the definition itself computed in float32, plus a floor of a few ulps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import one_in

from crosstile.bench.gpu import compile_plan, specialise
from crosstile.kernels.attention import reference
from crosstile.kernels.attention import triton as kernels
from crosstile.kernels.attention.spec import INPUTS, AttentionInputs, AttentionSpec
from crosstile.kernels.attention.tiles import AttentionTiles, choose_config
from crosstile.kernels.attention.triton_common import programs
from crosstile.kernels.attention.triton_programs import find_sequence, tile_head_batch, tile_head_batch_of_axes
from crosstile.kernels.tiles.expressions import SCORE, Expression, const, functions_of, plane
from crosstile.kernels.tiles.expressions import evaluate as evaluate_in_numpy
from crosstile.kernels.tiles.launch import Array, Launch, Plan, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, get_target
from crosstile.kernels.tiles.triton_expressions import constant, evaluate, tanh
from crosstile.kernels.tiles.triton_interpreter import run

ULP = 2.0**-23
FLOOR = 8  # ulps
B, H, I, J = (("b",), ("h",), ("i",), ("j",))  # noqa: E741


def add(x: Expression, y: Expression) -> Expression:
    return ("add", x, y)


def mul(x: Expression, y: Expression) -> Expression:
    return ("mul", x, y)


SOFTCAP = mul(("tanh", mul(SCORE, const(0.4))), const(2.5))
ALIBI = add(SCORE, mul(plane(0), ("sub", J, I)))
DRAW = np.random.default_rng(7)


@dataclass(frozen=True)
class Case:
    """Options of the call, and arrays beside q, k and v: an array, or a shape to fill with normal numbers."""

    options: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    q_len: int = 37
    kv_len: int = 53
    batch: int = 2
    heads: tuple[int, int] = (1, 2)  # of keys, and queries to each
    dims: tuple[int, int] = (16, 16)

    def spec(self, dtype: str = "float32") -> AttentionSpec:
        return AttentionSpec(dtype, *self.dims, **self.options)

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(seed).standard_normal
        kv_heads, group = self.heads
        arrays = {
            "q": draw((self.batch, self.q_len, kv_heads * group, self.dims[0])),
            "k": draw((self.batch, self.kv_len, kv_heads, self.dims[0])),
            "v": draw((self.batch, self.kv_len, kv_heads, self.dims[1])),
            **{name: draw(array) if isinstance(array, tuple) else array for name, array in self.arrays.items()},
        }
        return {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def some(*shape: int, share: float = 0.6) -> np.ndarray:
    return DRAW.random(shape) < share


def sorted_ids(*shape: int) -> np.ndarray:
    return np.sort(DRAW.integers(0, 4, shape), axis=None).reshape(shape).astype(np.int32)


PACKED = {"cu_seqlens_q": ints(0, 18, 18, 50, 70), "cu_seqlens_k": ints(0, 50, 51, 51, 100)}
WINDOWS = {
    "window": Case({"window_left": 11, "window_right": 6}),
    "causal window": Case({"causal": True, "window_left": 9}),
    "causal window, whole tiles": Case(
        {"causal": True, "window_left": 70}, q_len=130, kv_len=150, batch=1, heads=(1, 1)
    ),
    "wide window": Case({"window_left": 60, "window_right": 50}, q_len=130, kv_len=150, batch=1, heads=(1, 1)),
    "left only": Case({"window_left": 20}, q_len=100, kv_len=70, batch=1),
    "right only": Case({"window_right": 20}, q_len=100, kv_len=70, batch=1),
    "the diagonal": Case({"window_left": 0, "window_right": 0}, q_len=70, kv_len=40, batch=1),
    "more queries than keys": Case({"window_left": 3, "window_right": 5}, q_len=100, kv_len=33, batch=1),
}
LENGTHS = {
    "both": Case({}, {"q_lengths": ints(37, 12, 0), "kv_lengths": ints(26, 53, 1)}, batch=3),
    "of queries, causal": Case({"causal": True}, {"q_lengths": ints(37, 12, 99)}, batch=3),
    "of keys, window": Case({"causal": True, "window_left": 7}, {"kv_lengths": ints(50, 3, -1)}, batch=3),
    "both, window": Case(
        {"window_left": 10, "window_right": 5}, {"q_lengths": ints(69, 12), "kv_lengths": ints(26, 70)}, 70, 80
    ),
    "packed": Case({}, PACKED, 75, 103, 1),
    "packed, causal, sinks": Case({"causal": True}, {**PACKED, "sinks": (1, 2)}, 75, 103, 1),
    "packed, window": Case({"window_left": 9, "window_right": 2}, PACKED, 75, 103, 1),
}
SCORES = {
    "sinks": Case({}, {"sinks": (2, 2)}),
    "sinks, rows without a key": Case({"causal": True}, {"sinks": (2, 2)}, q_len=60, kv_len=30),
    "sinks, lengths": Case({}, {"sinks": (2, 2), "q_lengths": ints(20, 0), "kv_lengths": ints(30, 50)}),
    "softcap": Case({"score": SOFTCAP}),
    "softcap, negative scale": Case({"score": SOFTCAP, "scale": -0.5}),
    "bias": Case({"score": add(SCORE, plane(0)), "plane_gradients": (0,)}, {"plane0": (2, 2, 37, 53)}),
    "bias of the batch": Case({"score": add(SCORE, plane(0)), "plane_gradients": (0,)}, {"plane0": (1, 2, 37, 53)}),
    "bias of keys": Case(
        {"score": add(SCORE, plane(0)), "plane_gradients": (0,), "causal": True}, {"plane0": (2, 1, 1, 53)}
    ),
    "bias of queries": Case({"score": mul(SCORE, plane(0)), "plane_gradients": (0,)}, {"plane0": (1, 1, 37, 1)}),
    "bias of -inf": Case(
        {"score": add(SCORE, plane(0)), "plane_gradients": (0,)},
        {"plane0": np.where(some(2, 1, 37, 53), DRAW.standard_normal((2, 1, 37, 53)), -np.inf)},
    ),
    "slopes": Case({"score": ALIBI, "plane_gradients": (0,), "causal": True}, {"plane0": (1, 2, 1, 1)}),
    "one temperature": Case({"score": mul(SCORE, plane(0)), "plane_gradients": (0,)}, {"plane0": (1, 1, 1, 1)}),
    "two planes": Case(
        {"score": add(mul(SCORE, plane(1)), mul(plane(0), plane(1))), "plane_gradients": (0, 1)},
        {"plane0": (2, 1, 37, 53), "plane1": (1, 2, 1, 53)},
    ),
    "not of the score": Case({"score": plane(0), "plane_gradients": (0,)}, {"plane0": (1, 1, 37, 53)}),
    "mask": Case({"mask": plane(0)}, {"plane0": some(2, 1, 37, 53)}),
    "mask, rows without a key, sinks": Case(
        {"mask": plane(0)}, {"plane0": some(1, 2, 37, 53) & (np.arange(37) > 3)[:, None], "sinks": (2, 2)}
    ),
    "segment ids": Case(
        {"mask": ("eq", plane(0), plane(1))}, {"plane0": sorted_ids(2, 1, 37, 1), "plane1": sorted_ids(2, 1, 1, 53)}
    ),
    "indices": Case(
        {
            "score": add(SCORE, mul(("floordiv", ("sub", I, J), const(3)), const(0.1))),
            "mask": ("ne", ("mod", add(("sub", I, J), H), const(3)), B),
        }
    ),
    "packed, planes": Case(
        {
            "causal": True,
            "score": add(SCORE, plane(0)),
            "mask": ("eq", ("mod", add(I, B), const(2)), ("mod", J, const(2))),
            "plane_gradients": (0,),
        },
        {**PACKED, "plane0": (4, 2, 32, 50)},
        75,
        103,
        1,
    ),
    "packed, shared plane": Case(
        {"score": ALIBI, "plane_gradients": (0,)}, {**PACKED, "plane0": (1, 2, 1, 50)}, 75, 103, 1
    ),
    "all at once": Case(
        {
            "score": add(SOFTCAP, plane(0)),
            "mask": plane(1),
            "plane_gradients": (0,),
            "causal": True,
            "window_left": 30,
        },
        {
            "plane0": (1, 2, 37, 53),
            "plane1": some(2, 1, 37, 53),
            "sinks": (2, 2),
            "q_lengths": ints(20, 37),
            "kv_lengths": ints(50, 33),
        },
    ),
}
CASES = {
    f"{kind}: {name}": case
    for kind, cases in (("window", WINDOWS), ("lengths", LENGTHS), ("score", SCORES))
    for name, case in cases.items()
}


def describe(array: np.ndarray | None) -> Array | None:
    if array is None:
        return None
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def gradients_for(case: Case, seed: int = 1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    q_heads = case.heads[0] * case.heads[1]
    shapes = {"dout": (case.batch, case.q_len, q_heads, case.dims[1]), "dlse": (case.batch, q_heads, case.q_len)}
    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


def by_kernels(case: Case, arrays: dict, outer: dict) -> dict[str, np.ndarray]:
    spec, config = case.spec(), choose_config(case.spec(), INTERPRET)
    inputs = tuple(describe(arrays.get(name)) for name in INPUTS)
    out, lse = run(kernels.forward(spec, config, *inputs), arrays)
    plan = kernels.backward(spec, config, inputs, (describe(out), describe(lse)), tuple(map(describe, outer.values())))
    found = run(plan, {**arrays, "out": out, "lse": lse, **outer})
    return {"out": out, "lse": lse, **dict(zip(plan.outputs, found, strict=True))}


def by_definition(case: Case, arrays: dict, outer: dict, dtype: str) -> dict[str, np.ndarray]:
    spec = case.spec(dtype)
    wide = {name: a.astype(dtype) if a.dtype == np.float32 else a for name, a in {**arrays, **outer}.items()}
    inputs = tuple(wide.get(name) for name in INPUTS)
    with np.errstate(all="ignore"):
        outputs = reference.forward(spec, *inputs)
        gradients = reference.backward(spec, inputs, outputs, (wide["dout"], wide["dlse"]))
    named = {f"d{name}": array for name, array in zip(INPUTS, gradients, strict=True) if array is not None}
    return {"out": outputs[0], "lse": outputs[1], **named}


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Of the largest entry; infinite where the infinities differ."""
    if found.shape != exact.shape or not np.array_equal(np.isinf(found), np.isinf(exact)) or np.isnan(found).any():
        return np.inf
    finite = np.where(np.isinf(exact), 0, exact)
    difference = np.abs(np.where(np.isinf(exact), 0, found) - finite).max(initial=0)
    return float(difference / (np.abs(finite).max(initial=0) or 1))


def check(case: Case) -> None:
    arrays, outer = case.inputs(), gradients_for(case)
    found, exact = by_kernels(case, arrays, outer), by_definition(case, arrays, outer, "float64")
    peer = by_definition(case, arrays, outer, "float32")
    assert found.keys() == exact.keys()
    for name, array in found.items():
        assert array.dtype == (arrays[name[1:]].dtype if name[1:] in arrays else np.float32)
        allowed = 2 * error(peer[name], exact[name]) + FLOOR * ULP
        assert error(array, exact[name]) <= allowed, f"{name}: {error(array, exact[name])}, allowed {allowed}"


@pytest.mark.parametrize("name", one_in(2, CASES))
def test_agrees_with_the_definition(name):
    check(CASES[name])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(20, 70), st.integers(20, 70), st.sampled_from([None, 5, 40]), st.sampled_from([None, 5, 40]))
def test_any_window(q_len, kv_len, left, right):
    check(Case({"window_left": left, "window_right": right}, q_len=q_len, kv_len=kv_len, batch=1, heads=(1, 1)))


def equal(found: dict, expected: dict) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# What is not seen reaches nothing, not even as NaN


def test_nan_past_the_lengths():
    case = Case({"score": SOFTCAP}, {"q_lengths": ints(30, 5), "kv_lengths": ints(20, 40)})
    arrays, outer = case.inputs(), gradients_for(case)
    bad = {name: array.copy() for name, array in {**arrays, **outer}.items()}
    for item in range(2):
        for name, lengths in (("q", "q_lengths"), ("dout", "q_lengths"), ("k", "kv_lengths"), ("v", "kv_lengths")):
            bad[name][item, arrays[lengths][item] :] = np.nan
    found = by_kernels(case, {name: bad[name] for name in arrays}, {name: bad[name] for name in outer})
    equal(found, by_kernels(case, arrays, outer))


@pytest.mark.parametrize("hide", ["causal", "mask"])
def test_nan_in_planes_where_nothing_is_seen(hide):
    seen = np.tril(np.ones((37, 53), bool), 16) if hide == "causal" else some(37, 53)
    options = {"score": add(mul(SCORE, plane(0)), plane(0)), "plane_gradients": (0,)}
    options |= {"causal": True} if hide == "causal" else {"mask": plane(1)}
    case = Case(options, {"plane0": (2, 2, 37, 53), **({} if hide == "causal" else {"plane1": seen[None, None]})})
    arrays, outer = case.inputs(), gradients_for(case)
    bad = {**arrays, "plane0": np.where(seen, arrays["plane0"], np.float32(np.nan))}
    equal(by_kernels(case, bad, outer), by_kernels(case, arrays, outer))


def test_tiles_outside_a_window_are_not_read():
    case = Case({"window_left": 10, "window_right": 10}, q_len=160, kv_len=160, batch=1)
    arrays, spec = case.inputs(), case.spec()
    poisoned = {name: array.copy() for name, array in arrays.items()}
    for name in ("k", "v"):
        poisoned[name][:, :32] = poisoned[name][:, 128:] = np.nan
    plan = kernels.forward(spec, choose_config(spec, INTERPRET), *(describe(arrays.get(name)) for name in INPUTS))
    clean, found = run(plan, arrays)[0], run(plan, poisoned)[0]
    np.testing.assert_array_equal(found[:, 64:96], clean[:, 64:96])  # one tile, which sees keys 54 to 105
    assert np.isnan(found[:, 128:]).all()


def test_planes_of_any_strides():
    case = SCORES["bias of the batch"]
    arrays, outer = case.inputs(), gradients_for(case)
    for view in (
        np.asfortranarray(arrays["plane0"]),
        np.ascontiguousarray(arrays["plane0"][:, ::-1, ::-1, ::-1])[:, ::-1, ::-1, ::-1],
    ):
        equal(by_kernels(case, {**arrays, "plane0": view}, outer), by_kernels(case, arrays, outer))


def test_an_expanded_plane_reads_as_the_narrow_one():
    narrow = Case({"score": ALIBI}, {"plane0": (1, 2, 1, 1)})
    arrays, outer = narrow.inputs(), gradients_for(narrow)
    expanded = {**arrays, "plane0": np.broadcast_to(arrays["plane0"], (2, 2, 37, 53))}
    equal(by_kernels(narrow, expanded, outer), by_kernels(narrow, arrays, outer))


@pytest.mark.parametrize("name", ["score: all at once", "lengths: packed"])
def test_two_runs_are_bit_equal(name):
    case = CASES[name]
    arrays, outer = case.inputs(), gradients_for(case)
    equal(by_kernels(case, arrays, outer), by_kernels(case, arrays, outer))


@pytest.mark.parametrize("sizes", [{"q_len": 0}, {"kv_len": 0}, {"batch": 0}], ids=str)
def test_empty_arrays(sizes):
    case = Case({"score": ALIBI, "plane_gradients": (0,), "causal": True}, {"plane0": (1, 2, 1, 1)}, **sizes)
    case.arrays["sinks"] = (case.batch, 2)
    check(case)


# Expressions


@triton.jit
def _evaluate_kernel(score, p0, p1, out, EXPRESSION: tl.constexpr):
    rows = tl.arange(0, 16)[:, None]
    columns = tl.arange(0, 16)[None, :]
    planes = (tl.load(p0 + rows), tl.load(p1 + columns), None, None, None, None)
    at = (2, 3, rows, columns)
    value = evaluate(EXPRESSION, tl.load(score + rows * 16 + columns), at, planes)
    tl.store(out + rows * 16 + columns, tl.zeros([16, 16], tl.float32) + value.to(tl.float32))


EXPRESSIONS = [
    *[(op, plane(0), plane(1)) for op in ("add", "sub", "mul", "min", "max", "lt", "le", "gt", "ge", "eq", "ne")],
    *[(op, plane(0), plane(1)) for op in ("floordiv", "mod", "div", "and", "or")],
    *[(op, plane(0), const(-3)) for op in ("floordiv", "mod")],
    *[(op, SCORE, const(-0.75)) for op in ("floordiv", "mod", "min", "max", "div")],
    *[(op, const(7), plane(1)) for op in ("floordiv", "mod", "sub")],
    *[(op, SCORE) for op in ("neg", "abs", "exp", "tanh", "not")],
    *[(op, ("abs", plane(0))) for op in ("sqrt", "log", "exp")],
    ("where", ("lt", I, J), SCORE, const(2)),
    ("where", ("not", ("eq", plane(0), plane(1))), ("neg", plane(0)), const(0.5)),
    mul(("lt", I, J), const(2.5)),
    ("exp", const(1)),
    ("and", const(True), ("lt", B, H)),
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda expression: str(expression)[:70])
def test_expressions_as_numpy_has_them(expression):
    score = DRAW.standard_normal((16, 16)).astype(np.float32)
    p0, p1 = DRAW.integers(-9, 9, 16).astype(np.int32), DRAW.integers(1, 9, 16).astype(np.int32)
    p1[::2] *= -1
    grid = np.arange(16, dtype=np.int32)
    values = {SCORE: score, plane(0): p0[:, None], plane(1): p1[None], I: grid[:, None], J: grid[None], B: 2, H: 3}
    with np.errstate(all="ignore"):
        expected = np.broadcast_to(evaluate_in_numpy(expression, values, functions_of(np)), (16, 16))
    shapes = {"score": (16, 16), "p0": (16,), "p1": (16,), "out": (16, 16)}
    launch = Launch(_evaluate_kernel, (1,), ("score", "p0", "p1"), ("out",), {}, {"EXPRESSION": constant(expression)})
    kinds = {name: "int32" if name[0] == "p" else "float32" for name in shapes}
    described = {name: contiguous(shape, kinds[name]) for name, shape in shapes.items()}
    out = described.pop("out")
    (found,) = run(Plan((launch,), described, {"out": out}), {"score": score, "p0": p0, "p1": p1})
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=4 * ULP, atol=0)


@triton.jit
def _tanh_kernel(x, out):
    at = tl.arange(0, 4096)
    tl.store(out + at, tanh(tl.load(x + at)))


def test_tanh():
    x = np.concatenate([np.logspace(-30, 2, 2044), np.linspace(0.6, 0.65, 2048), [0, np.inf, -np.inf, -0.3]])
    x = x.astype(np.float32)
    flat = contiguous((4096,), "float32")
    plan = Plan((Launch(_tanh_kernel, (1,), ("x",), ("out",), {}, {}),), {"x": flat}, {"out": flat})
    (found,) = run(plan, {"x": x})
    np.testing.assert_allclose(found, np.tanh(x.astype(np.float64)), rtol=3 * ULP, atol=0)


# Packed sequences: the schedule


@triton.jit
def _find_kernel(cu_seqlens, out, sequences, BLOCK: tl.constexpr):
    tl.store(out + tl.program_id(0), find_sequence(cu_seqlens, sequences, tl.program_id(0), BLOCK))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50), max_size=9), st.integers(0, 40))
def test_every_row_of_every_sequence_has_a_tile(lengths, tail):
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    tokens, sequences = int(cu_seqlens[-1]) + tail, len(lengths)
    tiles = -(-tokens // 16) + sequences + 1
    launch = Launch(_find_kernel, (tiles,), ("cu",), ("out",), {"sequences": sequences}, {"BLOCK": 16})
    plan = Plan((launch,), {"cu": describe(cu_seqlens)}, {"out": contiguous((tiles,), "int32")})
    (found,) = run(plan, {"cu": cu_seqlens})
    rows = []
    for tile, sequence in enumerate(found):
        first = cu_seqlens[sequence] + (tile - cu_seqlens[sequence] // 16 - sequence) * 16
        end = [*cu_seqlens, tokens][sequence + 1]
        rows += range(first, min(first + 16, end))
    assert rows == list(range(tokens))


@triton.jit
def _order_kernel(out, size, heads, sequences, together, PACKED: tl.constexpr, AXES: tl.constexpr):
    if AXES:
        tile, head, batch = tile_head_batch_of_axes(size, heads, sequences, 16, PACKED, True)
    else:
        tile, head, batch = tile_head_batch(size, heads, sequences, together, 16, PACKED)
    out += ((tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(out, tile)
    tl.store(out + 1, head)
    tl.store(out + 2, batch)


@pytest.mark.parametrize(("others", "together"), [(1, 6), (2**16, 3), (2**17, 2), (2**18, 1), (2**25, 1)])
@pytest.mark.parametrize("axes", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_longest_tiles_come_first_of_the_heads_that_share_the_cache(others, together, axes, packed):
    heads, batch, sequences = 3, 2, 4
    spec = AttentionSpec(dtype="float32", head_dim=16, v_dim=16, causal=True)
    ends = describe(np.zeros(sequences + 1, np.int32)) if packed else None
    grid = programs(spec, AttentionTiles(16, 16), of_lengths(77, others, ends), by_keys=False)
    assert programs(spec, AttentionTiles(16, 16), of_lengths(others, 77, ends), by_keys=True) == grid
    tiles = 5 + packed * (sequences + 1)
    assert grid == (together, tiles, heads * batch // together)
    numbers = {"size": 77, "heads": heads, "sequences": sequences, "together": together}
    places = grid if axes else (tiles * heads * batch,)
    launch = Launch(_order_kernel, places, (), ("out",), numbers, {"PACKED": packed, "AXES": axes})
    (found,) = run(Plan((launch,), {}, {"out": contiguous((tiles * heads * batch, 3), "int32")}), {})
    order = [(tile, head + heads * item) for tile, head, item in found.tolist()]
    pairs = range(heads * batch)
    assert order == [
        (tile, pair)
        for first in pairs[::together]
        for tile in sorted(range(tiles), reverse=axes)
        for pair in pairs[first : first + together]
    ]


def of_lengths(q_len: int, kv_len: int, cu_seqlens: Array | None = None) -> AttentionInputs:
    q, k = (contiguous((2, length, 3, 16), "float32") for length in (q_len, kv_len))
    return AttentionInputs(*[None] * len(INPUTS))._replace(q=q, k=k, cu_seqlens_q=cu_seqlens)


def test_programs_without_a_longest_tile_follow_each_other_by_heads():
    given = of_lengths(77, 77)
    tiles, causal = AttentionTiles(16, 16), AttentionSpec(dtype="float32", head_dim=16, v_dim=16, causal=True)
    assert programs(replace(causal, causal=False), tiles, given, False) == (30,)
    assert programs(replace(causal, window_left=5), tiles, given, False) == (30,)
    assert programs(causal, replace(tiles, longest_first=0), given, False) == (30,)
    assert programs(causal, tiles, of_lengths(16 * 65536, 77), False) == (6 * 65536,)  # more than an axis can have


# What is compiled


def plans(case: Case, dtype: str, target: str) -> list[Plan]:
    arrays = {name: describe(array) for name, array in case.inputs().items()}
    for name in ("q", "k", "v"):
        arrays[name] = contiguous(arrays[name].shape, dtype)
    spec, config = case.spec(dtype), choose_config(case.spec(dtype), get_target(target))
    inputs = tuple(arrays.get(name) for name in INPUTS)
    forward = kernels.forward(spec, config, *inputs)
    out, lse = forward.outputs.values()
    return [forward, kernels.backward(spec, config, inputs, (out, lse), (out, None))]


def test_lengths_of_packed_sequences_do_not_recompile():
    def keys(q_len: int, kv_len: int, *starts: int) -> list[Any]:
        arrays = {"cu_seqlens_q": ints(*starts), "cu_seqlens_k": ints(*starts)}
        found = plans(Case({"causal": True}, arrays, q_len, kv_len, batch=1), "float16", "sm_90")
        launches = [
            (launch, {**plan.inputs, **plan.outputs, **plan.scratch}) for plan in found for launch in plan.launches
        ]
        return [
            specialise(launch, arrays, get_target("sm_90"))
            for launch, arrays in launches
            if "delta" not in launch.outputs
        ]

    assert keys(75, 103, 0, 20, 70) == keys(300, 1000, 0, 3, 17, 17, 64, 200)


COMPILED: dict[str, Callable[[], Case]] = {
    "sm_80": lambda: Case({"causal": True, "window_left": 200}, q_len=512, kv_len=512, dims=(64, 64)),
    "sm_90": lambda: Case(
        {"score": add(SCORE, plane(0)), "plane_gradients": (0,)},
        {"plane0": (1, 2, 512, 512)},
        512,
        512,
        dims=(64, 64),
    ),
    "sm_100": lambda: Case(
        {"causal": True, "max_seqlen_q": 50, "max_seqlen_k": 50},
        {**PACKED, "sinks": (1, 2)},
        512,
        512,
        1,
        dims=(64, 64),
    ),
    "gfx942": lambda: Case({"score": SOFTCAP, "causal": True}, {}, 512, 512, dims=(64, 64)),
    "gfx950": lambda: Case(
        {"mask": ("eq", plane(0), plane(1))},
        {"plane0": sorted_ids(2, 1, 512, 1), "plane1": sorted_ids(2, 1, 1, 512), "kv_lengths": ints(500, 300)},
        512,
        512,
        dims=(64, 64),
    ),
}


@pytest.mark.parametrize("target", COMPILED)
def test_compiles_without_spills(target):
    for plan in plans(COMPILED[target](), "bfloat16", target):
        for facts in compile_plan(plan, target):
            assert facts.spills == 0, facts
