"""A run at a terminal: its bar, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises. Outside of the main thread Ctrl-C stays as it is."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def bar(framework: str, start: int, steps: int, visible: bool) -> Iterator[Callable[[int, str], None]]:
    """A function of the steps done and a text, which a progress bar shows."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description} {task.fields[state]}")
    with Progress(BarColumn(12), MofNCompleteColumn(), text, TimeRemainingColumn(), disable=not visible) as shown:
        task = shown.add_task(framework, total=steps, completed=start, state="")
        yield lambda done, state: shown.update(task, completed=done, state=state)
