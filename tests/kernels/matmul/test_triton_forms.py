"""The forms of a product on GPUs, interpreted: cut sums, programs that walk many tiles, tensor descriptors, parts of
float32. Each must compute what the plain form computes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from matmul_problems import LAYOUTS, OPERANDS, Problem, lay_out
from matmul_runs import describe, forward, forward_and_backward, native
from oracles import assert_within
from sweeps import swept

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan
from crosstile.kernels.matmul import triton as kernels
from crosstile.kernels.matmul.spec import PRECISIONS, MatmulSpec
from crosstile.kernels.matmul.tiles import MatmulConfig, choose_config, of_rows, parts_of_sums
from crosstile.kernels.tiles.launch import Array, contiguous
from crosstile.kernels.tiles.targets import TARGETS, get_target

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]
TILES = MatmulConfig(16, 32, 16, group_m=2)
FORMS = {
    "plain": TILES,
    "cut in 2": replace(TILES, split_k=2),
    "cut in 3": replace(TILES, split_k=3),
    "cut at every step": replace(TILES, split_k=99),
    "walking": replace(TILES, processors=5, persistent=1),
    "one program": replace(TILES, processors=1, persistent=1),
    "descriptors": replace(TILES, descriptors=1),
    "walking by descriptors": replace(TILES, processors=3, persistent=1, descriptors=1, specialize=1),
    "cut by descriptors": replace(TILES, split_k=3, processors=3, persistent=1, descriptors=1),
}
MOST_FORMS = swept(FORMS, lambda form: form in ("cut in 2", "one program"))
LONG = Problem(m=40, k=2700, n=64, batch=1, activation="silu", bias=True, residual=True)
LONG_STEPS = replace(TILES, block_k=64)


def check(problem: Problem, config: MatmulConfig, arrays: dict | None = None) -> None:
    ours = forward_and_backward(problem, arrays or native(problem), config)
    assert_within(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)


@pytest.mark.parametrize("form", MOST_FORMS)
def test_every_epilogue(form):
    check(Problem(m=17, k=72, n=40, activation="gelu", bias=True, residual=True, dtype="float16"), FORMS[form])


@pytest.mark.parametrize("form", MOST_FORMS)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    swept([(1, 1, 1), (33, 0, 40), (0, 33, 40), (17, 65, 33), (32, 64, 32)], lambda sizes: sizes[0] in (1, 32)),
)
def test_sizes(form, m, k, n):
    check(Problem(m, k, n, batch=1, activation="relu", bias=True, residual=True), FORMS[form])


@pytest.mark.parametrize("form", ["cut in 3", "walking by descriptors", "cut by descriptors"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(form, layout):
    problem = Problem(m=32, k=64, n=48, batch=1, bias=True, residual=True)
    arrays = {name: lay_out(array, layout) for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays, FORMS[form])
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


def launches_of_long(config: MatmulConfig) -> tuple:
    """Those of the forward, which must be right."""
    arrays = native(LONG)
    out, _ = forward(LONG.spec, arrays, config)
    assert_within({"out": out}, LONG.answers("float32"), LONG.answers(), "float32")
    return kernels.forward(LONG.spec, config, *(describe(arrays[name]) for name in OPERANDS)).launches


def test_the_last_round_alone_is_cut():
    whole, parts, adding = launches_of_long(replace(LONG_STEPS, processors=4))
    assert (whole.grid, parts.grid) == ((4,), (4,))  # of six tiles, the last two in two parts each
    assert parts.outputs == ("out_parts",)
    assert adding.outputs == ("preactivation", "out")
    assert {"preactivation", "out"} <= set(adding.inputs)  # the whole tiles in them stay


def test_sums_are_cut_where_tiles_are_few():
    cut, adding = launches_of_long(replace(LONG_STEPS, processors=40))
    assert cut.grid == (36,)  # six tiles in six parts each
    assert "out" not in adding.inputs


@pytest.mark.parametrize("form", ["cut in 3", "cut by descriptors"])
def test_two_runs_of_cut_sums_are_bit_equal(form):
    problem = Problem(m=17, k=72, n=32, batch=1, activation="silu", bias=True, residual=True)
    first, second = (forward_and_backward(problem, native(problem), FORMS[form]) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


@pytest.mark.parametrize("m", [16, 4096])
@pytest.mark.parametrize("split_k", [0, 1, 2, 7, 1000])
def test_every_step_belongs_to_one_part(m, split_k):
    config = MatmulConfig(128, 256, 64, processors=132, split_k=split_k)
    for tiles, steps in itertools.product((0, 1, 7, 66, 131, 132, 133, 150, 264, 1000), (0, 1, 5, 64, 1024)):
        whole, parts = parts_of_sums(config, m, tiles, steps)
        assert 0 <= whole <= tiles
        assert parts >= 1
        assert (parts == 1) == (whole == tiles) or not tiles
        length = -(-steps // parts)
        assert (parts - 1) * length < max(1, steps) <= max(1, parts * length)  # none is empty, none is left out
        if split_k == 0 and parts > 1:
            assert (tiles - whole) * parts <= 132
            assert whole % 132 == 0


def test_without_knowing_the_processors_nothing_is_cut():
    assert parts_of_sums(MatmulConfig(128, 256, 64), 4096, 1, 10000) == (1, 1)


@pytest.mark.parametrize("target", GPUS)
def test_forms_chosen_by_shape(target):
    """Decoding and small weights' gradients are cut; large products are not, and walk where descriptors load them."""
    config = choose_config(MatmulSpec("bfloat16", "bfloat16"), get_target(target))

    def chosen(m, k, n):
        arrays = (contiguous((1, m, k), "bfloat16"), contiguous((1, k, n), "bfloat16"))
        return kernels.forward(MatmulSpec("bfloat16", "bfloat16"), config, *arrays, None, None).launches

    assert len(chosen(512, 16384, 512)) == 2
    assert len(chosen(16, 14336, 4096)) == 2
    skinny, large = chosen(16, 4096, 65536)[0].constants, chosen(16384, 4096, 16384)[0]
    assert skinny["BLOCK_M"] == 16
    assert (skinny["BLOCK_N"], skinny["BLOCK_K"]) == (config.skinny_n, config.skinny_k)
    assert large.constants["PERSISTENT"] == large.constants["DESCRIPTORS"] == (target in ("sm_90", "sm_100"))
    assert large.constants["SPECIALIZE"] == (target == "sm_100")
    if large.constants["PERSISTENT"]:
        assert large.grid == (get_target(target).processors,)


def test_rows_decide_the_skinny_tile():
    config = MatmulConfig(128, 256, 64, num_warps=8, skinny_n=64, skinny_k=128)
    assert of_rows(config, 65) == config
    assert (of_rows(config, 64).block_n, of_rows(config, 64).block_k) == (64, 128)
    plain = replace(config, skinny_n=0, skinny_k=0)
    assert of_rows(plain, 1) == plain


@pytest.mark.parametrize(
    ("a", "loads"),
    [
        (Array((1, 64, 128), "float16", (8192, 128, 1)), True),
        (Array((1, 64, 128), "float16", (8192, 1, 64)), True),
        (Array((1, 64, 128), "float16", (8192, 1000, 1)), True),
        (Array((1, 64, 128), "float16", (8192, 1001, 1)), False),
        (Array((1, 64, 128), "float16", (8192, 256, 2)), False),
        (Array((1, 64, 128), "float16", (8192, 0, 1)), False),
        (Array((1, 64, 128), "float16", (8192, -128, 1)), False),
        (Array((1, 64, 128), "float16", (8192, 128, 1), aligned=False), False),
        (Array((2, 64, 128), "float16", (8192, 128, 1)), False),
        (Array((1, 64, 0), "float16", (0, 1, 1)), False),
    ],
)
def test_which_arrays_the_copy_engine_loads(a, loads):
    """Its rows or columns must be runs that begin at multiples of 16 bytes, of one matrix."""
    b = contiguous((a.shape[0], a.shape[2], 48), "float16")
    (launch,) = kernels.forward(MatmulSpec("float16", "float16"), FORMS["descriptors"], a, b, None, None).launches
    assert launch.constants["DESCRIPTORS"] is loads
    forms = ("DESCRIPTORS", "SPECIALIZE", "DESCRIBED")
    assert launch.without_memory == (dict.fromkeys(forms, False) if loads else {})


@pytest.mark.parametrize(("n", "stores"), [(48, True), (44, False)])
def test_the_copy_engine_stores_rows_that_begin_at_16_bytes(n, stores):
    a, b = contiguous((1, 64, 128), "float16"), Array((1, 128, n), "float16", (128 * n, 1, 128))
    (launch,) = kernels.forward(MatmulSpec("float16", "float16"), FORMS["descriptors"], a, b, None, None).launches
    assert launch.constants["DESCRIPTORS"]
    assert launch.constants["DESCRIBED"] is stores


def test_amd_is_told_the_size_of_its_matrix_instructions():
    a = contiguous((1, 256, 256), "float16")
    for target in GPUS:
        config = choose_config(MatmulSpec("float16", "float16"), get_target(target))
        (launch,) = kernels.forward(MatmulSpec("float16", "float16"), config, a, a, None, None).launches
        assert launch.options == ({"matrix_instr_nonkdim": 16} if target.startswith("gfx") else {})
    with pytest.raises(ValueError, match="matrix_size is 8; it must be 16 or 32, or 0"):
        kernels.forward(MatmulSpec("float16", "float16"), MatmulConfig(64, 64, 64, matrix_size=8), a, a, None, None)


def test_a_transposed_view_of_an_unaligned_array_is_unaligned():
    weight = Array((1, 64, 128), "float16", (8192, 128, 1), aligned=False)
    gradient = contiguous((1, 32, 128), "float16")
    x = contiguous((1, 32, 64), "float16")
    plan = kernels.backward(
        MatmulSpec("float16", "float16"),
        FORMS["descriptors"],
        (x, weight, None, None),
        (gradient, None),
        (gradient, None),
    )
    assert [launch.constants["DESCRIPTORS"] for launch in plan.launches] == [False, True]


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x6"])
@pytest.mark.parametrize("form", ["plain", "cut by descriptors"])
def test_parts_of_float32_are_as_exact_as_float32(precision, form):
    check(Problem(m=17, k=200, n=32, batch=1, activation="gelu_tanh", bias=True, precision=precision), FORMS[form])


BOUNDS = {"tf32": 2.0**-9, "bf16x3": 2.0**-14, "tf32x3": 2.0**-20, "bf16x6": 2.0**-22}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_stated_error_of_parts(precision):
    """Beside |a| @ |b|, with one term a sum, so that it is the products' own error; the next precision is worse."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 64, 64)).astype(np.float32)
    a[0, :, 1:] = 0
    out = forward(MatmulSpec("float32", "float32", precision=precision), {"a": a, "b": b}, TILES)[0]
    exact = a.astype(np.float64) @ b
    error = np.max(np.abs(out - exact) / np.abs(exact))
    assert BOUNDS[precision] / 2**7 < error <= BOUNDS[precision]


def test_an_infinity_keeps_its_row_in_parts():
    a, b = np.ones((2, 1, 32, 32), np.float32) * np.float32(1.001)
    a[0, 3, 5], a[0, 7, 9] = np.inf, np.nan
    (out,) = forward(MatmulSpec("float32", "float32", precision="bf16x6"), {"a": a, "b": b}, TILES)
    np.testing.assert_array_equal(out[0, 3], np.inf)
    assert np.isnan(out[0, 7]).all()
    assert np.isfinite(np.delete(out[0], (3, 7), axis=0)).all()


def test_precisions_that_a_chip_does_not_have():
    for precision in PRECISIONS:
        spec = MatmulSpec("float32", "float32", precision=precision)
        assert kernels.supports(spec, get_target("sm_90"), True) == ()
        reasons = kernels.supports(spec, get_target("gfx942"), True)
        assert bool(reasons) == precision.startswith("tf32")
        assert all("bf16x6" in reason for reason in reasons)


@pytest.mark.parametrize("target", swept(GPUS, lambda target: target not in ("sm_100", "gfx950")))
def test_compiles_where_nothing_is_a_multiple_of_16(target):
    """Every epilogue at once, and the gradients."""
    spec = MatmulSpec("bfloat16", "bfloat16", "gelu", save_preactivation=True)
    a, b, residual = (contiguous((1, *size), "bfloat16") for size in ((1001, 1003), (1003, 1005), (1001, 1005)))
    inputs = (a, b, contiguous((1, 1005), "bfloat16"), residual)
    config = choose_config(spec, get_target(target))
    plans = (
        kernels.forward(spec, config, *inputs),
        kernels.backward(spec, config, inputs, (residual, residual), (residual, None)),
    )
    for facts in itertools.chain(*(compile_plan(plan, target) for plan in plans)):
        assert over_budget(facts, target) == (), facts


@pytest.mark.sweep
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_compiles_in_every_precision(target, precision):
    spec = MatmulSpec("float32", "float32", "gelu", True, precision)
    if kernels.supports(spec, get_target(target), True):
        pytest.skip("not offered there")
    config = choose_config(spec, get_target(target))
    for m in (16, 64, 512):
        a, b, residual = (contiguous((1, *size), "float32") for size in ((m, 4096), (4096, 512), (m, 512)))
        for facts in compile_plan(kernels.forward(spec, config, a, b, None, residual), target):
            assert over_budget(facts, target) == (), facts
