"""The tile sizes of linear cross-entropy: what `config=` takes, and the choice made without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..tiles.targets import MIB, Target
from ..tiles.tpu_blocks import even_block, vmem_budget
from .spec import LinearCrossEntropySpec


@dataclass(frozen=True)
class LinearCrossEntropyTiles:
    """A tile of block_tokens by block_vocab by block_features; the three products sum along one of them each.

    block_features, num_warps and num_stages are for GPUs; a TPU kernel holds all features of its rows.
    """

    block_tokens: int
    block_vocab: int
    block_features: int = 64
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True)
class LinearCrossEntropyConfig:
    """Tiles of the products: logits (forward, and again in the backward), dhidden and dweight.

    A TPU has one kernel for the whole backward, with dweight's tiles. span, part_tokens and part_vocab are for GPUs:
    how many tiles of the vocabulary a program of the forward walks; for how many tokens dhidden is summed at a time, in
    float32; and for how many rows of the vocabulary dweight is.
    """

    forward: LinearCrossEntropyTiles
    dhidden: LinearCrossEntropyTiles
    dweight: LinearCrossEntropyTiles
    span: int = 8
    part_tokens: int = 2048
    part_vocab: int = 2048


CONFIG = LinearCrossEntropyConfig


class LinearCrossEntropySizes(NamedTuple):
    """What the tuned tables know of a call's arrays."""

    tokens: int
    vocab: int
    features: int


def sizes_of(spec: LinearCrossEntropySpec, inputs: tuple[Any, ...]) -> LinearCrossEntropySizes:
    """The sizes of canonical inputs."""
    return LinearCrossEntropySizes(inputs[0].shape[1], inputs[1].shape[1], spec.features)


def kinds_of(spec: LinearCrossEntropySpec) -> dict[str, Any]:
    """What of a spec the tuned tables match exactly."""
    return {"dtype": spec.dtype, "softcap": spec.softcap is not None, "sums": spec.sums}


def fits(
    spec: LinearCrossEntropySpec, target: Target, config: LinearCrossEntropyConfig, sizes: LinearCrossEntropySizes
) -> bool:
    """Whether a TPU's VMEM holds the rows of its tiles, which are as long as the call's features."""
    if not target.is_tpu:
        return True
    forward, backward = config.forward, config.dweight
    needed = (
        tpu_bytes(spec, "forward", forward.block_tokens, forward.block_vocab),
        tpu_bytes(spec, "backward", backward.block_tokens, backward.block_vocab),
    )
    return max(needed) <= vmem_budget(target)


_T = LinearCrossEntropyTiles

# Sums stay in registers (sm_100: in tensor memory), and the parts of the backward fill a GPU: a part of dhidden or
# dweight has 2048 rows, at least 144 tiles at 2304 features.
_NARROW_GPU = {
    "sm_80": LinearCrossEntropyConfig(_T(128, 128, 64), _T(128, 64, 128), _T(64, 128, 128, num_stages=5)),
    "sm_90": LinearCrossEntropyConfig(_T(128, 256, 64), _T(128, 64, 256), _T(64, 128, 256, num_stages=5)),
    "sm_100": LinearCrossEntropyConfig(_T(128, 256, 64), _T(128, 64, 256), _T(64, 128, 256, num_stages=5)),
    "gfx942": LinearCrossEntropyConfig(
        _T(128, 128, 64, num_stages=2), _T(128, 64, 256, num_stages=2), _T(64, 128, 256, num_stages=2)
    ),
    "gfx950": LinearCrossEntropyConfig(
        _T(128, 256, 64, num_stages=3), _T(128, 64, 256, num_stages=2), _T(64, 128, 256, num_stages=2)
    ),
}
_FLOAT32_GPU = LinearCrossEntropyConfig(_T(64, 128, 16), _T(128, 16, 128), _T(16, 128, 128))
_FLOAT32_SM_80 = replace(_FLOAT32_GPU, forward=_T(64, 128, 16, num_warps=4))
_INTERPRET = LinearCrossEntropyConfig(
    _T(32, 32, 32), _T(32, 32, 32), _T(32, 32, 32), span=2, part_tokens=32, part_vocab=32
)
_TPU_BLOCKS = (1024, 512, 256, 128)
_TPU_BACKWARD = ((1024, 2048), (1024, 1024), (512, 1024), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128))
PASSING_SLOTS = 4  # of float32 sums of dhidden: one part is added to, those to come are read, those before are written


def choose_config(
    spec: LinearCrossEntropySpec, target: Target, sizes: LinearCrossEntropySizes | None = None
) -> LinearCrossEntropyConfig:
    """Tiles for arrays of any size on that chip; kernels shrink a tile that is larger than its array."""
    if target.interpreted:
        return _INTERPRET
    if target.is_tpu:
        forward, backward = (_T(*tpu_blocks(spec, target, kernel)) for kernel in ("forward", "backward"))
        return LinearCrossEntropyConfig(forward, backward, backward)
    if spec.dtype == "float32":
        return _FLOAT32_SM_80 if target.name == "sm_80" else _FLOAT32_GPU
    return _NARROW_GPU[target.name]


def tpu_blocks(spec: LinearCrossEntropySpec, target: Target, kernel: str) -> tuple[int, int]:
    """Tokens and rows of the vocabulary of a tile: the largest whose rows, with all their features, fit the VMEM.

    The rows that stay are more than those that pass by: each byte that passes is then used more often. But a forward of
    a 16-bit type takes as many rows that pass by at a time as it can, since each step has work that does not grow with
    them.
    """
    room = target.on_chip_bytes * 3 // 4
    most = room if spec.dtype == "float32" else vmem_budget(target)
    if kernel == "backward":
        candidates = [(most, *blocks) for blocks in _TPU_BACKWARD]
    else:
        deep = () if spec.dtype == "float32" else (4096, 2048, 1024)
        candidates = [(most, stays, passes) for passes in deep for stays in (1024, 512)]
        candidates += [
            (room, stays, passes) for stays in _TPU_BLOCKS for passes in _TPU_BLOCKS if passes <= min(stays, 512)
        ]
    fitting = (blocks for most, *blocks in candidates if tpu_bytes(spec, kernel, *blocks) <= most)
    first, second = next(fitting, (128, 128))
    return first, second


def tpu_bytes(spec: LinearCrossEntropySpec, kernel: str, tokens: int, vocab: int) -> int:
    """VMEM of a kernel: its blocks twice, since the next is fetched meanwhile, its sums, and a tile of logits."""
    item = 4 if spec.dtype == "float32" else 2
    features = -(-spec.features // 128) * 128
    needed = 2 * (tokens + vocab) * features * item + tokens * vocab * 4
    if kernel == "backward":
        needed += 2 * vocab * features * item  # dweight
        needed += 2 * tokens * vocab * 2 * (3 if item == 4 else 1)  # the gradient of the logits, and that turned
        needed += PASSING_SLOTS * tokens * passing_columns(spec.features, tokens) * 4
        if item < 4:
            needed += vocab * features * 4  # dweight's sums
    if item == 4:
        needed += (tokens + vocab) * 512 * 6  # the three parts of some features
    return needed + MIB // 2


def passing_columns(features: int, block_tokens: int, unit: int = 256) -> int:
    """How many columns of dhidden's sums pass by together, a multiple of the unit: the more, the fewer pauses."""
    return even_block(min(4 * block_tokens, 2048), features, unit)
