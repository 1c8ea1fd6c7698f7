"""`crosstile bench --device cuda`: named shapes on the chip of this machine, checked and timed beside their peers.

An error is that of `crosstile verify`, a multiple of the allowed one, against the framework's ops in float32. A time is
that of a CUDA graph of several calls, which leaves the host out (a peer that waits for the GPU in between can be none
and is called); the median of five runs, with the fastest and the slowest. The inputs are random, and larger than the L2
cache where the real ones are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from crosstile.kernels.tiles.targets import Target
from crosstile.kernels.tiles.tuned import changed_tiles

from .attention_shapes import AttentionShape
from .chip_peers import attention_of_float8, peers_of
from .cross_entropy_shapes import CrossEntropyShape
from .programs import Job
from .shape import Shape
from .shapes import get_shape
from .verify import EPSILON

_CALLS = 4  # in a graph, of a call that is no longer than
_SHORT_MILLISECONDS = 50.0
_RUNS = 5
_RUN_MILLISECONDS = 15.0
_PRODUCTS = (  # of a direction, in those of a forward: elsewhere, and in attention
    {"forward": 1.0, "backward": 2.0, "both": 3.0},
    {"forward": 1.0, "backward": 2.5},
)
_PEER_ERROR = 2.0  # as a multiple of what is allowed to ours: a peer that is further off computes something else


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median: float
    fastest: float
    slowest: float


@dataclass
class Row:
    """One direction of a shape: the error, whether two runs are bit-equal, and times; or why there are none."""

    shape: str
    op: str
    dtype: str
    direction: str
    error: float = 0.0
    multiple: float = 0.0
    repeats: bool = True
    flops: float = 0.0
    ours: Timing | None = None
    peers: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def passes(self) -> bool:
        """Whether the results were right, and the same twice."""
        return not self.problem and self.multiple <= 1 and self.repeats


class NoChipError(RuntimeError):
    """This machine has no GPU that torch can use."""


@contextmanager
def launcher(packed: Path | None) -> Iterator[None]:
    """Inside, programs come from that folder; None compiles them. Raises NoChipError where there is no GPU."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise NoChipError("no torch: pip install 'crosstile[torch]'")
    import torch

    if not torch.cuda.is_available():
        raise NoChipError("torch finds no GPU on this machine; `crosstile compile` needs none")
    if packed is None:
        yield
        return
    from crosstile.torch import launching, target_of

    from .packed import Packed

    with launching(Packed(packed, target_of(torch.empty(0, device="cuda")))):
        yield


def target_here() -> Target:
    """The chip of this machine. Raises NoChipError where there is none that torch can use."""
    with launcher(None):
        import torch

        from crosstile.torch import target_of

        return target_of(torch.empty(0, device="cuda"))


def timing(job: Job) -> Callable[[Mapping[str, int]], float]:
    """Trials of a job's tiles on this machine's GPU: the median time of a call.

    The trial raises RefusedError where the compiler refuses the tiles, or a program needs more than the chip has.
    """
    import torch

    from .programs import chosen_tiles
    from .search import RefusedError

    shape = get_shape(job.shape)
    arrays = random_arrays(shape, job.dtype, "cuda")
    leaves = shape.leaves(job.dtype)

    def evaluate(tiles: Mapping[str, int]) -> float:
        call = partial(shape.run, implementation="triton", config=changed_tiles(chosen_tiles(job), tiles))
        try:
            if job.direction == "saving":
                return _time(lambda: lambda: _differentiable(call, arrays, leaves)).median
            return _time(partial(_direction, call, arrays, leaves, job.direction)).median
        except Exception as refusal:  # whatever a compiler or a launch raises says that these tiles are none
            torch.cuda.synchronize()
            raise RefusedError(f"{type(refusal).__name__}: {str(refusal).splitlines()[0][:200]}") from refusal

    return evaluate


def bench(shapes: Sequence[Shape], dtype: str) -> Iterator[Row]:
    """Check and time each shape, the forward and, where there is one, the backward."""
    import torch

    for shape in shapes:
        try:
            yield from _bench(shape, dtype, "cuda")
        except (RuntimeError, ValueError) as problem:
            yield Row(shape.name, shape.op, dtype, "forward", problem=str(problem).splitlines()[0][:200])
        torch.cuda.empty_cache()


def _bench(shape: Shape, dtype: str, device: str) -> Iterator[Row]:
    import torch

    arrays = random_arrays(shape, dtype, device)
    leaves = shape.leaves(dtype)
    call = partial(shape.run, implementation="triton")
    peer = partial(shape.run, implementation="library")
    ours, again = (_results(call, arrays, leaves) for _ in range(2))
    if isinstance(shape, AttentionShape) and shape.float8:
        theirs, exact = ([attention_of_float8(shape, arrays, rounds=rounds)] for rounds in (True, False))
    else:
        theirs = _results(peer, arrays, leaves)
        exact = _results(peer, _in_float32(arrays, dtype), leaves)
    directions = {"forward": [0], "backward": list(range(1, len(ours)))}
    if isinstance(shape, CrossEntropyShape):  # a peer makes the gradients in its forward
        directions["both"] = directions["backward"]
    for direction, which in directions.items():
        if not which:
            continue
        found = [_compare(ours[i], theirs[i], exact[i], dtype) for i in which]
        row = Row(shape.name, shape.op, dtype, direction, max(e for e, _ in found), max(m for _, m in found))
        row.repeats = all(torch.equal(ours[i], again[i]) for i in which)
        row.flops = shape.flops * _PRODUCTS[shape.op == "attention"][direction]
        row.ours = _time(partial(_direction, call, arrays, leaves, direction))
        for name, other in peers_of(shape, direction).items():
            try:
                own = {array_name: array.clone() for array_name, array in arrays.items()}  # it may write over them
                if _compare(_results(other, own, [])[0], theirs[0], exact[0], dtype)[1] > _PEER_ERROR:
                    raise RuntimeError("it computes something else")
                row.peers[name] = _time(partial(_direction, other, own, leaves, direction))
            except Exception as refusal:  # whatever a peer raises, of a shape that it does not take, is its own
                row.refused[name] = str(refusal).splitlines()[0][:200]
        yield row


def _in_float32(arrays: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {name: array.float() if str(array.dtype) == f"torch.{dtype}" else array for name, array in arrays.items()}


def random_arrays(shape: Shape, dtype: str, device: str) -> dict[str, Any]:
    """The call's arrays: integers as the shape has them, floats normal, scales positive, small integers all of them."""
    import torch

    held = shape.integers()
    torch.manual_seed(0)

    def make(name: str, size: tuple[int, ...], kind: str) -> Any:
        array = drawn(name, shape.stored(name, size), kind)
        return array.swapaxes(-1, -2) if name in shape.turned else array

    def drawn(name: str, size: tuple[int, ...], kind: str) -> Any:
        if name in held:
            return torch.as_tensor(held[name].copy()).to(getattr(torch, kind)).to(device)
        if kind in ("int8", "uint8"):
            lowest, end = (-127, 128) if kind == "int8" else (0, 256)
            return torch.randint(lowest, end, size, dtype=getattr(torch, kind), device=device)
        normal = shape.deviation(name) * torch.randn(size, device=device)
        return (normal.abs() if name.endswith("_scale") else normal).to(getattr(torch, kind))

    return {name: make(name, size, kind) for name, (size, kind) in shape.arrays(dtype).items()}


def _results(function: Callable[[dict[str, Any]], Any], arrays: dict[str, Any], leaves: list[str]) -> list[Any]:
    """The first output, and the gradients."""
    import torch

    outs, variables = _differentiable(function, arrays, leaves)
    if not leaves:
        return [outs[0]]
    torch.manual_seed(1)
    dtype = variables[0].dtype
    # Not randn_like, which draws in the order of memory: results of other strides would have other gradients.
    gradients = [torch.randn(out.shape, device=out.device).to(dtype).to(out.dtype) for out in outs]
    return [outs[0].detach(), *torch.autograd.grad(outs, variables, gradients)]


def _differentiable(
    function: Callable[[dict[str, Any]], Any], arrays: dict[str, Any], leaves: list[str]
) -> tuple[tuple[Any, ...], list[Any]]:
    """What the function makes of the arrays, and those of the leaves, which have a gradient."""
    variables = [arrays[name].detach().requires_grad_() for name in leaves]
    out = function({**arrays, **dict(zip(leaves, variables, strict=True))})
    return (out if isinstance(out, tuple) else (out,)), variables


def _direction(
    function: Callable[[dict[str, Any]], Any], arrays: dict[str, Any], leaves: list[str], direction: str
) -> Callable[[], Any]:
    """The function's forward, its backward alone, or both, to be called again and again."""
    import torch

    if direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(arrays)

        return forward
    outs, variables = _differentiable(function, arrays, leaves)
    gradients = [torch.randn(out.shape, device=out.device).to(out.dtype) for out in outs]
    if direction == "both":
        return lambda: torch.autograd.grad(*_differentiable(function, arrays, leaves), gradients)
    return lambda: torch.autograd.grad(outs, variables, gradients, retain_graph=True)


def _compare(ours: Any, theirs: Any, exact: Any, dtype: str) -> tuple[float, float]:
    """(max-relative error, multiple of the allowed), as `verify.compare` but on the device."""
    our_max, our_rms = _errors(ours, exact)
    own_max, own_rms = _errors(theirs, exact)
    floor = 0.5 * EPSILON[dtype] + 4 * EPSILON["float32"]
    return our_max, max(our_max / (2 * own_max + floor), our_rms / (2 * own_rms + floor))


def _errors(array: Any, exact: Any) -> tuple[float, float]:
    import torch

    array, exact = array.double(), exact.double()
    difference = torch.nan_to_num((array - exact).abs(), nan=float("inf"))
    largest, square = exact.abs().max().clamp_min(1e-30), exact.square().mean().clamp_min(1e-60)
    return (difference.max() / largest).item(), (difference.square().mean() / square).sqrt().item()


def _time(prepare: Callable[[], Callable[[], Any]]) -> Timing:
    """The time of what `prepare` makes, on the stream that it made it on: a backward runs on that of its forward."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = prepare()
        function()
        calls = _CALLS if _milliseconds(function, 1) < _SHORT_MILLISECONDS else 1
    torch.cuda.current_stream().wait_stream(stream)
    replay = _recorded(function, stream, calls) or _repeated(function, calls)
    replay()
    once = _milliseconds(replay, 1)
    repeats = max(1, min(100, int(_RUN_MILLISECONDS / max(once, 1e-3))))
    times = [_milliseconds(replay, repeats) / calls * 1e3 for _ in range(_RUNS)]
    return Timing(median(times), min(times), max(times))


def _recorded(function: Callable[[], Any], stream: Any, calls: int) -> Callable[[], Any] | None:
    """What runs a CUDA graph of so many calls; None where the call waits for the GPU in between.

    Whether it waits is found before, for torch's generator of random numbers does not survive a graph that fails.
    """
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            function()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    return graph.replay


def _repeated(function: Callable[[], Any], calls: int) -> Callable[[], Any]:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


def _milliseconds(function: Callable[[], Any], repeats: int) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, and the verdict."""
    import torch

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("op", "shape", "dtype", "direction"):
        table.add_column(heading)
    for heading in ("× allowed", "crosstile µs", "TFLOP/s", "peers µs", "best peer / crosstile"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.ours is None:
            table.add_row(row.op, row.shape, row.dtype, row.direction, "", f"[red]{row.problem}[/]")
            continue
        colour = "green" if row.passes else "red"
        peers = ", ".join(f"{name} {timing.median:.1f}" for name, timing in row.peers.items())
        best = min((timing.median for timing in row.peers.values()), default=0.0)
        table.add_row(
            row.op,
            row.shape,
            row.dtype,
            row.direction,
            f"[{colour}]{row.multiple:.2f}[/]" + ("" if row.repeats else " differs"),
            f"{row.ours.median:.1f} ({row.ours.fastest:.1f} … {row.ours.slowest:.1f})",
            f"{row.flops / row.ours.median / 1e6:.0f}" if row.flops else "",
            peers,
            f"{best / row.ours.median:.2f}",
        )
    console.print(table)
    for row in rows:
        for name, why in row.refused.items():
            console.print(f"{row.shape}, {row.direction}: {name} has no time: {why}", highlight=False, markup=False)
    failed = sum(not row.passes for row in rows)
    verdict = f"[red]{failed} of {len(rows)} fail[/]" if failed else "[green]all within the allowed error[/]"
    console.print(f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}: {verdict}", highlight=False)


def write_json(rows: Sequence[Row], file: Path) -> None:
    """The rows as a JSON document."""
    import torch

    document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": [asdict(r) for r in rows]}
    file.write_text(json.dumps(document, indent=1) + "\n")
