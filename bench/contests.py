"""The contests of `crosstile standings`: one workload each, who can do it, and the tiles that each one tries.

A contestant's grid has the tiles that its own documents, tests or users recommend; from the best of them `descend`
walks along the ladders. Our own kernels are searched in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .attention_shapes import AttentionShape
from .programs import Direction
from .shapes import get_shape

OURS = "crosstile"
CHIPS = ("v5e", "v6e", "v7x")
Grid = tuple[dict[str, int], ...]
Ladders = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Contest:
    """One call of a named shape in one direction, and the peers that can do it."""

    shape: str
    direction: Direction
    peers: tuple[str, ...]

    @property
    def name(self) -> str:
        """What `--contest` takes."""
        return self.shape if self.direction == "forward" else f"{self.shape}-{self.direction}"


def _attention(shape: str, *directions: Direction) -> tuple[Contest, ...]:
    return tuple(Contest(shape, direction, ("splash", "flash", "tokamax splash")) for direction in directions)


CONTESTS = (
    *_attention("llama-3-8b", "forward", "backward"),
    *_attention("llama-3.2-1b", "forward", "backward"),
    *_attention("gemma-2-2b", "forward", "backward"),
    *_attention("causal-4k-mha", "forward", "backward"),
    *_attention("causal-32k-d128", "forward", "backward"),
    *_attention("causal-32k-d64", "forward", "backward"),
    *_attention("causal-32k-d256", "forward", "backward"),
    *_attention("window-1k-of-32k", "forward", "backward"),
    *_attention("varlen-16-of-2k", "forward"),
    Contest("square-4096", "forward", ("pallas matmul", "XLA")),
    Contest("llama-3-8b-gate-product", "forward", ("pallas matmul", "XLA")),
    Contest("llama-3-8b-down-product", "forward", ("pallas matmul", "XLA")),
    Contest("mixtral-8x7b-gate-product", "forward", ("megablox", "tokamax ragged_dot", "tokamax gmm_v2")),
    Contest("mixtral-8x7b-down-product", "forward", ("megablox", "tokamax ragged_dot", "tokamax gmm_v2")),
    Contest("mixtral-8x7b-down-int8", "forward", ("tokamax ragged_dot", "tokamax gmm_v2")),
    Contest("llama-3-8b-head", "forward", ("tokamax cross-entropy",)),
    Contest("llama-3-8b-head", "backward", ("tokamax cross-entropy",)),
    Contest("llama-3-8b-paged", "forward", ("ragged paged attention", "paged attention")),
    Contest("llama-3-8b-decode-256", "forward", ("ragged paged attention", "paged attention")),
)


def get_contest(name: str) -> Contest:
    """The contest of that name. Raises ValueError with the names there are."""
    for contest in CONTESTS:
        if contest.name == name:
            return contest
    raise ValueError(f"contest: got {name!r}; it must be one of {', '.join(contest.name for contest in CONTESTS)}")


def _named(names: str, *rows: tuple[int, ...]) -> Grid:
    fields = names.split()
    return tuple(dict(zip(fields, row, strict=True)) for row in rows)


_SIDES = (128, 256, 512, 1024, 2048, 4096)
_LARGE = (256, 512, 1024, 2048)
_SPLASH = "block_q block_kv block_kv_compute seq_minor"
_SPLASH_BACKWARD = "block_q_dkv block_kv_dkv block_kv_dkv_compute"
_FLASH_DKV = "block_q_major_dkv block_q_dkv block_k_major_dkv block_k_dkv"
_FLASH_DQ = "block_q_dq block_k_major_dq block_k_dq"

# By contestant and direction. "matmul" and the like are ours, by op.
GRIDS: dict[tuple[str, str], Grid] = {
    ("splash", "forward"): _named(
        _SPLASH,
        (512, 1024, 512, 0),
        (1024, 1024, 512, 0),
        (1024, 1024, 1024, 0),
        (2048, 2048, 512, 0),
        (2048, 2048, 1024, 0),
    ),
    ("splash", "backward"): (
        *_named(
            f"{_SPLASH_BACKWARD} use_fused_bwd_kernel",
            (1024, 1024, 512, 1),
            (1024, 1024, 1024, 1),
            (1024, 2048, 512, 1),
            (2048, 2048, 512, 1),
        ),
        *_named(
            f"{_SPLASH_BACKWARD} block_q_dq block_kv_dq use_fused_bwd_kernel",
            (1024, 1024, 512, 1024, 1024, 0),
        ),
    ),
    ("flash", "forward"): _named(
        "block_q block_k_major block_k",
        (512, 1024, 512),
        (1024, 1024, 512),
        (1024, 1024, 1024),
        (1024, 2048, 512),
    ),
    ("flash", "backward"): _named(
        f"{_FLASH_DKV} {_FLASH_DQ}",
        (512, 512, 512, 512, 512, 512, 512),
        (1024, 512, 1024, 512, 512, 1024, 512),
        (1024, 1024, 1024, 1024, 1024, 1024, 1024),
    ),
    ("pallas matmul", "forward"): _named(
        "block_m block_n block_k",
        (512, 1024, 1024),
        (1024, 1024, 512),
        (1024, 1024, 1024),
        (1024, 2048, 512),
        (2048, 1024, 512),
    ),
    ("XLA", "forward"): _named("vmem_mib", (16,), (32,), (48,), (96,)),
    ("megablox", "forward"): _named(
        "block_m block_n block_k",
        (256, 1024, 4096),
        (512, 1024, 1024),
        (512, 1024, 2048),
        (1024, 1024, 512),
        (512, 1024, 4096),
    ),
    ("ragged paged attention", "forward"): _named("tokens queries", (512, 8), (1024, 8), (2048, 8), (2048, 32)),
    ("paged attention", "forward"): _named("tokens", (512,), (1024,), (2048,)),
    ("tokamax splash", "forward"): _named(
        f"{_SPLASH} scheduler diagonal",
        (1024, 1024, 512, 0, 0, 0),
        (1024, 1024, 512, 0, 1, 0),
        (2048, 1024, 512, 0, 1, 0),
        (2048, 2048, 512, 0, 1, 0),
        (512, 512, 512, 0, 0, 2),
        (1024, 1024, 1024, 0, 0, 2),
        (1024, 1024, 1024, 0, 0, 4),
    ),
    ("tokamax splash", "backward"): _named(
        f"{_SPLASH_BACKWARD} reduction",
        (512, 512, 512, 3),
        (1024, 1024, 512, 3),
        (1024, 1024, 512, 0),
        (1024, 1024, 1024, 3),
        (2048, 1024, 512, 3),
        (1024, 2048, 512, 0),
    ),
    ("tokamax ragged_dot", "forward"): _named(
        "block_m block_n block_k buffers",
        (512, 1024, 1024, 2),
        (512, 1024, 2048, 2),
        (512, 1024, 4096, 2),
        (1024, 1024, 1024, 2),
        (512, 2048, 1024, 2),
    ),
    ("tokamax gmm_v2", "forward"): (
        {},
        *_named("block_m block_n block_k", (512, 1024, 1024), (512, 1024, 4096), (256, 1024, 4096), (512, 2048, 2048)),
    ),
    ("tokamax cross-entropy", "forward"): _named(
        "b_block_size h_block_size v_block_size",
        (1024, 512, 2048),
        (2048, 512, 1024),
        (1024, 1024, 1024),
        (2048, 1024, 1024),
        (1024, 4096, 512),
    ),
    ("tokamax cross-entropy", "backward"): _named(
        "b_block_size h_block_size v_block_size",
        (1024, 512, 2048),
        (1024, 1024, 1024),
        (2048, 512, 1024),
        (1024, 512, 1024),
    ),
}

LADDERS: dict[tuple[str, str], Ladders] = {
    ("splash", "forward"): {"seq_minor": (0, 1, 2, 3), **dict.fromkeys(_SPLASH.split()[:3], _LARGE)},
    ("splash", "backward"): dict.fromkeys((*_SPLASH_BACKWARD.split(), "block_q_dq", "block_kv_dq"), _LARGE),
    ("flash", "forward"): dict.fromkeys(("block_q", "block_k_major", "block_k"), _LARGE),
    ("flash", "backward"): dict.fromkeys((*_FLASH_DKV.split(), *_FLASH_DQ.split()), _LARGE),
    ("pallas matmul", "forward"): dict.fromkeys(("block_m", "block_n", "block_k"), _SIDES),
    ("megablox", "forward"): dict.fromkeys(("block_m", "block_n", "block_k"), (*_SIDES, 7168, 14336)),
    ("ragged paged attention", "forward"): {"tokens": _SIDES, "queries": (1, 2, 4, 8, 16, 32)},
    ("paged attention", "forward"): {"tokens": _SIDES},
    ("tokamax splash", "forward"): {
        "seq_minor": (0, 1, 2, 3), "scheduler": (0, 1), **dict.fromkeys(_SPLASH.split()[:3], _LARGE),
    },
    ("tokamax splash", "backward"): {**dict.fromkeys(_SPLASH_BACKWARD.split(), _LARGE), "reduction": (0, 3)},
    ("tokamax ragged_dot", "forward"): dict.fromkeys(("block_m", "block_n", "block_k"), (*_SIDES, 7168, 14336)),
    ("tokamax gmm_v2", "forward"): dict.fromkeys(("block_m", "block_n", "block_k"), (*_SIDES, 7168, 14336)),
    **{
        ("tokamax cross-entropy", way): dict.fromkeys(("b_block_size", "h_block_size", "v_block_size"), _LARGE)
        for way in ("forward", "backward")
    },
    ("attention", "forward"): dict.fromkeys(("forward.block_q", "forward.block_kv"), _SIDES),
    ("attention", "backward"): dict.fromkeys(("dkv.block_q", "dkv.block_kv"), _SIDES),
    ("matmul", "forward"): dict.fromkeys(("block_m", "block_n", "block_k"), _SIDES),
    ("grouped_matmul", "forward"): dict.fromkeys(
        ("forward.block_m", "forward.block_n", "forward.block_k"), (*_SIDES, 7168, 14336)
    ),
    ("paged_attention", "forward"): dict.fromkeys(("decode.block_kv",), _SIDES),
}  # fmt: skip


def grid(contest: Contest, peer: str) -> Grid:
    """The tiles that a peer begins with: those of its grid that are no longer than the sequence."""
    return tuple(tiles for tiles in GRIDS[peer, contest.direction] if _fits(contest, tiles))


def ladders(contest: Contest, contestant: str, tiles: Mapping[str, int] | None) -> dict[str, tuple[int, ...]]:
    """The values that each of the fields in `tiles` may take, in a search that goes on from them; None is all fields.

    The contestant is a peer's name, or for our own kernels their op.
    """
    found = LADDERS.get((contestant, contest.direction), {})
    return {
        name: tuple(step for step in found[name] if _fits(contest, {name: step}))
        for name in found
        if tiles is None or name in tiles
    }


def _fits(contest: Contest, tiles: Mapping[str, int]) -> bool:
    shape = get_shape(contest.shape)
    if not isinstance(shape, AttentionShape):
        return True
    return all(size <= shape.q_len for name, size in tiles.items() if "block" in name)
