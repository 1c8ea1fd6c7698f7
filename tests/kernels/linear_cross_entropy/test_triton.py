"""The Triton kernels of linear cross-entropy, interpreted, against torch at twice torch's own error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cross_entropy_problems import GRADIENTS, Problem, named
from oracles import multiples

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan, specialise
from crosstile.kernels.linear_cross_entropy import triton as kernels
from crosstile.kernels.linear_cross_entropy.spec import INPUTS, OUTPUTS, LinearCrossEntropySpec
from crosstile.kernels.linear_cross_entropy.tiles import (
    LinearCrossEntropyConfig,
    LinearCrossEntropyTiles,
    choose_config,
)
from crosstile.kernels.tiles.launch import Array, Plan, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target
from crosstile.kernels.tiles.triton_interpreter import run

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


def describe(array: np.ndarray | None) -> Array | None:
    if array is None:
        return None
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def forward_and_backward(problem: Problem, arrays: dict, config=None, spec=None) -> dict:
    """The statistics and the gradients, by name."""
    spec, config = spec or problem.spec, config or choose_config(problem.spec, INTERPRET)
    inputs = {name: arrays[name] for name in INPUTS}
    plan = kernels.forward(spec, config, *map(describe, inputs.values()))
    outputs = dict(zip(plan.outputs, run(plan, inputs), strict=True))
    statistics = tuple(outputs.get(name) for name in OUTPUTS)
    gradients = tuple(arrays.get(name) for name in GRADIENTS)
    plan = kernels.backward(
        spec,
        config,
        tuple(map(describe, inputs.values())),
        tuple(map(describe, statistics)),
        tuple(map(describe, gradients)),
    )
    memory = {**inputs, "lse": statistics[0], **{name: arrays[name] for name in GRADIENTS if name in arrays}}
    results = dict(zip(plan.outputs, run(plan, memory), strict=True))
    return named(statistics, (results["dhidden"], results["dweight"]))


def excess(problem: Problem, ours: dict) -> dict:
    """The errors over the allowed ones; statistics are float32 of products in the inputs' dtype."""
    found = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    return {name: multiple for name, multiple in found.items() if not multiple <= 1}


def check(problem: Problem, config=None, spec=None) -> None:
    ours = forward_and_backward(problem, problem.arrays(), config, spec)
    assert {ours[name].dtype.name for name in ("dhidden", "dweight")} == {problem.dtype}
    assert excess(problem, ours) == {}


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "capped"])
@pytest.mark.parametrize("sums", [False, True], ids=["", "sums"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_options(softcap, sums, dtype):
    check(Problem(softcap=softcap, sums=sums, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "vocab", "features"), [(1, 1, 1), (33, 33, 17), (70, 65, 16), (32, 64, 32), (0, 33, 8), (5, 200, 3)]
)
def test_sizes(tokens, vocab, features):
    check(Problem(tokens, vocab, features)) if tokens else check_empty(Problem(tokens, vocab, features))


def check_empty(problem: Problem) -> None:
    some = replace(problem, tokens=2).arrays()
    arrays = {name: array if name == "weight" else array[:, :0] for name, array in some.items()}
    ours = forward_and_backward(problem, arrays)
    assert ours["dhidden"].shape == arrays["hidden"].shape
    assert (ours["dweight"] == 0).all()


def test_a_batch():
    check(Problem(tokens=20, batch=3, softcap=3.0))


def test_an_empty_batch():
    problem = Problem(batch=2)
    ours = forward_and_backward(problem, {name: array[:0] for name, array in problem.arrays().items()})
    assert ours["lse"].shape == (0, problem.tokens)


@pytest.mark.sweep
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_large_odd_vocabulary(softcap):
    tiles = LinearCrossEntropyTiles(64, 128, 64)
    config = LinearCrossEntropyConfig(tiles, tiles, tiles, span=8, part_tokens=64, part_vocab=4096)
    check(Problem(tokens=40, vocab=32_001, features=96, softcap=softcap), config)


def test_a_small_cap_and_a_ragged_vocabulary():
    """A cap near 0 squeezes the logits together, so that a place past the vocabulary would weigh as much as any."""
    check(Problem(vocab=33, softcap=0.1))


def test_large_logits():
    check(Problem(offset=1e4, sums=False, dtype="float16"))


def test_large_logits_in_float32():
    """There the logits' own rounding, 5e-4, is all that counts, and torch has it too."""
    problem = Problem(offset=1e4, sums=False)
    exact, theirs = problem.answers(), problem.answers("float32")
    for name, result in forward_and_backward(problem, problem.arrays()).items():
        error, allowed = (np.abs(array - exact[name]).max() for array in (result, theirs[name]))
        assert error <= 2 * allowed, name


def test_what_a_launch_leaves_is_an_input_of_it():
    """JAX's arrays are new in every launch: a part that is written must be given the rest."""
    problem = Problem(tokens=50, vocab=90)
    config = LinearCrossEntropyConfig(*[LinearCrossEntropyTiles(16, 16, 16)] * 3, span=3, part_tokens=48, part_vocab=16)
    arrays = [describe(problem.arrays()[name]) for name in INPUTS]
    row = describe(problem.arrays()["dlse"])
    plan = kernels.backward(problem.spec, config, tuple(arrays), (row, row, row), (row, row, row))
    for name in ("dweight", "dhidden"):
        writes = [launch for launch in plan.launches if name in launch.outputs]
        assert len(writes) > 1
        assert all(name in launch.inputs for launch in writes)


T = LinearCrossEntropyTiles


@pytest.mark.parametrize(
    "config",
    [
        LinearCrossEntropyConfig(T(16, 16, 16), T(16, 16, 16), T(16, 16, 16), span=3, part_tokens=48, part_vocab=16),
        LinearCrossEntropyConfig(T(16, 128, 32), T(16, 32, 64), T(32, 128, 64), span=1, part_tokens=64, part_vocab=64),
    ],
    ids=["small", "wide"],
)
def test_tiles_change_nothing(config):
    """Wide tiles are taken from the matrix unit some columns at a time."""
    check(Problem(tokens=50, vocab=90, features=70, softcap=3.0), config)


def test_every_array_with_strides_of_its_own():
    problem = Problem(tokens=37)
    arrays = problem.arrays()
    storage = np.full((2, 80, 100), np.nan, np.float32)
    hidden = storage[:1, 2:76:2, 90:10:-2]
    hidden[...] = arrays["hidden"]
    weight = np.ascontiguousarray(arrays["weight"].swapaxes(1, 2)).swapaxes(1, 2)
    targets = np.repeat(arrays["targets"], 3, axis=1)[:, ::3]
    dlse = arrays["dlse"][:, ::-1].copy()[:, ::-1]
    laid_out = {**arrays, "hidden": hidden, "weight": weight, "targets": targets, "dlse": dlse}
    near, ours = (forward_and_backward(problem, x) for x in (arrays, laid_out))
    for name, result in near.items():
        np.testing.assert_array_equal(ours[name], result, err_msg=name)


def test_one_gradient_for_all_tokens():
    """What a sum passes down has the strides 0."""
    problem = Problem(sums=False)
    arrays = problem.arrays()
    arrays |= {
        name: np.broadcast_to(np.float32(value), (1, 40)) for name, value in (("dlse", 0.5), ("dtarget_logit", -0.5))
    }
    spread = {name: np.array(array) for name, array in arrays.items()}
    near, ours = (forward_and_backward(problem, x) for x in (spread, arrays))
    for name, result in near.items():
        np.testing.assert_array_equal(ours[name], result, err_msg=name)


def test_offsets_past_32_bits():
    """Storage of 8 GiB, of which a few pages are touched."""
    problem = Problem(tokens=3, vocab=20, features=16)
    arrays = problem.arrays()
    storage = np.empty(2 * 2**30 + 64, np.float32)
    far = np.lib.stride_tricks.as_strided(storage, (1, 3, 16), (0, 4 * 2**30, 4))
    far[...] = arrays["hidden"]
    near, ours = (forward_and_backward(problem, {**arrays, "hidden": x}) for x in (arrays["hidden"], far))
    for name, result in near.items():
        np.testing.assert_array_equal(ours[name], result, err_msg=name)


def test_two_runs_are_bit_equal():
    problem = Problem(softcap=3.0)
    first, second = (forward_and_backward(problem, problem.arrays()) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


def gpu_plans(dtype: str, target: str, tokens: int, features: int, vocab: int, softcap: float | None, sums: bool):
    """Forward and backward as a chip would run them."""
    spec = LinearCrossEntropySpec(dtype, features, softcap, sums)
    config = choose_config(spec, get_target(target))
    row = contiguous((1, tokens), "float32")
    hidden, weight = (contiguous((1, rows, features), dtype) for rows in (tokens, vocab))
    inputs = (hidden, weight, contiguous((1, tokens), "int32"))
    rows = (row, row, row if sums else None)
    return kernels.forward(spec, config, *inputs), kernels.backward(spec, config, inputs, rows, rows)


MIB_OF_LOGITS = 8192 * 256_000 * 4 / 2**20


@pytest.mark.parametrize("target", GPUS)
def test_memory_beyond_inputs_and_outputs(target):
    """Under a hundredth of the logits, which for gemma-2-2b and 8192 tokens are 8000 MiB of float32."""
    for plan in gpu_plans("bfloat16", target, 8192, 2304, 256_000, 30.0, True):
        size = {"float32": 4, "bfloat16": 2}
        scratch = sum(np.prod(array.shape) * size[array.dtype] for array in plan.scratch.values()) / 2**20
        assert scratch < MIB_OF_LOGITS / 100


def different(plan: Plan, target: str) -> Plan:
    """The launches of the plan that compile to different programs."""
    arrays = {**plan.inputs, **plan.outputs, **plan.scratch}
    found = {}
    for launch in plan.launches:
        program = specialise(launch, arrays, get_target(target))
        found.setdefault(repr((launch.kernel, launch.num_warps, launch.num_stages, program)), launch)
    return replace(plan, launches=tuple(found.values()))


SOON = ("sm_90", "gfx942")  # the others compile in the sweep
MODELS = {"gemma-2-2b": (2304, 256_000, 30.0, True), "llama-3-8b": (4096, 128_256, None, False)}


@pytest.mark.parametrize(
    "target", [name if name in SOON else pytest.param(name, marks=pytest.mark.sweep) for name in GPUS]
)
@pytest.mark.parametrize("model", ["gemma-2-2b", pytest.param("llama-3-8b", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.sweep)])
def test_compiles_to_matrix_instructions_without_spills(target, model, dtype):
    for plan in gpu_plans(dtype, target, 8192, *MODELS[model]):
        for facts in compile_plan(different(plan, target), target):
            assert over_budget(facts, target) == (), facts


@pytest.mark.parametrize("tiles", [T(48, 32, 32), T(32, 8, 32)])
def test_tiles_that_triton_cannot_have(tiles):
    problem = Problem()
    config = replace(choose_config(problem.spec, INTERPRET), forward=tiles)
    with pytest.raises(ValueError, match=r"config: block_\w+ is \d+; it must be a power of two"):
        forward_and_backward(problem, problem.arrays(), config)


def test_supports():
    spec = Problem().spec
    assert kernels.supports(replace(spec, dtype="float16"), INTERPRET, True) == ()
    assert kernels.supports(replace(spec, dtype="bfloat16"), INTERPRET, True) == ()
    assert "float64" in kernels.supports(replace(spec, dtype="float64"), INTERPRET, False)[0]
    assert "TPU" in kernels.supports(spec, get_target("v6e"), False)[0]
