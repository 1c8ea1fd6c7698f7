"""Arrays in the host's memory as keys of a cache."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


class HostArray:
    """An array, as a key: equal where the contents are."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        content = np.ascontiguousarray(array)
        self.key = (array.shape, array.dtype.name, blake2b(content.view(np.uint8).data, digest_size=16).digest())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostArray) and self.key == other.key
