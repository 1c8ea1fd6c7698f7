"""The Triton matmul kernels, interpreted, against torch: at most twice the error of torch in the same precision."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matmul_problems import LAYOUTS, Problem, lay_out
from matmul_runs import forward, forward_and_backward, native
from oracles import assert_within
from sweeps import swept

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan
from crosstile.kernels.matmul import triton as kernels
from crosstile.kernels.matmul.spec import ACTIVATIONS, MatmulSpec
from crosstile.kernels.matmul.tiles import MatmulConfig, choose_config
from crosstile.kernels.tiles.launch import contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


def check(problem: Problem, config: MatmulConfig | None = None) -> None:
    ours = forward_and_backward(problem, native(problem), config)
    assert ours["out"].dtype == problem.spec.out_dtype
    assert {result.dtype.name for name, result in ours.items() if name != "out"} == {problem.dtype}
    assert_within(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)


EPILOGUES = itertools.product((False, True), (False, True), (None, *ACTIVATIONS))


def one_of_both(case):
    """Whether there is a bias or a residual, not both; what an activation is makes no difference to that."""
    residual, bias, activation = case
    return residual != bias and activation not in (None, "silu")


@pytest.mark.parametrize(("residual", "bias", "activation"), swept(EPILOGUES, one_of_both))
def test_epilogues(activation, bias, residual):
    check(Problem(activation=activation, bias=bias, residual=residual))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_float16(activation):
    check(Problem(activation=activation, bias=True, residual=True, dtype="float16"))


SIZES = itertools.product((0, 1, 33, 65), repeat=3)
SOON = ((0, 33, 65), (33, 0, 65), (33, 65, 0), (0, 0, 0), (1, 1, 1), (1, 65, 33), (65, 1, 33), (33, 65, 1))


@pytest.mark.parametrize(("m", "k", "n"), swept(SIZES, lambda sizes: sizes not in SOON))
def test_sizes(m, k, n):
    check(Problem(m, k, n, batch=1, activation="silu", bias=True, residual=True))


def test_empty_batch():
    check(Problem(batch=0, activation="gelu", bias=True, residual=True))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_layouts(layout, activation):
    """Any strides, and nothing between the elements of a view is read: it is NaN."""
    problem = Problem(activation=activation, bias=True, residual=True)
    arrays = {name: lay_out(array, layout) for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays)
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


def test_every_array_with_a_layout_of_its_own():
    problem = Problem(activation="relu", bias=True, residual=True)
    layouts = dict(zip(("b", "a", "residual", "bias", "dout"), LAYOUTS[1:] * 2, strict=False))
    arrays = {name: lay_out(array, layouts[name]) for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays)
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


@pytest.mark.parametrize(
    "config",
    [MatmulConfig(16, 16, 16, group_m=1), MatmulConfig(32, 128, 16, group_m=3), MatmulConfig(128, 256, 64)],
    ids=lambda config: f"{config.block_m}x{config.block_n}x{config.block_k}",
)
def test_tiles_change_nothing(config):
    check(Problem(m=100, k=40, n=140, batch=2, activation="gelu_tanh", bias=True, residual=True), config)


def test_float32_result_of_float16():
    problem = Problem(dtype="float16", out_dtype="float32", residual=True)
    ours = forward_and_backward(problem, native(problem))
    assert_within({"out": ours.pop("out")}, problem.answers("float32"), problem.answers(), "float32")
    assert_within(ours, problem.answers("float16"), problem.answers(), "float16")


def test_float32_gradient_of_a_float32_result_without_a_residual():
    problem = Problem(dtype="float16", out_dtype="float32", bias=True)
    ours = forward_and_backward(problem, native(problem))
    del ours["out"]
    assert_within(ours, problem.answers("float16"), problem.answers(), "float16")


def test_two_runs_are_bit_equal():
    problem = Problem(m=200, activation="gelu", bias=True, residual=True)
    first, second = (forward_and_backward(problem, native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_nan_and_infinity_stay_where_they_are(activation):
    """A NaN or an infinity of a reaches its own row, and no other."""
    arrays = native(Problem(m=5, n=3, batch=1))
    arrays["a"][0, 1, 4], arrays["a"][0, 3, 7] = np.nan, np.inf
    arrays["b"][0, 7] = 1
    spec = MatmulSpec("float32", "float32", activation)
    (out,) = forward(spec, arrays, choose_config(spec, INTERPRET))
    assert np.isnan(out[0, 1]).all()
    np.testing.assert_array_equal(out[0, 3], np.inf)
    assert np.isfinite(out[0, [0, 2, 4]]).all()


@pytest.mark.parametrize("descriptors", [0, 1], ids=["addresses", "descriptors"])
@pytest.mark.parametrize(("rows", "stride"), [(3, 2**30), (66, 2**25)], ids=["wide tile", "far tile"])
def test_offsets_past_32_bits(rows, stride, descriptors):
    """Storage of 4 GiB, of which a few pages are touched."""
    storage = np.empty((rows - 1) * stride + 64, np.float16)
    far = np.lib.stride_tricks.as_strided(storage, (1, rows, 40), (0, 2 * stride, 2))
    problem = Problem(m=rows, k=40, batch=1, dtype="float16")
    arrays = native(problem)
    far[...] = arrays["a"]
    config = MatmulConfig(32, 32, 32, descriptors=descriptors)
    near, ours = (forward_and_backward(problem, {**arrays, "a": a}, config) for a in (arrays["a"], far))
    for name, result in near.items():
        np.testing.assert_array_equal(ours[name], result, err_msg=name)


def test_a_change_of_m_compiles_nothing():
    def key(m):
        arrays = [contiguous(shape, "float16") for shape in ((1, m, 64), (1, 64, 48))]
        (launch,) = kernels.forward(
            MatmulSpec("float16", "float16"), MatmulConfig(64, 64, 32), *arrays, None, None
        ).launches
        specialised = {p.name for p in launch.kernel.params if not p.do_not_specialize}
        return {name: value for name, value in launch.numbers.items() if name in specialised}, launch.constants

    assert key(1000) == key(1003) == key(4096)


@pytest.mark.parametrize("target", swept(GPUS, lambda target: target not in ("sm_90", "gfx942")))
def test_compiles_to_matrix_instructions_without_spills(target):
    """Every epilogue at once, and the transposed operands of the backward."""
    spec = MatmulSpec("bfloat16", "bfloat16", "gelu", save_preactivation=True)
    inputs = tuple(contiguous(shape, "bfloat16") for shape in ((1, 512, 512), (1, 512, 512), (1, 512), (1, 512, 512)))
    out = contiguous((1, 512, 512), "bfloat16")
    config = choose_config(spec, get_target(target))
    plans = (
        kernels.forward(spec, config, *inputs),
        kernels.backward(spec, config, inputs, (out, out), (out, None)),
    )
    for facts in itertools.chain(*(compile_plan(plan, target) for plan in plans)):
        assert over_budget(facts, target) == (), facts


@pytest.mark.parametrize("config", [MatmulConfig(48, 32, 32), MatmulConfig(32, 32, 8)])
def test_tiles_that_triton_cannot_have(config):
    arrays = native(Problem())
    with pytest.raises(ValueError, match=r"config: block_. is \d+; it must be a power of two"):
        forward(Problem().spec, arrays, config)


def test_supports():
    assert kernels.supports(MatmulSpec("float16", "float32"), INTERPRET, True) == ()
    assert kernels.supports(MatmulSpec("bfloat16", "bfloat16"), get_target("sm_90"), True) == ()
    assert kernels.supports(MatmulSpec("bfloat16", "bfloat16"), INTERPRET, True) == ()
    (reason,) = kernels.supports(MatmulSpec("float16", "float64"), INTERPRET, False)
    assert reason.startswith("out_dtype")
    assert "float64" in kernels.supports(MatmulSpec("float64", "float32"), INTERPRET, False)[0]
    assert "TPU" in kernels.supports(MatmulSpec("float32", "float32"), get_target("v6e"), False)[0]
