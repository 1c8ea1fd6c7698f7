"""A JAX learner's state on disk: `orbax.checkpoint`, in shards that any number of devices reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .arrays import Tree, tree_leaves
from .config import Config
from .stacking import unstack

try:
    import orbax.checkpoint as ocp
except ImportError:
    raise ImportError("orbax writes the checkpoints of JAX, and is not here: pip install 'crosstile[train]'") from None


def begin_write(state: Tree, folder: Path) -> Callable[[], Any]:
    """Copy the state to the host and write it aside; what is returned waits until it is written, and raises."""
    writer = _writer()
    writer.save(folder.absolute(), args=ocp.args.StandardSave(state))
    return writer.wait_until_finished  # type: ignore[no-any-return]


def read(state: Tree, folder: Path) -> Tree:
    """The state that was written, in the shapes, the dtypes and the places of this one."""
    wanted = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state)
    return _writer().restore(folder.absolute(), args=ocp.args.StandardRestore(wanted))  # type: ignore[no-any-return]


def read_weights(folder: Path, config: Config) -> dict[str, np.ndarray]:
    """The parameters in NumPy by their paths, whole; this process alone reads them."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="weights"
    )
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    ) as reader:
        stored = reader.metadata(folder.absolute()).item_metadata.tree["params"]
        item = {"params": stored}
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        options = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
        found = reader.restore(folder.absolute(), args=options)
    return tree_leaves(unstack(found["params"], config))


@cache
def _writer() -> Any:
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
