"""The Pallas kernels of linear cross-entropy, interpreted, against torch at twice torch's own error.

The interpreter fills what lies outside an array, and scratch before it is written, with NaN.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_entropy_problems import GRADIENTS, Problem, named
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from oracles import multiples

from crosstile.kernels.linear_cross_entropy import pallas as kernels
from crosstile.kernels.linear_cross_entropy.spec import INPUTS, LinearCrossEntropySpec
from crosstile.kernels.linear_cross_entropy.tiles import (
    LinearCrossEntropyConfig,
    LinearCrossEntropyTiles,
    choose_config,
    tpu_bytes,
)
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target
from crosstile.kernels.tiles.tpu_blocks import vmem_budget


def forward_and_backward(problem: Problem, arrays: dict, config=None, target=INTERPRET) -> dict:
    """The statistics and the gradients, by name."""
    config = config or choose_config(problem.spec, INTERPRET)
    inputs = tuple(arrays[name] for name in INPUTS)
    statistics = kernels.forward(problem.spec, config, target, *inputs)
    given = tuple(arrays.get(name) for name in GRADIENTS)
    gradients = kernels.backward(problem.spec, config, target, inputs, statistics, given)
    return named(statistics, gradients)


def compiled(function):
    """XLA's own optimisation would take longer than these small problems run."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def native(problem: Problem) -> dict:
    arrays = {name: jnp.asarray(array) for name, array in problem.arrays().items()}
    return arrays | {name: arrays[name].astype(problem.dtype) for name in ("hidden", "weight")}


def check(problem: Problem, config=None, target=INTERPRET) -> None:
    ours = compiled(lambda arrays: forward_and_backward(problem, arrays, config, target))(native(problem))
    assert {ours[name].dtype.name for name in ("dhidden", "dweight")} == {problem.dtype}
    found = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    assert {name: multiple for name, multiple in found.items() if not multiple <= 1} == {}


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "capped"])
@pytest.mark.parametrize("sums", [False, True], ids=["", "sums"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options(softcap, sums, dtype):
    check(Problem(softcap=softcap, sums=sums, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "vocab", "features"),
    [(1, 1, 1), (33, 33, 17), (64, 64, 32), pytest.param(5, 200, 3, marks=pytest.mark.sweep)],
)
def test_sizes(tokens, vocab, features):
    check(Problem(tokens, vocab, features, dtype="bfloat16"))


def test_no_tokens():
    some = native(Problem(tokens=2, batch=2))
    arrays = {name: array if name == "weight" else array[:, :0] for name, array in some.items()}
    ours = forward_and_backward(Problem(), arrays)
    assert ours["lse"].shape == (2, 0)
    assert ours["dhidden"].shape == arrays["hidden"].shape
    assert (ours["dweight"] == 0).all()


def test_a_batch():
    check(Problem(tokens=20, batch=3, dtype="bfloat16"))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_odd_vocabulary(dtype):
    tiles = LinearCrossEntropyTiles(128, 2048)
    check(
        Problem(tokens=40, vocab=32_001, features=96, softcap=30.0, dtype=dtype),
        LinearCrossEntropyConfig(tiles, tiles, tiles),
    )


def test_a_small_cap_and_a_ragged_vocabulary():
    check(Problem(vocab=33, softcap=0.1, dtype="bfloat16"))


def test_large_logits():
    check(Problem(offset=1e4, sums=False, dtype="bfloat16"))


def test_float16():
    check(Problem(dtype="float16", softcap=3.0))


@pytest.mark.parametrize("block", [8, 128])
def test_tiles_change_nothing(block):
    tiles = LinearCrossEntropyTiles(block, block)
    check(
        Problem(tokens=30, vocab=300 if block > 8 else 30, dtype="bfloat16"),
        LinearCrossEntropyConfig(tiles, tiles, tiles),
    )


def test_more_features_than_are_multiplied_at_once():
    check(Problem(tokens=20, vocab=30, features=600))


def test_only_some_statistics_have_a_gradient():
    """What none is asked of counts as 0."""
    problem = Problem(dtype="bfloat16")
    arrays = native(problem)
    zeros = {**arrays, "dtarget_logit": jnp.zeros((1, 40)), "dlogit_sum": jnp.zeros((1, 40))}
    absent = {name: array for name, array in arrays.items() if name not in GRADIENTS[1:]}
    run = compiled(lambda arrays: forward_and_backward(problem, arrays))
    for name, result in run(zeros).items():
        np.testing.assert_array_equal(result, run(absent)[name], err_msg=name)


def test_two_runs_are_bit_equal():
    problem = Problem(dtype="bfloat16")
    run = compiled(lambda arrays: forward_and_backward(problem, arrays))
    first, second = (run(native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


@pytest.mark.parametrize("features", [16, 40], ids=["two parts pass by", "six parts"])
def test_races_and_reads_before_writes(features):
    """The strict interpreter, which simulates a chip's copies and memories, finds no race and no read of nothing."""
    problem = Problem(tokens=12, vocab=40, features=features, dtype="bfloat16")
    tiles = LinearCrossEntropyTiles(8, 16)
    with interpreter(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        check(problem, LinearCrossEntropyConfig(tiles, tiles, tiles))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("vocab", [20, 60, 70], ids=["one tile", "two tiles", "three tiles"])
def test_two_cores_share_the_vocabulary(vocab):
    check(Problem(tokens=40, vocab=vocab, dtype="bfloat16"), target=replace(INTERPRET, siblings=1))


def test_tiles_fit_the_memory_of_every_chip():
    for target in (target for target in TARGETS.values() if target.is_tpu):
        for features in (2048, 2304, 4096, 5120, 8192):
            for dtype in ("bfloat16", "float32"):
                spec = LinearCrossEntropySpec(dtype, features)
                config = choose_config(spec, target)
                needed = max(
                    tpu_bytes(spec, "forward", config.forward.block_tokens, config.forward.block_vocab),
                    tpu_bytes(spec, "backward", config.dweight.block_tokens, config.dweight.block_vocab),
                )
                assert bool(kernels.supports(spec, target, True)) == (needed > vmem_budget(target))


def test_supports():
    narrow, half, double = (LinearCrossEntropySpec(dtype, 2304) for dtype in ("bfloat16", "float16", "float64"))
    for name in ("v4", "v5e", "v5p", "v6e", "v7x"):
        assert kernels.supports(narrow, get_target(name), True) == ()
        assert all("bfloat16" in reason for reason in kernels.supports(half, get_target(name), True))
    assert kernels.supports(half, INTERPRET, True) == ()
    assert "triton" in kernels.supports(narrow, get_target("sm_90"), False)[0]
    assert "float64" in kernels.supports(double, INTERPRET, False)[0]
    (reason,) = kernels.supports(LinearCrossEntropySpec("float32", 16384), get_target("v4"), True)
    assert "16384 features" in reason
