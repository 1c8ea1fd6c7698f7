"""The processes of a run on many devices: how one joins the others, and what the first says for all.

torch has a process for each device (torchrun starts them), JAX one for each host.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .recipe import Recipe

_MANY_IN_JAX = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


def join(recipe: Recipe, device: Any = None) -> Any:
    """Join the other processes, if the recipe's devices need them; the device of this one, None for the default.

    Raises:
        ValueError: more processes were started than the recipe has devices, or none where it needs them.
    """
    devices, framework = recipe.parallel.devices, recipe.framework
    if framework == "jax":
        if devices > 1 and _many_in_jax():
            from .distributed_jax import initialize

            initialize()
        return device
    import torch
    import torch.distributed as dist

    started = int(os.environ.get("WORLD_SIZE", "1"))
    joined = dist.is_available() and dist.is_initialized()
    if not joined and started != devices:
        raise ValueError(
            f"parallel: its axes make {devices} devices, and there are {started} processes: start it by "
            f"`torchrun --nproc-per-node ... -m crosstile.bench.cli train ...` with {devices} in all"
        )
    if torch.cuda.is_available() and device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if devices > 1 and not joined:
        dist.init_process_group()
    return device


def _many_in_jax() -> bool:
    """Whether something says that there are other processes; a host with TPUs is asked by JAX itself."""
    told = any(os.environ.get(name, "1") not in ("", "1", "localhost") for name in _MANY_IN_JAX)
    tpus = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return told or (tpus and find_spec("libtpu") is not None)


def leave(framework: str) -> None:
    """The end, at which torch's processes wait for each other: none may go while others still hear it."""
    if framework == "torch" and count(framework) > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def count(framework: str) -> int:
    """How many processes there are."""
    if framework == "jax":
        import jax

        return jax.process_count()
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first(framework: str) -> bool:
    """Whether this one writes what is written once."""
    if framework == "jax":
        import jax

        return jax.process_index() == 0
    import torch.distributed as dist

    return count(framework) == 1 or dist.get_rank() == 0


def as_the_first(framework: str, number: int) -> int:
    """What the first process has; all must ask, and go on when all have asked."""
    if count(framework) == 1:
        return number
    if framework == "jax":
        import numpy as np
        from jax.experimental import multihost_utils

        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    import torch.distributed as dist

    numbers = [number]
    dist.broadcast_object_list(numbers, 0)
    return numbers[0]
