"""Copies between HBM and a TPU core's memories: a queue with a bandwidth and a latency, and flags that count."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

GRANULE = 32  # bytes that the unit of a copy's size and of a flag stands for


class DeadlockError(RuntimeError):
    """A program waits for a copy that nobody started."""


@dataclass(frozen=True)
class Memory:
    """What a copy to or from HBM costs, in cycles of the core.

    Attributes:
        bytes_a_cycle: the core's share of the HBM bandwidth.
        latency: from the start of a copy to the arrival of its last byte, beside the time of its bytes.
        on_chip_bytes_a_cycle: of a copy that stays on the chip.
    """

    bytes_a_cycle: float
    latency: float
    on_chip_bytes_a_cycle: float


@dataclass
class Queue:
    """The copies of one run of a program; times are cycles since its start.

    `neighbours`: other chips copy to this one too, so that what nobody here began is there when it is asked for.
    """

    memory: Memory
    neighbours: bool = False
    bytes_moved: int = 0
    busy: float = 0.0
    _free: float = 0.0
    _counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _coming: dict[int, deque[tuple[float, int]]] = field(default_factory=lambda: defaultdict(deque))

    def start(self, path: str, granules: int, flag: int, now: float) -> None:
        """Begin a copy; `path` is such as `hbm_to_vmem`."""
        size = granules * GRANULE
        if "hbm" not in path:
            arrival = now + size / self.memory.on_chip_bytes_a_cycle
        else:
            cost = size / self.memory.bytes_a_cycle
            self._free = max(self._free, now) + cost
            self.busy += cost
            self.bytes_moved += size
            arrival = self._free + self.memory.latency
        self._coming[flag].append((arrival, granules))

    def wait(self, flag: int, granules: int, now: float) -> float:
        """The time at which the flag has counted that much, at the earliest now."""
        coming = self._coming[flag]
        while self._counts[flag] < granules:
            if not coming and self.neighbours:
                self._counts[flag] = granules
                return now
            if not coming:
                raise DeadlockError(f"flag {flag} waits for {granules} granules and no copy is on its way")
            arrival, size = coming.popleft()
            now = max(now, arrival)
            self._counts[flag] += size
        return now

    def add(self, flag: int, amount: int) -> None:
        """What `vsyncadd` does: a signed 32-bit addition to the flag."""
        self._counts[flag] += amount - (1 << 32) if amount >> 31 else amount
