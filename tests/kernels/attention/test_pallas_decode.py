"""The Pallas kernel for few queries, interpreted in float32 against the definition in float64.

Tolerance: an error at most twice that of the definition itself computed in float32, plus a floor in ulps. Blocks of 32
keys, two of them in a grid step, none full at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import Problem, problem_of
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within, rounded
from sweeps import one_in

from crosstile.bench.tpu import environment
from crosstile.kernels.attention import pallas as kernels
from crosstile.kernels.attention import reference
from crosstile.kernels.attention.pallas_decode import Cut, can_decode
from crosstile.kernels.attention.spec import INPUTS, AttentionInputs, AttentionSpec
from crosstile.kernels.attention.tiles import AttentionSizes, choose_config
from crosstile.kernels.tiles.expressions import plane
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

of = partial(problem_of, shape=(3, 1, 150, 6, 2, 16, 24))


def has_mods(problem: Problem) -> None:
    """A score and a mask that tell items, heads, queries and keys apart."""
    problem.changes_score(("add", ("score",), ("mul", ("h",), ("sub", ("j",), ("i",)))))
    problem.changes_score(("mul", ("tanh", problem.options["score"]), ("add", ("b",), ("h",))))
    problem.options["mask"] = ("ne", ("mod", ("add", ("j",), ("add", ("h",), ("i",))), ("const", 3)), ("b",))


PROBLEMS = {
    "all keys": of(),
    "one block": of(shape=(2, 1, 20, 4, 4, 16, 16)),
    "lengths": of(Problem.is_causal, lambda p: p.has_lengths(None, [150, 0, 65])),
    "several queries, lengths": of(
        Problem.is_causal, lambda p: p.has_lengths([5, 2, 0], [150, 129, 33]), shape=(3, 5, 150, 6, 2, 16, 24)
    ),
    "a window": of(Problem.is_causal, lambda p: p.has_window(70, None), shape=(2, 4, 150, 4, 2, 16, 16)),
    "a window, lengths, sinks": of(
        lambda p: p.has_window(70, 20), lambda p: p.has_lengths([3, 1], [140, 90]), Problem.has_sinks,
        shape=(2, 3, 150, 4, 2, 16, 16),
    ),
    "no keys, sinks": of(lambda p: p.has_lengths(None, [0, 33, 1]), Problem.has_sinks),
    "more queries than keys": of(Problem.is_causal, shape=(1, 8, 5, 4, 2, 16, 16)),
    "softcap": of(Problem.is_causal, lambda p: p.is_capped(0.7), lambda p: p.has_lengths(None, [150, 64, 65])),
    "mods": of(has_mods, shape=(2, 3, 100, 4, 2, 16, 16)),
    "heads of several grid steps": of(Problem.is_causal, shape=(1, 2, 70, 12, 12, 8, 8)),
}  # fmt: skip


def inputs_of(problem: Problem, dtype: str) -> tuple[np.ndarray | None, ...]:
    arrays = {
        name: rounded(array, "float32").astype(dtype) if array.dtype == np.float64 else array
        for name, array in problem.arrays.items()
    }
    return tuple(arrays.get(name) for name in INPUTS)


def definition(problem: Problem, dtype: str) -> dict[str, np.ndarray]:
    found = reference.forward(problem.spec(dtype), *inputs_of(problem, dtype))
    return dict(zip(("out", "lse"), found, strict=True))


def run(problem: Problem) -> dict[str, jax.Array]:
    spec = problem.spec("float32")
    inputs = tuple(None if array is None else jnp.asarray(array) for array in inputs_of(problem, "float32"))
    assert can_decode(spec, AttentionInputs(*inputs))
    call = partial(kernels.forward, spec, choose_config(spec, INTERPRET), INTERPRET)
    found = jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})(*inputs)
    return dict(zip(("out", "lse"), found, strict=True))


def hold(problem: Problem, ours: dict[str, jax.Array]) -> None:
    assert_within(ours, definition(problem, "float32"), definition(problem, "float64"), "float32")


@pytest.mark.parametrize("name", one_in(2, PROBLEMS))
def test_agrees_with_the_definition(name):
    problem = PROBLEMS[name]()
    hold(problem, run(problem))


def test_nothing_past_a_length_is_read():
    """NaN there, in queries, keys and values, changes no bit."""
    problem = PROBLEMS["several queries, lengths"]()
    spoilt = copy(problem)
    spoilt.arrays = dict(problem.arrays)
    for name, lengths in (("q", "q_lengths"), ("k", "kv_lengths"), ("v", "kv_lengths")):
        past = np.arange(problem.arrays[name].shape[1]) >= problem.arrays[lengths][:, None]
        spoilt.arrays[name] = np.where(past[:, :, None, None], np.nan, problem.arrays[name])
    sound, found = run(problem), run(spoilt)
    for name, array in sound.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_races_and_reads_before_writes():
    """The strict interpreter, which simulates a chip's memories, copies and two cores, finds no race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    problem = of(
        Problem.is_causal,
        Problem.has_sinks,
        lambda p: p.has_window(70, None),
        lambda p: p.has_lengths([2, 1], [150, 40]),
        shape=(2, 2, 180, 2, 1, 8, 8),
    )()
    with interpreter(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        ours = jax.block_until_ready(run(problem))
        assert not interpret_pallas_call.races.races_found
    hold(problem, ours)


@pytest.mark.parametrize("window", [None, 70])
def test_only_blocks_that_are_seen_are_fetched(window):
    """Each once, in the order of the grid; a place of which an item sees no block keeps what it has."""
    lengths = [300, 40, 0, 129, 1, 256]
    spec = AttentionSpec("float32", 16, 16, causal=True, window_left=window)
    shape = (len(lengths), 300, 2, 16)
    arrays = AttentionInputs(np.zeros((len(lengths), 1, 4, 16), np.float32), *np.zeros((2, *shape), np.float32))
    cut = Cut.choose(spec, choose_config(spec, INTERPRET), INTERPRET, arrays, has_lengths=True)
    assert (cut.tiling.block_kv, cut.blocks, cut.all_blocks) == (32, 2, 10)
    scalars = (np.array([[1] * len(lengths), lengths]),)
    for item, length in enumerate(lengths):
        sequence = cut.tiling.sequence(item, scalars)
        fetched = []
        for which in range(cut.blocks):
            held = -1
            for step in range(-(-cut.all_blocks // cut.blocks)):
                block = int(cut.nearest(step * cut.blocks + which, which, sequence))
                if block >= 0 and block != held:
                    fetched.append(block)
                    held = block
        first = 0 if window is None else max(0, length - 1 - window) // 32
        assert sorted(fetched) == list(range(first, -(-length // 32)))


def test_what_the_other_kernel_alone_has_is_left_to_it():
    arrays = AttentionInputs(*(np.zeros((1, length, heads, 16)) for length, heads in ((4, 8), (90, 2), (90, 2))))
    plain = AttentionSpec("float32", 16, 16)
    assert can_decode(plain, arrays)
    for change in ({"dropout": 0.1}, {"score": plane(0)}, {"mask": plane(0)}, {"dtype": "float8_e4m3fn"}):
        assert not can_decode(replace(plain, **change), arrays)
    assert not can_decode(plain, arrays._replace(q=np.zeros((1, 16, 8, 16))))


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.is_tpu])
def test_lowers_and_exports_for_every_chip(name):
    """As it is, and of several calls at once."""
    spec, target = AttentionSpec("bfloat16", 64, 64, causal=True), get_target(name)
    config = choose_config(spec, target, AttentionSizes(1, 500, 2))

    def call(q: jax.Array, k: jax.Array, lengths: jax.Array) -> jax.Array:
        inputs = AttentionInputs(q, k, k, kv_lengths=lengths)
        return kernels.forward(spec, config, target, *inputs)[0]

    shapes = ((2, 1, 4, 64), "bfloat16"), ((2, 500, 2, 64), "bfloat16"), ((2,), "int32")
    once = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    often = [jax.ShapeDtypeStruct((3, *shape), dtype) for shape, dtype in shapes]
    for function, arrays in ((call, once), (jax.vmap(call), often)):
        exported = jax.export.export(jax.jit(function), platforms=("tpu",))(*arrays)
        assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 1


COMPILE = """
import sys
import jax
from crosstile.bench.tpu import compile_program
from crosstile.kernels.attention import pallas
from crosstile.kernels.attention.spec import AttentionInputs, AttentionSpec
from crosstile.kernels.attention.tiles import AttentionSizes, choose_config
from crosstile.kernels.tiles.expressions import SCORE, const
from crosstile.kernels.tiles.targets import get_target

target = get_target(sys.argv[1])
for q_heads, kv_heads, dim, q_len, options in (
    (32, 8, 128, 1, {"causal": True}),
    (6, 2, 64, 5, {"causal": True, "window_left": 700}),
    (8, 4, 256, 1, {"score": ("mul", ("tanh", ("mul", SCORE, const(0.02))), const(50.0))}),
):
    spec = AttentionSpec("bfloat16", dim, dim, **options)
    config = choose_config(spec, target, AttentionSizes(q_len, 3000, q_heads // kv_heads))
    q, k = (jax.ShapeDtypeStruct((2, *sizes, dim), "bfloat16") for sizes in ((q_len, q_heads), (3000, kv_heads)))
    lengths = jax.ShapeDtypeStruct((2,), "int32")
    sinks = jax.ShapeDtypeStruct((2, q_heads), "float32")
    arrays = AttentionInputs(q, k, k, lengths, lengths, sinks=sinks)
    step = lambda *inputs: pallas.forward(spec, config, target, *inputs)
    for facts in compile_program(step, list(arrays), target.name, lambda name: ""):
        print(facts.kernel, sum(facts.matrix.values()) > 0, facts.spills * 10 < facts.instructions)
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "v5e" else pytest.mark.sweep)
        for name, target in TARGETS.items()
        if target.is_tpu
    ],
)
def test_compiles_for_the_matrix_units(tmp_path, name):
    """And spills fewer registers than one in ten bundles."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name],
        env={**os.environ, **environment(tmp_path / "dump")},
        cwd=Path(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["attention_decode True True"] * 3


def test_blocks_fill_the_memory_that_a_chip_has():
    """About twice what its memory brings in the latency of a copy, and never more than VMEM holds twice."""
    for name in ("v4", "v5e", "v5p", "v6e", "v7x"):
        target = get_target(name)
        for kv_heads, dim in ((1, 64), (2, 128), (8, 128), (32, 256), (1, 576)):
            spec = AttentionSpec("bfloat16", dim, dim)
            arrays = AttentionInputs(
                *(jax.ShapeDtypeStruct((4, n, kv_heads, dim), "bfloat16") for n in (1, 8192, 8192))
            )
            config = choose_config(spec, target, AttentionSizes(1, 8192, 1))
            cut = Cut.choose(spec, config, target, arrays, has_lengths=True)
            width = -(-dim // 128) * 128
            step = cut.blocks * cut.heads * cut.tiling.block_kv * 2 * width * 2
            assert 2 * step < target.on_chip_bytes
            if (kv_heads, dim) == (8, 128) and name != "v4":
                assert 0.4 < step / (target.bandwidth * 1e9 * 2.4e-6) < 3
