"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of the op's files.

The check is the suite's rule on small problems of several tiles, steps, parts and rounds.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from matmul_problems import OPERANDS, Problem
from mutations import mutated
from oracles import multiples
from sweeps import swept

import crosstile.kernels.matmul as package
from crosstile.kernels.matmul.tiles import MatmulConfig
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

from matmul_runs import forward, forward_and_backward, native

TILES = {"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2}
EPILOGUE = {"activation": "silu", "bias": True, "residual": True}
CHECKED: dict[str, tuple[Problem, dict[str, int]]] = {
    "tails": (Problem(m=20, k=24, n=40, batch=1, **EPILOGUE), {}),
    "batch": (Problem(m=20, k=24, n=20, batch=2, **EPILOGUE), {}),
    "wide": (Problem(m=20, k=24, n=80, batch=1, **EPILOGUE), {"block_n": 64}),  # tiles that are stored by halves
    "narrow": (Problem(m=16, k=1200, n=16, batch=1, dtype="bfloat16"), {}),  # a long sum
    "cut": (Problem(m=20, k=72, n=40, batch=1, **EPILOGUE), {"split_k": 3}),
    "last round": (Problem(m=20, k=2700, n=48, batch=1, **EPILOGUE), {"block_k": 64, "processors": 4}),
    "walking": (Problem(m=20, k=24, n=40, batch=1, **EPILOGUE), {"processors": 2, "persistent": 1}),
    "descriptors": (Problem(m=20, k=24, n=40, batch=1, **EPILOGUE), {"descriptors": 1}),
    "parts": (Problem(m=16, k=80, n=16, batch=1, precision="bf16x6"), {}),
}
FORWARD_ONLY = ("last round",)  # its gradients are long in an interpreter, and no other than those of "tails"


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "tails"


T, K, L, P, R = "triton", "triton_product", "triton_launches", "pallas", "reference"
E, S, A = "tiles/triton_epilogue", "tiles/triton_products", "tiles/activations"
PE, PS = "tiles/pallas_epilogue", "tiles/pallas_strips"
MUTATIONS = (
    Mutation("k past the end counts", S, "inner_exists = inner < k - start", "inner_exists = inner < k"),
    Mutation("last step skipped", S, "for start in range(0, k, BLOCK_K):",
             "for start in range(0, k - BLOCK_K, BLOCK_K):"),
    Mutation("one row of b for all steps", S, "right = advance(right, BLOCK_K, right_row)",
             "right = advance(right, 0, right_row)"),
    Mutation("sums in the narrow type", S, "sums = tl.dot(left_tile, right_tile, sums, input_precision=PRECISION)\n",
             "sums = tl.dot(left_tile, right_tile, sums, input_precision=PRECISION)\n"
             "        sums = sums.to(tl.bfloat16).to(tl.float32)\n", "narrow"),
    Mutation("a group of rows walked twice", S, "first + within % height", "first + within % 1"),
    Mutation("bias of the first columns", E, "bias_batch), col, bias_col)", "bias_batch), 0, bias_col)"),
    Mutation("bias of the first batch item", E, "advance(bias, batch, bias_batch)", "advance(bias, 0, bias_batch)",
             "batch"),
    Mutation("residual before the activation", E, "result = activate(sums, ACTIVATION)",
             "result = sums if HAS_RESIDUAL else activate(sums, ACTIVATION)"),
    Mutation("left half twice", E, "            right, bias, residual, preactivation, out, batch, row, col + left",
             "            left, bias, residual, preactivation, out, batch, row, col + left", "wide"),
    Mutation("the last part skipped", K, "in tl.range(0, parts, loop", "in tl.range(0, parts - 1, loop", "cut"),
    Mutation("the first part added again", K, "        pointers += BLOCK_M * BLOCK_N\n", "", "cut"),
    Mutation("parts overlap", K, "begin = item % parts * length", "begin = item % parts * (length - BLOCK_K)", "cut"),
    Mutation("a part runs to the end", K, "end = tl.minimum(k, begin + length)", "end = k", "cut"),
    Mutation("pieces all at the top", K, "piece // across * ROWS, piece % across * COLS", "0 * piece, 0 * piece",
             "wide cut"),
    Mutation("parts of the first tiles", K, "tile = first + item // parts", "tile = item // parts", "last round"),
    Mutation("added to the first tiles", K, "_place(first + number,", "_place(number,", "last round"),
    Mutation("whole tiles forgotten", L, "        if whole:\n", "        if whole < 0:\n", "last round"),
    Mutation("every second tile walked", K, "num_programs(0), flatten", "num_programs(0) + 1, flatten", "walking"),
    Mutation("one step of a for all", K, "a.load([row, start])", "a.load([row, begin])", "descriptors"),
    Mutation("turned b not turned", K, "b.load([col, start]).T", "b.load([col, start])", "descriptors"),
    Mutation("float32 as tf32", L, 'self.precision or "ieee"', '"tf32"', "parts"),
    Mutation("dz not bent", E, "result *= derivative(z, ACTIVATION)", "result *= 1.0"),
    Mutation("dbias of one row", E, "tl.sum(result, axis=0)", "tl.max(result, axis=0)"),
    Mutation("da by b not turned", T, '("b", transposed(b))', '("b", b)', "square"),
    Mutation("k past the end counts", P, "multiply(tail, last=True)", "multiply(block_k, last=True)", "pallas tails"),
    Mutation("sums not begun", P, "jnp.where(step == 0, 0, total_ref[:, cols])", "total_ref[:, cols]", "pallas tails"),
    Mutation("one item for all", P, "ref.at[item]", "ref.at[0]", "small items"),
    Mutation("lower parts forgotten", P, "+ jnp.where(jnp.isnan(low), 0, low)", "+ 0 * low", "parts"),
    Mutation("two parts of three", P, 'parts = 2 if precision == "bf16x3" else 3', "parts = 2", "parts"),
    Mutation("last strip not stored", P, "strips.store(cols)", "pl.when(cols.start == 0)(lambda: strips.store(cols))",
             "strips"),
    Mutation("a strip over the first", PS, "column * block_n + strip.start", "column * block_n", "strips"),
    Mutation("tiles of one row", PS, "row * block_m", "0 * row", "strips"),
    Mutation("residual forgotten", PE, "out = out + residual_ref", "out = out + 0 * residual_ref"),
    Mutation("slope forgotten", PE, "dz *= derivative(", "dz *= 1 + 0 * derivative("),
    Mutation("sign of the slope", A, "sigmoid * (1 + x * (1 - sigmoid))", "sigmoid * (1 - x * (1 - sigmoid))"),
    Mutation("dbias of one row", R, "dz.sum(axis=1)", "dz.max(axis=1)"),
)  # fmt: skip
CHECKED |= {
    "wide cut": (Problem(m=40, k=72, n=80, batch=1), {"block_m": 32, "block_n": 64, "split_k": 3}),
    "square": (Problem(m=16, k=16, n=16, batch=1), {}),
    "small items": (Problem(m=8, k=24, n=16, batch=3), {"block_m": 64, "block_n": 64, "block_k": 64}),
    "pallas tails": (Problem(m=24, k=40, n=40, batch=1, **EPILOGUE), {}),
    "strips": (Problem(m=32, k=32, n=1024, batch=2, dtype="bfloat16", **EPILOGUE), {"block_n": 512}),
}


def worst(op: ModuleType, kernel: str, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem, form = CHECKED[name]
    config = op.tiles.MatmulConfig(**{**TILES, **form})
    run = {T: interpreted, P: traced, R: defined}[kernel]
    ours = run(op, problem, config, name in FORWARD_ONLY)
    excess = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(op: ModuleType, problem: Problem, config: MatmulConfig, forward_only: bool) -> dict[str, Any]:
    if forward_only:
        return {"out": forward(problem.spec, native(problem), config, op.triton)[0]}
    return forward_and_backward(problem, native(problem), config, op.triton)


def traced(op: ModuleType, problem: Problem, config: MatmulConfig, forward_only: bool) -> dict[str, Any]:
    def run(inputs: Any, dout: Any) -> Any:
        outputs = op.pallas.forward(problem.spec, config, INTERPRET, *inputs)
        return outputs[0], op.pallas.backward(problem.spec, config, INTERPRET, inputs, outputs, (dout, None))

    arrays = native(problem)
    fast = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return by_name(*fast(tuple(arrays.get(name) for name in OPERANDS), arrays["dout"]))


def defined(op: ModuleType, problem: Problem, config: MatmulConfig, forward_only: bool) -> dict[str, Any]:
    arrays = native(problem)
    inputs = tuple(arrays.get(name) for name in OPERANDS)
    outputs = op.reference.forward(problem.spec, *inputs)
    return by_name(outputs[0], op.reference.backward(problem.spec, inputs, outputs, (arrays["dout"], None)))


def by_name(out: Any, gradients: tuple[Any, ...]) -> dict[str, Any]:
    named = {"out": out, **{f"d{name}": gradient for name, gradient in zip(OPERANDS, gradients, strict=True)}}
    return {name: result for name, result in named.items() if result is not None}


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(package, kernel, name)


def swept_mutation(mutation: Mutation) -> bool:
    """Those on the longest problems, and those of shared files that the tests of other ops break too."""
    shared = mutation.file in (PE, A) or mutation.name in ("a group of rows walked twice", "dz not bent")
    return shared or mutation.problem in ("last round", "wide cut")


@pytest.mark.parametrize(
    "mutation", swept(MUTATIONS, swept_mutation), ids=lambda m: f"{m.file}-{m.name}-{m.problem}".replace(" ", "_")
)
def test_the_check_notices(mutation, tmp_path):
    kernel = next((kind for kind in (T, P) if mutation.file.split("/")[-1].startswith(kind)), R)
    assert sound(kernel, mutation.problem) <= 1
    assert worst(mutated("matmul", mutation, tmp_path), kernel, mutation.problem) > 1
