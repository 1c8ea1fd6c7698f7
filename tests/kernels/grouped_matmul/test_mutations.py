"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of the op's files.

The check is the suite's rule on small problems of several tiles, steps and groups, with NaN past the last group.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from grouped_problems import OPERANDS, Problem
from mutations import describe, mutated
from oracles import multiples
from sweeps import one_in

import crosstile.kernels.grouped_matmul as package
from crosstile.kernels.grouped_matmul.tiles import GroupedMatmulConfig, GroupedMatmulTiles
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

CONFIG = GroupedMatmulConfig(*[GroupedMatmulTiles(16, 16, 16, group_m=2)] * 3)
CHECKED = {
    "plain": Problem(sizes=(3, 0, 20), tokens=30, k=24, n=20),
    "gated": Problem(sizes=(3, 0, 20), tokens=30, k=24, n=20, activation="silu"),
    "long": Problem(sizes=(2, 60), tokens=64, k=17, n=20, activation="silu"),  # a group of several chunks
    "batch": Problem(sizes=(3, 0, 8), tokens=12, k=17, n=20, batch=2, activation="silu"),
    "whole": Problem(sizes=(3, 0, 20, 5), tokens=30, k=16, n=32),  # a step sums all, of one of two blocks of columns
    "int4": Problem(sizes=(3, 0, 20), tokens=30, k=300, n=20, kind="int4-64"),
    "zeros": Problem(sizes=(3, 0, 20), tokens=30, k=300, n=20, kind="int4-128-zeros", activation="silu"),
    "long int4": Problem(sizes=(3, 0, 20), tokens=30, k=600, n=20, kind="int4-32"),  # more than one block along k
    "column": Problem(sizes=(3, 0, 8), tokens=12, k=70, n=20, kind="int8-zeros", batch=2, activation="silu"),
}


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "plain"


PR, G, F = "tiles/triton_products", "tiles/triton_gate", "tiles/triton_formats"
S, W, D, T = "triton_schedule", "triton_rows", "triton_drhs", "triton"
Q, PQ, PA = "triton_quantized", "pallas_quantized", "pallas_ahead"
V, PW, PD, PP, R = "pallas_schedule", "pallas_rows", "pallas_drhs", "pallas_products", "reference"
MUTATIONS = (
    Mutation("tiles reach into the next group", S, "tl.minimum(row + block, end)", "tl.minimum(row + block, tokens)"),
    Mutation("no partial sums", S, "tl.where(split & real, partials + index, -1)", "tl.where(split & real, -1, -1)",
             "long"),
    Mutation("nobody's rows not written", W, "if row >= end:", "if (row >= end) | (group >= groups):"),
    Mutation("nobody's rows multiplied", W, "length = tl.where(group < groups, k, 0)", "length = k"),
    Mutation("the first matrix for all", W, "advance(advance(advance(right, batch, right_batch), group, right_group)",
             "advance(advance(advance(right, batch, right_batch), 0, right_group)"),
    Mutation("k past the end counts", PR, "inner_exists = inner < k - start", "inner_exists = inner < k"),
    Mutation("up not gated", G, "activate(gate, ACTIVATION) * up", "activate(gate, ACTIVATION)", "gated"),
    Mutation("kept in the other order", G, "store(gate, kept, 2 * batch, ", "store(up, kept, 2 * batch, ", "gated"),
    Mutation("dlhs of gate alone", W, '["TWO"] = bool(left_up)', '["TWO"] = False', "gated"),
    Mutation("the other batch's rows", W, "advance(advance(left, batch, left_batch)",
             "advance(advance(left, 0, left_batch)", "batch"),
    Mutation("rows past the group", D, "exists = inner < end - start", "exists = inner < tokens - start"),
    Mutation("an empty group is not written", D, "if end < first:", "if end <= first:"),
    Mutation("one chunk forgotten", D, "range(before_it, before_it + count)", "range(before_it + 1, before_it + count)",
             "long"),
    Mutation("up's partial sum for both", D, "partial) * (2 if TWO else 1)", "partial) * 1", "long"),
    Mutation("only the first chunk", D, "if count <= 1:", "if count <= 9:", "long"),
    Mutation("results exchanged", D, '("drhs_up", "partials", "drhs")', '("drhs", "partials", "drhs_up")', "gated"),
    Mutation("slope forgotten", G, "* derivative(gate, ACTIVATION)", "* activate(gate, ACTIVATION)", "gated"),
    Mutation("a straddled block visited once", V, "(ends - 1) // block - firsts // block + 1",
             "(ends - firsts + block - 1) // block"),
    Mutation("nobody's rows not visited", V, "constant_values=tokens", "constant_values=0"),
    Mutation("an empty group not visited", V, "int(every)", "0"),
    Mutation("rows of others overwritten", PP, "finish(rows, cols, (row >= first) & (row < end))",
             "finish(rows, cols, row < end)"),
    Mutation("the next group's block into this slot", PA, "next_group, 1 - self.slot_ref[0])",
             "next_group, self.slot_ref[0])", "whole"),
    Mutation("the next block of this group again", PA, "jnp.where(over, head, following)", "group",
             "whole"),
    Mutation("nobody's rows keep what was there", PW, "jnp.where(owned, total(sums, lows, place, rows, cols), 0)",
             "total(sums, lows, place, rows, cols)"),
    Mutation("k past the end counts", PW, "partial(multiply, tail)", "partial(multiply, left_refs[0].shape[1])"),
    Mutation("up begins anew", PW, "(step == 0) & (at == index)", "step == 0", "gated"),
    Mutation("dz_gate for both", PW, "if index < lefts:", "if index < 1:", "gated"),
    Mutation("the first matrix for all", PW, "jnp.minimum(group[number], groups - 1)", "0"),
    Mutation("rows of other groups", PD, "jnp.where((row >= first) & (row < end), values, 0)",
             "jnp.where(row < end, values, 0)"),
    Mutation("all blocks are whole", PD, "whole = (first <= begin) & (end >= begin + block_k)", "whole = end > -1"),
    Mutation("groups not begun", PD, "begins = (visit == 0) |", "begins = (visit == 0) &"),
    Mutation("an empty group is not zero", PD, "@pl.when(begins & (first >= end))", "@pl.when(begins & (first > end))"),
    Mutation("lower parts forgotten", PP, "return found + jnp.where(jnp.isnan(low), 0, low)", "return found"),
    Mutation("each step begins anew", PP, "begins & (inner.start == 0)", "True"),
    Mutation("scale dropped", F, "weights = scaled(weights, scale_of(stored, FORMAT, DTYPE)[None, :], DTYPE)",
             "weights = weights", "int4"),
    Mutation("a column's scale dropped", Q, "sums *= tl.load(scales, mask=cols_exist, other=0.0)",
             "sums *= 0.0 * tl.load(scales, mask=cols_exist, other=0.0)", "column"),
    Mutation("up's scale is gate's", Q, "sums_up *= tl.load(scales_up,", "sums_up *= tl.load(scales,", "column"),
    Mutation("zeros dropped", F, "numbers_of(codes, zero, FORMAT, HIGH, HAS_ZEROS, DTYPE)",
             "numbers_of(codes, zero & 0, FORMAT, HIGH, HAS_ZEROS, DTYPE)", "zeros"),
    Mutation("zeros of the first group of k", F, "advance(zeros, group, zeros_row)", "zeros", "zeros"),
    Mutation("scale of the first group of k", F, "advance(scales, group, scales_row)", "scales", "int4"),
    Mutation("scales of the first matrix", Q, "scales = _of_group(scales, batch, group, col",
             "scales = _of_group(scales, batch, 0, col", "int4"),
    Mutation("dlhs by the scales of the first matrix", Q, "_of_group(scales, batch, group, 0, scales_batch",
             "_of_group(scales, batch, 0, 0, scales_batch", "int4"),
    Mutation("codes of the other batch", Q, "right = _of_group(as_bytes(right), batch, group",
             "right = _of_group(as_bytes(right), 0, group", "column"),
    Mutation("high half beside its neighbour", Q, "start = first + high * ROWS_APART", "start = first + high", "int4"),
    Mutation("high half's columns of dlhs", Q, "row, first + ROWS_APART, tokens", "row, first + 1, tokens", "int4"),
    Mutation("dlhs of gate alone", Q, '"TWO": bool(grad_up)', '"TWO": False', "zeros"),
    Mutation("nobody's rows multiplied", Q, "length = tl.where(group < groups, n, 0)", "length = n", "int4"),
    Mutation("a column's scale dropped", PQ, "if not scales_numbers:", "if False:", "column"),
    Mutation("scale dropped", PQ, "of_block = scales_ref if scales_numbers else None", "of_block = None", "int4"),
    Mutation("zeros dropped", PQ, "None if zeros is None else zeros.astype(jnp.bfloat16)", "None", "zeros"),
    Mutation("scale of the first block of k", PQ, "rows_at if scaled else columns_at", "columns_at", "long int4"),
    Mutation("numbers of the group before", PA, "(before != self.groups[self.number])", "(before != before)",
             "int4"),
    Mutation("dlhs of gate alone", PQ, "at = 0 if transposes else index", "at = 0", "zeros"),
    Mutation("up's gradient for both", PQ, "if index < len(left_refs):", "if index < 1:", "zeros"),
    Mutation("k past the end counts", PQ, "partial(multiply, tail)", "partial(multiply, block)", "long int4"),
    Mutation("scales of the matrix before", R, "_matrices(spec, lhs, rhs, rhs_up, *scales_and_zeros)",
             "_matrices(spec, lhs, rhs, rhs_up, *(s if s is None else np.roll(s, 1, 1) for s in scales_and_zeros))",
             "int4"),
    Mutation("up's gradient not bent", R, "dout * activate(spec.activation, gate)", "dout * gate", "gated"),
    Mutation("rows of the group before", R, "first, end = end,", "first, end = first if group else 0,") ,
)  # fmt: skip


def kernel_of(file: str) -> str:
    return file.split("/")[-1].split("_")[0]


def worst(op: ModuleType, kernel: str, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem = CHECKED[name]
    arrays = {n: a if n == "group_sizes" else a.astype(np.float32) for n, a in problem.exact_arrays.items()}
    inputs = problem.inputs(arrays)
    if kernel == "triton":
        inputs = op.triton.completed(problem.spec, CONFIG, INTERPRET, inputs)
    run = {"triton": interpreted, "pallas": traced, "reference": defined}[kernel]
    out, gradients = run(op, problem, inputs, arrays["dout"])
    ours = {"out": out} | {
        f"d{n}": gradient for n, gradient in zip(OPERANDS, gradients, strict=True) if n in problem.differentiated
    }
    excess = multiples(ours, problem.answers("float32"), problem.answers(), "float32")
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(op: ModuleType, problem: Problem, inputs: tuple[Any, ...], dout: Any) -> Any:
    from crosstile.kernels.tiles.triton_interpreter import run

    named = {name: array for name, array in zip(OPERANDS, inputs, strict=True) if array is not None} | {"dout": dout}
    described = tuple(map(describe, inputs))
    plan = op.triton.forward(problem.spec, CONFIG, *described)
    named |= dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))
    outputs = (describe(named["out"]), describe(named.get("preactivations")))
    plan = op.triton.backward(problem.spec, CONFIG, described, outputs, (describe(dout), None))
    results = dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))
    return named["out"], [results.get(f"d{name}") for name in OPERANDS]


def traced(op: ModuleType, problem: Problem, inputs: tuple[Any, ...], dout: Any) -> Any:
    def run(inputs: Any, dout: Any) -> Any:
        outputs = op.pallas.forward(problem.spec, CONFIG, INTERPRET, *inputs)
        return outputs[0], op.pallas.backward(problem.spec, CONFIG, INTERPRET, inputs, outputs, (dout, None))

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(inputs, dout)


def defined(op: ModuleType, problem: Problem, inputs: tuple[Any, ...], dout: Any) -> Any:
    outputs = op.reference.forward(problem.spec, *inputs)
    return outputs[0], op.reference.backward(problem.spec, inputs, outputs, (dout, None))


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(package, kernel, name)


@pytest.mark.parametrize("mutation", one_in(7, MUTATIONS), ids=lambda m: f"{m.file}-{m.name}".replace(" ", "_"))
def test_the_check_notices(mutation, tmp_path):
    kernel = kernel_of(mutation.file)
    assert sound(kernel, mutation.problem) <= 1
    assert worst(mutated("grouped_matmul", mutation, tmp_path), kernel, mutation.problem) > 1
