"""Two worker processes and a queue of jobs between them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .facts import KernelFacts
from .programs import Job
from .tpu import environment

PROCESSES = 2
SECONDS_A_JOB = 300.0


@dataclass(frozen=True)
class Outcome:
    """What came of a job: the facts of its kernels, the compiler's refusal, or why the library does not offer it."""

    job: Job
    kernels: tuple[KernelFacts, ...] = ()
    error: str = ""
    unsupported: str = ""


def run(jobs: Sequence[Job], processes: int = PROCESSES, seconds: float = SECONDS_A_JOB) -> Iterator[Outcome]:
    """The outcomes of the jobs as they come. A worker that dies or hangs costs its job, and is replaced."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    workers: dict[int, _Worker] = {}
    stop = threading.Event()
    threads = [
        threading.Thread(target=_serve, args=(waiting, done, workers, stop, seconds), daemon=True)
        for _ in range(min(processes, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            yield done.get()
    finally:
        stop.set()
        for worker in list(workers.values()):  # those still at work when the caller has stopped asking
            worker.kill()
        for thread in threads:
            thread.join()


def _serve(
    waiting: queue.SimpleQueue[Job],
    done: queue.SimpleQueue[Outcome],
    workers: dict[int, _Worker],
    stop: threading.Event,
    seconds: float,
) -> None:
    """One thread: it keeps a worker alive and hands it jobs until there are none."""
    me = threading.get_ident()
    try:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            worker = workers.get(me) or workers.setdefault(me, _Worker())
            reply = worker.ask(job, seconds)
            if "died" in reply:
                workers.pop(me).close()
                done.put(Outcome(job, error=reply["died"]))
            elif "error" in reply:
                done.put(Outcome(job, error=reply["error"]))
            elif "unsupported" in reply:
                done.put(Outcome(job, unsupported=reply["unsupported"]))
            else:
                done.put(Outcome(job, tuple(KernelFacts(**facts) for facts in reply["kernels"])))
    finally:
        if me in workers:
            workers.pop(me).close()


class _Worker:
    """One child process of `crosstile.bench.worker`, with a folder of its own for compilers' dumps."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="crosstile-compile-")
        folder = Path(self._folder.name)
        self._log = (folder / "stderr").open("w+")
        environ = {**os.environ, **environment(folder / "llo"), "TRITON_DEFAULT_FP_FUSION": "1"}
        environ.pop("TRITON_INTERPRET", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "crosstile.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environ,
        )

    def ask(self, job: Job, seconds: float) -> dict[str, Any]:
        """The reply, or under "died" why there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Timer(seconds, self.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if line:
            return dict(json.loads(line))
        return {"died": self._last_words(seconds)}

    def _last_words(self, seconds: float) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return f"the compiler was stopped: more than {seconds:.0f} seconds, or out of memory"
        self._log.seek(0)
        tail = self._log.read()[-1200:].strip()
        return f"the compiler ended with code {code}\n{tail}"

    def kill(self) -> None:
        """Stop at once, whatever it is doing."""
        self._process.kill()

    def close(self) -> None:
        """End the process: its input closes, and it is not waited for long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()
