"""Blocks on a TPU: the memory for them, how an array shrinks one, and the tile of a product that moves least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .targets import Target

BLOCKS = (4096, 2048, 1024, 512, 256)


# Steps along k, and the most rows of a tile that are multiplied without a spill in steps of just so many; 0 stands for
# uneven steps. The deeper a step, the less often sums are read and written.
_STEPS = {"v6e": {512: 4096, 0: 2048}, "v7x": {1024: 1024, 512: 2048, 0: 1024}}
_USUAL = {512: BLOCKS[0]}


def deepest_step(target: Target, lengths: Sequence[int]) -> tuple[int, int]:
    """The step along k and the most rows of a tile, given all lengths along which products are summed; () is any."""
    steps = _STEPS.get(target.name, _USUAL)
    for step, rows in steps.items():
        if step and lengths and not any(length % step for length in lengths):
            return step, rows
    return 512, steps.get(0, BLOCKS[0])


def vmem_budget(target: Target) -> int:
    """The VMEM that a kernel may use: all but what XLA keeps for itself."""
    return target.on_chip_bytes * 7 // 8


def best_tile(
    target: Target,
    needed: Callable[[int, int], int],
    most: tuple[int, int],
    lefts: int = 1,
    rights: int = 1,
) -> tuple[int, int]:
    """Rows and columns of the tile, given the bytes of VMEM that a tile needs with all that passes by it.

    `most` are the array's rows and columns, or what else limits them: a block is less than twice as long. A step brings
    a block of each of the left operands, as high as the tile, and of each of the right ones, as wide as it.
    """
    smallest = BLOCKS[-1]
    fitting = [
        (-(lefts / n + rights / m), m, n)
        for m in BLOCKS
        for n in BLOCKS
        if (m < 2 * most[0] or m == smallest) and (n < 2 * most[1] or n == smallest)
        if needed(m, n) <= vmem_budget(target)
    ]
    _, rows, columns = max(fitting, default=(0.0, smallest, smallest))
    return rows, columns


def even_block(block: int, size: int, unit: int = 128) -> int:
    """The least multiple of the unit with which an array is cut into as few blocks as with `block`."""
    count = -(-size // block)
    return -(-size // (count * unit)) * unit


def shrunk_block(block: int, size: int) -> int:
    """What a kernel makes of a block: the whole of an array's dimension that it holds, else one of even blocks."""
    return size if size <= block else even_block(block, size)


def is_safe(target: Target, rows: int, step: int, length: int) -> bool:
    """Whether a tile of so many rows, summed over a length in such steps, is known to spill nothing."""
    return length % step == 0 or rows <= _STEPS.get(target.name, _USUAL).get(0, BLOCKS[0])
