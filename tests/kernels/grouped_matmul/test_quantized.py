"""grouped_matmul of quantised matrices: the definition in float64, and both kernels, interpreted, against torch.

The interpreters fill what lies outside an array, and results before they are written, with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from grouped_problems import OPERANDS, Problem
from grouped_runs import by_pallas, by_triton, check_pallas, check_triton, native, quickly_jitted, tiles, triton_forward
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from mutations import describe
from oracles import assert_equal_in_float64, assert_within, finite_differences
from quantized_problems import ALONE
from sweeps import one_in

from crosstile.kernels.grouped_matmul import pallas as pallas_kernels
from crosstile.kernels.grouped_matmul import reference
from crosstile.kernels.grouped_matmul.spec import GroupedMatmulSpec
from crosstile.kernels.grouped_matmul.tiles import choose_config
from crosstile.kernels.tiles.launch import Array, contiguous
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

pytest.importorskip("triton")
from crosstile.kernels.grouped_matmul import triton as triton_kernels

CHECKS = pytest.mark.parametrize("check", [check_triton, check_pallas], ids=["triton", "pallas"])
LESS = {"sizes": (3, 0, 14), "tokens": 20, "n": 20}


def by_definition(problem: Problem) -> dict:
    inputs = problem.inputs(problem.exact_arrays)
    spec = replace(problem.spec, dtype="float64")
    outputs = reference.forward(spec, *inputs)
    gradients = reference.backward(spec, inputs, outputs, (problem.exact_arrays["dout"], None))
    assert len(gradients) == len(OPERANDS)
    assert all(gradient is None for gradient in gradients[1:])
    return {"out": outputs[0], "dlhs": gradients[0]}


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_definition_is_that_of_what_the_codes_stand_for(kind, activation):
    problem = Problem(kind=kind, k=300, activation=activation, batch=2)
    assert_equal_in_float64(by_definition(problem), problem.answers())


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_dlhs_by_finite_differences(activation):
    problem = Problem(sizes=(1, 0, 2), tokens=4, k=40, n=2, kind="int4-32", activation=activation)
    dout = np.nan_to_num(problem.exact_arrays["dout"])

    def loss(lhs):
        inputs = problem.inputs({**problem.exact_arrays, "lhs": lhs})
        return float((reference.forward(replace(problem.spec, dtype="float64"), *inputs)[0] * dout).sum())

    found = finite_differences(loss, {"lhs": np.nan_to_num(problem.exact_arrays["lhs"])}, "lhs")
    np.testing.assert_allclose(by_definition(problem)["dlhs"], found, rtol=1e-6, atol=1e-8 * np.abs(found).max())


@CHECKS
@pytest.mark.parametrize("kind", one_in(2, ALONE))
def test_every_kind(check, kind):
    """Where k is no multiple of a group, nor of the rows of codes that share bytes; and with a gate every other."""
    activation = "silu" if ALONE.index(kind) % 2 else None
    check(Problem(kind=kind, k=300, activation=activation, dtype="bfloat16", **LESS))


@CHECKS
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", one_in(3, ["int4-128-zeros", "mxfp4", "int8"]))
def test_dtypes(check, kind, dtype):
    check(Problem(kind=kind, k=140, dtype=dtype, activation="gelu" if kind == "int8" else None, **LESS))


@CHECKS
@pytest.mark.parametrize(
    ("sizes", "tokens"), [((), 9), ((0, 0), 0), ((0, 0, 0), 20), ((0, 37, 0), 37), ((16, 16, 0, 0), 40)], ids=str
)
def test_sizes_of_groups(check, sizes, tokens):
    check(Problem(sizes, tokens, k=33, n=20, kind="int4-32", dtype="bfloat16"))


@CHECKS
@pytest.mark.parametrize(
    ("k", "n", "kind"), [(1, 1, "mxfp8"), (0, 5, "int4-32"), (5, 0, "int8"), (257, 3, "int4-zeros"), (1, 70, "fp8")]
)
def test_sizes_of_matrices(check, k, n, kind):
    check(Problem(sizes=(3, 0, 8), tokens=12, k=k, n=n, kind=kind, activation="relu", dtype="bfloat16"))


@CHECKS
def test_batches_have_matrices_of_their_own(check):
    check(Problem(batch=2, k=70, kind="int8-64-zeros", activation="silu", dtype="bfloat16", **LESS))
    check(Problem(batch=0, kind="int4-32"))


@pytest.mark.parametrize("blocks", [(16, 64, 16), (64, 16, 128)], ids=str)
@pytest.mark.parametrize("kind", ["int4-64", "int8-zeros"])
def test_tiles_change_nothing_in_triton(kind, blocks):
    check_triton(Problem(kind=kind, k=300, activation="silu", **LESS), tiles(*blocks))


@pytest.mark.parametrize("blocks", [(8, 16, 128), (512, 512, 2048)], ids=str)
@pytest.mark.parametrize("kind", ["int4-32", "int8-zeros"])
def test_tiles_change_nothing_in_pallas(kind, blocks):
    """More than one step along k, with a tail, and more than one along n, which dlhs sums."""
    problem = Problem(kind=kind, sizes=(20, 0, 14), tokens=40, k=600, n=40, activation="silu", dtype="bfloat16")
    check_pallas(problem, tiles(*blocks))


@CHECKS
@pytest.mark.sweep
@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize(("k", "n"), list(itertools.product((31, 128, 257, 600), (16, 33))))
def test_all_sizes(check, kind, k, n):
    for dtype, activation in itertools.product(("float32", "bfloat16"), (None, "gelu_tanh")):
        check(Problem(k=k, n=n, kind=kind, activation=activation, dtype=dtype))


@pytest.mark.parametrize("kind", ["int8-64-zeros", "int4-32", "fp8"])
def test_any_strides(kind):
    """Nothing between the elements of a view is read, whichever way codes and scales lie."""
    problem = Problem(kind=kind, k=70, activation="relu", **LESS)
    for name, array in problem.quantized.items():
        spread = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        spread[..., ::2] = array
        problem.quantized[name] = spread[..., ::2]
    check_triton(problem)
    problem = Problem(kind=kind, k=70, **LESS)
    problem.quantized["rhs"] = np.ascontiguousarray(problem.quantized["rhs"])
    problem.quantized["rhs_scales"] = np.asfortranarray(problem.quantized["rhs_scales"])
    check_triton(problem)


def test_far_codes_have_wide_offsets():
    spec = GroupedMatmulSpec("bfloat16", format="int8")
    config = choose_config(spec, get_target("sm_90"))
    lhs, sizes, scales = contiguous((1, 64, 4096), "bfloat16"), contiguous((1, 2), "int32"), (1, 2, 1, 512)
    rest = (None, sizes, contiguous(scales, "float32"), None, None, None)
    near = contiguous((1, 2, 4096, 512), "int8")
    far = Array(near.shape, "int8", (2**42, 2**41, 2**26, 1))
    plans = [triton_kernels.forward(spec, config, lhs, rhs, *rest) for rhs in (near, far)]
    assert [plan.launches[-1].constants["WIDE"] for plan in plans] == [False, True]


@pytest.mark.parametrize("run", [by_triton, by_pallas], ids=["triton", "pallas"])
def test_two_runs_are_bit_equal(run):
    problem = Problem(kind="int4-32", k=70, dtype="bfloat16", **LESS)

    once = quickly_jitted(partial(by_pallas, problem)) if run is by_pallas else partial(by_triton, problem)
    first, second = (once(native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


@pytest.mark.parametrize("kind", ["int4-32", "fp8"])
def test_nan_and_infinity_stay_in_their_row(kind):
    problem = Problem(sizes=(3, 3), tokens=7, k=40, n=20, kind=kind, dtype="bfloat16")
    arrays = native(problem)
    arrays["lhs"][0, 1, 3], arrays["lhs"][0, 4, 39] = np.nan, np.inf
    outs = [
        quickly_jitted(partial(by_pallas, problem))(arrays)["out"],
        by_triton(problem, arrays)["out"],
    ]
    for out in (np.asarray(out, np.float32)[0] for out in outs):
        assert np.isnan(out[1]).all()
        assert not np.isfinite(out[4]).any()
        assert np.isfinite(np.delete(out, [1, 4], axis=0)).all()


@pytest.mark.parametrize(
    ("activation", "blocks"),
    [(None, (8, 16, 128)), ("relu", (8, 32, 512))],
    ids=["steps", "numbers shared by visits"],
)
def test_races_and_reads_before_writes(activation, blocks):
    """The strict interpreter, which simulates a chip's copies and memories, finds no race and no read of nothing."""
    problem = Problem(sizes=(11, 0, 8), tokens=24, k=300, n=20, kind="int4-64", activation=activation, dtype="bfloat16")
    with interpreter(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        check_pallas(problem, tiles(*blocks))
    assert not interpret_pallas_call.races.races_found


def test_a_forward_that_saves_nothing_gives_the_same():
    problem = Problem(kind="mxfp4", k=40, activation="silu", dtype="bfloat16", **LESS)
    inputs, config = problem.inputs(native(problem)), choose_config(problem.spec, INTERPRET)
    saved, plain = (
        quickly_jitted(partial(pallas_kernels.forward, spec, config, INTERPRET))(*inputs)
        for spec in (problem.spec, replace(problem.spec, save_preactivations=False))
    )
    assert plain[1] is None
    np.testing.assert_array_equal(plain[0], saved[0])
    arrays = native(problem) | problem.quantized
    plain = triton_forward(replace(problem.spec, save_preactivations=False), arrays, config)
    assert_within({"out": plain["out"]}, problem.answers("bfloat16"), problem.answers(), "bfloat16")


@pytest.mark.parametrize("target", TARGETS)
def test_every_chip_is_served(target):
    module = triton_kernels if get_target(target).is_gpu else pallas_kernels
    for name in ("int8", "int4", "float8_e4m3fn", "mxfp8", "mxfp4"):
        spec = GroupedMatmulSpec("bfloat16", format=name, group_size=32 if name.startswith("mx") else 0)
        assert module.supports(spec, get_target(target), True) == ()


def test_float8_codes_are_read_as_bytes():
    problem = Problem(kind="fp8", k=20, **LESS)
    inputs = problem.inputs(native(problem))
    made = triton_kernels.completed(problem.spec, None, INTERPRET, inputs)
    assert made[1].dtype == np.uint8
    np.testing.assert_array_equal(made[1], inputs[1].view(np.uint8))
    described = triton_kernels.completed(problem.spec, None, INTERPRET, tuple(map(describe, inputs)))
    assert [array and array.dtype for array in described[1:3]] == ["uint8", None]
