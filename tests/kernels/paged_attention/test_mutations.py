"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of a kernel file.

The check is the suite's rule on small problems of several tiles, splits and pages.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from mutations import describe, mutated
from oracles import multiples
from paged_problems import PROBLEMS, Problem, by_torch, inputs
from sweeps import one_in

import crosstile.kernels.paged_attention as package
from crosstile.kernels.paged_attention.tiles import choose_config
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

SMALL = replace(
    PROBLEMS["window"], lengths=(50, 0, 70), q_lengths=(9, 3, 1), sinks=True, page_dtype="int8", softcap=2.0
)
CHECKED = {
    "all": SMALL,
    "padded": replace(SMALL, page_dtype=None, softcap=None, window_left=None, q_lengths=(4, 9, 0)),
    "decode": Problem(lengths=(50, 0, 128)),
    "window": Problem(lengths=(128, 100), window_left=20),
    "chunk": Problem(lengths=(70,), q_len=20),
    "large pages": Problem(lengths=(100,), page_size=64, max_pages=2),
    "high cap": Problem(lengths=(70,), softcap=300.0),
}


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "all"


T, P, PP, C, R = "triton", "pallas", "pallas_pages", "pallas_tiling", "reference"
MUTATIONS = (
    Mutation("aligned top-left", T, "aligned = query + (length - q_length)", "aligned = query"),
    Mutation("q_lengths forgotten in the alignment", T, "query + (length - q_length)", "query + (length - q_len)"),
    Mutation("one key too few", T, "tl.minimum(aligned + 1, end)", "tl.minimum(aligned, end)"),
    Mutation("window one key short", T, "tl.maximum(aligned - window_left, start)", "aligned - window_left + 1"),
    Mutation("window forgotten", T, "start = tl.maximum(first_query + offset - window_left, 0)", "start = 0", "window"),
    Mutation("the wrong page", T, "first // PAGE_SIZE, table_entry", "0, table_entry", "large pages"),
    Mutation("the wrong row of a page", T, "rows = keys % PAGE_SIZE", "rows = (keys + 1) % PAGE_SIZE", "decode"),
    Mutation("rows past the end read", T, "exist = keys < end", "exist = keys >= 0", "decode"),
    Mutation("the wrong key head", T, "k_pages = advance(k_pages, kv_head, k_head)", "k_pages = k_pages"),
    Mutation("whole tiles not masked", T, "tl.minimum(first_query + offset + 1", "tl.minimum(999", "chunk"),
    Mutation("parts overlap", T, "lo = tl.minimum(lo + split * part, hi)", "lo = lo", "decode"),
    Mutation("parts not weighed", T, "tl.exp2(part_lse - base)", "tl.where(saw, 1.0, 0.0)", "decode"),
    Mutation("a sink a part", T, "tl.where(split == 0, sink * LOG2_E", "tl.where(split >= 0, sink * LOG2_E"),
    Mutation("lse in base 2", T, "(peak + tl.log2(total)) * LN_2", "(peak + tl.log2(total))", "decode"),
    Mutation("padding not cleared", T, "acc = tl.where(real[:, None], acc, 0.0)", "acc = acc", "padded"),
    Mutation("v_scales forgotten", T, "(_scale(v_scales, kv_head, v_scales_head) / ", "(1.0 / "),
    Mutation("a tanh that cancels", T, "square < 0.09", "square < 0.0", "high cap"),
    Mutation("scale in base e", T, "scale * log2(e) if cap", "scale if cap", "decode"),
    Mutation("one key too few", P, "end = jnp.minimum(aligned + 1, end)", "end = jnp.minimum(aligned, end)"),
    Mutation("values past the end read", P, "jnp.where(exist, values, jnp.zeros_like(values))", "values", "decode"),
    Mutation("the next block into this slot", P, "pages.start(walk, block + 1, 1 - slot)",
             "pages.start(walk, block + 1, slot)", "decode"),
    Mutation("the first block of this item again", P, "jnp.minimum(item + 1, ", "jnp.minimum(item, ", "decode"),
    Mutation("the wrong page", PP, "page, at = page + number", "page, at = page", "decode"),
    Mutation("the wrong row of a page", PP, "lax.rem(first_key + number * tiling.piece, tiling.page_size)",
             "0 * number", "large pages"),
    Mutation("other heads seen", P, "== rows[:, 1:2]", ">= 0 * rows[:, 1:2]", "decode"),
    Mutation("the wrong key head", P, "piece[pl.ds(head,", "piece[pl.ds(0 * head,"),
    Mutation("padding not cleared", P, "jnp.where(real, acc[group, at]", "jnp.where(True, acc[group, at]", "padded"),
    Mutation("whole blocks not masked", C, "minimum(first_query + offset + 1", "minimum(999", "chunk"),
    Mutation("aligned top-left", R, "[:, None] + (length - q_length)", "[:, None]"),
    Mutation("the wrong page", R, "keys // page_size], keys", "keys * 0], keys", "decode"),
    Mutation("v_scales forgotten", R, "rows, arrays.v_scales, dtype", "rows, None, dtype"),
)  # fmt: skip


def worst(kernel: str, module: ModuleType, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem = replace(CHECKED[name], stray=False)  # a read of what is no page would end the process
    arrays = problem.arrays()
    config = choose_config(problem.spec, INTERPRET)
    if kernel == R:
        found = module.forward(problem.spec, *inputs(arrays))
    elif kernel == T:
        found = interpreted(module, problem, config, arrays)
    else:
        run = jax.jit(
            lambda *arrays: module.forward(problem.spec, config, INTERPRET, *arrays),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        found = run(*inputs(arrays))
    ours = dict(zip(("out", "lse"), found, strict=True))
    excess = multiples(ours, by_torch(problem, arrays, "float32"), by_torch(problem, arrays, "float64"), "float32")
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(module: ModuleType, problem: Problem, config: Any, arrays: dict[str, Any]) -> tuple[Any, ...]:
    from crosstile.kernels.tiles import triton_interpreter

    plan = module.forward(problem.spec, config, *map(describe, inputs(arrays)))
    return triton_interpreter.run(plan, {name: array for name, array in arrays.items() if array is not None})


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(kernel, getattr(package, kernel), name)


@pytest.mark.parametrize("mutation", one_in(7, MUTATIONS), ids=lambda m: f"{m.file}-{m.name}".replace(" ", "_"))
def test_the_check_notices(mutation, tmp_path):
    kernel = mutation.file.split("_")[0]
    assert sound(kernel, mutation.problem) <= 1
    assert worst(kernel, getattr(mutated("paged_attention", mutation, tmp_path), kernel), mutation.problem) > 1
