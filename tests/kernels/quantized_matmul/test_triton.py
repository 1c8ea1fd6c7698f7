"""The Triton kernels, interpreted, against torch: at most twice the error of torch in the same precision."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mutations import describe
from oracles import assert_within
from quantized_problems import ALONE, KINDS, Problem
from sweeps import swept

from crosstile.kernels.quantized_matmul.spec import INPUTS, QuantizedMatmulSpec
from crosstile.kernels.quantized_matmul.tiles import QuantizedMatmulConfig, QuantizedMatmulTiles, choose_config
from crosstile.kernels.tiles.formats import FORMATS, stored
from crosstile.kernels.tiles.launch import Array, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

pytest.importorskip("triton")
from crosstile.kernels.quantized_matmul import triton as kernels
from crosstile.kernels.tiles.triton_interpreter import run


def tiles(*blocks: int, splits: int = 0) -> QuantizedMatmulConfig:
    """The same tile for every kernel."""
    return QuantizedMatmulConfig(*[QuantizedMatmulTiles(*blocks)] * 3, splits=splits, processors=0 if splits else 5)


def forward_and_backward(problem: Problem, config: Any = None, arrays: dict | None = None) -> dict:
    """out and the gradients, by name."""
    named = dict(arrays or problem.native())
    spec, config = problem.spec, config or choose_config(problem.spec, INTERPRET)
    inputs = kernels.completed(spec, config, INTERPRET, tuple(named.get(name) for name in INPUTS))
    named |= {name: array for name, array in zip(INPUTS, inputs, strict=True) if array is not None}
    described = tuple(map(describe, inputs))
    plan = kernels.forward(spec, config, *described)
    named |= dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))
    outputs = (describe(named["out"]), describe(named.get("preactivation")))
    plan = kernels.backward(spec, config, described, outputs, (describe(named["dout"]), None))
    results = dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))
    return {"out": named["out"], **results}


def check(problem: Problem, config: Any = None, arrays: dict | None = None) -> None:
    ours = forward_and_backward(problem, config, arrays)
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    check(Problem(kind, batch=1, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", swept(["float32", "float16"], lambda dtype: dtype == "float16"))
@pytest.mark.parametrize("kind", ["int4-128-zeros", "mxfp8", "int8-int8", "mxfp4-mxfp8"])
def test_dtypes(kind, dtype):
    check(Problem(kind, k=130, batch=1, dtype=dtype))


@pytest.mark.parametrize(
    ("bias", "residual", "activation"),
    [(False, False, None), (True, False, None), (False, True, None), (True, True, "relu")],
)
@pytest.mark.parametrize("kind", ["int4-32", "fp8-fp8"])
def test_epilogues(kind, bias, residual, activation):
    check(Problem(kind, m=5, k=80, n=33, bias=bias, residual=residual, activation=activation))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (33, 1, 17), (1, 257, 33), (0, 33, 5), (3, 0, 5), (3, 33, 0), (70, 65, 5)]
)
@pytest.mark.parametrize(
    "kind", swept(["int8", "int4-64", "int8-int8", "mxfp8-mxfp8"], lambda kind: kind in ("int8", "mxfp8-mxfp8"))
)
def test_sizes(kind, m, k, n):
    check(Problem(kind, m, k, n))


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "k", "n"), list(itertools.product((1, 33, 65), (31, 128, 257), (16, 33))))
def test_all_sizes(kind, m, k, n):
    for dtype in ("float32", "bfloat16"):
        check(Problem(kind, m, k, n, dtype=dtype))


def test_empty_batch():
    check(Problem(batch=0))


@pytest.mark.parametrize(
    "kind", swept(["int4-128-zeros", "int8-int8", "mxfp4-mxfp8"], lambda kind: kind == "mxfp4-mxfp8")
)
@pytest.mark.parametrize(
    "config", [tiles(16, 64, 16), tiles(64, 16, 128), tiles(32, 32, 64, splits=3)], ids=["wide", "long", "cut"]
)
def test_tiles_change_nothing(kind, config):
    check(Problem(kind, m=20, k=300, n=40, batch=1), config)


@pytest.mark.parametrize("kind", ["int4-32", "int8-int8"])
def test_more_splits_than_steps(kind):
    check(Problem(kind, m=3, k=40, n=20), tiles(16, 32, 64, splits=50))


def test_sums_are_cut_where_tiles_are_few():
    spec = QuantizedMatmulSpec("bfloat16", "bfloat16", "int4", 128)
    config = choose_config(spec, get_target("sm_90"))
    arrays = [contiguous(shape, "bfloat16") for shape in ((1, 1, 14336), (1, 7168, 4096), (1, 112, 4096))]
    few = kernels.forward(spec, config, *arrays, None, None, None)
    assert [launch.constants.get("SPLITS") for launch in few.launches] == [4, 4]
    many = kernels.forward(spec, config, contiguous((1, 4096, 14336), "bfloat16"), *arrays[1:], None, None, None)
    assert [launch.constants["SPLITS"] for launch in many.launches] == [1]


@pytest.mark.parametrize("kind", ["int8-zeros", "int4-32", "fp8", "int8-int8", "mxfp4-mxfp8"])
def test_any_strides(kind):
    problem = Problem(kind, m=20, k=70, n=40)
    arrays = problem.native()
    spread = {name: np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype) for name, array in arrays.items()}
    for name, array in arrays.items():
        spread[name][..., ::2] = array
        arrays[name] = spread[name][..., ::2]
    arrays["a"] = np.asarray(arrays["a"].swapaxes(1, 2), order="C").swapaxes(1, 2)
    arrays["values"] = np.asarray(arrays["values"].swapaxes(1, 2), order="C").swapaxes(1, 2)
    arrays["residual"] = arrays["residual"][:, ::-1]
    problem.exact_arrays["residual"] = problem.exact_arrays["residual"][:, ::-1]
    check(problem, arrays=arrays)


@pytest.mark.parametrize("kind", ["int4-64", "int8-int8"])
def test_one_row_for_all(kind):
    problem = Problem(kind, m=9, k=70, n=20)
    for name in ("a", "residual", "dout"):
        problem.exact_arrays[name] = np.broadcast_to(
            problem.exact_arrays[name][:, :1], problem.exact_arrays[name].shape
        )
    arrays = problem.native()
    for name in ("a", "residual", "dout"):
        arrays[name] = np.broadcast_to(np.array(arrays[name][:, :1]), arrays[name].shape)
    check(problem, arrays=arrays)


def test_far_elements_have_wide_offsets():
    spec = QuantizedMatmulSpec("bfloat16", "bfloat16", "int8")
    config = choose_config(spec, get_target("sm_90"))
    far = Array((1, 128, 4096), "bfloat16", (0, 2**26, 1))
    near = contiguous(far.shape, "bfloat16")
    weight = contiguous((1, 4096, 512), "int8"), contiguous((1, 1, 512), "float32")
    wide = [
        kernels.forward(spec, config, a, *weight, None, None, None).launches[0].constants["WIDE"] for a in (near, far)
    ]
    assert wide == [False, True]


def test_two_runs_are_bit_equal():
    problem = Problem("int4-32", m=5, batch=1, dtype="bfloat16")
    first, second = (forward_and_backward(problem, tiles(16, 32, 32, splits=4)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


@pytest.mark.parametrize("kind", [*ALONE[::3], "int8-int8", "fp8-fp8", "mxfp4-mxfp8"])
def test_nan_and_infinity_stay_in_their_row(kind):
    problem = Problem(kind, m=6, k=40, n=20, batch=1, bias=False, residual=False, activation=None)
    arrays = problem.native()
    clean = forward_and_backward(problem, arrays=arrays)["out"]
    arrays["a"][0, 1, 3], arrays["a"][0, 4, 39] = np.nan, np.inf
    out = forward_and_backward(problem, arrays=arrays)["out"]
    untouched = [0, 2, 3, 5]
    np.testing.assert_array_equal(out[0, untouched], clean[0, untouched])
    assert np.isnan(out[0, 1]).all()
    assert not np.isfinite(out[0, 4]).any()


@pytest.mark.parametrize("kind", ["int4-32", "mxfp4", "fp8-64"])
def test_a_spoilt_group_spoils_its_column(kind):
    problem = Problem(kind, m=3, k=100, n=20, batch=1, bias=False, residual=False, activation=None)
    w = np.array(problem.exact_weight)
    w[0, 70, 5] = np.nan
    arrays = problem.native() | dict(
        zip(("values", "scales"), stored(np, w, FORMATS[problem.options["form"]], problem.group_size)[:2], strict=True)
    )
    out = forward_and_backward(problem, arrays=arrays)["out"]
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(np.arange(20) == 5, out.shape))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a_format", [None, "int8", "float8_e4m3fn", "mxfp8"])
def test_what_chips_multiply(target, a_format):
    name = {None: "int4", "mxfp8": "mxfp4"}.get(a_format, a_format)
    spec = QuantizedMatmulSpec("bfloat16", "bfloat16", name, 32 if a_format in (None, "mxfp8") else 0, a_format)
    reasons = kernels.supports(spec, get_target(target), True)
    lacks = {"float8_e4m3fn": ("sm_80", "gfx942"), "mxfp8": ("sm_80", "sm_90", "gfx942")}.get(a_format, ())
    if get_target(target).is_tpu:
        assert any("runs on GPUs" in reason or "run on GPUs" in reason for reason in reasons)
    elif target in lacks:
        assert len(reasons) == 1
        assert reasons[0].startswith(f"activations: got {a_format}, and")
    else:
        assert not reasons


def test_float64_is_refused():
    spec = replace(QuantizedMatmulSpec("float64", "float64", "int8"))
    assert kernels.supports(spec, INTERPRET, True)[0].startswith("dtype: got float64")
