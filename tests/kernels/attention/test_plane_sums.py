"""Gradients that sum over all keys, in 16 bits: terms that cancel must not leave the rounding of the outputs behind.

Of ALiBi's slopes and the like, a gradient is a sum over the keys of what they send back less delta, the row's mean of
it, times a distance. Were delta made of rounded outputs, its error would be multiplied by the mean distance.
"""

import pytest
import torch

import crosstile
from crosstile import mods
from crosstile.bench.chip import _compare
from crosstile.kernels.attention import pallas, triton_backward

HEADS, DIM = 2, 64


def gradients(
    implementation: str, dtype: torch.dtype, *, with_lse: bool, sinks: bool, length: int
) -> list[torch.Tensor]:
    """Those of the slopes and of a number for every query, from the gradients of the result and of lse."""
    torch.manual_seed(3)
    shape = (1, length, HEADS, DIM)
    q, k, v, dout = (torch.randn(shape).bfloat16().to(dtype) for _ in range(4))
    dlse = torch.randn(1, HEADS, length).to(dtype if dtype == torch.float64 else torch.float32)
    slopes = torch.tensor([2.0**-4, 2.0**-6], dtype=dlse.dtype, requires_grad=True)
    factors = torch.randn(length).bfloat16().to(dtype).requires_grad_()
    alibi = mods.alibi(slopes)
    out, lse = crosstile.attention(
        q,
        k,
        v,
        causal=True,
        score_mod=lambda score, b, h, i, j: alibi(score, b, h, i, j) + factors[i] * (j - i) * 2.0**-6,
        sinks=torch.tensor([1.0, -1.0], dtype=dlse.dtype) if sinks else None,
        return_lse=True,
        implementation=implementation,
    )
    asked = ([out, lse], [dout, dlse]) if with_lse else ([out], [dout])
    return list(torch.autograd.grad(asked[0], [slopes, factors], asked[1]))


def multiples(implementation: str, **case: int) -> list[float]:
    """The errors, as multiples of twice those of torch's ops and a floor, of the slopes in float32."""
    found, own, exact = (
        gradients(name, dtype, **case)
        for name, dtype in ((implementation, torch.bfloat16), ("library", torch.bfloat16), ("numpy", torch.float64))
    )
    return [
        _compare(ours, theirs, true, str(ours.dtype).removeprefix("torch."))[1]
        for ours, theirs, true in zip(found, own, exact, strict=True)
    ]


@pytest.mark.parametrize("implementation", ["triton", "pallas"])
@pytest.mark.parametrize(("with_lse", "sinks"), [(False, False), (True, True)])
def test_error_is_that_of_the_terms(implementation, with_lse, sinks):
    assert max(multiples(implementation, with_lse=with_lse, sinks=sinks, length=160)) <= 1


def test_it_would_be_seen(monkeypatch):
    """With the delta of rounded outputs, and a length whose plans are new."""
    monkeypatch.setattr(triton_backward, "needs_exact_delta", lambda spec, planes: False)
    monkeypatch.setattr(pallas, "exact_delta", lambda operands: operands[-1][1])
    for implementation in ("triton", "pallas"):
        assert multiples(implementation, with_lse=False, sinks=False, length=150)[0] > 1
