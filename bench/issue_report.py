"""`crosstile issue`: the tables of what the issue model predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cycles_report import rate
from .gpus import GPUS
from .issue import Issue, IssueError
from .issue_programs import predict
from .pipes import PIPES
from .programs import Job, unsupported

SCHEMA = "crosstile.issue/1"


def run(jobs: Sequence[Job], tiles: Mapping[str, int], console: Console) -> tuple[list[Any], bool]:
    """Predict each job and print its table. Returns plain data for JSON, and whether every job had a prediction."""
    found, good = [], True
    for job in jobs:
        try:
            if reasons := unsupported(job):
                raise IssueError(" ".join(reasons))
            issues = predict(job, tiles)
        except (IssueError, ValueError) as error:
            console.print(f"[red]fails[/] {escape(f'{job}: {error}')}", highlight=False, soft_wrap=True)
            good = False
            continue
        show(job, issues, console)
        found.append({**asdict(job), "kernels": [asdict(issue) for issue in issues]})
    return found, good


def show(job: Job, issues: Sequence[Issue], console: Console) -> None:
    """One table of the kernels of a job."""
    gpu = GPUS[job.target]
    table = Table(title=f"predicted, not measured: {job}, {gpu.product}", box=None, title_justify="left")
    table.add_column("kernel", overflow="fold")
    table.add_column("tiles", overflow="fold")
    for heading in ("µs", "bytes µs", *(f"{pipe} %" for pipe in PIPES), "issue %", "regs", "spills", "KiB", "resident"):
        table.add_column(heading, justify="right")
    table.add_column("limit")
    for issue in issues:
        table.add_row(*cells(issue))
    console.print(table)
    total = sum(issue.microseconds for issue in issues)
    peak = 2e-3 * gpu.matrix_rate * gpu.processors * gpu.clock
    console.print(f"predicted: {total:.1f} µs in all{rate(job, total, peak)}", highlight=False)
    for note in dict.fromkeys(note for issue in issues for note in issue.notes):
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)
    console.print()


def cells(issue: Issue) -> tuple[str, ...]:
    """The columns of one kernel."""
    return (
        issue.program,
        issue.tiles,
        f"{issue.microseconds:.1f}",
        f"{issue.floor:.1f}",
        *(f"{100 * issue.busy[pipe]:.0f}" for pipe in PIPES),
        f"{100 * issue.issue_share:.0f}",
        str(issue.registers),
        str(issue.spills),
        f"{issue.shared / 1024:.0f}",
        f"{issue.resident.programs} × {issue.resident.warps // issue.resident.programs} ({issue.resident.limit})",
        issue.limit,
    )
