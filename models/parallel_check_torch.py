"""Whether a model on many torch devices has the losses, gradients and steps that it has on one.

    torchrun --nproc-per-node 4 -m crosstile.models.parallel_check_torch
    python -m crosstile.models.parallel_check_torch tensor uneven  # starts 4 processes, rows with these words

Each row is held to float64 on one device: its error may be twice that of one device in the same precision, and a few
roundings more. The command fails if a row does.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import crosstile

from . import transformer
from .arrays import Tree, cast, tree_leaves, tree_map_with_path
from .distributed_torch import ShardedTransformer, shard
from .learners import NOT_TRAINED, in_precision
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
    show,
)
from .sharding import Parallel

DEVICES = 4


_row = partial(Row, batch=DEVICES)
ROWS = (
    _row("data 4", Parallel(data=4)),
    _row("fsdp 4", Parallel(fsdp=4)),
    _row("data 2, fsdp 2", Parallel(data=2, fsdp=2), segments=True),
    _row("tensor 4", Parallel(tensor=4), replace(SMALL, num_kv_heads=4)),
    _row("tensor 4, keys' heads not divided", Parallel(tensor=4)),
    _row("tensor 2, fsdp 2", Parallel(tensor=2, fsdp=2)),
    _row("tensor 2, data 2, as Gemma", Parallel(tensor=2, data=2), GEMMA),
    _row("tensor 2, fsdp 2, latent", Parallel(tensor=2, fsdp=2), DEEPSEEK),
    _row("expert 4", Parallel(expert=4), MIXTRAL),
    _row("expert 2, tensor 2", Parallel(expert=2, tensor=2), MIXTRAL),
    _row("expert 2, fsdp 2, a shared one", Parallel(expert=2, fsdp=2), SHARED),
    _row("expert 2, tensor 2, as GPT-OSS", Parallel(expert=2, tensor=2), GPT_OSS),
    _row("expert 2, context 2", Parallel(expert=2, context=2), MIXTRAL, batch=3, seq=13),
    _row("context 4, gather", Parallel(context=4), segments=True),
    _row("context 4, ring", Parallel(context=4, context_form="ring"), segments=True),
    _row("context 4, ulysses", Parallel(context=4, context_form="ulysses"), segments=True),
    _row("context 2, ring, sinks", Parallel(context=2, fsdp=2, context_form="ring"), GPT_OSS),
    _row("context 2, tensor 2, gather", Parallel(context=2, tensor=2), GEMMA),
    _row("context 2, tensor 2, ring", Parallel(context=2, tensor=2, context_form="ring"), GEMMA),
    _row("context 2, tensor 2, ulysses", Parallel(context=2, tensor=2, context_form="ulysses"), GPT_OSS),
    _row("context 2, fsdp 2, sinks", Parallel(context=2, fsdp=2), GPT_OSS),
    _row("uneven batch", Parallel(fsdp=4), batch=3),
    _row("uneven sequence", Parallel(context=4, context_form="ring"), seq=13),
    _row("uneven heads", Parallel(tensor=2, fsdp=2), replace(SMALL, num_heads=3, num_kv_heads=3)),
    _row("uneven vocabulary", Parallel(tensor=4), replace(SMALL, vocab_size=33, intermediate_size=50)),
    _row("uneven parameters", Parallel(fsdp=4), replace(SMALL, vocab_size=33, hidden_size=30, intermediate_size=45)),
    _row("remat full, fsdp 4", Parallel(fsdp=4), remat="full"),
    _row("remat full, tensor 2, context 2", Parallel(tensor=2, context=2, context_form="ring"), remat="full"),
    _row("remat products, fsdp 4", Parallel(fsdp=4), remat="products"),
    _row("bfloat16, fsdp 4", Parallel(fsdp=4), precision="bfloat16"),
    _row("bfloat16, tensor 2, fsdp 2", Parallel(tensor=2, fsdp=2), precision="bfloat16"),
    _row("bfloat16, context 4", Parallel(context=4, context_form="ring"), precision="bfloat16"),
    _row("triton interpreted", Parallel(tensor=2, fsdp=2), seq=8, batch=2, implementation="triton"),
)


@dataclass
class _Run:
    """The loss, the gradients and the parameters after a step."""

    loss: float
    gradients: dict[str, Tensor]
    stepped: dict[str, Tensor]


def check(row: Row) -> Outcome:
    """Run a row in this process, one of DEVICES in the default group."""
    params = transformer.init(row.config, 0, "torch")
    rows, documents = batch_of(row)
    tokens, segments = torch.tensor(rows), None if documents is None else torch.tensor(documents)
    before = {path: array.double() for path, array in tree_leaves(params).items()}
    exact = _on_one(row, params, tokens, segments, "float64")
    one = _on_one(row, params, tokens, segments, row.precision)
    with crosstile.use(row.implementation) if row.implementation else nullcontext():
        many = _on_many(row, params, tokens, segments)
    rounding = torch.finfo(getattr(torch, row.precision)).eps
    errors = {"loss": error(abs(many.loss - exact.loss), abs(one.loss - exact.loss), rounding * abs(exact.loss))}
    for name in ("gradients", "stepped"):
        parts = []
        for path, wanted in getattr(exact, name).items():
            size = (wanted - before[path] if name == "stepped" else wanted).norm().item()
            found = (getattr(run, name)[path].double() for run in (many, one))
            of_many, of_one = ((array - wanted).norm().item() / max(size, 1e-30) for array in found)
            parts.append(error(of_many, of_one, rounding))
        errors[name] = max(parts, key=lambda part: part.many / part.allowed)
    return Outcome(row.name, errors)


def _on_one(row: Row, params: Tree, tokens: Tensor, segments: Tensor | None, precision: str) -> _Run:
    kept = "float64" if precision == "float64" else "float32"
    params = tree_map_with_path(lambda _, array: cast(array, kept).clone(), params)
    trained = {path: x.requires_grad_() for path, x in tree_leaves(params).items() if not path.endswith(NOT_TRAINED)}
    loss = transformer.loss(in_precision(params, precision), tokens, row.config, segments=segments)
    loss.backward()
    gradients = {path: array.grad.clone() for path, array in trained.items() if array.grad is not None}
    _step(list(trained.values()))
    return _Run(loss.item(), gradients, {path: array.detach() for path, array in trained.items()})


def _by_columns(array: Tensor) -> Tensor:
    """A copy that lies in memory as `checkpoint.load` has it."""
    return array.clone() if array.ndim < 2 else array.mT.clone(memory_format=torch.contiguous_format).mT


def _on_many(row: Row, params: Tree, tokens: Tensor, segments: Tensor | None) -> _Run:
    model: ShardedTransformer = shard(
        row.config,
        row.parallel,
        params=tree_map_with_path(lambda _, array: _by_columns(array), params),
        remat=row.remat,
        precision=None if row.precision == "float32" else row.precision,
        balanced=row.balanced,
    )
    loss = model.loss(tokens, segments)
    loss.backward()
    trained: dict[str, Any] = {name: array for name, array in model.named_parameters() if array.requires_grad}
    gradients = {name: array.grad.full_tensor().clone() for name, array in trained.items()}
    _step(list(trained.values()))
    return _Run(loss.item(), gradients, {name: array.detach().full_tensor() for name, array in trained.items()})


def _step(parameters: list[Any]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    torch.optim.AdamW(parameters, lr=1e-2, eps=1e-5).step()


def run(rows: Sequence[Row], before: Callable[[], None] | None = None) -> list[Outcome]:
    """The outcomes of rows in DEVICES processes that are started for them; each calls `before` first."""
    with TemporaryDirectory() as folder:
        where = Path(folder)
        spawn(_process, (where, tuple(rows), before), nprocs=DEVICES)
        found: list[Outcome] = pickle.loads((where / "outcomes").read_bytes())
    return found


def _process(rank: int, folder: Path, rows: tuple[Row, ...], before: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=DEVICES, timeout=timedelta(seconds=60))
    if before:
        before()
    outcomes = [_checked(row) for row in rows]
    if rank == 0:
        (folder / "outcomes").write_bytes(pickle.dumps(outcomes))
    dist.destroy_process_group()


def _checked(row: Row) -> Outcome:
    """Its outcome. An error ends the process, and so all, since the others would wait for it."""
    try:
        return check(row)
    except Exception as failure:
        failure.add_note(f"in the row {row.name!r}")
        raise


def main(words: list[str]) -> int:
    """Check the rows that have one of the words, or all."""
    rows = chosen(ROWS, words)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo" if not torch.cuda.is_available() else None)
        outcomes = [_checked(row) for row in rows]
        quiet = dist.get_rank() > 0
        dist.destroy_process_group()
        if quiet:
            return 0
    else:
        outcomes = run(rows)
    return show(outcomes, DEVICES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
