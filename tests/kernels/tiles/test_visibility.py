"""Tiles of a mask against every one of its pairs: nothing seen is skipped, nothing hidden is called full."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from textwrap import dedent
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosstile.kernels.tiles import intervals, visibility
from crosstile.kernels.tiles.expressions import BINARY, INDICES, UNARY, evaluate, functions_of, leaves, plane
from crosstile.kernels.tiles.visibility import Runs, visible_tiles

B, H, I, J = ((name,) for name in INDICES)  # noqa: E741
MILLION = 1 << 20


def c(value):
    return ("const", value)


# ---- The answer by every pair


def in_single_precision(function: Any) -> Any:
    """The op as a chip computes it: float32 and int32, where integers that meet a float become one."""

    def op(*operands: Any) -> Any:
        arrays = [np.asarray(x) for x in operands]
        mixed = any(x.dtype.kind == "f" for x in arrays)
        kinds = {"f": np.float32, "i": np.float32 if mixed else np.int32}
        result = np.asarray(function(*(x.astype(kinds.get(x.dtype.kind, x.dtype)) for x in arrays)))
        return result.astype({"f": np.float32, "i": np.int32}.get(result.dtype.kind, result.dtype))

    return op


DOUBLE = functions_of(np)
SINGLE = {op: in_single_precision(function) for op, function in DOUBLE.items()}


def seen(mask, q_len, kv_len, *, left=None, right=None, planes=(), batch=1, heads=1, functions=DOUBLE) -> np.ndarray:
    """bool [batch, heads, q_len, kv_len]."""
    grids = np.ix_(*map(np.arange, (batch, heads, q_len, kv_len)))
    values = {(name,): grid for name, grid in zip(INDICES, grids, strict=True)}
    values |= {plane(slot): array for slot, array in enumerate(planes)}
    aligned = grids[2] + kv_len - q_len
    window = np.ones((batch, heads, q_len, kv_len), bool)
    if left is not None:
        window = window & (grids[3] >= aligned - left)
    if right is not None:
        window = window & (grids[3] <= aligned + right)
    with np.errstate(all="ignore"):
        return window & np.asarray(mask is None or evaluate(mask, values, functions)).astype(bool)


def states_by_pairs(pairs: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """[batch, heads, tiles of queries, tiles of keys]: 0 empty, 1 partial, 2 full. Keys past the end are not seen."""
    kv_len = pairs.shape[3]
    padded = np.pad(pairs, [(0, 0)] * 3 + [(0, -kv_len % block_kv)])
    rows = [padded[:, :, first : first + block_q] for first in range(0, pairs.shape[2], block_q)]
    columns = range(0, padded.shape[3], block_kv)
    tiles = [[tile[..., at : at + block_kv].reshape(*pairs.shape[:2], -1) for at in columns] for tile in rows]
    states = [[tile.any(-1).astype(int) + tile.all(-1) for tile in row] for row in tiles]
    return np.array(states).reshape(len(rows), len(columns), *pairs.shape[:2]).transpose(2, 3, 0, 1)


def states_of(runs: Runs, batch: int, heads: int) -> np.ndarray:
    """The same from runs, which must be in order, apart, and joined where they can be."""
    assert runs.offsets.dtype == runs.bounds.dtype == np.int32
    assert runs.offsets.shape == (runs.batch * runs.heads * runs.row_tiles + 1,)
    assert (runs.offsets[0], runs.offsets[-1]) == (0, len(runs.bounds))
    states = np.zeros((batch, heads, runs.row_tiles, runs.column_tiles), int)
    for b, h, tile in np.ndindex(states.shape[:3]):
        end_before, full_before = -1, 0
        for first, end, full in runs.of(tile, b, h):
            assert 0 <= first < end <= runs.column_tiles
            assert first > end_before or (first == end_before and full != full_before)
            states[b, h, tile, first:end] = 1 + full
            end_before, full_before = end, full
    return states


def check(mask, q_len, kv_len, block_q, block_kv, *, exactly=False, known=None, **options) -> Runs:
    """Hold the runs of both sides to the pairs; `exactly`: no tile is partial that need not be. Returns those of q."""
    batch, heads = options.get("batch", 1), options.get("heads", 1)
    given_planes = known if known is not None else options.get("planes", ())
    runs = visible_tiles(mask, q_len, kv_len, block_q, block_kv, **{**options, "planes": given_planes})
    states = states_of(runs, batch, heads)
    for functions in (DOUBLE, SINGLE):
        answer = states_by_pairs(seen(mask, q_len, kv_len, functions=functions, **options), block_q, block_kv)
        assert not ((states == 0) & (answer != 0)).any(), "a tile was skipped in which something is seen"
        assert not ((states == 2) & (answer != 2)).any(), "a tile was called full in which something is hidden"
    if exactly:
        np.testing.assert_array_equal(states, answer)
    other = states.copy()
    if q_len % block_q:  # seen from the keys, the last tile of queries does not exist whole
        other[:, :, -1] = np.minimum(other[:, :, -1], 1)
    np.testing.assert_array_equal(states_of(runs.transposed(), batch, heads), other.swapaxes(2, 3))
    return runs


# ---- Masks whose tiles are found exactly

documents = np.array([0] * 5 + [1] * 11 + [2] + [3] * 20 + [4] * 3, np.int32)  # 40 tokens
PER_DOCUMENT = ("eq", plane(0), plane(1))
OF_DOCUMENTS = (documents.reshape(1, 1, -1, 1), documents.reshape(1, 1, 1, -1))
picture = np.add.outer(np.arange(40) // 7, np.arange(40) // 5) % 3 == 0

MASKS = {
    "everything": (None, {}),
    "causal": (None, {"right": 0}),
    "causal by a mod": (("le", J, I), {}),
    "window": (None, {"left": 7, "right": 5}),
    "left only": (None, {"left": 3}),
    "right of the diagonal": (None, {"left": -2, "right": 9}),
    "wider than anything": (None, {"left": 2**40, "right": 2**40}),
    "nothing": (None, {"right": -40}),
    "causal window of documents": (PER_DOCUMENT, {"left": 12, "right": 0, "planes": OF_DOCUMENTS}),
    "prefix": (("or", ("lt", J, c(13)), ("le", J, I)), {}),
    "a window for each head": (
        ("le", ("abs", ("sub", I, J)), ("mul", c(6), H)), {"heads": 3}
    ),
    "a prefix for each batch item": (
        ("lt", J, plane(0)), {"batch": 3, "planes": (np.int32([0, 40, 17]).reshape(3, 1, 1, 1),)}
    ),
    "a boolean mask": (plane(0), {"planes": (picture[None, None],)}),
    "a float mask for each head": (
        ("gt", plane(0), c(0.5)), {"heads": 2, "planes": (np.stack([picture, ~picture])[None].astype(np.float32),)}
    ),
    "a bfloat16 mask": (("gt", plane(0), c(0.5)), {"planes": (picture[None, None].astype(ml_dtypes.bfloat16),)}),
    "blocks": (("eq", ("floordiv", I, c(8)), ("floordiv", J, c(8))), {}),
    "stripes": (("lt", ("mod", ("floordiv", I, c(16)), c(4)), c(2)), {}),
    "a number": (("max", ("sub", J, c(11)), c(0)), {}),
    "stripes across": (("lt", ("mod", ("add", I, J), c(16)), c(15)), {}),
    "documents, numbered in any order": (
        PER_DOCUMENT, {"planes": tuple((7 - 5 * plane) for plane in OF_DOCUMENTS)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("blocks", [(8, 8), (4, 16), (7, 3), (64, 5)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_found_exactly(name, blocks):
    mask, options = MASKS[name]
    check(mask, 40, 40, *blocks, exactly=True, **options)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 37), (13, 50), (50, 13), (1, 1), (37, 1), (5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (6, 0), (2, 3)], ids=str)
def test_any_lengths(q_len, kv_len, window):
    check(None, q_len, kv_len, 4, 8, left=window[0], right=window[1], exactly=True)


def test_a_dimension_counts_only_where_the_mask_depends_on_it():
    shared = check(("le", J, I), 20, 20, 8, 8, batch=3, heads=2)
    assert (shared.batch, shared.heads, len(shared.offsets)) == (1, 1, 4)
    of_heads = check(("le", J, ("add", I, H)), 20, 20, 8, 8, batch=3, heads=2)
    assert (of_heads.batch, of_heads.heads, len(of_heads.offsets)) == (1, 2, 7)
    both = (np.arange(6, dtype=np.int32) * 3).reshape(3, 2, 1, 1)
    of_both = check(("le", J, plane(0)), 20, 20, 8, 8, batch=3, heads=2, planes=(both,))
    assert (of_both.batch, of_both.heads, len(of_both.offsets)) == (3, 2, 19)


def test_a_tile_of_keys_past_the_end_is_never_full():
    assert visible_tiles(None, 8, 12, 8, 8).of(0).tolist() == [[0, 1, 1], [1, 2, 0]]
    assert visible_tiles(None, 12, 8, 8, 8).transposed().of(0).tolist() == [[0, 1, 1], [1, 2, 0]]


# ---- Every op

SHIFTED = ("sub", J, c(20))
OPS: dict[str, Any] = {
    "neg": ("ge", ("neg", J), ("neg", I)),
    "abs": ("le", ("abs", SHIFTED), c(9)),
    "exp": ("lt", ("exp", ("mul", J, c(0.1))), c(5.5)),
    "log": ("lt", ("log", ("add", J, c(1))), c(2.6)),
    "sqrt": ("lt", ("sqrt", J), c(4.4)),
    "tanh": ("lt", ("tanh", ("mul", SHIFTED, c(0.1))), c(-0.3)),
    "not": ("not", ("gt", J, I)),
    "add": ("le", J, ("add", I, c(3))),
    "sub": ("le", ("sub", J, I), c(3)),
    "mul": ("gt", ("mul", SHIFTED, ("sub", I, c(21))), c(60)),
    "div": ("le", ("div", SHIFTED, c(-2)), ("sub", I, c(20.25))),
    "floordiv": ("ge", ("floordiv", SHIFTED, c(7)), c(-1)),
    "mod": ("lt", ("mod", SHIFTED, c(16)), c(8)),
    "min": ("le", J, ("min", I, c(20))),
    "max": ("le", J, ("max", I, c(20))),
    "lt": ("lt", J, I),
    "le": ("le", J, I),
    "gt": ("gt", J, I),
    "ge": ("ge", J, I),
    "eq": ("eq", ("floordiv", I, c(12)), ("floordiv", J, c(12))),
    "ne": ("ne", ("floordiv", I, c(12)), ("floordiv", J, c(12))),
    "and": ("and", ("le", J, I), ("gt", J, c(10))),
    "or": ("or", ("le", J, I), ("gt", J, c(30))),
    "where": ("where", ("lt", J, c(12)), ("ge", I, c(8)), ("le", J, I)),
}


def test_every_op_has_a_case():
    assert set(OPS) == set(intervals._RULES) == {*UNARY, *BINARY, "where"}


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_known_exactly_and_without_its_rule_nothing_is(op, monkeypatch):
    runs = check(OPS[op], 43, 51, 8, 4, exactly=True)
    assert runs.full_share > 0
    assert 0 < runs.sparsity < 1
    monkeypatch.delitem(intervals._RULES, op)
    blind = check(OPS[op], 43, 51, 8, 4)
    assert blind.visited > runs.visited or blind.full_share < runs.full_share


def rule(kind, lo, hi):
    """A wrong rule: bounds by two functions of the operands' bounds, for `bounded`."""
    return lambda *parts: intervals.bounded(lo(*parts), hi(*parts), kind)


WRONG = {
    "neg keeps the order of its bounds": ("neg", rule("int", lambda x: -x.lo, lambda x: -x.hi)),
    "abs of the ends alone": (
        "abs", rule("int", lambda x: np.minimum(abs(x.lo), abs(x.hi)), lambda x: np.maximum(abs(x.lo), abs(x.hi)))
    ),
    "sub from the same end": ("sub", rule("int", lambda x, y: x.lo - y.lo, lambda x, y: x.hi - y.hi)),
    "mul forgets signs": ("mul", rule("float", lambda x, y: x.lo * y.lo, lambda x, y: x.hi * y.hi)),
    "div forgets signs": ("div", rule("float", lambda x, y: x.lo / y.hi, lambda x, y: x.hi / y.lo)),
    "floordiv towards 0": (
        "floordiv", rule("int", lambda x, y: np.trunc(x.lo / y.lo), lambda x, y: np.trunc(x.hi / y.lo))
    ),
    "mod of the ends alone": ("mod", rule("int", lambda x, y: x.lo % y.lo, lambda x, y: x.hi % y.lo)),
    "lt as le": ("lt", intervals._RULES["le"]),
    "le as lt": ("le", intervals._RULES["lt"]),
    "eq where the first ends agree": (
        "eq", lambda x, y: intervals.Interval(1.0 * (x.lo == y.lo), 1.0 * (x.lo == y.lo), "bool")
    ),
    "min as max": ("min", intervals._RULES["max"]),
    "not forgotten": ("not", intervals.truth),
    "and as or": ("and", intervals._RULES["or"]),
    "or as and": ("or", intervals._RULES["and"]),
    "where takes the first": ("where", lambda condition, x, y: x),
    "exp falls": ("exp", rule("float", lambda x: np.exp(-x.hi), lambda x: np.exp(-x.lo))),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_check_notices_a_wrong_rule(name, monkeypatch):
    op, wrong = WRONG[name]
    monkeypatch.setitem(intervals._RULES, op, wrong)
    with pytest.raises(AssertionError, match="a tile was"):
        check(OPS[op], 43, 51, 8, 5)


# ---- Remainders that each tile has all of


@pytest.mark.parametrize(
    "x",
    [
        ("sub", I, J), ("neg", J), ("floordiv", I, c(2)), ("add", ("sub", I, c(3)), H), ("mul", J, c(2)), ("sub", J, J),
        ("add", I, c(0.5)), ("add", I, ("sqrt", J)), ("add", I, plane(0)), ("floordiv", I, c(16)), ("div", I, c(2)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mask", [lambda x: ("eq", x, c(0)), lambda x: ("lt", x, c(3)), lambda x: ("gt", x, c(3))])
def test_remainders(mask, x):
    halves = (np.arange(40, dtype=np.float32) / 2).reshape(1, 1, 1, 40)
    for divisor in (c(1), c(4), c(5), c(4.5), c(-4)):
        check(mask(("mod", x, divisor)), 40, 40, 8, 8, right=3, heads=2, planes=(halves,))


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many boxes were looked at, a number each time."""
    found, numbers = visibility.bounds_of, []
    monkeypatch.setattr(visibility, "bounds_of", lambda *a: numbers.append(len(a[1]["i",].lo)) or found(*a))
    return numbers


@pytest.mark.parametrize(
    "mask",
    [
        ("eq", ("mod", ("sub", ("floordiv", I, c(2)), J), c(4)), c(0)),
        ("lt", ("mod", ("div", J, c(2)), c(2.5)), c(9)),
        ("ge", ("add", plane(0), J), I),
        ("and", plane(0), ("not", plane(0))),
    ],
    ids=["remainders that each tile has all of", "remainders of floats", "a score", "a mask"],
)
def test_what_no_box_can_tell_is_not_looked_for_in_each(mask, counted):
    """Only the boxes along the diagonal are cut, and it is partial elsewhere."""
    runs = visible_tiles(mask, 512, 512, 8, 8, right=0)
    assert (runs.visited, runs.full_share) == (64 * 65 // 2, 0)
    assert sum(counted) < 12 * 64


# ---- What is not known


@pytest.mark.parametrize("unknown", [np.nan, np.inf, -np.inf, 3e38], ids=str)
@pytest.mark.parametrize(
    "mask", [("lt", ("sub", plane(0), plane(0)), c(1.0)), ("lt", ("tanh", ("mul", plane(0), c(2.0))), c(5.0))]
)
def test_what_may_be_nan_or_overflow_makes_a_tile_partial(mask, unknown):
    values = np.linspace(0, 1, 32, dtype=np.float32)
    values[9] = unknown
    runs = check(mask, 4, 32, 4, 8, planes=(values.reshape(1, 1, 1, 32),))
    assert [1, 2, 0] in runs.of(0).tolist()


def test_division_by_what_may_be_0_is_unknown():
    for op in ("div", "floordiv", "mod"):
        runs = check(("ge", (op, I, ("sub", J, c(9))), c(-1000)), 16, 32, 8, 8)
        assert [1, 2, 0] in runs.of(1).tolist()


def test_an_integer_that_may_overflow_is_unknown():
    huge = ("mul", ("mul", J, c(40_000)), c(4_000))  # past int32 from j = 14 on, where a chip is at -2e9
    assert check(("ge", huge, c(0)), 8, 32, 8, 8).of(0).tolist() == [[0, 1, 1], [1, 4, 0]]


def test_sums_of_truths_are_unknown():
    assert check(("gt", ("add", ("le", J, I), ("le", I, J)), c(5)), 8, 8, 4, 4).of(0).tolist() == [[0, 2, 0]]


def test_floats_are_as_wide_as_they_round():
    """In single and in double precision i * 0.1 + 0.2 and (j + 2) * 0.1 compare differently where i = j."""
    mask = ("ge", ("add", ("mul", I, c(0.1)), c(0.2)), ("mul", ("add", J, c(2)), c(0.1)))
    differ = seen(mask, 50, 50, functions=DOUBLE) != seen(mask, 50, 50, functions=SINGLE)
    assert differ.any()
    check(mask, 50, 50, 1, 1)


def test_integers_past_2_24_round_where_they_meet_a_float():
    ids = np.int32([2**24, 2**24 + 1]).reshape(1, 1, 1, 2)
    mask = ("gt", plane(0), c(float(2**24)))
    assert not np.array_equal(*(seen(mask, 1, 2, planes=(ids,), functions=functions) for functions in (DOUBLE, SINGLE)))
    check(mask, 1, 2, 1, 1, planes=(ids,))


def test_a_number_keeps_its_type_beside_an_equal_one():
    """True == 1 == 1.0, but the sum of two truths is no number."""
    one, truth = ("where", ("lt", J, c(4)), c(1), c(1)), ("where", ("lt", J, c(4)), c(True), c(True))
    for first, second in ((one, truth), (truth, one)):
        mask = ("and", ("lt", ("add", first, first), c(9)), ("lt", ("add", second, second), c(9)))
        assert check(mask, 8, 8, 8, 8).of(0).tolist() == [[0, 1, 0]]


def test_a_plane_that_is_not_known_makes_partial_what_it_decides():
    ids = np.arange(64, dtype=np.int32) // 9
    planes = (ids.reshape(1, 1, -1, 1), ids.reshape(1, 1, 1, -1))
    runs = check(PER_DOCUMENT, 64, 64, 8, 8, right=0, planes=planes, known=(planes[0], None))
    assert [runs.of(tile).tolist() for tile in range(8)] == [[[0, tile + 1, 0]] for tile in range(8)]
    assert visible_tiles(PER_DOCUMENT, 64, 64, 8, 8, right=0).visited == runs.visited  # nor is one that is not there


@pytest.mark.parametrize(
    "mask",
    [
        ("and", plane(0), ("le", J, I)),
        ("not", ("or", ("not", plane(0)), ("gt", J, I))),
        ("where", ("le", J, I), plane(0), c(False)),
    ],
    ids=["and", "or", "where"],
)
def test_beside_what_is_not_known_another_operand_can_decide(mask):
    assert visible_tiles(mask, 64, 64, 8, 8).visited == 8 * 9 // 2


def test_a_plane_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"planes\[0\] is \(1, 1, 1, 9\); .* \(1, 1, 8, 8\)"):
        visible_tiles(("lt", plane(0), c(1)), 8, 8, 8, 8, planes=(np.zeros((1, 1, 1, 9)),))


# ---- Any mask

numbers_at_hand = (
    [B, H, I, J, plane(0), plane(1), plane(2), plane(5)] + [c(x) for x in (-7, -1, 0, 1, 2, 3, 16)] + [c(0.1), c(-2.5)]
)
ARITHMETIC = ("add", "sub", "mul", "div", "floordiv", "mod", "min", "max")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def with_leaves(*parts: Any) -> Any:
    """Expressions of these parts that NumPy does not compute as two Python numbers."""
    return st.tuples(*parts).filter(lambda whole: all(map(leaves, whole[1:2])) or any(map(leaves, whole[2:])))


def numbers(depth: int) -> Any:
    leaf = st.sampled_from(numbers_at_hand)
    if depth == 0:
        return leaf
    below = numbers(depth - 1)
    return st.one_of(
        leaf,
        with_leaves(st.sampled_from(["neg", "abs", "exp", "log", "sqrt", "tanh"]), below.filter(leaves)),
        with_leaves(st.sampled_from(ARITHMETIC), below, below),
        st.tuples(st.just("where"), truths(depth - 1), below, below),
        st.tuples(st.just("add"), st.sampled_from([I, J, plane(0)]), truths(depth - 1)),
    )


def truths(depth: int) -> Any:
    compared = with_leaves(st.sampled_from(COMPARISONS), *[numbers(max(0, depth - 1))] * 2)
    if depth == 0:
        return st.one_of(compared, st.sampled_from([plane(3), plane(4)]))
    below = truths(depth - 1)
    return st.one_of(
        compared,
        st.tuples(st.just("not"), below),
        st.tuples(st.sampled_from(["and", "or"]), below, below),
        st.tuples(st.just("where"), below, below, below),
    )


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """The arguments of `check`: planes of each kind, the last two of which hold NaN and inf or are not known."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    q_len, kv_len = draw(st.integers(0, 26)), draw(st.integers(0, 26))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    planes = [
        np.sort(rng.integers(-3, 9, (1, 1, q_len, 1), np.int32), axis=2),
        rng.integers(-2, 5, (batch, 1, 1, kv_len), np.int32),
        rng.standard_normal((1, heads, 1, kv_len)).astype(draw(st.sampled_from(["float16", "float32", "float64"]))),
        np.repeat(rng.integers(0, 2, (1, heads, q_len, kv_len)) > 0, 1, axis=3),
        np.broadcast_to(np.array(draw(st.booleans())), (batch, 1, q_len, 1)),
        rng.choice(np.float32([0.5, 2, np.nan, np.inf]), (1, 1, 1, kv_len), p=[0.5, 0.4, 0.05, 0.05]),
    ]
    known = [None if draw(st.booleans()) and slot in (1, 4) else array for slot, array in enumerate(planes)]
    window = st.one_of(st.none(), st.integers(-5, 30))
    return {
        "q_len": q_len, "kv_len": kv_len, "block_q": draw(st.integers(1, 9)), "block_kv": draw(st.integers(1, 9)),
        "left": draw(window), "right": draw(window), "planes": planes, "known": known, "batch": batch, "heads": heads,
    }  # fmt: skip


@settings(max_examples=250, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(truths(3), calls())
def test_any_mask_is_never_wrong(mask, call):
    check(mask, **call)


# ---- A million tokens

DOCUMENT_ENDS = np.cumsum(np.random.default_rng(0).exponential(8192, 400).astype(np.int64) + 1)
MILLIONS = {
    "causal window of documents": {"left": 1024, "right": 0, "documents": True},
    "causal documents": {"right": 0, "documents": True},
    "causal": {"right": 0},
    "everything": {},
    "every other key": {"mask": ("eq", ("mod", ("sub", I, J), c(2)), c(0)), "right": 0},
    "documents that are not known": {"mask": PER_DOCUMENT, "right": 0},
}


def prepared(mask=None, documents=False, **options) -> tuple[Runs, Runs, float]:
    """The runs of both sides, and how long they took."""
    if documents:
        ids = np.searchsorted(DOCUMENT_ENDS, np.arange(MILLION), side="right").astype(np.int32)
        mask, options["planes"] = PER_DOCUMENT, (ids.reshape(1, 1, -1, 1), ids.reshape(1, 1, 1, -1))
    began = time.perf_counter()
    runs = visible_tiles(mask, MILLION, MILLION, 128, 128, **options)
    return runs, runs.transposed(), time.perf_counter() - began


@pytest.mark.parametrize("name", MILLIONS)
def test_a_million_tokens_take_2_seconds_and_200_mb(name):
    assert prepared(**MILLIONS[name])[2] < 2
    tracemalloc.start()
    runs, other, _ = prepared(**MILLIONS[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert runs.visited == other.visited
    assert len(runs.bounds) + len(other.bounds) < 60_000


def test_a_million_tokens_take_200_mb_of_the_process():
    pytest.importorskip("resource")  # Windows has none
    script = f"""
        import resource, sys
        import numpy as np
        sys.path[:0] = {[str(Path(__file__).parent)]}
        import test_visibility as tests
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        for call in tests.MILLIONS.values():
            tests.prepared(**call)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 200e3


@pytest.mark.parametrize("name", ["causal window of documents", "causal documents", "causal"])
def test_every_row_of_a_million_tokens(name):
    """A query sees the keys from its document's or its window's start, whichever is later, to itself."""
    options = MILLIONS[name]
    runs, other, _ = prepared(**options)
    i = np.arange(MILLION)
    starts = np.append(0, DOCUMENT_ENDS)[np.searchsorted(DOCUMENT_ENDS, i, side="right")]
    begins = np.maximum(starts if options.get("documents") else 0, i - options.get("left", MILLION)).reshape(-1, 128)
    first, end = begins.min(axis=1) // 128, np.arange(len(begins)) + 1
    full = np.maximum(end - 1 - -(-begins.max(axis=1) // 128), 0)
    visited = runs.bounds[:, 1] - runs.bounds[:, 0]
    np.testing.assert_array_equal(runs.bounds[runs.offsets[:-1], 0], first)
    np.testing.assert_array_equal(runs.bounds[runs.offsets[1:] - 1, 1], end)
    np.testing.assert_array_equal(np.add.reduceat(visited, runs.offsets[:-1]), end - first)
    np.testing.assert_array_equal(np.add.reduceat(visited * runs.bounds[:, 2], runs.offsets[:-1]), full)
    assert (other.visited, other.full_share) == (runs.visited, runs.full_share)


def test_what_no_box_can_tell_is_merged_as_it_is_found(monkeypatch):
    """A mask that no box decides, many times the pieces that are kept: the runs are still one a row."""
    monkeypatch.setattr(visibility, "_SEGMENTS", 50)
    monkeypatch.setattr(visibility, "_BOXES", 7)
    mask = ("lt", ("mod", ("mul", I, J), c(7)), c(5))
    assert len(check(mask, 120, 120, 8, 8, right=0).bounds) <= 3 * 15


# ---- What is said of them


def test_facts_of_runs():
    runs = visible_tiles(None, 32, 40, 8, 8, right=0)
    assert (runs.row_tiles, runs.column_tiles, runs.visited, runs.longest) == (4, 5, 14, 5)
    assert (runs.full_share, runs.sparsity) == (10 / 14, 1 - 14 / 20)
    assert str(runs).splitlines() == [
        "4 x 5 tiles of 8 x 8 tokens, batch 1, heads 1: 14 visited (30.00% skipped), 71.4% of them full, "
        "at most 5 a row",
        "row 0: full 0 to 0, partial 1 to 1",
        "row 2: full 0 to 2, partial 3 to 3",
        "row 3: full 0 to 3, partial 4 to 4",
    ]


def test_facts_of_nothing():
    for lengths in ((0, 8), (8, 0), (0, 0)):
        runs = visible_tiles(None, *lengths, 8, 8)
        assert (runs.visited, runs.full_share, runs.longest) == (0, 0, 0)
        assert "0 visited" in str(runs)
    assert str(visible_tiles(c(False), 8, 8, 8, 8)).endswith("row 0: nothing")
