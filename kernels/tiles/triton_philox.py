"""The bits of `philox.py` inside GPU kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import MULTIPLIERS, ROUNDS, WEYL

_ROUNDS: tl.constexpr = tl.constexpr(ROUNDS)
_FIRST: tl.constexpr = tl.constexpr(MULTIPLIERS[0])
_SECOND: tl.constexpr = tl.constexpr(MULTIPLIERS[1])
_FIRST_STEP: tl.constexpr = tl.constexpr(WEYL[0])
_SECOND_STEP: tl.constexpr = tl.constexpr(WEYL[1])


@triton.jit
def philox(low, high, first, second, third, fourth):
    """Four words for each counter; all are uint32, and of one shape."""
    for _ in tl.static_range(_ROUNDS):
        product = tl.umulhi(first, tl.full(first.shape, _FIRST, tl.uint32))
        other = tl.umulhi(third, tl.full(third.shape, _SECOND, tl.uint32))
        fourth_word = first * tl.full((), _FIRST, tl.uint32)
        second_word = third * tl.full((), _SECOND, tl.uint32)
        first = other ^ second ^ low
        third = product ^ fourth ^ high
        second = second_word
        fourth = fourth_word
        low += tl.full((), _FIRST_STEP, tl.uint32)
        high += tl.full((), _SECOND_STEP, tl.uint32)
    return first, second, third, fourth


@triton.jit
def kept(seed, place, THRESHOLD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which weights of a tile stay: bool [BLOCK_Q, BLOCK_KV], or transposed. `place` is (item, head, row, column).

    A tile of 32 columns or more, which begins at a multiple of 32, takes a call for four of them.
    """
    item, head, first_row, first_column = place
    SHARED: tl.constexpr = BLOCK_KV >= 32
    COUNTERS: tl.constexpr = BLOCK_KV // 4 if SHARED else BLOCK_KV
    if SHARED:
        blocks = first_column // 4 + tl.arange(0, COUNTERS)
    else:
        columns = first_column + tl.arange(0, COUNTERS)
        blocks = columns // 32 * 8 + columns % 8
    zeros = tl.zeros([BLOCK_Q, COUNTERS], tl.uint32)
    rows = first_row + tl.arange(0, BLOCK_Q)
    one, two, three, four = philox(
        tl.load(seed).to(tl.uint32, bitcast=True), tl.load(seed + 1).to(tl.uint32, bitcast=True),
        zeros + blocks.to(tl.uint32)[None, :], zeros + rows.to(tl.uint32)[:, None],
        zeros + tl.cast(head, tl.uint32), zeros + tl.cast(item, tl.uint32),
    )  # fmt: skip
    if SHARED:  # [BLOCK_Q, columns / 32 * 8, 2, 2] -> [BLOCK_Q, columns / 32, 4 words, 8]
        words = tl.join(tl.join(one, three), tl.join(two, four))
        words = tl.permute(tl.reshape(words, [BLOCK_Q, BLOCK_KV // 32, 8, 2, 2]), [0, 1, 3, 4, 2])
        words = tl.reshape(words, [BLOCK_Q, BLOCK_KV])
    else:
        number = (columns // 8 % 4)[None, :]
        words = tl.where(number == 0, one, tl.where(number == 1, two, tl.where(number == 2, three, four)))
    if TRANSPOSED:
        words = tl.trans(words)
    return words >= tl.full((), THRESHOLD, tl.uint32)
