"""rms_norm and layer_norm as users call them: every framework and implementation, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from installed import needs_jax_triton

import crosstile
from crosstile import layer_norm, rms_norm

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from crosstile import torch as glue  # noqa: E402

KERNELS = ["numpy", "triton", "pallas"]
SHAPE, HIDDEN = (2, 3, 20), 20


def rms(xp, implementation):
    def function(x, weight, residual):
        y, summed = rms_norm(x, weight, residual=residual, zero_centered=True, implementation=implementation)
        return xp.sin(y).sum() + xp.cos(summed).sum()

    return function


def layer(xp, implementation):
    def function(x, weight, bias):
        return xp.sin(layer_norm(x, weight, bias, implementation=implementation)).sum()

    return function


SUBJECTS = {"rms": (rms, (SHAPE, (HIDDEN,), SHAPE)), "layer": (layer, (SHAPE, (HIDDEN,), (HIDDEN,)))}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]


def leaves(shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def randoms(shapes):
    return [jax.random.normal(jax.random.key(seed), shape, jnp.float32) for seed, shape in enumerate(shapes)]


def close(ours, theirs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), ours, theirs)


def test_torch_gradients_are_those_of_the_library(kernel, subject):
    function, shapes = subject
    inputs = leaves(shapes)
    expected = torch.autograd.grad(function(torch, "library")(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(function(torch, kernel)(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_sum_is_used(kernel):
    x, weight, residual = leaves(SUBJECTS["rms"][1])
    _, summed = rms_norm(x, weight, residual=residual, implementation=kernel)
    dx, dweight, dresidual = torch.autograd.grad(summed.sum(), (x, weight, residual))
    for gradient, value in ((dx, 1), (dweight, 0), (dresidual, 1)):
        np.testing.assert_array_equal(gradient, value)


@pytest.mark.parametrize("kernel", [*KERNELS, "library"])
def test_torch_compile_has_one_graph_for_all_lengths(kernel, subject):
    function, shapes = subject
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function(torch, kernel), fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for length in (3, 5, 8):
        inputs = leaves([(2, length, HIDDEN) if shape == SHAPE else shape for shape in shapes])
        plain = function(torch, "library")(*inputs)
        loss = compiled(*inputs)
        torch.testing.assert_close(loss, plain)
        expected = torch.autograd.grad(plain, inputs)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected)
        graphs.append(counter.frame_count)  # torch may start the first one anew, with eps as a constant
    assert len(set(graphs)) == 1


def test_opcheck(kernel):
    x, weight = leaves([(1, 6, HIDDEN), (1, HIDDEN)])
    options = ["layer", 1e-5, False]
    assert list(glue._OPERATORS["norm"].options) == ["kind", "eps", "zero_centered"]
    arguments = (x, weight, None, x.detach(), *options, kernel, "interpret", None)
    results = torch.library.opcheck(torch.ops.crosstile.norm.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_torch_vmap_and_functional_gradients(kernel, subject):
    function, shapes = subject
    x, weight, last = (leaf.detach() for leaf in leaves(shapes))
    weights = torch.randn(2, HIDDEN)
    grad = torch.vmap(torch.func.grad(lambda weight: function(torch, kernel)(x, weight, last)))(weights)
    expected = [torch.func.grad(lambda weight: function(torch, "library")(x, weight, last))(w) for w in weights]
    torch.testing.assert_close(grad, torch.stack(expected))


def test_jax_gradients_under_jit_are_those_of_the_library(kernel, subject):
    function, shapes = subject
    expected = jax.value_and_grad(function(jnp, "library"), (0, 1, 2))(*randoms(shapes))
    close(jax.jit(jax.value_and_grad(function(jnp, kernel), (0, 1, 2)))(*randoms(shapes)), expected)


def test_jax_vmap_of_the_gradient(kernel, subject):
    function, shapes = subject
    x, _, last = randoms(shapes)
    weights = randoms([(2, HIDDEN)])[0]
    expected = jax.vmap(jax.grad(function(jnp, "library"), 1), (None, 0, None))(x, weights, last)
    close(jax.vmap(jax.grad(function(jnp, kernel), 1), (None, 0, None))(x, weights, last), expected)


@pytest.mark.parametrize("implementation", [None, "triton", "pallas"])
def test_numpy_arrays_and_any_leading_dimensions(implementation, rng):
    weight = rng.standard_normal(HIDDEN).astype(np.float32)
    for lead in ((), (3,), (2, 1, 3), (0, 2)):
        x = rng.standard_normal((*lead, HIDDEN)).astype(np.float32)
        y, summed = rms_norm(x, weight, residual=x, eps=0.5, implementation=implementation)
        exact = 2 * x.astype(np.float64)
        np.testing.assert_array_equal(summed, 2 * x)
        exact *= weight / np.sqrt(np.square(exact).mean(axis=-1, keepdims=True) + 0.5)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)


def test_one_row_for_all(kernel):
    """Strides of 0, as broadcasting makes them."""
    row, weight = torch.randn(HIDDEN), torch.ones(()).expand(HIDDEN)
    y = layer_norm(row.expand(4, HIDDEN), weight, implementation=kernel)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(row, (HIDDEN,)).expand(4, HIDDEN))


def test_bfloat16():
    x, weight = torch.randn(5, 33, dtype=torch.bfloat16), torch.randn(33, dtype=torch.bfloat16)
    exact = rms_norm(x.double(), weight.double(), implementation="numpy")
    for implementation in (None, "numpy", "triton", "pallas"):
        y = rms_norm(x, weight, implementation=implementation)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=2.0**-7, atol=2.0**-7)


def test_a_second_derivative_is_a_clear_error(kernel):
    x, weight, residual = leaves(SUBJECTS["rms"][1])
    (first,) = torch.autograd.grad(rms(torch, kernel)(x, weight, residual), x, create_graph=True)
    with pytest.raises(crosstile.UnsupportedError, match="double backward.*implementation='library'"):
        first.sum().backward()


@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_exports_for_tpus(chip):
    x, weight = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512,), jnp.bfloat16)

    def loss(x, weight):
        y, summed = rms_norm(x, weight, residual=x)
        return (y.astype(jnp.float32) * summed.astype(jnp.float32)).sum()

    with crosstile.target(chip):
        exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=["tpu"])(x, weight)
    assert exported.mlir_module().count("tpu_custom_call") == 2


@needs_jax_triton
@pytest.mark.parametrize("hidden", [64, 16384], ids=["whole", "walking"])
def test_lowers_for_cuda_through_jax_triton(hidden):
    def loss(x, weight, bias):
        with crosstile.target("sm_90"):
            return layer_norm(x, weight, bias).astype(jnp.float32).sum()

    x, weight = jnp.ones((4, hidden), jnp.bfloat16), jnp.ones(hidden, jnp.bfloat16)
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, weight, weight).lower(lowering_platforms=("cuda",))
    assert len(re.findall("triton_kernel_call", lowered.as_text())) >= 3


def test_explain_and_use():
    x, weight = torch.ones(4, 8), torch.ones(8)
    text = str(crosstile.explain("rms_norm", x, weight, implementation="triton"))
    assert text.startswith("rms_norm runs with 'triton' in its interpreter")
    assert "block_rows=" in text
    with crosstile.use("numpy"):
        assert crosstile.explain("layer_norm", x, weight, weight).choice.implementation == "numpy"
        torch.testing.assert_close(layer_norm(x, weight, weight), torch.ones(4, 8))


def zeros(shapes, **dtypes):
    return {name: np.zeros(shape, dtypes.get(name, "float32")) for name, shape in shapes.items()}


SHAPES = {"x": (2, 3, 8), "weight": (8,)}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": ()}, {}, r"x: got rank 0; it must be \[..., hidden\]"),
        ({"weight": (7,)}, {}, r"weight: got \[7\]; it must be \[hidden\] = \[8\], as in x"),
        ({"weight": (3, 8)}, {}, r"weight: got \[3, 8\]; it must be \[hidden\]"),
        ({"bias": (1,)}, {}, r"bias: got \[1\]; it must be \[hidden\] = \[8\]"),
        ({"residual": (3, 8)}, {}, r"residual: got \[3, 8\]; it must have the shape of x, \[2, 3, 8\]"),
        ({}, {"eps": -1e-6}, r"eps: got -1e-06; it must be finite and not negative"),
        ({}, {"eps": float("nan")}, r"eps: got nan"),
    ],
)
def test_what_does_not_fit(change, options, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**zeros({**SHAPES, **change}), **options)


@pytest.mark.parametrize(
    ("dtypes", "options", "message"),
    [
        ({"x": "int32"}, {}, r"x: dtype is int32"),
        ({"weight": "float16"}, {}, r"weight: dtype is float16; it must be float32, as x is: convert one of them"),
        ({}, {"eps": "small"}, r"eps: got str; it must be a number"),
        ({}, {"config": 3, "implementation": "triton"}, r"config: got int; norm takes a .*NormConfig"),
    ],
)
def test_types_that_cannot_be(dtypes, options, message):
    with pytest.raises(TypeError, match=message):
        rms_norm(**zeros(SHAPES, **dtypes), **options)


def test_two_frameworks():
    with pytest.raises(TypeError, match="weight: got .*Tensor where x is numpy.ndarray"):
        rms_norm(np.zeros((2, 8), np.float32), torch.zeros(8))
