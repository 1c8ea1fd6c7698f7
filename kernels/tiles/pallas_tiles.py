"""What the TPU kernels share: tile arithmetic, padding, and how a target turns into the arguments of `pallas_call`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import gcd
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .targets import MIB, Target
from .tpu_blocks import even_block, vmem_budget

SUBLANES, LANES = 8, 128  # the shape of a vector register of float32
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
PRODUCTS_AT_ONCE = 4  # of a loop over columns: between iterations the matrix unit runs empty. In parts each is many
LOW_PRODUCTS = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1))  # of the parts of two float32, beside the leading (0, 0)

_interpreter: ContextVar[Any] = ContextVar("interpreter", default=True)


@contextmanager
def interpreter(params: Any) -> Iterator[None]:
    """Which interpreter stands in for an absent chip, for what is traced inside.

    True (the default) turns a kernel into plain XLA operations: fast, without callbacks, outputs and scratch NaN at the
    start. `pltpu.InterpretParams(detect_races=True)` simulates the memories and the DMAs of a chip: slow, and strict.
    """
    token = _interpreter.set(params)
    try:
        yield
    finally:
        _interpreter.reset(token)


def call_params(
    target: Target, dimension_semantics: Sequence[Literal["parallel", "arbitrary"]], checks_copies: bool = True
) -> dict[str, Any]:
    """The arguments of `pallas_call` that depend on the target: an interpreter, or the compiler's limits.

    checks_copies: whether the chip stops at a copy from outside of an array. The test takes longer than the start of a
    copy, and is left out where shapes alone say what is copied, or the kernel keeps what others say within bounds.
    """
    if target.interpreted:
        return {"interpret": _interpreter.get()}
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=tuple(dimension_semantics),
            vmem_limit_bytes=vmem_budget(target),
            disable_bounds_checks=not checks_copies,
        )
    }


def few_registers(target: Target) -> bool:
    """Whether the chip has 32 vector registers, as v4 has: its successors have 64, and more VMEM."""
    return 0 < target.on_chip_bytes <= 16 * MIB


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below size."""
    return -(-size // multiple) * multiple


def fit_block(name: str, block: int, size: int, target: Target) -> int:
    """The block to use for an array of that size: the blocks are made even, so that the last is not mostly padding.

    A compiled block is a multiple of 128. Raises ValueError with the name of a block that is not.
    """
    unit = SUBLANES if target.interpreted else LANES
    if block < 1 or block % unit:
        raise ValueError(f"{name}: got {block}; it must be a positive multiple of {unit}")
    return even_block(block, size, unit)


def whole_or_fit(name: str, block: int, size: int, target: Target) -> int:
    """The whole of an array's dimension if the block holds it, else blocks of even size."""
    return size if size <= block else fit_block(name, block, size, target)


def stretch_room(other_bytes: int, target: Target) -> int:
    """The VMEM for the rows that a kernel walks, beside other_bytes that it needs in any case."""
    if target.interpreted:
        return 9 * 2**14  # several stretches even in a short test
    return min(vmem_budget(target) // 2, vmem_budget(target) - MIB - other_bytes)


def stretch(size: int, block: int, row_bytes: int, room: int) -> tuple[int, int]:
    """Cut rows that a kernel walks block by block into even stretches of at most `room` bytes, a block at least.

    Returns the length of a stretch and how many there are; their product is the length to pad to.
    """
    blocks = -(-size // block)
    count = -(-blocks // max(1, room // (row_bytes * block)))
    return -(-blocks // count) * block, count


def pad_to(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros after the end of one axis, up to that size."""
    if array.shape[axis] == size:
        return array
    widths = [(0, size - array.shape[axis] if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths)


def rows(array: jax.Array, length: int) -> jax.Array:
    """[batch, length, heads, dim] -> [batch, heads, padded length, dim]."""
    return pad_to(array.transpose(0, 2, 1, 3), 2, length)


def columns(array: jax.Array, length: int) -> jax.Array:
    """[batch, length, heads, dim] -> [batch, heads, dim, padded length]."""
    return pad_to(array.transpose(0, 2, 3, 1), 3, length)


def common_rows(most: int, rows: int) -> int:
    """A divisor of `rows`, whole registers of them: the greatest that divides `most` too. rows is a multiple of 8."""
    return SUBLANES * gcd(max(most // SUBLANES, 1), rows // SUBLANES)


def fold(tile: jax.Array) -> jax.Array:
    """[rows, n] -> [rows / 8, 8, n]: reduced over its first axis, what is left fills a register's sublanes."""
    return tile.reshape(-1, SUBLANES, tile.shape[1])


def unfold(tile: jax.Array) -> jax.Array:
    """Back to [rows, n]."""
    return tile.reshape(-1, tile.shape[2])


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [m, k] @ b [k, n] in float32."""
    return contract(a, b, (1, 0))


def dot_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [m, k] @ b [n, k] transposed, in float32."""
    return contract(a, b, (1, 1))


def contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product of two matrices along one axis of each, in float32."""
    # float32 operands multiply as float32 (six bfloat16 passes), narrower ones in the one pass they need.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def in_chunks(size: int, chunk: int, body: Callable[[Any], None], at_once: int = 1, start: Any = 0) -> None:
    """Run the body on slices of that many rows or columns, and on what is left; `at_once` are scheduled together.

    The slices begin at start, a multiple of the chunk.
    """

    def step(index: jax.Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(start + index * chunk, chunk), chunk))

    if size // chunk == 1:
        body(pl.ds(start, chunk))
    elif size > chunk:
        lax.fori_loop(0, size // chunk, step, None, unroll=at_once)
    if size % chunk:
        body(pl.ds(start + size // chunk * chunk, size % chunk))


def elementwise_piece(target: Target) -> tuple[int, int]:
    """Rows and columns that an elementwise loop takes at a time: with every intermediate value they fill the registers.

    TPU v4 has 32 vector registers of [8, 128] float32, the later chips 64. An interpreter has none, and slow loops.
    """
    return {"v4": (16, 256), "interpret": (64, 512)}.get(target.name, (16, 512))


def turned_piece(target: Target, dtype: Any) -> tuple[int, int]:
    """The same where a block is turned round: what is turned at a time is 128 by 128, and several of 16 bits overlap.

    XLA on a CPU would turn a block that is one piece by multiplying the other way, for which it has no bfloat16.
    """
    alone = target.interpreted or few_registers(target) or dtype == jnp.float32
    return (LANES, LANES) if alone else (4 * LANES, 4 * LANES)


def in_pieces(shape: tuple[int, int], piece: tuple[int, int], body: Callable[[Any, Any], None]) -> None:
    """Run an elementwise body on pieces of a tile, so that nothing goes to memory between load and store."""
    in_chunks(shape[0], piece[0], lambda rows: in_chunks(shape[1], piece[1], lambda cols: body(rows, cols)))


def split_parts(block_ref: Any, parts_ref: Any, piece: tuple[int, int], turned: bool = False) -> list[Any]:
    """Write a block as a sum of parts, [parts, rows, columns], turned round where asked.

    Three bfloat16 hold all 24 bits of a float32. Six products of them, those down to 2**-16 of the largest, give the
    float32 product (Henry, Tang & Heinecke, arXiv:1904.06376). The compiler's own split spills, having no room for it.
    """

    def write(rows: Any, cols: Any) -> None:
        write_parts(parts_ref, rows, cols, block_ref[cols, rows].T if turned else block_ref[rows, cols])

    in_pieces(parts_ref.shape[1:], piece, write)
    return [parts_ref.at[index] for index in range(parts_ref.shape[0])]


def write_parts(parts_ref: Any, rows: Any, cols: Any, rest: jax.Array) -> None:
    """Write a tile as the sum of its parts; one part is the tile itself, rounded."""
    for index in range(parts_ref.shape[0]):
        part = rest.astype(parts_ref.dtype)
        parts_ref[index, rows, cols] = part
        if index + 1 < parts_ref.shape[0]:
            rest = rest - part.astype(jnp.float32)
