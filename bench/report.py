"""`report/index.html`: one file with everything in it, to read on a phone or a desk, by day or night.

Every figure says what it is: measured on this CPU, compiled, or predicted.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crosstile.kernels.tiles.targets import TARGETS, Target

from .compile import CompileReport, compilers, rows
from .facts import over_budget
from .pool import Outcome
from .roofline import Bound, bounds
from .shapes import OPS
from .svg import Series, line_chart, roofline_chart
from .verify import Check

_NAMES = {"torch": "PyTorch", "jax": "JAX"}
_COLOURS = {"torch": 1, "jax": 2}
_OP_COLOURS = {op: 3 + number for number, op in enumerate(OPS)}  # the page has --series-3 and on


@dataclass(frozen=True)
class TrainingRun:
    """One framework's training.

    Attributes:
        losses: (step, bits per byte) of the training batches.
        held_out: (step, bits per byte) on held-out text; first before training, last after it.
        seconds: of training, the measuring and the compiling included.
        tokens_per_second: of the steps alone.
        mfu: the share of the speed that a float32 matmul of the framework reached here.
        sample: text that the trained model wrote.
    """

    framework: str
    losses: Sequence[tuple[float, float]]
    held_out: Sequence[tuple[float, float]]
    seconds: float
    tokens_per_second: float
    mfu: float
    parameters: int
    prompt: str = ""
    sample: str = ""

    @property
    def name(self) -> str:
        """As people write it."""
        return _NAMES[self.framework]

    @property
    def steps(self) -> int:
        return int(self.held_out[-1][0])


@dataclass(frozen=True)
class Report:
    """What the page shows; an empty part is left out."""

    runs: Sequence[TrainingRun] = ()
    checks: Sequence[Check] = ()
    compiled: CompileReport | None = None
    bounds: Sequence[Bound] = field(default_factory=bounds)
    seconds: float = 0.0


def write(report: Report, folder: Path) -> Path:
    """Write `index.html` into the folder, which is made. The file's path, absolute."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "index.html").resolve()
    path.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("crosstile.bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        report=report,
        loss_charts={"wide": _loss_chart(report.runs, 760, 300), "narrow": _loss_chart(report.runs, 340, 260)},
        cells=_verification_cells(report.checks),
        chips=_compile_matrix(report.compiled) if report.compiled else [],
        operations=_operations(report.compiled) if report.compiled else [],
        compile_rows=rows(report.compiled) if report.compiled else [],
        rooflines=[_roofline(target, report.bounds) for target in TARGETS.values()],
        colours={op: _OP_COLOURS[op] for op in dict.fromkeys(item.shape.op for item in report.bounds)},
        versions={**compilers(), **_frameworks()},
        machine=f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _loss_chart(runs: Sequence[TrainingRun], width: int, height: int) -> str:
    if not runs:
        return ""
    series = [
        Series("", _thinned(run.losses), _COLOURS[run.framework], faint=True) for run in runs if len(run.losses) > 1
    ]
    series += [Series(f"{run.name}, held out", run.held_out, _COLOURS[run.framework], dots=True) for run in runs]
    return line_chart(series, "step", "bits per byte", width, height)


def _thinned(points: Sequence[tuple[float, float]], limit: int = 300) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of its neighbours."""
    stride = max(1, -(-len(points) // limit))
    groups = [points[at : at + stride] for at in range(0, len(points), stride)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _verification_cells(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """One row per op, framework and kernel: the worst multiple of either direction."""
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.op, check.framework, check.kernel), []).append(check)
    return [
        {
            "op": op,
            "framework": _NAMES[framework],
            "kernel": kernel,
            "dtypes": ", ".join(dict.fromkeys(check.dtype for check in group)),
            "forward": max((c.multiple for c in group if c.direction == "forward"), default=None),
            "backward": max((c.multiple for c in group if c.direction == "backward"), default=None),
            "passes": all(check.passes for check in group),
        }
        for (op, framework, kernel), group in groups.items()
    ]


def _operations(compiled: CompileReport) -> list[tuple[str, str]]:
    """(op, direction) of every column of the matrix."""
    order = {"forward": 0, "saving": 0, "backward": 1}
    found = {
        (outcome.job.op, "backward" if order[outcome.job.direction] else "forward") for outcome in compiled.outcomes
    }
    return sorted(found, key=lambda item: (item[0], order[item[1]]))


def _compile_matrix(compiled: CompileReport) -> list[dict[str, Any]]:
    """One row per chip, one cell per op and direction."""
    names = list(dict.fromkeys(outcome.job.target for outcome in compiled.outcomes))
    return [
        {
            "target": TARGETS[name],
            "cells": [_compile_cell(_select(compiled, name, *operation)) for operation in _operations(compiled)],
        }
        for name in names
    ]


def _select(compiled: CompileReport, target: str, op: str, direction: str) -> list[Outcome]:
    return [
        outcome
        for outcome in compiled.outcomes
        if (outcome.job.target, outcome.job.op) == (target, op)
        and (outcome.job.direction == "backward") == (direction == "backward")
    ]


def _compile_cell(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a chip's compiler made of one op and direction: which matrix instructions, how much spilled."""
    kernels = [(outcome.job.target, facts) for outcome in outcomes for facts in outcome.kernels]
    kinds = {_short(name) for _, facts in kernels for name, count in facts.matrix.items() if count}
    fine = all(not outcome.error and (outcome.kernels or outcome.unsupported) for outcome in outcomes)
    return {
        "kinds": ", ".join(sorted(kinds)) or "none",
        "kernels": len(kernels),
        "spills": sum(facts.spills for _, facts in kernels),
        "passes": fine and not any(over_budget(facts, target) for target, facts in kernels),
    }


def _short(instruction: str) -> str:
    """`v_mfma_f32_32x32x8_bf16` -> `v_mfma`; what NVIDIA's and the TPU's names mean is kept."""
    known = {"HGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05"}
    if instruction.startswith(("v_mfma", "v_smfmac")):
        return "mfma"
    if instruction.startswith("vmatmul"):
        return "MXU"
    return known.get(instruction, instruction)


def _roofline(target: Target, found: Sequence[Bound]) -> dict[str, Any]:
    mine = [item for item in found if item.target == target.name]
    points = [
        (item.shape.name, item.intensity, item.tflops, _OP_COLOURS[item.shape.op]) for item in mine if item.tflops
    ]
    return {
        "target": target,
        "chart": roofline_chart(target.bf16_tflops, target.bandwidth, points, target.name),
        "bounds": mine,
    }


def _frameworks() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "numpy", "optax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
