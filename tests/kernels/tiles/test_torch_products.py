"""Products by torch's own operations: of one row and a matrix stored by columns, and of everything else."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from crosstile.kernels.tiles.torch_products import product

SHAPES = {"one row": (1, 1, 37), "a vector": (37,), "two rows": (2, 37), "no row": (0, 37)}


def by_columns(array):
    return array.mT.contiguous().mT


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_no_further_from_float64_than_twice_torch(dtype, biased, compiled):
    x, weight, bias = drawn(1, 700, dtype=dtype), by_columns(drawn(700, 33, dtype=dtype)), drawn(33, dtype=dtype)
    bias = bias if biased else None
    run = torch.compile(product, fullgraph=True, dynamic=True) if compiled else product
    exact = x.double() @ weight.double() + (bias.double() if biased else 0)
    theirs = (torch.nn.functional.linear(x, weight.T, bias) - exact).abs().max()
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (run(x, weight, bias) - exact).abs().max() <= 2 * theirs + unit / 2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("stored", [by_columns, torch.Tensor.contiguous], ids=["by columns", "by rows"])
def test_any_rows(shape, stored):
    x, weight, bias = drawn(*shape), stored(drawn(37, 24)), drawn(24)
    out = product(x, weight, bias)
    assert out.shape == (*shape[:-1], 24)
    torch.testing.assert_close(out.double(), x.double() @ weight.double() + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "stored", "is_summed"),
    [
        ((1, 37), by_columns, True),
        ((1, 37), torch.Tensor.contiguous, False),
        ((2, 37), by_columns, False),
    ],
)
def test_one_row_by_a_matrix_stored_by_columns_is_summed(shape, stored, is_summed):
    program = make_fx(lambda x, weight: product(x, weight))(drawn(*shape), stored(drawn(37, 24))).code
    assert ("aten.mv" in program, "aten.mm" in program) == (is_summed, not is_summed)


def test_gradients_and_vmap():
    x, weight = drawn(1, 37).requires_grad_(), by_columns(drawn(37, 24)).requires_grad_()
    found = torch.autograd.grad(product(x, weight).square().sum(), (x, weight))
    wanted = torch.autograd.grad((x @ weight).square().sum(), (x, weight))
    torch.testing.assert_close(found, wanted)
    rows, matrices = drawn(3, 1, 37), by_columns(drawn(3, 37, 24))
    torch.testing.assert_close(torch.func.vmap(product)(rows, matrices), rows @ matrices)
