"""Interpreting launch plans on NumPy arrays, in a process that also compiles."""

from __future__ import annotations

import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from crosstile.kernels.tiles import triton_interpreter  # noqa: E402
from crosstile.kernels.tiles.launch import Array, Launch, Plan, contiguous  # noqa: E402


@triton.jit
def _double(x):
    return x * 2


@triton.jit
def _affine(x, shift, out, n, x_stride, factor, DOUBLES: tl.constexpr, BLOCK: tl.constexpr):
    """out[n] = factor * x + shift (0 where there is none), twice that if DOUBLES."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + offsets * x_stride, mask=offsets < n, other=0.0) * factor
    if shift is not None:
        y += tl.load(shift)
    if DOUBLES:
        y = _double(y)
    tl.store(out + offsets, y, mask=offsets < n)


@triton.jit
def _fails(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + tl.arange(0, 2 * BLOCK))


@triton.jit
def _cube(x, out, BLOCK: tl.constexpr):
    """x @ x @ x with the matrix unit."""
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tile = tl.load(x + offsets)
    square = tl.dot(tile, tile, input_precision="ieee")
    tl.store(out + offsets, tl.dot(square, tile.to(tl.float32), input_precision="ieee"))


def plan_of(x: np.ndarray, shift=False, doubles=False, programs=None, outputs=("out",), n=None) -> Plan:
    n = x.size if n is None else n
    described = Array(x.shape, x.dtype.name, tuple(stride // x.itemsize for stride in x.strides))
    launch = Launch(
        _affine,
        (triton.cdiv(n, 8) if programs is None else programs,),
        ("x", "shift" if shift else ""),
        outputs,
        {"n": n, "x_stride": described.strides[0], "factor": 0.5},
        {"DOUBLES": doubles, "BLOCK": 8},
    )
    return Plan((launch,), {"x": described}, {name: contiguous(x.shape, x.dtype.name) for name in outputs})


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("step", [1, 3, -2], ids=["contiguous", "sliced", "reversed"])
def test_a_kernel_sees_strides_and_tails(rng, dtype, step):
    x = rng.standard_normal(80).astype(dtype)[::step][:21]
    (out,) = triton_interpreter.run(plan_of(x), {"x": x})
    assert out.dtype == x.dtype
    np.testing.assert_array_equal(out, x * np.array(0.5, dtype))


def test_an_optional_input_is_an_array_or_none(rng):
    x = rng.standard_normal(5).astype(np.float32)
    shift = np.array([3], np.float32)
    (without,) = triton_interpreter.run(plan_of(x), {"x": x})
    (with_it,) = triton_interpreter.run(plan_of(x, shift=True), {"x": x, "shift": shift})
    np.testing.assert_array_equal(with_it, without + 3)


def test_a_jitted_function_calls_another(rng):
    x = rng.standard_normal(5).astype(np.float32)
    (out,) = triton_interpreter.run(plan_of(x, doubles=True), {"x": x})
    np.testing.assert_array_equal(out, x)


def test_what_no_program_writes_is_nan():
    x = np.ones(21, np.float32)
    (out,) = triton_interpreter.run(plan_of(x, programs=2), {"x": x})
    assert np.isnan(out[16:]).all()
    assert (out[:16] == 0.5).all()


def test_a_grid_of_nothing_runs_nothing():
    x = np.ones(3, np.float32)
    (out,) = triton_interpreter.run(plan_of(x, programs=0), {"x": x})
    assert np.isnan(out).all()


def test_scratch_lives_from_launch_to_launch(rng):
    x = rng.standard_normal(10).astype(np.float32)
    first, second = plan_of(x).launches[0], plan_of(x).launches[0]
    numbers = {**second.numbers, "x_stride": 1}
    launches = (
        Launch(first.kernel, first.grid, ("x", ""), ("half",), first.numbers, first.constants),
        Launch(second.kernel, second.grid, ("half", ""), ("out",), numbers, second.constants),
    )
    flat = contiguous(x.shape, "float32")
    results = triton_interpreter.run(Plan(launches, {"x": flat}, {"out": flat}, {"half": flat}), {"x": x})
    assert len(results) == 1
    np.testing.assert_array_equal(results[0], x / 4)


def test_dots_accumulate_in_float32(rng):
    x = rng.standard_normal((16, 16)).astype(np.float16)
    square = contiguous((16, 16), "float32")
    launch = Launch(_cube, (1,), ("x",), ("out",), {}, {"BLOCK": 16})
    (out,) = triton_interpreter.run(Plan((launch,), {"x": contiguous((16, 16), "float16")}, {"out": square}), {"x": x})
    exact = np.linalg.matrix_power(x.astype(np.float64), 3)
    assert np.abs(out - exact).max() < 8 * 2.0**-23 * np.abs(exact).max()


def test_the_language_is_as_before_after_a_run_and_after_a_failure():
    before = (tl.load, tl.dot, tl.core.load, triton.runtime.jit.JITFunction.__call__, triton.knobs.runtime.interpret)
    x = np.ones(16, np.float32)
    triton_interpreter.run(plan_of(x), {"x": x})
    broken = Launch(_fails, (1,), ("x",), ("out",), {}, {"BLOCK": 8})
    flat = contiguous((16,), "float32")
    with pytest.raises(Exception, match=r".+"):
        triton_interpreter.run(Plan((broken,), {"x": flat}, {"out": flat}), {"x": x})
    after = (tl.load, tl.dot, tl.core.load, triton.runtime.jit.JITFunction.__call__, triton.knobs.runtime.interpret)
    assert before == after
    assert isinstance(_affine, triton.runtime.jit.JITFunction)


def test_the_same_kernel_compiles_after_it_was_interpreted():
    x = np.ones(16, np.float32)
    triton_interpreter.run(plan_of(x), {"x": x})
    signature = {"x": "*fp32", "shift": "constexpr", "out": "*fp32", "n": "i32", "x_stride": "i32", "factor": "fp32"}
    source = triton.compiler.ASTSource(
        _affine,
        {**signature, "DOUBLES": "constexpr", "BLOCK": "constexpr"},
        {(1,): None, (6,): True, (7,): 8},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert ".target sm_90" in triton.compile(source, target=target).asm["ptx"]


def test_threads_take_turns(rng):
    arrays = [rng.standard_normal(16).astype(np.float32) for _ in range(4)]
    results = [None] * len(arrays)

    def work(index):
        results[index] = triton_interpreter.run(plan_of(arrays[index]), {"x": arrays[index]})[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(arrays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, result in zip(arrays, results, strict=True):
        np.testing.assert_array_equal(result, x / 2)


@triton.jit
def _narrow(x, y, product, summed, greater, BLOCK: tl.constexpr):
    """x @ y, x + y and x > y, in the tiles' own type."""
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x_tile = tl.load(x + offsets)
    y_tile = tl.load(y + offsets)
    tl.store(product + offsets, tl.dot(x_tile, y_tile).to(product.dtype.element_ty))
    tl.store(summed + offsets, x_tile + y_tile)
    tl.store(greater + offsets, (x_tile > y_tile).to(tl.int32))


def test_bfloat16_is_computed_as_numpy_has_it():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16) for _ in range(2))
    described = contiguous((16, 16), "bfloat16")
    outputs = {"product": described, "summed": described, "greater": contiguous((16, 16), "int32")}
    launch = Launch(_narrow, (1,), ("x", "y"), tuple(outputs), {}, {"BLOCK": 16})
    plan = Plan((launch,), {"x": described, "y": described}, outputs)
    product, summed, greater = triton_interpreter.run(plan, {"x": x, "y": y})
    exact = x.astype(np.float32) @ y.astype(np.float32)
    np.testing.assert_array_equal(product, exact.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(summed, x + y)
    np.testing.assert_array_equal(greater, x > y)


@triton.jit
def _rounded(x, out, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets).to(out.dtype.element_ty))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float8_e4m3fn"])
def test_floats_round_to_the_nearest_even(kind):
    """Of every value of 8 or 16 bits the neighbourhood: just below, at and just above the middle to the next."""
    target = np.dtype(getattr(ml_dtypes, kind, kind))
    bits = np.arange(2 ** (8 * target.itemsize), dtype=f"uint{8 * target.itemsize}")
    values = bits.view(target).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    middles = values[1:] / 2 + values[:-1] / 2
    above, below = (np.nextafter(middles, end, dtype=np.float32) for end in (np.float32(np.inf), np.float32(-np.inf)))
    x = np.concatenate([values, middles, above, below])
    x = np.resize(x, -(-len(x) // 64) * 64).astype(np.float32)
    launch = Launch(_rounded, (len(x) // 64,), ("x",), ("out",), {}, {"BLOCK": 64})
    plan = Plan((launch,), {"x": contiguous(x.shape, "float32")}, {"out": contiguous(x.shape, kind)})
    (found,) = triton_interpreter.run(plan, {"x": x})
    np.testing.assert_array_equal(found.astype(np.float32), x.astype(target).astype(np.float32))


def test_no_torch_is_needed():
    code = (
        "import sys, numpy as np, crosstile\n"
        "x = np.ones((1, 3, 1, 4), np.float32)\n"
        "assert crosstile.attention(x, x, x, implementation='triton').shape == x.shape\n"
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
