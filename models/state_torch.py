"""A torch learner's state on disk: `torch.distributed.checkpoint`, in shards that any number of processes reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from .arrays import Tree
from .config import Config

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant


def begin_write(state: Tree, folder: Path) -> Callable[[], Any]:
    """Copy the state to the host and write it aside; what is returned waits until it is written, and raises."""
    writer = FileSystemWriter(folder)
    writing = async_save(state, storage_writer=writer, process_group=_group(), no_dist=not _together())
    return writing.result  # type: ignore[union-attr, return-value]


def read(state: Tree, folder: Path) -> Tree:
    """The state that was written, in the shapes, the dtypes and the places of this one, which is overwritten."""
    load(state, storage_reader=FileSystemReader(folder), no_dist=not _together())
    return state


def read_weights(folder: Path, config: Config) -> dict[str, np.ndarray]:
    """The parameters in NumPy by their paths, whole; this process alone reads them."""
    import torch

    reader, start = FileSystemReader(folder), "params."
    stored = reader.read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)  # type: ignore[union-attr]
        for name, tensor in stored.items()
        if name.startswith(start)
    }
    load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix(start): tensor.numpy() for name, tensor in found.items()}


@cache
def _group() -> Any:
    """Of the writing threads, whose messages must not meet those of training."""
    return dist.new_group(backend="gloo") if _together() else None


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
