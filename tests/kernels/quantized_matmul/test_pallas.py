"""The Pallas kernels, interpreted, against torch: at most twice the error of torch in the same precision.

The interpreter fills what lies outside an array, and scratch before it is written, with NaN.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within
from quantized_problems import BLOCKS, KINDS, Problem, named_gradients
from sweeps import swept

from crosstile.kernels.quantized_matmul import pallas as kernels
from crosstile.kernels.quantized_matmul.spec import INPUTS, QuantizedMatmulSpec
from crosstile.kernels.quantized_matmul.tiles import QuantizedMatmulConfig, QuantizedMatmulTiles, choose_config
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

SERVED = [kind for kind in KINDS if kind not in BLOCKS]


def tiles(*blocks: int) -> QuantizedMatmulConfig:
    """The same tile for every kernel."""
    return QuantizedMatmulConfig(*[QuantizedMatmulTiles(*blocks)] * 3)


def forward_and_backward(problem: Problem, arrays: dict, config: QuantizedMatmulConfig | None = None) -> dict:
    """out and the gradients, by name."""
    spec, inputs = problem.spec, tuple(arrays.get(name) for name in INPUTS)
    config = config or choose_config(spec, INTERPRET)
    outputs = kernels.forward(spec, config, INTERPRET, *inputs)
    gradients = kernels.backward(spec, config, INTERPRET, inputs, outputs, (arrays["dout"], None))
    return {"out": outputs[0], **named_gradients(gradients)}


def native(problem: Problem) -> dict:
    return {name: jnp.asarray(array) for name, array in problem.native().items()}


def quickly_jitted(function):
    """Most of a test's time is XLA's, and these arrays are small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def check(problem: Problem, config: QuantizedMatmulConfig | None = None) -> None:
    ours = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays, config))(native(problem))
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


SOON = ("int8-64-zeros", "int4-32", "int4-zeros", "fp8", "mxfp4", "mxfp8", "int8-int8", "fp8-fp8")  # each format


@pytest.mark.parametrize("kind", swept(SERVED, lambda kind: kind not in SOON))
def test_every_kind(kind):
    check(Problem(kind, batch=1, k=270, n=20, activation=None, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", swept(["float32", "float16"], lambda dtype: dtype == "float16"))
@pytest.mark.parametrize("kind", ["int4-128-zeros", "int8-int8"])
def test_dtypes(kind, dtype):
    check(Problem(kind, k=130, n=20, batch=1, activation=None, dtype=dtype))


@pytest.mark.parametrize(("bias", "residual", "activation"), [(False, False, None), (True, True, "relu")])
@pytest.mark.parametrize("kind", swept(["int4-32", "fp8-fp8"], lambda kind: kind == "fp8-fp8"))
def test_epilogues(kind, bias, residual, activation):
    check(Problem(kind, m=5, k=80, n=33, batch=1, bias=bias, residual=residual, activation=activation))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 257, 33), (0, 33, 5), (3, 0, 5), (3, 33, 0), (70, 65, 5)])
@pytest.mark.parametrize("kind", ["int4-64", "int8-int8"])
def test_sizes(kind, m, k, n):
    check(Problem(kind, m, k, n, batch=1, residual=False, activation=None, dtype="bfloat16"))


@pytest.mark.sweep
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize(("m", "k", "n"), list(itertools.product((1, 65), (31, 128, 257, 600), (16, 33))))
def test_all_sizes(kind, m, k, n):
    for dtype in ("float32", "bfloat16"):
        check(Problem(kind, m, k, n, dtype=dtype))


@pytest.mark.parametrize("kind", ["int4-64", "int8-int8"])
@pytest.mark.parametrize("config", [tiles(8, 16, 128), tiles(512, 512, 2048)], ids=["small", "large"])
def test_tiles_change_nothing(kind, config):
    """More than one step along k, with a tail, and more than one along n, which the backward sums."""
    check(Problem(kind, m=20, k=600, n=40, batch=1, dtype="bfloat16"), config)


def test_two_runs_are_bit_equal():
    problem = Problem(batch=1, k=40, dtype="bfloat16")
    run = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))
    first, second = (run(native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


def test_under_vmap():
    problem = Problem("int4-32", m=8, k=40, n=20, dtype="bfloat16")
    arrays = native(problem)

    def one(arrays: dict) -> dict:
        return forward_and_backward(problem, {name: array[None] for name, array in arrays.items()})

    mapped = quickly_jitted(jax.vmap(one))(arrays)
    for name, result in quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))(arrays).items():
        np.testing.assert_array_equal(mapped[name][:, 0], result, err_msg=name)


@pytest.mark.parametrize("kind", ["int4-32", "fp8", "int8-int8"])
def test_nan_and_infinity_stay_in_their_row(kind):
    problem = Problem(kind, m=6, k=40, n=20, batch=1, bias=False, residual=False, activation=None, dtype="bfloat16")
    arrays = native(problem)
    spec = problem.spec
    inputs = [arrays.get(name) for name in INPUTS]
    forward = quickly_jitted(partial(kernels.forward, spec, choose_config(spec, INTERPRET), INTERPRET))
    clean, _ = forward(*inputs)
    inputs[0] = arrays["a"].at[0, 1, 3].set(jnp.nan).at[0, 4, 39].set(jnp.inf)
    out, _ = forward(*inputs)
    untouched = jnp.array([0, 2, 3, 5])
    np.testing.assert_array_equal(out[0, untouched], clean[0, untouched])
    assert np.isnan(out[0, 1].astype(jnp.float32)).all()
    assert not np.isfinite(out[0, 4].astype(jnp.float32)).any()


@pytest.mark.parametrize("kind", ["int4-64", "int8-int8"])
def test_no_races_between_copies_and_reads(kind):
    problem = Problem(kind, m=20, k=300, n=20, batch=1, dtype="bfloat16")
    spec, config, arrays = problem.spec, tiles(8, 16, 128), native(problem)
    inputs = tuple(arrays.get(name) for name in INPUTS)
    with interpreter(pltpu.InterpretParams(detect_races=True)):
        out, _ = jax.jit(partial(kernels.forward, spec, config, INTERPRET))(*inputs)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found
    exact = problem.answers()
    assert_within({"out": out}, problem.answers("bfloat16"), exact, "bfloat16")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a_format", [None, "int8", "float8_e4m3fn", "mxfp8"])
def test_what_chips_multiply(target, a_format):
    name = {None: "int4", "mxfp8": "mxfp4"}.get(a_format, a_format)
    spec = QuantizedMatmulSpec("bfloat16", "bfloat16", name, 32 if a_format in (None, "mxfp8") else 0, a_format)
    reasons = kernels.supports(spec, get_target(target), True)
    has = {None: TARGETS, "int8": ("v5e", "v5p", "v6e"), "float8_e4m3fn": ("v7x",)}.get(a_format, ())
    if get_target(target).is_gpu:
        assert "use implementation='triton'" in reasons[0]
    elif target in has:
        assert not reasons
    else:
        assert reasons[0].startswith(f"activations: got {a_format}, of which {target} has no products")
