"""Copies of an op's files with one mistake in them, and arrays as launch plans describe them."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

import crosstile.kernels
from crosstile.kernels.tiles.launch import Array

KERNELS = Path(crosstile.kernels.__path__[0])
_serial = itertools.count()


class Mutation(Protocol):
    """What is replaced by what in a file: of the op's folder, or "tiles/..." of what it shares with others."""

    @property
    def file(self) -> str: ...
    @property
    def old(self) -> str: ...
    @property
    def new(self) -> str: ...


def mutated(op: str, mutation: Mutation, folder: Path) -> ModuleType:
    """A copy of the op's package with the mistake in it.

    The shared tiles are copied beside it, into a package that stands in for `crosstile.kernels`, so that relative
    imports, and `triton.jit`, which reads the source file, work.
    """
    for name in (op, "tiles"):
        shutil.copytree(KERNELS / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / (mutation.file if "/" in mutation.file else f"{op}/{mutation.file}")
    path = path.with_suffix(".py")
    text = path.read_text()
    assert mutation.old in text, f"{path.name} has no {mutation.old!r} any more: bring the mutation up to date"
    path.write_text(text.replace(mutation.old, mutation.new))
    parent = ModuleType(f"kernels_mutated_{next(_serial)}")
    parent.__path__ = [str(folder)]
    sys.modules[parent.__name__] = parent
    return importlib.import_module(f"{parent.__name__}.{op}")


def describe(array: Any) -> Any:
    """The array as a plan knows it; None for None."""
    if array is None:
        return None
    array = np.asarray(array)
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))
