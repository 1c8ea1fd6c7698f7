"""The command `crosstile`. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .programs import Job

app = typer.Typer(
    name="crosstile",
    help="Fused transformer kernels for GPUs and TPUs: train, verify and compile, on a machine that has neither.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FAILED, UNABLE = 1, 2


@app.command("compile")
def compile_command(
    target: Annotated[
        list[str] | None, typer.Option(help="A chip, such as sm_90 or v6e; repeat it. All ten without.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as attention; repeat it. All without.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A named shape, such as llama-3-8b; repeat it.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16 (the default), float16 or float32; repeat it.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A few shapes only: attention, with a window and sinks, in pages; one matmul."),
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="The long list too: every feature of attention, every kind of pages.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Compilations side by side.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file too.")] = None,
) -> None:
    """Compile every kernel with the real compilers for chips that are not here, and hold it to its budget.

    Exit code 1: a kernel spills, lacks matrix instructions or exceeds a budget. Exit code 2: a compiler is missing.
    """
    from crosstile.kernels.tiles.targets import TARGETS

    from . import compile as compiling
    from .programs import DTYPES, jobs_for
    from .progress import bars
    from .shapes import QUICK, get_shape

    targets = _known(target, "--target", list(TARGETS))
    dtypes = _known(dtype, "--dtype", list(DTYPES), DTYPES[:1])
    shapes = [get_shape(name) for name in _shape_names(op, shape, every, QUICK if quick else None)]
    console = _console()
    try:
        compiling.check_compilers(targets)
    except compiling.NoCompilerError as error:
        _stop(str(error))
    with bars(console) as progress:
        report = compiling.compile_jobs(jobs_for(targets, shapes, dtypes), progress, processes)
    compiling.show(report, console)
    if json_file:
        compiling.write_json(report, json_file)
        console.print(f"facts written to {json_file}", highlight=False)
    if report.failures:
        raise typer.Exit(FAILED)


@app.command("verify")
def verify_command(
    framework: Annotated[list[str] | None, typer.Option(help="torch or jax; repeat it. Both without.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="triton, pallas or library; repeat it. All without.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op, such as attention; repeat it. All without.")] = None,
) -> None:
    """Check every kernel against NumPy in float64, forward and backward, in interpret mode on this CPU."""
    _on_this_cpu()
    from . import verify
    from .cases import CASES
    from .progress import bars

    console = _console()
    frameworks = _known(framework, "--framework", ["torch", "jax"])
    kernels = _known(kernel, "--kernel", list(verify.KERNELS))
    ops = _known(op, "--op", list(dict.fromkeys(case.op for case in CASES)))
    try:
        with bars(console) as progress:
            checks = verify.verify(frameworks, kernels, [case for case in CASES if case.op in ops], progress)
    except verify.MissingError as error:
        _stop(str(error))
    verify.show(checks, console)
    if not all(check.passes for check in checks):
        raise typer.Exit(FAILED)


@app.command("bench")
def bench_command(
    rounds: Annotated[int, typer.Option(min=4, help="Pairs of timings of each call, on this CPU.")] = 200,
    device: Annotated[str, typer.Option(help="cpu, or cuda: time named shapes on this machine's GPU.")] = "cpu",
    op: Annotated[list[str] | None, typer.Option(help="On a GPU: an op; repeat it. All without.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="On a GPU: a named shape; repeat it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="On a GPU: the long list of shapes.")] = False,
    dtype: Annotated[str, typer.Option(help="On a GPU: bfloat16, float16 or float32.")] = "bfloat16",
    packed: Annotated[
        Path | None, typer.Option(help="On a GPU: launch programs that `crosstile pack` compiled, from this folder.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="On a GPU: write the figures to this file too.")
    ] = None,
) -> None:
    """Measure the cost of a call above torch's own op, and of importing crosstile; or every op on this machine's GPU.

    Exit code 1: over the bar, or a result on the GPU is wrong.
    """
    if device == "cpu":
        from . import overhead

        if not overhead.show(overhead.torch_overheads(rounds), overhead.import_seconds(), _console()):
            raise typer.Exit(FAILED)
        return
    if device != "cuda":
        raise typer.BadParameter(f"got {device!r}; it must be cpu or cuda", param_hint="--device")
    from . import chip
    from .shapes import get_shape

    names = _shape_names(op, shape, every)
    try:
        with chip.launcher(packed):
            rows = list(chip.bench([get_shape(name) for name in names], _known([dtype], "--dtype", _dtypes())[0]))
    except chip.NoChipError as error:
        _stop(str(error))
    chip.show(rows, _console())
    if json_file:
        chip.write_json(rows, json_file)
    if not all(row.passes for row in rows):
        raise typer.Exit(FAILED)


@app.command("pack")
def pack_command(
    folder: Annotated[Path, typer.Argument(help="Where the programs go.")],
    target: Annotated[str, typer.Option(help="An NVIDIA chip: sm_80, sm_90 or sm_100.")] = "sm_90",
    op: Annotated[list[str] | None, typer.Option(help="An op, such as attention; repeat it. All without.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A named shape, such as llama-3-8b; repeat it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="The long list of shapes.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Compile the programs of named shapes into a folder, for `bench --device cuda --packed FOLDER` elsewhere."""
    from crosstile.kernels.tiles.targets import TARGETS

    from . import packed
    from .programs import jobs_for, unsupported
    from .progress import bars
    from .shapes import get_shape

    nvidia = [name for name, chip in TARGETS.items() if chip.platform == "cuda"]
    chosen = _known([target], "--target", nvidia)
    dtypes = _known([dtype], "--dtype", _dtypes())
    jobs = [
        job
        for job in jobs_for(chosen, [get_shape(name) for name in _shape_names(op, shape, every)], dtypes)
        if not unsupported(job)
    ]
    console = _console()
    with bars(console) as progress:
        task = progress.add_task("pack", total=len(jobs), current="")
        for job in packed.pack(jobs, folder):
            progress.update(task, advance=1, current=str(job))
    console.print(f"compiled for {target}, not measured: {len(list(folder.glob('*.cubin')))} programs in {folder}")


@app.command("roofline")
def roofline_command(
    target: Annotated[list[str] | None, typer.Option(help="A chip; repeat it. All ten without.")] = None,
) -> None:
    """Predict, from the datasheets, the most that each named shape can reach on each chip."""
    from crosstile.kernels.tiles.targets import TARGETS

    from . import roofline

    names = _known(target, "--target", list(TARGETS))
    roofline.show(roofline.bounds([TARGETS[name] for name in names]), _console())


Ops = Annotated[list[str] | None, typer.Option("--op", help="An op, such as attention; repeat it. All without.")]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="A named shape; repeat it. The everyday ones without.")
]
Directions = Annotated[list[str] | None, typer.Option("--direction", help="forward, saving or backward; repeat it.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--config", help="A field of the tiles and its value, such as forward.block_q=512; repeat it."),
]
Predictions = Annotated[Path | None, typer.Option("--json", help="Write the predictions to this file too.")]


@app.command("cycles")
def cycles_command(
    op: Ops = None,
    target: Annotated[list[str] | None, typer.Option(help="A TPU, such as v5e; repeat it. All without.")] = None,
    shape: Shapes = None,
    direction: Directions = None,
    dtype: Dtype = "bfloat16",
    config: Fields = None,
    lines: Annotated[int, typer.Option(min=0, help="Lines of Python to show for each kernel.")] = 12,
    json_file: Predictions = None,
    validate: Annotated[
        Path | None, typer.Option(help="Compare with tokamax's measurements, from a folder of `tokamax_dumps`.")
    ] = None,
) -> None:
    """Predict how many cycles each kernel takes on a TPU, by unit and by line of Python, from its machine code."""
    from . import cycles_report, validation
    from .cores import CORES

    if validate:
        validation.show(validation.compare(validate), _console())
        return
    jobs = _jobs(op, _known(target, "--target", list(CORES)), shape, direction, dtype)
    found, good = cycles_report.run(jobs, _tiles(config), lines, _console())
    if json_file:
        cycles_report.write_json(found, json_file)
    if not good:
        raise typer.Exit(FAILED)


@app.command("issue")
def issue_command(
    op: Ops = None,
    target: Annotated[list[str] | None, typer.Option(help="A GPU, such as sm_90; repeat it. All without.")] = None,
    shape: Shapes = None,
    direction: Directions = None,
    dtype: Dtype = "bfloat16",
    config: Fields = None,
    json_file: Predictions = None,
    validate: Annotated[
        Path | None, typer.Option(help="Compare with tokamax's measurements, from a folder of `tokamax_triton`.")
    ] = None,
) -> None:
    """Predict how long each kernel takes on a GPU, and what limits it, from its machine code and its control words."""
    from . import cycles_report, issue_report, issue_validation
    from .gpus import GPUS

    if validate:
        issue_validation.show(issue_validation.compare(validate), _console())
        return
    jobs = _jobs(op, _known(target, "--target", list(GPUS)), shape, direction, dtype)
    found, good = issue_report.run(jobs, _tiles(config), _console())
    if json_file:
        cycles_report.write_json(found, json_file, issue_report.SCHEMA)
    if not good:
        raise typer.Exit(FAILED)


def _jobs(
    op: list[str] | None, targets: list[str], shape: list[str] | None, direction: list[str] | None, dtype: str
) -> list[Job]:
    """Every direction that was asked for of every shape on every target."""
    from .programs import directions, jobs_for
    from .shapes import get_shape

    shapes = [get_shape(name) for name in _shape_names(op, shape, False)]
    ways = _known(direction, "--direction", sorted({way for found in shapes for way in directions(found)}))
    kinds = _known([dtype], "--dtype", _dtypes())
    return [job for job in jobs_for(targets, shapes, kinds) if job.direction in ways]


def _tiles(given: list[str] | None) -> dict[str, int]:
    found = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not equals or not value.isdigit():
            raise typer.BadParameter(f"got {item!r}; it must be FIELD=NUMBER", param_hint="--config")
        found[name] = int(value)
    return found


@app.command("tune")
def tune_command(
    op: Annotated[
        list[str] | None, typer.Option(help="An op, such as attention; repeat it. All that have tables.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A chip, such as v6e; repeat it. All TPUs without, or the chip that is here."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A named shape, also with other sizes, as gemma-2-2b@q_len=512,kv_len=512; repeat it."),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="So many tokens in place of a training shape's own; repeat it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds for all; a later run goes on where this one stops.")
    ] = 600,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing: say how near the tiles in use are.")
    ] = False,
    user: Annotated[
        bool, typer.Option("--user", help="Write to your own tables rather than to those of the package.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda: time on this machine's GPU, of NVIDIA or AMD; implies --user.")
    ] = None,
) -> None:
    """Search the tiles of named shapes and write them to the tables that calls look into.

    Without a chip it compiles for an absent one and predicts; with --device it times. Exit code 2: there is no chip.
    """
    from crosstile.kernels.tiles import tuned
    from crosstile.kernels.tiles.targets import TARGETS

    from . import chip, ladders, tune
    from .cores import CORES
    from .search import predicting

    ops, kind = _known(op, "--op", list(ladders.OPS)), _known([dtype], "--dtype", _dtypes())[0]
    trials = tune.Trials(predicting, "predicted")
    if device is None:
        chips = _known(target, "--target", list(TARGETS), list(CORES))
    elif device == "cuda":
        try:
            trials, here = tune.Trials(chip.timing, "measured"), chip.target_here()
        except chip.NoChipError as error:
            _stop(str(error))
        chips = _known(target, "--target", [here.name])
    else:
        raise typer.BadParameter(f"got {device!r}; it must be cuda", param_hint="--device")
    try:
        asked = [(o, c, name) for o in ops for c in chips for name in tune.shapes_of(o, shape, length or ())]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from error
    table = tuned.user_table if user or device else tuned.package_table
    rows, console = [], _console()
    by = "predicted, not measured" if device is None else f"measured on {TARGETS[chips[0]].chip}"
    for found in tune.run(asked, kind, trials, None if dry_run else table, budget):
        if isinstance(found, str):
            console.print(found, highlight=False, soft_wrap=True)
        else:
            rows.append(found)
            console.print("  ".join(tune.cells(found)), style="dim", highlight=False, soft_wrap=True)
    tune.show(rows, by, console)


@app.command("standings")
def standings_command(
    run: Annotated[bool, typer.Option("--run", help="Search and predict again; known trials are kept.")] = False,
    chip: Annotated[list[str] | None, typer.Option(help="v5e, v6e or v7x; repeat it. All without.")] = None,
    contest: Annotated[
        list[str] | None, typer.Option(help="A contest, such as llama-3-8b-backward; repeat it. All without.")
    ] = None,
    contestant: Annotated[
        list[str] | None, typer.Option(help="With --run: crosstile or a peer, such as splash; repeat it.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="With --run: the longest walk of one contestant's tiles.")] = 300.0,
    tokamax: Annotated[
        str | None, typer.Option(help="With --run: an interpreter that has tokamax; its kernels are left out without.")
    ] = None,
    csv_file: Annotated[Path, typer.Option("--csv", help="The results.")] = Path("docs/tpu_standings.csv"),
    page: Annotated[Path | None, typer.Option(help="Write the tables into this page too.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every contestant to this file too.")] = None,
) -> None:
    """Compare our TPU kernels with those of jax and tokamax, each with its best tiles, by predicted time.

    Shows the results in the CSV file. Exit code 2: there are none.
    """
    from . import standings, standings_table
    from .contests import CHIPS, CONTESTS, get_contest

    chips = _known(chip, "--chip", list(CHIPS))
    names = _known(contest, "--contest", [item.name for item in CONTESTS])
    console = _console()
    if run:
        contests = [get_contest(name) for name in names]
        for entry in standings.run(chips, contests, contestant, seconds=seconds, tokamax=tokamax):
            standings.write_csv(standings.merged(standings.read_csv(csv_file), [entry]), csv_file)
            said = entry.refusal or f"{entry.microseconds:.1f} µs, {entry.tiles}"
            console.print(f"{entry.chip} {entry.contest} {entry.contestant}: {said}", highlight=False, markup=False)
    entries = standings.read_csv(csv_file)
    if not entries:
        _stop(f"no results in {csv_file}: run `crosstile standings --run`, or name the file with --csv")
    if page:
        standings_table.write_page(entries, page)
    shown = [entry for entry in entries if entry.chip in chips and entry.contest in names]
    standings_table.show(shown, console)
    if json_file:
        standings.write_json(shown, json_file)


@app.command("explain")
def explain_command(
    op: Annotated[str, typer.Argument(help="An op, such as attention.")],
    shape: Annotated[str | None, typer.Option(help="A named shape; the op's first without.")] = None,
    framework: Annotated[str, typer.Option(help="numpy, torch or jax.")] = "torch",
    target: Annotated[str | None, typer.Option(help="A chip, as if it were here.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Say which implementation a call would run, with which tiles and why, and why not the others."""
    from .explaining import explain

    try:
        _console().print(explain(op, shape, framework, target, dtype), highlight=False, soft_wrap=True)
    except (ValueError, ModuleNotFoundError) as error:
        _stop(str(error))


@app.command("demo")
def demo_command(
    seconds: Annotated[float, typer.Option(min=1, help="Training time in each framework.")] = 60.0,
    folder: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("report"),
) -> None:
    """The whole of it: train in torch and JAX, generate, verify, compile for ten chips, and write a report."""
    _on_this_cpu()
    from .demo import demo

    if not demo(folder, seconds, _console()):
        raise typer.Exit(FAILED)


def _dtypes() -> list[str]:
    from .programs import DTYPES

    return list(DTYPES)


def _shape_names(op: list[str] | None, shape: list[str] | None, every: bool, default: Any = None) -> list[str]:
    """The named shapes of the chosen ops: those given, else the default, else every day's or all."""
    from .shapes import OPS, SHAPES, get_shape

    ops = _known(op, "--op", list(OPS))
    everyday = [item.name for item in SHAPES if item.everyday or every]
    names = _known(shape, "--shape", [item.name for item in SHAPES], default or everyday)
    found = [name for name in names if get_shape(name).op in ops]
    if not found:
        raise typer.BadParameter(f"no shape named {', '.join(names)} is of {', '.join(ops)}")
    return found


def _on_this_cpu() -> None:
    """Before jax and triton are imported: no search for chips, and no chatter about it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def _known(given: list[str] | None, option: str, names: list[str], default: Any = None) -> list[str]:
    """The values given, each one of the names; else the default, else all names."""
    for value in given or ():
        if value not in names:
            raise typer.BadParameter(f"got {value!r}; it must be one of {', '.join(names)}", param_hint=option)
    return list(dict.fromkeys(given or default or names))


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _stop(message: str) -> None:
    typer.secho(message, fg=typer.colors.RED, err=True)
    raise typer.Exit(UNABLE)


def _register_others() -> None:
    from crosstile.models.cli import register

    from . import models_cli, plan_cli

    register(app)
    plan_cli.register(app)
    models_cli.register(app)


_register_others()

if __name__ == "__main__":
    app()
