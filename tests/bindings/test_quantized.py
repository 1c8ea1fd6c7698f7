"""quantize, and matmul with what it makes, in NumPy, torch and JAX."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from installed import needs_jax_triton

import crosstile
from crosstile import Quantized, matmul, quantize

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from crosstile import torch as glue  # noqa: E402

KERNELS = ["numpy", "triton", "pallas"]
K, N = 40, 12


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture
def weight(rng):
    return rng.standard_normal((K, N)).astype(np.float32)


def in_torch(weight, dtype="int4", **options):
    return quantize(torch.from_numpy(weight), dtype, **(options or {"group_size": 32}))


def in_jax(weight, dtype="int4", **options):
    return quantize(jnp.asarray(weight), dtype, **(options or {"group_size": 32}))


def loss(xp, implementation):
    def function(a, b, bias):
        return xp.sin(matmul(a, b, bias=bias, activation="silu", implementation=implementation)).sum()

    return function


def close(ours, theirs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5, atol=5e-6), ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"dtype": "int4", "group_size": 64, "zero_points": True},
        {"dtype": "float8_e4m3fn"},
        {"dtype": "mxfp8"},
        {"dtype": "mxfp4"},
        {"dtype": "int8", "activations": "int8"},
        {"dtype": "mxfp4", "activations": "mxfp8"},
    ],
    ids=str,
)
def test_a_weight_of_any_leading_shape(options, rng):
    w = rng.standard_normal((2, 3, K, N)).astype(np.float32)
    whole = quantize(w, **options)
    assert whole.shape == w.shape
    assert whole.dtype == "float32"
    alone = quantize(w[1, 2], **options)
    np.testing.assert_array_equal(whole.dequantize()[1, 2], alone.dequantize())
    np.testing.assert_allclose(alone.dequantize(), w[1, 2], atol=np.abs(w).max() / 4)
    for made in (quantize(torch.from_numpy(w), **options), quantize(jnp.asarray(w), **options)):
        np.testing.assert_array_equal(np.asarray(made.dequantize()), whole.dequantize())


def test_the_original_dtype_comes_back(weight):
    assert quantize(weight.astype(np.float16), "int8").dequantize().dtype == np.float16
    assert quantize(weight.astype(ml_dtypes.bfloat16), "int8").dequantize().dtype == ml_dtypes.bfloat16
    assert in_torch(weight).dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert in_jax(weight).dequantize("bfloat16").dtype == jnp.bfloat16


def test_it_moves_with_its_arrays(weight):
    moved = in_torch(weight, "int4", group_size=32, zero_points=True).to("meta")
    assert {array.device.type for array in (moved.values, moved.scales, moved.zeros)} == {"meta"}
    assert isinstance(in_jax(weight).to(jax.devices()[0]), Quantized)


def test_torch_gradients_are_those_of_the_library(kernel, weight):
    a, bias = torch.randn(2, 3, K).requires_grad_(), torch.randn(N).requires_grad_()
    b = in_torch(weight)
    expected = torch.autograd.grad(loss(torch, "library")(a, b, bias), (a, bias))
    for ours, theirs in zip(torch.autograd.grad(loss(torch, kernel)(a, b, bias), (a, bias)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("implementation", ["numpy", "triton", "pallas", None])
def test_the_gradient_passes_the_rounding_of_activations(implementation, weight):
    a = torch.randn(5, K).requires_grad_()
    b = in_torch(weight, "int8", activations="int8")
    upstream = torch.randn(5, N)
    (da,) = torch.autograd.grad(matmul(a, b, implementation=implementation), a, upstream)
    torch.testing.assert_close(da, upstream @ b.dequantize().T)


def test_jax_gradients_under_jit_are_those_of_the_library(kernel, weight):
    a, bias = jax.random.normal(jax.random.key(0), (3, K)), jnp.ones(N)
    expected = jax.value_and_grad(loss(jnp, "library"), (0, 2))(a, in_jax(weight), bias)
    close(jax.jit(jax.value_and_grad(loss(jnp, kernel), (0, 2)))(a, in_jax(weight), bias), expected)


def test_layers_scanned_over_in_jax(rng):
    w = jnp.asarray(rng.standard_normal((3, K, K)).astype(np.float32)) / K**0.5
    layers, a = quantize(w, "int4", group_size=32), jnp.ones((2, K))
    assert len(jax.tree.leaves(layers)) == 2
    out, _ = jax.lax.scan(lambda x, layer: (matmul(x, layer, implementation="pallas"), None), a, layers)
    expected = a
    for layer in layers.dequantize():
        expected = expected @ layer
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_quantize_under_jit(weight):
    made = jax.jit(lambda w: quantize(w, "mxfp4"))(jnp.asarray(weight))
    np.testing.assert_array_equal(made.values, quantize(weight, "mxfp4").values)


@pytest.mark.parametrize("kernel", [*KERNELS, "library"])
def test_torch_compile_has_one_graph_for_all_lengths(kernel, weight):
    torch._dynamo.reset()
    counter, b = CompileCounterWithBackend("aot_eager"), in_torch(weight)
    compiled = torch.compile(loss(torch, kernel), fullgraph=True, backend=counter, dynamic=True)
    for length in (3, 5, 8):
        a, bias = torch.randn(2, length, K).requires_grad_(), torch.randn(N).requires_grad_()
        plain, found = loss(torch, "library")(a, b, bias), compiled(a, b, bias)
        torch.testing.assert_close(found, plain)
        expected = torch.autograd.grad(plain, (a, bias))
        torch.testing.assert_close(torch.autograd.grad(found, (a, bias)), expected, rtol=5e-5, atol=5e-6)
    assert counter.frame_count == 1


def test_opcheck(kernel, weight):
    b = in_torch(weight)
    arrays = (torch.randn(1, 6, K).requires_grad_(), b.values[None], b.scales[None], None, torch.randn(1, N), None)
    assert list(glue._OPERATORS["quantized_matmul"].options)[:2] == ["out_dtype", "format"]
    arguments = (*arrays, "float32", "int4", 32, None, "silu", True, kernel, "interpret", None)
    results = torch.library.opcheck(torch.ops.crosstile.quantized_matmul.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("implementation", [None, "triton", "pallas"])
@pytest.mark.parametrize("lead", [(3,), (2, 1, 3), (0, 2), (2, 0)], ids=str)
def test_numpy_arrays_and_any_leading_dimensions(implementation, lead, weight, rng):
    a, b = rng.standard_normal((*lead, K)).astype(np.float32), quantize(weight, "int8", group_size=32)
    out = matmul(a, b, implementation=implementation)
    assert out.shape == (*lead, N)
    np.testing.assert_allclose(out, a @ b.dequantize(), rtol=1e-4, atol=1e-4)


def test_a_weight_for_every_batch(kernel, rng):
    w, a = rng.standard_normal((2, K, N)).astype(np.float32), rng.standard_normal((3, 2, 4, K)).astype(np.float32)
    b = quantize(w, "int4", group_size=32, zero_points=True)
    out = matmul(a, b, bias=np.ones(N, np.float32), implementation=kernel)
    np.testing.assert_allclose(out, a @ b.dequantize() + 1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_exports_for_tpus(chip, rng):
    b = in_jax(rng.standard_normal((512, 384)).astype(np.float32))
    a = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    with crosstile.target(chip):
        exported = jax.export.export(
            jax.jit(jax.value_and_grad(lambda a, b: matmul(a, b).astype(jnp.float32).sum())), platforms=["tpu"]
        )(a, b)
    assert exported.mlir_module().count("tpu_custom_call") == 2


@needs_jax_triton
def test_lowers_for_cuda_through_jax_triton(rng):
    def total(a, b):
        with crosstile.target("sm_90"):
            return matmul(a, b).astype(jnp.float32).sum()

    b = in_jax(rng.standard_normal((64, 128)).astype(np.float32), "float8_e4m3fn", group_size=None)
    lowered = jax.jit(jax.grad(total)).trace(jnp.ones((64, 64), jnp.bfloat16), b).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()


def test_explain_names_the_op(weight):
    text = str(crosstile.explain("matmul", torch.ones(4, K), in_torch(weight), implementation="triton"))
    assert text.startswith("matmul runs with 'triton'")
    assert "QuantizedMatmulConfig(" in text
    b = in_torch(weight, "mxfp4", activations="mxfp8")
    with pytest.raises(crosstile.UnsupportedError, match=r"activations: got mxfp8, of which interpret has no products"):
        matmul(torch.ones(4, K), b, implementation="pallas")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, r"dtype: got 'int3'; it must be one of int8, int4, float8_e4m3fn, mxfp8, mxfp4"),
        ({"dtype": "int4", "group_size": 48}, r"group_size: got 48; it must be one of None, 32, 64, 128"),
        (
            {"dtype": "mxfp4", "group_size": 64},
            r"group_size: got 64; it must be one of None, 32, the group of MX formats",
        ),
        ({"dtype": "mxfp8", "zero_points": True}, r"zero_points: mxfp8 has none, its codes are floats"),
        ({"dtype": "int4", "activations": "int8"}, r"activations: got 'int8'; beside a weight of int4 it must be None"),
        ({"dtype": "mxfp4", "activations": "int8"}, r"activations: got 'int8'; .* mxfp4 it must be 'mxfp8'"),
        (
            {"dtype": "int8", "activations": "int8", "group_size": 32},
            r"group_size: with activations='int8' a column has",
        ),
        ({"dtype": "int8", "activations": "int8", "zero_points": True}, r"zero_points: with activations='int8'"),
    ],
)
def test_what_cannot_be_quantised(options, message, weight):
    with pytest.raises(ValueError, match=message):
        quantize(weight, **options)


def test_types_that_cannot_be(weight):
    with pytest.raises(TypeError, match=r"w: dtype is int32; it must be one of float32"):
        quantize(weight.astype(np.int32), "int8")
    with pytest.raises(ValueError, match=r"w: got rank 1, \[12\]; it must be \[k, n\]"):
        quantize(weight[0], "int8")
    with pytest.raises(TypeError, match=r"config: got int; quantized_matmul takes a .*QuantizedMatmulConfig"):
        matmul(np.ones((2, K), np.float32), quantize(weight, "int8"), config=3, implementation="triton")
    with pytest.raises(TypeError, match=r"values: got .*Tensor where a is numpy.ndarray"):
        matmul(np.ones((2, K), np.float32), in_torch(weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": np.ones(K, np.float32)}, r"a: got rank 1, \[40\]; it must be \[..., m, k\]"),
        ({"a": np.ones((2, 5), np.float32)}, r"b: k is 40 in \[40, 12\]; it must be 5, as in a \[2, 5\]"),
        ({"bias": np.ones(3, np.float32)}, r"bias: got \[3\]; it must be \[n\] = \[12\]"),
        ({"residual": np.ones((3, 2, N), np.float32)}, r"residual: got \[3, 2, 12\]; it must broadcast to the result"),
        ({"activation": "swish"}, r"activation: got 'swish'; it must be None or one of relu"),
        ({"out_dtype": "int8"}, r"out_dtype: got 'int8'; it must be one of float32"),
        ({"precision": "tf32"}, r"precision: got 'tf32'; beside a quantised weight it must be None"),
    ],
)
def test_calls_that_do_not_fit(arguments, message, weight):
    with pytest.raises(ValueError, match=message):
        matmul(**{"a": np.ones((2, K), np.float32), "b": quantize(weight, "int8"), **arguments})


def test_a_weight_put_together_by_hand(weight):
    made = quantize(weight, "int4", group_size=32)
    a = np.ones((2, K), np.float32)
    wrong = Quantized(made.values[:64], made.scales, None, "int4", K, 32)
    with pytest.raises(ValueError, match=r"b.values: got \[64, 12\]; of int4 it must be \[128, 12\]"):
        matmul(a, wrong)
    wrong = Quantized(made.values, made.scales.astype(np.int32), None, "int4", K, 32)
    with pytest.raises(TypeError, match=r"b.scales: dtype is int32; of int4 it must be float32 or float16"):
        matmul(a, wrong)
    right = Quantized(made.values, made.scales.astype(np.float16), None, "int4", K, 32)
    np.testing.assert_allclose(matmul(a, right, implementation="triton"), a @ right.dequantize(), rtol=1e-5)
