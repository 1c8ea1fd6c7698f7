"""Every feature of attention, in every implementation, forward and backward; and pairs of features together.

`CELLS` is what docs/attention.md shows as a table: a cell is there because a test of this file proves it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allpairspy import AllPairs
from feature_calls import FEATURES, Sizes, worst
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracles import rounded
from sweeps import swept

import crosstile
from crosstile.kernels.attention.spec import MAX_PLANES

IMPLEMENTATIONS = {"library": "library", "triton": "Triton", "pallas": "Pallas"}
NARROW = "bfloat16"
PAGE = Path(__file__).parent.parent / "docs" / "attention.md"
MARKS = "<!-- features: begin -->", "<!-- features: end -->"

CELLS = [
    (feature, implementation, direction)
    for feature in FEATURES
    for implementation in IMPLEMENTATIONS
    for direction in ("forward", "backward")
]


def check(sizes: Sizes, features: tuple[str, ...], dtype: str, implementation: str, backward: bool = True) -> None:
    over = {name: x for name, x in worst(sizes, features, dtype, implementation, backward).items() if not x <= 1}
    assert not over, f"errors as multiples of the allowed: {over}"


@pytest.mark.parametrize(
    ("feature", "implementation", "direction"),
    swept(CELLS, lambda cell: cell[1:] in (("triton", "forward"), ("pallas", "forward"))),  # a backward checks it too
)
def test_feature(feature, implementation, direction):
    check(Sizes(), (feature,), "float32", implementation, direction == "backward")


def float8(implementation: str) -> None:
    """Within the rounding of weights to float8, a sixteenth of each at most."""
    draw = np.random.default_rng(0).standard_normal
    exact = [rounded(draw((1, 40, heads, 16)), "float8_e4m3fn") for heads in (4, 2, 2)]
    arrays = [torch.from_numpy(array).to(torch.float8_e4m3fn) for array in exact]
    scales = {name: torch.full((1, array.shape[2]), 0.5) for name, array in zip(SCALES, arrays, strict=True)}
    out = crosstile.attention(*arrays, **scales, out_dtype=torch.float32, implementation=implementation)
    q, k, v = (0.5 * array for array in exact)
    bound = crosstile.attention(q, k, abs(v)) / 16
    assert (abs(out.numpy() - crosstile.attention(q, k, v)) <= bound).all()


def pages(implementation: str) -> None:
    draw = np.random.default_rng(0).standard_normal
    q, pages = draw((2, 4, 16)), draw((2, 6, 16, 2, 16))
    table, lengths = np.array([[3, 1], [5, 0]]), np.array([20, 9])
    exact = crosstile.paged_attention(q, *pages, table, lengths)
    arrays = (torch.from_numpy(array.astype(np.float32)) for array in (q, *pages))
    where = (torch.from_numpy(array) for array in (table, lengths))
    out = crosstile.paged_attention(*arrays, *where, implementation=implementation)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-5, atol=1e-6)


SCALES = "q_scale", "k_scale", "v_scale"
FORWARD_ONLY = {  # and files of tests of their own
    "float8 q, k and v": (float8, "tests/kernels/attention/test_float8.py"),
    "keys and values in pages": (pages, "tests/kernels/paged_attention"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", FORWARD_ONLY)
def test_forward_only(feature, implementation):
    FORWARD_ONLY[feature][0](implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.sweep
def test_feature_in_the_narrow_precision(feature, implementation):
    check(Sizes(), (feature,), NARROW, implementation)


# ---- Pairs: a covering array, in which any two values of two factors meet in some row

FACTORS = {
    "range": [(), ("causal",), ("window, left and right",), ("causal window",)],
    "softcap": [(), ("softcap",)],
    "bias": [(), ("bias, full",), ("bias, per head",), ("bias, per key",)],
    "mask": [(), ("mask",), ("mask, known to the host",)],
    "segments": [(), ("segment ids",)],
    "lengths": [(), ("lengths",)],
    "sinks": [(), ("sinks",)],
    "score_mod": [(), ("score_mod: ALiBi",)],
    "mask_mod": [(), ("mask_mod: prefix LM",), ("mask_mod: dilated",), ("mask_mod: documents",)],
    "dropout": [(), ("dropout",)],
    "sizes": [
        Sizes(),
        Sizes(1, 65, 33, 1, 3, 40, 24),
        Sizes(3, 1, 70, 2, 1, 8, 33),
        Sizes(1, 20, 1, 1, 1, 80, 16),
    ],
}
PACKED_FACTORS = {
    "range": FACTORS["range"],
    "softcap": FACTORS["softcap"],
    "sinks": FACTORS["sinks"],
    "score_mod": FACTORS["score_mod"],
    "mask_mod": [(), ("mask_mod: prefix LM",), ("mask_mod: dilated",)],
    "dropout": FACTORS["dropout"],
    "sizes": [Sizes(), Sizes(3, 9, 33, 1, 3, 40, 24), Sizes(2, 33, 70, 2, 1, 8, 33)],
}


PLANES = {"mask_mod: documents": 2, "segment ids": 2, "mask": 1, "mask, known to the host": 1, "score_mod: ALiBi": 1}
PLANES |= {name: 1 for name in FEATURES if name.startswith("bias")}


def fits(parts: list[Any]) -> bool:
    """Whether a call has room for all the arrays that the features put beside the scores."""
    return sum(PLANES.get(name, 0) for part in parts if isinstance(part, tuple) for name in part) <= MAX_PLANES


def rows(factors: dict[str, list]) -> list[tuple[Sizes, tuple[str, ...]]]:
    pairs = AllPairs(list(factors.values()), filter_func=fits)
    return [(row[-1], tuple(name for part in row[:-1] for name in part)) for row in pairs]


ROWS = rows(FACTORS) + [(sizes, (*features, "packed sequences (varlen)")) for sizes, features in rows(PACKED_FACTORS)]


def name_of(row: tuple[Sizes, tuple[str, ...]]) -> str:
    sizes, features = row
    return f"{sizes.q_len}x{sizes.kv_len} {' + '.join(features) or 'plain'}"


@pytest.mark.parametrize("implementation", ["triton", "pallas"])
@pytest.mark.parametrize("row", ROWS[1::28], ids=name_of)
def test_some_pairs_of_features(row, implementation):
    check(*row, "float32", implementation)


@pytest.mark.sweep
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_pairs_of_features(row, implementation):
    check(*row, "float32", implementation)


# ---- Any of them


@st.composite
def problems(draw: st.DrawFn) -> tuple[Sizes, tuple[str, ...]]:
    lengths, dims = st.sampled_from([0, 1, 5, 31, 32, 33, 66]), st.sampled_from([1, 8, 16, 40])
    sizes = Sizes(
        batch=draw(st.integers(1, 3)),
        q_len=draw(lengths),
        kv_len=draw(lengths),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(dims),
        v_dim=draw(dims),
    )
    factors = draw(st.sampled_from([FACTORS, PACKED_FACTORS]))
    packed = ("packed sequences (varlen)",) if factors is PACKED_FACTORS else ()
    chosen = [draw(st.sampled_from(options)) for name, options in factors.items() if name != "sizes"]
    assume(fits(chosen))
    return sizes, (*(name for part in chosen for name in part), *packed)


@pytest.mark.parametrize("implementation", ["triton", "pallas"])
@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_features(implementation, problem):
    check(*problem, "float32", implementation)


@pytest.mark.sweep
@pytest.mark.parametrize("implementation", ["library", "triton", "pallas"])
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(problem=problems())
def test_very_many_features(implementation, problem):
    check(*problem, "float32", implementation)


def test_the_rows_cover_every_pair():
    for factors, found in ((FACTORS, rows(FACTORS)), (PACKED_FACTORS, rows(PACKED_FACTORS))):
        options = [(name, option) for name, values in factors.items() if name != "sizes" for option in values if option]
        for at, (name, first) in enumerate(options):
            for other, second in options[at:]:
                if other != name:
                    assert any(first[0] in features and second[0] in features for _, features in found), (first, second)


# ---- The table


def table() -> str:
    """The features as Markdown. The definition is NumPy's; tests/kernels/attention/test_reference.py proves it."""
    columns = ["NumPy", *IMPLEMENTATIONS.values()]
    lines = ["| feature | " + " | ".join(f"{column}: forward | backward" for column in columns) + " |"]
    lines.append("|---|" + "---|" * (2 * len(columns)))
    for feature in FEATURES:
        cells = ["✓", "✓"] + [
            "✓" if (feature, implementation, direction) in CELLS else ""
            for implementation in IMPLEMENTATIONS
            for direction in ("forward", "backward")
        ]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    for feature in FORWARD_ONLY:
        lines.append(f"| {feature} | " + " | ".join(["✓", "inference only"] * len(columns)) + " |")
    return "\n".join(lines)


def test_the_docs_show_what_is_proved():
    between = re.search(f"{MARKS[0]}\n\n(.*?)\n\n{MARKS[1]}", PAGE.read_text(), re.DOTALL)
    assert between, f"{PAGE.name} has no {MARKS[0]} ... {MARKS[1]}"
    assert between[1] == table(), f"bring the table in {PAGE.name} up to date:\n\n{table()}"
