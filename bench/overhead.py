"""`crosstile bench`: what one call costs above torch's own op called by hand, and what importing crosstile costs.

Measured on this CPU, in pairs that take turns, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

MAX_MICROSECONDS = 15.0
MAX_IMPORT_SECONDS = 0.15


@dataclass(frozen=True)
class Overhead:
    """Microseconds a call: of crosstile, of the op by hand, and the median and quartiles of the paired differences."""

    call: str
    ours: float
    theirs: float
    difference: float
    quartiles: tuple[float, float]


def measure(
    call: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = 200, calls: int = 100
) -> Overhead:
    """Time both in turns; each round is a pair of batches of calls, in alternating order."""
    _time(ours, 5 * calls)
    _time(theirs, 5 * calls)
    pairs = []
    for index in range(rounds):
        if index % 2:
            ours_took = _time(ours, calls)
            theirs_took = _time(theirs, calls)
        else:
            theirs_took = _time(theirs, calls)
            ours_took = _time(ours, calls)
        pairs.append((ours_took, theirs_took))
    differences = [a - b for a, b in pairs]
    low, _, high = quantiles(differences, n=4)
    return Overhead(call, median(a for a, _ in pairs), median(b for _, b in pairs), median(differences), (low, high))


def _time(function: Callable[[], Any], calls: int) -> float:
    """Microseconds a call."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls * 1e6


def torch_overheads(rounds: int = 200) -> list[Overhead]:
    """attention and matmul on tiny torch tensors, without and with gradients to come, on one thread."""
    import torch
    import torch.nn.functional as F

    import crosstile

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for requires_grad in (False, True):
            q, k, v = (torch.randn(1, 8, 2, 16, requires_grad=requires_grad) for _ in range(3))
            a, b = (torch.randn(8, 8, requires_grad=requires_grad) for _ in range(2))
            suffix = ", gradients to come" if requires_grad else ""

            def by_hand(q: Any = q, k: Any = k, v: Any = v) -> Any:
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
                )
                return out.transpose(1, 2)

            def attention(q: Any = q, k: Any = k, v: Any = v) -> Any:
                return crosstile.attention(q, k, v, causal=True)

            def matmul(a: Any = a, b: Any = b) -> Any:
                return crosstile.matmul(a, b)

            def torch_matmul(a: Any = a, b: Any = b) -> Any:
                return torch.matmul(a, b)

            found.append(measure(f"attention{suffix}", attention, by_hand, rounds))
            found.append(measure(f"matmul{suffix}", matmul, torch_matmul, rounds))
        return found
    finally:
        torch.set_num_threads(threads)


def import_seconds(repeats: int = 7) -> float:
    """The median time of `import crosstile` in a new process, the interpreter's own start left out."""
    program = "import time; t = time.perf_counter(); import crosstile; print(time.perf_counter() - t)"
    return median(float(_output(program)) for _ in range(repeats))


def _output(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def show(overheads: list[Overhead], seconds: float, console: Console) -> bool:
    """The table; whether all are within the bars."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("call (torch, CPU, default implementation)")
    for heading in ("crosstile µs", "by hand µs", "overhead µs", "quartiles", "bar"):
        table.add_column(heading, justify="right")
    fine = seconds <= MAX_IMPORT_SECONDS
    for item in overheads:
        passes = item.difference <= MAX_MICROSECONDS
        fine = fine and passes
        colour = "green" if passes else "red"
        table.add_row(
            item.call,
            f"{item.ours:.1f}",
            f"{item.theirs:.1f}",
            f"[{colour}]{item.difference:.1f}[/]",
            f"{item.quartiles[0]:.1f} … {item.quartiles[1]:.1f}",
            f"≤ {MAX_MICROSECONDS:g}",
        )
    console.print(table)
    colour = "green" if seconds <= MAX_IMPORT_SECONDS else "red"
    console.print(f"import crosstile: [{colour}]{seconds * 1e3:.0f} ms[/], bar ≤ {MAX_IMPORT_SECONDS * 1e3:.0f} ms")
    console.print("measured on this CPU", style="dim")
    return fine
