"""The Pallas norm kernels, interpreted, against torch: at most twice the error of torch in the same precision.

The interpreter fills what lies outside an array, and scratch before it is written, with NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from norm_problems import OPERANDS, Problem
from oracles import assert_within

from crosstile.kernels.norm import pallas as kernels
from crosstile.kernels.norm.spec import NormSpec
from crosstile.kernels.norm.tiles import NormConfig, choose_config
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, get_target

TPUS = ("v4", "v5e", "v5p", "v6e", "v7x")
EVERYTHING = {"bias": True, "residual": True, "kind": "layer"}


def forward_and_backward(problem: Problem, arrays: dict, config: NormConfig | None = None) -> dict:
    """The results and the gradients, by name."""
    spec, inputs = problem.spec, tuple(arrays.get(name) for name in OPERANDS)
    config = config or choose_config(spec, INTERPRET)
    outputs = kernels.forward(spec, config, INTERPRET, *inputs)
    gradients = kernels.backward(spec, config, INTERPRET, inputs, outputs, (arrays["dy"], arrays.get("dsummed")))
    results = dict(zip(("y", "summed"), outputs, strict=True))
    results |= {f"d{name}": result for name, result in zip(OPERANDS, gradients, strict=True)}
    return {name: result for name, result in results.items() if result is not None}


def native(problem: Problem) -> dict:
    return {name: jnp.asarray(array, problem.dtype) for name, array in problem.exact_arrays.items()}


def quickly_jitted(function):
    """Most of a test's time is XLA's, and these arrays are small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def check(problem: Problem, config: NormConfig | None = None) -> None:
    ours = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays, config))(native(problem))
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"residual": True}, {"zero_centered": True}, {"kind": "layer"}, {"kind": "layer", "bias": True}, EVERYTHING],
    ids=lambda options: "-".join(options) or "rms",
)
def test_options(options, dtype):
    check(Problem(dtype=dtype, **options))


def test_float16():
    check(Problem(dtype="float16", **EVERYTHING))


@pytest.mark.parametrize(
    ("rows", "hidden"), [(1, 1), (33, 1), (1, 65), (64, 128), (70, 700), (20, 1024), (0, 40), (5, 0), (0, 0)]
)
def test_sizes(rows, hidden):
    kind = "layer" if hidden > 1 else "rms"  # of one number the deviation is nothing but rounding
    check(Problem(kind, rows, hidden, batch=1, bias=hidden > 1, residual=True, dtype="bfloat16"))


def test_a_long_row():
    check(Problem(rows=3, hidden=16384, batch=1, **EVERYTHING))


def test_empty_batch():
    check(Problem(batch=0, **EVERYTHING))


@pytest.mark.parametrize("rows", [60, 100], ids=["two parts", "one part"])
def test_tiles_change_nothing(rows):
    check(Problem(rows=rows, **EVERYTHING), NormConfig(32))


def test_a_variance_far_from_zero():
    check(Problem(kind="layer", bias=True, offset=30.0))


def test_without_eps_rows_of_a_tile_that_are_not_there_add_nothing():
    check(Problem(rows=17, eps=0.0, residual=True))


def test_nan_and_infinity_stay_in_their_row():
    problem = Problem(rows=5, batch=1, kind="layer")
    arrays = native(problem)
    arrays["x"] = arrays["x"].at[0, 1, 4].set(jnp.nan).at[0, 3, 7].set(jnp.inf)
    ours = forward_and_backward(problem, arrays)
    for name in ("y", "dx"):
        assert np.isnan(ours[name][0, np.array([1, 3])]).all()
        assert np.isfinite(ours[name][0, np.array([0, 2, 4])]).all()


def test_two_runs_are_bit_equal():
    problem = Problem(**EVERYTHING)
    run = jax.jit(lambda arrays: forward_and_backward(problem, arrays))
    first, second = (run(native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


def test_under_vmap():
    problem = Problem(rows=20, dtype="bfloat16", **EVERYTHING)
    arrays = native(problem)

    def one(arrays: dict) -> dict:
        return forward_and_backward(problem, {name: array[None] for name, array in arrays.items()})

    mapped = jax.jit(jax.vmap(one))(arrays)
    for name, result in jax.jit(lambda arrays: forward_and_backward(problem, arrays))(arrays).items():
        np.testing.assert_array_equal(mapped[name][:, 0], result, err_msg=name)


def test_races_and_reads_before_writes():
    """The strict interpreter, which simulates a chip's copies and memories, finds no race and no read of nothing."""
    problem = Problem(rows=40, hidden=40, batch=1, **EVERYTHING)
    with interpreter(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        check(problem, NormConfig(16))
    assert not interpret_pallas_call.races.races_found


def test_a_tile_that_is_no_whole_number_of_registers():
    with pytest.raises(ValueError, match="config: block_rows is 24; it must be a positive multiple of 16"):
        forward_and_backward(Problem(), native(Problem()), NormConfig(24))


def spec(dtype="bfloat16", hidden=40):
    return NormSpec(dtype, hidden, "rms", 1e-6)


def test_supports():
    for name in TPUS:
        assert kernels.supports(spec(hidden=16384), get_target(name), True) == ()
        assert all("bfloat16" in reason for reason in kernels.supports(spec("float16"), get_target(name), True))
    assert kernels.supports(spec("float16"), INTERPRET, True) == ()
    assert "triton" in kernels.supports(spec(), get_target("sm_90"), False)[0]
    assert "float64" in kernels.supports(spec("float64"), INTERPRET, False)[0]


@pytest.mark.parametrize("name", TPUS)
def test_rows_that_vmem_has_no_room_for_are_refused(name):
    (reason,) = kernels.supports(spec(hidden=2**20), get_target(name), True)
    assert reason.startswith("x: its last dimension is 1048576")
    assert "implementation='library'" in reason
