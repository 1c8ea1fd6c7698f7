"""Which implementation runs, and why not the others: one registry and one choice for all ops.

The order of the choice, made at each call: `implementation=` in the call, the innermost `use`, the environment's
`CROSSTILE_IMPLEMENTATION`, and else by device: CUDA and ROCm run `triton`, TPU `pallas`, a CPU `library`, NumPy arrays
`numpy`. Only the last of these may step to another implementation, with one warning.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from crosstile.kernels import (
    attention,
    glu_matmul,
    grouped_matmul,
    linear_cross_entropy,
    matmul,
    norm,
    paged_attention,
    quantized_matmul,
    rotary,
)
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.kernels.tiles.expressions import show
from crosstile.kernels.tiles.targets import INTERPRET, Target, get_target

IMPLEMENTATIONS = ("numpy", "triton", "pallas", "library")
_AUTOMATIC = {
    "cuda": ("triton", "library"),
    "rocm": ("triton", "library"),
    "tpu": ("pallas", "library"),
    "cpu": ("library",),
}
_PACKAGES = {
    "triton": ("triton", "pip install 'crosstile[triton]'"),
    "pallas": ("jax", "pip install 'crosstile[jax]'"),
}


class _Surroundings(threading.local):
    """What `use`, `target` and `sharded` say in this thread. (torch.compile traces thread-locals, not ContextVars.)"""

    implementation: str | None = None
    target: Target | None = None
    sharding: Any = None


_surroundings = _Surroundings()
_warned: set[str] = set()


def constant_in_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call the function while it traces, as `torch.compiler.assume_constant_result` does.

    The mark is an attribute, so that it is set without importing torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Op:
    """One op: a folder of `crosstile.kernels`, with one file an implementation.

    Attributes:
        name: of the folder and of the public function.
        package: the folder.
    """

    name: str
    package: ModuleType

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays, in the order of every implementation's `forward`."""
        names: tuple[str, ...] = self.module("spec").INPUTS
        return names

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns."""
        names: tuple[str, ...] = self.module("spec").OUTPUTS
        return names

    def module(self, file: str) -> ModuleType:
        """`spec`, `tiles`, or an implementation's file, imported when first needed."""
        module: ModuleType = getattr(self.package, "reference" if file == "numpy" else file)
        return module

    def tiles(self, spec: Any, target: Target, inputs: tuple[Any, ...] | None) -> tuple[Any, str]:
        """The tiles that the library chooses for canonical inputs, and in words where they come from.

        inputs are None where their sizes are not all plain numbers: the heuristic needs none.
        """
        from crosstile.kernels.tiles import tuned  # which an import of crosstile can do without

        declared = self.module("tiles")
        sizes = None
        if inputs is not None and not target.interpreted and hasattr(declared, "sizes_of"):
            sizes = declared.sizes_of(spec, inputs)
        return tuned.choose(self.name, declared, spec, target, sizes)


OPS = {
    op.name: op
    for op in (
        Op("attention", attention),
        Op("glu_matmul", glu_matmul),
        Op("grouped_matmul", grouped_matmul),
        Op("linear_cross_entropy", linear_cross_entropy),
        Op("matmul", matmul),
        Op("norm", norm),
        Op("paged_attention", paged_attention),
        Op("quantized_matmul", quantized_matmul),
        Op("rotary", rotary),
    )
}


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every op inside with that implementation: "numpy", "triton", "pallas" or "library".

    >>> import numpy as np
    >>> with use("numpy"):
    ...     attention = __import__("crosstile").attention(*[np.ones((1, 2, 1, 4))] * 3)
    >>> float(attention[0, 0, 0, 0])
    1.0
    """
    before = _surroundings.implementation
    _surroundings.implementation = _known(implementation, "use")
    try:
        yield
    finally:
        _surroundings.implementation = before


@contextmanager
def target(name: str) -> Iterator[None]:
    """Choose tiles and compile for that chip, whatever machine this is; interpreters are off inside.

    name is one of sm_80, sm_90, sm_100, gfx942, gfx950, v4, v5e, v5p, v6e, v7x.
    """
    before = _surroundings.target
    _surroundings.target = get_target(name)
    try:
        yield
    finally:
        _surroundings.target = before


@contextmanager
def spread_over(sharding: Any) -> Iterator[None]:
    """Run ops on many devices as that `Sharding` says, or with None on this one's arrays alone."""
    before = _surroundings.sharding
    _surroundings.sharding = sharding
    try:
        yield
    finally:
        _surroundings.sharding = before


def spreading() -> Any:
    """The `Sharding` of the innermost `sharded`, or None."""
    return _surroundings.sharding


def framework_of(names: tuple[str, ...], arrays: tuple[Any, ...]) -> str:
    """The one framework of all arrays: "torch", "jax" or "numpy". Raises TypeError naming the array that differs."""
    first = _framework(arrays[0])
    if first is None:
        raise TypeError(
            f"{names[0]}: got {_type_name(arrays[0])}; it must be a numpy.ndarray, torch.Tensor or jax.Array"
        )
    kind = type(arrays[0])
    for index, array in enumerate(arrays):
        if array is not None and type(array) is not kind and _framework(array) != first:
            raise TypeError(
                f"{names[index]}: got {_type_name(array)} where {names[0]} is {_type_name(arrays[0])}; "
                f"all arrays of a call must come from one framework, so convert one of them"
            )
    return first


def _framework_of(op: Op, arrays: tuple[Any, ...]) -> str:
    """That of the op's arrays, beside which those that the host may know can be NumPy's."""
    if known := _known_to_host(op, arrays):
        kept = [
            (name, array)
            for name, array in zip(op.inputs, arrays, strict=True)
            if name not in known or _framework(array) != "numpy"
        ]
        return framework_of(*map(tuple, zip(*kept, strict=True)))
    return framework_of(op.inputs, arrays)


def _known_to_host(op: Op, arrays: tuple[Any, ...]) -> tuple[str, ...]:
    """The inputs that the host may know, which are the op's last; () where the call has none of them."""
    known: tuple[str, ...] = getattr(op.module("spec"), "KNOWN_TO_HOST", ())
    for array in arrays[len(arrays) - len(known) :]:
        if array is not None:
            return known
    return ()


def _framework(array: Any) -> str | None:
    module = type(array).__module__
    if module.startswith("torch"):
        return "torch"
    if module == "numpy":
        return "numpy" if hasattr(array, "strides") else None
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        return "jax"
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch"
    return "numpy" if any(kind.__module__ == "numpy" for kind in type(array).__mro__) else None


def _type_name(array: Any) -> str:
    kind = type(array)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def glue(framework: str) -> ModuleType:
    """The module that runs kernels on that framework's arrays."""
    if framework == "torch":
        import crosstile.torch

        return crosstile.torch
    if framework == "jax":
        import crosstile.jax

        return crosstile.jax
    import crosstile.numpy

    return crosstile.numpy


def supports(
    op: str, implementation: str, spec: Any, target: Target | str = INTERPRET, needs_grad: bool = False
) -> tuple[str, ...]:
    """Why that implementation cannot run the op for that spec there, forward and (needs_grad) backward; () if it can.

    >>> from crosstile.kernels.attention.spec import AttentionSpec
    >>> supports("attention", "numpy", AttentionSpec("float32", 64, 64))
    ()
    """
    chip = get_target(target) if isinstance(target, str) else target
    if implementation in ("numpy", "library"):
        return ()
    package, command = _PACKAGES[implementation]
    if not installed(package):
        return (f"{package} is not installed: {command}",)
    if implementation == "triton" and chip.is_tpu:
        return (f"Triton kernels are for GPUs, and the target is {chip.name}: use pallas there",)
    if implementation == "pallas" and chip.is_gpu:
        return (f"the Pallas kernels are for TPUs, and the target is {chip.name}: use triton there",)
    return tuple(OPS[op].module(implementation).supports(spec, chip, needs_grad))


@constant_in_compile
def installed(package: str) -> bool:
    """Whether that package can be imported."""
    return _find(package)


@cache
def _find(package: str) -> bool:
    return find_spec(package) is not None


def run(op: Op, spec: Any, arrays: tuple[Any, ...], implementation: str | None, config: Any) -> tuple[Any, ...]:
    """The op's outputs, from the implementation that the call, its surroundings or its device chooses."""
    framework = _framework_of(op, arrays)
    named = implementation or _surroundings.implementation or os.environ.get("CROSSTILE_IMPLEMENTATION")
    chip = _surroundings.target
    if named is None and chip is None and framework != "numpy" and glue(framework).on_cpu(arrays[0]):
        return _library(op, framework, spec, arrays)  # the fast way: nothing to weigh

    choice = choose(op, spec, arrays, named)
    if choice.implementation is None:
        raise UnsupportedError(choice.complaint(op))
    if choice.stepped_over:
        _warn_once(choice.complaint(op))
    if choice.implementation == "library":
        return _library(op, framework, spec, arrays)
    if config is not None:
        _check_config(op, config)
    return glue(framework).call(op, spec, arrays, choice.implementation, config, choice.target)


def _library(op: Op, framework: str, spec: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arrays) == len(op.inputs) and _known_to_host(op, arrays):
        arrays = glue(framework).own(arrays, arrays[0])
    outputs: tuple[Any, ...] = op.module("library").forward(spec, *arrays)
    return outputs


@dataclass(frozen=True)
class Choice:
    """What runs (None: nothing can), for which target, and why each implementation that was not taken cannot run."""

    implementation: str | None
    target: Target
    framework: str
    named: str | None
    reasons: dict[str, tuple[str, ...]]
    stepped_over: tuple[str, ...]

    def complaint(self, op: Op) -> str:
        """The reasons as one message: of the named implementation, or of those the choice stepped over."""
        subjects = (self.named,) if self.implementation is None and self.named else self.stepped_over
        why = "; ".join(f"{name}: {'. '.join(self.reasons[name])}" for name in subjects)
        if self.implementation is None:
            return f"implementation={self.named or 'automatic'!r} cannot run {op.name} here. {why}"
        return f"{op.name} runs with {self.implementation!r}, a step down. {why}"


def choose(op: Op, spec: Any, arrays: tuple[Any, ...], named: str | None) -> Choice:
    """Weigh every implementation for these arrays."""
    framework = _framework_of(op, arrays)
    side = glue(framework)
    chip = _surroundings.target or side.target_of(arrays[0])
    needs_grad = _needs_grad(op, spec, side, arrays)
    if named is not None:
        order: tuple[str, ...] = (_known(named, "implementation"),)
    else:
        order = ("numpy",) if framework == "numpy" else _AUTOMATIC[chip.platform]
    reasons: dict[str, tuple[str, ...]] = {}
    for position, name in enumerate(order):
        why = side.obstacles(name, chip, arrays) or supports(op.name, name, spec, chip, needs_grad)
        if not why:
            return Choice(name, chip, framework, named, reasons, order[:position])
        reasons[name] = tuple(why)
    return Choice(None, chip, framework, named, reasons, order)


def _needs_grad(op: Op, spec: Any, side: ModuleType, arrays: tuple[Any, ...]) -> bool:
    """Whether a backward will be asked for; JAX may always ask, which says nothing of an op that has none."""
    return bool(side.needs_grad(arrays)) and (side.KNOWS_NEED or bool(op.module("spec").differentiable(spec)))


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: print it, or read its parts."""

    op: str
    choice: Choice
    spec: Any
    config: Any
    others: dict[str, tuple[str, ...]]
    origin: str
    tiles_origin: str = ""

    def __str__(self) -> str:
        chip = self.choice.target
        where = "in its interpreter on this CPU" if chip.interpreted else f"for {chip.name} ({chip.chip})"
        if self.choice.implementation in ("numpy", "library"):
            where = f"on {self.choice.framework}'s own device"
        if self.choice.implementation is None:
            lines = [f"{self.op}: nothing can run ({self.origin})."]
        else:
            lines = [f"{self.op} runs with '{self.choice.implementation}' {where}, {self.origin}."]
        lines.append(f"  arrays: {self.choice.framework}; {_in_words(self.spec)}")
        if self.config is not None:
            lines.append(f"  tiles: {self.config}, {self.tiles_origin}")
        for name, why in self.others.items():
            lines.append(f"  {name}: " + (". ".join(why) if why else f"could run; ask with implementation='{name}'"))
        return "\n".join(lines)


def _in_words(spec: Any) -> str:
    """What a spec says beyond its defaults."""
    said = [
        (field.name, getattr(spec, field.name)) for field in fields(spec) if getattr(spec, field.name) != field.default
    ]
    return ", ".join(f"{name} {show(value) if _is_expression(value) else value}" for name, value in said)


def _is_expression(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], str)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation a call would run, with which tiles and why, and why each other would not.

    The arguments are those of the op itself. Nothing is computed.

    >>> import numpy as np
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> print(str(explain("attention", x, x, x, causal=True)).splitlines()[0])
    attention runs with 'numpy' on numpy's own device, the choice for numpy arrays on cpu.
    """
    from crosstile import calls

    if op not in calls.PREPARE:
        raise ValueError(f"op: got {op!r}; it must be one of {', '.join(calls.PREPARE)}")
    named, config = kwargs.pop("implementation", None), kwargs.pop("config", None)
    spec, arrays = calls.PREPARE[op](*args, **kwargs)
    subject = OPS[calls.run_by(op, spec)]
    origin = "as the call says"
    if named is None and (named := _surroundings.implementation):
        origin = "as crosstile.use says"
    if named is None and (named := os.environ.get("CROSSTILE_IMPLEMENTATION")):
        origin = "as CROSSTILE_IMPLEMENTATION says"
    choice = choose(subject, spec, arrays, named)
    if named is None:
        origin = f"the choice for {choice.framework} arrays on {choice.target.platform}"
    side, tiles_origin = glue(choice.framework), "as the call says"
    if config is None and choice.implementation in ("triton", "pallas"):
        config, tiles_origin = subject.tiles(spec, choice.target, side.canonical(subject, spec, arrays))
    others = {
        name: side.obstacles(name, choice.target, arrays)
        or supports(subject.name, name, spec, choice.target, _needs_grad(subject, spec, side, arrays))
        for name in IMPLEMENTATIONS
        if name != choice.implementation
    }
    return Explanation(op, choice, spec, config, others, origin, tiles_origin)


def _known(implementation: str, argument: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{argument}: got {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def _check_config(op: Op, config: Any) -> None:
    wanted = op.module("tiles").CONFIG
    if not isinstance(config, wanted):
        raise TypeError(f"config: got {_type_name(config)}; {op.name} takes a {wanted.__module__}.{wanted.__name__}")


@constant_in_compile
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
