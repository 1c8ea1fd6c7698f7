"""matmul's precision as users ask for it: what it gives in every framework, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import crosstile
from crosstile.dispatch import installed
from crosstile.kernels.matmul.tiles import MatmulConfig
from crosstile.kernels.tiles.errors import UnsupportedError

pytest.importorskip("triton")

MAKERS = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}


def arrays(make, dtype=np.float32):
    rng = np.random.default_rng(0)
    return make(rng.standard_normal((20, 48)).astype(dtype)), make(rng.standard_normal((48, 24)).astype(dtype))


@pytest.mark.parametrize("implementation", ["triton", "pallas"])
@pytest.mark.parametrize("framework", MAKERS)
@pytest.mark.parametrize(("precision", "error"), [("bf16x3", (2.0**-21, 2.0**-14)), ("bf16x6", (0, 2.0**-21))])
def test_every_framework(framework, implementation, precision, error):
    a, b = arrays(MAKERS[framework])
    out = np.asarray(crosstile.matmul(a, b, precision=precision, implementation=implementation))
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    least, most = error
    assert least <= np.max(np.abs(out - a @ b) / (np.abs(a) @ np.abs(b))) <= most


def test_the_gradients_have_it_too():
    a, b = (x.requires_grad_() for x in arrays(torch.as_tensor))
    crosstile.matmul(a, b, precision="bf16x3", implementation="triton").sum().backward()
    exact, terms = b.detach().double().sum(dim=1).expand(20, 48), b.detach().double().abs().sum(dim=1)
    error = ((a.grad - exact).abs() / terms).max().item()
    assert 2.0**-21 < error <= 2.0**-14


@pytest.mark.parametrize("framework", MAKERS)
def test_without_kernels_float32_is_float32(framework):
    a, b = arrays(MAKERS[framework])
    name = "numpy" if framework == "numpy" else "library"
    ours = crosstile.matmul(a, b, precision="tf32", implementation=name)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(crosstile.matmul(a, b, implementation=name)))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_precisions_that_there_are_not(make):
    a, b = arrays(make)
    with pytest.raises(
        ValueError, match=r"precision: got 'fast'; it must be None or one of tf32, tf32x3, bf16x3, bf16x6"
    ):
        crosstile.matmul(a, b, precision="fast")
    with pytest.raises(ValueError, match=r"precision: got 'tf32' with float16 arrays; it must be None"):
        crosstile.matmul(*arrays(make, np.float16), precision="tf32")


def test_a_precision_that_a_tpu_does_not_have():
    a, b = arrays(np.asarray)
    with pytest.raises(UnsupportedError, match=r"precision: got tf32x3; a TPU multiplies float32 as bf16x3, bf16x6"):
        crosstile.matmul(a, b, precision="tf32x3", implementation="pallas")


def test_compiled_with_a_precision():
    a, b = arrays(torch.as_tensor)
    function = torch.compile(
        lambda a, b: crosstile.matmul(a, b, precision="bf16x3", implementation="triton"),
        backend="eager",
        fullgraph=True,
    )
    torch.testing.assert_close(
        function(a, b), crosstile.matmul(a, b, precision="bf16x3", implementation="triton"), rtol=0, atol=0
    )


@pytest.mark.parametrize("framework", MAKERS)
def test_a_sum_in_parts(framework):
    a, b = arrays(MAKERS[framework])
    config = MatmulConfig(16, 16, 16, split_k=3, processors=2, persistent=1, descriptors=1)
    out = np.asarray(crosstile.matmul(a, b, implementation="triton", config=config))
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.max(np.abs(out - a @ b) / (np.abs(a) @ np.abs(b))) <= 2.0**-22


@pytest.mark.skipif(not (installed("jax_triton") and installed("jax_cuda12_plugin")), reason="needs jax-triton")
@pytest.mark.parametrize(("m", "k", "n"), [(4096, 4096, 4096), (16, 14336, 4096), (2304, 8192, 2304)])
def test_every_form_lowers_for_cuda(m, k, n):
    """Sums that are cut, in whole and in the last round; by addresses, for jax-triton has no memory for descriptors."""
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), (k, n)))
    with crosstile.target("sm_90"):
        traced = jax.jit(lambda a, b: crosstile.matmul(a, b, activation="silu")).trace(a, b)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == {4096: 1, 16: 2, 2304: 3}[m]
