"""An op's folder imports its files when they are first asked for, since each brings its framework."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

FILES = ("spec", "tiles", "reference", "triton", "pallas", "library")


def files_of(package: str) -> Callable[[str], ModuleType]:
    """A package's `__getattr__` that imports one of the files of an op."""

    def __getattr__(name: str) -> ModuleType:
        if name in FILES:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
