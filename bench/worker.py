"""A child process that compiles: a job a line on standard input, its facts a line on standard output.

    python -m crosstile.bench.worker

It is a process of its own because libtpu reads its environment once, because a compiler that aborts must not take the
caller with it, and because two of them use two cores.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from .facts import KernelFacts
from .programs import Job, gpu_plan, tiles_by_kernel, tpu_program, unsupported


def compile_job(job: Job) -> tuple[KernelFacts, ...]:
    """The facts of every kernel of one job; raises what the compiler raises."""
    from crosstile.kernels.tiles.targets import get_target

    if get_target(job.target).is_gpu:
        from .gpu import compile_plan

        return compile_plan(gpu_plan(job), job.target)

    from .tpu import compile_program

    program, arguments = tpu_program(job)
    return compile_program(program, arguments, job.target, tiles_by_kernel(job))


def answer(line: str) -> dict[str, Any]:
    """The reply to one job, as plain data: its kernels, the compiler's message, or why there is nothing to compile."""
    job = Job(**json.loads(line))
    try:
        if reasons := unsupported(job):
            return {"unsupported": " ".join(reasons)}
        return {"kernels": [facts.as_dict() for facts in compile_job(job)]}
    except Exception as error:  # whatever a compiler raises is the job's result, not the worker's end
        return {"error": f"{type(error).__name__}: {_shorten(str(error))}"}


def _shorten(message: str, limit: int = 1500) -> str:
    message = message.strip()
    return message if len(message) <= limit else f"{message[: limit // 2]}\n...\n{message[-limit // 2 :]}"


def _private_output() -> TextIO:
    """Standard output for the replies alone: compilers that print land on standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def main() -> None:
    """Answer jobs until standard input closes."""
    replies = _private_output()
    for line in sys.stdin:
        replies.write(json.dumps(answer(line)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
