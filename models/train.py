"""Training: the loop around a framework's step, with held-out loss, checkpoints and exact resumption.

Every loss is a function of the config, the framework, the seed and the step, so a run that was interrupted and resumed
has the losses of one that was not. The learning rate follows the steps, never the clock: a budget in seconds only says
where to stop, and the run can be resumed from there.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import cos, log, pi
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint, transformer
from .arrays import from_numpy, to_numpy
from .config import Config
from .data import VOCAB_SIZE, Corpus, batch_at, held_out_batches, standard_library
from .run import Run

STEPS, BATCH, SEQ, LEARNING_RATE = 600, 8, 128, 4e-3
WARMUP = 50  # steps
EVALUATE_EVERY = CHECKPOINT_EVERY = 100  # steps
_EVALUATED = 16  # batches of held-out text


@dataclass
class Result:
    """What a run did, the part before a resumption included.

    Attributes:
        framework: "torch" or "jax".
        config: of the model.
        params: the trained parameters.
        losses: of each step's batch before the step, in nats a token.
        held_out: (step, bits per byte) before the first step, at intervals and after the last.
        tokens_per_second: of this process's steps, the first (which compiles) and the measuring left out.
        peak_flops: a second, of a float32 matmul of the framework on this device, measured at the start.
        mfu: model FLOP/s as a share of `peak_flops`.
        first_step_seconds: with its compilation.
        finished: whether all steps were taken.
    """

    framework: str
    config: Config
    params: Any = field(repr=False)
    losses: list[float] = field(repr=False)
    held_out: list[tuple[int, float]]
    tokens_per_second: float
    peak_flops: float
    mfu: float
    first_step_seconds: float
    finished: bool

    @property
    def bits_before(self) -> float:
        """Held-out bits per byte of the initial weights."""
        return self.held_out[0][1]

    @property
    def bits_after(self) -> float:
        """Held-out bits per byte at the end."""
        return self.held_out[-1][1]


def train(
    config: Config | None = None,
    framework: str = "torch",
    *,
    steps: int = STEPS,
    seconds: float | None = None,
    batch: int = BATCH,
    seq: int = SEQ,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    device: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    corpus: Corpus | None = None,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> Result:
    """Train a model of bytes on the Python standard library's sources.

    Args:
        config: the model; None is `Config.demo()`.
        framework: "torch" or "jax".
        steps: of the whole schedule.
        seconds: stop after the step that uses them up, compilation included; None takes all steps.
        batch: sequences a step.
        seq: tokens a sequence.
        learning_rate: its peak, after the warm-up; a cosine takes it down to a twentieth.
        seed: of the weights and the batches.
        device: of torch or JAX; None is the framework's default.
        out: folder of the run: `run.json`, `metrics.jsonl` and checkpoints `step-000100/`. None keeps nothing.
        resume: continue the run in `out` from its last checkpoint, or begin it if there is none.
        corpus: the text; None is the standard library's.
        on_step: called with the number and the loss of each step.
        progress: show a bar.

    Returns:
        The losses and the parameters.

    Raises:
        ValueError: an argument out of range, a run in `out` and no `resume`, or one with other settings.
        KeyboardInterrupt: after Ctrl-C, once the step is done and its checkpoint written; a second one stops at once.
    """
    from .learners import LEARNERS

    config = config or Config.demo()
    corpus = corpus or standard_library()
    _check(config, framework, steps=steps, batch=batch, seq=seq)
    settings = {
        "framework": framework,
        "config": asdict(config),
        "steps": steps,
        "batch": batch,
        "seq": seq,
        "learning_rate": learning_rate,
        "seed": seed,
        "corpus": corpus.digest,
    }
    run = Run(Path(out), settings, resume) if out is not None else None
    start = run.last_step if run else 0
    if run and start:
        params = checkpoint.load(run.checkpoint(start), framework, device=device)[0]
    else:
        params = transformer.init(config, seed, framework, device=device)
    rates = np.array([learning_rate * schedule(step, steps) for step in range(steps)])
    learner = LEARNERS[framework](params, config, rates)
    if run and start:
        learner.restore(run.optimizer_state(start))

    losses, held_out = run.history() if run else ([], [])
    evaluation = list(held_out_batches(corpus, _EVALUATED, batch, seq))

    def evaluate(step: int) -> None:
        held_out.append((step, float(np.mean([learner.evaluate(tokens) for tokens in evaluation])) / log(2)))
        if run:
            run.log({"step": step, "held_out_bits": held_out[-1][1]})

    peak = measured_peak(framework, device)
    flops = config.flops_per_token(seq)
    meter = Meter(batch * seq)
    with _interruptible() as interrupted, _bar(framework, start, steps, progress) as show:
        if not held_out:
            evaluate(0)
        began = time.perf_counter()
        for step in range(start, steps):
            with meter:
                losses.append(learner.step(batch_at(corpus, step, seed, batch, seq)))
            done = step + 1
            speed = meter.tokens_per_second
            if run:
                run.log({"step": done, "loss": losses[-1], "tokens_per_second": speed, "mfu": speed * flops / peak})
            show(done, f"{losses[-1] / log(2):.2f} bits/byte  {speed:,.0f} token/s  MFU {speed * flops / peak:.0%}")
            if on_step:
                on_step(done, losses[-1])
            over = seconds is not None and time.perf_counter() - began >= seconds
            stop = done == steps or over or interrupted.is_set()
            if not interrupted.is_set() and (stop or done % EVALUATE_EVERY == 0):
                evaluate(done)
            if run and (stop or done % CHECKPOINT_EVERY == 0):
                run.save(done, learner.params, config, learner.optimizer_state())
            if stop:
                break
    if interrupted.is_set():
        raise KeyboardInterrupt
    return Result(
        framework=framework,
        config=config,
        params=learner.params,
        losses=losses,
        held_out=held_out,
        tokens_per_second=meter.tokens_per_second,
        peak_flops=peak,
        mfu=meter.tokens_per_second * flops / peak,
        first_step_seconds=meter.first,
        finished=len(losses) == steps,
    )


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up, then a cosine to 1/20."""
    warmup = min(WARMUP, steps // 5 + 1)
    rest = (step + 1 - warmup) / max(1, steps - warmup)
    return min((step + 1) / warmup, 0.05 + 0.95 * (1 + cos(pi * min(1.0, max(0.0, rest)))) / 2)


def measured_peak(framework: str, device: Any = None) -> float:
    """FLOP/s of a large float32 matmul in that framework on that device, the best of several."""
    noise = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    array = from_numpy(noise, framework, device=device)
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
    """Times steps; the first compiles and does not count for the speed."""

    def __init__(self, tokens: int) -> None:
        self.first = 0.0
        self._tokens, self._steps, self._seconds = tokens, 0, 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._began
        if not self.first:
            self.first = elapsed
        else:
            self._steps, self._seconds = self._steps + 1, self._seconds + elapsed

    @property
    def tokens_per_second(self) -> float:
        """Of the steps after the first; 0 before there is one."""
        return self._tokens * self._steps / self._seconds if self._steps else 0.0


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
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
def _bar(framework: str, start: int, steps: int, visible: bool) -> Iterator[Callable[[int, str], None]]:
    """A function of the steps done and a text, which a progress bar shows."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description} {task.fields[state]}")
    with Progress(BarColumn(12), MofNCompleteColumn(), text, TimeRemainingColumn(), disable=not visible) as bar:
        task = bar.add_task(framework, total=steps, completed=start, state="")
        yield lambda done, state: bar.update(task, completed=done, state=state)


def _check(config: Config, framework: str, **counts: int) -> None:
    if framework not in ("torch", "jax"):
        hint = "; NumPy takes no gradients" if framework == "numpy" else ""
        raise ValueError(f"framework: got {framework!r}; it must be torch or jax{hint}")
    if config.vocab_size < VOCAB_SIZE:
        raise ValueError(f"config: vocab_size is {config.vocab_size}; the tokens are bytes, so it must be at least 256")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: got {count}; it must be at least 1")
    if counts["seq"] > config.max_seq_len:
        raise ValueError(f"seq: got {counts['seq']}; it must be at most the config's max_seq_len, {config.max_seq_len}")
