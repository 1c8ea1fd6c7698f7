"""Compile a JAX program for a TPU that is not there, with libtpu, and read the schedule of its Pallas kernels.

libtpu reads its environment when jax is first imported, so this runs in a child process that `environment` was made for
(`crosstile.bench.worker`); one child compiles many programs, for every chip.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .facts import KernelFacts
from .llo import FLAGS, Schedule, read_dump

# Topologies that the compiler knows by name; a 1x1 layout is refused.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
_DUMP = "CROSSTILE_LLO_DUMP"


def environment(dump: Path) -> dict[str, str]:
    """What a process needs in its environment, before jax is imported, to compile for TPUs without one."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": f"{flags} {FLAGS.format(folder=dump)}".strip(),
        _DUMP: str(dump),
    }


def compile_program(
    program: Callable[..., Any], arguments: Sequence[Any], target_name: str, tiles: Callable[[str], str]
) -> tuple[KernelFacts, ...]:
    """The facts of every Pallas kernel in `program(*arguments)`; arguments are trees of ShapeDtypeStruct.

    `tiles` names a kernel's tiles from its name. Raises whatever the compiler does where it refuses.
    """
    import jax

    dump = Path(os.environ[_DUMP])
    _empty(dump)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_one_chip(target_name)), tuple(arguments)
    )
    started = time.perf_counter()
    traced = jax.jit(program).trace(*placed)
    traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - started
    schedules = read_dump(dump)
    _empty(dump)
    dots = _kernels(traced.jaxpr.jaxpr)
    return tuple(
        _facts(schedule, dots.get(schedule.name, "unknown"), tiles(schedule.name), seconds / len(schedules))
        for schedule in schedules
    )


def _kernels(program: Any) -> dict[str, str]:
    """The dtype that each Pallas kernel of a jaxpr multiplies, by the kernel's name; "" where it has no product."""
    from jax.extend.core import jaxprs_in_params

    found: dict[str, str] = {}
    for equation in program.eqns:
        if equation.primitive.name == "pallas_call":
            name = equation.params["name"]
            found[name] = found.get(name) or _dot_dtype(equation.params["jaxpr"])
        else:
            for inner in jaxprs_in_params(equation.params):
                found |= {name: dtype or found.get(name, "") for name, dtype in _kernels(inner).items()}
    return found


def _dot_dtype(kernel: Any) -> str:
    """The dtype of the first product in a kernel's jaxpr, in its loops and branches too."""
    from jax.extend.core import jaxprs_in_params

    for equation in kernel.eqns:
        if equation.primitive.name == "dot_general":
            return str(equation.invars[0].aval.dtype)
        for inner in jaxprs_in_params(equation.params):
            if dtype := _dot_dtype(inner):
                return dtype
    return ""


def _facts(schedule: Schedule, dot_dtype: str, tiles: str, seconds: float) -> KernelFacts:
    return KernelFacts(
        kernel=schedule.name,
        tiles=tiles,
        instructions=schedule.bundles,
        matrix=schedule.matrix,
        dot_dtype=dot_dtype,
        spills=schedule.vector_spills,
        on_chip_bytes=schedule.vmem,
        units=schedule.units,
        notes={"scalar_spills": schedule.scalar_spills},
        seconds=seconds,
    )


@cache
def _one_chip(target_name: str) -> Any:
    from jax.sharding import SingleDeviceSharding

    return SingleDeviceSharding(one_device(target_name))


@cache
def one_device(target_name: str) -> Any:
    """What jax calls a device: one of a topology of that chip, which is not here."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(TOPOLOGIES[target_name], platform="tpu").devices[0]


def empty_dump() -> None:
    """Forget what the compiler wrote so far in this process, whose environment `environment` made."""
    _empty(Path(os.environ[_DUMP]))


def as_if_on(device: Any) -> Any:
    """A context in which kernels that ask jax which TPU this is are told that one."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    told = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=told))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
