"""Every feature of every op besides attention, in every implementation, forward and backward; and pairs of features.

The singles of `subjects.SUBJECTS` are what the tables of the docs show: a cell is there because a test of this file
proves it. What XLA compiles for seconds runs in every round with many features in a call, one such call of three, and
in the sweep with each.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from feature_tables import pages, written
from features import COLUMNS, COMPILED, REFUSED, Case, check
from subjects import SUBJECTS
from sweeps import one_in

from crosstile import UnsupportedError


def every_column(cases: Iterable[Case]) -> list[tuple[Case, str]]:
    """The cases beside each column that can have them, with or without strides."""
    return [(case, column) for case in cases for column in COLUMNS if case.lacking.get(column) != REFUSED]


CELLS = [
    pytest.param(case, column, direction, marks=[pytest.mark.sweep] if column in COMPILED else [])
    for subject in SUBJECTS.values()
    for case in subject.singles()
    for column in COLUMNS
    for direction in ("forward", "backward")
    if column not in case.lacking and (direction == "forward" or subject.differentiable)
]
REFUSALS = [
    (case, column)
    for subject in SUBJECTS.values()
    for case in subject.singles()
    for column, why in case.lacking.items()
    if why == REFUSED
]
TOGETHER = [case for subject in SUBJECTS.values() for case in subject.together()]
PAIRS = [case for subject in SUBJECTS.values() for case in subject.pairs()]


@pytest.mark.parametrize(("case", "column", "direction"), CELLS, ids=str)
def test_feature(case, column, direction):
    check(case, column, direction == "backward")


@pytest.mark.parametrize(("case", "column"), one_in(3, every_column(TOGETHER)), ids=str)
def test_features_together(case, column):
    check(case, column, backward=False)
    check(case, column, backward=True)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "column"), every_column(PAIRS), ids=str)
def test_pairs_of_features(case, column):
    check(case, column, backward=True)


@pytest.mark.parametrize(("case", "column"), REFUSALS, ids=str)
def test_what_is_refused(case, column):
    with pytest.raises(UnsupportedError):
        check(case, column, backward=False)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda subject: subject.name)
def test_nothing_is_left_out(subject):
    assert {name for case in subject.together() for name in case.features} == set(subject.features)
    assert {case.form for case in subject.together()} == set(subject.forms)
    found = [set(case.features) for case in subject.pairs()]
    for _, both in subject.twos():
        assert any(features >= set(both) for features in found), both


@pytest.mark.parametrize(("page", "name", "table"), [pytest.param(*each, id=each[1]) for each in pages()])
def test_the_docs_show_what_is_proved(page, name, table):
    text = page.read_text()
    assert written(name, table, text) == text, f"{page.name} is stale: run python tests/support/feature_tables.py"
