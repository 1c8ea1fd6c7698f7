"""The Pallas grouped_matmul kernels, interpreted, against torch: at most twice the error of torch in that precision.

The interpreter fills what lies outside an array, and scratch before it is written, with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import grouped_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_problems import Problem
from grouped_runs import by_pallas as forward_and_backward
from grouped_runs import check_pallas as check
from grouped_runs import quickly_jitted, tiles
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from sweeps import one_in

from crosstile.kernels.grouped_matmul import pallas as kernels
from crosstile.kernels.grouped_matmul.pallas_schedule import Visits
from crosstile.kernels.grouped_matmul.spec import ACTIVATIONS, GroupedMatmulSpec
from crosstile.kernels.grouped_matmul.tiles import (
    GroupedMatmulConfig,
    GroupedMatmulSizes,
    GroupedMatmulTiles,
    choose_config,
)
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, get_target


def native(problem: Problem) -> dict:
    return {name: jnp.asarray(array) for name, array in runs.native(problem).items()}


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation):
    check(Problem(activation=activation, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_dtypes(dtype, activation):
    check(Problem(dtype=dtype, activation=activation))


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    one_in(
        2,
        [
            ((0, 3, 20), 40),
            ((0, 37, 0), 37),
            ((0, 0, 0), 20),
            ((1, 1, 1, 1), 4),
            ((16, 32, 16), 64),
            ((16, 16, 0, 0), 40),
            ((), 9),
            ((0, 1, 0, 0, 2, 0, 0, 0), 3),
            ((0, 0), 0),
        ],
    ),
    ids=str,
)
def test_sizes_of_groups(sizes, tokens):
    check(Problem(sizes, tokens, k=17, n=20, dtype="bfloat16"))
    if len(sizes) == 3:
        check(Problem(sizes, tokens, k=17, n=20, activation="relu", dtype="bfloat16"))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (0, 5), (5, 0), (65, 1), (1, 70)])
def test_sizes_of_matrices(k, n):
    check(Problem(k=k, n=n, activation="silu", dtype="bfloat16"))


def test_batches_have_sizes_of_their_own():
    check(Problem(batch=3, dtype="bfloat16", activation="silu"))


def test_empty_batch():
    check(Problem(batch=0))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("k", "n"), list(itertools.product((16, 33, 64), repeat=2)))
@pytest.mark.parametrize("sizes", [(40, 1, 0, 23), (64, 0, 0), (7, 7, 7, 7, 7, 7, 7)], ids=str)
def test_all_sizes(k, n, sizes, dtype):
    for tokens, activation in itertools.product((sum(sizes), sum(sizes) + 21), (None, "gelu")):
        check(Problem(sizes, tokens, k, n, activation=activation, dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("float32", tiles(8, 16, 24)),
        ("bfloat16", tiles(512, 512, 512)),
        (
            "bfloat16",
            GroupedMatmulConfig(
                GroupedMatmulTiles(64, 136, 40), GroupedMatmulTiles(16, 64, 128), GroupedMatmulTiles(40, 24, 16)
            ),
        ),
    ],
    ids=["small", "large", "unlike"],
)
def test_tiles_change_nothing(dtype, config):
    check(Problem(sizes=(30, 3, 14), tokens=60, k=60, n=140, activation="gelu", dtype=dtype), config)


def test_more_than_one_tile_of_the_elementwise_kernel():
    check(Problem(sizes=(200, 80), tokens=300, k=8, n=600, activation="relu"), tiles(512, 1024, 512))


def test_a_forward_that_saves_nothing_gives_the_same():
    problem = Problem(dtype="bfloat16", activation="silu")
    inputs = problem.inputs(native(problem))
    config = choose_config(problem.spec, INTERPRET)
    saved, plain = (
        quickly_jitted(partial(kernels.forward, spec, config, INTERPRET))(*inputs)
        for spec in (problem.spec, replace(problem.spec, save_preactivations=False))
    )
    assert plain[1] is None
    np.testing.assert_array_equal(plain[0], saved[0])
    assert not saved[1][:, :, sum(problem.sizes) :].any()


def test_two_runs_are_bit_equal():
    problem = Problem(dtype="bfloat16")
    run = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))
    first, second = (run(native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


def test_nan_and_infinity_stay_in_their_row_and_group():
    for dtype in ("float32", "bfloat16"):
        problem = Problem(sizes=(3, 4), tokens=8, k=6, n=3, dtype=dtype)
        arrays = native(problem)
        arrays["lhs"] = arrays["lhs"].at[0, 1, 4].set(jnp.nan)
        arrays["dout"] = arrays["dout"].at[0, 5, 0].set(jnp.inf)
        ours = quickly_jitted(lambda arrays, problem=problem: forward_and_backward(problem, arrays))(arrays)
        ours = {name: np.asarray(array, np.float32) for name, array in ours.items()}
        assert np.isnan(ours["out"][0, 1]).all()
        assert np.isfinite(np.delete(ours["out"][0], 1, axis=0)).all()
        assert np.isfinite(np.delete(ours["dlhs"][0], 5, axis=0)).all()
        assert np.isnan(ours["drhs"][0, 0, 4]).all()
        assert np.isfinite(np.delete(ours["drhs"][0, 0], 4, axis=0)).all()
        assert np.isfinite(ours["drhs"][0, 1, :, 1:]).all()
        assert np.isinf(ours["drhs"][0, 1, :, 0]).all()


def test_sizes_that_cannot_be_touch_nothing_else():
    problem = Problem(sizes=(20, 30), tokens=50, k=16, n=16, dtype="bfloat16")
    run = quickly_jitted(lambda arrays: forward_and_backward(problem, arrays))
    for wrong, right in (([60, 2**31 - 1], [50, 0]), ([-5, 50], [0, 50])):
        ours, exact = (
            run(native(problem) | {"group_sizes": jnp.array([sizes], jnp.int32)}) for sizes in (wrong, right)
        )
        for name, result in exact.items():
            np.testing.assert_array_equal(ours[name], result, err_msg=name)


def test_the_list_of_visits():
    """Each row is visited once for its group, the visits of a block follow each other, and there is room for all."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        tokens, groups, block = (int(rng.integers(*bounds)) for bounds in ((1, 90), (1, 9), (1, 40)))
        sizes = rng.multinomial(rng.integers(0, tokens + 1), np.ones(groups) / groups).astype(np.int32)
        for every in (False, True):
            visits = Visits.of(jnp.asarray(sizes)[None], tokens, block, every)
            owners = np.repeat(np.arange(groups + 1), [*sizes, 0 if every else tokens - sizes.sum()])
            seen = np.full(len(owners), -1)
            group, tile, first, end = map(np.asarray, visits.arrays)
            assert (np.diff(tile) >= 0).all()
            assert (np.diff(group) >= 0).all()
            assert 0 <= tile.min() <= tile.max() < -(-tokens // block)
            for owner, number, begin, stop in zip(group, tile, first, end, strict=True):
                rows = slice(max(begin, number * block), max(min(stop, (number + 1) * block), begin))
                assert (seen[rows] == -1).all()
                seen[rows] = owner
            assert (seen == owners).all()
            if every:
                assert set(group) == set(range(groups))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_races_and_reads_before_writes(activation):
    """The strict interpreter, which simulates a chip's copies and memories, finds no race and no read of nothing."""
    problem = Problem(sizes=(5, 0, 14), tokens=24, k=24, n=40, activation=activation, dtype="bfloat16")
    with interpreter(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        check(problem, tiles(8, 32, 16))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("siblings", [0, 1])
def test_blocks_of_the_next_group_are_there_in_time(siblings):
    """Of matrices that a step sums whole; cores that share a grid leave none to the other."""
    target, config = replace(INTERPRET, siblings=siblings), tiles(8, 32, 64)
    problem = Problem(sizes=(5, 0, 14, 0, 3), tokens=24, k=24, n=64, dtype="bfloat16")
    arrays = native(problem)
    inputs = (arrays["lhs"], arrays["rhs"], None, arrays["group_sizes"], *[None] * 4)
    with interpreter(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=1 + siblings)):
        out, _ = jax.block_until_ready(kernels.forward(problem.spec, config, target, *inputs))
    assert not interpret_pallas_call.races.races_found
    expected, _ = kernels.forward(problem.spec, tiles(8, 32, 8), target, *inputs)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2**-7)


def test_tiles_that_a_tpu_cannot_have():
    with pytest.raises(ValueError, match="block_k: got 12; it must be a positive multiple of 8"):
        forward_and_backward(Problem(), native(Problem()), tiles(64, 64, 12))


@pytest.mark.parametrize(
    ("chip", "rows", "n", "k", "columns", "step"),
    [
        ("v6e", 1024, 14336, 4096, 4096, 4096),  # the whole sum in a step already: as wide as the VMEM holds
        ("v6e", 1024, 4096, 14336, 1024, 16384),  # a matrix that stays in VMEM for its group
        ("v6e", 16384, 4096, 65536, 4096, 4096),  # no VMEM holds the whole sum
        ("v6e", 0, 1024, 14336, 1024, 4096),  # one visit a group reads its matrix once in any steps
        ("v6e", 256, 768, 2048, 1024, 4096),  # no wider than the array
        ("v7x", 1024, 4096, 14336, 2048, 4096),  # half the VMEM
    ],
)
def test_tiles_are_those_that_read_least(chip, rows, n, k, columns, step):
    config = choose_config(GroupedMatmulSpec("bfloat16"), get_target(chip), GroupedMatmulSizes(rows, 8, n, k))
    assert (config.forward.block_n, config.forward.block_k) == (columns, step)


def test_supports():
    bfloat16, float16 = (GroupedMatmulSpec(dtype) for dtype in ("bfloat16", "float16"))
    for name in ("v4", "v5e", "v5p", "v6e", "v7x"):
        assert kernels.supports(bfloat16, get_target(name), True) == ()
        assert all("bfloat16" in reason for reason in kernels.supports(float16, get_target(name), True))
    assert kernels.supports(float16, INTERPRET, True) == ()
    assert "triton" in kernels.supports(bfloat16, get_target("sm_90"), False)[0]
    assert "float64" in kernels.supports(GroupedMatmulSpec("float64"), INTERPRET, False)[0]
