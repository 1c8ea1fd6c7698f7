"""What a call of the Pallas attention kernels may add, interpreted in float32 against the definition in float64.

Tolerance: an error at most twice that of the definition itself computed in float32, plus a floor in ulps. Problems are
of three tiles each way and two stretches, none full.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import PackedProblem, Problem, problem_of
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within, rounded
from sweeps import one_in

from crosstile.bench.tpu import environment
from crosstile.kernels.attention import pallas as kernels
from crosstile.kernels.attention import pallas_backward, reference
from crosstile.kernels.attention.pallas_scores import FUNCTIONS
from crosstile.kernels.attention.spec import INPUTS
from crosstile.kernels.attention.tiles import choose_config
from crosstile.kernels.tiles.expressions import SCORE, const, evaluate, functions_of, plane
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, MIB, Target

SHAPE = (2, 70, 90, 4, 2, 16, 24)
MORE_QUERIES = (1, 90, 70, 4, 2, 16, 24)
FEW_REGISTERS = replace(INTERPRET, on_chip_bytes=16 * MIB)
RESULTS = ("out", "lse", *INPUTS)
of = partial(problem_of, shape=SHAPE)


def packed(*steps: Callable[[Problem], Any]) -> Callable[[], Problem]:
    def make() -> Problem:
        problem = PackedProblem(np.random.default_rng(0), SHAPE, q_lens=(40, 0, 1, 35), kv_lens=(50, 20, 1, 10))
        for step in steps:
            step(problem)
        return problem

    return make


def has_mods(problem: Problem) -> None:
    """A mask of indices alone, with every kind of division, and a score whose slope is NaN where it hides."""
    ahead, band = ("sub", ("i",), ("j",)), ("floordiv", ("sub", ("j",), const(50)), const(40))
    striped = ("ne", ("mod", ("add", ahead, ("h",)), const(3)), band)
    problem.options["mask"] = ("and", ("gt", ahead, const(0)), striped)
    problem.arrays["plane0"] = problem.rng.random((2, 1, 70, 1)) + 0.5
    score = ("add", ("mul", SCORE, plane(0)), ("mul", ("log", ahead), const(0.1)))
    problem.changes_score(score)
    problem.options["plane_gradients"] = (0,)


def sorted_ids(problem: Problem) -> None:
    queries, keys = (np.sort(problem.rng.integers(0, 3, (2, size))) for size in (70, 90))
    problem.has_segments(queries, keys)


FEATURES = {
    "window": of(lambda p: p.has_window(40, 30)),
    "causal window, more queries": of(lambda p: p.has_window(20, None), Problem.is_causal, shape=MORE_QUERIES),
    "window before the query": of(lambda p: p.has_window(40, -20)),
    "lengths, causal": of(lambda p: p.has_lengths([33, 70], [90, 40]), Problem.is_causal),
    "lengths, window, sinks": of(
        lambda p: p.has_lengths([65, 20], [10, 80]), lambda p: p.has_window(12, 5), Problem.has_sinks
    ),
    "no keys, sinks": of(lambda p: p.has_lengths(None, [0, 33]), Problem.has_sinks),
    "bias, causal": of(lambda p: p.adds_bias((2, 4, 70, 90), hidden=0.2), Problem.is_causal),
    "bias of keys": of(lambda p: p.adds_bias((2, 1, 1, 90)), Problem.is_causal),
    "bias of queries, lengths": of(lambda p: p.adds_bias((1, 1, 70, 1)), lambda p: p.has_lengths([33, 70], [90, 40])),
    "bias of heads, window": of(lambda p: p.adds_bias((1, 4, 1, 1)), lambda p: p.has_window(20, 5)),
    "segments": of(sorted_ids),
    "softcap, bias, mask": of(
        lambda p: p.is_capped(0.7), lambda p: p.adds_bias((1, 4, 70, 90)), lambda p: p.has_mask((2, 1, 70, 90), 0.6)
    ),
    "mods": of(has_mods),
    "packed, causal": packed(Problem.is_causal),
    "packed, bias, window, sinks": packed(
        lambda p: p.adds_bias((4, 4, 40, 50)), lambda p: p.has_window(20, 10), Problem.has_sinks
    ),
    "a latent cache's width": of(Problem.is_causal, shape=(1, 40, 50, 2, 1, 576, 512)),
}


def inputs_of(problem: Problem, dtype: str) -> dict[str, np.ndarray]:
    """The arrays, and the gradients dout and dlse, with values that float32 has."""
    named = problem.arrays | dict(zip(("dout", "dlse"), problem.gradients, strict=True))
    return {
        name: rounded(array, "float32").astype(dtype) if array.dtype == np.float64 else array
        for name, array in named.items()
    }


def definition(problem: Problem, dtype: str) -> dict[str, np.ndarray]:
    given, spec = inputs_of(problem, dtype), problem.spec(dtype)
    inputs = tuple(given.get(name) for name in INPUTS)
    outputs = reference.forward(spec, *inputs)
    gradients = reference.backward(spec, inputs, outputs, (given["dout"], given["dlse"]))
    return present((*outputs, *gradients))


def present(results: tuple[Any, ...]) -> dict[str, Any]:
    return {name: array for name, array in zip(RESULTS, results, strict=True) if array is not None}


def run(problem: Problem, target: Target = INTERPRET) -> dict[str, jax.Array]:
    spec = problem.spec("float32")
    config = choose_config(spec, INTERPRET)

    def everything(given: dict[str, jax.Array]) -> tuple[Any, ...]:
        inputs = tuple(given.get(name) for name in INPUTS)
        outputs = kernels.forward(spec, config, target, *inputs)
        return *outputs, *kernels.backward(spec, config, target, inputs, outputs, (given["dout"], given["dlse"]))

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return present(jax.jit(everything, compiler_options=options)(inputs_of(problem, "float32")))


def hold(problem: Problem, ours: dict[str, jax.Array]) -> None:
    exact = definition(problem, "float64")
    assert ours.keys() == exact.keys()
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in exact.items()}
    assert_within(ours, definition(problem, "float32"), exact, "float32")


@pytest.mark.parametrize("name", one_in(3, FEATURES))
def test_agrees_with_the_definition(name):
    problem = FEATURES[name]()
    hold(problem, run(problem))


WINDOWED = (1, 130, 162, 4, 2, 16, 16)
FOLLOWING = {
    "softcap, sinks": of(lambda p: p.is_capped(0.7), Problem.has_sinks, shape=WINDOWED),
    "bias of heads": of(lambda p: p.adds_bias((1, 4, 1, 1)), shape=WINDOWED),
    "bias of keys": of(lambda p: p.adds_bias((1, 1, 1, 162)), shape=WINDOWED),
}


@pytest.mark.parametrize("name", one_in(2, FOLLOWING))
def test_scores_of_queries_that_follow_keys(name, monkeypatch):
    """Where a tile of keys holds the queries of its window alone, other scores are of the same places."""
    problem, followed = FOLLOWING[name](), []

    def held(*arguments: Any) -> Any:
        followed.append(pallas_backward_held(*arguments))
        return followed[-1]

    pallas_backward_held = pallas_backward.held
    monkeypatch.setattr(pallas_backward, "held", held)
    monkeypatch.setattr(pallas_backward, "stretch_room", lambda other_bytes, target: 2**20)
    problem.is_causal()
    problem.has_window(31, None)
    hold(problem, run(problem))
    assert [tiling.follows for tiling, *_ in followed] == [True]


@pytest.mark.parametrize("name", ["window", "softcap, bias, mask"])
def test_in_loops_for_few_registers(name):
    problem = FEATURES[name]()
    hold(problem, run(problem, FEW_REGISTERS))


def test_nothing_past_a_length_is_read():
    """NaN there, in every array, changes no bit."""
    problem = Problem(np.random.default_rng(0), SHAPE)
    problem.has_lengths([33, 70], [90, 40])
    problem.adds_bias((2, 4, 70, 90))
    spoilt = copy(problem)
    unread = {"q": ([33, 70], 1), "k": ([90, 40], 1), "v": ([90, 40], 1)}
    spoilt.arrays = dict(problem.arrays)
    for name, (lengths, axis) in unread.items():
        past = np.arange(problem.arrays[name].shape[axis]) >= np.array(lengths)[:, None]
        spoilt.arrays[name] = np.where(past[:, :, None, None], np.nan, problem.arrays[name])
    queries, keys = np.arange(70) >= np.array([[33], [70]]), np.arange(90) >= np.array([[90], [40]])
    past = (queries[:, :, None] | keys[:, None])[:, None]
    spoilt.arrays["plane0"] = np.where(past, np.nan, problem.arrays["plane0"])
    dout, dlse = problem.gradients
    spoilt.gradients = np.where(queries[:, :, None, None], np.nan, dout), np.where(queries[:, None], np.nan, dlse)
    sound, found = run(problem), run(spoilt)
    for name, array in sound.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_one_compilation_serves_all_lengths():
    spec = Problem(np.random.default_rng(0), SHAPE).spec("float32")
    config = choose_config(spec, INTERPRET)
    traces = []

    @jax.jit
    def call(*inputs: jax.Array) -> Any:
        traces.append(inputs)
        return kernels.forward(spec, config, INTERPRET, *inputs)

    for lengths in ([33, 70], [1, 2]):
        problem = Problem(np.random.default_rng(0), SHAPE)
        problem.has_lengths(lengths, None)
        given = inputs_of(problem, "float32")
        out, lse = call(*(given.get(name) for name in INPUTS))
        exact = definition(problem, "float64")
        assert_within({"out": out, "lse": lse}, definition(problem, "float32"), exact, "float32")
    assert len(traces) == 1


def test_two_runs_are_bit_equal():
    first, second = (run(FEATURES["bias of keys"]()) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_races_and_reads_before_writes():
    """The strict interpreter, which simulates a chip's memories, copies and two cores, finds no race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    problem = Problem(np.random.default_rng(0), (1, 24, 40, 2, 1, 8, 8))
    problem.has_lengths([20], [37])
    problem.has_window(15, 3)
    problem.has_sinks()
    problem.adds_bias((1, 1, 1, 40))
    spec, given = problem.spec("float32"), inputs_of(problem, "float32")
    config = choose_config(spec, INTERPRET)
    inputs = tuple(jnp.asarray(given[name]) if name in given else None for name in INPUTS)
    with interpreter(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        outputs = jax.block_until_ready(kernels.forward(spec, config, INTERPRET, *inputs))
        assert not interpret_pallas_call.races.races_found
        cotangents = jnp.asarray(given["dout"]), jnp.asarray(given["dlse"])
        gradients = jax.block_until_ready(kernels.backward(spec, config, INTERPRET, inputs, outputs, cotangents))
        assert not interpret_pallas_call.races.races_found
    hold(problem, present((*outputs, *gradients)))


@pytest.mark.parametrize("op", ["floordiv", "mod"])
def test_integers_divide_towards_minus_infinity(op):
    """Exactly, over all of int32 but where NumPy's own result is not defined."""
    edges = np.array([0, 1, 2, 3, 5, 7, 100, 2**24 + 1, 2**30, 2**31 - 1], np.int64)
    x = np.concatenate([edges, -edges, np.random.default_rng(0).integers(-(2**31) + 1, 2**31, 200)]).astype(np.int32)
    divisors = [1, 2, 3, 7, 64, 1000, -1, -3, -64]
    for divisor in divisors:
        expression = (op, ("i",), const(divisor))
        expected = evaluate(expression, {("i",): x}, functions_of(np))
        np.testing.assert_array_equal(evaluate(expression, {("i",): jnp.asarray(x)}, FUNCTIONS), expected)
    y = np.resize(np.array(divisors, np.int32), x.shape)
    expected = evaluate((op, ("i",), ("j",)), {("i",): x, ("j",): y}, functions_of(np))
    found = evaluate((op, ("i",), ("j",)), {("i",): jnp.asarray(x), ("j",): jnp.asarray(y)}, FUNCTIONS)
    np.testing.assert_array_equal(found, expected)


COMPILE = """
import jax, jax.numpy as jnp
from crosstile.bench.tpu import compile_program
from crosstile.kernels.attention import pallas
from crosstile.kernels.attention.spec import AttentionInputs, AttentionSpec
from crosstile.kernels.attention.tiles import choose_config
from crosstile.kernels.tiles.expressions import SCORE, const, plane
from crosstile.kernels.tiles.targets import get_target

capped = ("mul", ("tanh", ("mul", SCORE, const(0.02))), const(50.0))
spec = AttentionSpec(
    "bfloat16", 128, 128, causal=True, window_left=700, score=("add", capped, plane(0)),
    mask=("and", plane(1), ("ne", ("mod", ("j",), const(3)), ("b",))), plane_gradients=(0,),
)
def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)
q, k, lengths = array("bfloat16", 2, 2048, 8, 128), array("bfloat16", 2, 2048, 2, 128), array("int32", 2)
planes = {"plane0": array("float32", 1, 8, 2048, 2048), "plane1": array("bool", 2, 1, 1, 2048)}
inputs = AttentionInputs(q, k, k, lengths, lengths, sinks=array("float32", 2, 8), **planes)
target = get_target("v5e")
config = choose_config(spec, target)
def step(inputs, dout, dlse):
    outputs = pallas.forward(spec, config, target, *inputs)
    return pallas.backward(spec, config, target, inputs, outputs, (dout, dlse))
for facts in compile_program(step, [tuple(inputs), q, array("float32", 2, 8, 2048)], "v5e", lambda name: ""):
    print(facts.kernel, facts.spills, sum(facts.matrix.values()) > 0)
"""


def test_compiles_without_spilling_a_register(tmp_path):
    """With every feature at once."""
    child = environment(tmp_path / "dump")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env={**os.environ, **child}, cwd=Path(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == [
        "attention_backward 0 True",
        "attention_forward 0 True",
        "attention_plane_gradient 0 True",
    ]
