"""A child process that compiles one job for a TPU and leaves the compiler's bundles and what steers its kernels.

    python -m crosstile.bench.dumping FOLDER < job.json

It is a process of its own because libtpu reads its environment once; `crosstile.bench.tpu.environment` makes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .programs import Job, spec_of, tpu_program, unsupported
from .shape import Shape, numpy_dtype
from .shapes import get_shape
from .steering import known_results, steering


def dump(job: Job, tiles: Mapping[str, int], folder: Path) -> None:
    """Compile for the job's target; libtpu writes its own files, and `steering.json` comes beside their folder."""
    import jax

    from .tpu import _one_chip

    if reasons := unsupported(job):
        raise ValueError(" ".join(reasons))
    config = changed_tiles(_chosen(job), tiles) if tiles else None
    program, arguments = tpu_program(job, config)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_one_chip(job.target)), tuple(arguments)
    )
    traced = jax.jit(program).trace(*placed)
    traced.lower(lowering_platforms=("tpu",)).compile()
    found = steering(traced.jaxpr, _values(job, config, arguments))
    (folder / "steering.json").write_text(json.dumps(found))


def changed_tiles(config: Any, tiles: Mapping[str, int]) -> Any:
    """The configuration with other values in some fields; `forward.block_q` is a field of its part `forward`.

    Raises ValueError where there is no such field.
    """
    for name, value in tiles.items():
        head, _, rest = name.partition(".")
        names = [item.name for item in fields(config)]
        if head not in names or bool(rest) != is_dataclass(getattr(config, head)):
            inside = [f"{at}.*" if is_dataclass(getattr(config, at)) else at for at in names]
            raise ValueError(f"config: got {name!r}; it must be one of {', '.join(inside)}")
        inner = changed_tiles(getattr(config, head), {rest: value}) if rest else value
        config = replace(config, **{head: inner})
    return config


def _chosen(job: Job) -> Any:
    from crosstile.kernels.tiles.targets import get_target

    return import_module(f"crosstile.kernels.{job.op}.tiles").choose_config(spec_of(job), get_target(job.target))


def _values(job: Job, config: Any, arguments: Sequence[Any]) -> list[Any]:
    """The program's arguments, with values for the integers; a backward's come from the forward that saved them."""
    import jax

    if job.direction != "backward":
        floats, others = arguments
        return jax.tree.leaves((floats, {**others, **stand_ins(get_shape(job.shape), job.dtype)}))
    saving = Job(job.target, job.op, "saving", job.shape, job.dtype)
    program, given = tpu_program(saving, config)
    known = known_results(jax.make_jaxpr(program)(*given), _values(saving, config, given))
    pull, out = (jax.tree.leaves(argument) for argument in arguments)
    known = [*known[len(out) :], *known[: len(out)]]
    return [leaf if value is None else value for leaf, value in zip((*pull, *out), known, strict=True)]


def stand_ins(shape: Shape, dtype: str) -> dict[str, np.ndarray]:
    """Values for the 32-bit integers of a named shape: its own, else groups of equal size and zeros."""
    arrays = {name: size for name, (size, kind) in shape.arrays(dtype).items() if numpy_dtype(kind) == np.int32}
    rows = next(iter(shape.arrays(dtype).values()))[0][0]
    own = shape.integers()
    default = {name: rows // size[0] if name == "group_sizes" else 0 for name, size in arrays.items()}
    return {
        name: np.broadcast_to(np.asarray(own.get(name, default[name]), np.int32), size) for name, size in arrays.items()
    }


def keep_lines() -> None:
    """Let the lines of a backward's kernel be its own.

    jax gives all that it traces for a gradient the line of the forward's call (`source_info_util.user_context`).
    """
    from jax._src import source_info_util

    manager: Any = source_info_util.UserContextManager
    enter = manager.__init__

    def without_lines(self: Any, traceback: Any, *, name_stack: Any = None) -> None:
        enter(self, None, name_stack=name_stack)

    manager.__init__ = without_lines


def main() -> None:
    """Answer the one job on standard input."""
    asked = json.loads(sys.stdin.read())
    keep_lines()
    folder = Path(sys.argv[1])
    try:
        dump(Job(**asked["job"]), asked["tiles"], folder)
    except Exception as error:  # whatever the compiler raises is the answer
        (folder / "refusal.txt").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
