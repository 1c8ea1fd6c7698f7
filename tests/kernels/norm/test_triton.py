"""The Triton norm kernels, interpreted, against torch: at most twice the error of torch in the same precision."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matmul_problems import LAYOUTS, lay_out
from norm_problems import OPERANDS, Problem
from oracles import assert_within

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan
from crosstile.kernels.norm import triton as kernels
from crosstile.kernels.norm.spec import NormSpec
from crosstile.kernels.norm.tiles import NormConfig, choose_config
from crosstile.kernels.tiles.launch import Array, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target
from crosstile.kernels.tiles.triton_interpreter import run

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]
WALKING = NormConfig(block_rows=8, block_cols=16, partials=2)  # rows of more than one tile
EVERYTHING = {"bias": True, "residual": True, "kind": "layer"}


def describe(array: np.ndarray | None) -> Array | None:
    if array is None:
        return None
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def forward(problem: Problem, arrays: dict, config: NormConfig) -> dict:
    inputs = {name: arrays[name] for name in OPERANDS if name in arrays}
    plan = kernels.forward(problem.spec, config, *(describe(inputs.get(name)) for name in OPERANDS))
    return dict(zip(plan.outputs, run(plan, inputs), strict=True))


def forward_and_backward(problem: Problem, arrays: dict, config: NormConfig | None = None) -> dict:
    """The results and the gradients, by name."""
    config = config or choose_config(problem.spec, INTERPRET)
    outputs = forward(problem, arrays, config)
    plan = kernels.backward(
        problem.spec,
        config,
        tuple(describe(arrays.get(name)) for name in OPERANDS),
        (describe(outputs["y"]), describe(outputs.get("summed"))),
        (describe(arrays["dy"]), describe(arrays.get("dsummed"))),
    )
    named = {**arrays, **outputs}
    results = run(plan, {name: named[name] for name in plan.inputs})
    return outputs | dict(zip(plan.outputs, results, strict=True))


def native(problem: Problem) -> dict:
    return {name: array.astype(problem.dtype) for name, array in problem.exact_arrays.items()}


def check(problem: Problem, config: NormConfig | None = None) -> None:
    ours = forward_and_backward(problem, native(problem), config)
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


OPTIONS = [
    {"kind": "rms"},
    {"kind": "rms", "residual": True},
    {"kind": "rms", "zero_centered": True},
    {"kind": "layer"},
    {"kind": "layer", "bias": True},
    {"kind": "layer", "residual": True},
    {"kind": "layer", "bias": True, "residual": True},
]
NAMES = ["-".join(str(v) if v is not True else k for k, v in options.items()) for options in OPTIONS]


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_options(options, config):
    check(Problem(**options), config)


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2], OPTIONS[6]], ids=[NAMES[1], NAMES[2], NAMES[6]])
def test_bfloat16(options, config):
    check(Problem(dtype="bfloat16", **options), config)


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (33, 1), (1, 65), (64, 64), (0, 40), (5, 0), (0, 0)])
def test_sizes(rows, hidden, config):
    kind = "layer" if hidden > 1 else "rms"  # of one number the deviation is nothing but rounding
    check(Problem(kind, rows, hidden, batch=1, bias=hidden > 1, residual=True), config)


def test_layer_norm_of_one_number_is_the_bias():
    problem = Problem(rows=5, hidden=1, batch=1, **EVERYTHING)
    arrays = native(problem)
    ours = forward_and_backward(problem, arrays)
    np.testing.assert_array_equal(ours["y"], np.broadcast_to(arrays["bias"][:, None], ours["y"].shape))
    np.testing.assert_array_equal(ours["dweight"], 0)
    np.testing.assert_array_equal(ours["dx"], arrays["dsummed"])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_long_row(kind):
    check(Problem(kind=kind, rows=3, hidden=5000, batch=1, residual=True), NormConfig(2, 2048))


def test_empty_batch():
    check(Problem(batch=0, **EVERYTHING))


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout, config):
    """Any strides, and nothing between the elements of a view is read: it is NaN."""
    problem = Problem(rows=20, **EVERYTHING)
    arrays = {name: lay_out(array, layout) for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays, config)
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


def test_every_array_with_a_layout_of_its_own():
    problem = Problem(rows=20, **EVERYTHING)
    layouts = dict(zip(("x", "residual", "weight", "dy", "bias", "dsummed"), LAYOUTS[1:] * 2, strict=False))
    arrays = {name: lay_out(array, layouts[name]) for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays)
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
def test_a_variance_far_from_zero(config):
    """The mean is taken away before squares are summed."""
    check(Problem(kind="layer", bias=True, offset=30.0), config)


@pytest.mark.parametrize(
    "config",
    [NormConfig(1, 64, partials=1), NormConfig(4, 32, partials=5), NormConfig(32, 8, partials=64)],
    ids=lambda config: f"{config.block_rows}x{config.block_cols}",
)
def test_tiles_change_nothing(config):
    check(Problem(**EVERYTHING), config)


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
def test_without_eps_rows_of_a_tile_that_are_not_there_add_nothing(config):
    check(Problem(rows=9, eps=0.0, residual=True), config)


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
def test_nan_and_infinity_stay_in_their_row(config):
    problem = Problem(rows=5, batch=1, kind="layer")
    arrays = native(problem)
    arrays["x"][0, 1, 4], arrays["x"][0, 3, 7] = np.nan, np.inf
    ours = forward_and_backward(problem, arrays, config)
    for name in ("y", "dx"):
        assert np.isnan(ours[name][0, [1, 3]]).all()
        assert np.isfinite(ours[name][0, [0, 2, 4]]).all()


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
def test_a_result_that_nobody_uses(config):
    """Without a gradient of the sum it is as if that were 0."""
    problem = Problem(**EVERYTHING)
    arrays = native(problem)
    zero = forward_and_backward(problem, {**arrays, "dsummed": np.zeros_like(arrays["dsummed"])}, config)
    none = forward_and_backward(problem, {name: a for name, a in arrays.items() if name != "dsummed"}, config)
    for name, result in zero.items():
        np.testing.assert_array_equal(none[name], result, err_msg=name)


@pytest.mark.parametrize("config", [None, WALKING], ids=["whole", "walking"])
def test_two_runs_are_bit_equal(config):
    problem = Problem(**EVERYTHING)
    first, second = (forward_and_backward(problem, native(problem), config) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


@pytest.mark.parametrize(("rows", "stride"), [(3, 2**30), (66, 2**25)], ids=["wide tile", "far tile"])
def test_offsets_past_32_bits(rows, stride):
    """Storage of 4 GiB, of which a few pages are touched."""
    storage = np.empty((rows - 1) * stride + 64, np.float16)
    far = np.lib.stride_tricks.as_strided(storage, (1, rows, 40), (0, 2 * stride, 2))
    problem = Problem(rows=rows, batch=1, dtype="float16")
    arrays = native(problem)
    far[...] = arrays["x"]
    for config in (NormConfig(4, 64), NormConfig(4, 16)):
        near, ours = (forward_and_backward(problem, {**arrays, "x": x}, config) for x in (arrays["x"], far))
        for name, result in near.items():
            np.testing.assert_array_equal(ours[name], result, err_msg=name)


@pytest.mark.parametrize("hidden", [1024, 16384])
def test_a_change_of_the_rows_compiles_nothing(hidden):
    def keys(rows):
        spec, config = (
            NormSpec("float16", hidden, "rms", 1e-6),
            choose_config(NormSpec("float16", hidden, "rms", 1e-6), get_target("sm_90")),
        )
        x, weight = contiguous((1, rows, hidden), "float16"), contiguous((1, hidden), "float16")
        launches = (
            *kernels.forward(spec, config, x, weight, None, None).launches,
            *kernels.backward(spec, config, (x, weight, None, None), (x, None), (x, None)).launches,
        )
        for launch in launches:
            specialised = {p.name for p in launch.kernel.params if not p.do_not_specialize}
            yield {name: value for name, value in launch.numbers.items() if name in specialised}, launch.constants

    assert list(keys(1000)) == list(keys(1003)) == list(keys(4096))


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("hidden", [128, 4096, 5000, 16384])
@pytest.mark.sweep
def test_compiles_without_spills(target, hidden):
    """The most that a kernel can be asked for."""
    for dtype in ("bfloat16", "float32"):
        spec = NormSpec(dtype, hidden, "layer", 1e-5)
        x, weight = contiguous((1, 8192, hidden), dtype), contiguous((1, hidden), dtype)
        config = choose_config(spec, get_target(target))
        inputs = (x, weight, weight, x)
        plans = (
            kernels.forward(spec, config, *inputs),
            kernels.backward(spec, config, inputs, (x, x), (x, x)),
        )
        for facts in itertools.chain(*(compile_plan(plan, target) for plan in plans)):
            assert over_budget(facts, target) == (), facts


@pytest.mark.parametrize("config", [NormConfig(3, 32), NormConfig(8, 48)])
def test_tiles_that_triton_cannot_have(config):
    with pytest.raises(ValueError, match=r"config: block_.* is \d+; it must be a power of two"):
        forward(Problem(), native(Problem()), config)


def test_supports():
    def spec(dtype):
        return NormSpec(dtype, 40, "rms", 1e-6)

    assert kernels.supports(spec("float16"), INTERPRET, True) == ()
    assert kernels.supports(spec("bfloat16"), get_target("sm_90"), True) == ()
    assert kernels.supports(spec("bfloat16"), INTERPRET, True) == ()
    assert "float64" in kernels.supports(spec("float64"), INTERPRET, False)[0]
    assert "TPU" in kernels.supports(spec("float32"), get_target("v6e"), False)[0]
