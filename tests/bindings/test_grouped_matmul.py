"""grouped_matmul and grouped_glu_matmul as users call them: every framework and implementation, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from installed import needs_jax_triton

import crosstile
from crosstile import grouped_glu_matmul, grouped_matmul

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from crosstile import torch as glue  # noqa: E402

KERNELS = ["numpy", "triton", "pallas"]
TOKENS, K, N, SIZES = 14, 20, 12, (5, 0, 7)
SHAPES = ((TOKENS, K), (len(SIZES), K, N), (len(SIZES), K, N))


def loss(xp, implementation, sizes=SIZES):
    """Both ops, one after the other; what the rows of nobody come to is not in it."""

    def function(x, w_gate, w_up):
        group_sizes = sizes if hasattr(sizes, "dtype") else xp.asarray(sizes)
        gated = grouped_glu_matmul(x, w_gate, w_up, group_sizes, activation="gelu_tanh", implementation=implementation)
        back = xp.swapaxes(w_up, 1, 2)
        return xp.sin(grouped_matmul(gated, back, group_sizes, implementation=implementation)).sum()

    return function


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def leaves(shapes=SHAPES):
    return [(torch.randn(shape) / 2).requires_grad_() for shape in shapes]


def randoms(shapes=SHAPES):
    return [jax.random.normal(jax.random.key(seed), shape, jnp.float32) / 2 for seed, shape in enumerate(shapes)]


def close(ours, theirs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5, atol=5e-5), ours, theirs)


@pytest.mark.parametrize("kernel", ["library", "triton", "pallas"])
def test_torch_gradients_are_those_of_the_definition(kernel):
    inputs = leaves()
    expected = torch.autograd.grad(loss(torch, "numpy")(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(loss(torch, kernel)(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kernel", ["library", *KERNELS])
@pytest.mark.parametrize("make", [torch.from_numpy, jnp.asarray], ids=["torch", "jax"])
def test_the_rows_past_the_sum(kernel, make):
    """They give zeros and have zero gradients, though they hold NaN, and though NaN comes back."""
    x, weight, dout = (np.ones(shape, np.float32) for shape in ((6, 4), (2, 4, 3), (6, 3)))
    x[4:] = dout[4:] = np.nan
    x, weight, dout, sizes = map(make, (x, weight, dout, np.array([1, 3])))

    def product(x, weight):
        return grouped_matmul(x, weight, sizes, implementation=kernel)

    if isinstance(x, torch.Tensor):
        out, gradients = torch.func.vjp(product, x, weight)
    else:
        out, gradients = jax.vjp(product, x, weight)
    dx, dweight = gradients(dout)
    np.testing.assert_array_equal(out, np.array([[4.0] * 3] * 4 + [[0] * 3] * 2))
    np.testing.assert_array_equal(dx, np.array([[3.0] * 4] * 4 + [[0] * 4] * 2))
    np.testing.assert_array_equal(dweight, np.stack([np.ones((4, 3)), 3 * np.ones((4, 3))]))


def test_only_what_is_asked_for_is_differentiated(kernel):
    x, w_gate, w_up = leaves()
    (dw_up,) = torch.autograd.grad(loss(torch, kernel)(x.detach(), w_gate.detach(), w_up), w_up)
    (expected,) = torch.autograd.grad(loss(torch, "library")(x.detach(), w_gate.detach(), w_up), w_up)
    torch.testing.assert_close(dw_up, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kernel", ["numpy", "triton", "library"])
def test_torch_compile_has_one_graph_for_all_lengths_and_sizes(kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(x, w_gate, w_up, sizes):
        return loss(torch, kernel, sizes)(x, w_gate, w_up)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for tokens, sizes in ((14, (5, 0, 7)), (9, (0, 9, 0)), (20, (20, 0, 0))):
        inputs = [*leaves(((tokens, K), *SHAPES[1:])), torch.tensor(sizes)]
        plain, found = loss(torch, "numpy", inputs[3])(*inputs[:3]), compiled(*inputs)
        torch.testing.assert_close(found, plain, rtol=5e-5, atol=5e-5)
        expected = torch.autograd.grad(plain, inputs[:3])
        torch.testing.assert_close(torch.autograd.grad(found, inputs[:3]), expected, rtol=5e-5, atol=5e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    inputs = leaves(tuple((1, *shape) for shape in SHAPES))
    inputs = [*inputs[:2], inputs[2] if gated else None, torch.tensor([SIZES], dtype=torch.int32)]
    assert list(glue._OPERATORS["grouped_matmul"].options) == [
        "activation",
        "save_preactivations",
        "format",
        "group_size",
    ]
    matrices = (None,) * 4, (None, 0)
    arguments = (*inputs, *matrices[0], "silu" if gated else None, gated, *matrices[1], "triton", "interpret", None)
    results = torch.library.opcheck(torch.ops.crosstile.grouped_matmul.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernel", ["numpy", "triton"])
def test_torch_vmap_over_rows_weights_or_sizes(kernel):
    x, w_gate, w_up = (leaf.detach() for leaf in leaves())
    many = torch.randn(2, *SHAPES[1]) / 2
    grad = torch.vmap(torch.func.grad(lambda weight: loss(torch, kernel)(x, weight, w_up)))(many)
    expected = [torch.func.grad(lambda weight: loss(torch, "library")(x, weight, w_up))(w) for w in many]
    torch.testing.assert_close(grad, torch.stack(expected), rtol=5e-5, atol=5e-5)
    sizes = torch.tensor([[5, 0, 7], [1, 12, 1]])
    out = torch.vmap(lambda sizes: grouped_matmul(x, w_up, sizes, implementation=kernel))(sizes)
    expected = [grouped_matmul(x, w_up, each, implementation="library") for each in sizes]
    torch.testing.assert_close(out, torch.stack(expected), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kernel", ["library", "triton", "pallas"])
def test_jax_gradients_under_jit_are_those_of_the_definition(kernel):
    expected = jax.value_and_grad(loss(jnp, "numpy"), (0, 1, 2))(*randoms())
    close(jax.jit(jax.value_and_grad(loss(jnp, kernel), (0, 1, 2)))(*randoms()), expected)


@pytest.mark.parametrize("kernel", ["numpy", "pallas"])
def test_jax_vmap_of_the_gradient(kernel):
    x, _, w_up = randoms()
    (weights,) = randoms([(2, *SHAPES[1])])
    expected = jnp.stack([jax.grad(loss(jnp, "library"), 1)(x, weight, w_up) for weight in weights])
    close(jax.vmap(jax.grad(loss(jnp, kernel), 1), (None, 0, None))(x, weights, w_up), expected)


@pytest.mark.parametrize("implementation", [None, "triton", "pallas"])
def test_numpy_arrays_and_weights_as_linear_layers_have_them(implementation, rng):
    x = rng.standard_normal((9, 6)).astype(np.float32)
    stored = rng.standard_normal((2, 5, 6)).astype(np.float32)  # [groups, n, k]
    out = grouped_matmul(x, stored.swapaxes(1, 2), np.array([4, 3]), implementation=implementation)
    exact = np.concatenate((x[:4] @ stored[0].T, x[4:7] @ stored[1].T, np.zeros((2, 5))))
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_a_clear_error(kernel):
    inputs = leaves()
    (first,) = torch.autograd.grad(loss(torch, kernel)(*inputs), inputs[0], create_graph=True)
    with pytest.raises(crosstile.UnsupportedError, match="double backward.*implementation='library'"):
        first.sum().backward()


@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_exports_for_tpus(chip):
    shapes = ((256, 512), (4, 512, 384), (4, 512, 384))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def total(sizes, *arrays):
        return loss(jnp, None, sizes)(*arrays).astype(jnp.float32)

    with crosstile.target(chip):
        gradient = jax.jit(jax.grad(total, (1, 2, 3)))
        exported = jax.export.export(gradient, platforms=["tpu"])(jax.ShapeDtypeStruct((4,), jnp.int32), *arrays)
    assert exported.mlir_module().count("tpu_custom_call") == 7


@needs_jax_triton
def test_lowers_for_cuda_through_jax_triton():
    def total(*arrays):
        with crosstile.target("sm_90"):
            return loss(jnp, None, jnp.array([20, 0, 40], jnp.int32))(*arrays).astype(jnp.float32)

    arrays = [jnp.ones(shape, jnp.bfloat16) for shape in ((64, 64), (3, 64, 128), (3, 64, 128))]
    lowered = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert len(re.findall("triton_kernel_call", lowered.as_text())) >= 10


def test_explain():
    arguments = (torch.ones(4, 8), torch.ones(2, 8, 8), torch.ones(2, 8, 8), torch.tensor([1, 2]))
    text = str(crosstile.explain("grouped_glu_matmul", *arguments, implementation="triton"))
    assert text.startswith("grouped_glu_matmul runs with 'triton' in its interpreter")
    assert "GroupedMatmulConfig(forward=" in text
    choice = crosstile.explain("grouped_matmul", *arguments[:2], arguments[3], implementation="numpy").choice
    assert choice.implementation == "numpy"


def arguments(**change):
    shapes = {"lhs": (6, 8), "rhs": (2, 8, 5), "group_sizes": (2,)} | change
    return {n: np.zeros(shape, "int32" if n == "group_sizes" else "float32") for n, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lhs": (8,)}, r"lhs: got rank 1, \[8\]; it must have rank 2, \[tokens, k\]"),
        ({"rhs": (8, 5)}, r"rhs: got rank 2, \[8, 5\]; it must have rank 3, \[groups, k, n\]"),
        ({"rhs": (2, 7, 5)}, r"rhs: k is 7 in \[2, 7, 5\]; it must be 8, as in lhs \[6, 8\]$"),
        ({"rhs": (2, 5, 8)}, r"rhs: k is 5 .* \(weights \[groups, n, k\]: rhs.swapaxes\(1, 2\)\)"),
        ({"group_sizes": (3,)}, r"group_sizes: got \[3\]; it must be \[groups\] = \[2\], as in rhs \[2, 8, 5\]"),
    ],
)
def test_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments(**change))


def test_sizes_that_cannot_be():
    for sizes, message in (([3, 4], "their sum is 7; it must be at most the 6 rows of lhs"), ([-1, 2], "got -1")):
        with pytest.raises(ValueError, match=f"group_sizes: {message}"):
            grouped_matmul(**arguments() | {"group_sizes": np.array(sizes)})
    with pytest.raises(TypeError, match="group_sizes: dtype is float64; it must be an integer"):
        grouped_matmul(**arguments() | {"group_sizes": np.zeros(2)})
    with pytest.raises(TypeError, match=r"group_sizes: got .*Tensor where lhs is numpy.ndarray"):
        grouped_matmul(**arguments() | {"group_sizes": torch.zeros(2, dtype=torch.int32)})


def test_what_does_not_fit_the_gate():
    x, weight, sizes = np.zeros((6, 8)), np.zeros((2, 8, 5)), np.zeros(2, int)
    with pytest.raises(ValueError, match=r"w_up: got \[2, 8, 6\]; it must have the shape of w_gate, \[2, 8, 5\]"):
        grouped_glu_matmul(x, weight, np.zeros((2, 8, 6)), sizes)
    with pytest.raises(ValueError, match=r"activation: got 'swish'; it must be one of relu, gelu, gelu_tanh, silu"):
        grouped_glu_matmul(x, weight, weight, sizes, activation="swish")
    with pytest.raises(TypeError, match=r"w_up: dtype is float32; it must be float64, as x is"):
        grouped_glu_matmul(x, weight, weight.astype(np.float32), sizes)
    with pytest.raises(TypeError, match=r"config: got int; grouped_matmul takes a .*GroupedMatmulConfig"):
        grouped_matmul(x.astype(np.float32), weight.astype(np.float32), sizes, config=3, implementation="triton")


QUANTIZE = {"dtype": "int4", "group_size": 32, "zero_points": True}


def quantized_loss(xp, implementation, sizes=SIZES):
    """Both ops of quantised weights, one after the other."""

    def function(x, w_gate, w_up, w_down):
        group_sizes = sizes if hasattr(sizes, "dtype") else xp.asarray(sizes)
        gated = grouped_glu_matmul(x, w_gate, w_up, group_sizes, implementation=implementation)
        return xp.sin(grouped_matmul(gated, w_down, group_sizes, implementation=implementation)).sum()

    return function


def quantized_weights(make, **options):
    drawn = np.random.default_rng(0)
    shapes = (SHAPES[1], SHAPES[1], (len(SIZES), N, K))
    weights = [make(drawn.standard_normal(shape).astype(np.float32) / 2) for shape in shapes]
    return [crosstile.quantize(weight, **(options or QUANTIZE)) for weight in weights]


@pytest.mark.parametrize("kernel", [*KERNELS, "library"])
def test_quantized_weights_in_torch(kernel):
    """The same as of the weights that the codes stand for; and the weights are frozen."""
    (x, *_), weights = leaves(), quantized_weights(torch.from_numpy)
    plain = quantized_loss(torch, "numpy")(x, *(weight.dequantize() for weight in weights))
    found = quantized_loss(torch, kernel)(x, *weights)
    torch.testing.assert_close(found, plain, rtol=5e-5, atol=5e-5)
    expected = torch.autograd.grad(plain, x)
    torch.testing.assert_close(torch.autograd.grad(found, x), expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kernel", [*KERNELS, "library"])
def test_quantized_weights_in_jax_under_jit(kernel):
    (x, *_), weights = randoms(), quantized_weights(jnp.asarray, dtype="mxfp4")
    plain = [weight.dequantize() for weight in weights]
    expected = jax.value_and_grad(quantized_loss(jnp, "numpy"))(x, *plain)
    close(jax.jit(jax.value_and_grad(quantized_loss(jnp, kernel)))(x, *weights), expected)


@pytest.mark.parametrize("implementation", [None, "triton", "pallas"])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_quantized_weights_in_numpy(implementation, kind, rng):
    x, weights = rng.standard_normal((TOKENS, K)).astype(np.float32), quantized_weights(np.asarray, dtype=kind)
    out = grouped_matmul(x, weights[0], np.array(SIZES), implementation=implementation)
    expected = grouped_matmul(x, weights[0].dequantize(), np.array(SIZES))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["numpy", "triton", "library"])
def test_torch_compile_of_quantized_weights(kernel):
    torch._dynamo.reset()
    counter, weights = CompileCounterWithBackend("aot_eager"), quantized_weights(torch.from_numpy)
    compiled = torch.compile(
        lambda x, sizes: quantized_loss(torch, kernel, sizes)(x, *weights),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for tokens, sizes in ((14, (5, 0, 7)), (9, (0, 9, 0))):
        x, sizes = torch.randn(tokens, K).requires_grad_(), torch.tensor(sizes)
        plain, found = quantized_loss(torch, "numpy", sizes)(x, *weights), compiled(x, sizes)
        torch.testing.assert_close(found, plain, rtol=5e-5, atol=5e-5)
        expected = torch.autograd.grad(plain, x)
        torch.testing.assert_close(torch.autograd.grad(found, x), expected, rtol=5e-5, atol=5e-5)
    assert counter.frame_count == 1


def test_opcheck_of_quantized_weights():
    gate, up, _ = quantized_weights(torch.from_numpy)
    codes = [array[None] for weight in (gate, up) for array in (weight.values, weight.scales, weight.zeros)]
    x, sizes = torch.randn(1, TOKENS, K).requires_grad_(), torch.tensor([SIZES], dtype=torch.int32)
    inputs = (x, codes[0], codes[3], sizes, *codes[1:3], *codes[4:])
    arguments = (*inputs, "silu", True, "int4", 32, "triton", "interpret", None)
    results = torch.library.opcheck(torch.ops.crosstile.grouped_matmul.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernel", ["numpy", "triton"])
def test_torch_vmap_over_rows_of_quantized_weights(kernel):
    weight, xs = quantized_weights(torch.from_numpy)[0], torch.randn(2, TOKENS, K)
    sizes = torch.tensor(SIZES)
    out = torch.vmap(lambda x: grouped_matmul(x, weight, sizes, implementation=kernel))(xs)
    expected = [grouped_matmul(x, weight, sizes, implementation="library") for x in xs]
    torch.testing.assert_close(out, torch.stack(expected), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kernel", ["numpy", "pallas"])
def test_jax_vmap_over_quantized_weights(kernel):
    """A `Quantized` is a tree of arrays, whose leading axis can be mapped too."""
    (x, *_), many = randoms(), crosstile.quantize(randoms([(2, *SHAPES[1])])[0], **QUANTIZE)

    def product(implementation, weight):
        return grouped_matmul(x, weight, jnp.array(SIZES), implementation=implementation)

    expected = [product("library", jax.tree.map(lambda leaf, i=i: leaf[i], many)) for i in range(2)]
    close(jax.vmap(lambda weight: product(kernel, weight))(many), jnp.stack(expected))


@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_quantized_weights_export_for_tpus(chip, rng):
    weight = crosstile.quantize(jnp.asarray(rng.standard_normal((4, 512, 384)).astype(np.float32)), "mxfp4")
    sizes, x = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)

    def total(x, weight, sizes):
        return grouped_matmul(x, weight, sizes).astype(jnp.float32).sum()

    with crosstile.target(chip):
        exported = jax.export.export(jax.jit(jax.value_and_grad(total)), platforms=["tpu"])(x, weight, sizes)
    assert exported.mlir_module().count("tpu_custom_call") == 2


def test_quantized_weights_that_do_not_fit():
    x, sizes, w = np.ones((4, 8), np.float32), np.array([2, 2]), np.ones((2, 8, 6), np.float32)
    int8 = crosstile.quantize(w, "int8")
    with pytest.raises(
        crosstile.UnsupportedError, match=r"rhs: got a Quantized for activations='int8'; .* without act"
    ):
        grouped_matmul(x, crosstile.quantize(w, "int8", activations="int8"), sizes)
    with pytest.raises(TypeError, match=r"w_up: got ndarray where w_gate is a Quantized; both must be, or neither"):
        grouped_glu_matmul(x, int8, w, sizes)
    with pytest.raises(TypeError, match=r"w_gate: got ndarray where w_up is a Quantized; both must be, or neither"):
        grouped_glu_matmul(x, w, int8, sizes)
    with pytest.raises(ValueError, match=r"w_up: got mxfp4 in groups of 32; .* as w_gate is, int8 by columns"):
        grouped_glu_matmul(x, int8, crosstile.quantize(w, "mxfp4"), sizes)
    with pytest.raises(ValueError, match=r"w_up: got int8 by columns with zero points; it must be quantised as w_gate"):
        grouped_glu_matmul(x, int8, crosstile.quantize(w, "int8", zero_points=True), sizes)
    with pytest.raises(ValueError, match=r"rhs: got rank 2, \[8, 6\]; it must have rank 3, \[groups, k, n\]"):
        grouped_matmul(x, crosstile.quantize(w[0], "int8"), sizes)
    with pytest.raises(ValueError, match=r"rhs: k is 8 in \[2, 8, 6\]; it must be 5, as in lhs \[4, 5\]"):
        grouped_matmul(x[:, :5], int8, sizes)
    with pytest.raises(TypeError, match=r"rhs.values: got .*Tensor where lhs is numpy.ndarray"):
        grouped_matmul(x, crosstile.quantize(torch.from_numpy(w), "int8"), sizes)
    wrong = crosstile.Quantized(int8.values[:, :4], int8.scales, None, "int8", 8)
    with pytest.raises(ValueError, match=r"rhs.values: got \[2, 4, 6\]; of int8 it must be \[2, 8, 6\]"):
        grouped_matmul(x, wrong, sizes)
