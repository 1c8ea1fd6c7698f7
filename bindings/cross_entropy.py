"""Cross-entropy of a linear layer, whole or by shards of the vocabulary: the public functions and their checks.

The kernels give each token's logsumexp, its target's logit and the sum of its logits; the loss is made of these here,
by the framework's own operations on `[tokens]` arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, nan, prod
from typing import Any

from crosstile import arguments, dispatch, sharding
from crosstile.arguments import dtype_name, show
from crosstile.kernels.linear_cross_entropy.spec import (
    ELSEWHERE,
    IGNORED,
    LinearCrossEntropyInputs,
    LinearCrossEntropySpec,
)

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Any,
    weight: Any,
    targets: Any,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    implementation: str | None = None,
    config: Any = None,
) -> Any:
    """The cross-entropy of `hidden @ weight^T` against targets, without the logits ever reaching memory.

    With the logits z of a token, after the cap, and its target t its loss is

        (1 - label_smoothing) * (logsumexp(z) - z[t]) + label_smoothing * (logsumexp(z) - mean(z))
            + z_loss * logsumexp(z) ** 2

    Args:
        hidden: `[..., features]`, float32, float16 or bfloat16, any strides.
        weight: `[vocab, features]`, hidden's dtype, as `torch.nn.Linear` stores it.
        targets: int `[...]`, from 0 to `vocab - 1`, or ignore_index.
        ignore_index: tokens with this target do not count: their loss and their gradients are 0, and what their row of
            hidden holds, NaN too, reaches nothing.
        softcap: a logit becomes `softcap * tanh(logit / softcap)`; None leaves it.
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`.
        z_loss: the weight of the squared logsumexp, from 0, which keeps the logits from drifting (PaLM,
            arXiv:2204.02311).
        reduction: "mean" over the tokens that count, "sum", or "none".
        implementation: "numpy", "triton", "pallas", "library" or None, the choice by device.
        config: a `LinearCrossEntropyConfig`, the tiles of this call.

    Returns:
        The loss, a scalar, or of targets' shape without a reduction: float32 whatever hidden is (a loss rounded to
        bfloat16 says little), float64 for float64. Differentiable in hidden and weight, whose gradients have their
        dtypes. The mean over no token is 0. A target out of range, where it cannot be refused, gives a loss of NaN.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that cannot be.
        ValueError: shapes that do not fit, an option out of range; the message names the argument. On a CPU, NumPy and
            eager torch, targets out of range too.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    Algorithm: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (arXiv:2411.09009), with every
    gradient kept.

    >>> import numpy as np
    >>> hidden, weight = np.zeros((2, 3, 8), np.float32), np.ones((10, 8), np.float32)
    >>> loss = linear_cross_entropy(hidden, weight, np.array([[0, 9, 3], [1, -100, -100]]))
    >>> round(float(loss), 4), round(float(np.log(10)), 4)
    (2.3026, 2.3026)
    """
    if dispatch.spreading():
        return sharding.call(linear_cross_entropy, locals())
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
    spec, arrays = prepare_linear_cross_entropy(
        hidden, weight, targets, ignore_index=ignore_index, softcap=softcap, **options
    )
    statistics = dispatch.run(dispatch.OPS["linear_cross_entropy"], spec, arrays, implementation, config)
    return _loss(_of_tokens(statistics, targets), targets, ignore_index, weight.shape[0], **options)


def linear_cross_entropy_shard(
    hidden: Any,
    weight: Any,
    targets: Any,
    *,
    vocab_start: int,
    ignore_index: int = -100,
    softcap: float | None = None,
    return_logit_sum: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[Any, ...]:
    """What one shard of the vocabulary knows of each token, for `merge_cross_entropy`.

    Args:
        hidden: `[..., features]`, the same in every shard.
        weight: `[vocab of the shard, features]`, the rows of the whole weight from `vocab_start` on.
        targets: int `[...]`, of the whole vocabulary.
        vocab_start: the first of the shard's rows in the whole weight.
        ignore_index: as in `linear_cross_entropy`, as are the options that follow.
        return_logit_sum: also return the sum of the logits, which label smoothing needs.

    Returns:
        (lse, target_logit), or (lse, target_logit, logit_sum), each of targets' shape and float32: the logsumexp of the
        shard's logits, the logit of the target where it is in the shard, else 0, and the sum of the logits. All are 0
        for an ignored token, and differentiable in hidden and weight; the gradient of hidden is that of this shard, to
        be summed over all.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> hidden, weight = rng.standard_normal((5, 8)), rng.standard_normal((12, 8))
    >>> targets = np.array([0, 3, 7, 11, -100])
    >>> shards = [
    ...     linear_cross_entropy_shard(hidden, rows, targets, vocab_start=start)
    ...     for start, rows in ((0, weight[:6]), (6, weight[6:]))
    ... ]
    >>> loss = merge_cross_entropy(*zip(*shards, strict=True), targets=targets, vocab=12)
    >>> bool(np.isclose(loss, linear_cross_entropy(hidden, weight, targets)))
    True
    """
    spec, arrays = prepare_linear_cross_entropy_shard(
        hidden,
        weight,
        targets,
        vocab_start=vocab_start,
        ignore_index=ignore_index,
        softcap=softcap,
        return_logit_sum=return_logit_sum,
    )
    statistics = dispatch.run(dispatch.OPS["linear_cross_entropy"], spec, arrays, implementation, config)
    return tuple(row for row in _of_tokens(statistics, targets) if row is not None)


def merge_cross_entropy(
    lses: Sequence[Any],
    target_logits: Sequence[Any],
    logit_sums: Sequence[Any] | None = None,
    *,
    targets: Any,
    vocab: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Any:
    """The loss of `linear_cross_entropy`, and its gradients, from what each shard of the vocabulary returned.

    Where each shard is on a device of its own, its results are gathered first by a differentiable collective, and the
    gradients of hidden summed over the devices: three numbers a token travel, never logits.

    Args:
        lses: of each shard, as `linear_cross_entropy_shard` returns them; of targets' shape.
        target_logits: of each shard.
        logit_sums: of each shard; label smoothing needs them.
        targets: int `[...]`, as every shard had them.
        vocab: the size of the whole vocabulary.
        ignore_index: as in `linear_cross_entropy`, as are label_smoothing, z_loss and reduction.

    Returns:
        The loss, as `linear_cross_entropy` does; differentiable in all parts.
    """
    parts: dict[str, Sequence[Any]] = {"lses": lses, "target_logits": target_logits}
    if logit_sums is not None:
        parts["logit_sums"] = logit_sums
    _check_parts(parts, targets)
    arguments.check_count("vocab", vocab)
    smoothing = _number("label_smoothing", label_smoothing, 1)
    if smoothing and logit_sums is None:
        raise ValueError("logit_sums: got None; label smoothing needs them: call the shards with return_logit_sum=True")
    _check_options(ignore_index, smoothing, z_loss, reduction)
    _check_range(targets, ignore_index, vocab)
    sums = None if logit_sums is None else sum(logit_sums[1:], logit_sums[0])
    rows = [_logsumexp(lses), sum(target_logits[1:], target_logits[0]), sums]
    return _loss(rows, targets, ignore_index, vocab, smoothing, z_loss, reduction)


def prepare_linear_cross_entropy(
    hidden: Any,
    weight: Any,
    targets: Any,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> tuple[LinearCrossEntropySpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, canonical."""
    _check_options(ignore_index, label_smoothing, z_loss, reduction)
    sums = _number("label_smoothing", label_smoothing, 1) > 0
    spec, arrays = _prepare(hidden, weight, targets, 0, ignore_index, softcap, sums)
    _check_range(targets, ignore_index, weight.shape[0])
    return spec, arrays


def prepare_linear_cross_entropy_shard(
    hidden: Any,
    weight: Any,
    targets: Any,
    *,
    vocab_start: int,
    ignore_index: int = -100,
    softcap: float | None = None,
    return_logit_sum: bool = False,
) -> tuple[LinearCrossEntropySpec, tuple[Any, ...]]:
    """The same of a shard."""
    arguments.check_count("vocab_start", vocab_start)
    _check_index(ignore_index)
    return _prepare(hidden, weight, targets, vocab_start, ignore_index, softcap, return_logit_sum)


def _prepare(
    hidden: Any, weight: Any, targets: Any, start: int, ignore_index: int, softcap: float | None, sums: bool
) -> tuple[LinearCrossEntropySpec, tuple[Any, ...]]:
    dtype = arguments.common_dtype(("hidden", "weight"), (hidden, weight))
    framework = dispatch.framework_of(("hidden", "weight", "targets"), (hidden, weight, targets))
    arguments.check_integers("targets", targets, hidden)
    if not len(hidden.shape):
        raise ValueError("hidden: got rank 0; it must be [..., features]")
    arguments.check_rank("weight", weight.shape, 2, "[vocab, features]")
    (*lead, features), (vocab, weight_features) = hidden.shape, weight.shape
    if weight_features != features:
        raise ValueError(
            f"weight: features is {weight_features} in {show(weight.shape)}; it must be {features}, as in hidden "
            f"{show(hidden.shape)} (a weight of [features, vocab]: weight.T)"
        )
    if not features or not vocab:
        raise ValueError(f"weight: got {show(weight.shape)}; vocab and features must be at least 1")
    if tuple(targets.shape) != tuple(lead):
        raise ValueError(f"targets: got {show(targets.shape)}; it must be {show(lead)}, as hidden without its features")
    spec = LinearCrossEntropySpec(dtype, features, None if softcap is None else arguments.check_softcap(softcap), sums)
    xp = _namespace(framework)
    local = _wide_integers(targets)
    counted, local = local != ignore_index, local - start
    local = xp.where((local >= 0) & (local < vocab), local, ELSEWHERE)
    local = dispatch.glue(framework).as_int32(xp.where(counted, local, IGNORED))
    tokens = prod(lead)
    return spec, LinearCrossEntropyInputs(hidden.reshape(1, tokens, features), weight[None], local.reshape(1, tokens))


def _of_tokens(statistics: tuple[Any, ...], targets: Any) -> list[Any]:
    """The statistics in targets' shape; None for one that is absent, which torch has as an empty tensor."""
    shape = tuple(targets.shape)
    return [None if row is None or len(row.shape) == 1 else row[0].reshape(shape) for row in statistics]


def _loss(
    rows: Sequence[Any],
    targets: Any,
    ignore_index: int,
    vocab: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Any:
    """The loss from each token's statistics."""
    lse, target_logit, logit_sum = rows
    xp = _namespace(dispatch.framework_of(("targets",), (targets,)))
    targets = _wide_integers(targets)
    counted = targets != ignore_index
    loss = lse - target_logit
    if label_smoothing:
        loss = loss * (1 - label_smoothing) + (lse - logit_sum / vocab) * label_smoothing
    if z_loss:
        loss = loss + z_loss * lse * lse
    loss = xp.where((targets >= 0) & (targets < vocab), loss, nan)
    loss = xp.where(counted, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / xp.clip((xp.ones_like(loss) * counted).sum(), 1, None)


def _logsumexp(parts: Sequence[Any]) -> Any:
    framework = dispatch.framework_of(("lses",), (parts[0],))
    if framework == "torch":
        import torch

        return torch.logsumexp(torch.stack(tuple(parts)), dim=0)
    if framework == "jax":
        import jax

        return jax.nn.logsumexp(jax.numpy.stack(parts), axis=0)
    import numpy as np

    return np.logaddexp.reduce(np.stack(parts), axis=0)


def _namespace(framework: str) -> Any:
    """torch, jax.numpy or numpy."""
    if framework == "torch":
        import torch

        return torch
    if framework == "jax":
        import jax.numpy as jnp

        return jnp
    import numpy as np

    return np


def _wide_integers(targets: Any) -> Any:
    """Integers that hold every target and -100: unsigned ones would not."""
    return targets.long() if hasattr(targets, "long") else targets.astype(int)


def _check_range(targets: Any, ignore_index: int, vocab: int) -> None:
    """Refuse targets out of range where looking costs no wait for a device: NumPy's and eager torch's on a CPU."""
    framework = dispatch.framework_of(("targets",), (targets,))
    if framework == "jax" or (framework == "torch" and not _is_eager_on_cpu(targets)):
        return
    wide = _wide_integers(targets)
    wrong = (wide != ignore_index) & ((wide < 0) | (wide >= vocab))
    if wrong.any():
        raise ValueError(
            f"targets: got {int(wide[wrong][0])}; it must be from 0 to {vocab - 1}, or ignore_index {ignore_index}"
        )


def _is_eager_on_cpu(targets: Any) -> bool:
    import torch

    return (
        not torch.compiler.is_compiling()
        and type(targets) is torch.Tensor
        and targets.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
    )


def _check_options(ignore_index: Any, label_smoothing: Any, z_loss: Any, reduction: Any) -> None:
    _check_index(ignore_index)
    _number("label_smoothing", label_smoothing, 1)
    _number("z_loss", z_loss, inf)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")


def _check_index(ignore_index: Any) -> None:
    if isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__"):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}; it must be an integer")


def _number(name: str, value: Any, most: float) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {type(value).__name__}; it must be a number")
    number = float(value)
    if not (isfinite(number) and 0 <= number <= most):
        bound = f"from 0 to {most}" if isfinite(most) else "finite and not negative"
        raise ValueError(f"{name}: got {number}; it must be {bound}")
    return number


def _check_parts(parts: dict[str, Sequence[Any]], targets: Any) -> None:
    """One of each kind for every shard, floats, of targets' shape, from one framework."""
    arguments.check_integers("targets", targets, targets)
    count = len(parts["lses"])
    for name, arrays in parts.items():
        if len(arrays) != count or not count:
            raise ValueError(f"{name}: got {len(arrays)} for {count} lses; there must be one a shard, and at least one")
        for at, array in enumerate(arrays):
            dispatch.framework_of(("targets", f"{name}[{at}]"), (targets, array))
            if (kind := dtype_name(array.dtype)) not in ("float32", "float64"):
                raise TypeError(f"{name}[{at}]: dtype is {kind}; it must be float32, as the shards return it")
            if tuple(array.shape) != tuple(targets.shape):
                raise ValueError(f"{name}[{at}]: got {show(array.shape)}; it must be {show(targets.shape)}, as targets")
