"""The Triton rotary kernel, interpreted, against torch: at most twice the error of torch in the same precision."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_problems import LAYOUTS, lay_out
from oracles import assert_within
from rotary_problems import FLOATS, OPERANDS, Problem

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan
from crosstile.kernels.rotary import triton as kernels
from crosstile.kernels.rotary.spec import RotarySpec
from crosstile.kernels.rotary.tiles import RotaryConfig, choose_config
from crosstile.kernels.tiles.launch import Array, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target
from crosstile.kernels.tiles.triton_interpreter import run

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


def describe(array: np.ndarray | None) -> Array | None:
    if array is None:
        return None
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def forward_and_backward(problem: Problem, arrays: dict, config: RotaryConfig | None = None) -> dict:
    """The results and the gradients, by name."""
    spec = problem.spec
    config = config or choose_config(spec, INTERPRET)
    inputs = tuple(describe(arrays.get(name)) for name in OPERANDS)
    plan = kernels.forward(spec, config, *inputs)
    results = dict(zip(plan.outputs, run(plan, {name: arrays[name] for name in plan.inputs}), strict=True))
    gradients = tuple(describe(arrays.get(name)) for name in ("drotated_q", "drotated_k"))
    plan = kernels.backward(spec, config, inputs, inputs[:2], gradients)
    found = run(plan, {name: arrays[name] for name in plan.inputs})
    return results | dict(zip(plan.outputs, found, strict=True))


def native(problem: Problem) -> dict:
    arrays = problem.exact_arrays
    return {name: array.astype(problem.dtype) if name in FLOATS else array for name, array in arrays.items()}


def check(problem: Problem, config: RotaryConfig | None = None) -> None:
    ours = forward_and_backward(problem, native(problem), config)
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(2, None), (16, None), (16, 8), (20, None), (20, 6), (7, 4), (40, 32), (256, None)]
)
def test_dimensions(head_dim, rotary_dim, interleaved):
    check(Problem(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_float16_and_a_factor(interleaved):
    check(Problem(rotary_dim=12, interleaved=interleaved, factor=1.25, dtype="float16"))


@pytest.mark.parametrize(("q_heads", "k_heads"), [(1, 0), (5, 0), (4, 4), (8, 1), (0, 3)])
def test_heads(q_heads, k_heads):
    check(Problem(q_heads=q_heads, k_heads=k_heads))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 16), (1, 33), (2, 0), (0, 5)])
def test_sizes(batch, length):
    check(Problem(batch=batch, length=length))


def test_positions_far_out():
    check(Problem(most=2**20))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout, interleaved):
    """Any strides, and nothing between the elements of a view is read: it is NaN."""
    problem = Problem(rotary_dim=10, interleaved=interleaved)
    arrays = native(problem)
    arrays |= {name: lay_out(arrays[name], layout) for name in FLOATS}
    exact = {name: array.astype(np.float64) if name in FLOATS else array for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays)
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


def test_positions_that_all_items_share():
    problem = Problem()
    arrays = native(problem)
    arrays["positions"] = np.broadcast_to(arrays["positions"][:1], arrays["positions"].shape)
    arrays["frequencies"] = np.broadcast_to(arrays["frequencies"][:1], arrays["frequencies"].shape)
    ours = forward_and_backward(problem, arrays)
    assert_within(ours, problem.answers("float32", arrays), problem.answers(arrays=arrays), "float32")


@pytest.mark.parametrize("config", [RotaryConfig(1, 1), RotaryConfig(8, 4), RotaryConfig(64, 16)])
def test_tiles_change_nothing(config):
    check(Problem(length=9, rotary_dim=12), config)


def test_nan_stays_in_its_pair_and_what_is_not_rotated_passes_as_it_is():
    problem = Problem(length=2, batch=1, rotary_dim=8, dtype="float16")
    arrays = native(problem)
    arrays["q"][0, 0, 1, 3] = np.nan
    arrays["k"][0, 1, 0, 11] = np.nan
    ours = forward_and_backward(problem, arrays)
    q, k = (np.argwhere(np.isnan(ours[name])).tolist() for name in ("rotated_q", "rotated_k"))
    assert q == [[0, 0, 1, 3], [0, 0, 1, 7]]
    assert k == [[0, 1, 0, 11]]
    np.testing.assert_array_equal(ours["rotated_q"][..., 8:], arrays["q"][..., 8:])


def test_a_result_that_nobody_uses():
    """Without a gradient of rotated_k, dk is 0."""
    problem = Problem(rotary_dim=12)
    arrays = native(problem)
    ours = forward_and_backward(problem, {name: a for name, a in arrays.items() if name != "drotated_k"})
    np.testing.assert_array_equal(ours["dk"], np.zeros_like(arrays["k"]))
    np.testing.assert_array_equal(ours["dq"], forward_and_backward(problem, arrays)["dq"])


@pytest.mark.parametrize(("length", "stride"), [(3, 2**30), (34, 2**26)], ids=["wide tile", "far tile"])
def test_offsets_past_32_bits(length, stride):
    """Storage of 4 GiB, of which a few pages are touched."""
    storage = np.empty((length - 1) * stride + 64, np.float16)
    far = np.lib.stride_tricks.as_strided(storage, (1, length, 3, 16), (0, 2 * stride, 32, 2))
    problem = Problem(length=length, batch=1, dtype="float16")
    arrays = native(problem)
    far[...] = arrays["q"]
    near, ours = (forward_and_backward(problem, {**arrays, "q": q}) for q in (arrays["q"], far))
    for name, result in near.items():
        np.testing.assert_array_equal(ours[name], result, err_msg=name)


def plans(target, dtype, heads, head_dim, rotary_dim, interleaved, length=4096):
    spec = RotarySpec(dtype, head_dim, sum(heads), rotary_dim, interleaved)
    q, k = (contiguous((1, length, count, head_dim), dtype) for count in heads)
    inputs = (q, k, contiguous((1, length), "int32"), contiguous((1, rotary_dim // 2), "float32"))
    config = choose_config(spec, get_target(target))
    yield kernels.forward(spec, config, *inputs)
    yield kernels.backward(spec, config, inputs, (q, k), (q, k))


def test_a_change_of_the_length_compiles_nothing():
    def keys(length):
        for plan in plans("sm_90", "bfloat16", (32, 8), 128, 128, False, length):
            (launch,) = plan.launches
            specialised = {p.name for p in launch.kernel.params if not p.do_not_specialize}
            # The batch of one is never stepped: its strides are 0.
            yield {name: value for name, value in launch.numbers.items() if name in specialised}, launch.constants

    assert list(keys(1000)) == list(keys(1003)) == list(keys(4096))


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"),
    [((32, 8), 128, 128), ((32, 8), 64, 64), ((32, 32), 80, 32), ((8, 4), 256, 256)],
)
@pytest.mark.sweep
def test_compiles_without_spills(target, heads, head_dim, rotary_dim):
    for dtype in ("bfloat16", "float32"):
        for interleaved in (False, True):
            for plan in plans(target, dtype, heads, head_dim, rotary_dim, interleaved):
                (facts,) = compile_plan(plan, target)
                assert over_budget(facts, target) == (), facts


@pytest.mark.parametrize("config", [RotaryConfig(3), RotaryConfig(8, block_heads=6)])
def test_tiles_that_triton_cannot_have(config):
    with pytest.raises(ValueError, match=r"config: block_.* is \d+; it must be a power of two"):
        check(Problem(), config)


def test_supports():
    def spec(dtype):
        return RotarySpec(dtype, 16, 4, 16)

    assert kernels.supports(spec("float16"), INTERPRET, True) == ()
    assert kernels.supports(spec("bfloat16"), get_target("sm_90"), True) == ()
    assert kernels.supports(spec("bfloat16"), INTERPRET, True) == ()
    assert "float64" in kernels.supports(spec("float64"), INTERPRET, False)[0]
    assert "TPU" in kernels.supports(spec("float32"), get_target("v6e"), False)[0]
