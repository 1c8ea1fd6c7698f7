"""`crosstile compile`: every kernel by the real compilers for every chip, held to its budget, on a machine without one.

What it says is compiled, never measured: the facts are those of the machine code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from crosstile.kernels.tiles.targets import get_target

from . import pool
from .facts import has_matrix_instructions, over_budget
from .pool import Outcome
from .programs import Job
from .shapes import get_shape

SCHEMA = "crosstile.compile/1"
_COMPILERS = ("triton", "jax", "jaxlib", "libtpu")
_NEEDS = {
    "GPU": (("triton",), "pip install 'crosstile[triton]'"),
    "TPU": (("jax", "libtpu"), "pip install 'crosstile[tpu]'"),
}


class NoCompilerError(RuntimeError):
    """A compiler that the chosen targets need is not installed; the message has the command that brings it."""


@dataclass(frozen=True)
class CompileReport:
    """The outcome of every job, and how long all took."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    compilers: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """Every reason why the run fails, a sentence each, with what it is about."""
        found = []
        for outcome in self.outcomes:
            if outcome.unsupported:
                continue
            if outcome.error:
                found.append(f"{outcome.job}: the compiler refused. {outcome.error}")
            elif not outcome.kernels:
                found.append(f"{outcome.job}: compiled to no kernel at all")
            elif _multiplies_by_hand(outcome):
                found.append(f"{outcome.job}: not one of its kernels uses the matrix units")
            for facts in outcome.kernels:
                reasons = over_budget(facts, outcome.job.target)
                found += [f"{outcome.job}: {facts.kernel} ({facts.tiles}): {reason}" for reason in reasons]
        return found

    def as_dict(self) -> dict[str, Any]:
        """The JSON document that docs/compile.md describes."""
        return {
            "schema": SCHEMA,
            "compilers": self.compilers,
            "ok": not self.failures,
            "seconds": round(self.seconds, 1),
            "jobs": [
                {
                    **asdict(outcome.job),
                    "error": outcome.error,
                    "unsupported": outcome.unsupported,
                    "kernels": [
                        {**facts.as_dict(), "failures": list(over_budget(facts, outcome.job.target))}
                        for facts in outcome.kernels
                    ],
                }
                for outcome in self.outcomes
            ],
        }


def _multiplies_by_hand(outcome: Outcome) -> bool:
    """One kernel of an op that multiplies matrices must do it where the chip does."""
    if not get_shape(outcome.job.shape).multiplies:
        return False
    matrix = any(any(facts.matrix.values()) for facts in outcome.kernels)
    return not matrix and has_matrix_instructions(get_target(outcome.job.target).platform, outcome.job.dtype)


def check_compilers(targets: Sequence[str]) -> None:
    """Raises NoCompilerError where a target's compiler is not installed."""
    for kind, (packages, command) in _NEEDS.items():
        concerned = [name for name in targets if get_target(name).is_gpu == (kind == "GPU")]
        missing = [package for package in packages if find_spec(package) is None]
        if concerned and missing:
            raise NoCompilerError(
                f"no {kind} compiler ({', '.join(missing)} missing), which {', '.join(concerned)} need: {command} "
                f"(or name other targets with --target)"
            )


def compile_jobs(jobs: Sequence[Job], progress: Progress, processes: int = pool.PROCESSES) -> CompileReport:
    """Compile all jobs, showing a bar."""
    started = time.perf_counter()
    outcomes: dict[Job, Outcome] = {}
    task = progress.add_task("compile", total=len(jobs), current="")
    for outcome in pool.run(jobs, processes):
        outcomes[outcome.job] = outcome
        progress.update(task, advance=1, current=str(outcome.job))
    return CompileReport(tuple(outcomes[job] for job in jobs), time.perf_counter() - started, compilers())


def compilers() -> dict[str, str]:
    """The installed versions of what compiled, and of crosstile."""
    found = {}
    for package in ("crosstile", *_COMPILERS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def show(report: CompileReport, console: Console) -> None:
    """The table of every kernel, then every reason to fail."""
    console.print(_table(report))
    failures = report.failures
    for sentence in failures:
        console.print(f"[red]fails[/] {escape(sentence)}", highlight=False, soft_wrap=True)
    kernels = sum(len(outcome.kernels) for outcome in report.outcomes)
    chips = len({outcome.job.target for outcome in report.outcomes})
    verdict = f"[red]{len(failures)} fail[/]" if failures else "[green]all within budget[/]"
    console.print(
        f"compiled, not measured: {kernels} kernels for {chips} chips in {report.seconds:.0f} s, {verdict}",
        highlight=False,
    )


def _table(report: CompileReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=("", "dim"))
    for heading in ("target", "op", "direction", "shape", "kernel", "tiles"):
        table.add_column(heading, overflow="fold")
    for heading in ("regs", "spills", "on chip KiB", "matrix instructions", "instrs", "s"):
        table.add_column(heading, justify="right")
    for row in rows(report):
        table.add_row(*row)
    return table


def rows(report: CompileReport) -> list[tuple[str, ...]]:
    """The cells of the table: target, op, direction, shape, kernel, tiles, then the facts as text."""
    found: list[tuple[str, ...]] = []
    for outcome in report.outcomes:
        job = outcome.job
        lead = (job.target, job.op, job.direction, job.shape)
        if outcome.error or outcome.unsupported:
            word = "refused" if outcome.error else "not offered there"
            found.append((*lead, word, "", "", "", "", "", "", ""))
        for facts in outcome.kernels:
            matrix = ", ".join(f"{name} {count}" for name, count in sorted(facts.matrix.items())) or "none"
            numbers = (
                "–" if facts.registers is None else str(facts.registers),
                str(facts.spills),
                f"{facts.on_chip_bytes / 1024:.0f}",
                matrix,
                str(facts.instructions),
                f"{facts.seconds:.1f}",
            )
            found.append((*lead, facts.kernel, facts.tiles, *numbers))
    return found


def write_json(report: CompileReport, path: Path) -> None:
    """The same facts as a JSON document."""
    path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
