"""Whether a model on many JAX devices has the losses, gradients and steps that it has on one.

    python -m crosstile.models.parallel_check_jax                  # on 8 devices that this CPU stands for
    python -m crosstile.models.parallel_check_jax tensor uneven    # rows with these words

Each row is held to float64 on one device: its error may be twice that of one device in the same precision, and a few
roundings more. The command fails if a row does.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import crosstile

from . import transformer
from .arrays import Tree, tree_leaves
from .config import Layer
from .parallel_cases import (
    DEEPSEEK,
    GEMMA,
    GPT_OSS,
    MIXTRAL,
    SHARED,
    SMALL,
    Outcome,
    Row,
    batch_of,
    chosen,
    error,
    layers,
    show,
)
from .sharding import Parallel

DEVICES = 8
UNEVEN = replace(SMALL, num_heads=3, num_kv_heads=3, vocab_size=33, layers=(Layer(),) * 2)
MANY_HEADS = replace(SMALL, num_heads=8, num_kv_heads=8, head_dim=4)


def _context(size: int, form: str, **others: int) -> Parallel:
    return Parallel(context=size, context_form=form, **others)


ROWS = (
    Row("data 8", Parallel(data=8)),
    Row("fsdp 8", Parallel(fsdp=8), segments=True),
    Row("data 2, fsdp 2, tensor 2", Parallel(data=2, fsdp=2, tensor=2)),
    Row("tensor 8", Parallel(tensor=8), MANY_HEADS),
    Row("tensor 4, keys' heads not divided", Parallel(tensor=4, data=2)),
    Row("tensor 2, data 4, as Gemma", Parallel(tensor=2, data=4), GEMMA),
    Row("tensor 2, fsdp 4, latent", Parallel(tensor=2, fsdp=4), DEEPSEEK),
    Row("expert 4, fsdp 2", Parallel(expert=4, fsdp=2), MIXTRAL),
    Row("expert 2, tensor 2, fsdp 2", Parallel(expert=2, tensor=2, fsdp=2), MIXTRAL),
    Row("expert 4, data 2, a shared one", Parallel(expert=4, data=2), SHARED),
    Row("expert 2, tensor 2, data 2, as GPT-OSS", Parallel(expert=2, tensor=2, data=2), GPT_OSS),
    Row("expert 2, context 4", _context(4, "gather", expert=2), MIXTRAL, batch=3, seq=13),
    Row("context 8, gather", _context(8, "gather"), batch=2, seq=32, segments=True),
    Row("context 4, gather in order", _context(4, "gather", data=2), balanced=False),
    Row("context 8, ring", _context(8, "ring"), batch=2, seq=32, segments=True),
    Row("context 4, ring in order", _context(4, "ring", data=2), balanced=False, segments=True),
    Row("context 4, ulysses", _context(4, "ulysses", fsdp=2), segments=True),
    Row("context 4, ring, sinks", _context(4, "ring", fsdp=2), GPT_OSS),
    Row("context 2, tensor 2, fsdp 2, gather", _context(2, "gather", tensor=2, fsdp=2), GEMMA),
    Row("context 2, tensor 2, fsdp 2, ring", _context(2, "ring", tensor=2, fsdp=2), GEMMA),
    Row("context 2, tensor 2, fsdp 2, ulysses", _context(2, "ulysses", tensor=2, fsdp=2), GPT_OSS),
    Row("uneven batch", Parallel(fsdp=8), batch=5),
    Row("uneven sequence", _context(4, "ring", fsdp=2), batch=3, seq=13),
    Row("uneven heads", Parallel(tensor=2, fsdp=4), replace(SMALL, num_heads=3, num_kv_heads=3)),
    Row("uneven vocabulary", Parallel(tensor=4, fsdp=2), replace(SMALL, vocab_size=33, intermediate_size=50)),
    Row("uneven parameters", Parallel(fsdp=8), replace(SMALL, vocab_size=33, hidden_size=30, intermediate_size=45)),
    Row("remat full, fsdp 8", Parallel(fsdp=8), remat="full"),
    Row("remat full, tensor 2, ring", _context(2, "ring", tensor=2, data=2), remat="full"),
    Row("remat products, fsdp 4, tensor 2", Parallel(fsdp=4, tensor=2), remat="products"),
    Row("layers stacked, fsdp 4, tensor 2", Parallel(fsdp=4, tensor=2), replace(SMALL, layers=(Layer(),) * 4)),
    Row("stage 2, data 4", Parallel(stage=2, data=4), layers(SMALL, 4), segments=True),
    Row("stage 4, fsdp 2", Parallel(stage=4, fsdp=2), layers(SMALL, 8)),
    Row("stage 2, tensor 2, data 2, as Gemma", Parallel(stage=2, tensor=2, data=2), layers(GEMMA, 4)),
    Row("stage 2, tensor 2, fsdp 2, latent", Parallel(stage=2, tensor=2, fsdp=2), DEEPSEEK),
    Row("stage 2, context 4, gather", _context(4, "gather", stage=2), layers(GEMMA, 4), batch=2),
    Row("stage 2, context 2, fsdp 2, ring", _context(2, "ring", stage=2, fsdp=2), layers(SMALL, 4), segments=True),
    Row("stage 2, context 2, tensor 2, ulysses", _context(2, "ulysses", stage=2, tensor=2), layers(GPT_OSS, 4)),
    Row("stage 2, expert 4", Parallel(stage=2, expert=4), layers(MIXTRAL, 4)),
    Row("stage 2, expert 2, tensor 2, a shared one", Parallel(stage=2, expert=2, tensor=2), SHARED),
    Row("stage 2, uneven batch", Parallel(stage=2, microbatches=3, expert=2, fsdp=2), MIXTRAL, batch=5, seq=13),
    Row("stage 2, uneven heads", Parallel(stage=2, microbatches=4, tensor=2, fsdp=2), UNEVEN),
    Row("stage 4, a microbatch of all rows", Parallel(stage=4, microbatches=1, data=2), layers(SMALL, 8), batch=3),
    Row("stage 2, remat full", Parallel(stage=2, fsdp=4), layers(SMALL, 4), remat="full", segments=True),
    Row("stage 2, remat products", Parallel(stage=2, tensor=2, fsdp=2), MIXTRAL, remat="products"),
    Row("stage 2, bfloat16", Parallel(stage=2, fsdp=2, tensor=2), layers(SMALL, 4), precision="bfloat16"),
    Row("stage 2, pallas interpreted", Parallel(stage=2, tensor=2), DEEPSEEK, 4, 8, implementation="pallas"),
    Row("bfloat16, fsdp 8", Parallel(fsdp=8), precision="bfloat16"),
    Row("bfloat16, tensor 2, fsdp 4", Parallel(tensor=2, fsdp=4), precision="bfloat16"),
    Row("bfloat16, context 4", _context(4, "ring", data=2), precision="bfloat16"),
    Row("bfloat16, expert 4", Parallel(expert=4, data=2), MIXTRAL, precision="bfloat16"),
    Row("pallas interpreted", Parallel(data=2, fsdp=2, tensor=2), seq=8, batch=4, implementation="pallas"),
)


@dataclass
class _Run:
    """The loss, the gradients and the parameters after a step, in NumPy."""

    loss: float
    gradients: dict[str, np.ndarray]
    stepped: dict[str, np.ndarray]


def prepare(devices: int = DEVICES) -> None:
    """Let this process' CPU stand for that many devices, before JAX asks what there is."""
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    )
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()
    os.environ["NPROC"] = str(8 * devices)  # threads; a device that waits in a collective holds one, and may in several
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)


def check(row: Row) -> Outcome:
    """Run a row in this process."""
    import jax
    import jax.numpy as jnp

    params = transformer.init(row.config, 0, "jax")
    tokens, segments = batch_of(row)
    before = {path: np.asarray(array, np.float64) for path, array in tree_leaves(params).items()}
    exact = _on_one(row, params, tokens, segments, "float64")
    with jax.enable_x64(False):
        one = _on_one(row, params, tokens, segments, row.precision)
        with crosstile.use(row.implementation) if row.implementation else nullcontext():
            many = _on_many(row, params, tokens, segments)
    rounding = float(jnp.finfo(row.precision).eps)
    errors = {"loss": error(abs(many.loss - exact.loss), abs(one.loss - exact.loss), rounding * abs(exact.loss))}
    parts = [_distances(*(run.gradients[path] for run in (exact, many, one))) for path in exact.gradients]
    errors["gradients"] = max(
        (error(of_many, of_one, rounding) for of_many, of_one in parts), key=lambda found: found.many / found.allowed
    )
    start, *ends = (
        np.concatenate([tree[path].ravel() for path in before])
        for tree in (before, exact.stepped, many.stepped, one.stepped)
    )
    errors["stepped"] = error(*_distances(*(end - start for end in ends)), rounding)
    return Outcome(row.name, errors)


def _distances(exact: np.ndarray, many: np.ndarray, one: np.ndarray) -> tuple[float, float]:
    """How far two arrays are from the exact one, in its norm."""
    size = max(float(np.linalg.norm(exact)), 1e-30)
    return float(np.linalg.norm(many - exact)) / size, float(np.linalg.norm(one - exact)) / size


def _optimizer() -> Any:
    """AdamW, whose state begins with the gradients that it was given last."""
    import jax
    import optax

    kept = optax.GradientTransformation(
        lambda params: jax.tree.map(jax.numpy.zeros_like, params), lambda gradients, *_: (gradients, gradients)
    )
    return optax.chain(kept, optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-5))


def _on_one(row: Row, params: Tree, tokens: Any, segments: Any, precision: str) -> _Run:
    import jax
    import optax

    from .learners import in_precision

    if precision == "float64":
        params = jax.tree.map(lambda array: array.astype("float64"), params)
    optimizer = _optimizer()

    def step(params: Tree) -> Any:
        def loss(params: Tree) -> Any:
            return transformer.loss(in_precision(params, precision), tokens, row.config, segments=segments)

        value, gradients = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(gradients, optimizer.init(params), params)
        return value, state[0], optax.apply_updates(params, changes)

    return _in_numpy(*jax.jit(step)(params))


def _on_many(row: Row, params: Tree, tokens: Any, segments: Any) -> _Run:
    import jax

    from . import distributed_jax
    from .stacking import stack, unstack

    mesh = distributed_jax.make_mesh(row.parallel, jax.devices()[: row.parallel.devices])
    params = distributed_jax.place(stack(params, row.config), row.config, row.parallel, mesh)
    optimizer = _optimizer()
    options: dict[str, Any] = {"precision": row.precision, "remat": row.remat, "balanced": row.balanced}
    step = distributed_jax.train_step(row.config, row.parallel, mesh, optimizer, **options)
    stepped, state, value = step(params, optimizer.init(params), tokens, segments)
    return _in_numpy(value, unstack(state[0], row.config), unstack(stepped, row.config))


def _in_numpy(loss: Any, gradients: Tree, stepped: Tree) -> _Run:
    found = ({path: np.asarray(array) for path, array in tree_leaves(tree).items()} for tree in (gradients, stepped))
    return _Run(float(loss), *found)


def main(words: list[str]) -> int:
    """Check the rows that have one of the words, or all."""
    rows = chosen(ROWS, words)
    prepare()
    outcomes = []
    for row in rows:
        outcomes.append(check(row))
        verdict = "passes" if outcomes[-1].passes else "fails"
        print(f"{row.name}: {verdict}", file=sys.stderr, flush=True)
    return show(outcomes, DEVICES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
