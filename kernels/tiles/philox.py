"""Random bits that are a function of a seed and a place: the Philox generator, for dropout that is never stored.

Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with seven rounds, the fewest that
pass BigCrush. Every implementation of an op computes the same bits, in any order and as often as it likes.

A weight at (b, h, i, j) has word `j // 8 % 4` of the block whose counter is (`j // 32 * 8 + j % 8`, i, h, b): blocks of
32 neighbouring keys take eight calls, and a kernel that holds keys by eights just puts the four words together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_LOW, _WORD = 0xFFFF, 0xFFFFFFFF

Key = tuple[Any, Any]
Words = tuple[Any, Any, Any, Any]


def philox(key: Key, counter: Words, integer: Callable[[int], Any]) -> Words:
    """Four words of 32 bits for each counter, which broadcast.

    Arrays are of unsigned 32-bit integers, or of wider ones that hold as much; `integer` makes one constant of them.
    """
    for _ in range(ROUNDS):
        key, counter = philox_round(key, counter, integer)
    return counter


def philox_round(key: Key, words: Words, integer: Callable[[int], Any]) -> tuple[Key, Words]:
    """One round, and the next one's key."""
    first, second, third, fourth = words
    (high, low), (other_high, other_low) = (
        _product(word, multiplier, integer) for word, multiplier in zip((first, third), MULTIPLIERS, strict=True)
    )
    words = other_high ^ second ^ key[0], other_low, high ^ fourth ^ key[1], low
    low_key, high_key = ((part + integer(step)) & integer(_WORD) for part, step in zip(key, WEYL, strict=True))
    return (low_key, high_key), words


def _product(word: Any, multiplier: int, integer: Callable[[int], Any]) -> tuple[Any, Any]:
    """The high and the low half of a product, from products of 16 bits, which no type here overflows."""
    low, high = word & integer(_LOW), word >> integer(16)
    times_low, times_high = integer(multiplier & _LOW), integer(multiplier >> 16)
    lowest = low * times_low
    middle = high * times_low + (lowest >> integer(16))
    other = low * times_high + (middle & integer(_LOW))
    return (
        high * times_high + (middle >> integer(16)) + (other >> integer(16)),
        (lowest & integer(_LOW)) | ((other & integer(_LOW)) << integer(16)),
    )


def threshold(dropout: float) -> int:
    """A word below it is dropped."""
    return min(round(dropout * 2**32), _WORD)


def block_of(j: Any) -> Any:
    """The part of the counter that the keys of a block differ in."""
    return j // 32 * 8 + j % 8


def word_of(j: Any) -> Any:
    """Which of a block's four words a key has."""
    return j // 8 % 4


def kept(
    seed: Any, dropout: float, indices: tuple[Any, Any, Any, Any], integer: Callable[[int], Any], where: Any
) -> Any:
    """Which weights stay, at places (b, h, i, j) that broadcast; seed holds two words, the low one first."""
    b, h, i, j = indices
    words = philox((seed[0], seed[1]), (block_of(j), i, h, b), integer)
    number = word_of(j)
    chosen = words[3]
    for word in (2, 1, 0):
        chosen = where(number == word, words[word], chosen)
    return chosen >= integer(threshold(dropout))
