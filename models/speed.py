"""How fast a run is: token/s, and the peak of the device that it is a share of."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .arrays import from_numpy, to_numpy


def measured_peak(framework: str, device: Any = None, dtype: str = "float32") -> float:
    """FLOP/s of a large matmul of that dtype in that framework on that device, the best of several."""
    noise = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    array = from_numpy(noise, framework, dtype, device)
    repeats, best = 4, float("inf")
    for _ in range(6):
        began = time.perf_counter()
        result = array
        for _ in range(repeats):
            result = array @ result
        to_numpy(result[:1, :1])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return repeats * 2 * 1024**3 / best


class Meter:
    """Counts tokens and time; the first step compiles and does not count for the speed."""

    def __init__(self) -> None:
        self.first_step_seconds = 0.0
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens that were predicted took so long."""
        if not self.first_step_seconds:
            self.first_step_seconds = seconds
        else:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the steps after the first; 0 before there is one."""
        return self._tokens / self._seconds if self._seconds else 0.0
