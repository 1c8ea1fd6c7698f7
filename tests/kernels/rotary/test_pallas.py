"""The Pallas rotary kernel, interpreted, against torch: at most twice the error of torch in the same precision.

The interpreter fills what lies outside an array with NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within
from rotary_problems import FLOATS, OPERANDS, Problem

from crosstile.kernels.rotary import pallas as kernels
from crosstile.kernels.rotary.spec import RotarySpec
from crosstile.kernels.rotary.tiles import RotaryConfig, choose_config
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, get_target

TPUS = ("v4", "v5e", "v5p", "v6e", "v7x")


def forward_and_backward(problem: Problem, arrays: dict, config: RotaryConfig | None = None) -> dict:
    """The results and the gradients, by name."""
    spec, inputs = problem.spec, tuple(arrays.get(name) for name in OPERANDS)
    config = config or choose_config(spec, INTERPRET)
    outputs = kernels.forward(spec, config, INTERPRET, *inputs)
    arriving = tuple(arrays.get(name) for name in ("drotated_q", "drotated_k"))
    gradients = kernels.backward(spec, config, INTERPRET, inputs, outputs, arriving)
    results = dict(zip(("rotated_q", "rotated_k", "dq", "dk"), (*outputs, *gradients[:2]), strict=True))
    assert gradients[2:] == (None, None)
    return {name: result for name, result in results.items() if result is not None}


def native(problem: Problem) -> dict:
    arrays = problem.exact_arrays
    return {name: jnp.asarray(array, problem.dtype if name in FLOATS else None) for name, array in arrays.items()}


def quickly_jitted(function):
    """Most of a test's time is XLA's, and these arrays are small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def check(problem: Problem, config: RotaryConfig | None = None) -> None:
    ours = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays, config))(native(problem))
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(2, None), (16, 8), (20, None), (7, 4), (80, 32), (128, None), (256, None)]
)
def test_dimensions(head_dim, rotary_dim, interleaved):
    check(Problem(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_narrow_dtypes_and_a_factor(interleaved, dtype):
    check(Problem(head_dim=64, interleaved=interleaved, factor=1.25, dtype=dtype))


@pytest.mark.parametrize(("q_heads", "k_heads"), [(1, 0), (9, 1), (0, 3), (2, 12)])
def test_heads(q_heads, k_heads):
    check(Problem(q_heads=q_heads, k_heads=k_heads, head_dim=32))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (37, 1), (3, 16), (1, 33), (2, 0), (0, 5)])
def test_sizes(batch, length):
    check(Problem(batch=batch, length=length))


@pytest.mark.parametrize("block_length", [16, 48])
def test_tiles_change_nothing(block_length):
    check(Problem(length=100, rotary_dim=12), RotaryConfig(block_length))


def test_nan_stays_in_its_pair_and_what_is_not_rotated_passes_as_it_is():
    problem = Problem(length=2, batch=1, rotary_dim=8, dtype="bfloat16")
    arrays = native(problem)
    arrays["q"] = arrays["q"].at[0, 0, 1, 3].set(jnp.nan)
    arrays["k"] = arrays["k"].at[0, 1, 0, 11].set(jnp.nan)
    ours = forward_and_backward(problem, arrays)
    q, k = (np.argwhere(np.isnan(ours[name])).tolist() for name in ("rotated_q", "rotated_k"))
    assert q == [[0, 0, 1, 3], [0, 0, 1, 7]]
    assert k == [[0, 1, 0, 11]]
    np.testing.assert_array_equal(ours["rotated_q"][..., 8:], arrays["q"][..., 8:])


def test_a_result_that_nobody_uses():
    """Without a gradient of rotated_k, dk is 0."""
    problem = Problem()
    arrays = native(problem)
    ours = forward_and_backward(problem, {name: a for name, a in arrays.items() if name != "drotated_k"})
    np.testing.assert_array_equal(ours["dk"], np.zeros_like(arrays["k"]))


def test_under_vmap():
    problem = Problem(dtype="bfloat16")
    arrays = native(problem)

    def one(arrays: dict) -> dict:
        return forward_and_backward(problem, {name: array[None] for name, array in arrays.items()})

    mapped = quickly_jitted(jax.vmap(one))(arrays)
    for name, result in quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))(arrays).items():
        np.testing.assert_array_equal(mapped[name][:, 0], result, err_msg=name)


def test_races_and_reads_before_writes():
    """The strict interpreter, which simulates a chip's copies and memories, finds no race and no read of nothing."""
    with interpreter(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        check(Problem(length=40, batch=1), RotaryConfig(16))
    assert not interpret_pallas_call.races.races_found


def test_a_tile_that_is_no_whole_number_of_registers():
    with pytest.raises(ValueError, match="config: block_length is 24; it must be a positive multiple of 16"):
        check(Problem(), RotaryConfig(24))


def spec(dtype="bfloat16", heads=40):
    return RotarySpec(dtype, 128, heads, 128)


def test_supports():
    for name in TPUS:
        assert kernels.supports(spec(), get_target(name), True) == ()
        assert all("bfloat16" in reason for reason in kernels.supports(spec("float16"), get_target(name), True))
        assert "room for" in kernels.supports(spec(heads=2**16), get_target(name), True)[0]
    assert kernels.supports(spec("float16"), INTERPRET, True) == ()
    assert "triton" in kernels.supports(spec(), get_target("sm_90"), False)[0]
    assert "float64" in kernels.supports(spec("float64"), INTERPRET, False)[0]
