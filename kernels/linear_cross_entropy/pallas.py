"""Linear cross-entropy for TPUs, after Cut Cross-Entropy (Wijmans et al., arXiv:2411.09009).

Two kernels, each with one tile of rows that stays in VMEM while tiles of the other operand pass by: of tokens in the
forward, which keeps a running peak and sum of exponentials (Milakov & Gimelshein, arXiv:1805.02867); of the vocabulary
in the backward, which computes the tiles of logits again. It sums dweight in VMEM, where dhidden of all tokens has no
room: its float32 sums pass by with the tokens, and what the tile adds to them is written back (`pallas_passing.py`).

Tiles of logits lie as [vocab, tokens], so that what belongs to a token is a row along the lanes. Of 16-bit types a tile
is never whole: two strips of its columns take turns, of which one is summed by the matrix unit while the vector units
work through the other (`pallas_tiling.py`). Blocks that stick out of an array hold garbage there; sums along such a
dimension read no further than its end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_tiles import (
    LANES,
    SUBLANES,
    call_params,
    contract,
    fit_block,
    fold,
    in_chunks,
    in_pieces,
    round_up,
    write_parts,
)
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import Target
from ..tiles.tpu_blocks import vmem_budget
from .pallas_passing import PassingSums, passing_scratch
from .pallas_tiling import (
    Walk,
    add_products,
    cap,
    multiply,
    parts_of,
    rows_of_strip,
    walk_of,
    walk_strips,
    whole_and_last,
)
from .spec import IGNORED, LinearCrossEntropySpec
from .tiles import LinearCrossEntropyConfig, LinearCrossEntropyTiles, passing_columns, tpu_bytes

Result = jax.Array | None


def supports(spec: LinearCrossEntropySpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can."""
    reasons = pallas_reasons(target, dtype=spec.dtype)
    needed = max(tpu_bytes(spec, kernel, LANES, LANES) for kernel in (("forward", "backward")[: 1 + needs_grad]))
    if target.is_tpu and needed > vmem_budget(target):
        reasons.append(
            f"hidden: {spec.features} features; the smallest tiles of {spec.dtype} take {needed} bytes of VMEM of the "
            f"{vmem_budget(target)} that a kernel may use on {target.name}; use implementation='library'"
        )
    return tuple(reasons)


def forward(
    spec: LinearCrossEntropySpec,
    config: LinearCrossEntropyConfig,
    target: Target,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array, Result]:
    """lse and target_logit [batch, tokens], and logit_sum where the spec asks for it."""
    (batch, tokens, features), vocab = hidden.shape, weight.shape[1]
    row = jax.ShapeDtypeStruct((batch, 1, tokens), jnp.float32)
    if 0 in row.shape:
        empty = jnp.zeros((batch, tokens), jnp.float32)
        return empty, empty, (empty if spec.sums else None)
    block_t = fit_block("block_tokens", config.forward.block_tokens, tokens, target)
    block_v = fit_block("block_vocab", config.forward.block_vocab, vocab, target)
    per_token = pl.BlockSpec((None, 1, block_t), lambda b, i, j: (b, 0, i))
    walk = walk_of(target)
    per_sublane = pltpu.VMEM((SUBLANES, block_t), jnp.float32)
    lse, target_logit, logit_sum = pl.pallas_call(
        partial(_forward_kernel, softcap=spec.softcap, vocab=vocab, block_v=block_v, walk=walk),
        grid=(batch, pl.cdiv(tokens, block_t), pl.cdiv(vocab, block_v)),
        in_specs=[
            pl.BlockSpec((None, block_t, features), lambda b, i, j: (b, i, 0)),
            pl.BlockSpec((None, block_v, features), lambda b, i, j: (b, j, 0)),
            per_token,
        ],
        out_specs=[per_token, per_token, per_token if spec.sums else None],
        out_shape=[row, row, row if spec.sums else None],
        scratch_shapes={
            **_logits_scratch(spec, walk, block_t, block_v),
            "peak_ref": per_sublane,
            "total_ref": per_sublane,
            "at_target_ref": per_sublane,
            **({"sum_ref": per_sublane} if spec.sums else {}),
        },
        name="linear_cross_entropy_forward",
        **call_params(target, ("parallel", "parallel", "arbitrary")),
    )(hidden, weight, targets[:, None, :])
    return lse[:, 0], target_logit[:, 0], (logit_sum[:, 0] if spec.sums else None)


def backward(
    spec: LinearCrossEntropySpec,
    config: LinearCrossEntropyConfig,
    target: Target,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    outputs: tuple[jax.Array, Result, Result],
    gradients: tuple[Result, Result, Result],
) -> tuple[jax.Array, jax.Array, None]:
    """dhidden and dweight; targets have no gradient."""
    hidden, weight, targets = inputs
    if 0 in hidden.shape:
        return jnp.zeros_like(hidden), jnp.zeros_like(weight), None
    counted = targets != IGNORED
    hidden = jnp.where(counted[..., None], hidden, 0)  # a NaN there would reach dweight as 0 * NaN
    rows: list[Result] = [targets[:, None, :]]
    for statistic in (outputs[0], *gradients):
        rows.append(None if statistic is None else jnp.where(counted, statistic, 0)[:, None, :])
    return *_gradients(spec, config.dweight, target, hidden, weight, rows), None


def _gradients(
    spec: LinearCrossEntropySpec,
    tiles: LinearCrossEntropyTiles,
    target: Target,
    hidden: jax.Array,
    weight: jax.Array,
    per_token: list[Result],
) -> tuple[jax.Array, jax.Array]:
    """dhidden and dweight: a tile of the vocabulary stays while the tokens pass by, and with them the sums of dhidden.

    Each core of a device takes a share of the vocabulary, and has sums of dhidden of its own.
    """
    (batch, tokens, features), vocab = hidden.shape, weight.shape[1]
    block_t = fit_block("block_tokens", tiles.block_tokens, tokens, target)
    block_v = fit_block("block_vocab", tiles.block_vocab, vocab, target)
    walk = walk_of(target, turned=True)
    count, unit = pl.cdiv(vocab, block_v), walk.columns
    width = unit if target.interpreted else passing_columns(features, block_t, unit)
    shares = min(1 + target.siblings, count)
    steps = pl.cdiv(count, shares)

    def vocab_index(b: Any, share: Any, step: Any, _: Any) -> tuple[Any, Any, Any]:
        # Without a tile of its own a step keeps the one before, and leaves it as it is.
        return b, jnp.minimum(share * steps + step, count - 1), 0

    vocab_spec = pl.BlockSpec((None, block_v, features), vocab_index)
    row_spec = pl.BlockSpec((None, 1, block_t), lambda b, share, step, i: (b, 0, i))
    sums = round_up(tokens, block_t), round_up(features, width)
    parts, kind = (3, jnp.bfloat16) if spec.dtype == "float32" else (1, hidden.dtype)
    scratch = _logits_scratch(spec, walk, block_t, block_v) | passing_scratch(sums, (block_t, width))
    rows = scratch["strips"][0].shape[0] if "strips" in scratch else block_v
    scratch["dlogits_ref"] = pltpu.VMEM((parts, rows, block_t), kind)
    scratch["turned_ref"] = pltpu.VMEM((parts, block_t, rows), kind)
    if spec.dtype != "float32":
        scratch["dweight_sums_ref"] = pltpu.VMEM((block_v, features), jnp.float32)
    dhidden, dweight = pl.pallas_call(
        partial(_gradients_kernel, softcap=spec.softcap, tokens=tokens, vocab=vocab, block_v=block_v, walk=walk),
        grid=(batch, shares, steps, pl.cdiv(tokens, block_t)),
        in_specs=[
            pl.BlockSpec((None, block_t, features), lambda b, share, step, i: (b, i, 0)),
            vocab_spec,
            *(None if row is None else row_spec for row in per_token),
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), vocab_spec],
        out_shape=[
            jax.ShapeDtypeStruct((batch, shares, *sums), jnp.float32),
            jax.ShapeDtypeStruct(weight.shape, weight.dtype),
        ],
        scratch_shapes=scratch,
        name="linear_cross_entropy_backward",
        **call_params(target, ("parallel", "parallel", "arbitrary", "arbitrary")),
    )(hidden, weight, *per_token)
    return dhidden[:, :, :tokens, :features].sum(axis=1).astype(hidden.dtype), dweight


def _logits_scratch(spec: LinearCrossEntropySpec, walk: Walk, block_t: int, block_v: int) -> dict[str, Any]:
    """Two strips of a tile of logits, or all of it; for float32 with the parts of some features of its operands."""
    if spec.dtype != "float32" and block_t % (2 * walk.columns) == 0:
        return {"strips": (pltpu.VMEM((rows_of_strip(walk, block_v, spec.features), walk.columns), jnp.float32),) * 2}
    scratch = {"logits_ref": pltpu.VMEM((block_v, block_t), jnp.float32)}
    if spec.dtype == "float32":
        width = min(walk.features, spec.features)
        scratch["hidden_parts"] = pltpu.VMEM((3, block_t, width), jnp.bfloat16)
        scratch["weight_parts"] = pltpu.VMEM((3, block_v, width), jnp.bfloat16)
    return scratch


def _forward_kernel(
    hidden_ref: Any,
    weight_ref: Any,
    targets_ref: Any,
    lse_ref: Any,
    target_logit_ref: Any,
    logit_sum_ref: Any | None,
    *,
    peak_ref: Any,
    total_ref: Any,
    at_target_ref: Any,
    sum_ref: Any = None,
    logits_ref: Any = None,
    strips: Any = (),
    hidden_parts: Any | None = None,
    weight_parts: Any | None = None,
    softcap: float | None,
    vocab: int,
    block_v: int,
    walk: Walk,
) -> None:
    """A tile of the vocabulary joins what is known of a tile of tokens: scratch of them is [8, tokens], by sublane."""
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _start() -> None:
        peak_ref[...] = jnp.full_like(peak_ref, jnp.finfo(jnp.float32).min)
        for ref in (total_ref, at_target_ref, sum_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    def take_in(logits: jax.Array, rows: Any, cols: Any, first: Any) -> None:
        """Some rows of the logits of some tokens; first: the first row of their tile."""
        logits, _ = cap(logits, softcap)
        row = rows.start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        there = row < jnp.minimum(vocab - first, block_v)
        before, seen = peak_ref[:, cols], fold(jnp.where(there, logits, -jnp.inf))
        peak = jnp.maximum(before, jnp.max(seen, axis=0))
        # The difference first: scaled apart, large logits would lose what lies between them.
        total_ref[:, cols] = total_ref[:, cols] * jnp.exp(before - peak) + jnp.sum(jnp.exp(seen - peak), axis=0)
        peak_ref[:, cols] = peak
        is_target = there & (row == targets_ref[:, cols] - first)
        at_target_ref[:, cols] += jnp.sum(fold(jnp.where(is_target, logits, 0)), axis=0)
        if sum_ref is not None:
            sum_ref[:, cols] += jnp.sum(fold(jnp.where(there, logits, 0)), axis=0)

    if strips:
        walk_strips(walk, hidden_ref, weight_ref, strips, block_v, take_in, across=True)
    else:
        multiply((hidden_ref, hidden_parts), (weight_ref, weight_parts), logits_ref, walk)

        in_pieces(
            logits_ref.shape,
            walk.piece,
            lambda rows, cols: take_in(logits_ref[rows, cols], rows, cols, step * block_v),
        )

    @pl.when(step == steps - 1)
    def _finish() -> None:
        peak, counted = jnp.max(peak_ref[...], axis=0, keepdims=True), targets_ref[...] != IGNORED
        total = jnp.sum(total_ref[...] * jnp.exp(peak_ref[...] - peak), axis=0, keepdims=True)
        lse_ref[...] = jnp.where(counted, peak + jnp.log(total), 0)
        for ref, sums in ((target_logit_ref, at_target_ref), (logit_sum_ref, sum_ref)):
            if ref is not None:
                ref[...] = jnp.where(counted, jnp.sum(sums[...], axis=0, keepdims=True), 0)


def _gradients_kernel(
    hidden_ref: Any,
    weight_ref: Any,
    targets_ref: Any,
    lse_ref: Any,
    dlse_ref: Any | None,
    dtarget_ref: Any | None,
    dsum_ref: Any | None,
    dhidden_ref: Any,
    dweight_ref: Any,
    *,
    dlogits_ref: Any,
    turned_ref: Any,
    parts_ref: Any,
    read: Any,
    written: Any,
    dweight_sums_ref: Any = None,
    logits_ref: Any = None,
    strips: Any = (),
    hidden_parts: Any | None = None,
    weight_parts: Any | None = None,
    softcap: float | None,
    tokens: int,
    vocab: int,
    block_v: int,
    walk: Walk,
) -> None:
    """A tile of logits [vocab, tokens], its gradient, that turned, and what they add to dweight and to dhidden."""
    batch, share, step, inner = (pl.program_id(axis) for axis in range(4))
    steps, inners, count = pl.num_programs(2), pl.num_programs(3), pl.cdiv(vocab, block_v)
    tile, (block_t, features) = share * steps + step, hidden_ref.shape
    passes = jnp.minimum(steps, count - share * steps)
    passing = PassingSums(dhidden_ref.at[batch, share], parts_ref, read, written, passes)
    sums_ref = dweight_ref if dweight_sums_ref is None else dweight_sums_ref  # float32 results are their own sums
    width = parts_ref.shape[2]

    def differentiate(logits: jax.Array, rows: Any, cols: Any, _: Any) -> None:
        """Write the gradient of some rows of the logits of some tokens."""
        logits, slope = cap(logits, softcap)
        gradient = jnp.zeros_like(logits)
        if dlse_ref is not None:
            gradient += jnp.exp(logits - lse_ref[:, cols]) * dlse_ref[:, cols]
        if dtarget_ref is not None:
            row = rows.start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            gradient += jnp.where(row == targets_ref[:, cols] - tile * block_v, dtarget_ref[:, cols], 0)
        if dsum_ref is not None:
            gradient += dsum_ref[:, cols]
        gradient = gradient if softcap is None else gradient * slope
        gradient = jnp.where(targets_ref[:, cols] != IGNORED, gradient, 0)
        write_parts(dlogits_ref, rows, cols, gradient)
        write_parts(turned_ref, cols, rows, gradient.T)

    def add(cols: Any) -> None:
        """What the tile adds to the columns of a part."""

        def add_to_dweight(length: int) -> None:
            _add_products(
                sums_ref.at[:, cols], dlogits_ref, hidden_ref.at[:, cols], hidden_parts, walk, length, inner == 0
            )

        def add_to_dhidden(part_ref: Any, first: Any) -> None:
            part_ref, block_ref = part_ref.at[:, : cols.size], weight_ref.at[:, cols]
            whole_and_last(
                tile, count, block_v, vocab,
                lambda length: _add_products(part_ref, turned_ref, block_ref, weight_parts, walk, length, first),
            )  # fmt: skip

        whole_and_last(inner, inners, block_t, tokens, add_to_dweight)
        number = (step * inners + inner) * pl.cdiv(features, width) + lax.div(cols.start, width)
        passing.add(number, add_to_dhidden)

    @pl.when(tile < count)
    def _tile() -> None:
        if strips:
            walk_strips(walk, hidden_ref, weight_ref, strips, block_v, differentiate)
        else:
            multiply((hidden_ref, hidden_parts), (weight_ref, weight_parts), logits_ref, walk)
            in_pieces(
                logits_ref.shape,
                (LANES, LANES),
                lambda rows, cols: differentiate(logits_ref[rows, cols], rows, cols, None),
            )
        in_chunks(features, width, add)

        if sums_ref is not dweight_ref:

            @pl.when(inner == inners - 1)
            def _finish() -> None:
                def cast(rows: Any, cols: Any) -> None:
                    dweight_ref[rows, cols] = sums_ref[rows, cols].astype(dweight_ref.dtype)

                in_pieces(dweight_ref.shape, (2 * walk.piece[0], walk.piece[1]), cast)


def _add_products(
    sums_ref: Any, left_ref: Any, right_ref: Any, right_parts: Any | None, walk: Walk, length: int, first: Any
) -> None:
    """Add left @ right, or that of their parts, summed along no more than a length; the first time nothing is there."""

    def add_columns(cols: Any) -> None:
        rows = parts_of(right_ref.at[:, cols], right_parts, walk.piece)

        def product(p: Any, q: Any) -> jax.Array:
            return contract(left_ref[p, : sums_ref.shape[0], :length], rows(q)[:length, :], (1, 0))

        add_products(sums_ref, cols, product, left_ref.shape[0] > 1, first)

    in_chunks(sums_ref.shape[1], walk.columns, add_columns, walk.at_once)
