"""What a call of a peer is, and every peer by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Tiles = Mapping[str, int]


@dataclass(frozen=True)
class Call:
    """One call of a peer.

    Attributes:
        function: of the two below; the gradient of a backward is that of all floats.
        floats: by name, of ShapeDtypeStruct. In a forward, large arrays of integers too.
        integers: by name, with their values.
    """

    function: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    floats: dict[str, Any]
    integers: dict[str, np.ndarray]


@cache
def peers() -> dict[str, Callable[..., Call]]:
    """A function of a named shape, a dtype and tiles for each; it raises whatever the peer does where it refuses."""
    from .tokamax_peers import TOKAMAX
    from .tpu_peers import JAX

    return {**JAX, **TOKAMAX}
