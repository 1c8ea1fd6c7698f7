"""A child process that compiles a call of a peer for a TPU and leaves the compiler's bundles and what steers them.

    python -m crosstile.bench.peer_dumping FOLDER < call.json

As `dumping.py` for our own kernels; this one may run in another interpreter, that of tokamax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosstile.kernels.tiles.targets import MIB, get_target

from .dumping import answer, leave, saved_values
from .peers import Call, peers
from .programs import Direction, directed
from .shapes import get_shape
from .tpu import as_if_on, empty_dump, one_device

VMEM_OPTION = "xla_tpu_scoped_vmem_limit_kib"


def dump(call: Call, direction: Direction, target: str, vmem_mib: int, folder: Path) -> None:
    """Compile for the target; libtpu writes its own files, and `steering.json` comes beside their folder.

    vmem_mib is what a kernel may use that asks for no more itself, 0 the least that does. The compiler's default is a
    fraction of VMEM, which refuses the large tiles of peers; a larger one takes from what XLA keeps there.
    """
    import jax

    floats, integers = call.floats, call.integers
    others = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in integers.items()}
    program, arguments = directed(call.function, floats, others, direction)
    values = jax.tree.leaves((floats, integers))
    if direction == "backward":
        values = saved_values(*directed(call.function, floats, others, "saving"), values, arguments)
    quarter = get_target(target).on_chip_bytes // 4 // MIB
    for limit in (vmem_mib,) if vmem_mib else (0, quarter, 2 * quarter, 3 * quarter):
        try:
            leave(program, arguments, values, target, folder, {VMEM_OPTION: str(limit << 10)} if limit else None)
            return
        except jax.errors.JaxRuntimeError as error:
            if vmem_mib or limit == 3 * quarter or "vmem" not in str(error):
                raise
            empty_dump()


def _handle(asked: dict[str, Any], folder: Path) -> None:
    tiles, target = dict(asked["tiles"]), asked["target"]
    vmem_mib = tiles.pop("vmem_mib", 0)
    call = peers()[asked["peer"]](get_shape(asked["shape"]), asked["dtype"], tiles)
    with as_if_on(one_device(target)):
        dump(call, asked["direction"], target, vmem_mib, folder)


if __name__ == "__main__":
    answer(_handle)
