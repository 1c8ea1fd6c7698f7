"""The grouped_matmul kernels, interpreted, on a problem: their results, and whether these are near enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from grouped_problems import OPERANDS, Problem
from mutations import describe
from oracles import assert_within

from crosstile.kernels.grouped_matmul import pallas, triton
from crosstile.kernels.grouped_matmul.spec import GroupedMatmulSpec
from crosstile.kernels.grouped_matmul.tiles import GroupedMatmulConfig, GroupedMatmulTiles, choose_config
from crosstile.kernels.tiles.targets import INTERPRET
from crosstile.kernels.tiles.triton_interpreter import run

Results = dict[str, Any]


def tiles(*blocks: int, **others: int) -> GroupedMatmulConfig:
    """The same tile for every kernel."""
    return GroupedMatmulConfig(*[GroupedMatmulTiles(*blocks, **others)] * 3)


def native(problem: Problem) -> dict[str, Any]:
    """The exact arrays in the problem's dtype."""
    kind = getattr(ml_dtypes, problem.dtype, problem.dtype)
    return {n: a if n == "group_sizes" else a.astype(kind) for n, a in problem.exact_arrays.items()}


def triton_forward(spec: GroupedMatmulSpec, arrays: Mapping[str, Any], config: GroupedMatmulConfig) -> Results:
    """out, and the preactivations where the spec asks for them."""
    inputs = triton.completed(spec, config, INTERPRET, tuple(arrays.get(name) for name in OPERANDS))
    named = {name: array for name, array in zip(OPERANDS, inputs, strict=True) if array is not None}
    plan = triton.forward(spec, config, *map(describe, inputs))
    return dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))


def by_triton(problem: Problem, arrays: Mapping[str, Any], config: GroupedMatmulConfig | None = None) -> Results:
    """out and the gradients, by name."""
    config = config or choose_config(problem.spec, INTERPRET)
    present = problem.present(arrays)
    outputs = triton_forward(problem.spec, present, config)
    inputs = triton.completed(problem.spec, config, INTERPRET, tuple(present.get(name) for name in OPERANDS))
    named = {name: array for name, array in zip(OPERANDS, inputs, strict=True) if array is not None}
    named |= outputs | {"dout": arrays["dout"]}
    saved = (describe(outputs["out"]), describe(outputs.get("preactivations")))
    described = tuple(map(describe, inputs))
    plan = triton.backward(problem.spec, config, described, saved, (describe(arrays["dout"]), None))
    results = run(plan, {name: named[name] for name in plan.inputs})
    return {"out": outputs["out"], **dict(zip(plan.outputs, results, strict=True))}


def by_pallas(problem: Problem, arrays: Mapping[str, Any], config: GroupedMatmulConfig | None = None) -> Results:
    """The same, as a JAX function."""
    spec, inputs = problem.spec, problem.inputs(arrays)
    config = config or choose_config(spec, INTERPRET)
    outputs = pallas.forward(spec, config, INTERPRET, *inputs)
    found = pallas.backward(spec, config, INTERPRET, inputs, outputs, (arrays["dout"], None))
    gradients = dict(zip(OPERANDS, found, strict=True))
    return {"out": outputs[0], **{f"d{name}": gradients[name] for name in problem.differentiated}}


def quickly_jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Most of a test's time is XLA's, and these arrays are small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def check_triton(problem: Problem, config: GroupedMatmulConfig | None = None) -> None:
    """The suite's rule: at most twice the error of torch in the same precision."""
    _check(problem, by_triton(problem, native(problem), config))


def check_pallas(problem: Problem, config: GroupedMatmulConfig | None = None) -> None:
    """The same."""
    _check(problem, quickly_jitted(lambda arrays: by_pallas(problem, arrays, config))(native(problem)))


def _check(problem: Problem, ours: Results) -> None:
    assert {np.dtype(result.dtype).name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)
