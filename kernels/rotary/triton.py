"""Rotary position embedding for NVIDIA and AMD GPUs.

One launch rotates q and k. A program takes BLOCK_LENGTH positions and BLOCK_HEADS heads of one of the two: cos and sin
are computed once, in float32, and serve all these heads. The backward is the same launch with the angles negated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_products import strides
from ..tiles.triton_tiles import advance, needs_wide_offsets
from .spec import RotarySpec
from .tiles import RotaryConfig

_AXES = "batch", "row", "head", "col"


def supports(spec: RotarySpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    return tuple(triton_reasons(target, dtype=spec.dtype))


def forward(
    spec: RotarySpec, config: RotaryConfig, q: Array, k: Array | None, positions: Array, frequencies: Array
) -> Plan:
    """The launch that writes rotated_q and, where there is a k, rotated_k."""
    results = ("rotated_q",) if k is None else ("rotated_q", "rotated_k")
    return _plan(spec, config, ("q", q), ("k", k), k, positions, frequencies, results, backward=False)


def backward(
    spec: RotarySpec,
    config: RotaryConfig,
    inputs: tuple[Array, Array | None, Array, Array],
    outputs: tuple[Array, Array | None],
    gradients: tuple[Array, Array | None],
) -> Plan:
    """The launch that writes dq and, where there is a k, dk."""
    _, k, positions, frequencies = inputs
    q_source, k_source = ("drotated_q", gradients[0]), ("drotated_k", gradients[1])
    results = ("dq",) if k is None else ("dq", "dk")
    return _plan(spec, config, q_source, k_source, k, positions, frequencies, results, backward=True)


def _plan(
    spec: RotarySpec,
    config: RotaryConfig,
    q: tuple[str, Array],
    source_of_k: tuple[str, Array | None],
    k: Array | None,
    positions: Array,
    frequencies: Array,
    results: tuple[str, ...],
    backward: bool,
) -> Plan:
    """The launch that rotates two named sources; that of k may be absent where k is not, and is then all zeros."""
    for name in ("block_length", "block_heads"):
        size = getattr(config, name)
        if size < 1 or size & (size - 1):
            raise ValueError(f"config: {name} is {size}; it must be a power of two")
    (q_name, q_source), (k_name, k_source) = q, source_of_k
    batch, length, q_heads, head_dim = q_source.shape
    k_heads = 0 if k is None else k.shape[2]
    block_length = min(config.block_length, triton.next_power_of_2(max(1, length)))
    groups = sum(triton.cdiv(heads, config.block_heads) for heads in (q_heads, k_heads))
    outputs = {results[0]: contiguous(q_source.shape, spec.dtype)}
    if k is not None:
        outputs[results[1]] = contiguous(k.shape, spec.dtype)
    launch = Launch(
        _rotary,
        (batch * triton.cdiv(length, block_length) * groups,),
        inputs=(q_name, "" if k_source is None else k_name, "positions", "frequencies", *[""] * (k is None)),
        outputs=tuple(reversed(results)),
        numbers={
            "length": length,
            "factor": spec.factor,
            **strides("q", q_source, *_AXES),
            **strides("k", k_source, *_AXES),
            "positions_batch": positions.strides[0] if batch > 1 else 0,
            "positions_row": positions.strides[1],
            "frequencies_batch": frequencies.strides[0] if batch > 1 else 0,
            "frequencies_col": frequencies.strides[1],
        },
        constants={
            "Q_HEADS": q_heads,
            "K_HEADS": k_heads,
            "K_IS_ZERO": k is not None and k_source is None,
            "HEAD_DIM": head_dim,
            "ROTARY_DIM": spec.rotary_dim,
            "INTERLEAVED": spec.interleaved,
            "BACKWARD": backward,
            "WIDE": _wide(block_length, [q_source, k_source, *outputs.values()]),
            "BLOCK_LENGTH": block_length,
            "BLOCK_HEADS": config.block_heads,
        },
        num_warps=config.num_warps,
    )
    read = {q_name: q_source, k_name: k_source, "positions": positions, "frequencies": frequencies}
    return Plan((launch,), {name: array for name, array in read.items() if array is not None}, outputs)


def _wide(rows: int, arrays: list[Array | None]) -> bool:
    """Whether offsets inside a tile of one head need 64 bits; a tile can be twice as wide as the head."""
    return needs_wide_offsets(
        (rows, 2 * array.shape[3], array.strides[1], array.strides[3]) for array in arrays if array is not None
    )


@triton.jit(do_not_specialize=["length"])
def _rotary(
    q, k, positions, frequencies, rotated_k, rotated_q,
    length, factor,
    q_batch, q_row, q_head, q_col, k_batch, k_row, k_head, k_col,
    positions_batch, positions_row, frequencies_batch, frequencies_col,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, K_IS_ZERO: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_LENGTH: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of some positions; cos and sin are [BLOCK_LENGTH, PAIRS], half of a head padded to a power of two."""
    PAIRS: tl.constexpr = triton.next_power_of_2(ROTARY_DIM // 2)
    Q_GROUPS: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    GROUPS: tl.constexpr = Q_GROUPS + (K_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    group = tl.program_id(0) % GROUPS
    tiles = tl.cdiv(length, BLOCK_LENGTH)
    row = tl.program_id(0) // GROUPS % tiles * BLOCK_LENGTH
    batch = tl.program_id(0) // (GROUPS * tiles)

    rows = tl.arange(0, BLOCK_LENGTH)
    pairs = tl.arange(0, PAIRS)
    rows_exist = rows < length - row
    positions = advance(advance(positions, batch, positions_batch), row, positions_row)
    frequencies = advance(frequencies, batch, frequencies_batch)
    position = tl.load(positions + rows.to(tl.int64) * positions_row, mask=rows_exist, other=0)
    frequency = tl.load(frequencies + pairs * frequencies_col, mask=pairs < ROTARY_DIM // 2, other=0.0)
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    cos = tl.cos(angle) * factor
    sin = tl.sin(angle) * factor
    if BACKWARD:
        sin = -sin

    first = (tl.cast(batch, tl.int64) * length + row) * HEAD_DIM
    if group < Q_GROUPS:
        q = advance(advance(q, batch, q_batch), row, q_row)
        _rotate_heads(
            (q, q_row, q_head, q_col), rotated_q + first * Q_HEADS, cos, sin, group * BLOCK_HEADS, rows_exist,
            False, Q_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, WIDE, BLOCK_HEADS,
        )  # fmt: skip
    elif K_HEADS:
        if not K_IS_ZERO:
            k = advance(advance(k, batch, k_batch), row, k_row)
        _rotate_heads(
            (k, k_row, k_head, k_col), rotated_k + first * K_HEADS, cos, sin, (group - Q_GROUPS) * BLOCK_HEADS,
            rows_exist, K_IS_ZERO, K_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, WIDE, BLOCK_HEADS,
        )  # fmt: skip


@triton.jit
def _rotate_heads(
    source, out, cos, sin, first_head, rows_exist,
    IS_ZERO: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """BLOCK_HEADS heads, or as many as there are. source is (pointer, row stride, head stride, column stride)."""
    PAIRS: tl.constexpr = cos.shape[1]
    REST: tl.constexpr = HEAD_DIM - ROTARY_DIM
    target = (out, HEADS * HEAD_DIM, HEAD_DIM, 1)
    for head in range(first_head, tl.minimum(first_head + BLOCK_HEADS, HEADS)):
        if INTERLEAVED:
            tile = _load(source, head, 0, rows_exist, IS_ZERO, ROTARY_DIM, 2 * PAIRS, WIDE, cos)
            left, right = tl.split(tl.reshape(tile, [cos.shape[0], PAIRS, 2]))
        else:
            left = _load(source, head, 0, rows_exist, IS_ZERO, ROTARY_DIM // 2, PAIRS, WIDE, cos)
            right = _load(source, head, ROTARY_DIM // 2, rows_exist, IS_ZERO, ROTARY_DIM // 2, PAIRS, WIDE, cos)
        turned_left = left * cos - right * sin
        turned_right = right * cos + left * sin
        if INTERLEAVED:
            tile = tl.reshape(tl.join(turned_left, turned_right), [cos.shape[0], 2 * PAIRS])
            _store(target, head, 0, tile, rows_exist, ROTARY_DIM, WIDE)
        else:
            _store(target, head, 0, turned_left, rows_exist, ROTARY_DIM // 2, WIDE)
            _store(target, head, ROTARY_DIM // 2, turned_right, rows_exist, ROTARY_DIM // 2, WIDE)
        if REST:
            rest = _load(source, head, ROTARY_DIM, rows_exist, IS_ZERO, REST, triton.next_power_of_2(REST), WIDE, cos)
            _store(target, head, ROTARY_DIM, rest, rows_exist, REST, WIDE)


@triton.jit
def _pointers(array, head, first_col, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """[ROWS, WIDTH] addresses in one head, from its column `first_col`."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    if WIDE:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
    first = advance(advance(array[0], head, array[2]), first_col, array[3])
    return first + (rows[:, None] * array[1] + cols[None, :] * array[3])


@triton.jit
def _load(
    source, head, first_col, rows_exist,
    IS_ZERO: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, like,
):  # fmt: skip
    """float32 [rows, WIDTH] of a head's COLS columns from `first_col`, or zeros; `like` has as many rows."""
    if IS_ZERO:
        tile = tl.zeros([like.shape[0], WIDTH], tl.float32)
    else:
        mask = rows_exist[:, None] & (tl.arange(0, WIDTH) < COLS)[None, :]
        pointers = _pointers(source, head, first_col, like.shape[0], WIDTH, WIDE)
        tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _store(target, head, first_col, tile, rows_exist, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Write COLS columns of a head from `first_col`, of a tile that may be wider."""
    mask = rows_exist[:, None] & (tl.arange(0, tile.shape[1]) < COLS)[None, :]
    pointers = _pointers(target, head, first_col, tile.shape[0], tile.shape[1], WIDE)
    tl.store(pointers, tile.to(target[0].dtype.element_ty), mask=mask)
