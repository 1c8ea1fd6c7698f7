"""`crosstile plan`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("plan")(plan_command)


def plan_command(
    model: Annotated[str, typer.Option(help="A folder with a config.json, or a known model: llama-3-8b.")],
    chips: Annotated[str, typer.Option(help="A kind of chip and the shape of the pod: v5e:16x16, v5p:4x8x8.")],
    step: Annotated[str, typer.Option(help="train, prefill or decode.")] = "train",
    batch: Annotated[int | None, typer.Option(help="Sequences of all devices together. Searched without.")] = None,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence; of decode, those in the cache.")] = 4096,
    stage: Annotated[int, typer.Option(help="Stages of a pipeline, in training.")] = 1,
    microbatches: Annotated[int, typer.Option(help="That pass the stages; 0 is as many as stages.")] = 0,
    data: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    fsdp: Annotated[
        int | None, typer.Option(help="Shards of the weights. What is left of the devices without.")
    ] = None,
    expert: Annotated[int, typer.Option(help="Groups of experts.")] = 1,
    context: Annotated[int, typer.Option(help="Pieces of a sequence.")] = 1,
    tensor: Annotated[int | None, typer.Option(help="Pieces of a layer. Searched without.")] = None,
    context_form: Annotated[str, typer.Option(help="gather, ring or ulysses.")] = "gather",
    remat: Annotated[str | None, typer.Option(help="none, products, full or offload. Searched without.")] = None,
    tries: Annotated[int, typer.Option(min=1, help="How many that fit are compiled, the most promising first.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file too.")] = None,
) -> None:
    """Compile a whole sharded step for a pod that is not here, and predict its memory, time, MFU and cost.

    Exit code 1: nothing fits. Exit code 2: the compiler is missing, or refuses.
    """
    from rich.console import Console

    from crosstile.models.config import Config
    from crosstile.models.known import known

    from . import plan_report
    from .ici import pod
    from .plan import PlanError, search
    from .published import published

    console = Console(width=160)
    try:
        config = Config.from_pretrained(model) if Path(model).is_dir() else known(model)
        where = pod(chips)
        fixed = {"stage": stage, "data": data, "expert": expert, "context": context}
        options = {"microbatches": microbatches, "context_form": context_form}
        plans = search(
            config,
            where,
            step,
            seq,
            batches=[] if batch is None else [batch],
            meshes=_meshes(where.devices, fixed, options, fsdp, tensor),
            remats=[] if remat is None else [remat],
            tries=tries,
            tell=lambda plan: console.print(plan_report.line(plan), style="dim", highlight=False, soft_wrap=True),
        )
    except (ValueError, PlanError, OSError) as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    plan_report.show(plans, published(model, where, seq) if step == "train" else None, console)
    if json_file:
        plan_report.write_json(plans, json_file)
    if not plans[0].fits:
        raise typer.Exit(1)


def _meshes(
    devices: int, fixed: dict[str, Any], options: dict[str, Any], fsdp: int | None, tensor: int | None
) -> list[Any]:
    """The mesh that the options say; none where they leave it open."""
    from crosstile.models.sharding import Parallel

    asked = any(size > 1 for size in fixed.values()) or options != {"microbatches": 0, "context_form": "gather"}
    if fsdp is None and tensor is None and not asked:
        return []
    others = prod(fixed.values()) * (tensor or 1)
    if fsdp is None and devices % others:
        raise ValueError(f"the other axes have {others} devices, which do not divide {devices}: change one of them")
    return [Parallel(**fixed, **options, fsdp=devices // others if fsdp is None else fsdp, tensor=tensor or 1)]
