"""Any sizes, strides, epilogue and form of the Triton kernels, drawn by Hypothesis, against torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from matmul_problems import LAYOUTS, OPERANDS, Problem, lay_out
from matmul_runs import forward_and_backward, native
from oracles import assert_within

from crosstile.kernels.matmul.spec import ACTIVATIONS
from crosstile.kernels.matmul.tiles import MatmulConfig

SIZES = st.sampled_from((0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 40, 48, 64, 65))
QUICK = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
SWEEP = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw: Any) -> Problem:
    return Problem(
        m=draw(SIZES),
        k=draw(SIZES),
        n=draw(SIZES),
        batch=draw(st.sampled_from((0, 1, 1, 1, 3))),
        activation=draw(st.sampled_from((None, *ACTIVATIONS))),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
    )


@st.composite
def configs(draw: Any) -> MatmulConfig:
    blocks = (draw(st.sampled_from((16, 32, 64))) for _ in range(3))
    return MatmulConfig(
        *blocks,
        group_m=draw(st.integers(1, 3)),
        skinny_n=draw(st.sampled_from((0, 16))),
        split_k=draw(st.integers(0, 4)),
        processors=draw(st.sampled_from((0, 1, 2, 7))),
        persistent=draw(st.integers(0, 1)),
        descriptors=draw(st.integers(0, 1)),
        specialize=draw(st.integers(0, 1)),
    )


LAYOUT_OF_EACH = st.tuples(*[st.sampled_from(LAYOUTS)] * (len(OPERANDS) + 1))
CUT = MatmulConfig(16, 16, 16, split_k=3, processors=2, persistent=1, descriptors=1)


def check(problem: Problem, config: MatmulConfig, layouts: tuple[str, ...]) -> None:
    named = dict(zip((*OPERANDS, "dout"), layouts, strict=True))
    arrays = {name: lay_out(array, named[name]) if array.size else array for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays, config)
    assert_within(ours, problem.answers(problem.dtype, exact), problem.answers(arrays=exact), problem.dtype)


@QUICK
@given(problem=problems(), config=configs(), layouts=LAYOUT_OF_EACH)
@example(Problem(m=1, k=65, n=33, batch=1, bias=True), CUT, ("negative", "transposed", "sliced", "sliced", "repeated"))
@example(Problem(m=33, k=48, n=16, batch=1, activation="silu"), CUT, ("transposed", "repeated", *LAYOUTS[:3]))
@example(Problem(m=7, k=0, n=5, bias=True, residual=True), replace(CUT, split_k=2), LAYOUTS)
def test_any_call(problem, config, layouts):
    check(problem, config, layouts)


@pytest.mark.sweep
@SWEEP
@given(problem=problems(), config=configs(), layouts=LAYOUT_OF_EACH)
def test_any_call_swept(problem, config, layouts):
    check(problem, config, layouts)
