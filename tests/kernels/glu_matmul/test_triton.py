"""The Triton glu_matmul kernels, interpreted, against torch: at most twice the error of torch in the same precision."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from glu_problems import OPERANDS, Problem
from matmul_problems import LAYOUTS, lay_out
from oracles import assert_within

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan
from crosstile.kernels.glu_matmul import triton as kernels
from crosstile.kernels.glu_matmul.spec import ACTIVATIONS, GluMatmulSpec, saving
from crosstile.kernels.glu_matmul.tiles import GluMatmulConfig, GluMatmulTiles, choose_config
from crosstile.kernels.tiles.launch import Array, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target
from crosstile.kernels.tiles.triton_interpreter import run

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


def describe(array: np.ndarray) -> Array:
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def tiles(*blocks: int, **others: int) -> GluMatmulConfig:
    """The same tile for every kernel."""
    return GluMatmulConfig(*[GluMatmulTiles(*blocks, **others)] * 3)


def forward(spec: GluMatmulSpec, arrays: dict, config: GluMatmulConfig) -> dict:
    inputs = {name: arrays[name] for name in OPERANDS}
    plan = kernels.forward(spec, config, *map(describe, inputs.values()))
    return dict(zip(plan.outputs, run(plan, inputs), strict=True))


def forward_and_backward(problem: Problem, arrays: dict, config: GluMatmulConfig | None = None) -> dict:
    """out and the gradients, by name."""
    config = config or choose_config(problem.spec, INTERPRET)
    outputs = forward(problem.spec, arrays, config)
    described = tuple(describe(arrays[name]) for name in OPERANDS)
    saved = (describe(outputs["out"]), describe(outputs["preactivations"]))
    plan = kernels.backward(problem.spec, config, described, saved, (describe(arrays["dout"]), None))
    named = {**arrays, **outputs}
    results = run(plan, {name: named[name] for name in plan.inputs})
    return {"out": outputs["out"], **dict(zip(plan.outputs, results, strict=True))}


def native(problem: Problem) -> dict:
    kind = getattr(ml_dtypes, problem.dtype, problem.dtype)
    return {name: array.astype(kind) for name, array in problem.exact_arrays.items()}


def check(problem: Problem, config: GluMatmulConfig | None = None) -> None:
    ours = forward_and_backward(problem, native(problem), config)
    assert {result.dtype.name for result in ours.values()} == {problem.dtype}
    exact = problem.answers()
    assert set(ours) == set(exact)
    assert_within(ours, problem.answers(problem.dtype), exact, problem.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(Problem(activation=activation, batch=1, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtypes(dtype):
    check(Problem(dtype=dtype))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (1, 65, 33), (33, 1, 65), (0, 33, 65), (33, 0, 65), (33, 65, 0), (1, 0, 0)]
)
def test_sizes(m, k, n):
    check(Problem(m, k, n, batch=1, dtype="bfloat16"))


@pytest.mark.sweep
@pytest.mark.parametrize(("m", "k", "n"), list(itertools.product((0, 1, 33, 65), repeat=3)))
def test_all_sizes(m, k, n):
    check(Problem(m, k, n, batch=1, activation="gelu"))


def test_empty_batch():
    check(Problem(batch=0))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    """Any strides, and nothing between the elements of a view is read: it is NaN."""
    problem = Problem(m=20, k=33, n=17, activation="gelu")
    arrays = {name: lay_out(array, layout) for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays)
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


def test_every_array_with_a_layout_of_its_own():
    problem = Problem(m=20, k=33, n=17, activation="relu")
    layouts = dict(zip(("w_gate", "x", "dout", "w_up"), LAYOUTS[1:], strict=True))
    arrays = {name: lay_out(array, layouts[name]) for name, array in native(problem).items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    ours = forward_and_backward(problem, arrays)
    assert_within(ours, problem.answers("float32", exact), problem.answers(arrays=exact), "float32")


@pytest.mark.parametrize(
    "config",
    [
        tiles(16, 16, 16, group_m=1),
        tiles(128, 256, 64),
        GluMatmulConfig(GluMatmulTiles(32, 128, 16, 3), GluMatmulTiles(64, 16, 32), GluMatmulTiles(16, 64, 64)),
    ],
    ids=["small", "large", "unlike"],
)
def test_tiles_change_nothing(config):
    check(Problem(m=40, k=40, n=70, batch=1, activation="gelu_tanh"), config)


def test_a_forward_that_saves_nothing_gives_the_same():
    problem = Problem(dtype="bfloat16")
    config = choose_config(problem.spec, INTERPRET)
    saved = forward(problem.spec, native(problem), config)
    plain = forward(replace(problem.spec, save_preactivations=False), native(problem), config)
    assert set(plain) == {"out"}
    np.testing.assert_array_equal(plain["out"], saved["out"])


def test_two_runs_are_bit_equal():
    problem = Problem(m=40, batch=1)
    first, second = (forward_and_backward(problem, native(problem)) for _ in range(2))
    for name, result in first.items():
        np.testing.assert_array_equal(result, second[name], err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay_where_they_are(activation):
    """A NaN or an infinity of x reaches its own row, and no other."""
    arrays = native(Problem(m=5, n=3, batch=1))
    arrays["x"][0, 1, 4], arrays["x"][0, 3, 7] = np.nan, np.inf
    arrays["w_gate"][0, 7], arrays["w_up"][0, 7] = 1, -1
    spec = GluMatmulSpec("float32", activation)
    out = forward(spec, arrays, choose_config(spec, INTERPRET))["out"]
    assert np.isnan(out[0, 1]).all()
    np.testing.assert_array_equal(out[0, 3], -np.inf)
    assert np.isfinite(out[0, [0, 2, 4]]).all()


@pytest.mark.parametrize("name", ["x", "w_up"])
@pytest.mark.parametrize(("rows", "stride"), [(3, 2**30), (66, 2**25)], ids=["wide tile", "far tile"])
def test_offsets_past_32_bits(rows, stride, name):
    """Storage of 4 GiB, of which a few pages are touched."""
    storage = np.empty((rows - 1) * stride + 64, np.float16)
    problem = Problem(m=rows, k=rows, n=rows, batch=1, dtype="float16")
    arrays = native(problem)
    far = np.lib.stride_tricks.as_strided(storage, (1, rows, rows), (0, 2 * stride, 2))
    far[...] = arrays[name]
    near, ours = (forward_and_backward(problem, {**arrays, name: array}) for array in (arrays[name], far))
    for result in near:
        np.testing.assert_array_equal(ours[result], near[result], err_msg=result)


def test_a_change_of_m_compiles_nothing():
    def key(m):
        arrays = [contiguous(shape, "float16") for shape in ((1, m, 64), (1, 64, 48), (1, 64, 48))]
        (launch,) = kernels.forward(GluMatmulSpec("float16", "silu"), tiles(64, 64, 32), *arrays).launches
        specialised = {p.name for p in launch.kernel.params if not p.do_not_specialize}
        return {name: value for name, value in launch.numbers.items() if name in specialised}, launch.constants

    assert key(1000) == key(1003) == key(4096)


def compiled(target: str, activation: str, dtype: str, weight: Array, m: int):
    """The facts of every kernel of a training step, for weights [1, k, n]."""
    _, k, n = weight.shape
    x, out = contiguous((1, m, k), dtype), contiguous((1, m, n), dtype)
    spec = GluMatmulSpec(dtype, activation)
    config = choose_config(spec, get_target(target))
    plans = (
        kernels.forward(saving(spec), config, x, weight, weight),
        kernels.backward(
            saving(spec), config, (x, weight, weight), (out, contiguous((1, 2, m, n), dtype)), (out, None)
        ),
    )
    return itertools.chain(*(compile_plan(plan, target) for plan in plans))


@pytest.mark.parametrize("target", GPUS)
def test_compiles_to_matrix_instructions_without_spills(target):
    for facts in compiled(target, "gelu", "bfloat16", contiguous((1, 512, 512), "bfloat16"), 512):
        assert over_budget(facts, target) == (), facts


@pytest.mark.sweep
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("k", "n", "activation"), [(4096, 14336, "silu"), (2304, 9216, "gelu_tanh")])
def test_compiles_at_the_sizes_of_models(target, dtype, k, n, activation):
    """Of weights as JAX and as torch.nn.Linear have them."""
    for weight in (contiguous((1, k, n), dtype), Array((1, k, n), dtype, (k * n, 1, k))):
        for facts in compiled(target, activation, dtype, weight, 4096):
            assert over_budget(facts, target) == (), facts


def test_arrays_without_runs_have_smaller_tiles():
    """Where no 16 elements lie side by side, a step of the usual length would not fit registers and shared memory."""
    config = GluMatmulConfig(*[GluMatmulTiles(128, 256, 64)] * 3)

    def blocks(k, n, transposed=False):
        weight = Array((1, k, n), "float16", (k * n, 1, k)) if transposed else contiguous((1, k, n), "float16")
        spec = GluMatmulSpec("float16", "silu")
        (launch,) = kernels.forward(spec, config, contiguous((1, 500, k), "float16"), weight, weight).launches
        return launch.constants["BLOCK_N"], launch.constants["BLOCK_K"]

    assert blocks(512, 512) == blocks(512, 512, transposed=True) == (256, 64)
    for sizes in ((511, 512), (512, 511), (513, 513)):
        assert blocks(*sizes) == blocks(*sizes, transposed=True) == (128, 16)


@pytest.mark.sweep
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("m", "k", "n"), [(1001, 304, 512), (1024, 301, 512), (1024, 512, 501), (1001, 301, 501)])
def test_odd_sizes_fit_the_shared_memory(target, m, k, n):
    for dtype in ("bfloat16", "float32"):
        for weight in (contiguous((1, k, n), dtype), Array((1, k, n), dtype, (k * n, 1, k))):
            for facts in compiled(target, "gelu", dtype, weight, m):
                assert facts.on_chip_bytes <= get_target(target).on_chip_bytes, facts


@pytest.mark.parametrize("config", [tiles(48, 32, 32), tiles(32, 32, 8)], ids=["no power of two", "too small"])
def test_tiles_that_triton_cannot_have(config):
    with pytest.raises(ValueError, match=r"config: block_. is \d+; it must be a power of two"):
        forward(Problem().spec, native(Problem()), config)


def test_supports():
    for target in (INTERPRET, get_target("sm_90"), get_target("gfx942")):
        for dtype in ("float32", "float16", "bfloat16"):
            assert kernels.supports(GluMatmulSpec(dtype, "silu"), target, True) == ()
    assert "float64" in kernels.supports(GluMatmulSpec("float64", "silu"), INTERPRET, False)[0]
    assert "TPU" in kernels.supports(GluMatmulSpec("float32", "silu"), get_target("v6e"), False)[0]
