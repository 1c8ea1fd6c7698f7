"""Calls that tokamax's autotuner measured, made again from the data that it ships.

tokamax (openxla/tokamax, Apache-2.0) keeps arguments and tiles as JSON; what reads them runs where tokamax is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any


def call_name(op: str, arguments: str, config: str) -> str:
    """What stands for a measured call."""
    return hashlib.sha256(f"{op}{arguments}{config}".encode()).hexdigest()[:12]


def measured_call(
    place: tuple[str, str], entry: dict[str, Any], change: Callable[[Any], Any] = lambda config: config
) -> tuple[Callable[..., Any], Any]:
    """The function of a measured call and its arrays.

    `place` is the op's module and class, and `change` changes the tiles.
    """
    from tokamax._src import benchmarking
    from tokamax._src.autotuning import cache

    module, name = place
    made = getattr(import_module(f"tokamax._src.ops.{module}"), name)().replace(vjp=None)
    line = json.dumps({entry["arguments"]: {entry["config"]: entry["data"]}})
    [(arguments, configs)] = cache._get_cache_adapter(made).validate_json(line).items()
    [config] = configs
    bound = made.replace(config=change(config), bypass_device_check=True).bind(**arguments)
    function, arrays = benchmarking.standardize_function(bound.op, *bound.args, kwargs=bound.kwargs, seed=None)
    return function, arrays
