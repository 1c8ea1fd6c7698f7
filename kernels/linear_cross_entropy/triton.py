"""Linear cross-entropy for NVIDIA and AMD GPUs, after Cut Cross-Entropy (Wijmans et al., arXiv:2411.09009).

A program of the forward keeps one tile of tokens and walks some tiles of the vocabulary. Of each tile of logits only
the row's peak, its sum of exponentials and the target's logit remain (the online softmax of Milakov & Gimelshein,
arXiv:1805.02867); a small kernel joins what the programs of a row found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_products import halves, indices, strides
from ..tiles.triton_tiles import LN_2, LOG2_E, advance
from .spec import LinearCrossEntropySpec
from .tiles import LinearCrossEntropyConfig
from .triton_backward import backward
from .triton_common import AT_ONCE, NO_TOKEN, cap, logits_arguments, per_token, products

JOIN_TOKENS, JOIN_PARTS = 64, 16  # the tile of the kernel that joins the programs' results

__all__ = ["backward", "forward", "supports"]


def supports(spec: LinearCrossEntropySpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    return tuple(triton_reasons(target, dtype=spec.dtype))


def forward(
    spec: LinearCrossEntropySpec, config: LinearCrossEntropyConfig, hidden: Array, weight: Array, targets: Array
) -> Plan:
    """Launches that write lse, target_logit and, where the spec asks for it, logit_sum."""
    (batch, tokens, _), vocab = hidden.shape, weight.shape[1]
    inputs = {"hidden": hidden, "weight": weight, "targets": targets}
    arguments = logits_arguments(spec, config.forward, inputs)
    block_t, block_v = arguments["constants"]["BLOCK_T"], arguments["constants"]["BLOCK_V"]
    splits = triton.cdiv(triton.cdiv(vocab, block_v), config.span)
    row, parts = contiguous((batch, tokens), "float32"), contiguous((batch, splits, tokens), "float32")
    walk = Launch(
        _forward,
        (batch * splits * triton.cdiv(tokens, block_t),),
        inputs=tuple(inputs) if spec.sums else (*inputs, ""),  # the place of part_sum, which is then absent
        outputs=("part_sum", "part_lse", "target_logit") if spec.sums else ("part_lse", "target_logit"),
        **arguments | {"constants": {**arguments["constants"], "SUMS": spec.sums, "SPAN": config.span}},
    )
    join = Launch(
        _join,
        (batch * triton.cdiv(tokens, JOIN_TOKENS),),
        inputs=("targets", "part_lse", "part_sum") if spec.sums else ("targets", "part_lse", "", ""),
        outputs=("logit_sum", "lse") if spec.sums else ("lse",),
        numbers={"tokens": tokens, "splits": splits, **strides("targets", targets, "batch", "row")},
        constants={"SUMS": spec.sums, "BLOCK_T": JOIN_TOKENS, "BLOCK_S": JOIN_PARTS},
    )
    outputs = {"lse": row, "target_logit": row} | ({"logit_sum": row} if spec.sums else {})
    return Plan((walk, join), inputs, outputs, {"part_lse": parts} | ({"part_sum": parts} if spec.sums else {}))


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    hidden, weight, targets, part_sum, part_lse, target_logit,
    tokens, vocab, features, softcap,
    hidden_batch, hidden_row, hidden_col, weight_batch, weight_row, weight_col, targets_batch, targets_row,
    CAPPED: tl.constexpr, SUMS: tl.constexpr, SPAN: tl.constexpr,
    EVEN_V: tl.constexpr, EVEN_F: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A tile of tokens against SPAN tiles of the vocabulary; part_lse and part_sum are [batch, splits, tokens].

    The tiles of tokens come first in the order of programs: those that run together read the same weight.
    """
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    tiles_v = tl.cdiv(vocab, BLOCK_V)
    splits = tl.cdiv(tiles_v, SPAN)
    row = tl.program_id(0) % tiles_t * BLOCK_T
    split = tl.program_id(0) // tiles_t % splits
    batch = tl.program_id(0) // (tiles_t * splits)

    target = per_token(targets, batch, row, tokens, targets_batch, targets_row, NO_TOKEN, BLOCK_T)
    counted = target != NO_TOKEN
    hidden = advance(advance(hidden, batch, hidden_batch), row, hidden_row)
    weight = advance(weight, batch, weight_batch)
    cols = indices(BLOCK_V, WIDE)

    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    found = tl.zeros([BLOCK_T], tl.float32)
    logit_sum = tl.zeros([BLOCK_T], tl.float32)
    first = split * SPAN
    last = tl.minimum(first + SPAN, tiles_v)
    for tile in range(first, last):
        col = tile * BLOCK_V
        exist = cols < vocab - col
        raw = products(
            hidden, advance(weight, col, weight_row), counted, exist, features,
            hidden_row, hidden_col, weight_row, weight_col, EVEN_V, EVEN_F, WIDE, BLOCK_T, BLOCK_V, BLOCK_F,
        )  # fmt: skip
        peak, total, found, logit_sum = _take_in(
            raw, peak, total, found, logit_sum, target - col, vocab - col, softcap, CAPPED, SUMS, EVEN_V
        )

    rows = tl.arange(0, BLOCK_T)
    exists = rows < tokens - row
    part = (tl.cast(batch, tl.int64) * splits + split) * tokens + row
    tl.store(part_lse + part + rows, peak + tl.log2(total) * LN_2, mask=exists)
    if SUMS:
        tl.store(part_sum + part + rows, logit_sum, mask=exists)
    # A token's target_logit is written by the program that walked its target, or by the first if none does.
    owner = tl.where(target < 0, 0, target // (SPAN * BLOCK_V))
    target_logit += tl.cast(batch, tl.int64) * tokens + row
    tl.store(target_logit + rows, found, mask=exists & (owner == split))


@triton.jit
def _take_in(
    raw, peak, total, found, logit_sum, target, vocab, softcap,
    CAPPED: tl.constexpr, SUMS: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """The statistics [BLOCK_T] of what was seen and of a tile of raw products; target and vocab count from its edge."""
    if raw.shape[1] > AT_ONCE:
        left, right = halves(raw)
        peak, total, found, logit_sum = _take_in(
            left, peak, total, found, logit_sum, target, vocab, softcap, CAPPED, SUMS, EVEN_V
        )
        width: tl.constexpr = left.shape[1]
        peak, total, found, logit_sum = _take_in(
            right, peak, total, found, logit_sum, target - width, vocab - width, softcap, CAPPED, SUMS, EVEN_V
        )
    else:
        cols = tl.arange(0, raw.shape[1])
        logits, _ = cap(raw, softcap, CAPPED)
        found += tl.sum(tl.where(target[:, None] == cols[None, :], logits, 0.0), axis=1)
        if SUMS:
            logit_sum += tl.sum(logits, axis=1)  # past the vocabulary they are 0
        if not EVEN_V:
            logits = tl.where((cols < vocab)[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        base = new_peak if EVEN_V else tl.where(new_peak == float("-inf"), 0.0, new_peak)
        # The difference first: scaled apart, large logits would lose what lies between them.
        weights = tl.exp2((logits - base[:, None]) * LOG2_E)
        total = total * tl.exp2((peak - base) * LOG2_E) + tl.sum(weights, axis=1)
        peak = new_peak
    return peak, total, found, logit_sum


@triton.jit(do_not_specialize=["tokens"])
def _join(
    targets, part_lse, part_sum, logit_sum, lse, tokens, splits, targets_batch, targets_row,
    SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """lse and logit_sum of BLOCK_T tokens from their parts [batch, splits, tokens], in a fixed order; 0 if ignored."""
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    row = tl.program_id(0) % tiles_t * BLOCK_T
    batch = tl.program_id(0) // tiles_t
    target = per_token(targets, batch, row, tokens, targets_batch, targets_row, NO_TOKEN, BLOCK_T)
    counted = target != NO_TOKEN
    rows = tl.arange(0, BLOCK_T)
    exists = rows < tokens - row
    parts = tl.arange(0, BLOCK_S)
    offsets = (tl.cast(batch, tl.int64) * splits + parts[:, None]) * tokens + (row + rows)[
        None, :
    ]  # [BLOCK_S, BLOCK_T]

    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    whole = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, splits, BLOCK_S):
        mask = (parts < splits - start)[:, None] & counted[None, :]
        at = offsets + tl.cast(start, tl.int64) * tokens
        part = tl.load(part_lse + at, mask=mask, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(part, axis=0))
        base = tl.where(counted, new_peak, 0.0)
        total = total * tl.exp2((peak - base) * LOG2_E) + tl.sum(tl.exp2((part - base[None, :]) * LOG2_E), axis=0)
        peak = new_peak
        if SUMS:
            whole += tl.sum(tl.load(part_sum + at, mask=mask, other=0.0), axis=0)
    result = tl.where(counted, peak + tl.log2(total) * LN_2, 0.0)
    begin = tl.cast(batch, tl.int64) * tokens + row
    tl.store(lse + begin + rows, result, mask=exists)
    if SUMS:
        tl.store(logit_sum + begin + rows, whole, mask=exists)
