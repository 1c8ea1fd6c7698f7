"""The Pallas matmul kernels, interpreted, against torch: at most twice the error of torch in the same precision.

The interpreter fills what lies outside an array, and scratch before it is written, with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from matmul_problems import OPERANDS, Problem
from oracles import assert_within
from sweeps import swept

from crosstile.kernels.matmul import pallas as kernels
from crosstile.kernels.matmul.spec import ACTIVATIONS, PRECISIONS, MatmulSpec
from crosstile.kernels.matmul.tiles import MatmulConfig, choose_config
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, get_target


def forward_and_backward(problem: Problem, arrays: dict, config: MatmulConfig | None = None) -> dict:
    """out and the gradients, by name."""
    spec, inputs = problem.spec, tuple(arrays.get(name) for name in OPERANDS)
    config = config or choose_config(spec, INTERPRET)
    outputs = kernels.forward(spec, config, INTERPRET, *inputs)
    gradients = kernels.backward(spec, config, INTERPRET, inputs, outputs, (arrays["dout"], None))
    results = {"out": outputs[0], **{f"d{name}": result for name, result in zip(OPERANDS, gradients, strict=True)}}
    return {name: result for name, result in results.items() if result is not None}


def native(problem: Problem) -> dict:
    arrays = {name: jnp.asarray(array, problem.dtype) for name, array in problem.exact_arrays.items()}
    return {**arrays, "dout": arrays["dout"].astype(problem.spec.out_dtype)}


def quickly_jitted(function):
    """Most of a test's time is XLA's, and these arrays are small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def check(problem: Problem, config: MatmulConfig | None = None) -> None:
    ours = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays, config))(native(problem))
    assert ours["out"].dtype == problem.spec.out_dtype
    assert {result.dtype.name for name, result in ours.items() if name != "out"} == {problem.dtype}
    assert_within(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)


@pytest.mark.parametrize(
    ("bias", "activation"),
    swept(
        itertools.product((False, True), (None, *ACTIVATIONS)),
        lambda case: case[1] not in (None, "gelu") and not case[0],
    ),
)
def test_epilogues(activation, bias):
    check(Problem(activation=activation, bias=bias, residual=bias, dtype="bfloat16" if bias else "float32"))


@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True)], ids=["bias", "residual"])
def test_bias_or_residual_alone(bias, residual):
    check(Problem(activation="silu", bias=bias, residual=residual))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtypes(dtype):
    check(Problem(activation="gelu_tanh", bias=True, residual=True, dtype=dtype))


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 1, 1), (33, 1, 65), (1, 65, 33), (65, 33, 1), (64, 64, 64), (0, 33, 65), (33, 0, 65), (33, 65, 0), (1, 0, 0)],
)
def test_sizes(m, k, n):
    check(Problem(m, k, n, batch=1, activation="silu", bias=True, residual=True, dtype="bfloat16"))


def test_empty_batch():
    check(Problem(batch=0, activation="gelu", bias=True, residual=True))


@pytest.mark.parametrize("config", [MatmulConfig(8, 16, 24), MatmulConfig(256, 136, 64), MatmulConfig(512, 512, 512)])
def test_tiles_change_nothing(config):
    check(Problem(m=140, k=100, n=300, batch=1, activation="gelu", bias=True, residual=True), config)


def test_more_rows_than_one_tile_of_the_elementwise_kernel():
    check(Problem(m=600, k=8, n=8, batch=1, activation="relu", bias=True), MatmulConfig(512, 512, 512))


def test_small_items_of_a_batch_share_a_step():
    """With fewer in the last step than in the others, and more than one tile an item where it is larger."""
    problem = Problem(m=24, k=40, n=56, batch=5, activation="silu", bias=True, residual=True)
    item_bytes = (24 * 40 + 40 * 56 + 24 * 56) * 4
    assert 1 < kernels._items(5, item_bytes, INTERPRET) < 5
    check(problem, MatmulConfig(64, 64, 64))
    check(problem, MatmulConfig(64, 32, 64))


def test_as_many_items_a_step_as_it_takes_to_be_worth_one():
    v5e = get_target("v5e")
    assert kernels._items(4096, 2**14, v5e) == 64
    assert kernels._items(3, 2**14, v5e) == 3
    assert kernels._items(4096, 2**30, v5e) == 1


def test_three_parts_of_float32_are_as_exact_as_float32():
    check(Problem(k=130, activation="gelu_tanh", precision="bf16x6"))


def test_two_parts_of_float32_have_the_stated_error():
    """Beside |a| @ |b|, with one term a sum, so that it is the products' own error."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 64, 64)).astype(np.float32)
    a[0, :, 1:] = 0
    spec = MatmulSpec("float32", "float32", precision="bf16x3")
    out, _ = kernels.forward(spec, MatmulConfig(32, 32, 32), INTERPRET, jnp.asarray(a), jnp.asarray(b), None, None)
    exact = a.astype(np.float64) @ b
    assert 2.0**-21 < np.max(np.abs(out - exact) / np.abs(exact)) <= 2.0**-14


def test_few_rows_read_wide_blocks():
    config = MatmulConfig(64, 16, 16, skinny_n=64, skinny_k=32)
    check(Problem(m=3, k=70, n=100, batch=1, activation="relu", bias=True, residual=True), config)


def test_float32_result_of_narrow_inputs():
    problem = Problem(dtype="bfloat16", out_dtype="float32", residual=True)
    ours = forward_and_backward(problem, native(problem))
    assert ours["out"].dtype == jnp.float32
    assert_within({"out": ours.pop("out")}, problem.answers("float32"), problem.answers(), "float32")
    assert_within(ours, problem.answers("bfloat16"), problem.answers(), "bfloat16")


def test_two_runs_are_bit_equal():
    problem = Problem(activation="gelu", bias=True, residual=True)
    run = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))
    first, second = (run(native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


def test_under_vmap():
    problem = Problem(m=20, activation="silu", bias=True, residual=True, dtype="bfloat16")
    arrays = native(problem)

    def one(arrays: dict) -> dict:
        return forward_and_backward(problem, {name: array[None] for name, array in arrays.items()})

    mapped = quickly_jitted(jax.vmap(one))(arrays)
    for name, result in quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))(arrays).items():
        np.testing.assert_array_equal(mapped[name][:, 0], result, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_infinity_stay_where_they_are(activation, dtype):
    """A NaN or an infinity of a reaches its own row, and no other."""
    arrays = native(Problem(m=5, n=3, batch=1, dtype=dtype))
    a = arrays["a"].at[0, 1, 4].set(jnp.nan).at[0, 3, 7].set(jnp.inf)
    b = arrays["b"].at[0, 7].set(1.001)
    spec = MatmulSpec(dtype, "float32", activation)
    out, _ = kernels.forward(spec, choose_config(spec, INTERPRET), INTERPRET, a, b, None, None)
    assert np.isnan(out[0, 1]).all()
    np.testing.assert_array_equal(out[0, 3], np.inf)
    assert np.isfinite(out[0, jnp.array([0, 2, 4])]).all()


@pytest.mark.parametrize(
    ("sizes", "block_n"),
    [({"m": 24, "n": 40, "batch": 1}, 32), ({"m": 32, "n": 1024, "batch": 2, "dtype": "bfloat16"}, 512)],
    ids=["by the pipeline", "by strips"],
)
def test_races_and_reads_before_writes(sizes, block_n):
    """The strict interpreter, which simulates a chip's copies and memories, finds no race and no read of nothing."""
    problem = Problem(k=40, **sizes, activation="relu", bias=True, residual=True)
    with interpreter(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        check(problem, MatmulConfig(16, block_n, 16))
    assert not interpret_pallas_call.races.races_found


def test_two_cores_that_share_a_grid_wait_for_their_own_strips():
    """Neither core knows which tile it made last, so that it cannot leave a copy to the next tile to wait for."""
    sharing = replace(INTERPRET, siblings=1)
    problem = Problem(m=32, k=24, n=64, batch=2, dtype="bfloat16")
    arrays, spec = native(problem), problem.spec
    config = MatmulConfig(16, 32, 8)
    with interpreter(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        out, _ = kernels.forward(spec, config, sharing, arrays["a"], arrays["b"], None, None)
    assert not interpret_pallas_call.races.races_found
    expected, _ = kernels.forward(spec, config, INTERPRET, arrays["a"], arrays["b"], None, None)
    np.testing.assert_array_equal(out, expected)


def test_supports():
    bfloat16, float16 = (MatmulSpec(dtype, dtype) for dtype in ("bfloat16", "float16"))
    for name in ("v4", "v5e", "v5p", "v6e", "v7x"):
        assert kernels.supports(bfloat16, get_target(name), True) == ()
        assert all("bfloat16" in reason for reason in kernels.supports(float16, get_target(name), True))
    assert kernels.supports(float16, INTERPRET, True) == ()
    assert "triton" in kernels.supports(bfloat16, get_target("sm_90"), False)[0]
    parts = {name: MatmulSpec("float32", "float32", precision=name) for name in PRECISIONS}
    refused = {name: kernels.supports(spec, get_target("v5e"), True) for name, spec in parts.items()}
    assert {name for name, reasons in refused.items() if reasons} == {"tf32", "tf32x3"}
    assert "bf16x6" in refused["tf32"][0]
    assert "float64" in kernels.supports(MatmulSpec("float64", "float32"), INTERPRET, False)[0]
