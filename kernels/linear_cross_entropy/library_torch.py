"""Linear cross-entropy in torch, a tile of logits at a time; see `library.py`. Few logits are kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .spec import IGNORED, LinearCrossEntropySpec

TOKENS, ROWS = 512, 1024  # of a tile of logits
KEPT = 1 << 24  # so many logits at most are kept, 64 MiB, and not computed again: a product of five less
KEPT_PART = 1 << 22  # of these a backward takes so many at a time: larger arrays are new memory each time
IN_CACHE = 1 << 20  # and a sum over rows so many, which it passes over more than once


def statistics(spec: LinearCrossEntropySpec, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """lse, target_logit and, where the spec asks for it, logit_sum."""
    few = hidden.shape[0] * hidden.shape[1] * weight.shape[1] <= KEPT
    keep = few and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    *found, _ = _Statistics.apply(spec, keep, hidden, weight, targets)
    return tuple(found)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        spec: LinearCrossEntropySpec, keep: bool, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        kept = hidden.new_empty((*hidden.shape[:2], weight.shape[1] if keep else 0), dtype=_wide(hidden))
        items = zip(hidden, weight, targets, kept, strict=True)
        found = [_statistics(spec, *item) for item in items]
        if not found:
            nothing = (hidden.new_zeros(hidden.shape[:2], dtype=_wide(hidden)) for _ in range(2 + spec.sums))
            return (*nothing, kept)
        return (*(torch.stack(rows) for rows in zip(*found, strict=True)), kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(*inputs[2:], output[0], output[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        # A compiled function has no second derivative, and torch.compile no function inside a function's backward.
        run = _Gradients.forward if torch.compiler.is_compiling() else _Gradients.apply
        dhidden, dweight = run(ctx.spec, *ctx.saved_tensors, *gradients[:-1])
        return None, None, dhidden, dweight, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], spec: LinearCrossEntropySpec, keep: bool, *arrays: Tensor
    ) -> Any:
        results = _Statistics.apply(spec, keep, *_folded(info.batch_size, in_dims[2:], arrays))
        return _unfolded(info.batch_size, results)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(spec: LinearCrossEntropySpec, *arrays: Any) -> tuple[Tensor, Tensor]:
        hidden, weight = arrays[:2]
        # Laid out as the inputs are: autograd would copy a transposed head's gradient into that order.
        made = torch.empty_like if hidden.shape[1] else torch.zeros_like
        dhidden, dweight = made(hidden), made(weight)
        if not hidden.shape[1]:
            return dhidden, dweight
        for at in range(hidden.shape[0]):
            rows: Iterator[Any] = (None if array is None else array[at] for array in arrays[2:])
            _gradients(spec, hidden[at], weight[at], *rows, results=(dhidden[at], dweight[at]))
        return dhidden, dweight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:4], *inputs[6:])

    @staticmethod
    def backward(ctx: Any, ddhidden: Tensor, ddweight: Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, *gradients = ctx.saved_tensors
        with torch.enable_grad():
            leaves: list[Any] = [
                None if x is None else x.detach().requires_grad_() for x in (hidden, weight, *gradients)
            ]
            statistics = _dense(ctx.spec, leaves[0], leaves[1], targets)
            given = [(x, dx) for x, dx in zip(statistics, leaves[2:], strict=True) if dx is not None]
            outputs, upstream = zip(*given, strict=True)
            first = torch.autograd.grad(outputs, leaves[:2], upstream, create_graph=True)
            there = [leaf for leaf in leaves if leaf is not None]
            second = iter(torch.autograd.grad(first, there, (ddhidden, ddweight)))
        found = [None if leaf is None else next(second) for leaf in leaves]
        return (None, *found[:2], None, None, None, *found[2:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], spec: LinearCrossEntropySpec, *arrays: Any) -> Any:
        results = _Gradients.apply(spec, *_folded(info.batch_size, in_dims[1:], arrays))
        return _unfolded(info.batch_size, results)


def _folded(size: int, in_dims: tuple[int | None, ...], arrays: tuple[Any, ...]) -> list[Any]:
    """The mapped dimension joins the leading batch."""

    def fold(array: Any, dim: int | None) -> Any:
        if array is None:
            return None
        mapped = array.expand(size, *array.shape) if dim is None else array.movedim(dim, 0)
        return mapped.reshape(-1, *mapped.shape[2:])

    return [fold(array, dim) for array, dim in zip(arrays, in_dims, strict=True)]


def _unfolded(size: int, results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in results), (0,) * len(results)


def _statistics(
    spec: LinearCrossEntropySpec, hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor
) -> list[Tensor]:
    """Of one batch item: each [tokens]. The logits go to `kept` [tokens, vocab], if it has room for them."""
    wide = _wide(hidden)
    tokens = hidden.shape[0]
    counted = targets != IGNORED
    if kept.shape[1]:
        torch.mm(hidden.to(wide), weight.to(wide).T, out=kept)
        if spec.softcap is not None:
            kept.div_(spec.softcap).tanh_().mul_(spec.softcap)
        picked = kept.gather(1, targets.long().clamp(0, kept.shape[1] - 1)[:, None])[:, 0]
        lse = torch.cat([part.logsumexp(1) for part in kept.split(_share(IN_CACHE, kept))])
        results = [lse, torch.where(targets >= 0, picked, 0), kept.sum(1) if spec.sums else picked]
        return [torch.where(counted, row, 0) for row in results[: 2 + spec.sums]]
    peak = hidden.new_full((tokens,), float("-inf"), dtype=wide)
    total, found, whole = (torch.zeros_like(peak) for _ in range(3))
    for rows in _parts(weight.shape[0], ROWS):
        block = weight[rows].to(wide)
        for part in _parts(tokens, TOKENS):
            logits, _ = _logits(spec, hidden[part].to(wide), block)
            local = targets[part].long() - rows.start
            here = (local >= 0) & (local < logits.shape[1])
            picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            found[part] += torch.where(here, picked, 0)
            if spec.sums:
                whole[part] += logits.sum(dim=1)
            before = peak[part].clone()
            peak[part] = torch.maximum(before, logits.amax(dim=1))
            weights = logits.sub_(peak[part][:, None]).exp_()
            total[part] = total[part] * torch.exp(before - peak[part]) + weights.sum(dim=1)
    results = [peak + total.log(), found, whole]
    return [torch.where(counted, row, 0) for row in results[: 2 + spec.sums]]


def _gradients(
    spec: LinearCrossEntropySpec,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    kept: Tensor,
    dlse: Tensor | None,
    dtarget: Tensor | None,
    dsum: Tensor | None = None,
    *,
    results: tuple[Tensor, Tensor],
) -> None:
    """Write the gradients of one batch item, of one token at least, to the results."""
    wide = _wide(hidden)
    exact = hidden.dtype == wide  # then the results hold the sums
    dhidden = results[0] if exact else torch.empty(hidden.shape, dtype=wide, device=hidden.device)
    counted = targets != IGNORED
    whole = kept.shape[1] > 0
    tokens = min(hidden.shape[0], _share(KEPT_PART, kept) if whole else TOKENS)
    space = torch.empty_like(kept[:tokens])  # every part uses it anew
    for rows in _parts(weight.shape[0], weight.shape[0] if whole else ROWS):
        block = weight[rows].to(wide)
        dblock = results[1][rows] if exact else torch.empty_like(block)
        for part in _parts(hidden.shape[0], tokens):
            there = counted[part][:, None]
            visible = torch.where(there, hidden[part], 0).to(wide)
            if whole:
                logits, slope = kept[part], None
                if spec.softcap is not None:
                    slope = (logits / spec.softcap).square_().neg_().add_(1)
                gradient = torch.sub(logits, lse[part][:, None], out=space[: visible.shape[0]])
            else:
                logits, slope = _logits(spec, visible, block)
                gradient = logits.sub_(lse[part][:, None])
            gradient.exp_().mul_(0 if dlse is None else dlse[part][:, None])
            if dtarget is not None:
                local = targets[part].long() - rows.start
                here = (local >= 0) & (local < gradient.shape[1])
                added = torch.where(here, dtarget[part], 0)
                gradient.scatter_add_(1, local.clamp(0, gradient.shape[1] - 1)[:, None], added[:, None])
            if dsum is not None:
                gradient.add_(dsum[part][:, None])
            if slope is not None:
                gradient.mul_(slope)
            gradient.masked_fill_(~there, 0)
            dhidden[part].addmm_(gradient, block, beta=int(rows.start > 0))
            dblock.addmm_(gradient.T, visible, beta=int(part.start > 0))
        if not exact:
            results[1][rows] = dblock.to(weight.dtype)
    if not exact:
        results[0].copy_(dhidden)


def _logits(spec: LinearCrossEntropySpec, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tile of logits, and their slope if there is a cap."""
    raw = hidden @ weight.T
    if spec.softcap is None:
        return raw, None
    bent = raw.div_(spec.softcap).tanh_()
    return bent * spec.softcap, bent.square_().neg_().add_(1)


def _dense(spec: LinearCrossEntropySpec, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The statistics, from logits built whole, as autograd differentiates them to any order."""
    counted = targets != IGNORED
    wide = _wide(hidden)
    logits = torch.where(counted[..., None], hidden, 0).to(wide) @ weight.to(wide).transpose(1, 2)
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    picked = logits.gather(2, targets.long().clamp(min=0)[..., None])[..., 0]
    found = [torch.logsumexp(logits, dim=2), torch.where(targets >= 0, picked, 0), logits.sum(dim=2)]
    return [torch.where(counted, row, 0) for row in found[: 2 + spec.sums]]


def _wide(array: Tensor) -> torch.dtype:
    return torch.float64 if array.dtype == torch.float64 else torch.float32


def _share(count: int, kept: Tensor) -> int:
    """Of how many tokens the logits are about so many."""
    return max(64, count // kept.shape[1])


def _parts(size: int, part: int) -> Iterator[slice]:
    return (slice(start, min(start + part, size)) for start in range(0, size, part))
