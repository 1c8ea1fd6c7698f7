"""Training: the loop around a framework's step, with held-out loss, checkpoints and exact resumption.

Every loss is a function of the recipe, the model and the step, so a run that was interrupted and resumed has the losses
of one that was not. The learning rate follows the steps, never the clock: a budget in seconds only says where to stop,
and the run can be resumed from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import cos, log, pi
from pathlib import Path
from typing import Any

from . import checkpoint, processes, transformer
from .config import Config
from .console import bar, interruptible
from .data import VOCAB_SIZE, Corpus, standard_library
from .learners import Learner, make_learner
from .metrics import Metrics
from .packing import Batch, Batches
from .profiling import Profile
from .recipe import BYTES, STANDARD_LIBRARY, Recipe, settings
from .run import Run
from .speed import Meter, measured_peak
from .texts import read_texts
from .tokenizer import BYTES as BYTE_TOKENIZER
from .tokenizer import load_tokenizer

INTERRUPTED = 2  # why a run stops early; 1 is that its time is over


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
        peak_flops: a second, of a matmul of the framework on this device in the recipe's precision, measured at the
            start.
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
    framework: str | None = None,
    *,
    recipe: Recipe | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    batch: int | None = None,
    seq: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    device: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    corpus: Corpus | None = None,
    profile: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> Result:
    """Train a model; without arguments one of bytes on the Python standard library's sources.

    Args:
        config: the model; None is the recipe's.
        framework: "torch" or "jax", in the place of the recipe's; so are steps, batch, seq, learning_rate and seed.
        recipe: what the run is; None is the recipe of all defaults.
        steps: of the whole schedule.
        seconds: stop after the step that uses them up, compilation included; None takes all steps.
        batch: rows a step.
        seq: tokens a row.
        learning_rate: its peak.
        seed: of the weights and the batches.
        device: of torch or JAX; None is torch's GPU if it has one, else the framework's default.
        out: folder of the run: see `run`. None keeps nothing.
        resume: continue the run in `out` from its last checkpoint, or begin it if there is none.
        corpus: the text; None is what the recipe names.
        profile: record some steps into `out/profile`: see `profiling`.
        on_step: called with the number and the loss of each step.
        progress: show a bar.

    Returns:
        The losses and the parameters.

    Raises:
        ValueError: an argument out of range, a run in `out` and no `resume`, or one with other settings.
        ImportError: a library that the recipe needs is not here.
        KeyboardInterrupt: after Ctrl-C, once the step is done and its checkpoint written; a second one does not wait
            for the step.
    """
    recipe = _with(recipe or Recipe(), framework, steps, batch, seq, learning_rate, seed)
    config = config or recipe.model.read()
    _check(recipe, config, profile, out)
    device = processes.join(recipe, device)
    first = processes.is_first(recipe.framework)
    corpus = corpus or _corpus(recipe, config)
    batches = Batches(corpus, recipe.data.packing, recipe.data.batch, recipe.data.seq, recipe.seed)
    run = metrics = None
    if out is not None:
        fixed = {**settings(recipe), "config": asdict(config), "corpus": corpus.digest}
        run = Run(Path(out), fixed, resume, recipe.checkpoint)
        metrics = Metrics(run.folder, run.last_step, recipe.metrics.tensorboard, writes=first)
    start = run.last_step if run else 0
    learner = make_learner(recipe, _weights(recipe, config, device, anew=start == 0), config)
    if run and start:
        learner.restore(run.state(learner.state()))

    losses, held_out = metrics.history() if metrics else ([], [])
    evaluation = batches.held_out(recipe.metrics.evaluated)
    peak = measured_peak(recipe.framework, device, recipe.precision) * recipe.parallel.devices
    flops, meter = config.flops_per_token(recipe.data.seq), Meter()
    profiler = Profile(recipe.framework, Path(out or "") / "profile", start) if profile and first else None

    def evaluate(step: int) -> None:
        held_out.append((step, held_out_bits(learner, evaluation, corpus)))
        if metrics:
            metrics.log({"step": step, "held_out_bits": held_out[-1][1]})

    with ExitStack() as stack:
        for one in (metrics, run):
            if one:
                stack.enter_context(one)
        interrupted = stack.enter_context(interruptible())
        show = stack.enter_context(bar(recipe.framework, start, recipe.steps, progress and first))
        if not held_out:
            evaluate(0)
        began, asked = time.perf_counter(), 0
        for step in range(start, recipe.steps):
            if profiler:
                profiler.before(step)
            rate, before = learning_rate_at(step, recipe), time.perf_counter()
            rows = batches.at(step)
            taken = learner.step(rows, rate)
            meter.add(int(rows.counted.sum()), time.perf_counter() - before)
            losses.append(taken.loss)
            done, speed = step + 1, meter.tokens_per_second
            measured = {"loss": taken.loss, "gradient_norm": taken.gradient_norm, "learning_rate": rate}
            if metrics:
                metrics.log({"step": done, **measured, "tokens_per_second": speed, "mfu": speed * flops / peak})
            bits = taken.loss / log(2) / corpus.bytes_per_token
            show(done, f"{bits:.2f} bits/byte  {speed:,.0f} token/s  MFU {speed * flops / peak:.0%}")
            if on_step:
                on_step(done, taken.loss)
            over = seconds is not None and time.perf_counter() - began >= seconds
            asked = processes.as_the_first(recipe.framework, INTERRUPTED if interrupted.is_set() else int(over))
            stop = done == recipe.steps or asked > 0
            if asked != INTERRUPTED and (stop or done % recipe.metrics.evaluate_every == 0):
                evaluate(done)
            if run and (stop or done % recipe.checkpoint.every == 0):
                run.save(done, learner.state(), config, _tokenizer_folder(recipe))
            if stop:
                break
        if profiler:
            profiler.end()
    if asked == INTERRUPTED:
        raise KeyboardInterrupt
    return Result(
        framework=recipe.framework,
        config=config,
        params=learner.params,
        losses=losses,
        held_out=held_out,
        tokens_per_second=meter.tokens_per_second,
        peak_flops=peak,
        mfu=meter.tokens_per_second * flops / peak,
        first_step_seconds=meter.first_step_seconds,
        finished=len(losses) == recipe.steps,
    )


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """That of a step, the first 0: see `schedule`."""
    options = recipe.optimizer
    return options.learning_rate * schedule(step, recipe.steps, options.warmup, options.floor)


def schedule(step: int, steps: int, warmup: int = 50, floor: float = 0.05) -> float:
    """The share of the peak learning rate: a linear warm-up, then a cosine to `floor`."""
    warmup = max(1, min(warmup, steps // 5 + 1))
    rest = (step + 1 - warmup) / max(1, steps - warmup)
    return min((step + 1) / warmup, floor + (1 - floor) * (1 + cos(pi * min(1.0, max(0.0, rest)))) / 2)


def held_out_bits(learner: Learner, batches: list[Batch], corpus: Corpus) -> float:
    """The loss on all predicted tokens of the batches, in bits per byte."""
    counts = [int(batch.counted.sum()) for batch in batches]
    nats = sum(count * learner.evaluate(batch) for count, batch in zip(counts, batches, strict=True)) / sum(counts)
    return nats / log(2) / corpus.bytes_per_token


def _with(
    recipe: Recipe,
    framework: str | None,
    steps: int | None,
    batch: int | None,
    seq: int | None,
    learning_rate: float | None,
    seed: int | None,
) -> Recipe:
    """The recipe with these in the place of its own."""

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    data = replace(recipe.data, **given(batch=batch, seq=seq))
    optimizer = replace(recipe.optimizer, **given(learning_rate=learning_rate))
    return replace(recipe, data=data, optimizer=optimizer, **given(framework=framework, steps=steps, seed=seed))


def _weights(recipe: Recipe, config: Config, device: Any, anew: bool) -> Any:
    """The float32 parameters that training begins with; of a run that goes on only their shapes matter."""
    if anew and recipe.model.checkpoint:
        return checkpoint.load(recipe.model.checkpoint, recipe.framework, "float32", device, quantize=False)[0]
    return transformer.init(config, recipe.seed, recipe.framework, device=device)


def _corpus(recipe: Recipe, config: Config) -> Corpus:
    data = recipe.data
    if data.sources == (STANDARD_LIBRARY,):
        return standard_library(data.held_out)
    folder = _tokenizer_folder(recipe)
    tokenizer = load_tokenizer(folder) if folder else BYTE_TOKENIZER
    if folder and tokenizer is BYTE_TOKENIZER:
        raise ValueError(f"data.tokenizer: {folder} holds no tokenizer.json and no older files of one")
    end = config.end_tokens[0] if config.end_tokens else None
    return read_texts(
        data.sources,
        tokenizer,
        config.vocab_size,
        end=0 if end is None and not folder else end,
        field=data.field,
        held_out=data.held_out,
    )


def _tokenizer_folder(recipe: Recipe) -> Path | None:
    return None if recipe.data.tokenizer == BYTES else Path(recipe.data.tokenizer)


def _check(recipe: Recipe, config: Config, profile: bool, out: str | Path | None) -> None:
    if recipe.data.tokenizer == BYTES and config.vocab_size < VOCAB_SIZE:
        raise ValueError(f"config: vocab_size is {config.vocab_size}; the tokens are bytes, so it must be at least 256")
    if recipe.data.seq > config.max_seq_len:
        raise ValueError(
            f"data.seq: got {recipe.data.seq}; it must be at most the config's max_seq_len, {config.max_seq_len}"
        )
    if profile and out is None:
        raise ValueError("profile: got True without out; the profile is written into the run's folder")
