"""Caches in pages, the worst that may be in them, and the answers by torch on the same keys in one dense array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from oracles import rounded
from torch.nn import functional

from crosstile.kernels.paged_attention.spec import INPUTS, PagedAttentionSpec


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a case reads as its difference from this one."""

    lengths: tuple[int, ...] = (50, 0, 128)
    q_len: int = 1
    q_lengths: tuple[int, ...] | None = None
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 24
    v_dim: int = 12
    page_size: int = 16
    max_pages: int = 8
    dtype: str = "float32"
    page_dtype: str | None = None
    causal: bool = True
    scale: float | None = None
    softcap: float | None = None
    window_left: int | None = None
    sinks: bool = False
    seed: int = 0
    stray: bool = True  # entries of the table that no query sees are no pages; else they are pages of NaN

    @property
    def spec(self) -> PagedAttentionSpec:
        return PagedAttentionSpec(
            self.dtype,
            self.page_dtype or self.dtype,
            self.head_dim,
            self.v_dim,
            self.causal,
            self.scale,
            True,
            self.window_left,
            self.softcap,
        )

    @property
    def queries(self) -> tuple[int, ...]:
        """How many of each batch item are there."""
        given = self.q_lengths or (self.q_len,) * len(self.lengths)
        return tuple(min(max(count, 0), self.q_len) for count in given)

    def seen(self, item: int) -> np.ndarray:
        """bool [queries, keys] of one batch item, by the words of the definition."""
        length, count = min(max(self.lengths[item], 0), self.max_pages * self.page_size), self.queries[item]
        seen = np.zeros((count, length), bool)
        for i in range(count):
            for j in range(length):
                after = not self.causal or j <= i + length - count
                seen[i, j] = after and (self.window_left is None or j >= i + length - count - self.window_left)
        return seen

    def arrays(self) -> dict[str, Any]:
        """The inputs, pages in any order. What no query sees is NaN, or an entry that is no page."""
        rng = np.random.default_rng(self.seed)
        batch, kind = len(self.lengths), self.page_dtype or self.dtype
        used = [np.flatnonzero(self.seen(item).any(axis=0)) for item in range(batch)]  # keys
        pages = [np.unique(keys // self.page_size) for keys in used]
        num_pages = sum(map(len, pages)) + 2
        numbers = iter(rng.permutation(num_pages))
        table = rng.choice(np.array([-1, -(2**31), 2**31 - 1, num_pages]), (batch, self.max_pages))
        if not self.stray:
            table[:] = next(numbers)
        live = np.zeros((num_pages, self.page_size), bool)
        for item in range(batch):
            for page in pages[item]:
                table[item, page] = next(numbers)
            live[table[item, used[item] // self.page_size], used[item] % self.page_size] = True

        def cache(dim: int) -> np.ndarray:
            values = rng.standard_normal((num_pages, self.page_size, self.kv_heads, dim))
            if kind == "int8":
                return np.where(live[..., None, None], np.clip(np.round(40 * values), -127, 127), 127).astype(np.int8)
            return np.where(live[..., None, None], rounded(values, kind), np.nan).astype(numpy_dtype(kind))

        q = rounded(rng.standard_normal((batch, self.q_len, self.kv_heads * self.group, self.head_dim)), self.dtype)
        for item, count in enumerate(self.queries):
            q[item, count:] = np.nan
        scaled = kind != self.dtype
        return {
            "q": q.astype(numpy_dtype(self.dtype)),
            "k_pages": cache(self.head_dim),
            "v_pages": cache(self.v_dim),
            "page_table": table.astype(np.int32),
            "lengths": np.array(self.lengths, np.int32),
            "q_lengths": None if self.q_lengths is None else np.array(self.q_lengths, np.int32),
            "k_scales": rng.uniform(0.01, 0.04, self.kv_heads).astype(np.float32) if scaled else None,
            "v_scales": rng.uniform(0.01, 0.04, self.kv_heads).astype(np.float32) if scaled else None,
            "sinks": rng.standard_normal((batch, self.kv_heads * self.group)).astype(np.float32)
            if self.sinks
            else None,
        }


def numpy_dtype(name: str) -> Any:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name) if name in ("bfloat16", "float8_e4m3fn") else name)


def inputs(arrays: dict[str, Any]) -> tuple[Any, ...]:
    """In the order of the op."""
    return tuple(arrays[name] for name in INPUTS)


def in_float64(arrays: dict[str, Any]) -> dict[str, Any]:
    """The same values, for the definition to compute in float64."""
    wide = {"q", "k_pages", "v_pages", "k_scales", "v_scales", "sinks"}
    return {
        name: array.astype(np.float64) if name in wide and array is not None else array
        for name, array in arrays.items()
    }


def dense(problem: Problem, arrays: dict[str, Any], item: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q [q_heads, queries, head_dim], k and v [q_heads, keys, dim] of one item, row by row; unseen keys are 0."""
    seen = problem.seen(item)
    found = []
    for name, scales in (("k_pages", "k_scales"), ("v_pages", "v_scales")):
        pages = arrays[name]
        rows = np.zeros((seen.shape[1], *pages.shape[2:]))
        for key in np.flatnonzero(seen.any(axis=0)):
            page = arrays["page_table"][item, key // problem.page_size]
            rows[key] = pages[page, key % problem.page_size].astype(np.float64)
        if arrays[scales] is not None:
            rows = rows * arrays[scales].astype(np.float64)[:, None]
        found.append(torch.from_numpy(np.repeat(rows, problem.group, axis=1)).to(dtype).transpose(0, 1))
    q = torch.from_numpy(arrays["q"][item, : seen.shape[0]].astype(np.float64)).to(dtype).transpose(0, 1)
    return q, *found


def by_torch(problem: Problem, arrays: dict[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """out and lse by scaled_dot_product_attention in that precision; a sink is one more key, without a value."""
    kind = getattr(torch, dtype)
    batch, q_len, q_heads, _ = arrays["q"].shape
    out, lse = np.zeros((batch, q_len, q_heads, problem.v_dim)), np.full((batch, q_heads, q_len), -np.inf)
    for item in range(batch):
        seen = torch.from_numpy(problem.seen(item))
        if problem.sinks:
            lse[item] = arrays["sinks"][item][:, None]
        if not seen.numel():
            continue
        q, k, v = dense(problem, arrays, item, kind)
        hidden = torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, -torch.inf).expand(q_heads, -1, -1)
        if problem.sinks:
            sinks = torch.from_numpy(arrays["sinks"][item]).to(kind)[:, None, None].expand(-1, seen.shape[0], 1)
            hidden = torch.cat((hidden, sinks), dim=2)
            k, v = (functional.pad(array, (0, 0, 0, 1)) for array in (k, v))
        sees = (~torch.isneginf(hidden)).any(dim=2)
        wide = torch.float64 if dtype == "float64" else torch.float32
        scores = q.to(wide) @ k.to(wide).transpose(1, 2) * problem.spec.softmax_scale
        if problem.softcap is None:
            found = functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=problem.spec.softmax_scale)
        else:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
            weights = torch.softmax(scores.to(kind) + hidden, dim=2)
            found = weights @ v
        found = torch.where(sees[..., None], found, 0)
        count = seen.shape[0]
        out[item, :count] = found.transpose(0, 1).double().numpy()
        lse[item, :, :count] = torch.logsumexp(scores + hidden.to(wide), dim=2).double().numpy()
    return {"out": out, "lse": lse}


PROBLEMS = {
    "decode": Problem(),
    "decode, one page": Problem(lengths=(1, 15, 16, 17)),
    "chunk": Problem(q_len=9, q_lengths=(9, 0, 4)),
    "chunk longer than the cache": Problem(q_len=40, lengths=(30, 0, 128)),
    "window": Problem(q_len=9, window_left=20, q_lengths=(9, 3, 1)),
    "window, decode": Problem(window_left=5),
    "window of one key": Problem(q_len=3, window_left=0),
    "softcap and sinks": Problem(q_len=3, softcap=3.0, sinks=True, q_lengths=(1, 3, 2)),
    "not causal": Problem(q_len=20, causal=False, sinks=True, q_lengths=(3, 20, 0)),
    "not causal, window": Problem(q_len=30, causal=False, window_left=7),
    "large pages": Problem(page_size=64, max_pages=3, lengths=(1, 190, 64), group=1, v_dim=24),
    "many heads of one": Problem(kv_heads=1, group=20, q_len=2),
    "heads of their own": Problem(kv_heads=5, group=1, q_len=2),
    "negative scale": Problem(scale=-1.0),
    "lengths out of range": Problem(lengths=(-3, 200, 7), q_len=4, q_lengths=(9, 3, -1)),
    "int8": Problem(page_dtype="int8", q_len=5),
    "int8, decode, sinks": Problem(page_dtype="int8", sinks=True),
}
