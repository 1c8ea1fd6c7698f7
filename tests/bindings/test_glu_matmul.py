"""glu_matmul as users call it: every framework and implementation, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from installed import needs_jax_triton

import crosstile
from crosstile import glu_matmul

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.nn import functional  # noqa: E402

from crosstile import torch as glue  # noqa: E402

KERNELS = ["numpy", "triton", "pallas"]
K, N = 20, 12
SHAPES = ((2, 3, K), (K, N), (K, N))


def loss(xp, implementation, activation="gelu_tanh"):
    def function(x, w_gate, w_up):
        return xp.sin(glu_matmul(x, w_gate, w_up, activation=activation, implementation=implementation)).sum()

    return function


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def leaves(shapes=SHAPES):
    return [(torch.randn(shape) / 2).requires_grad_() for shape in shapes]


def randoms(shapes=SHAPES):
    return [jax.random.normal(jax.random.key(seed), shape, jnp.float32) / 2 for seed, shape in enumerate(shapes)]


def close(ours, theirs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5, atol=5e-6), ours, theirs)


def test_torch_gradients_are_those_of_the_library(kernel):
    inputs = leaves()
    expected = torch.autograd.grad(loss(torch, "library")(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(loss(torch, kernel)(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("implementation", [*KERNELS, None])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_linear_layers_of_torch_give_their_weights_transposed(implementation, activation):
    gate, up, x = torch.nn.Linear(K, N, bias=False), torch.nn.Linear(K, N, bias=False), torch.randn(3, K)
    bend = {"gelu_tanh": lambda z: functional.gelu(z, approximate="tanh")}.get(activation)
    expected = (bend or getattr(functional, activation))(gate(x)) * up(x)
    ours = glu_matmul(x, gate.weight.T, up.weight.T, activation=activation, implementation=implementation)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(3, N)
    theirs = torch.autograd.grad(expected, (gate.weight, up.weight), upstream)
    for gradient, wanted in zip(torch.autograd.grad(ours, (gate.weight, up.weight), upstream), theirs, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_only_what_is_asked_for_is_differentiated(kernel):
    x, w_gate, w_up = leaves()
    (dw_up,) = torch.autograd.grad(loss(torch, kernel)(x.detach(), w_gate.detach(), w_up), w_up)
    (expected,) = torch.autograd.grad(loss(torch, "library")(x.detach(), w_gate.detach(), w_up), w_up)
    torch.testing.assert_close(dw_up, expected, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("kernel", [*KERNELS, "library"])
def test_torch_compile_has_one_graph_for_all_lengths(kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss(torch, kernel), fullgraph=True, backend=counter, dynamic=True)
    for length in (3, 5, 8):
        inputs = leaves(((2, length, K), *SHAPES[1:]))
        plain = loss(torch, "library")(*inputs)
        found = compiled(*inputs)
        torch.testing.assert_close(found, plain)
        expected = torch.autograd.grad(plain, inputs)
        torch.testing.assert_close(torch.autograd.grad(found, inputs), expected, rtol=5e-5, atol=5e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("saves", [False, True])
def test_opcheck(kernel, saves):
    inputs = leaves(((1, 6, K), (1, K, N), (1, K, N)))
    if not saves:  # without its preactivations a forward has no backward
        inputs = [leaf.detach() for leaf in inputs]
    assert list(glue._OPERATORS["glu_matmul"].options) == ["activation", "save_preactivations"]
    arguments = (*inputs, "silu", saves, kernel, "interpret", None)
    results = torch.library.opcheck(torch.ops.crosstile.glu_matmul.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_torch_vmap_and_functional_gradients(kernel):
    x, w_gate, w_up = (leaf.detach() for leaf in leaves())
    weights = torch.randn(2, K, N) / 2
    grad = torch.vmap(torch.func.grad(lambda weight: loss(torch, kernel)(x, weight, w_up)))(weights)
    expected = [torch.func.grad(lambda weight: loss(torch, "library")(x, weight, w_up))(w) for w in weights]
    torch.testing.assert_close(grad, torch.stack(expected), rtol=5e-5, atol=5e-6)


def test_jax_gradients_under_jit_are_those_of_the_library(kernel):
    expected = jax.value_and_grad(loss(jnp, "library"), (0, 1, 2))(*randoms())
    close(jax.jit(jax.value_and_grad(loss(jnp, kernel), (0, 1, 2)))(*randoms()), expected)


def test_jax_vmap_of_the_gradient(kernel):
    x, _, w_up = randoms()
    (weights,) = randoms([(2, K, N)])
    expected = jax.vmap(jax.grad(loss(jnp, "library"), 1), (None, 0, None))(x, weights, w_up)
    close(jax.vmap(jax.grad(loss(jnp, kernel), 1), (None, 0, None))(x, weights, w_up), expected)


@pytest.mark.parametrize("implementation", [None, "triton", "pallas"])
@pytest.mark.parametrize("lead", [(3,), (2, 1, 3), (0, 2), (2, 0)], ids=str)
def test_numpy_arrays_and_any_leading_dimensions(implementation, lead, rng):
    x = rng.standard_normal((*lead, K)).astype(np.float32)
    w_gate, w_up = rng.standard_normal((2, K, N)).astype(np.float32)
    out = glu_matmul(x, w_gate, w_up, activation="relu", implementation=implementation)
    exact = np.maximum(x.astype(np.float64) @ w_gate, 0) * (x.astype(np.float64) @ w_up)
    assert out.shape == (*lead, N)
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-4)


def test_one_row_for_all(kernel):
    """Strides of 0, as broadcasting makes them."""
    row, column = torch.randn(K), torch.randn(K, 1)
    out = glu_matmul(row.expand(4, K), column.expand(K, N), torch.ones(()).expand(K, N), implementation=kernel)
    torch.testing.assert_close(out, (functional.silu(row @ column) * row.sum()).expand(4, N))


def test_bfloat16():
    x, w_gate, w_up = (leaf.detach().bfloat16() for leaf in leaves(((5, 33), (33, N), (33, N))))
    exact = glu_matmul(x.double(), w_gate.double(), w_up.double(), implementation="numpy")
    for implementation in (None, *KERNELS):
        out = glu_matmul(x, w_gate, w_up, implementation=implementation)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact, rtol=2.0**-6, atol=2.0**-6)


def test_a_second_derivative_is_a_clear_error(kernel):
    inputs = leaves()
    (first,) = torch.autograd.grad(loss(torch, kernel)(*inputs), inputs[0], create_graph=True)
    with pytest.raises(crosstile.UnsupportedError, match="double backward.*implementation='library'"):
        first.sum().backward()


@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_exports_for_tpus(chip):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 512), (512, 384), (512, 384))]

    def total(*arrays):
        return glu_matmul(*arrays).astype(jnp.float32).sum()

    with crosstile.target(chip):
        exported = jax.export.export(jax.jit(jax.grad(total, (0, 1, 2))), platforms=["tpu"])(*arrays)
    assert exported.mlir_module().count("tpu_custom_call") == 4


@needs_jax_triton
def test_lowers_for_cuda_through_jax_triton():
    def total(*arrays):
        with crosstile.target("sm_90"):
            return glu_matmul(*arrays).astype(jnp.float32).sum()

    arrays = [jnp.ones(shape, jnp.bfloat16) for shape in ((64, 64), (64, 128), (64, 128))]
    lowered = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert len(re.findall("triton_kernel_call", lowered.as_text())) >= 4
    lowered = jax.jit(total).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()


def test_explain_and_use():
    x, weight = torch.ones(4, 8), torch.ones(8, 8)
    text = str(crosstile.explain("glu_matmul", x, weight, weight, implementation="triton"))
    assert text.startswith("glu_matmul runs with 'triton' in its interpreter")
    assert "GluMatmulConfig(forward=" in text
    with crosstile.use("numpy"):
        assert crosstile.explain("glu_matmul", x, weight, weight).choice.implementation == "numpy"
        torch.testing.assert_close(
            glu_matmul(x, weight, weight, activation="relu"), torch.full((4, 8), 64.0), rtol=0, atol=0
        )


def zeros(shapes, **dtypes):
    return {name: np.zeros(shape, dtypes.get(name, "float32")) for name, shape in shapes.items()}


FITTING = {"x": (2, 3, 8), "w_gate": (8, 5), "w_up": (8, 5)}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": (8,)}, {}, r"x: got rank 1, \[8\]; it must be \[..., m, k\] \(a vector: x\[None\]\)"),
        ({"w_gate": (2, 8, 5)}, {}, r"w_gate: got rank 3, \[2, 8, 5\]; it must have rank 2, \[k, n\]"),
        ({"w_up": (8,)}, {}, r"w_up: got rank 1, \[8\]; it must have rank 2, \[k, n\]"),
        ({"w_gate": (7, 5)}, {}, r"w_gate: k is 7 in \[7, 5\]; it must be 8, as in x \[2, 3, 8\]$"),
        ({"w_gate": (5, 8)}, {}, r"w_gate: k is 5 in \[5, 8\]; .* \(a weight \[n, k\] as .* has it: w_gate.T\)"),
        ({"w_up": (8, 6)}, {}, r"w_up: got \[8, 6\]; it must have the shape of w_gate, \[8, 5\]"),
        ({"w_up": (5, 8)}, {}, r"w_up: got \[5, 8\]; it must have the shape of w_gate, \[8, 5\]"),
        ({}, {"activation": "swish"}, r"activation: got 'swish'; it must be one of relu, gelu, gelu_tanh, silu"),
        ({}, {"activation": None}, r"activation: got None; it must be one of relu"),
    ],
)
def test_what_does_not_fit(change, options, message):
    with pytest.raises(ValueError, match=message):
        glu_matmul(**zeros({**FITTING, **change}), **options)


@pytest.mark.parametrize(
    ("dtypes", "options", "message"),
    [
        ({"x": "int32"}, {}, r"x: dtype is int32"),
        ({"w_up": "float16"}, {}, r"w_up: dtype is float16; it must be float32, as x is: convert one of them"),
        ({}, {"config": 3, "implementation": "triton"}, r"config: got int; glu_matmul takes a .*GluMatmulConfig"),
    ],
)
def test_types_that_cannot_be(dtypes, options, message):
    with pytest.raises(TypeError, match=message):
        glu_matmul(**zeros(FITTING, **dtypes), **options)


def test_two_frameworks():
    with pytest.raises(TypeError, match=r"w_gate: got .*Tensor where x is numpy.ndarray"):
        glu_matmul(np.zeros((2, 8), np.float32), torch.zeros(8, 5), torch.zeros(8, 5))
