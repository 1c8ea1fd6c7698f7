"""A child process that compiles one job for a TPU and leaves the compiler's bundles and what steers its kernels.

    python -m crosstile.bench.dumping FOLDER < job.json

It is a process of its own because libtpu reads its environment once; `crosstile.bench.tpu.environment` makes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crosstile.kernels.tiles.tuned import changed_tiles

from .programs import Job, chosen_tiles, tpu_program, unsupported
from .shape import Shape, numpy_dtype
from .shapes import get_shape
from .steering import known_results, steering


def dump(job: Job, tiles: Mapping[str, int], folder: Path) -> None:
    """Compile for the job's target; libtpu writes its own files, and `steering.json` comes beside their folder."""
    if reasons := unsupported(job):
        raise ValueError(" ".join(reasons))
    config = changed_tiles(chosen_tiles(job), tiles) if tiles else None
    program, arguments = tpu_program(job, config)
    leave(program, arguments, _values(job, config, arguments), job.target, folder)


def leave(
    program: Callable[..., Any],
    arguments: Sequence[Any],
    values: Sequence[Any],
    target: str,
    folder: Path,
    options: Mapping[str, str] | None = None,
) -> None:
    """Compile `program(*arguments)`, and write what steers its kernels: `values` has an array for each known argument.

    How arguments and results lie in memory is the compiler's choice, as it is between the operations of a model: what
    makes a query does so in the order that its reader wants. `options` are the compiler's.
    """
    import jax
    from jax.experimental.layout import Format, Layout

    from .tpu import _one_chip

    place = _one_chip(target)
    free = Format(Layout.AUTO, place)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tuple(arguments))
    traced = jax.jit(program, in_shardings=free, out_shardings=free).trace(*placed)
    traced.lower(lowering_platforms=("tpu",)).compile(dict(options) if options else None)
    (folder / "steering.json").write_text(json.dumps(steering(traced.jaxpr, values)))


def _values(job: Job, config: Any, arguments: Sequence[Any]) -> list[Any]:
    """The program's arguments, with values for the integers; a backward's come from the forward that saved them."""
    import jax

    if job.direction != "backward":
        floats, others = arguments
        return jax.tree.leaves((floats, {**others, **stand_ins(get_shape(job.shape), job.dtype)}))
    saving = Job(job.target, job.op, "saving", job.shape, job.dtype)
    program, given = tpu_program(saving, config)
    return saved_values(program, given, _values(saving, config, given), arguments)


def saved_values(
    saving: Callable[..., Any], given: Sequence[Any], values: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
    """The arguments of a backward, with the values of those that the saving forward finds without its floats."""
    import jax

    known = known_results(jax.make_jaxpr(saving)(*given), values)
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


def answer(handle: Callable[[dict[str, Any], Path], None]) -> None:
    """Handle what standard input asks, with the folder that the arguments name; what is raised is left there."""
    asked = json.loads(sys.stdin.read())
    keep_lines()
    folder = Path(sys.argv[1])
    with leaving_refusal(folder):
        handle(asked, folder)


@contextmanager
def leaving_refusal(folder: Path) -> Iterator[None]:
    """Leave what is raised inside in the folder, and exit with 1: whatever the compiler raises is the answer."""
    try:
        yield
    except Exception as error:
        (folder / "refusal.txt").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    answer(lambda asked, folder: dump(Job(**asked["job"]), asked["tiles"], folder))
