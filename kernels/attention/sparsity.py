"""Which tiles a kernel visits under a mask that the host can see into: runs of tiles, as one list of int32.

The list of a kernel begins with three numbers: by how many rows a batch item and a head are apart, 0 where the mask is
the same for all, and how many tiles a head has. Then it says where the runs of each row begin, and where those of the
last end. A run is two numbers: its first tile, inverted (`~`) where every query of the row sees every key of the run,
and the tile after its last. The kernels know the window and the lengths themselves; the runs are those of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..tiles.expressions import const, parse, planes, text_of
from ..tiles.host_arrays import HostArray
from ..tiles.visibility import Runs, visible_tiles
from .spec import AttentionInputs, AttentionSpec

HEADER = 3
Blocks = Mapping[str, tuple[int, int]]


def with_runs(spec: AttentionSpec, inputs: AttentionInputs, blocks: Blocks) -> AttentionInputs:
    """The inputs with the list of each kernel: from its name, `dkv_runs` and the like, to its (block_q, block_kv).

    A list is left out where it would say that every tile is seen in part.
    """
    sizes = _sizes(spec, inputs)
    if spec.mask is None or spec.mask == const(True) or 0 in sizes or inputs.forward_runs is not None:
        return inputs
    known = {slot: inputs.planes[slot] for slot in planes(spec.mask)}
    slots = tuple((slot, HostArray(array)) for slot, array in known.items() if isinstance(array, np.ndarray))
    mask = text_of(spec.mask)
    return inputs._replace(**{name: _list(mask, sizes, tiles, name, slots) for name, tiles in blocks.items()})


def differs_by_head(runs: np.ndarray) -> bool:
    """Whether a list has rows of each head."""
    return bool(runs[1])


def _sizes(spec: AttentionSpec, inputs: AttentionInputs) -> tuple[int, int, int, int]:
    """(batch, heads, q_len, kv_len) of the planes."""
    batch, q_len, q_heads, _ = inputs.q.shape
    if inputs.cu_seqlens_q is None:
        return batch, q_heads, q_len, inputs.k.shape[1]
    return inputs.cu_seqlens_q.shape[0] - 1, q_heads, spec.max_seqlen_q or 0, spec.max_seqlen_k or 0


@lru_cache(maxsize=256)
def _list(
    mask: str,
    sizes: tuple[int, int, int, int],
    blocks: tuple[int, int],
    kernel: str,
    known: tuple[tuple[int, HostArray], ...],
) -> np.ndarray | None:
    batch, heads, q_len, kv_len = sizes
    held: list[Any] = [None] * (1 + max((slot for slot, _ in known), default=-1))
    for slot, plane in known:
        held[slot] = plane.array
    runs = visible_tiles(parse(mask), q_len, kv_len, *blocks, planes=held, batch=batch, heads=heads)
    if runs.sparsity == 0 and runs.full_share == 0:
        return None
    return flat(runs.transposed() if kernel == "dkv_runs" else runs)


def flat(runs: Runs) -> np.ndarray:
    """The list of the runs."""
    rows = runs.row_tiles
    strides = rows * runs.heads if runs.batch > 1 else 0, rows if runs.heads > 1 else 0, rows
    first = np.where(runs.bounds[:, 2] == 1, ~runs.bounds[:, 0], runs.bounds[:, 0])
    bounds = np.stack([first, runs.bounds[:, 1]], axis=1).ravel()
    starts = HEADER + len(runs.offsets) + 2 * runs.offsets
    return np.concatenate([strides, starts, bounds]).astype(np.int32)
