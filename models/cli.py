"""`crosstile train`, `crosstile export` and `crosstile generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from crosstile.quantization import Quantized

from .arrays import tree_leaves
from .checkpoint import WEIGHTS, load
from .config import Config
from .data import VOCAB_SIZE
from .generate import stream
from .processes import is_first, leave
from .recipe import read_recipe
from .run import export, last_checkpoint, last_step
from .tokenizer import BYTES, Tokenizer, load_tokenizer
from .train import Result, train


class Framework(StrEnum):
    """Where a model runs."""

    torch = "torch"
    jax = "jax"
    numpy = "numpy"


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command("train")(train_command)
    app.command("generate")(generate_command)
    app.command("export")(export_command)


def train_command(
    config: Annotated[Path | None, typer.Option(help="A recipe: see docs/train.toml. Default: the demo's.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value in the place of the recipe's.")
    ] = None,
    framework: Annotated[Framework | None, typer.Option(help="torch or jax.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/ and the recipe's name, or runs/demo.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or begin it.")] = False,
    steps: Annotated[int | None, typer.Option(help="Of the whole schedule.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop earlier, once this time is used up.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Its peak.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the batches.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Record some steps into the run's profile/.")] = False,
) -> None:
    """Train a transformer by a recipe; without one the demo, on the sources of Python's standard library."""
    folder = out or Path("runs") / (config.stem if config else "demo")
    flags: dict[str, Any] = {"framework": framework and framework.value, "steps": steps, "seed": seed}
    flags |= {"data.batch": batch, "data.seq": seq, "optimizer.learning_rate": learning_rate}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    try:
        recipe = read_recipe(config, [*(changes or []), *given])
        model = recipe.model.read()
        rows, tokens = recipe.data.batch, recipe.data.seq
        typer.echo(
            f"{model.num_params:,} parameters, {rows} x {tokens} tokens a step, {recipe.steps} steps, "
            f"in {recipe.framework}"
        )
        result = train(model, recipe=recipe, seconds=seconds, out=folder, resume=resume, profile=profile)
    except KeyboardInterrupt:
        typer.echo(f"Stopped after step {last_step(folder)}. The same command with --resume goes on.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    first = is_first(recipe.framework)
    leave(recipe.framework)
    if not first:
        return
    report(result)
    if not result.finished:
        typer.echo(f"Step {len(result.losses)} of {recipe.steps}: the same command with --resume goes on.")
    if profile:
        typer.echo(f"Profile: {folder / 'profile'}, for https://ui.perfetto.dev")
    typer.echo(f"Checkpoint: {last_checkpoint(folder)}")


def export_command(
    to: Annotated[Path, typer.Argument(help="Folder to write, in the Hugging Face layout.")],
    out: Annotated[Path, typer.Option(help="Folder of a run.")] = Path("runs/demo"),
) -> None:
    """Write the weights of a run's last checkpoint where `crosstile generate --model` and transformers read them."""
    try:
        source = export(out, to)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"{source} -> {to}")


def report(result: Result) -> None:
    """Print what a run did."""
    typer.echo(f"Held out: {result.bits_before:.3f} -> {result.bits_after:.3f} bits per byte")
    if result.tokens_per_second:
        typer.echo(
            f"Speed: {result.tokens_per_second:,.0f} token/s, MFU {result.mfu:.0%} of the "
            f"{result.peak_flops / 1e9:,.0f} GFLOP/s that a matmul of {result.framework} reached here"
        )


def generate_command(
    out: Annotated[Path, typer.Option(help="Folder of a run.")] = Path("runs/demo"),
    model: Annotated[Path | None, typer.Option(help="Folder of a checkpoint, in place of a run.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(help="How many tokens to append at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    framework: Annotated[Framework | None, typer.Option(help="Default: that of the run, else torch.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights. Default: as they are stored.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Keep the layers' matrices as int8, int4, ...")] = None,
) -> None:
    """Continue a text with a trained model, or with any checkpoint of a known family."""
    where = out if model is None else model
    run = where / "run.json"
    trained_in = json.loads(run.read_text("utf-8"))["framework"] if run.is_file() else "torch"
    try:
        folder = where if model is not None or (where / "config.json").is_file() else last_checkpoint(where)
        if run.is_file() and not (folder / WEIGHTS).is_file():
            raise ValueError(
                f"{folder}: has a state and no weights; `crosstile export --out {where} FOLDER` writes them"
            )
        params, config = load(folder, framework.value if framework else trained_in, dtype, quantize=quantize)
        tokenizer = load_tokenizer(folder)
        if tokenizer is BYTES and config.vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"{folder}: has {config.vocab_size} tokens and no tokenizer.json; without one a model is of bytes, "
                f"{VOCAB_SIZE} tokens"
            )
        _print_stream(params, config, tokenizer, prompt, tokens, temperature, seed)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None


def _print_stream(
    params: object, config: Config, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int
) -> None:
    rows = tokenizer.encode(prompt)[None]
    if not rows.size:
        raise ValueError("prompt: got an empty text; it must hold at least one token")
    if rows.size + tokens > config.max_seq_len:
        raise ValueError(f"tokens: got {tokens} after {rows.size} of the prompt; at most {config.max_seq_len} in all")
    typer.echo(prompt, nl=False)
    times: list[float] = []

    def drawn() -> Iterator[int]:
        for column in stream(params, config, rows, tokens, temperature, seed):
            times.append(time.perf_counter())
            if column[0] in config.end_tokens:
                return
            yield int(column[0])

    for piece in tokenizer.stream(drawn()):
        typer.echo(piece, nl=False)
    typer.echo()
    if len(times) > 2:  # the first comes from the prompt; in JAX the second waits for the compiler
        speed = (len(times) - 2) / (times[-1] - times[1])
        weights = sum(_bytes_of(array) for array in tree_leaves(params).values())
        typer.echo(f"{speed:,.0f} token/s, {speed * weights / 1e9:.2f} GB/s of weights read", err=True)


def _bytes_of(array: Any) -> int:
    """In memory; of quantised weights the codes and scales."""
    if isinstance(array, Quantized):
        return sum(part.nbytes for part in (array.values, array.scales, array.zeros) if part is not None)
    return int(array.nbytes)
