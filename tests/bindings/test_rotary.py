"""rotary as users call it: every framework and implementation, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from installed import needs_jax_triton
from sweeps import one_in

import crosstile
from crosstile import rotary
from crosstile.kernels.rotary.spec import Llama3Scaling, YarnScaling

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from crosstile import torch as glue  # noqa: E402

KERNELS = ["numpy", "triton", "pallas"]
Q, K = (2, 5, 4, 8), (2, 5, 2, 8)
YARN = YarnScaling(4.0, 64)
OPTIONS = {
    "half": {},
    "interleaved": {"interleaved": True, "rotary_dim": 6, "scaling": YARN},
}


def turn(xp, positions, implementation, options):
    def function(q, k):
        rotated_q, rotated_k = rotary((q, k), positions, implementation=implementation, **options)
        return xp.sin(rotated_q).sum() + xp.cos(rotated_k).sum()

    return function


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def leaves(length=5):
    return [torch.randn(shape[0], length, *shape[2:], requires_grad=True) for shape in (Q, K)]


def randoms():
    return [jax.random.normal(jax.random.key(seed), shape, jnp.float32) for seed, shape in enumerate((Q, K))]


def close(ours, theirs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), ours, theirs)


def test_torch_gradients_are_those_of_the_library(kernel, options):
    inputs, positions = leaves(), torch.arange(10).reshape(2, 5)
    expected = torch.autograd.grad(turn(torch, positions, "library", options)(*inputs), inputs)
    found = torch.autograd.grad(turn(torch, positions, kernel, options)(*inputs), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_one_of_the_pair_is_used(kernel):
    q, k = leaves()
    for wanted in (0, 1):
        rotated = rotary((q, k), torch.arange(5), implementation=kernel)[wanted]
        used, unused = torch.autograd.grad(rotated.sum(), (q, k)[:: -1 if wanted else 1], allow_unused=True)
        assert used.abs().sum() > 0
        assert unused is None or not unused.any()


@pytest.mark.parametrize("kernel", one_in(2, ["library", *KERNELS]))
def test_torch_compile_has_one_graph_for_all_lengths(kernel, options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(q, k, positions):
        return turn(torch, positions, kernel, options)(q, k)

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for length in (3, 5, 8):
        inputs, positions = leaves(length), torch.arange(length)
        plain = turn(torch, positions, "library", options)(*inputs)
        loss = compiled(*inputs, positions)
        torch.testing.assert_close(loss, plain)
        expected = torch.autograd.grad(plain, inputs)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected)
        graphs.append(counter.frame_count)  # torch may start the first one anew, with base as a constant
    assert len(set(graphs)) == 1


def test_opcheck(kernel):
    q, k = leaves()
    assert list(glue._OPERATORS["rotary"].options) == ["rotary_dim", "interleaved", "factor"]
    positions, frequencies = torch.arange(10, dtype=torch.int32).reshape(2, 5), torch.rand(2, 3)
    arguments = (q, k, positions, frequencies, 6, True, 1.25, kernel, "interpret", None)
    results = torch.library.opcheck(torch.ops.crosstile.rotary.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_torch_vmap_and_functional_gradients(kernel, options):
    k, positions = leaves()[1].detach(), torch.arange(5)
    queries = torch.randn(3, *Q)
    grad = torch.vmap(torch.func.grad(lambda q: turn(torch, positions, kernel, options)(q, k)))(queries)
    expected = [torch.func.grad(lambda q: turn(torch, positions, "library", options)(q, k))(q) for q in queries]
    torch.testing.assert_close(grad, torch.stack(expected))


def test_jax_gradients_under_jit_are_those_of_the_library(kernel, options):
    positions = jnp.arange(10).reshape(2, 5)
    expected = jax.value_and_grad(turn(jnp, positions, "library", options), (0, 1))(*randoms())
    close(jax.jit(jax.value_and_grad(turn(jnp, positions, kernel, options), (0, 1)))(*randoms()), expected)


def test_jax_vmap_of_the_gradient(kernel):
    k, positions = randoms()[1], jnp.arange(5)
    queries = jax.random.normal(jax.random.key(0), (3, *Q))
    expected = jax.vmap(jax.grad(turn(jnp, positions, "library", {})), (0, None))(queries, k)
    close(jax.vmap(jax.grad(turn(jnp, positions, kernel, {})), (0, None))(queries, k), expected)


@pytest.mark.parametrize("implementation", [None, "triton", "pallas"])
def test_numpy_arrays_one_or_two(implementation, rng):
    q, k = (rng.standard_normal(shape).astype(np.float32) for shape in (Q, K))
    positions = np.array([7, 0, 3, 3, 100])
    pair = rotary((q, k), positions, implementation=implementation)
    assert isinstance(pair, tuple)
    for x, rotated in zip((q, k), pair, strict=True):
        alone = rotary(x, np.broadcast_to(positions, (2, 5)), implementation=implementation)
        np.testing.assert_array_equal(alone, rotated)
        turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None, None] * 10.0 ** -np.arange(4.0))
        np.testing.assert_allclose(rotated, np.concatenate((turned.real, turned.imag), -1), rtol=1e-4, atol=2e-5)


def test_scalings_reach_the_kernels(kernel):
    q = leaves()[0].detach()
    plain = rotary(q, torch.arange(5) * 100, implementation=kernel)
    llama = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    found = rotary(q, torch.arange(5) * 100, scaling=Llama3Scaling(**llama), implementation=kernel)
    same = rotary(q, torch.arange(5) * 100, scaling={"rope_type": "llama3", **llama}, implementation=kernel)
    torch.testing.assert_close(found, same, rtol=0, atol=0)
    assert not torch.allclose(found, plain)
    rotated = rotary(q, torch.arange(5), scaling=YARN, implementation=kernel)
    torch.testing.assert_close(rotated.norm() / q.norm(), torch.tensor(0.1 * np.log(4.0) + 1).float())


def test_against_transformers():
    """With the tables that a model of theirs makes, in float32."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=256, rope_parameters=parameters)
    q, k = (x.detach() for x in leaves())
    positions = torch.arange(5)[None].expand(2, 5) * 50
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    ours = rotary((q, k), positions, base=1e4, scaling=parameters)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y.transpose(1, 2))


def test_bfloat16():
    q = torch.randn(1, 9, 2, 16, dtype=torch.bfloat16)
    exact = rotary(q.double(), torch.arange(9), implementation="numpy")
    for implementation in (None, "numpy", "triton", "pallas"):
        rotated = rotary(q, torch.arange(9), implementation=implementation)
        assert rotated.dtype == torch.bfloat16
        torch.testing.assert_close(rotated.double(), exact, rtol=2.0**-7, atol=2.0**-7)


def test_a_second_derivative_is_a_clear_error(kernel):
    q, k = leaves()
    (first,) = torch.autograd.grad(turn(torch, torch.arange(5), kernel, {})(q, k), q, create_graph=True)
    with pytest.raises(crosstile.UnsupportedError, match="double backward.*implementation='library'"):
        first.sum().backward()


@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_exports_for_tpus(chip):
    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 128), jnp.bfloat16) for heads in (8, 2))

    def loss(q, k):
        rotated_q, rotated_k = rotary((q, k), jnp.arange(256))
        return jnp.sin(rotated_q.astype(jnp.float32)).sum() + rotated_k.astype(jnp.float32).sum()

    with crosstile.target(chip):
        exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=["tpu"])(q, k)
    assert exported.mlir_module().count("tpu_custom_call") == 2


@needs_jax_triton
@pytest.mark.parametrize("interleaved", [False, True])
def test_lowers_for_cuda_through_jax_triton(interleaved):
    q, k = (jax.ShapeDtypeStruct((1, 64, heads, 128), jnp.bfloat16) for heads in (8, 2))

    def loss(q, k):
        with crosstile.target("sm_90"):
            rotated_q, rotated_k = rotary((q, k), jnp.arange(64), interleaved=interleaved)
        return jnp.sin(rotated_q.astype(jnp.float32)).sum() + rotated_k.astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1))).trace(q, k).lower(lowering_platforms=("cuda",))
    assert len(re.findall("triton_kernel_call", lowered.as_text())) >= 2


def test_explain():
    text = str(crosstile.explain("rotary", leaves()[0], torch.arange(5), implementation="triton"))
    assert text.startswith("rotary runs with 'triton' in its interpreter")
    assert "block_length=" in text


def zeros(shapes, **dtypes):
    return [np.zeros(shape, dtypes.get(name, "float32")) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"q": (2, 5, 8)}, {}, r"x: got rank 3, \[2, 5, 8\]; it must have rank 4, \[batch, length, heads, head_dim\]"),
        (
            {"k": (2, 4, 2, 8)},
            {},
            r"x\[1\]: got \[2, 4, 2, 8\]; its batch, length and head_dim must be those of x\[0\]",
        ),
        ({"positions": (4,)}, {}, r"positions: got \[4\]; it must be \[batch, length\] = \[2, 5\], or \[length\]"),
        ({"positions": (1, 5)}, {}, r"positions: got \[1, 5\]"),
        ({"q": (2, 5, 4, 7), "k": (2, 5, 2, 7)}, {}, r"x: head_dim is 7; it must be even"),
        ({}, {"rotary_dim": 5}, r"rotary_dim: got 5; it must be even, and from 2 to head_dim = 8"),
        ({}, {"rotary_dim": 10}, r"rotary_dim: got 10"),
        ({}, {"base": 1.0}, r"base: got 1.0; it must be finite and greater than 1"),
        ({}, {"scaling": {"rope_type": "dynamic"}}, r"scaling: its rope_type is 'dynamic'"),
        ({}, {"scaling": YarnScaling(-1.0, 64)}, r"scaling: factor is -1.0"),
    ],
)
def test_what_does_not_fit(shapes, options, message):
    q, k, positions = zeros({"q": Q, "k": K, "positions": (5,), **shapes}, positions="int64")
    with pytest.raises(ValueError, match=message):
        rotary((q, k), positions, **options)


@pytest.mark.parametrize(
    ("dtypes", "options", "message"),
    [
        ({"q": "int32"}, {}, r"x: dtype is int32"),
        ({"k": "float16"}, {}, r"x\[1\]: dtype is float16; it must be float32, as x is"),
        ({"positions": "float32"}, {}, r"positions: dtype is float32; it must be an integer"),
        ({}, {"base": "large"}, r"base: got str; it must be a number"),
        ({}, {"scaling": 4.0}, r"scaling: got float; it must be None, a Llama3Scaling"),
        ({}, {"rotary_dim": 4.0}, r"rotary_dim: got float; it must be an integer or None"),
    ],
)
def test_types_that_cannot_be(dtypes, options, message):
    q, k, positions = zeros({"q": Q, "k": K, "positions": (5,)}, **{"positions": "int64", **dtypes})
    with pytest.raises(TypeError, match=message):
        rotary((q, k), positions, **options)


def test_three_arrays():
    x = np.zeros(Q, np.float32)
    with pytest.raises(TypeError, match=r"x: got 3 arrays; it must be one array, or a pair \(q, k\)"):
        rotary((x, x, x), np.arange(5))


def test_two_frameworks():
    with pytest.raises(TypeError, match="positions: got .*Tensor where x is numpy.ndarray"):
        rotary(np.zeros(Q, np.float32), torch.arange(5))
