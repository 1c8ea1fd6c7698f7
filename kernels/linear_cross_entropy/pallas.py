"""Linear cross-entropy for TPUs, after Cut Cross-Entropy (Wijmans et al., arXiv:2411.09009).

Three kernels, each with one tile of rows that stays in VMEM while tiles of the other operand pass by: of tokens in the
forward, which keeps a running peak and sum of exponentials (Milakov & Gimelshein, arXiv:1805.02867), and for dhidden;
of the vocabulary for dweight. The backward kernels compute the tiles of logits again, and sum in float32 in VMEM:
nothing but the results leaves it.

Tiles of logits lie as [vocab, tokens], so that what belongs to a token is a row along the lanes. A tile is gone through
a few columns at a time: as many as the matrix unit holds, or as fill the vector registers. Blocks that stick out of an
array hold garbage there; sums along such a dimension read no further than its end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tiles.pallas_tiles import LANES, SUBLANES, call_params, contract, fit_block, in_chunks, write_parts
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import Target
from ..tiles.tpu_blocks import vmem_budget
from .pallas_tiling import (
    FEATURES_AT_ONCE,
    add_products,
    cap,
    columns_at_once,
    fold,
    multiply,
    over_rows,
    parts_of,
    piece_of,
    turn,
    whole_and_last,
)
from .spec import IGNORED, LinearCrossEntropySpec
from .tiles import LinearCrossEntropyConfig, tpu_bytes

Result = jax.Array | None


def supports(spec: LinearCrossEntropySpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can."""
    reasons = pallas_reasons(target, dtype=spec.dtype)
    needed = max(tpu_bytes(spec, kernel, LANES, LANES) for kernel in (("forward", "dhidden")[: 1 + needs_grad]))
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
    lse, target_logit, logit_sum = pl.pallas_call(
        partial(
            _forward_kernel, softcap=spec.softcap, vocab=vocab, columns=columns_at_once(target), piece=piece_of(target)
        ),
        grid=(batch, pl.cdiv(tokens, block_t), pl.cdiv(vocab, block_v)),
        in_specs=[
            pl.BlockSpec((None, block_t, features), lambda b, i, j: (b, i, 0)),
            pl.BlockSpec((None, block_v, features), lambda b, i, j: (b, j, 0)),
            per_token,
        ],
        out_specs=[per_token, per_token, per_token if spec.sums else None],
        out_shape=[row, row, row if spec.sums else None],
        scratch_shapes={
            **_scratch(spec, block_t, block_v),
            "peak_ref": pltpu.VMEM((1, block_t), jnp.float32),
            "total_ref": pltpu.VMEM((1, block_t), jnp.float32),
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
    run = partial(_gradient, spec, target, hidden, weight, rows)
    return run(config.dhidden, "dhidden"), run(config.dweight, "dweight"), None


def _gradient(
    spec: LinearCrossEntropySpec,
    target: Target,
    hidden: jax.Array,
    weight: jax.Array,
    per_token: list[Result],
    tiles: Any,
    name: str,
) -> jax.Array:
    """dhidden or dweight: the tile of rows that it has stays, the tiles of the other pass by."""
    (batch, tokens, features), vocab = hidden.shape, weight.shape[1]
    of_tokens = name == "dhidden"
    block_t = fit_block("block_tokens", tiles.block_tokens, tokens, target)
    block_v = fit_block("block_vocab", tiles.block_vocab, vocab, target)
    counts = (pl.cdiv(tokens, block_t), pl.cdiv(vocab, block_v))

    def index(b: Any, outer: Any, inner: Any) -> tuple[Any, Any, Any]:
        return (b, outer, inner) if of_tokens else (b, inner, outer)

    tokens_spec = pl.BlockSpec((None, block_t, features), lambda *at: (index(*at)[0], index(*at)[1], 0))
    vocab_spec = pl.BlockSpec((None, block_v, features), lambda *at: (index(*at)[0], index(*at)[2], 0))
    row_spec = pl.BlockSpec((None, 1, block_t), lambda *at: (index(*at)[0], 0, index(*at)[1]))
    stays, block = (hidden, block_t) if of_tokens else (weight, block_v)
    parts, kind = (3, jnp.bfloat16) if spec.dtype == "float32" else (1, hidden.dtype)
    scratch = _scratch(spec, block_t, block_v) | {"dlogits_ref": pltpu.VMEM((parts, block_v, block_t), kind)}
    if of_tokens:
        scratch["turned_ref"] = pltpu.VMEM((parts, block_t, block_v), kind)
    if spec.dtype != "float32":
        scratch["sums_ref"] = pltpu.VMEM((block, features), jnp.float32)
    return pl.pallas_call(
        partial(
            _gradient_kernel,
            softcap=spec.softcap,
            size=vocab if of_tokens else tokens,
            columns=columns_at_once(target),
            piece=piece_of(target),
        ),
        grid=(batch, *(counts if of_tokens else counts[::-1])),
        in_specs=[tokens_spec, vocab_spec, *(None if row is None else row_spec for row in per_token)],
        out_specs=tokens_spec if of_tokens else vocab_spec,
        out_shape=jax.ShapeDtypeStruct(stays.shape, stays.dtype),
        scratch_shapes=scratch,
        name=f"linear_cross_entropy_{name}",
        **call_params(target, ("parallel", "parallel", "arbitrary")),
    )(hidden, weight, *per_token)


def _scratch(spec: LinearCrossEntropySpec, block_t: int, block_v: int) -> dict[str, Any]:
    """A tile of logits, and for float32 the parts of some features of its operands."""
    scratch = {"logits_ref": pltpu.VMEM((block_v, block_t), jnp.float32)}
    if spec.dtype == "float32":
        width = min(FEATURES_AT_ONCE, spec.features)
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
    logits_ref: Any,
    hidden_parts: Any | None = None,
    weight_parts: Any | None = None,
    peak_ref: Any,
    total_ref: Any,
    softcap: float | None,
    vocab: int,
    columns: int,
    piece: tuple[int, int],
) -> None:
    """A tile of the vocabulary joins what is known of a tile of tokens: the other references are [1, tokens]."""
    step, steps = pl.program_id(2), pl.num_programs(2)
    block_v, block_t = logits_ref.shape
    first = step * block_v

    @pl.when(step == 0)
    def _start() -> None:
        peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
        for ref in (total_ref, target_logit_ref, logit_sum_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    multiply((hidden_ref, hidden_parts), (weight_ref, weight_parts), logits_ref, columns, piece)

    def take_in(rows: int, cols: Any) -> None:
        """Some columns of the tile, of which the first `rows` are there."""
        target = targets_ref[:, cols] - first
        nothing = jnp.zeros((SUBLANES, target.shape[1]), jnp.float32)

        def look(at: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            logits, _ = cap(logits_ref[at, cols], softcap)
            row = at.start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            seen = logits if rows == block_v else jnp.where(row < rows, logits, -jnp.inf)
            if softcap is not None or rows != block_v:
                logits_ref[at, cols] = seen
            sums = [jnp.where(row == target, logits, 0)]
            if logit_sum_ref is not None:
                sums.append(logits if rows == block_v else jnp.where(row < rows, logits, 0))
            added = (so_far + fold(x, jnp.sum) for so_far, x in zip(found[1:], sums, strict=True))
            return (jnp.maximum(found[0], fold(seen, jnp.max)), *added)

        def weigh(at: Any, total: jax.Array) -> jax.Array:
            # The difference first: scaled apart, large logits would lose what lies between them.
            return total + fold(jnp.exp(logits_ref[at, cols] - peak), jnp.sum)

        sums = (nothing,) if logit_sum_ref is None else (nothing, nothing)
        highest, *added = over_rows(block_v, piece[0], look, (nothing - jnp.inf, *sums))
        before = peak_ref[:, cols]
        peak = jnp.maximum(before, jnp.max(highest, axis=0, keepdims=True))
        total = jnp.sum(over_rows(block_v, piece[0], weigh, nothing), axis=0, keepdims=True)
        total_ref[:, cols] = total_ref[:, cols] * jnp.exp(before - peak) + total
        peak_ref[:, cols] = peak
        for ref, sums in zip((target_logit_ref, logit_sum_ref), added, strict=False):
            ref[:, cols] += jnp.sum(sums, axis=0, keepdims=True)

    whole_and_last(step, steps, block_v, vocab, lambda rows: in_chunks(block_t, piece[1], partial(take_in, rows)))

    @pl.when(step == steps - 1)
    def _finish() -> None:
        counted = targets_ref[...] != IGNORED
        lse_ref[...] = jnp.where(counted, peak_ref[...] + jnp.log(total_ref[...]), 0)
        for ref in (target_logit_ref, logit_sum_ref):
            if ref is not None:
                ref[...] = jnp.where(counted, ref[...], 0)


def _gradient_kernel(
    hidden_ref: Any,
    weight_ref: Any,
    targets_ref: Any,
    lse_ref: Any,
    dlse_ref: Any | None,
    dtarget_ref: Any | None,
    dsum_ref: Any | None,
    out_ref: Any,
    *,
    logits_ref: Any,
    hidden_parts: Any | None = None,
    weight_parts: Any | None = None,
    dlogits_ref: Any,
    turned_ref: Any | None = None,
    sums_ref: Any | None = None,
    softcap: float | None,
    size: int,
    columns: int,
    piece: tuple[int, int],
) -> None:
    """A tile of logits [vocab, tokens], its gradient, and what that adds to a tile of dhidden or of dweight."""
    sums_ref = out_ref if sums_ref is None else sums_ref  # float32 results are their own sums
    of_tokens = turned_ref is not None
    step, steps = pl.program_id(2), pl.num_programs(2)
    block_v, block_t = logits_ref.shape
    first = (step if of_tokens else pl.program_id(1)) * block_v
    multiply((hidden_ref, hidden_parts), (weight_ref, weight_parts), logits_ref, columns, piece)

    def differentiate(cols: Any) -> None:
        target, lse = targets_ref[:, cols] - first, lse_ref[:, cols]
        counted = targets_ref[:, cols] != IGNORED

        def write(at: Any, _: None) -> None:
            logits, slope = cap(logits_ref[at, cols], softcap)
            gradient = jnp.zeros_like(logits)
            if dlse_ref is not None:
                gradient += jnp.exp(logits - lse) * dlse_ref[:, cols]
            if dtarget_ref is not None:
                row = at.start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
                gradient += jnp.where(row == target, dtarget_ref[:, cols], 0)
            if dsum_ref is not None:
                gradient += dsum_ref[:, cols]
            gradient = gradient if softcap is None else gradient * slope
            write_parts(dlogits_ref, at, cols, jnp.where(counted, gradient, 0))

        over_rows(block_v, piece[0], write, None)

    in_chunks(block_t, piece[1], differentiate)
    if turned_ref is not None:
        for part in range(turned_ref.shape[0]):
            turn(dlogits_ref.at[part], turned_ref.at[part])

    def add(length: int) -> None:
        """The first `length` of this step's rows: those that the sum is along."""

        def add_columns(cols: Any) -> None:
            if turned_ref is not None:
                dlogits, rows = turned_ref, parts_of(weight_ref.at[:, cols], weight_parts, piece)
            else:
                dlogits, rows = dlogits_ref, parts_of(hidden_ref.at[:, cols], hidden_parts, piece)

            def product(p: Any, q: Any) -> jax.Array:
                return contract(dlogits[p, :, :length], rows(q)[:length, :], (1, 0))

            add_products(sums_ref, cols, product, dlogits.shape[0] > 1, step == 0)

        in_chunks(sums_ref.shape[1], columns, add_columns)

    whole_and_last(step, steps, block_v if of_tokens else block_t, size, add)

    if sums_ref is not out_ref:

        @pl.when(step == steps - 1)
        def _finish() -> None:
            def write(cols: Any) -> None:
                def cast(at: Any, _: None) -> None:
                    out_ref[at, cols] = sums_ref[at, cols].astype(out_ref.dtype)

                over_rows(out_ref.shape[0], 2 * piece[0], cast, None)

            in_chunks(out_ref.shape[1], piece[1], write)
