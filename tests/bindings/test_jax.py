"""JAX: jit, grad, vmap and export of every implementation, and the lowering for chips that are not here."""

import os
import re

import pytest
from installed import needs_jax_triton

import crosstile

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

KERNELS = ["numpy", "triton", "pallas"]


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def attention_inputs():
    return random(2, 5, 4, 8), random(2, 7, 2, 8, seed=1), random(2, 7, 2, 6, seed=2)


def attend(implementation):
    def function(q, k, v):
        out, lse = crosstile.attention(q, k, v, causal=True, return_lse=True, implementation=implementation)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    return function


def multiply(implementation):
    def function(a, b, bias, residual):
        out = crosstile.matmul(a, b, bias=bias, activation="gelu", residual=residual, implementation=implementation)
        return jnp.sin(out).sum()

    return function


def matmul_inputs():
    return random(3, 4, 5), random(5, 6, seed=1), random(6, seed=2), random(4, 6, seed=3)


SUBJECTS = {"attention": (attend, attention_inputs), "matmul": (multiply, matmul_inputs)}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]


def close(ours, theirs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), ours, theirs)


def test_gradients_under_jit_are_those_of_the_library(kernel, subject):
    function, inputs = subject
    everything = tuple(range(len(inputs())))
    expected = jax.value_and_grad(function("library"), everything)(*inputs())
    close(jax.jit(jax.value_and_grad(function(kernel), everything))(*inputs()), expected)


def test_eager_calls(kernel, subject):
    function, inputs = subject
    close(function(kernel)(*inputs()), function("library")(*inputs()))


def test_vmap_of_the_gradient(kernel):
    _, k, v = attention_inputs()
    queries = random(3, 2, 5, 4, 8)
    expected = jax.vmap(jax.grad(attend("library")), (0, None, None))(queries, k, v)
    close(jax.vmap(jax.grad(attend(kernel)), (0, None, None))(queries, k, v), expected)


def test_vmap_of_matmul(kernel):
    a, b, bias, residual = matmul_inputs()
    biases = random(2, 6)
    expected = jax.vmap(multiply("library"), (None, None, 0, None))(a, b, biases, residual)
    close(jax.vmap(multiply(kernel), (None, None, 0, None))(a, b, biases, residual), expected)


def test_a_second_derivative_is_a_clear_error(kernel):
    q, k, v = attention_inputs()
    with pytest.raises(crosstile.UnsupportedError, match="double backward.*implementation='library'"):
        jax.grad(lambda x: jax.grad(attend(kernel))(x, k, v).sum())(q)


def test_rows_without_keys(kernel):
    q, k, v = random(1, 6, 2, 8), random(1, 2, 2, 8, seed=1), random(1, 2, 2, 8, seed=2)
    out, lse = crosstile.attention(q, k, v, causal=True, return_lse=True, implementation=kernel)
    assert (out[:, :4] == 0).all()
    assert jnp.isneginf(lse[..., :4]).all()
    grads = jax.grad(lambda *args: crosstile.attention(*args, causal=True, implementation=kernel).sum(), (0, 1, 2))
    results = grads(q, k, v)
    assert (results[0][:, :4] == 0).all()
    assert all(jnp.isfinite(result).all() for result in results)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7x"])
def test_export_for_tpu_holds_the_kernels(chip):
    struct = jax.ShapeDtypeStruct((1, 256, 4, 128), jnp.bfloat16)

    def loss(q, k, v):
        return crosstile.attention(q, k, v, causal=True).astype(jnp.float32).sum()

    with crosstile.target(chip):
        exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(struct, struct, struct)
    assert exported.platforms == ("tpu",)
    assert exported.mlir_module().count("tpu_custom_call") == 2  # the forward, and all gradients in one kernel


@needs_jax_triton
@pytest.mark.parametrize(("chip", "capability"), [("sm_80", 80), ("sm_90", 90), ("sm_100", 100)])
def test_jax_reaches_the_triton_kernels_of_a_gpu(chip, capability):
    struct = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.float16)

    def loss(q, k, v):
        return crosstile.attention(q, k, v, causal=True).astype(jnp.float32).sum()

    with crosstile.target(chip):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(struct, struct, struct).lower(lowering_platforms=("cuda",))
    assert os.environ.get("TRITON_CACHE_DIR") != ""  # jax-triton empties it when imported, and torch needs it
    text = lowered.as_text()
    assert len(re.findall(r"custom_call @\"?triton_kernel_call", text)) == 4  # forward, delta, dk and dv, dq


@needs_jax_triton
def test_triton_kernels_take_vmap():
    x, weight = jax.ShapeDtypeStruct((3, 8, 64), jnp.float16), jax.ShapeDtypeStruct((64,), jnp.float16)

    def rows(x, weight):
        return jax.vmap(crosstile.rms_norm, (0, None))(x, weight).astype(jnp.float32).sum()

    with crosstile.target("sm_90"):
        lowered = jax.jit(jax.grad(rows)).trace(x, weight).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()


@needs_jax_triton
def test_matmul_lowers_for_cuda():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (128, 256)))
    bias = jax.ShapeDtypeStruct((256,), jnp.bfloat16)
    with crosstile.target("sm_90"):
        function = jax.jit(lambda a, b, bias: crosstile.matmul(a, b, bias=bias, activation="silu"))
        text = function.trace(a, b, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in text


def test_a_gpu_without_jax_triton_is_named(monkeypatch):
    from crosstile import jax as glue

    monkeypatch.setattr(glue, "installed", lambda package: False)
    with crosstile.target("sm_90"), pytest.raises(crosstile.UnsupportedError, match=r"jax-triton is not installed"):
        crosstile.attention(*attention_inputs(), implementation="triton")
