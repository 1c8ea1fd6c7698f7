"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of the op's files.

The check is the suite's rule on small problems of several tiles and parts.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from mutations import describe, mutated
from norm_problems import OPERANDS, Problem
from oracles import multiples
from sweeps import one_in

import crosstile.kernels.norm as package
from crosstile.kernels.norm.tiles import NormConfig
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

WHOLE, WALKING = NormConfig(16, 64, partials=2), NormConfig(16, 16, partials=2)
RMS = Problem(rows=37, batch=1, residual=True, zero_centered=True)
LAYER = Problem("layer", rows=37, batch=1, bias=True, residual=True, offset=10.0)
CHECKED = {
    "rms": (RMS, WHOLE),
    "layer": (LAYER, WHOLE),
    "walking rms": (RMS, WALKING),
    "walking layer": (LAYER, WALKING),
    "many parts": (Problem(rows=37, hidden=8, batch=1), NormConfig(1, 8, partials=37)),
    "walking batches": (Problem(rows=5), WALKING),
    "no eps": (Problem(rows=37, batch=1, eps=0.0), WHOLE),
    "large eps": (Problem(rows=5, batch=1, eps=1.0), WHOLE),
    "long": (Problem("layer", rows=5, batch=1, hidden=1100), WHOLE),
}


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "layer"


T, B, C, P, R = "triton", "triton_backward", "triton_common", "pallas", "reference"
MUTATIONS = (
    Mutation("mean not subtracted", T, "        tile -= mean\n", "        tile -= 0.0\n"),
    Mutation("bias forgotten", T, "result += tl.load(bias", "result += 0 * tl.load(bias"),
    Mutation("last tile skipped", T, "range(0, HIDDEN, BLOCK_COLS)", "range(0, HIDDEN - BLOCK_COLS, BLOCK_COLS)",
             "walking rms"),
    Mutation("the wrong rows", T, "* row_count + row) * HIDDEN", "* row_count) * HIDDEN"),
    Mutation("columns past the end count", C, "(tl.arange(0, tile.shape[1]) < HIDDEN)[None, :]",
             "(tl.arange(0, tile.shape[1]) < 999)[None, :]"),
    Mutation("columns past the end count", C, "(tl.arange(0, COLS) < HIDDEN - col)[None, :]",
             "(tl.arange(0, COLS) < 999)[None, :]", "walking layer"),
    Mutation("means not merged", C, "squares += apart * apart * new * col", "squares += 0.0 * new", "walking layer"),
    Mutation("the last mean is the mean", C, "mean += apart * new", "mean += apart", "walking layer"),
    Mutation("eps forgotten", C, "/ HIDDEN + eps)\n\n\n@triton.jit\ndef walked",
             "/ HIDDEN)\n\n\n@triton.jit\ndef walked",
             "large eps"),
    Mutation("a mean over the tile", C, "keep_dims=True) / HIDDEN + eps", "keep_dims=True) / tile.shape[1] + eps"),
    Mutation("residual forgotten", C, "tile.to(tl.float32) + other.to(tl.float32)", "tile.to(tl.float32)", "rms"),
    Mutation("not zero-centered", C, "scale += 1.0", "scale += 0.0", "rms"),
    Mutation("read past the end", C, "mask=rows_exist & (cols < HIDDEN)[None, :]",
             "mask=rows_exist & (cols < COLS)[None, :]"),
    Mutation("rows that are not there count", B, "tl.where(rows_exist, gradient * tile, 0.0)", "gradient * tile",
             "no eps"),
    Mutation("sign of the projection", B, "gradient - level - tile * along", "gradient - level + tile * along"),
    Mutation("level forgotten", B, "gradient - level - tile", "gradient - tile"),
    Mutation("factor forgotten", B, "tile * along) * factor", "tile * along)", "rms"),
    Mutation("dsummed forgotten", B, "beside, place[2], rows_exist, HIDDEN, WIDE, ROWS, COLS).to(tl.float32)",
             "beside, place[2], rows_exist, HIDDEN, WIDE, ROWS, COLS).to(tl.float32) * 0.0", "rms"),
    Mutation("one tile a part", B, "range(part, tl.cdiv(row_count, BLOCK_ROWS), parts)", "range(part, parts, parts)"),
    Mutation("the first part alone", B, "range(0, parts, BLOCK_ROWS)", "range(0, 1, 2 * BLOCK_ROWS)", "many parts"),
    Mutation("dbias of dweight", B, "_added(first + HIDDEN", "_added(first"),
    Mutation("scaled before dweight", B, "dweight += tl.where(rows_exist, gradient *",
             "dweight += tl.where(rows_exist, scale * gradient *"),
    Mutation("last tile skipped", B, "range(0, HIDDEN, BLOCK_COLS)", "range(0, HIDDEN - BLOCK_COLS, BLOCK_COLS)",
             "walking rms"),
    Mutation("means of other rows", B, "tl.load(statistics + row + rows", "tl.load(statistics + rows", "walking layer"),
    Mutation("statistics of the other batch", B, "statistics = advance(statistics, batch, 2 * row_count)",
             "statistics = advance(statistics, batch, 0)", "walking batches"),
    Mutation("residual forgotten", P, " + residual_ref[rows, cols].astype(jnp.float32)", "", "rms"),
    Mutation("sum not rounded", P, "source_ref = x_ref if summed_ref is None else summed_ref", "source_ref = x_ref",
             "rms"),
    Mutation("rest of the columns skipped", P, "if hidden % width:", "if hidden < 0:", "long"),
    Mutation("half of the lanes", P, "for start in range(LANES, term", "for start in range(2 * LANES, term", "long"),
    Mutation("sums not cleared", P, "jnp.zeros((SUBLANES, cols.size), sums_ref.dtype)", "sums_ref[:, cols]"),
    Mutation("rows that are not there count", P, "tile.shape, 0) < left, tile, 0)",
             "tile.shape, 0) < left + 99, tile, 0)"),
    Mutation("sign of the projection", P, "cols) - tile * along", "cols) + tile * along"),
    Mutation("level forgotten", P, "result - level[0] if level", "result if level"),
    Mutation("dsummed forgotten", P, "result += dsummed_ref[at, cols].astype(jnp.float32)", "result += 0.0", "rms"),
    Mutation("dbias of dweight", P, "_add_rows(dbias_ref, cols, gradient,",
             "_add_rows(dbias_ref, cols, gradient * tile,"),
    Mutation("not zero-centered", P, "1.0 + scale if", "scale if", "rms"),
    Mutation("the mean of squares", P, "astype(jnp.float32) - mean\n        return",
             "astype(jnp.float32)\n        return"),
    Mutation("level forgotten", R, "dx = dx - _mean(g)", "dx = dx - 0"),
    Mutation("dsummed forgotten", R, "dx = dx + dsummed.astype(dtype)", "dx = dx + 0", "rms"),
)  # fmt: skip


def worst(op: ModuleType, kernel: str, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem, config = CHECKED[name]
    arrays = {name: array.astype(problem.dtype) for name, array in problem.exact_arrays.items()}
    run = {"triton": interpreted, "pallas": traced, "reference": defined}[kernel]
    ours = run(op, problem, config, arrays)
    excess = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(op: ModuleType, problem: Problem, config: NormConfig, arrays: dict[str, Any]) -> dict[str, Any]:
    from crosstile.kernels.tiles.triton_interpreter import run

    named = dict(arrays)
    inputs = tuple(describe(named.get(name)) for name in OPERANDS)
    plan = op.triton.forward(problem.spec, config, *inputs)
    results = dict(zip(plan.outputs, run(plan, arrays), strict=True))
    named |= results
    gradients = (describe(named.get("dy")), describe(named.get("dsummed")))
    plan = op.triton.backward(
        problem.spec, config, inputs, (describe(named.get("y")), describe(named.get("summed"))), gradients
    )
    return results | dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))


def traced(op: ModuleType, problem: Problem, config: NormConfig, arrays: dict[str, Any]) -> dict[str, Any]:
    inputs = tuple(arrays.get(name) for name in OPERANDS)

    def run(inputs: Any, dy: Any, dsummed: Any) -> Any:
        outputs = op.pallas.forward(problem.spec, config, INTERPRET, *inputs)
        return outputs, op.pallas.backward(problem.spec, config, INTERPRET, inputs, outputs, (dy, dsummed))

    fast = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return results_by_name(*fast(inputs, arrays["dy"], arrays.get("dsummed")))


def defined(op: ModuleType, problem: Problem, config: NormConfig, arrays: dict[str, Any]) -> dict[str, Any]:
    inputs = tuple(arrays.get(name) for name in OPERANDS)
    outputs = op.reference.forward(problem.spec, *inputs)
    gradients = op.reference.backward(problem.spec, inputs, outputs, (arrays["dy"], arrays.get("dsummed")))
    return results_by_name(outputs, gradients)


def results_by_name(outputs: tuple[Any, ...], gradients: tuple[Any, ...]) -> dict[str, Any]:
    named = dict(zip(("y", "summed"), outputs, strict=True))
    named |= {f"d{name}": gradient for name, gradient in zip(OPERANDS, gradients, strict=True)}
    return {name: result for name, result in named.items() if result is not None}


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(package, kernel, name)


@pytest.mark.parametrize(
    "mutation", one_in(7, MUTATIONS), ids=lambda m: f"{m.file}-{m.name}-{m.problem}".replace(" ", "_")
)
def test_the_check_notices(mutation, tmp_path):
    kernel = "triton" if mutation.file.startswith("triton") else mutation.file
    assert sound(kernel, mutation.problem) <= 1
    assert worst(mutated("norm", mutation, tmp_path), kernel, mutation.problem) > 1
