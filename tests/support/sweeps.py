"""Which cases of a test always run, and which only in a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def swept(cases: Iterable[Any], where: Callable[[Any], bool]) -> list[Any]:
    """The cases as parameters; those for which `where` holds run in a sweep only."""
    return [_parameter(case, marks=pytest.mark.sweep if where(case) else ()) for case in cases]


def one_in(count: int, cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters; one in so many always runs, the others in a sweep."""
    return [_parameter(case, marks=pytest.mark.sweep if at % count else ()) for at, case in enumerate(cases)]


def _parameter(case: Any, marks: Any) -> Any:
    return pytest.param(*case, marks=marks) if type(case) is tuple else pytest.param(case, marks=marks)
