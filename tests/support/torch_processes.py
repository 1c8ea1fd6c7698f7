"""What 4 torch processes are asked for the tests: ops on DTensors, rows of the check, and the same with broken code."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import crosstile
from crosstile import dtensor, dtensor_attention, ring_torch
from crosstile.models import distributed_experts, parallel_check_torch, transformer
from crosstile.models.arrays import tree_leaves
from crosstile.models.distributed_torch import shard
from crosstile.models.parallel_cases import SMALL
from crosstile.models.parallel_check_torch import DEVICES, ROWS
from crosstile.models.sharding import Parallel

R, S = Replicate(), Shard


@dataclass(frozen=True)
class Call:
    """An op on DTensors: of each array its shape, and where it lies on a mesh of 2 x 2 (or of 4)."""

    op: str
    arrays: dict
    options: dict = field(default_factory=dict)
    mesh: tuple = (4,)
    sharded: dict = field(default_factory=dict)


def later(score, b, h, i, j):
    return score + 0.125 * b - 0.25 * h + 0.0625 * i * j


def near(b, h, i, j):
    return j <= i + h + b


LONG, ODD = (2, 8, 4, 8), (2, 7, 4, 8)
CALLS = {
    "attention, uneven batch": Call(
        "attention",
        {"q": ((3, 5, 4, 8), (S(0),)), "k": ((3, 6, 2, 8), (S(0),)), "v": ((3, 6, 2, 4), (R,))},
        {"causal": True},
    ),
    "attention, heads": Call(
        "attention",
        {
            "q": (LONG, (S(2),)),
            "k": ((2, 8, 2, 8), (R,)),
            "v": ((2, 8, 2, 8), (S(2),)),
            "sinks": ((4,), (R,)),
            "bias": ((1, 4, 8, 8), (R,)),
        },
        {"causal": True, "window": (4, 0), "softcap": 5.0, "return_lse": True},
    ),
    "attention, irregular heads": Call(
        "attention", {"q": ((1, 4, 6, 8), (S(2),)), "k": ((1, 4, 2, 8), (R,)), "v": ((1, 4, 2, 8), (R,))}
    ),
    "attention, mods": Call(
        "attention",
        {"q": ((4, 8, 2, 8), (S(0), S(2))), "k": ((4, 8, 2, 8), (S(0), S(2))), "v": ((4, 8, 2, 8), (R, R))},
        {"score_mod": later, "mask_mod": near},
        (2, 2),
    ),
    "attention, sequence": Call(
        "attention",
        {"q": (ODD, (S(1),)), "k": ((2, 9, 4, 8), (S(1),)), "v": ((2, 9, 4, 8), (S(1),)), "bias": ((7, 9), (R,))},
        {"causal": True, "score_mod": later, "return_lse": True},
    ),
    "attention, sequence and heads by ulysses": Call(
        "attention",
        {"q": (LONG, (S(1), S(2))), "k": ((2, 8, 2, 8), (S(1), S(2))), "v": ((2, 8, 2, 8), (S(1), S(2)))},
        {"window": (2, 3), "score_mod": later, "return_lse": True},
        (2, 2),
        {"context_form": "ulysses"},
    ),
    "attention, ring": Call(
        "attention",
        {"q": (LONG, (S(1),)), "k": ((2, 8, 2, 8), (S(1),)), "v": ((2, 8, 2, 8), (S(1),)), "sinks": ((4,), (R,))},
        {"causal": True, "softcap": 5.0, "return_lse": True},
        (4,),
        {"context_form": "ring"},
    ),
    "attention, ring with a window": Call(
        "attention",
        {"q": (LONG, (S(1),)), "k": (LONG, (S(1),)), "v": (LONG, (S(1),))},
        {"causal": True, "window": (2, 0)},
        (4,),
        {"context_form": "ring"},
    ),
    "matmul, columns": Call(
        "matmul",
        {"a": ((3, 5, 6), (S(0), R)), "b": ((6, 7), (R, S(1))), "bias": ((7,), (R, R)), "residual": ((5, 7), (R, R))},
        {"activation": "gelu"},
        (2, 2),
    ),
    "matmul, contracted": Call(
        "matmul",
        {
            "a": ((3, 5, 7), (S(0), S(2))),
            "b": ((7, 6), (R, S(0))),
            "bias": ((6,), (R, R)),
            "residual": ((3, 5, 6), (S(0), R)),
        },
        {"activation": "silu"},
        (2, 2),
    ),
    "matmul, a sum for later": Call("matmul", {"a": ((5, 7), (S(1),)), "b": ((7, 6), (R,))}),
    "matmul, batches": Call("matmul", {"a": ((4, 3, 5), (S(0), S(1))), "b": ((4, 5, 2), (S(0), R))}, {}, (2, 2)),
    "matmul, a of fewer dimensions": Call(
        "matmul", {"a": ((3, 5), (R, R)), "b": ((4, 5, 2), (S(0), S(2)))}, {}, (2, 2)
    ),
    "varlen_attention": Call(
        "varlen_attention",
        {"q": ((9, 4, 8), (S(1), R)), "k": ((9, 2, 8), (S(1), R)), "v": ((9, 2, 8), (R, R))},
        {
            "cu_seqlens_q": torch.tensor([0, 4, 9]),
            "cu_seqlens_k": torch.tensor([0, 4, 9]),
            "max_seqlen_q": 5,
            "max_seqlen_k": 5,
        },
        (2, 2),
    ),
    "grouped_matmul": Call(
        "grouped_matmul",
        {"lhs": ((9, 6), (S(1), R)), "rhs": ((2, 6, 5), (S(1), S(2)))},
        {"group_sizes": torch.tensor([4, 5])},
        (2, 2),
    ),
    "glu_matmul": Call(
        "glu_matmul", {"x": ((5, 6), (S(0), R)), "w_gate": ((6, 7), (R, S(1))), "w_up": ((6, 7), (R, S(1)))}, {}, (2, 2)
    ),
    "rms_norm": Call(
        "rms_norm",
        {"x": ((3, 5, 6), (S(0), S(2))), "weight": ((6,), (R, R)), "residual": ((3, 5, 6), (R, S(1)))},
        {},
        (2, 2),
    ),
    "layer_norm": Call(
        "layer_norm", {"x": ((5, 4, 6), (S(0), S(1))), "weight": ((6,), (R, S(0))), "bias": ((6,), (R, R))}, {}, (2, 2)
    ),
    "linear_cross_entropy": Call(
        "linear_cross_entropy",
        {"hidden": ((3, 5, 6), (S(0), R)), "weight": ((9, 6), (R, S(0)))},
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0},
        (2, 2),
    ),
    "linear_cross_entropy, rows and vocabulary on 4": Call(
        "linear_cross_entropy", {"hidden": ((3, 5, 6), (R,)), "weight": ((9, 6), (S(0),))}, {"reduction": "sum"}
    ),
    "linear_cross_entropy, each row": Call(
        "linear_cross_entropy", {"hidden": ((3, 5, 6), (S(1),)), "weight": ((9, 6), (R,))}, {"reduction": "none"}
    ),
}
HANDFUL = (
    "tensor 2, fsdp 2",
    "expert 2, tensor 2",
    "context 4, ring",
    "triton interpreted",
)


def error(call: Call) -> float:
    """How far a call's results and gradients are from those of whole arrays, beside the largest."""
    names = (
        ("fsdp", "tensor")[-len(call.mesh) :]
        if call.sharded.get("context_form") is None
        else ("context", "tensor")[: len(call.mesh)]
    )
    mesh = init_device_mesh("cpu", call.mesh, mesh_dim_names=names)
    torch.manual_seed(0)
    plain = {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, (shape, _) in call.arrays.items()
    }
    spread = {
        name: distribute_tensor(plain[name].detach(), mesh, placements).requires_grad_()
        for name, (_, placements) in call.arrays.items()
    }
    more = {}
    if "hidden" in plain:
        targets = torch.randint(0, 9, plain["hidden"].shape[:-1])
        targets[0, :3] = -100
        more = {"targets": targets}
    function = getattr(crosstile, call.op)
    wanted = function(**plain, **more, **call.options)
    with crosstile.sharded(mesh, **call.sharded):
        found = function(**spread, **more, **call.options)
    pairs = list(zip(*[one if isinstance(one, tuple) else (one,) for one in (found, wanted)], strict=True))
    weights = [torch.randn_like(right) for _, right in pairs]
    sum((right * weight).sum() for (_, right), weight in zip(pairs, weights, strict=True)).backward()
    whole = [R] * mesh.ndim
    losses = [
        (left * DTensor.from_local(weight, mesh, whole, run_check=False)).sum().full_tensor()
        for (left, _), weight in zip(pairs, weights, strict=True)
    ]
    sum(losses).backward()
    errors = [_distance(left.detach().full_tensor(), right.detach()) for left, right in pairs]
    return max(errors + [_distance(spread[name].grad.full_tensor(), plain[name].grad) for name in plain])


REFUSED = {
    "attention, dropout": (
        "attention",
        {"q": S(0), "k": S(0), "v": S(0)},
        {"dropout": 0.5, "dropout_seed": 1},
        "dropout",
    ),
    "ring, not causal": ("attention", {"q": S(1), "k": S(1), "v": S(1)}, {}, "causal"),
    "ring, a bias": (
        "attention",
        {"q": S(1), "k": S(1), "v": S(1)},
        {"causal": True, "bias": torch.zeros(4, 4)},
        "bias",
    ),
}


def refusal(call) -> str:
    """The message of the error that such a call raises."""
    op, placements, options, _ = call
    mesh = init_device_mesh("cpu", (DEVICES,), mesh_dim_names=("context",))
    arrays = {name: distribute_tensor(torch.zeros(4, 4, 4, 4), mesh, (place,)) for name, place in placements.items()}
    try:
        with crosstile.sharded(mesh, context_form="ring"):
            getattr(crosstile, op)(**arrays, **options)
    except crosstile.UnsupportedError as error:
        return str(error)
    return ""


def _distance(found, wanted) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _summed_never(self, result, at, wrap=dtensor.Shards.wrap):
    out = wrap(self, result, at)
    return dtensor.from_local(
        out.to_local(), out.device_mesh, [R if isinstance(p, Partial) else p for p in out.placements], out.shape
    )


def _gradients_apart(array, placements, gradient):
    return array.redistribute(placements=placements).to_local(grad_placements=placements)


def _mean_of_means(name, function, arguments):
    shards = dtensor.Shards(name, {key: arguments[key] for key in ("hidden", "weight", "targets")})
    loss = function(**arguments | shards.locals())
    return DTensor.from_local(loss, shards.mesh, [Partial("avg") if role else R for role in shards.roles]).redistribute(
        placements=[R] * shards.mesh.ndim
    )


def _later_by_one(ahead, left, b, h, i, j, within=ring_torch._within):
    return within(ahead + 1, left, b, h, i, j)


def _out_of_order(array, n):
    return array


def _twice(array, parts, own=distributed_experts._own):
    return own(array, parts) * (2 if array.ndim == 3 and dist.get_rank() == 1 else 1)


BROKEN = {
    "sums are not taken": ("tensor 2, fsdp 2", lambda: mock.patch.object(dtensor.Shards, "wrap", _summed_never)),
    "gradients are not summed": ("tensor 2, fsdp 2", lambda: mock.patch.object(dtensor, "to_local", _gradients_apart)),
    "a mean of means": ("data 2, fsdp 2", lambda: mock.patch.dict(dtensor._CALLS, linear_cross_entropy=_mean_of_means)),
    "a window that begins one later": (
        "context 4, ring",
        lambda: mock.patch.object(ring_torch, "_within", _later_by_one),
    ),
    "keys in the order in which they lie": (
        "context 4, gather",
        lambda: mock.patch.object(dtensor_attention, "in_order", _out_of_order),
    ),
    "experts that differ on a device": (
        "expert 2, tensor 2",
        lambda: mock.patch.object(distributed_experts, "_own", _twice),
    ),
}


def course(parallel: Parallel | None) -> list[torch.Tensor]:
    """Losses of three steps with one of evaluation between, and logits at the end, on many devices or on one."""
    params = transformer.init(SMALL, 0, "torch", "float64")
    tokens = torch.randint(0, 64, (4, 3, 12), generator=torch.Generator().manual_seed(0))
    if parallel:
        model = shard(SMALL, parallel, params=params)
        leaves, loss = list(model.parameters()), model.loss
    else:
        leaves = [array.requires_grad_() for array in tree_leaves(params).values()]
        loss = lambda batch: transformer.loss(params, batch, SMALL)  # noqa: E731
    optimizer = torch.optim.AdamW(leaves, lr=1e-2)
    found = []
    for batch in tokens[:3]:
        with torch.no_grad():
            found.append(loss(tokens[3]))
        found.append(loss(batch))
        found[-1].backward()
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found.append(model(tokens[3]) if parallel else transformer.forward(params, tokens[3], SMALL))
    return [one.detach() for one in found]


def apart(parallel: Parallel) -> float:
    """How far such a course is from that on one device, at most."""
    return max(_distance(*pair) for pair in zip(course(parallel), course(None), strict=True))


def answers(folder: Path) -> dict:
    """{"calls": errors, "rows": outcomes, "broken": outcomes, "course": a distance, ...}, from DEVICES processes."""
    torch.multiprocessing.spawn(_process, (folder,), nprocs=DEVICES)
    return pickle.loads((folder / "answers").read_bytes())


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=DEVICES, timeout=timedelta(seconds=60))
    rows = {row.name: row for row in ROWS}
    found = {"calls": {name: error(call) for name, call in CALLS.items()}}
    found["rows"] = {name: parallel_check_torch.check(rows[name]) for name in HANDFUL}
    found["course"] = apart(Parallel(fsdp=2, context=2))
    found["refused"] = {name: refusal(call) for name, call in REFUSED.items()}
    found["broken"] = {}
    for name, (row, broken) in BROKEN.items():
        with broken():
            found["broken"][name] = parallel_check_torch.check(rows[row])
    if rank == 0:
        (folder / "answers").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
