"""What a Triton kernel of another package would launch, found on a machine without a GPU: its launcher is called, and
the launches are kept rather than run.

The launcher is the package's own Python function, called with tensors on this CPU. `triton.jit` functions then record
their arguments; those that an autotuner guards record every configuration that it would try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

from crosstile.kernels.tiles.launch import Array, Launch
from crosstile.kernels.tiles.targets import Target, get_target

from .issue_programs import array_bytes

_HOW = {"num_warps", "num_stages", "pre_hook"}  # what a launch has fields for, and what is not the compiler's
_DEFAULT_STAGES = {"cuda": 3, "rocm": 2}


@dataclass(frozen=True)
class Captured:
    """One launch with one choice of its tiles.

    Attributes:
        call: counts the launches, so that choices of one share it.
        launch, arrays: the launch, and the arrays by the names of its parameters.
        integers: the elements of the arrays of integers, which may steer loops.
    """

    call: int
    launch: Launch
    arrays: Mapping[str, Array]
    integers: Mapping[str, np.ndarray]


def capture(run: Callable[[], Any], target_name: str) -> list[Captured]:
    """Every launch of `run`, in order, as if on that chip."""
    found: list[Captured] = []
    with _recording(found, get_target(target_name)):
        run()
    return found


@contextmanager
def _recording(found: list[Captured], target: Target) -> Iterator[None]:
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.runtime.jit import JITFunction

    calls = [0]

    def plain(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **given: Any) -> None:
        calls[0] += 1
        _keep(found, calls[0], kernel, args, grid, given, target)

    def tuned(tuner: Any, *args: Any, **given: Any) -> None:
        calls[0] += 1
        grid, given = given.pop("grid"), {name: value for name, value in given.items() if name != "warmup"}
        names = dict(zip(tuner.arg_names, args, strict=False))
        tuner.nargs = names
        for config in tuner.prune_configs(given):
            options = {name: getattr(config, name, None) for name in ("num_warps", "num_stages", "maxnreg")}
            values = {**given, **config.kwargs, **{name: value for name, value in options.items() if value}}
            kernel, values = _unwrap(tuner.fn, {**names, **values})
            _keep(found, calls[0], kernel, (), grid, values, target)

    def guessed(heuristics: Any, *args: Any, **given: Any) -> None:
        grid, given = given.pop("grid"), {name: value for name, value in given.items() if name != "warmup"}
        if isinstance(heuristics.fn, Autotuner):
            names = dict(zip(heuristics.arg_names, args, strict=False))
            values = {name: rule({**names, **given}) for name, rule in heuristics.values.items()}
            tuned(heuristics.fn, *args, grid=grid, **{**given, **values})
            return
        calls[0] += 1
        kernel, values = _unwrap(heuristics, {**dict(zip(heuristics.arg_names, args, strict=False)), **given})
        _keep(found, calls[0], kernel, (), grid, values, target)

    with (
        patch.object(JITFunction, "run", plain),
        patch.object(Autotuner, "run", tuned),
        patch.object(Heuristics, "run", guessed),
    ):
        yield


def _unwrap(kernel: Any, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The `triton.jit` function below heuristics, with what they add."""
    from triton.runtime.autotuner import Heuristics

    while isinstance(kernel, Heuristics):
        values = {**values, **{name: rule(values) for name, rule in kernel.values.items()}}
        kernel = kernel.fn
    return kernel, values


def _keep(
    found: list[Captured], call: int, kernel: Any, args: Any, grid: Any, given: Mapping[str, Any], target: Target
) -> None:
    names = [parameter.name for parameter in kernel.params]
    values = {**dict(zip(names, args, strict=False)), **given}
    places = tuple(grid(values) if callable(grid) else grid)
    constants, numbers, arrays, integers, inputs = {}, {}, {}, {}, []
    for parameter in kernel.params:
        value = values.get(parameter.name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr:
            constants[parameter.name] = getattr(value, "value", value)
        elif value is None or _is_array(value):
            inputs.append("" if value is None else parameter.name)
            if value is not None:
                arrays[parameter.name] = _array(value)
                if not (value.is_floating_point() or value.is_complex()):
                    integers[parameter.name] = value.numpy()
        else:
            numbers[parameter.name] = value
    warps = given.get("num_warps") or 4
    stages = given.get("num_stages") or _DEFAULT_STAGES[target.platform]
    options = {name: value for name, value in given.items() if name not in {*names, *_HOW}}
    launch = Launch(kernel, places, tuple(inputs), (), numbers, constants, warps, stages, options=options)
    found.append(Captured(call, launch, arrays, integers))


def _is_array(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "stride")


def _array(tensor: Any) -> Array:
    return Array(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tuple(tensor.stride()))


def tiles_in_words(launch: Launch) -> str:
    """The constants that are numbers, and the warps."""
    sizes = [f"{name} {value}" for name, value in launch.constants.items() if _is_size(value)]
    return ", ".join([*sizes, f"{launch.num_warps} warps", f"{launch.num_stages} stages"])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 16 <= value <= 65536


def memory_bytes(captured: Captured) -> int:
    """Of the arrays, each counted once."""
    return sum(map(array_bytes, captured.arrays.values()))
