"""What Hypothesis draws, and how often: sizes, layouts, and calls of any function of `subjects`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from features import Case, Subject
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["triton", "pallas"])
CHIPS = {"cuda": "triton", "tpu": "pallas"}

_suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
SWEEP = settings(max_examples=60, deadline=None, database=None, suppress_health_check=_suppressed, print_blob=True)

lengths = st.one_of(st.integers(0, 70), st.sampled_from([0, 1, 31, 32, 33, 64, 65]))
dims = st.one_of(st.integers(1, 20), st.sampled_from([16, 33, 40, 64]))


def quick(examples: int) -> settings:
    """The same few examples in every run."""
    return settings(SWEEP, derandomize=True, max_examples=examples)


@st.composite
def cases(draw: Any, subject: Subject, sizes: Mapping[str, Any], layouts: tuple[str, ...]) -> Case:
    """A form with any features that go together, of any sizes, each array in a layout of its own."""
    form = draw(st.sampled_from(list(subject.forms)))
    features: tuple[str, ...] = ()
    for factor, names in subject.factors.items():
        if factor == "strides":
            continue
        chosen = draw(st.sampled_from([(), *((name,) for name in names)]))
        if subject.goes_together(form, features + chosen):
            features += chosen
    drawn = tuple((name, draw(size)) for name, size in sizes.items())
    return Case(subject, form, features, drawn, tuple(draw(st.sampled_from(layouts)) for _ in range(6)))


def skip_unless_it_runs(implementation: str, device: str) -> None:
    if CHIPS.get(device, implementation) != implementation:
        pytest.skip(f"{implementation} does not run on {device}")
