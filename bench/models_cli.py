"""`crosstile speed` and `crosstile batches`: models, measured on the machine at hand."""

from __future__ import annotations

from typing import Annotated

import typer

FAILED = 1


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command("speed")(speed_command)
    app.command("batches")(batches_command)


def speed_command(
    rounds: Annotated[int, typer.Option(min=4, help="How often each contestant has its turn.")] = 9,
    layers: Annotated[int, typer.Option(min=1, help="Of the Llama that is timed.")] = 6,
    hidden: Annotated[int, typer.Option(min=64, help="Its width, a multiple of 64.")] = 512,
    only: Annotated[str | None, typer.Option(help="training or decoding. Both without.")] = None,
) -> None:
    """Time training and generating beside transformers with SDPA and torch.compile, on this CPU.

    Exit code 1: ours is slower than the bar says.
    """
    from rich.console import Console

    from . import model_speed
    from .model_speed import DECODING, TRAINING, Model, Sizes

    if only not in (None, "training", "decoding"):
        raise typer.BadParameter(f"got {only!r}; it must be training or decoding", param_hint="--only")
    if hidden % 64:
        raise typer.BadParameter(f"got {hidden}; it must be a multiple of 64", param_hint="--hidden")
    heads = hidden // 64
    inner = hidden * 8 // 3 // 32 * 32
    sizes = Sizes(layers, hidden, inner, heads, heads // 2 if heads % 2 == 0 else heads)
    model, console, fine = Model(sizes), Console(width=140), True
    if only != "decoding":
        found = model_speed.training(model, rounds)
        title = f"a training step of {sizes.batch} x {sizes.seq} tokens, float32"
        fine &= model_speed.show(title, found, TRAINING, sizes.batch * sizes.seq, 0, console)
    if only != "training":
        found = model_speed.decoding(model, rounds)
        title = f"a token after a prompt of {sizes.prompt}, {sizes.tokens} in all, float32"
        fine &= model_speed.show(title, found, DECODING, 1, model_speed.weight_bytes(model), console)
    if not fine:
        raise typer.Exit(FAILED)


def batches_command(
    contestant: Annotated[
        list[str] | None, typer.Option(help="torch, 'torch compiled' or jax; repeat it. All without.")
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="Rows of a batch; repeat it. 1 to 32 without.")] = None,
    seq: Annotated[int, typer.Option(min=16, help="Tokens of a row.")] = 128,
    rounds: Annotated[int, typer.Option(min=4, help="Steps of each kind.")] = 12,
) -> None:
    """Time a token of training in small and large batches, and padding beside packing; count what is compiled."""
    from rich.console import Console

    from . import batches

    chosen = contestant or list(batches.CONTESTANTS)
    if odd := [name for name in chosen if name not in batches.CONTESTANTS]:
        raise typer.BadParameter(f"got {odd[0]!r}; it must be one of {', '.join(batches.CONTESTANTS)}")
    console, sizes = Console(width=140), size or [1, 2, 4, 8, 16, 32]
    batches.show(f"batches of rows of {seq} tokens", batches.by_size(chosen, sizes, seq, rounds), console)
    found = batches.by_packing(chosen, 8, seq, rounds)
    batches.show(f"documents of mixed lengths in 8 rows of {seq} tokens", found, console)
