"""Partial results joined by their logsumexp are the attention over all keys, with its gradients, in each framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracles import assert_equal_in_float64, assert_within

import crosstile
from crosstile.merge import merge_attention

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

PARTS = (slice(0, 4), slice(4, 5), slice(5, 11))
MASK = np.random.default_rng(5).random((2, 4, 6, 11)) > 0.4
MASK[0, :, 2] = False  # a query that sees nothing anywhere
MASK[1, :, 3, PARTS[1]] = False
MASK[1, 2, 4, 4:] = False  # and one that sees keys of the first part only


def arrays_of(dtype: str = "float64") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((2, 6, 4, 8), (2, 11, 2, 8), (2, 11, 2, 5))
    return [rng.standard_normal(shape).astype(np.float32).astype(dtype) for shape in shapes]


def whole(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return crosstile.attention(q, k, v, mask=mask, return_lse=True)


def merged(q: Any, k: Any, v: Any, mask: Any) -> Any:
    parts = [whole(q, k[:, part], v[:, part], mask[..., part]) for part in PARTS]
    return merge_attention(*zip(*parts, strict=True))


def by_torch(function: Any, dtype: str) -> dict[str, np.ndarray]:
    leaves = [torch.tensor(array).to(getattr(torch, dtype)).requires_grad_() for array in arrays_of()]
    out, lse = function(*leaves, torch.tensor(MASK))
    weights = torch.tensor(np.random.default_rng(1).standard_normal(out.shape))
    loss = (out * weights).sum() + torch.where(lse.isfinite(), lse, 0).cos().sum()
    results = (out, lse, *torch.autograd.grad(loss, leaves))
    names = ("out", "lse", "dq", "dk", "dv")
    return {name: result.detach().double().numpy() for name, result in zip(names, results, strict=True)}


def by_jax(function: Any, dtype: str) -> dict[str, np.ndarray]:
    def loss(q: Any, k: Any, v: Any) -> Any:
        out, lse = function(q, k, v, jax.numpy.asarray(MASK))
        weights = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
        return (out * weights).sum() + jax.numpy.cos(jax.numpy.where(jax.numpy.isfinite(lse), lse, 0)).sum(), (out, lse)

    inputs = [jax.numpy.asarray(array, dtype) for array in arrays_of()]
    gradients, results = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    names = ("out", "lse", "dq", "dk", "dv")
    return {n: np.asarray(result, np.float64) for n, result in zip(names, (*results, *gradients), strict=True)}


@pytest.mark.parametrize("by", [by_torch, by_jax])
def test_gives_what_the_whole_gives(by):
    exact = by_torch(whole, "float64")
    assert_within(by(merged, "float32"), by(whole, "float32"), exact, "float32")
    assert (exact["lse"] == -np.inf).sum() == 4


def test_in_float64():
    assert_equal_in_float64(by_torch(merged, "float64"), by_torch(whole, "float64"))
    with np.errstate(all="raise"):
        out, lse = merged(*arrays_of(), MASK)
    exact = dict(zip(("out", "lse"), whole(*arrays_of(), MASK), strict=True))
    assert_equal_in_float64({"out": out, "lse": lse}, exact)
    assert (out[0, 2] == 0).all()


def test_dtypes():
    """Sums are float32, the result is what the parts are."""
    out, lse = np.ones((1, 2, 3, 4), np.float16), np.zeros((1, 3, 2), np.float32)
    result, total = merge_attention([out, 3 * out], [lse, lse])
    assert (result.dtype, total.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(result, 2 * out)
    np.testing.assert_allclose(total, np.log(2.0), rtol=1e-7)
    tensor, total = merge_attention([torch.tensor(out).bfloat16()] * 2, [torch.tensor(lse)] * 2)
    assert (tensor.dtype, total.dtype) == (torch.bfloat16, torch.float32)


def test_large_logsumexps_do_not_overflow():
    out = np.ones((1, 1, 1, 1), np.float32)
    result, lse = merge_attention([out, 2 * out], [np.full((1, 1, 1), x, np.float32) for x in (500.0, 600.0)])
    assert (result.item(), lse.item()) == (2.0, 600.0)


def test_what_a_blind_part_holds_reaches_nothing():
    """NaN in the rows of a part that saw nothing: neither the result nor a gradient."""
    outs = [torch.full((1, 1, 2, 3), 2.0), torch.full((1, 1, 2, 3), float("nan"))]
    lses = [torch.zeros(1, 2, 1), torch.full((1, 2, 1), float("-inf"))]
    leaves = [leaf.requires_grad_() for leaf in (*outs, *lses)]
    out, lse = merge_attention(outs, lses)
    torch.testing.assert_close(out, outs[0])
    gradients = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[3] == 0).all()


def test_a_row_that_no_part_saw_has_zero_gradients():
    leaves = [torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), *(torch.full((1, 1, 2), -torch.inf) for _ in "ab")]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, lse = merge_attention(leaves[:2], leaves[2:])
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert all((gradient == 0).all() for gradient in gradients)


def test_parts_of_parts():
    """Merging is associative, and packed results merge too."""
    rng = np.random.default_rng(2)
    outs, lses = list(rng.standard_normal((3, 7, 2, 5))), list(rng.standard_normal((3, 2, 7)))
    at_once = merge_attention(outs, lses)
    first = merge_attention(outs[:2], lses[:2])
    in_turn = merge_attention([first[0], outs[2]], [first[1], lses[2]])
    for x, y in zip(at_once, in_turn, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13)
    np.testing.assert_array_equal(merge_attention(outs[:1], lses[:1])[0], outs[0])


def test_under_transformations():
    rng = np.random.default_rng(3)
    outs = rng.standard_normal((3, 2, 1, 4, 2, 5)).astype(np.float32)  # mapped, parts, ...
    lses = rng.standard_normal((3, 2, 1, 2, 4)).astype(np.float32)
    expected = [merge_attention(list(out), list(lse))[0] for out, lse in zip(outs, lses, strict=True)]

    def merge(outs: Any, lses: Any) -> Any:
        return merge_attention(tuple(outs), tuple(lses))[0]

    mapped = jax.jit(jax.vmap(merge))(outs, lses)
    np.testing.assert_allclose(mapped, np.stack(expected), rtol=1e-5)
    mapped = torch.vmap(lambda outs, lses: merge(outs.unbind(0), lses.unbind(0)))(
        torch.tensor(outs), torch.tensor(lses)
    )
    np.testing.assert_allclose(mapped, np.stack(expected), rtol=1e-5)
    compiled = torch.compile(merge, fullgraph=True, backend="eager")
    result = compiled(torch.tensor(outs[0]).unbind(0), torch.tensor(lses[0]).unbind(0))
    np.testing.assert_allclose(result, expected[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, r"lses: got 0 for 0 outs"),
        ([np.ones((1, 2, 3, 4))], [], ValueError, r"lses: got 0 for 1 outs"),
        ([np.ones((1, 2, 3, 4))], [np.ones((1, 2, 3))], ValueError, r"lses\[0\]: got \[1, 2, 3\]; .* = \[1, 3, 2\]"),
        ([np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 5))], [np.ones((1, 3, 2))] * 2, ValueError, r"outs\[1\]: got"),
        ([np.ones((3, 4))], [np.ones((3,))], ValueError, r"outs\[0\]: got \[3, 4\]; it must be \[batch"),
        ([np.ones((1, 2, 3, 4), int)], [np.ones((1, 3, 2))], TypeError, r"outs\[0\]: dtype is int64"),
        ([np.ones((1, 2, 3, 4))], [np.ones((1, 3, 2), int)], TypeError, r"lses\[0\]: dtype is int64"),
        (
            [np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 4), np.float32)],
            [np.ones((1, 3, 2))] * 2,
            TypeError,
            r"outs\[1\]: dtype is float32; it must be float64",
        ),
        ([np.ones((1, 2, 3, 4))], [torch.ones((1, 3, 2))], TypeError, r"lses\[0\]: got torch.Tensor where outs\[0\]"),
    ],
)
def test_refuses(outs, lses, error, message):
    with pytest.raises(error, match=message):
        merge_attention(outs, lses)
