"""Routing, permutation and the mixture put together, in every framework, against a loop over the experts."""

from __future__ import annotations

import numpy as np
import pytest

import crosstile
from crosstile import grouped_glu_matmul, grouped_matmul, moe
from crosstile.routing import load_balancing_loss, permute, route, unpermute

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

FRAMEWORKS = {
    "numpy": np.asarray,
    "torch": lambda array: torch.from_numpy(np.array(array)),
    "jax": lambda array: jnp.asarray(array, jnp.float32 if array.dtype.kind == "f" else None),
}
TOKENS, GROUPS, HIDDEN, WIDE = 11, 5, 8, 12


@pytest.fixture(params=FRAMEWORKS)
def make(request):
    return FRAMEWORKS[request.param]


def by_hand(logits, top_k, score="softmax", normalize=True, bias=None, scale=1.0):
    """A token at a time."""
    weights, experts = np.zeros((len(logits), top_k)), np.zeros((len(logits), top_k), int)
    for token, row in enumerate(logits):
        scores = 1 / (1 + np.exp(-row)) if score == "sigmoid" else np.exp(row) / np.exp(row).sum()
        chosen = scores + (0 if bias is None else bias)
        experts[token] = sorted(range(len(row)), key=lambda expert: (-chosen[expert], expert))[:top_k]
        found = scores[experts[token]]
        weights[token] = scale * (found / found.sum() if normalize else found)
    return weights, experts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"score": "sigmoid"},
        {"score": "sigmoid", "normalize": False},
        {"score": "sigmoid", "bias": np.linspace(1, -1, GROUPS), "scale": 2.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("top_k", [1, 2, GROUPS])
def test_route(make, top_k, options, rng):
    logits = rng.standard_normal((TOKENS, GROUPS))
    weights, experts = by_hand(logits, top_k, **options)
    given = {name: make(value) if name == "bias" else value for name, value in options.items()}
    ours = route(make(logits), top_k, **given)
    np.testing.assert_array_equal(ours[1], experts)
    np.testing.assert_allclose(ours[0], weights, rtol=1e-5)


def test_mixtral_is_a_softmax_of_the_chosen_logits(rng):
    logits = torch.randn(TOKENS, GROUPS)
    weights, experts = route(logits, 2)
    torch.testing.assert_close(weights, logits.gather(1, experts.long()).softmax(dim=1))


def test_equal_scores_go_to_the_lower_number(make):
    _, experts = route(make(np.zeros((300, 7))), 3)
    assert (np.asarray(experts) == [0, 1, 2]).all()


def test_narrow_logits_are_scored_in_float32():
    logits = torch.randn(TOKENS, GROUPS, dtype=torch.bfloat16)
    weights, experts = route(logits, 2)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(weights, route(logits.float(), 2)[0])


def test_permute_sorts_by_expert_in_the_order_of_the_tokens(make, rng):
    experts = rng.integers(-1, GROUPS + 1, (TOKENS, 3))
    x = np.arange(TOKENS, dtype=np.float32)[:, None]
    rows, sizes, places = permute(make(x), make(experts), GROUPS)
    flat = [(GROUPS if not 0 <= e < GROUPS else e, token) for token, row in enumerate(experts) for e in row]
    expected = sorted(flat, key=lambda pair: pair[0])
    assert np.asarray(rows)[:, 0].tolist() == [token for _, token in expected]
    assert np.asarray(sizes).tolist() == [sum(e == group for e, _ in flat) for group in range(GROUPS)]
    order, inverse = map(np.asarray, places)
    np.testing.assert_array_equal(order[inverse], np.arange(3 * TOKENS))


def test_unpermute_is_the_inverse(make, rng):
    experts = rng.integers(0, GROUPS, (TOKENS, 2))
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    rows, _, places = permute(make(x), make(experts), GROUPS)
    weights = rng.random((TOKENS, 2)).astype(np.float32)
    out = unpermute(rows, make(weights), places)
    np.testing.assert_allclose(out, x * weights.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (3, 0)])
def test_few_tokens(make, tokens, top_k):
    x, experts = np.ones((tokens, HIDDEN), np.float32), np.zeros((tokens, top_k), np.int32)
    rows, sizes, places = permute(make(x), make(experts), GROUPS)
    assert tuple(rows.shape) == (tokens * top_k, HIDDEN)
    assert np.asarray(sizes).tolist() == [tokens * top_k, 0, 0, 0, 0]
    out = unpermute(rows, make(np.ones((tokens, top_k), np.float32)), places)
    np.testing.assert_array_equal(out, np.full((tokens, HIDDEN), top_k))


def experts_by_loop(x, router, w_gate, w_up, w_down, top_k):
    """torch in float64: every expert on every token, weighted by 0 where it does not take it."""
    scores = (x @ router).softmax(dim=-1)
    kept = scores >= scores.topk(top_k, dim=-1).values[..., -1:]
    weights = torch.where(kept, scores, 0)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(router.shape[1]):
        hidden = torch.nn.functional.silu(x @ w_gate[expert]) * (x @ w_up[expert])
        out = out + weights[..., expert : expert + 1] * (hidden @ w_down[expert])
    return out


def layer(lead=(TOKENS,)):
    shapes = [(*lead, HIDDEN), (HIDDEN, GROUPS), (GROUPS, HIDDEN, WIDE), (GROUPS, HIDDEN, WIDE), (GROUPS, WIDE, HIDDEN)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("lead", [(TOKENS,), (2, 3), (0,), ()], ids=str)
def test_moe_in_numpy(lead):
    arrays = layer(lead)
    out = moe(*(array.numpy() for array in arrays), top_k=2)
    np.testing.assert_allclose(out, experts_by_loop(*arrays, 2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", ["library", "numpy", "triton", "pallas"])
def test_moe_and_its_gradients_in_torch(implementation):
    exact = [array.requires_grad_() for array in layer()]
    arrays = [array.detach().float().requires_grad_() for array in exact]
    expected = experts_by_loop(*exact, 2)
    out, logits = moe(*arrays, top_k=2, return_logits=True, implementation=implementation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact[0] @ exact[1], rtol=1e-4, atol=1e-5)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, exact, upstream)
    for ours, wanted in zip(torch.autograd.grad(out, arrays, upstream.float()), theirs, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("implementation", ["library", "pallas"])
def test_moe_and_its_gradients_in_jax_under_jit(implementation):
    exact = [array.requires_grad_() for array in layer()]
    upstream = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    theirs = torch.autograd.grad(experts_by_loop(*exact, 2), exact, upstream)
    arrays = [jnp.asarray(array.detach().numpy(), jnp.float32) for array in exact]

    def loss(*arrays):
        return (moe(*arrays, top_k=2, implementation=implementation) * jnp.asarray(upstream.numpy(), jnp.float32)).sum()

    with jax.default_matmul_precision("highest"):
        ours = jax.jit(jax.grad(loss, range(5)))(*arrays)
    for gradient, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("implementation", ["library", "numpy", "triton", "pallas"])
def test_moe_of_quantised_experts(implementation):
    """The same as of what their codes stand for, with the gradient of x."""
    x, router, *experts = [array.float() for array in layer()]
    quantized = [crosstile.quantize(weight, "int4", group_size=32) for weight in experts]
    x, router = x.requires_grad_(), router.requires_grad_()
    plain = moe(x, router, *(weight.dequantize() for weight in quantized), top_k=2)
    found = moe(x, router, *quantized, top_k=2, implementation=implementation)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(plain.sin().sum(), (x, router))
    for ours, theirs in zip(torch.autograd.grad(found.sin().sum(), (x, router)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_torch_compile_traces_all_of_it():
    torch._dynamo.reset()
    arrays = [array.float().requires_grad_() for array in layer()]
    compiled = torch.compile(lambda *arrays: moe(*arrays, top_k=2), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (TOKENS, 7):
        given = [arrays[0][:tokens].detach().requires_grad_(), *arrays[1:]]
        plain, found = moe(*given, top_k=2), compiled(*given)
        torch.testing.assert_close(found, plain)
        expected = torch.autograd.grad(plain.sin().sum(), given)
        for ours, theirs in zip(torch.autograd.grad(found.sin().sum(), given), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_torch_vmap_of_the_permutation():
    x, experts = torch.randn(3, TOKENS, HIDDEN), torch.randint(0, GROUPS, (TOKENS, 2))

    def total(x):
        rows, _, places = permute(x, experts, GROUPS)
        return unpermute(rows.sin(), torch.ones(TOKENS, 2), places).sum()

    gradients = torch.vmap(torch.func.grad(total))(x)
    torch.testing.assert_close(gradients, torch.stack([torch.func.grad(total)(each) for each in x]))


def test_gradients_are_those_of_what_gathers():
    """The gradient of the permutation, written by hand, against autograd's of the same lookups."""
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(TOKENS, 3, dtype=torch.float64, requires_grad=True)
    experts = torch.randint(0, GROUPS, (TOKENS, 3))
    rows, _, places = permute(x, experts, GROUPS)
    out = unpermute(rows.sin(), weights, places)
    plain = (x[places.order // 3].sin()[places.inverse].reshape(TOKENS, 3, HIDDEN) * weights[:, :, None]).sum(dim=1)
    torch.testing.assert_close(out, plain)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weights), upstream) for y in (out, plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_experts_of_another_device_add_up(rng):
    """Half of the experts here, half elsewhere: each leaves the other's copies out, and the sum is the whole."""
    x, weights = rng.standard_normal((TOKENS, HIDDEN)), rng.random((TOKENS, 2))
    experts = rng.integers(0, 4, (TOKENS, 2))
    matrices = rng.standard_normal((4, HIDDEN, HIDDEN))

    def part(first, count):
        rows, sizes, places = permute(x, experts - first, count)
        return unpermute(grouped_matmul(rows, matrices[first : first + count], sizes), weights, places)

    np.testing.assert_allclose(part(0, 2) + part(2, 2), part(0, 4), rtol=1e-12)


def test_load_balancing_loss(make, rng):
    transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = rng.standard_normal((TOKENS, GROUPS)).astype(np.float32)
    _, experts = route(make(logits), 2)
    theirs = transformers.load_balancing_loss_func((torch.from_numpy(logits),), GROUPS, top_k=2)
    np.testing.assert_allclose(load_balancing_loss(make(logits), experts), theirs, rtol=1e-5)


def test_load_balancing_loss_has_a_gradient_that_evens_out():
    logits = torch.zeros(TOKENS, GROUPS, requires_grad=True)
    (gradient,) = torch.autograd.grad(load_balancing_loss(logits, torch.zeros(TOKENS, 1, dtype=torch.int64)), logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(np.ones(3), 1), r"logits: got rank 1, \[3\]; it must have rank 2, \[tokens, groups\]"),
        (lambda: route(np.ones((2, 3)), 4), r"top_k: got 4; it must be from 1 to groups = 3"),
        (lambda: route(np.ones((2, 3)), 0), r"top_k: got 0; it must be from 1 to groups = 3"),
        (lambda: route(np.ones((2, 3)), 1, score="max"), r"score: got 'max'; it must be one of softmax, sigmoid"),
        (lambda: route(np.ones((2, 3)), 1, bias=np.ones(2)), r"bias: got \[2\]; it must be \[groups\] = \[3\]"),
        (
            lambda: permute(np.ones((2, 3)), np.ones((3, 1), int), 2),
            r"experts: got \[3, 1\]; it must be \[tokens, top_k\] with tokens = 2, as in x \[2, 3\]",
        ),
        (
            lambda: unpermute(np.ones((3, 3)), np.ones((2, 2)), permute(np.ones((2, 3)), np.ones((2, 2), int), 2)[2]),
            r"rows: got \[3, 3\]; it must have tokens \* top_k = 4 rows",
        ),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_types_that_cannot_be():
    with pytest.raises(TypeError, match=r"logits: dtype is int64; it must be one of float32"):
        route(np.ones((2, 3), int), 1)
    with pytest.raises(TypeError, match=r"experts: dtype is float64; it must be an integer"):
        permute(np.ones((2, 3)), np.ones((2, 1)), 2)
    with pytest.raises(TypeError, match=r"weights: got .*Tensor where rows is numpy.ndarray"):
        unpermute(np.ones((2, 3)), torch.ones(2, 1), permute(np.ones((2, 3)), np.ones((2, 1), int), 2)[2])


def test_the_parts_are_what_moe_does():
    arrays = layer()
    x, router, w_gate, w_up, w_down = (array.numpy() for array in arrays)
    weights, experts = route(x @ router, 2, normalize=False, scale=3.0)
    rows, sizes, places = permute(x, experts, GROUPS)
    rows = grouped_matmul(grouped_glu_matmul(rows, w_gate, w_up, sizes), w_down, sizes)
    whole = crosstile.moe(x, router, w_gate, w_up, w_down, top_k=2, normalize=False, scale=3.0)
    np.testing.assert_allclose(unpermute(rows, weights, places), whole)
