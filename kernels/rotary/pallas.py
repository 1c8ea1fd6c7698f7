"""Rotary position embedding for TPUs.

cos and sin come from XLA, as wide as one head or a few; the kernel is a pass over q and k, `[block_length, heads *
head_dim]` at a time. The partner of each element is fetched by rolling the lanes of whole heads: what comes round from
the other end belongs to no pair there, and is not taken.
"""

from __future__ import annotations

from functools import partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_tiles import LANES, SUBLANES, call_params, few_registers, in_chunks, pad_to, round_up
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import MIB, Target
from ..tiles.tpu_blocks import vmem_budget
from .spec import RotarySpec
from .tiles import RotaryConfig

FIRST, SECOND, ALONE = 0, 1, 2  # the role of an element in its pair
ROWS = 16  # of a block that are worked on at a time: a tile of bfloat16 is as high


def supports(spec: RotarySpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Forward and backward are alike."""
    reasons = pallas_reasons(target, dtype=spec.dtype)
    width = spec.heads * spec.head_dim
    if target.is_tpu and width > (most := _widest(spec, target)):
        reasons.append(
            f"x: its heads have {width} elements together; the Pallas kernels keep all heads of a few positions in "
            f"VMEM, and {target.name} has room for {most}: use implementation='library', or rotate q and k apart"
        )
    return tuple(reasons)


def _widest(spec: RotarySpec, target: Target) -> int:
    """The most elements of a position of which ROWS positions fit VMEM as inputs and as outputs, all of it twice."""
    item_bytes = 4 if spec.dtype == "float32" else 2
    tables = 2 * 2 * 4 * ROWS * lcm(spec.head_dim, LANES)
    return (vmem_budget(target) - MIB - tables) // (2 * 2 * ROWS * item_bytes)


def forward(
    spec: RotarySpec,
    config: RotaryConfig,
    target: Target,
    q: jax.Array,
    k: jax.Array | None,
    positions: jax.Array,
    frequencies: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """q and k, rotated."""
    return _rotate(spec, config, target, q, k, positions, frequencies, 1)


def backward(
    spec: RotarySpec,
    config: RotaryConfig,
    target: Target,
    inputs: tuple[jax.Array, jax.Array | None, jax.Array, jax.Array],
    outputs: tuple[jax.Array, jax.Array | None],
    gradients: tuple[jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array | None, None, None]:
    """dq, dk (None where there is no k), and nothing of positions and frequencies."""
    _, k, positions, frequencies = inputs
    dq, dk = _rotate(spec, config, target, *gradients, positions, frequencies, -1)
    return dq, (jnp.zeros_like(k) if k is not None and dk is None else dk), None, None


def _rotate(
    spec: RotarySpec,
    config: RotaryConfig,
    target: Target,
    q: jax.Array,
    k: jax.Array | None,
    positions: jax.Array,
    frequencies: jax.Array,
    direction: int,
) -> tuple[jax.Array, jax.Array | None]:
    """q and k, rotated one way (1) or back (-1); one that has no elements is its own result."""
    if config.block_length < 1 or config.block_length % ROWS:
        raise ValueError(f"config: block_length is {config.block_length}; it must be a positive multiple of {ROWS}")
    filled = [x for x in (q, k) if x is not None and 0 not in x.shape]
    if not filled:
        return q, k
    width = min(lcm(spec.head_dim, LANES), max(round_up(x.shape[2] * x.shape[3], LANES) for x in filled))
    tables = _tables(spec, positions, frequencies, direction, width)
    results = iter(_launch(spec, config, target, filled, *tables))
    rotated_q, rotated_k = (x if x is None or 0 in x.shape else next(results) for x in (q, k))
    assert rotated_q is not None
    return rotated_q, rotated_k


def _launch(
    spec: RotarySpec, config: RotaryConfig, target: Target, arrays: list[jax.Array], cos: jax.Array, sin: jax.Array
) -> list[jax.Array]:
    """The arrays [batch, length, heads, head_dim], rotated by the tables [batch, length, width]."""
    batch, length, width = cos.shape
    if length == 1:  # as when decoding: then the batch fills the sublanes
        batch, length = 1, batch
        cos, sin = (table.reshape(batch, length, width) for table in (cos, sin))
    rows = min(config.block_length, length)
    flat = [pad_to(x.reshape(batch, length, -1), 2, round_up(x.shape[2] * x.shape[3], LANES)) for x in arrays]

    def block(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, x.shape[2]), lambda b, i: (b, i, 0))

    found = pl.pallas_call(
        partial(_kernel, spec=spec, height=_height(width, target)),
        grid=(batch, pl.cdiv(length, rows)),
        in_specs=[pl.BlockSpec((1, width), lambda b, i: (0, 0)), *(block(x) for x in (cos, sin, *flat))],
        out_specs=[block(x) for x in flat],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat],
        name="rotary",
        **call_params(target, ("parallel", "parallel")),
    )(_roles(spec, width), cos, sin, *flat)
    return [out[:, :, : x.shape[2] * x.shape[3]].reshape(x.shape) for x, out in zip(arrays, found, strict=True)]


def _tables(
    spec: RotarySpec, positions: jax.Array, frequencies: jax.Array, direction: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """cos, and sin with the sign that each element's partner takes, float32 [batch, length, width]: heads repeated."""
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None]
    cos, sin = spec.factor * jnp.cos(angles), direction * spec.factor * jnp.sin(angles)
    if spec.interleaved:
        cos, sin = (jnp.stack(parts, -1).reshape(*angles.shape[:2], -1) for parts in ((cos, cos), (-sin, sin)))
    else:
        cos, sin = (jnp.concatenate(parts, -1) for parts in ((cos, cos), (-sin, sin)))
    copies = pl.cdiv(width, spec.head_dim)
    cos, sin = (jnp.tile(pad_to(part, 2, spec.head_dim), (1, 1, copies))[:, :, :width] for part in (cos, sin))
    return cos, sin


def _roles(spec: RotarySpec, width: int) -> jax.Array:
    """int32 [1, width]: whether each element is the first of its pair, the second, or in none."""
    place = np.arange(width) % spec.head_dim
    is_second = place % 2 == 1 if spec.interleaved else place >= spec.rotary_dim // 2
    roles = np.where(place < spec.rotary_dim, np.where(is_second, SECOND, FIRST), ALONE)
    return jnp.asarray(roles[None], jnp.int32)


def _kernel(roles_ref: Any, cos_ref: Any, sin_ref: Any, *refs: Any, spec: RotarySpec, height: int) -> None:
    """Rows [block_length, heads * head_dim] of each input into the output of the same place in `refs`."""
    length, width = cos_ref.shape

    def some_rows(rows: Any) -> None:
        for x_ref, out_ref in zip(refs[: len(refs) // 2], refs[len(refs) // 2 :], strict=True):
            in_chunks(x_ref.shape[1], width, partial(some_heads, x_ref, out_ref, rows))

    def some_heads(x_ref: Any, out_ref: Any, rows: Any, cols: Any) -> None:
        x = x_ref[rows, cols].astype(jnp.float32)
        within = pl.ds(0, cols.size)
        role = jnp.broadcast_to(roles_ref[:, within], x.shape)
        out = x * cos_ref[rows, within] + _partners(spec, x, role) * sin_ref[rows, within]
        if spec.rotary_dim < spec.head_dim:
            out = jnp.where(role == ALONE, x, out)
        out_ref[rows, cols] = out.astype(out_ref.dtype)

    in_chunks(length, height, some_rows)


def _height(width: int, target: Target) -> int:
    """How many rows of that width fit the vector registers with every value in between."""
    return SUBLANES if few_registers(target) and width > LANES else ROWS


def _partners(spec: RotarySpec, x: jax.Array, role: jax.Array) -> jax.Array:
    """The other element of each element's pair; of one that is alone, anything."""
    width = x.shape[1]
    apart = 1 if spec.interleaved else spec.rotary_dim // 2
    before = pltpu.roll(x, apart, 1)
    if width == 2 * apart:
        return before
    after = pltpu.roll(x, width - apart, 1)
    return jnp.where(role == FIRST, after, before)
