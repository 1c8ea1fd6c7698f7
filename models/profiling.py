"""A few steps of a run, recorded by the framework's own profiler, for https://ui.perfetto.dev.

torch writes profile/trace.json; JAX profile/plugins/profile/TIME/perfetto_trace.json.gz, and beside it what XProf
reads (`xprof RUN/profile`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SKIPPED, RECORDED = 3, 3  # steps: the first compile


class Profile:
    """Told of each step's beginning, it records a few."""

    def __init__(self, framework: str, folder: Path, start: int) -> None:
        self._framework, self._folder = framework, folder
        self._first = start + SKIPPED
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """A step begins."""
        if step == self._first:
            self._begin()
        elif step == self._first + RECORDED:
            self.end()

    def end(self) -> None:
        """Write what was recorded, if anything was."""
        if self._profiler is None:
            return
        self._profiler, profiler = None, self._profiler
        if self._framework == "jax":
            profiler.stop_trace()
        else:
            profiler.stop()
            profiler.export_chrome_trace(str(self._folder / "trace.json"))

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._framework == "jax":
            from jax import profiler

            profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._profiler = profiler
        else:
            from torch.profiler import profile

            self._profiler = profile(record_shapes=True)
            self._profiler.start()
