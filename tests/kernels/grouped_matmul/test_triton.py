"""The Triton grouped_matmul kernels, interpreted, against torch: at most twice the error of torch in that precision."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from grouped_problems import Problem
from grouped_runs import by_triton as forward_and_backward
from grouped_runs import check_triton as check
from grouped_runs import native, tiles
from grouped_runs import triton_forward as forward
from matmul_problems import LAYOUTS, lay_out
from mutations import describe
from oracles import assert_within

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan
from crosstile.kernels.grouped_matmul import triton as kernels
from crosstile.kernels.grouped_matmul import triton_drhs, triton_schedule
from crosstile.kernels.grouped_matmul.spec import ACTIVATIONS, GroupedMatmulSpec, saving
from crosstile.kernels.grouped_matmul.tiles import GroupedMatmulConfig, GroupedMatmulTiles, choose_config
from crosstile.kernels.tiles.launch import Array, Plan, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target
from crosstile.kernels.tiles.triton_interpreter import run

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation):
    check(Problem(activation=activation, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_dtypes(dtype, activation):
    check(Problem(dtype=dtype, activation=activation))


SIZES = {
    "all of one": ((0, 37, 0), 37),
    "a row each": ((1, 1, 1, 1), 4),
    "the first is empty": ((0, 3, 20), 40),
    "the last is empty": ((16, 16, 0, 0), 40),
    "whole tiles": ((16, 32, 16), 64),
    "all are empty": ((0, 0, 0), 20),
    "one group": ((9,), 9),
    "no groups": ((), 9),
    "no rows": ((0, 0), 0),
    "more groups than rows": ((0, 1, 0, 0, 2, 0, 0, 0), 3),
    "one row": ((0, 1), 1),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_groups(name):
    sizes, tokens = SIZES[name]
    for activation in (None, "relu"):
        check(Problem(sizes, tokens, k=17, n=20, activation=activation))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (0, 5), (5, 0), (0, 0), (65, 1), (1, 70)])
def test_sizes_of_matrices(k, n):
    for activation in (None, "silu"):
        check(Problem(k=k, n=n, activation=activation))


def test_batches_have_sizes_of_their_own():
    check(Problem(batch=3, dtype="bfloat16", activation="silu"))


def test_empty_batch():
    check(Problem(batch=0, activation="silu"))


@pytest.mark.sweep
@pytest.mark.parametrize(("k", "n"), list(itertools.product((1, 16, 33, 64), repeat=2)))
@pytest.mark.parametrize("sizes", [(40, 1, 0, 23), (64, 0, 0), (7, 7, 7, 7, 7, 7, 7)], ids=str)
def test_all_sizes(k, n, sizes):
    for tokens, activation in itertools.product((sum(sizes), sum(sizes) + 21), (None, "gelu")):
        check(Problem(sizes, tokens, k, n, activation=activation, dtype="bfloat16"))


@pytest.mark.parametrize("name", ["all of one", "the last is empty", "more groups than rows"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_groups_that_are_one_chunk(name, activation, monkeypatch):
    """Where tiles of drhs are enough, no group is cut, and there is nothing to add."""
    monkeypatch.setattr(triton_drhs, "PROGRAMS", 1)
    check(Problem(*SIZES[name], k=20, n=40, activation=activation))


def test_a_long_group_beside_short_ones_is_cut():
    problem = Problem(sizes=(2, 150, 0, 3), tokens=160, k=20, n=20, activation="silu")
    config = choose_config(problem.spec, INTERPRET)
    arrays = {name: describe(array) for name, array in problem.exact_arrays.items()}
    inputs = problem.inputs(arrays)
    kept = contiguous((1, 2, 160, 20), "float32")
    plan = kernels.backward(problem.spec, config, inputs, (arrays["dout"], kept), (arrays["dout"], None))
    assert plan.launches[-1].kernel.__name__ == "_add_partials"
    assert plan.launches[-2].numbers["slots"] > 4 + 2
    check(problem)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    """Any strides, and nothing between the elements of a view is read: it is NaN."""
    problem = Problem(activation="gelu", k=20, n=17)
    plain = native(problem)
    arrays = {name: lay_out(array, layout) for name, array in plain.items() if name != "group_sizes"}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()} | {"group_sizes": problem.group_sizes}
    sizes = np.repeat(problem.group_sizes, 2, axis=1)[:, ::2]
    ours = forward_and_backward(problem, {**arrays, "group_sizes": sizes})
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


@pytest.mark.parametrize(
    "config",
    [
        tiles(16, 16, 16, group_m=1),
        tiles(128, 256, 64),
        GroupedMatmulConfig(
            GroupedMatmulTiles(32, 128, 16, 3), GroupedMatmulTiles(64, 16, 32), GroupedMatmulTiles(16, 64, 64)
        ),
    ],
    ids=["small", "large", "unlike"],
)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_tiles_change_nothing(config, activation):
    check(Problem(sizes=(50, 3, 40), tokens=100, k=40, n=70, activation=activation), config)


def test_a_forward_that_saves_nothing_gives_the_same():
    problem = Problem(dtype="bfloat16", activation="silu")
    config = choose_config(problem.spec, INTERPRET)
    saved = forward(problem.spec, native(problem), config)
    plain = forward(replace(problem.spec, save_preactivations=False), native(problem), config)
    assert set(plain) == {"out"}
    np.testing.assert_array_equal(plain["out"], saved["out"])
    assert not saved["preactivations"][:, :, sum(problem.sizes) :].any()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_two_runs_are_bit_equal(activation):
    problem = Problem(sizes=(90, 5), tokens=96, activation=activation)
    first, second = (forward_and_backward(problem, native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


def test_nan_and_infinity_stay_in_their_row_and_group():
    problem = Problem(sizes=(3, 4), tokens=8, k=6, n=3)
    arrays = native(problem)
    arrays["lhs"][0, 1, 4], arrays["dout"][0, 5, 0] = np.nan, np.inf
    ours = forward_and_backward(problem, arrays)
    assert np.isnan(ours["out"][0, 1]).all()
    assert np.isfinite(np.delete(ours["out"][0], 1, axis=0)).all()
    assert np.isfinite(np.delete(ours["dlhs"][0], 5, axis=0)).all()
    assert np.isnan(ours["drhs"][0, 0, 4]).all()
    assert np.isfinite(np.delete(ours["drhs"][0, 0], 4, axis=0)).all()
    assert np.isfinite(ours["drhs"][0, 1, :, 1:]).all()
    assert np.isinf(ours["drhs"][0, 1, :, 0]).all()


def test_sizes_that_cannot_be_touch_nothing_else():
    """The list of tiles ends where it must, whatever the sizes say."""
    problem = Problem(sizes=(20, 30), tokens=50, k=16, n=16)
    arrays = native(problem) | {"group_sizes": np.array([[60, 2**31 - 1]], np.int32)}
    same = native(problem) | {"group_sizes": np.array([[50, 0]], np.int32)}
    ours, exact = (forward_and_backward(problem, each) for each in (arrays, same))
    for name, result in exact.items():
        np.testing.assert_array_equal(ours[name], result, err_msg=name)
    arrays["group_sizes"] = np.array([[-5, 50]], np.int32)
    same["group_sizes"] = np.array([[0, 50]], np.int32)
    ours, exact = (forward_and_backward(problem, each) for each in (arrays, same))
    for name, result in exact.items():
        np.testing.assert_array_equal(ours[name], result, err_msg=name)


@pytest.mark.parametrize("name", ["lhs", "rhs"])
@pytest.mark.parametrize(("rows", "stride"), [(3, 2**30), (66, 2**25)], ids=["wide tile", "far tile"])
def test_offsets_past_32_bits(rows, stride, name):
    """Storage of 4 GiB, of which a few pages are touched."""
    storage = np.empty((rows - 1) * stride + 64, np.float16)
    problem = Problem(sizes=(rows - 1, 1), tokens=rows, k=rows, n=20, dtype="float16", activation="relu")
    arrays = native(problem)
    shape = arrays[name].shape
    groups = (20 * 2,) if name == "rhs" else ()
    far = np.lib.stride_tricks.as_strided(storage, shape, (0, *groups, 2 * stride, 2))
    far[...] = arrays[name]
    near, ours = (forward_and_backward(problem, {**arrays, name: array}) for array in (arrays[name], far))
    for result in near:
        np.testing.assert_array_equal(ours[result], near[result], err_msg=result)


def test_the_list_of_tiles():
    """Each row is of one tile, each tile of one group, and there are never more tiles than there is room for."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens, groups, block = rng.integers(1, 90), rng.integers(1, 9), int(rng.choice([1, 16, 32]))
        sizes = rng.multinomial(rng.integers(0, tokens + 1), np.ones(groups) / groups).astype(np.int32)[None]
        for every in (False, True):
            launch, listed = triton_schedule.schedule_launch("tiles", describe(sizes), int(tokens), block, every)
            plan = Plan((launch,), {"group_sizes": describe(sizes)}, {"tiles": listed})
            (found,) = run(plan, {"group_sizes": sizes})
            owners = np.repeat(np.arange(groups + 1), [*sizes[0], 0 if every else tokens - sizes.sum()])
            seen = np.full(len(owners), -1)
            partials = []
            for group, first, end, partial in found[0]:
                rows = slice(first, max(end, first))
                assert (seen[rows] == -1).all()
                assert (owners[rows] == group).all()
                assert end - first <= block
                seen[rows] = group
                partials += [partial] * int(partial >= 0)
            assert (seen == owners).all()
            assert partials == list(range(len(partials)))
            assert len(partials) <= triton_schedule.partial_slots(int(tokens), block)
            if every:
                assert set(found[0, found[0, :, 2] >= 0, 0]) == set(range(groups))


def test_a_change_of_tokens_compiles_nothing():
    def key(tokens):
        arrays = [contiguous(shape, "float16") for shape in ((1, tokens, 64), (1, 8, 64, 48))]
        inputs = (*arrays, None, contiguous((1, 8), "int32"))
        spec, dout = GroupedMatmulSpec("float16"), contiguous((1, tokens, 48), "float16")
        config = tiles(64, 64, 32)
        launches = kernels.forward(spec, config, *inputs).launches
        launches += kernels.backward(spec, config, inputs, (dout, None), (dout, None)).launches
        return [
            (
                {name: value for name, value in launch.numbers.items() if name in specialised},
                launch.constants,
                launch.num_warps,
            )
            for launch in launches
            for specialised in [{p.name for p in launch.kernel.params if not p.do_not_specialize}]
        ]

    assert key(1000) == key(1003) == key(4096)


def compiled(target: str, activation: str | None, dtype: str, weight: Array, tokens: int):
    """The facts of every kernel of a training step, for weights [1, groups, k, n]."""
    _, groups, k, n = weight.shape
    lhs, out, sizes = (
        contiguous((1, tokens, k), dtype),
        contiguous((1, tokens, n), dtype),
        contiguous((1, groups), "int32"),
    )
    spec = saving(GroupedMatmulSpec(dtype, activation))
    config = choose_config(spec, get_target(target))
    inputs = (lhs, weight, weight if activation else None, sizes)
    kept = contiguous((1, 2, tokens, n), dtype) if activation else None
    plans = (kernels.forward(spec, config, *inputs), kernels.backward(spec, config, inputs, (out, kept), (out, None)))
    return itertools.chain(*(compile_plan(plan, target) for plan in plans))


@pytest.mark.parametrize("target", GPUS)
def test_compiles_to_matrix_instructions_without_spills(target):
    for facts in compiled(target, "gelu", "bfloat16", contiguous((1, 4, 512, 512), "bfloat16"), 1024):
        assert over_budget(facts, target) == (), facts


@pytest.mark.sweep
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tokens", "groups", "k", "n"), [(8192, 8, 4096, 14336), (32768, 128, 2048, 768)])
def test_compiles_at_the_sizes_of_models(target, dtype, tokens, groups, k, n):
    """Of weights as JAX and as torch.nn.Linear have them."""
    for activation in (None, "silu", "gelu"):
        for strides in ((0, k * n, n, 1), (0, k * n, 1, k)):
            for facts in compiled(target, activation, dtype, Array((1, groups, k, n), dtype, strides), tokens):
                assert over_budget(facts, target) == (), facts


@pytest.mark.sweep
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("k", "n"), [(304, 512), (301, 512), (512, 501), (301, 501)])
def test_odd_sizes_fit_the_shared_memory(target, k, n):
    for dtype, activation in itertools.product(("bfloat16", "float32"), (None, "gelu")):
        for strides in ((0, k * n, n, 1), (0, k * n, 1, k)):
            for facts in compiled(target, activation, dtype, Array((1, 8, k, n), dtype, strides), 1001):
                assert facts.on_chip_bytes <= get_target(target).on_chip_bytes, facts


@pytest.mark.parametrize("config", [tiles(48, 32, 32), tiles(32, 32, 8)], ids=["no power of two", "too small"])
def test_tiles_that_triton_cannot_have(config):
    with pytest.raises(ValueError, match=r"config: block_. is \d+; it must be a power of two"):
        forward(Problem().spec, native(Problem()), config)


def test_supports():
    for target in (INTERPRET, get_target("sm_90"), get_target("gfx942")):
        for dtype in ("float32", "float16", "bfloat16"):
            assert kernels.supports(GroupedMatmulSpec(dtype), target, True) == ()
    assert "float64" in kernels.supports(GroupedMatmulSpec("float64"), INTERPRET, False)[0]
    assert "TPU" in kernels.supports(GroupedMatmulSpec("float32"), get_target("v6e"), False)[0]
