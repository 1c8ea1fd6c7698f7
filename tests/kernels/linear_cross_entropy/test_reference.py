"""The NumPy definition of linear cross-entropy against torch, JAX and finite differences."""

from __future__ import annotations

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from cross_entropy_problems import GRADIENTS, Problem, by_torch, named
from oracles import assert_equal_in_float64, assert_within, finite_differences

from crosstile.kernels.linear_cross_entropy import reference
from crosstile.kernels.linear_cross_entropy.spec import ELSEWHERE, IGNORED, LinearCrossEntropySpec

SMALL = Problem(tokens=9, vocab=7, features=5, batch=2, dtype="float64")


def by_definition(problem, arrays):
    inputs = tuple(arrays[name] for name in ("hidden", "weight", "targets"))
    statistics = reference.forward(problem.spec, *inputs)
    gradients = tuple(arrays.get(name) for name in GRADIENTS)
    return named(statistics, reference.backward(problem.spec, inputs, statistics, gradients))


def exact(problem):
    return {**problem.exact, "targets": problem.targets}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sums", [False, True])
def test_equals_torch_in_float64(softcap, sums):
    problem = replace(SMALL, softcap=softcap, sums=sums)
    arrays = exact(problem)
    assert_equal_in_float64(by_definition(problem, arrays), by_torch(arrays, softcap, sums, "float64"))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_jax(softcap):
    """jax.nn.log_softmax in float64, token by token."""
    problem = replace(SMALL, softcap=softcap, sums=False)
    arrays = exact(problem)
    ours = by_definition(problem, arrays)
    with jax.enable_x64(True):
        for b, t in np.ndindex(problem.targets.shape):
            if problem.targets[b, t] in (ELSEWHERE, IGNORED):
                continue

            def loss(hidden, b=b, t=t):
                logits = jax.numpy.asarray(arrays["weight"][b]) @ hidden
                logits = logits if softcap is None else softcap * jax.numpy.tanh(logits / softcap)
                return -jax.nn.log_softmax(logits)[problem.targets[b, t]]

            theirs, gradient = jax.value_and_grad(loss)(arrays["hidden"][b, t])
            np.testing.assert_allclose(ours["lse"][b, t] - ours["target_logit"][b, t], theirs, rtol=1e-12)
            alone = {**arrays, "dlse": np.zeros((2, 9)), "dtarget_logit": np.zeros((2, 9))}
            alone["dlse"][b, t], alone["dtarget_logit"][b, t] = 1, -1
            dhidden = by_definition(problem, alone)["dhidden"]
            np.testing.assert_allclose(dhidden[b, t], gradient, rtol=1e-10, atol=1e-13)
            assert not np.delete(dhidden.reshape(18, -1), b * 9 + t, axis=0).any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_gradients_by_finite_differences(softcap, name):
    problem = replace(SMALL, softcap=softcap)
    arrays = exact(problem)
    ours = by_definition(problem, arrays)[f"d{name}"]

    def loss(hidden, weight):
        statistics = reference.forward(problem.spec, hidden, weight, problem.targets)
        return float(sum((row * arrays[dx]).sum() for row, dx in zip(statistics, GRADIENTS, strict=True)))

    theirs = finite_differences(loss, {key: arrays[key] for key in ("hidden", "weight")}, name)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_row_by_its_formula():
    """Three logits by hand: 0, log 2 and log 5, whose exponentials sum to 8."""
    hidden, weight = np.ones((1, 1, 1)), np.log([1.0, 2.0, 5.0])[None, :, None]
    spec = LinearCrossEntropySpec("float64", 1, sums=True)
    lse, target_logit, logit_sum = reference.forward(spec, hidden, weight, np.array([[2]]))
    np.testing.assert_allclose([lse, target_logit, logit_sum], np.log([[[8]], [[5]], [[10]]]), rtol=1e-15)
    inputs, statistics = (hidden, weight, np.array([[2]])), (lse, target_logit, logit_sum)
    one = np.ones((1, 1))
    dhidden, dweight, _ = reference.backward(spec, inputs, statistics, (one, -one, None))
    np.testing.assert_allclose(dweight[0, :, 0], [1 / 8, 2 / 8, 5 / 8 - 1], rtol=1e-14)
    np.testing.assert_allclose(dhidden[0, 0, 0], (weight[0, :, 0] * dweight[0, :, 0]).sum(), rtol=1e-14)


def test_nan_in_what_is_ignored_reaches_nothing():
    problem = replace(SMALL, dtype="float32")
    clean, dirty = {**problem.arrays()}, problem.arrays()
    for name in ("hidden", *GRADIENTS):
        clean[name] = np.nan_to_num(dirty[name])
    for name, result in by_definition(problem, dirty).items():
        np.testing.assert_array_equal(result, by_definition(problem, clean)[name], err_msg=name)
        assert np.isfinite(result).all()


def test_large_logits_do_not_overflow():
    problem = replace(SMALL, offset=1e4)
    arrays = exact(problem)
    assert_equal_in_float64(by_definition(problem, arrays), by_torch(arrays, None, True, "float64"), ulps=2**16)


def test_no_tokens():
    problem = replace(SMALL, tokens=0)
    arrays = exact(replace(SMALL, tokens=2))
    arrays |= {name: arrays[name][:, :0] for name in ("hidden", "targets", *GRADIENTS)}
    ours = by_definition(problem, arrays)
    assert ours["lse"].shape == (2, 0)
    assert not ours["dweight"].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_narrow_inputs_are_computed_in_float32(dtype):
    problem = Problem(tokens=20, vocab=30, batch=2, dtype=dtype, softcap=3.0)
    ours = by_definition(problem, problem.arrays())
    assert {ours[name].dtype for name in ("dhidden", "dweight")} == {
        np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    }
    assert {ours[name].dtype for name in ("lse", "target_logit", "logit_sum")} == {np.dtype("float32")}
    assert_within(ours, problem.answers(dtype), problem.answers(), dtype)
