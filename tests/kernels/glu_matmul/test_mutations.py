"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of the op's files.

The check is the suite's rule on small problems of several tiles and steps.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from glu_problems import OPERANDS, Problem
from mutations import describe, mutated
from oracles import multiples
from sweeps import one_in

import crosstile.kernels.glu_matmul as package
from crosstile.kernels.glu_matmul.tiles import GluMatmulConfig, GluMatmulTiles
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

CONFIG = GluMatmulConfig(*[GluMatmulTiles(16, 16, 16, group_m=2)] * 3)
CHECKED = {
    "tails": Problem(m=20, k=24, n=40, batch=1),
    "batch": Problem(m=20, k=24, n=20, batch=2),
    "narrow": Problem(m=8, k=16, n=1200, batch=1, dtype="bfloat16"),  # a long sum
    "wide": Problem(m=20, k=24, n=80, batch=1, activation="relu"),  # tiles that are stored by halves
}
CONFIGS = dict.fromkeys(("narrow", "wide"), GluMatmulConfig(*[GluMatmulTiles(16, 64, 16)] * 3))


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "tails"


T, P, R = "triton", "pallas", "reference"
G, S, PG, A = "tiles/triton_gate", "tiles/triton_products", "tiles/pallas_gate", "tiles/activations"
MUTATIONS = (
    Mutation("up not gated", G, "store(activate(gate, ACTIVATION) * up,", "store(activate(gate, ACTIVATION),"),
    Mutation("gate and up exchanged", G, "store(activate(gate, ACTIVATION) * up,",
             "store(activate(up, ACTIVATION) * gate,"),
    Mutation("kept in the other order", G, "store(gate, kept, 2 * batch, ", "store(up, kept, 2 * batch, "),
    Mutation("one of both kept for each batch", G, "store(gate, kept, 2 * batch, ", "store(gate, kept, batch, ",
             "batch"),
    Mutation("k past the end counts", S, "inner_exists = inner < k - start", "inner_exists = inner < k"),
    Mutation("last step skipped", S, "for start in range(0, k, BLOCK_K):",
             "for start in range(0, k - BLOCK_K, BLOCK_K):"),
    Mutation("second by the first's rows", S, "second = advance(second, BLOCK_K, second_row)",
             "second = advance(second, BLOCK_K, 1)"),
    Mutation("left half twice", S, "store(right, out, batch, row, col + left.shape[1]",
             "store(left, out, batch, row, col + left.shape[1]", "wide"),
    Mutation("gate's right half with up's left", G, "store_gated(gate_right, up_right,",
             "store_gated(gate_right, up_left,", "wide"),
    Mutation("column of the right half", G, "        col += gate_left.shape[1]\n", "        col += 0\n", "wide"),
    Mutation("dx of gate alone", T, "    sums = add_product(\n        sums, element(dz_up,",
             "    add_product(\n        sums, element(dz_up,"),
    Mutation("dz_up with w_gate", T, "advance(advance(w_up, batch, up_batch), col, up_col)",
             "advance(advance(w_gate, batch, up_batch), col, up_col)"),
    Mutation("the other batch's weight", T, "advance(advance(w_up, batch, up_batch)",
             "advance(advance(w_up, 0, up_batch)", "batch"),
    Mutation("slope forgotten", G, "* derivative(gate, ACTIVATION)", "* activate(gate, ACTIVATION)"),
    Mutation("slope of up", G, "derivative(gate, ACTIVATION)", "derivative(up.to(tl.float32), ACTIVATION)"),
    Mutation("dz_up not bent", G, "dup = gradient * activate(gate, ACTIVATION)", "dup = gradient * gate"),
    Mutation("dw's results exchanged", T, '("dw_gate", "dw_up"), None)', '("dw_up", "dw_gate"), None)'),
    Mutation("a group of rows walked twice", S, "first + within % height", "first + within % 1"),
    Mutation("sums in the narrow type", S, "sums = tl.dot(left_tile, right_tile, sums, input_precision=PRECISION)\n",
             "sums = tl.dot(left_tile, right_tile, sums, input_precision=PRECISION)\n"
             "        sums = sums.to(tl.bfloat16).to(tl.float32)\n", "narrow"),
    Mutation("up not gated", P, "activate(activation, first) * second", "activate(activation, first)"),
    Mutation("kept in the other order", P, "kept_ref[0, rows, cols] = first", "kept_ref[0, rows, cols] = second"),
    Mutation("k past the end counts", P, "multiply(tail, last=True)", "multiply(block_k, last=True)"),
    Mutation("sums not begun", P, "jnp.where(begins, 0, total_ref[:, cols])", "total_ref[:, cols]"),
    Mutation("up begins anew", P, "(step == 0) & (half == 0)", "step == 0"),
    Mutation("dz_gate for both", P, "(dz_up_ref, w_up_ref)", "(dz_gate_ref, w_up_ref)"),
    Mutation("lower parts forgotten", P, "return total + jnp.where(jnp.isnan(low), 0, low)", "return total"),
    Mutation("dw_up of dz_gate", P, ")(x, *dz)", ")(x, dz[0], dz[0])"),
    Mutation("slope forgotten", PG, "derivative(activation, gate)", "activate(activation, gate)"),
    Mutation("gradient in the narrow type", PG, "(dout * up * derivative",
             "(dout.astype(jnp.bfloat16) * up * derivative"),
    Mutation("sign of the slope", A, "sigmoid * (1 + x * (1 - sigmoid))", "sigmoid * (1 - x * (1 - sigmoid))"),
    Mutation("dx of gate alone", R, "w_gate.swapaxes(1, 2) +", "w_gate.swapaxes(1, 2) + 0 *"),
    Mutation("dz_up scaled by the slope", R, "dout * activate(", "dout * derivative("),
)  # fmt: skip


def worst(op: ModuleType, kernel: str, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem = CHECKED[name]
    dtype = jax.numpy.dtype(problem.dtype)
    arrays = {name: array.astype(dtype) for name, array in problem.exact_arrays.items()}
    run = {T: interpreted, P: traced, R: defined}[kernel]
    ours = run(op, problem, CONFIGS.get(name, CONFIG), arrays)
    excess = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(op: ModuleType, problem: Problem, config: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    from crosstile.kernels.tiles.triton_interpreter import run

    named = dict(arrays)
    inputs = tuple(describe(named[name]) for name in OPERANDS)
    plan = op.triton.forward(problem.spec, config, *inputs)
    named |= dict(zip(plan.outputs, run(plan, arrays), strict=True))
    outputs = (describe(named["out"]), describe(named["preactivations"]))
    plan = op.triton.backward(problem.spec, config, inputs, outputs, (describe(named["dout"]), None))
    results = dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))
    return {"out": named["out"], **results}


def traced(op: ModuleType, problem: Problem, config: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    def run(inputs: Any, dout: Any) -> Any:
        outputs = op.pallas.forward(problem.spec, config, INTERPRET, *inputs)
        return outputs[0], op.pallas.backward(problem.spec, config, INTERPRET, inputs, outputs, (dout, None))

    fast = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return by_name(*fast(tuple(arrays[name] for name in OPERANDS), arrays["dout"]))


def defined(op: ModuleType, problem: Problem, config: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    inputs = tuple(arrays[name] for name in OPERANDS)
    outputs = op.reference.forward(problem.spec, *inputs)
    return by_name(outputs[0], op.reference.backward(problem.spec, inputs, outputs, (arrays["dout"], None)))


def by_name(out: Any, gradients: tuple[Any, ...]) -> dict[str, Any]:
    return {"out": out, **{f"d{name}": gradient for name, gradient in zip(OPERANDS, gradients, strict=True)}}


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(package, kernel, name)


@pytest.mark.parametrize("mutation", one_in(7, MUTATIONS), ids=lambda m: f"{m.file}-{m.name}".replace(" ", "_"))
def test_the_check_notices(mutation, tmp_path):
    kernel = next((kind for kind in (T, P) if mutation.file.split("/")[-1].startswith(kind)), R)
    assert sound(kernel, mutation.problem) <= 1
    assert worst(mutated("glu_matmul", mutation, tmp_path), kernel, mutation.problem) > 1
