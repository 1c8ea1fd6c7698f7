"""A child process that predicts one job with given tiles on a GPU that is not here, for `crosstile tune`.

    python -m crosstile.bench.issue_child < job.json

It is a process of its own because a compiler that aborts must not take the search with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict

from .facts import KernelFacts, over_budget
from .issue import Issue
from .programs import Job

SECONDS = 600.0


def ask(job: Job, tiles: Mapping[str, int]) -> tuple[float, str]:
    """Predicted microseconds of all launches of the job, and why its tiles cannot be used, "" where they can."""
    child = subprocess.run(
        [sys.executable, "-m", "crosstile.bench.issue_child"],
        input=json.dumps({"job": asdict(job), "tiles": dict(tiles)}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if child.returncode:
        return 0.0, child.stderr.strip()[-1500:] or f"the compiler ended with {child.returncode}"
    microseconds, refusal = json.loads(child.stdout.splitlines()[-1])
    return microseconds, refusal


def refusal_of(issue: Issue, target_name: str) -> str:
    """Why a kernel with these tiles is over its budget (`facts.over_budget`), "" where it is not."""
    facts = KernelFacts(
        issue.program, issue.tiles, 0, {}, "", issue.spills, on_chip_bytes=issue.shared, registers=issue.registers
    )
    return "; ".join(f"{issue.program}: {reason}" for reason in over_budget(facts, target_name))


def main() -> None:
    """Answer the one job on standard input with its time and its refusal, as the last line."""
    from .issue_programs import predict

    asked = json.loads(sys.stdin.read())
    job = Job(**asked["job"])
    issues = predict(job, asked["tiles"])
    refusals = [refusal for issue in issues if (refusal := refusal_of(issue, job.target))]
    print(json.dumps([sum(issue.microseconds for issue in issues), "; ".join(refusals)]))


if __name__ == "__main__":
    main()
