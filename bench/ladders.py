"""What `crosstile tune` searches: the fields of tiles that an op's kernels read on a chip, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosstile.kernels.tiles.targets import Target

from .programs import Direction, directions
from .shape import Shape

BLOCKS = {True: (128, 256, 512, 1024, 2048, 4096), False: (16, 32, 64, 128, 256)}  # on TPUs, and on GPUs
WARPS, STAGES, ROWS = (4, 8), (1, 2, 3, 4, 5), (1, 4, 8, 16)  # of GPUs


@dataclass(frozen=True)
class Space:
    """One search: fields, and the directions whose times they decide and are added up.

    Attributes:
        ladders: the values of each field, in order.
        must_work: directions that run with these tiles too, and in which they must not be refused.
    """

    directions: tuple[Direction, ...]
    ladders: dict[str, tuple[int, ...]]
    must_work: tuple[Direction, ...] = ()

    @property
    def name(self) -> str:
        """What a table calls the times of this search."""
        return "+".join(self.directions)


# Of each part of a configuration, its blocks, and the size of the call that a block is a part of: a larger one would be
# shrunk to it, and is not tried. "" is a configuration without parts, which serves forward and backward.
_PARTS: dict[str, dict[str, dict[str, str]]] = {
    "attention": {
        "forward": {"block_q": "q_len", "block_kv": "kv_len"},
        "dkv": {"block_q": "q_len", "block_kv": "kv_len"},
        "dq": {"block_q": "q_len", "block_kv": "kv_len"},
    },
    "matmul": {"": {"block_m": "m", "block_n": "n", "block_k": "k"}},
    "glu_matmul": {
        "forward": {"block_m": "m", "block_n": "n", "block_k": "k"},
        "dx": {"block_m": "m", "block_n": "k", "block_k": "n"},
        "dw": {"block_m": "k", "block_n": "n", "block_k": "m"},
    },
    "grouped_matmul": {
        "forward": {"block_m": "", "block_n": "n", "block_k": "k"},
        "dlhs": {"block_m": "", "block_n": "k", "block_k": "n"},
        "drhs": {"block_m": "k", "block_n": "n", "block_k": ""},
    },
    "linear_cross_entropy": {
        "forward": {"block_tokens": "tokens", "block_vocab": "vocab"},
        "dhidden": {"block_tokens": "tokens", "block_vocab": "vocab"},
        "dweight": {"block_tokens": "tokens", "block_vocab": "vocab"},
    },
}
_GPU_ONLY = {  # what TPU kernels do not read, or set themselves
    "attention": ("dq",),
    "grouped_matmul": ("forward.block_m", "dlhs.block_m", "drhs.block_k"),
    "linear_cross_entropy": ("dhidden",),
}
_SKINNY = {"skinny_n": "n", "skinny_k": "k"}  # in place of matmul's blocks where rows are few

OPS = tuple(_PARTS)


def spaces(shape: Shape, target: Target, sizes: Mapping[str, Any], config: Any) -> list[Space]:
    """The searches that tune a call: one of the forward, and one of the backward if there is one.

    The forward is that which saves for a backward, where it is another program. `sizes` are the call's, by name.
    """
    there = directions(shape)
    ahead: Direction = "saving" if "saving" in there else "forward"
    behind: tuple[Direction, ...] = ("backward",) if "backward" in there else ()
    alone: tuple[Direction, ...] = ("forward",) if ahead == "saving" else ()
    unread = () if target.is_gpu else _GPU_ONLY.get(shape.op, ())
    parts = {
        name: {block: size for block, size in blocks.items() if f"{name}.{block}" not in unread}
        for name, blocks in _PARTS[shape.op].items()
        if name not in unread
    }
    if "" in parts:
        blocks = _SKINNY if sizes.get("few") else parts[""]
        return [Space((ahead, *behind), _ladders("", blocks, target, sizes, config), alone)]
    found = [Space((ahead,), _ladders("forward", parts.pop("forward"), target, sizes, config), alone)]
    if behind:
        ladders: dict[str, tuple[int, ...]] = {}
        for name, blocks in parts.items():
            ladders |= _ladders(name, blocks, target, sizes, config)
        found.append(Space(behind, ladders))
    return found


def _ladders(
    part: str, blocks: Mapping[str, str], target: Target, sizes: Mapping[str, Any], config: Any
) -> dict[str, tuple[int, ...]]:
    values = BLOCKS[target.is_tpu]
    found = {}
    for block, size in blocks.items():
        enough = [value for value in values if size and value >= sizes[size]]
        found[block] = tuple(value for value in values if not enough or value <= enough[0])
    if target.is_gpu:
        tiles = getattr(config, part) if part else config
        others = {"group_m": ROWS, "num_warps": WARPS, "num_stages": STAGES}
        found |= {name: ladder for name, ladder in others.items() if hasattr(tiles, name)}
    return {f"{part}.{name}" if part else name: ladder for name, ladder in found.items()}
