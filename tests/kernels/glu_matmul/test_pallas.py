"""The Pallas glu_matmul kernels, interpreted, against torch: at most twice the error of torch in the same precision.

The interpreter fills what lies outside an array, and scratch before it is written, with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from glu_problems import OPERANDS, Problem
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within

from crosstile.kernels.glu_matmul import pallas as kernels
from crosstile.kernels.glu_matmul.spec import ACTIVATIONS, GluMatmulSpec
from crosstile.kernels.glu_matmul.tiles import GluMatmulConfig, GluMatmulTiles, choose_config
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, get_target


def tiles(*blocks: int) -> GluMatmulConfig:
    """The same tile for every kernel."""
    return GluMatmulConfig(*[GluMatmulTiles(*blocks)] * 3)


def forward_and_backward(problem: Problem, arrays: dict, config: GluMatmulConfig | None = None) -> dict:
    """out and the gradients, by name."""
    spec, inputs = problem.spec, tuple(arrays[name] for name in OPERANDS)
    config = config or choose_config(spec, INTERPRET)
    outputs = kernels.forward(spec, config, INTERPRET, *inputs)
    gradients = kernels.backward(spec, config, INTERPRET, inputs, outputs, (arrays["dout"], None))
    return {"out": outputs[0], **{f"d{name}": result for name, result in zip(OPERANDS, gradients, strict=True)}}


def native(problem: Problem) -> dict:
    return {name: jnp.asarray(array, problem.dtype) for name, array in problem.exact_arrays.items()}


def quickly_jitted(function):
    """Most of a test's time is XLA's, and these arrays are small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def check(problem: Problem, config: GluMatmulConfig | None = None) -> None:
    ours = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays, config))(native(problem))
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(Problem(activation=activation, batch=1, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtypes(dtype):
    check(Problem(dtype=dtype))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (33, 1, 65), (1, 65, 33), (0, 33, 65), (33, 0, 65), (33, 65, 0), (1, 0, 0)]
)
def test_sizes(m, k, n):
    check(Problem(m, k, n, batch=1, dtype="bfloat16"))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "k", "n"), list(itertools.product((33, 64, 65), repeat=3)))
def test_all_sizes(m, k, n, dtype):
    check(Problem(m, k, n, batch=1, dtype=dtype))


def test_empty_batch():
    check(Problem(batch=0))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("float32", tiles(8, 16, 24)),
        ("bfloat16", tiles(512, 512, 512)),
        (
            "bfloat16",
            GluMatmulConfig(GluMatmulTiles(64, 136, 40), GluMatmulTiles(16, 64, 128), GluMatmulTiles(40, 24, 16)),
        ),
    ],
    ids=["small", "large", "unlike"],
)
def test_tiles_change_nothing(dtype, config):
    check(Problem(m=44, k=100, n=140, batch=1, activation="gelu", dtype=dtype), config)


def test_more_than_one_tile_of_the_elementwise_kernel():
    check(Problem(m=300, k=8, n=600, batch=1, activation="relu", dtype="bfloat16"), tiles(512, 1024, 512))


def test_a_forward_that_saves_nothing_gives_the_same():
    problem = Problem(batch=1, dtype="bfloat16")
    inputs = tuple(native(problem)[name] for name in OPERANDS)
    config = choose_config(problem.spec, INTERPRET)
    saved, plain = (
        quickly_jitted(partial(kernels.forward, spec, config, INTERPRET))(*inputs)
        for spec in (problem.spec, replace(problem.spec, save_preactivations=False))
    )
    assert plain[1] is None
    np.testing.assert_array_equal(plain[0], saved[0])


def test_two_runs_are_bit_equal():
    problem = Problem(batch=1, dtype="bfloat16")
    run = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))
    first, second = (run(native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


def test_under_vmap():
    problem = Problem(m=8, k=40, dtype="bfloat16")
    arrays = native(problem)

    def one(arrays: dict) -> dict:
        return forward_and_backward(problem, {name: array[None] for name, array in arrays.items()})

    mapped = quickly_jitted(jax.vmap(one))(arrays)
    for name, result in quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))(arrays).items():
        np.testing.assert_array_equal(mapped[name][:, 0], result, err_msg=name)


@pytest.mark.parametrize(("activation", "dtype"), [("silu", "float32"), ("relu", "bfloat16")])
def test_nan_and_infinity_stay_where_they_are(activation, dtype):
    """A NaN or an infinity of x reaches its own row, and no other."""
    arrays = native(Problem(m=5, n=3, batch=1, dtype=dtype))
    x = arrays["x"].at[0, 1, 4].set(jnp.nan).at[0, 3, 7].set(jnp.inf)
    w_gate, w_up = arrays["w_gate"].at[0, 7].set(1.001), arrays["w_up"].at[0, 7].set(-1.001)
    spec = GluMatmulSpec(dtype, activation)
    forward = partial(kernels.forward, spec, choose_config(spec, INTERPRET), INTERPRET)
    out, _ = quickly_jitted(forward)(x, w_gate, w_up)
    assert np.isnan(out[0, 1]).all()
    np.testing.assert_array_equal(out[0, 3], -np.inf)
    assert np.isfinite(out[0, jnp.array([0, 2, 4])]).all()


@pytest.mark.parametrize("name", ["w_up", "dout"])
def test_an_infinity_in_the_backward_stays_where_it_is(name):
    """float32 operands come in parts, of which an infinity's lower ones are NaN."""
    problem = Problem(m=5, k=6, n=3, batch=1, activation="relu")
    arrays = native(problem)
    arrays["x"] = jnp.abs(arrays["x"]) + 0.1
    arrays["w_gate"] = jnp.abs(arrays["w_gate"]) + 0.1
    arrays[name] = arrays[name].at[0, 2, 1].set(jnp.inf)
    ours = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))(arrays)
    exact = problem.answers(arrays={name: np.asarray(array, np.float64) for name, array in arrays.items()})
    for result, expected in exact.items():
        np.testing.assert_array_equal(np.isnan(ours[result]), np.isnan(expected), err_msg=result)
        infinite = np.isinf(expected)
        np.testing.assert_array_equal(ours[result][infinite], expected[infinite], err_msg=result)


def test_races_and_reads_before_writes():
    """The strict interpreter, which simulates a chip's copies and memories, finds no race and no read of nothing."""
    problem = Problem(m=24, k=24, n=40, batch=1, activation="relu")
    with interpreter(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        check(problem, tiles(16, 32, 16))
    assert not interpret_pallas_call.races.races_found


def test_tiles_that_a_tpu_cannot_have():
    with pytest.raises(ValueError, match="block_k: got 12; it must be a positive multiple of 8"):
        forward_and_backward(Problem(), native(Problem()), tiles(64, 64, 12))


def test_supports():
    bfloat16, float16 = (GluMatmulSpec(dtype, "silu") for dtype in ("bfloat16", "float16"))
    for name in ("v4", "v5e", "v5p", "v6e", "v7x"):
        assert kernels.supports(bfloat16, get_target(name), True) == ()
        assert all("bfloat16" in reason for reason in kernels.supports(float16, get_target(name), True))
    assert kernels.supports(float16, INTERPRET, True) == ()
    assert "triton" in kernels.supports(bfloat16, get_target("sm_90"), False)[0]
    assert "float64" in kernels.supports(GluMatmulSpec("float64", "silu"), INTERPRET, False)[0]
