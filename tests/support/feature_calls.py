"""The features of attention, each as what it adds to a public call: one list for the tests and the docs.

A call is made of NumPy arrays of float64 values that the precision has. The exact answer is the NumPy definition's in
float64; the measure of the error that a kernel may make is the same call by the framework's own ops, in its precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from oracles import rounded

import crosstile
from crosstile import mods
from crosstile.bench.verify import compare


@dataclass(frozen=True)
class Sizes:
    """Of q, k and v; heads come in groups."""

    batch: int = 2
    q_len: int = 37
    kv_len: int = 53
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    v_dim: int = 16

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group


@dataclass
class Call:
    """What is passed beside q, k and v: arrays that are differentiated, other arrays, plain options, and mods."""

    floats: dict[str, np.ndarray] = field(default_factory=dict)
    others: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    score_mods: list[tuple[str, Callable[[Any], mods.Mod]]] = field(default_factory=list)
    mask_mods: list[mods.Mod] = field(default_factory=list)
    packed: bool = False


Feature = Callable[[Call, Sizes, np.random.Generator], None]


def causal(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.options["causal"] = True


def window(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.options["window"] = (11, 6)


def causal_window(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.options |= {"causal": True, "window": (9, None)}


def softcap(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.options["softcap"] = 2.5


def full_bias(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.floats["bias"] = rng.standard_normal((sizes.batch, sizes.q_heads, sizes.q_len, sizes.kv_len))


def head_bias(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.floats["bias"] = rng.standard_normal((sizes.q_heads, sizes.q_len, sizes.kv_len))


def key_bias(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.floats["bias"] = rng.standard_normal((sizes.batch, 1, 1, sizes.kv_len))


def mask(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    seen = rng.random((sizes.batch, 1, sizes.q_len, sizes.kv_len)) < 0.7
    seen[:, :, :3] = False
    call.others["mask"] = seen


def known_mask(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    """Of NumPy beside tensors, so that the tiles that it hides are skipped."""
    call.options["mask"] = np.arange(sizes.q_len)[:, None] // 35 == np.arange(sizes.kv_len) // 35


def segment_ids(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    for name, length in (("queries", sizes.q_len), ("keys", sizes.kv_len)):
        call.others[f"segment_ids {name}"] = np.sort(rng.integers(0, 4, (sizes.batch, length)), axis=1)


def lengths(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.others["q_lengths"] = np.resize([sizes.q_len, sizes.q_len // 3, 0], sizes.batch)
    call.others["kv_lengths"] = np.resize([sizes.kv_len // 2, sizes.kv_len, 1], sizes.batch)


def sinks(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.floats["sinks"] = rng.standard_normal(sizes.q_heads)


def alibi(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.floats["slopes"] = 0.1 * rng.standard_normal(sizes.q_heads)
    call.score_mods.append(("slopes", mods.alibi))


def relative_bias(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.floats["table"] = rng.standard_normal((sizes.q_heads, sizes.q_len + sizes.kv_len))
    call.score_mods.append(("table", lambda held: mods.relative(held, sizes.q_len)))


def prefix_mask(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.mask_mods.append(mods.prefix(7))


def dilated_mask(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.mask_mods.append(mods.dilated(3))


def document_mask(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.mask_mods.append(mods.document(np.sort(rng.integers(0, 3, max(sizes.q_len, sizes.kv_len)))))


def dropout(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.options |= {"dropout": 0.3, "dropout_seed": 2**33 + 1234}


def packed(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
    call.packed = True


FEATURES: dict[str, Feature] = {
    "causal": causal,
    "window, left and right": window,
    "causal window": causal_window,
    "softcap": softcap,
    "bias, full": full_bias,
    "bias, per head": head_bias,
    "bias, per key": key_bias,
    "mask": mask,
    "mask, known to the host": known_mask,
    "segment ids": segment_ids,
    "lengths": lengths,
    "sinks": sinks,
    "score_mod: ALiBi": alibi,
    "score_mod: relative bias": relative_bias,
    "mask_mod: prefix LM": prefix_mask,
    "mask_mod: dilated": dilated_mask,
    "mask_mod: documents": document_mask,
    "dropout": dropout,
    "packed sequences (varlen)": packed,
}


def arrays_of(sizes: Sizes, features: tuple[str, ...], dtype: str) -> tuple[dict[str, np.ndarray], Call]:
    """q, k, v and the gradients of out and lse, float64 of values that `dtype` has; and the rest of the call."""
    rng = np.random.default_rng(len(features) * 100 + sizes.q_len)
    call = Call()
    for name in features:
        FEATURES[name](call, sizes, rng)
    shapes = {
        "q": (sizes.batch, sizes.q_len, sizes.q_heads, sizes.head_dim),
        "k": (sizes.batch, sizes.kv_len, sizes.kv_heads, sizes.head_dim),
        "v": (sizes.batch, sizes.kv_len, sizes.kv_heads, sizes.v_dim),
        "dout": (sizes.batch, sizes.q_len, sizes.q_heads, sizes.v_dim),
        "dlse": (sizes.batch, sizes.q_heads, sizes.q_len),
    }
    arrays = {name: rounded(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    call.floats = {name: rounded(array, dtype) for name, array in call.floats.items()}
    return arrays, call


def run(
    sizes: Sizes, arrays: dict[str, np.ndarray], call: Call, dtype: str, implementation: str, backward: bool = True
) -> dict[str, np.ndarray]:
    """out, lse and the gradient of every float array, through torch in that precision."""
    kind = getattr(torch, dtype)
    leaves = {name: torch.from_numpy(arrays[name]).to(kind).requires_grad_(backward) for name in "qkv"}
    leaves |= {name: torch.from_numpy(array).to(kind).requires_grad_(backward) for name, array in call.floats.items()}
    out, lse = _attend(sizes, leaves, call, implementation)
    found = {"out": out, "lse": lse}
    if backward:
        loss = (out.double() * torch.from_numpy(arrays["dout"])).sum()
        seen = torch.where(torch.isneginf(lse), 0, lse)
        loss = loss + (seen.double() * torch.from_numpy(arrays["dlse"])).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: array.detach().double().numpy() for name, array in found.items()}


def _attend(sizes: Sizes, leaves: dict[str, Any], call: Call, implementation: str) -> tuple[Any, Any]:
    captured = {name for name, _ in call.score_mods}
    options = {**call.options, "implementation": implementation, "return_lse": True}
    options |= {name: leaf for name, leaf in leaves.items() if name not in (*"qkv", *captured)}
    options |= {name: torch.from_numpy(array) for name, array in call.others.items() if " " not in name}
    if "segment_ids queries" in call.others:
        sides = ("queries", "keys")
        options["segment_ids"] = tuple(torch.from_numpy(call.others[f"segment_ids {side}"]) for side in sides)
    if call.score_mods:
        options["score_mod"] = _chained([make(leaves[name]) for name, make in call.score_mods])
    if call.mask_mods:
        options["mask_mod"] = mods.all_of(*call.mask_mods)
    q, k, v = (leaves[name] for name in "qkv")
    return _packed(sizes, q, k, v, options) if call.packed else crosstile.attention(q, k, v, **options)


def _packed(sizes: Sizes, q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The batch's rows as uneven sequences, an empty one among them, with tokens past the last."""
    batch, q_len, kv_len = sizes.batch, sizes.q_len, sizes.kv_len
    tokens, kv_tokens = batch * q_len, batch * kv_len
    end = kv_tokens - kv_tokens // 8
    starts = {
        "cu_seqlens_q": torch.tensor([0, tokens // 4, tokens // 4, tokens - tokens // 8]),
        "cu_seqlens_k": torch.tensor([0, kv_tokens // 2, min(kv_tokens // 2 + 1, end), end]),
    }
    rows = [array.flatten(0, 1) for array in (q, k, v)]
    out, lse = crosstile.varlen_attention(*rows, **starts, max_seqlen_q=tokens, max_seqlen_k=kv_tokens, **options)
    return out.reshape(batch, q_len, *out.shape[1:]), lse.reshape(lse.shape[0], batch, q_len).transpose(0, 1)


def _chained(score_mods: list[mods.Mod]) -> mods.Mod:
    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        for mod in score_mods:
            score = mod(score, b, h, i, j)
        return score

    return score_mod


def worst(
    sizes: Sizes, features: tuple[str, ...], dtype: str, implementation: str, backward: bool = True
) -> dict[str, float]:
    """The error of every result as a multiple of the allowed."""
    arrays, call = arrays_of(sizes, features, dtype)
    exact = run(sizes, arrays, call, "float64", "numpy", backward)
    theirs = run(sizes, arrays, call, dtype, "library", backward)
    ours = run(sizes, arrays, call, dtype, implementation, backward)
    scores = sizes.batch * sizes.q_heads * sizes.q_len * sizes.kv_len
    found = {}
    for name, result in ours.items():
        precision = "float32" if name == "lse" else dtype
        terms = max(scores // max(result.size, 1), 1) if name[1:] in call.floats else 1
        found[name] = compare(result, theirs[name], exact[name], precision, terms)[1]
    return found
