"""What 8 JAX devices, which a CPU stands for, are asked for the tests: ops, models, and both with broken code.

python tests/support/jax_devices.py FILE  # where the answers go
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

HANDFUL = ("layers stacked, fsdp 4, tensor 2",)
LENGTH, VOCAB = 16, 12
WANTED: dict = {}  # of each call, on one device


@dataclass(frozen=True)
class Call:
    """An op on a mesh, by default of data 2, context 2 and tensor 2: of each array its shape.

    `known` are arrays without a gradient, made by name; `sharded` how the block is entered.
    """

    op: str
    arrays: dict
    options: dict = field(default_factory=dict)
    known: tuple = ()
    sharded: dict = field(default_factory=dict)
    axes: tuple = ("data", "context", "tensor")

    @property
    def balanced(self) -> bool:
        return bool(self.sharded.get("balanced"))


def later(score, b, h, i, j):
    return score + 0.125 * b - 0.25 * h + 0.0625 * i * j


def near(b, h, i, j):
    return j <= i + h + b


Q, K = (2, LENGTH, 4, 8), (2, LENGTH, 2, 8)
QKV = {"q": Q, "k": K, "v": (2, LENGTH, 2, 4)}
SINKS, BIAS = {"sinks": (4,)}, {"bias": (1, 4, LENGTH, LENGTH)}
MODS = {"score_mod": later, "mask_mod": near}
RING, ULYSSES = {"context_form": "ring"}, {"context_form": "ulysses"}
BALANCED, BALANCED_RING = {"balanced": True}, {"context_form": "ring", "balanced": True}
CALLS = {
    "gather": Call("attention", QKV | SINKS | BIAS, {"causal": True, "softcap": 5.0, "return_lse": True}),
    "gather, a window to both sides": Call("attention", QKV, {"window": (3, 6), **MODS}),
    "gather, lengths": Call("attention", QKV, {"causal": True, "window": (9, None)}, ("q_lengths", "kv_lengths")),
    "gather, other keys": Call("attention", QKV | {"k": (2, 24, 2, 8), "v": (2, 24, 2, 4)}, {"causal": True}),
    "gather, keys of one head": Call("attention", QKV | {"k": (2, 16, 1, 8), "v": (2, 16, 1, 4)}, {"causal": True}),
    "gather, odd sizes": Call("attention", {"q": (3, 5, 3, 8), "k": (3, 7, 3, 8), "v": (3, 7, 3, 8)}, {"causal": True}),
    "gather, balanced": Call(
        "attention", QKV | SINKS | BIAS, {"causal": True, "window": (6, 0), **MODS}, ("segment_ids",), BALANCED
    ),
    "ring": Call("attention", QKV | SINKS, {"causal": True, "return_lse": True}, ("segment_ids",), RING),
    "ring, a window": Call(
        "attention",
        QKV | SINKS,
        {"causal": True, "window": (5, 0)},
        (),
        RING | {"sequence": ("data", "context"), "batch": ()},
    ),
    "ring, balanced": Call(
        "attention",
        QKV | SINKS,
        {"causal": True, "softcap": 5.0, "return_lse": True},
        ("segment_ids",),
        BALANCED_RING | {"sequence": ("data", "context"), "batch": ()},
    ),
    "ring, balanced, all keys": Call("attention", QKV, {}, (), BALANCED_RING),
    "ulysses": Call(
        "attention",
        QKV | SINKS | BIAS,
        {"causal": True, "window": (6, 0), "return_lse": True, **MODS},
        ("segment_ids", "kv_lengths"),
        ULYSSES,
    ),
    "varlen_attention": Call(
        "varlen_attention",
        {"q": (16, 4, 8), "k": (16, 2, 8), "v": (16, 2, 8)} | SINKS,
        {"max_seqlen_q": 8, "max_seqlen_k": 8, "causal": True, "score_mod": later},
        ("cu_seqlens_q", "cu_seqlens_k"),
    ),
    "paged_attention": Call(
        "paged_attention",
        {"q": (2, 4, 8), "k_pages": (5, 16, 2, 8), "v_pages": (5, 16, 2, 8)} | SINKS,
        {"return_lse": True},
        ("page_table", "lengths"),
    ),
    "rms_norm": Call("rms_norm", {"x": (2, 16, 8), "weight": (8,), "residual": (2, 16, 8)}),
    "layer_norm": Call("layer_norm", {"x": (2, 16, 4, 8), "weight": (8,), "bias": (8,)}),
    "rotary": Call("rotary", {"x": Q}, {}, ("positions",)),
    "linear_cross_entropy": Call(
        "linear_cross_entropy",
        {"hidden": (2, 16, 8), "weight": (VOCAB, 8)},
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0},
        ("targets",),
    ),
    "linear_cross_entropy, odd": Call(
        "linear_cross_entropy", {"hidden": (3, 15, 8), "weight": (VOCAB + 1, 8)}, {"reduction": "sum"}, ("targets",)
    ),
    "moe": Call(
        "moe",
        {"x": (4, 16, 8), "router": (8, 4), "w_gate": (4, 8, 12), "w_up": (4, 8, 12), "w_down": (4, 12, 8)},
        {"top_k": 2, "return_logits": True},
        (),
        {},
        ("data", "expert", "tensor"),
    ),
}


def error(call: Call) -> float:
    """How far a call's results and gradients in float64 are from those on one device, beside the largest."""
    import jax
    from jax.sharding import Mesh

    import crosstile

    rng = np.random.default_rng(0)
    arrays = {name: jax.numpy.array(rng.standard_normal(shape)) for name, shape in call.arrays.items()}
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), call.axes)
    known = {name: _known(name, call.arrays) for name in call.known}
    pieces = 2 if call.sharded.get("sequence") is None else 4

    def run(arrays):
        function, order = getattr(crosstile, call.op), _order(pieces) if dispatch_is_balanced() else None
        inputs = {name: _ordered(name, array, order) for name, array in (arrays | known).items()}
        found = function(**inputs, **call.options)
        found = found if isinstance(found, tuple) else (found,)
        if order is None:
            return found
        return tuple(array.take(np.argsort(order), axis=2 if at else 1) for at, array in enumerate(found))

    def dispatch_is_balanced():
        from crosstile import dispatch

        return dispatch.spreading() is not None and call.balanced

    def both(arrays):
        found, pull = jax.vjp(run, arrays)
        weights = [np.cos(np.arange(array.size)).reshape(array.shape) for array in found]
        return found, pull(
            tuple(jax.numpy.where(jax.numpy.isfinite(a), w, 0) for a, w in zip(found, weights, strict=True))
        )

    if repr(call) not in WANTED:
        WANTED[repr(call)] = jax.tree.leaves(jax.jit(both)(arrays))
    with crosstile.sharded(mesh, **call.sharded):
        found = jax.tree.leaves(jax.jit(lambda arrays: both(arrays))(arrays))
    return max(_distance(*pair) for pair in zip(found, WANTED[repr(call)], strict=True))


def pipeline_error() -> float:
    """How far the loss and the gradients of a model in two stages in float64 are from those on one device."""
    import jax

    from crosstile.models import distributed_jax, transformer
    from crosstile.models.arrays import tree_leaves
    from crosstile.models.parallel_cases import MIXTRAL, Row, batch_of
    from crosstile.models.sharding import Parallel
    from crosstile.models.stacking import stack, unstack

    config, parallel = MIXTRAL, Parallel(stage=2, microbatches=3, expert=2)
    tokens, segments = batch_of(Row("", parallel, config, batch=5, seq=13, segments=True))
    params = transformer.init(config, 0, "jax", "float64")
    mesh = distributed_jax.make_mesh(parallel, jax.devices()[: parallel.devices])

    def of_many(params):
        return distributed_jax.loss(params, tokens, config, parallel, mesh, segments=segments)

    if "pipeline" not in WANTED:
        alone = jax.jit(jax.value_and_grad(lambda params: transformer.loss(params, tokens, config, segments=segments)))
        WANTED["pipeline"] = alone(params)
    loss, gradients = WANTED["pipeline"]
    placed = distributed_jax.place(stack(params, config), config, parallel, mesh)
    found, of_stacked = jax.jit(jax.value_and_grad(of_many))(placed)
    ours, wanted = tree_leaves(unstack(of_stacked, config)), tree_leaves(gradients)
    return max(_distance(found, loss), *(_distance(ours[path], wanted[path]) for path in wanted))


def _known(name, shapes):
    rng = np.random.default_rng(1)
    batch, length = next(iter(shapes.values()))[:2]
    made = {
        "segment_ids": lambda: np.sort(rng.integers(0, 3, (batch, length)), 1),
        "mask": lambda: rng.random((batch, 1, length, length)) > 0.3,
        "q_lengths": lambda: np.array([12, 3]),
        "kv_lengths": lambda: np.array([16, 9]),
        "cu_seqlens_q": lambda: np.array([0, 5, 9, 15]),
        "cu_seqlens_k": lambda: np.array([0, 5, 9, 15]),
        "page_table": lambda: np.array([[3, 1], [4, 0]]),
        "lengths": lambda: np.array([20, 7]),
        "positions": lambda: np.arange(length),
        "targets": lambda: np.where(rng.random((batch, length)) < 0.3, -100, rng.integers(0, VOCAB, (batch, length))),
    }[name]()
    return made if made.dtype == bool else made.astype(np.int32)


def _order(pieces):
    from crosstile.sharding import balanced_order

    return np.array(balanced_order(LENGTH, pieces))


def _ordered(name, array, order):
    """An array whose tokens lie in that order."""
    import jax.numpy as jnp

    axes = {"q": (1,), "k": (1,), "v": (1,), "segment_ids": (1,), "bias": (2, 3), "mask": (2, 3)}.get(name, ())
    array = jnp.asarray(array)
    for axis in () if order is None else axes:
        array = array.take(order, axis=axis)
    return array


def _distance(found, wanted) -> float:
    """Infinities must be in the same places."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    if np.isnan(found).any() or not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return np.inf
    finite = np.isfinite(wanted)
    return float(np.abs(found[finite] - wanted[finite]).max() / np.abs(wanted[finite]).max())


def _a_key_more(*arguments, piece):
    *before, first, lengths = arguments
    return piece(*before, first + 1, lengths)


def _mean_of_means(sharding, arguments, loss):
    import jax.numpy as jnp

    rows = loss(sharding, arguments | {"reduction": "none"})
    counts = jnp.maximum((jnp.asarray(arguments["targets"]) != -100).sum(1), 1)
    return (rows.sum(1) / counts).mean()


def broken_pipelines() -> dict:
    """By name: what is broken."""
    from crosstile.models.pipeline_jax import Pipeline

    def patch(name, made):
        return mock.patch.object(Pipeline, name, made)

    return {
        "bubbles that count": patch("_without_bubbles", lambda self, _, ticks: ticks[: self.microbatches]),
        "the last microbatch left behind": patch("_finished", lambda self, out: out[self.stages - 2 : -1, -1]),
    }


def broken() -> dict:
    """By name: the call, and what is broken."""
    from crosstile import ring_jax, sharding_attention, sharding_cross_entropy, sharding_experts

    def patch(module, name, made):
        return mock.patch.object(module, name, made(getattr(module, name)))

    def of(old, **changed):
        return lambda *arguments: old(*arguments, **changed)

    return {
        "keys seen one too early": (
            "gather",
            lambda: patch(sharding_attention, "_piece", lambda old: of(_a_key_more, piece=old)),
        ),
        "keys in the order in which they lie": (
            "gather, balanced",
            lambda: patch(sharding_attention, "_natural", lambda _: lambda length, _: np.arange(length)),
        ),
        "mods that begin at 0": ("ulysses", lambda: patch(sharding_attention, "start", lambda _: lambda *_: 0)),
        "sinks in every step": ("ring", lambda: patch(ring_jax, "_is_first", lambda _: lambda _: True)),
        "parts that count as the whole": (
            "ring",
            lambda: patch(ring_jax, "_gradients_of_part", lambda _: lambda part, merged, gradients: gradients),
        ),
        "halves the wrong way": (
            "ring, balanced",
            lambda: patch(ring_jax, "_half_of", lambda old: lambda attend, before, *rest: old(attend, ~before, *rest)),
        ),
        "a mean of means": (
            "linear_cross_entropy",
            lambda: patch(sharding_cross_entropy, "linear_cross_entropy", lambda old: of(_mean_of_means, loss=old)),
        ),
        "sums that are not taken": (
            "moe",
            lambda: patch(sharding_experts.jax.lax, "psum", lambda _: lambda array, _: array),
        ),
    }


def main(file: str) -> None:
    from crosstile.models import parallel_check_jax

    parallel_check_jax.prepare()
    rows = {row.name: row for row in parallel_check_jax.ROWS}
    found = {"calls": {name: error(call) for name, call in CALLS.items()}}
    found["rows"] = {name: parallel_check_jax.check(rows[name]).passes for name in HANDFUL}
    found["broken"] = {}
    for name, (subject, enter) in broken().items():
        with enter():
            found["broken"][name] = error(CALLS[subject]) > 1e-6
    found["pipeline"] = pipeline_error()
    for name, enter in broken_pipelines().items():
        with enter:
            found["broken"][name] = pipeline_error() > 1e-3
    Path(file).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
