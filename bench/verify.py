"""`crosstile verify`: every kernel against NumPy in float64, forward and backward, in interpret mode on this CPU.

Four cells and the default: torch and JAX arrays through the Triton and the Pallas kernels, and through the framework's
own op. An error is stated as a multiple of the allowed one: twice the error that the framework's own op makes in the
same precision (the rule of FlashAttention's tests), plus half a unit in the last place for the rounding of the result
and four of float32 for the order of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import sqrt

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .case import Case, Frameworks, frameworks

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_LARGEST_OWN = 16  # units in the last place that the framework's own op may add; where it overflows it excuses nothing
KERNELS = ("triton", "pallas", "library")
DTYPES = ("float32", "bfloat16")  # those that every chip has
_COMMANDS = {"torch": "pip install 'crosstile[torch]'", "jax": "pip install 'crosstile[jax]'"}
_PACKAGES = {"triton": ("triton", "pip install 'crosstile[triton]'"), "pallas": ("jax", _COMMANDS["jax"])}


@dataclass(frozen=True)
class Check:
    """One kernel's worst error in one direction, over all its results.

    Attributes:
        error: the largest deviation from float64, relative to the largest value.
        multiple: of the allowed error; over 1 fails. The worse of the maximum's and the root mean square's.
    """

    op: str
    case: str
    framework: str
    kernel: str
    direction: str
    dtype: str
    error: float
    multiple: float

    @property
    def passes(self) -> bool:
        return self.multiple <= 1


class MissingError(RuntimeError):
    """A framework or kernel language that was asked for is not installed."""


def verify(chosen: Sequence[str], kernels: Sequence[str], cases: Sequence[Case], progress: Progress) -> list[Check]:
    """Check the cases in the named frameworks with the named kernels. Raises MissingError before anything runs."""
    check_installed(chosen, kernels)
    cells = [
        (case, side, kernel, dtype)
        for side in frameworks(chosen)
        for kernel in kernels
        for case in cases
        for dtype in DTYPES
    ]
    found: list[Check] = []
    task = progress.add_task("verify", total=len(cells), current="")
    for case, side, kernel, dtype in cells:
        progress.update(task, current=f"{case.op} {side.name} → {kernel} {dtype}")
        found += check(case, side, kernel, dtype)
        progress.advance(task)
    return found


def check(case: Case, side: Frameworks, kernel: str, dtype: str) -> Iterator[Check]:
    """Forward and backward, if there is one, of one case in one cell."""
    arrays = case.arrays()
    inputs = {name: side.round(array, dtype) for name, array in arrays.items()}
    exact = case.reference({name: side.to_numpy(array) for name, array in inputs.items()})
    ours = case.run(side, inputs, case.public(kernel))
    theirs = case.run(side, inputs, case.own(side))
    for direction, names in (("forward", ("out",)), ("backward", tuple(name for name in exact if name != "out"))):
        if not names:  # an op without a backward
            continue
        errors = [compare(ours[name], theirs[name], exact[name], dtype, case.terms(name)) for name in names]
        error, multiple = max(e for e, _ in errors), max(m for _, m in errors)
        yield Check(case.op, case.name, side.name, kernel, direction, dtype, error, multiple)


def compare(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray, dtype: str, terms: int = 1) -> tuple[float, float]:
    """(max-relative error, multiple of the allowed); infinite where shapes or infinities differ, or one has a NaN.

    terms: of how many each value is a sum beyond those of the op itself, as a bias's gradient is over what it was
    broadcast to. Their rounding adds up as the square root of their number.
    """
    if ours.shape != exact.shape or np.isnan(ours).any() or np.isnan(exact).any():
        return float("inf"), float("inf")
    if (_infinities(ours) != _infinities(exact)).any():
        return float("inf"), float("inf")
    floor = 0.5 * EPSILON[dtype] + 4 * sqrt(terms) * EPSILON["float32"]
    own_max, own_rms = (min(error, _LARGEST_OWN * sqrt(terms) * EPSILON[dtype]) for error in _errors(theirs, exact))
    our_max, our_rms = _errors(ours, exact)
    return our_max, max(our_max / (2 * own_max + floor), our_rms / (2 * own_rms + floor))


def _infinities(array: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(array), array, 0)


def _errors(array: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """(max-relative, RMS-relative) where `exact` is finite; NaN and inf there count as infinite."""
    finite = np.isfinite(exact)
    values = exact[finite]
    difference = np.nan_to_num(array[finite] - values, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    if not values.size or not np.abs(values).max():
        return float(np.abs(difference).max(initial=0)), 0.0
    rms = float(np.sqrt(np.square(difference).mean() / np.square(values).mean()))
    return float(np.abs(difference).max() / np.abs(values).max()), rms


def check_installed(chosen: Sequence[str], kernels: Sequence[str]) -> None:
    """Raises MissingError, with the pip command, where a framework or a kernel language is not installed."""
    needs = {name: (name, _COMMANDS[name]) for name in chosen}
    needs |= {name: _PACKAGES[name] for name in kernels if name in _PACKAGES}
    for wanted, (package, command) in needs.items():
        if find_spec(package) is None:
            raise MissingError(f"no {wanted}: {command} (or leave {wanted} out)")


def show(checks: Sequence[Check], console: Console) -> None:
    """The table, the worst of each cell, and the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("op", "case", "framework", "kernel", "direction", "dtype"):
        table.add_column(heading)
    for heading in ("max relative error", "× allowed"):
        table.add_column(heading, justify="right")
    for item in checks:
        colour = "green" if item.passes else "red"
        table.add_row(
            item.op,
            item.case,
            item.framework,
            item.kernel,
            item.direction,
            item.dtype,
            f"{item.error:.1e}",
            f"[{colour}]{item.multiple:.2f}[/]",
        )
    console.print(table)
    failed = sum(not item.passes for item in checks)
    verdict = (
        f"[red]{failed} of {len(checks)} over the allowed error[/]"
        if failed
        else "[green]all within the allowed error[/]"
    )
    console.print(f"measured on this CPU, interpreted, against NumPy in float64: {verdict}", highlight=False)
