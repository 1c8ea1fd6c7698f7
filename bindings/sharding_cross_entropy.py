"""`linear_cross_entropy` of JAX arrays on many devices: rows apart, and the vocabulary in shards that are merged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from crosstile import cross_entropy
from crosstile.sharding import Sharding
from crosstile.sharding_jax import run, spec

IGNORED = -100
_OF_LOSSES = ("ignore_index", "label_smoothing", "z_loss")


def linear_cross_entropy(sharding: Sharding, arguments: dict[str, Any]) -> Any:
    """The loss of whole arrays; the mean is that over all tokens that count, wherever they are.

    Each device has the logits of its rows and its shard of the vocabulary; three numbers a row travel.
    """
    hidden, weight, targets = (arguments[name] for name in ("hidden", "weight", "targets"))
    targets = jnp.asarray(targets)
    options = {name: arguments[name] for name in (*_OF_LOSSES, "softcap", "implementation", "config")}
    vocab = weight.shape[0]
    shards = sharding.dividing("vocab", vocab)
    lead = [sharding.dividing("batch", size) for size in targets.shape[:1]]
    if targets.ndim > 1:  # without shards of the vocabulary their devices take rows
        role = "sequence" if sharding.devices(shards) > 1 else "rows"
        lead.append(sharding.dividing(role, targets.shape[1]))
    rows = [*lead, *[()] * (targets.ndim - len(lead))]
    specs = {"hidden": spec(*rows, ()), "weight": spec(shards, ()), "targets": spec(*rows)}

    def body(parts: dict[str, Any]) -> Any:
        if sharding.devices(shards) == 1:
            return cross_entropy.linear_cross_entropy(**parts, **options, reduction="none")
        return _of_shards(parts, options, shards, vocab)

    arrays = {"hidden": hidden, "weight": weight, "targets": targets}
    losses = run(sharding, body, arrays, specs, spec(*rows), {"weight": 1})
    if arguments["reduction"] == "none":
        return losses
    if arguments["reduction"] == "sum":
        return losses.sum()
    return losses.sum() / jnp.clip((targets != options["ignore_index"]).sum(), 1).astype(losses.dtype)


def _of_shards(parts: dict[str, Any], options: dict[str, Any], axes: tuple[str, ...], vocab: int) -> Any:
    """The loss of each row from what the devices along these axes know of it."""
    targets, size = parts["targets"], parts["weight"].shape[0]
    local = targets - jax.lax.axis_index(axes) * size
    local = jnp.where((local >= 0) & (local < size), local, size)  # the last is nobody's here
    statistics = cross_entropy.linear_cross_entropy_shard(
        parts["hidden"],
        parts["weight"],
        jnp.where(targets == options["ignore_index"], IGNORED, local),
        vocab_start=0,
        ignore_index=IGNORED,
        return_logit_sum=bool(options["label_smoothing"]),
        **{name: options[name] for name in ("softcap", "implementation", "config")},
    )
    gathered = [list(jax.lax.all_gather(rows, axes)) for rows in statistics]
    return cross_entropy.merge_cross_entropy(
        *gathered,
        targets=targets,
        vocab=vocab,
        reduction="none",
        **{name: options[name] for name in _OF_LOSSES},
    )
