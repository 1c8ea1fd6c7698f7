"""torch: the registered ops under autograd, compile, vmap and opcheck, through each implementation."""

import numpy as np
import pytest
from sweeps import one_in

import crosstile
from crosstile.kernels.attention.spec import AttentionInputs, AttentionSpec

torch = pytest.importorskip("torch")
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from crosstile import torch as glue  # noqa: E402

KERNELS = ["numpy", "triton", "pallas"]


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def attention_leaves(q_len=5, kv_len=7):
    return leaf(2, q_len, 4, 8), leaf(2, kv_len, 2, 8), leaf(2, kv_len, 2, 6)


def matmul_leaves():
    return leaf(3, 4, 5), leaf(5, 6), leaf(6), leaf(4, 6)


def attend(implementation):
    def function(q, k, v):
        out, lse = crosstile.attention(q, k, v, causal=True, return_lse=True, implementation=implementation)
        return out.sin().sum() + lse.cos().sum()

    return function


def multiply(implementation):
    def function(a, b, bias, residual):
        out = crosstile.matmul(a, b, bias=bias, activation="silu", residual=residual, implementation=implementation)
        return out.sin().sum()

    return function


OPS = {"attention": (attend, attention_leaves), "matmul": (multiply, matmul_leaves)}


@pytest.fixture(params=OPS)
def subject(request):
    return OPS[request.param]


def test_gradients_are_those_of_the_library(kernel, subject):
    function, leaves = subject
    inputs = leaves()
    expected = torch.autograd.grad(function("library")(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(function(kernel)(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_one_input_wants_a_gradient(kernel):
    q, k, v = (x.detach() for x in attention_leaves())
    v.requires_grad_()
    expected = torch.autograd.grad(attend("library")(q, k, v), v)[0]
    torch.testing.assert_close(torch.autograd.grad(attend(kernel)(q, k, v), v)[0], expected)


def test_only_the_logsumexp_is_used(kernel):
    q, k, v = attention_leaves()

    def loss(implementation):
        return crosstile.attention(q, k, v, return_lse=True, implementation=implementation)[1].sum()

    expected = torch.autograd.grad(loss("library"), (q, k))
    torch.testing.assert_close(torch.autograd.grad(loss(kernel), (q, k)), expected)


def test_opcheck(kernel, subject):
    function, leaves = subject
    inputs = leaves()
    if function is attend:
        options = AttentionSpec("float32", 8, 6, causal=True, return_lse=True)
        encoded = [getattr(options, name) for name in glue._OPERATORS["attention"].options]
        arguments = (*AttentionInputs(*inputs), *encoded, kernel, "interpret", None)
        operator = torch.ops.crosstile.attention.default
    else:
        a, b, bias, residual = inputs
        arguments = (a, b.expand(3, 5, 6), bias.expand(3, 6), residual.expand(3, 4, 6))
        arguments += ("float32", "silu", True, None, kernel, "interpret", None)
        operator = torch.ops.crosstile.matmul.default
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernel", one_in(2, ["library", *KERNELS]))
def test_compile_has_no_graph_break_and_one_graph_for_all_lengths(kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend(kernel), fullgraph=True, backend=counter, dynamic=True)
    for kv_len in (7, 9, 12):
        inputs = attention_leaves(kv_len - 2, kv_len)
        loss = compiled(*inputs)
        torch.testing.assert_close(loss, attend("library")(*inputs))
        expected = torch.autograd.grad(attend("library")(*inputs), inputs)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernel", [*KERNELS, "library"])
def test_compile_of_matmul(kernel):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(multiply(kernel), fullgraph=True, backend=counter, dynamic=True)
    for rows in (4, 9):
        inputs = (leaf(3, rows, 5), leaf(5, 6), leaf(6), leaf(rows, 6))
        torch.testing.assert_close(compiled(*inputs), multiply("library")(*inputs))
    assert counter.frame_count == 1


def test_compile_sees_use_and_config(kernel):
    torch._dynamo.reset()
    q, k, v = attention_leaves()
    compiled = torch.compile(attend(None), fullgraph=True, backend="eager")
    with crosstile.use(kernel):
        torch.testing.assert_close(compiled(q, k, v), attend("library")(q, k, v))


def test_vmap_and_functional_gradients(kernel):
    _, k, v = (x.detach() for x in attention_leaves())
    queries = torch.randn(3, 2, 5, 4, 8)
    grad = torch.vmap(torch.func.grad(lambda q: attend(kernel)(q, k, v)))(queries)
    expected = torch.stack([torch.func.grad(lambda q: attend("library")(q, k, v))(q) for q in queries])
    torch.testing.assert_close(grad, expected)
    values = torch.vmap(lambda q, v: attend(kernel)(q, k, v), in_dims=(0, None))(queries, v)
    torch.testing.assert_close(values, torch.stack([attend("library")(q, k, v) for q in queries]))


def test_vmap_of_matmul(kernel):
    a, b, bias, residual = (x.detach() for x in matmul_leaves())
    biases = torch.randn(2, 6)
    values = torch.vmap(lambda bias: multiply(kernel)(a, b, bias, residual))(biases)
    torch.testing.assert_close(values, torch.stack([multiply("library")(a, b, x, residual) for x in biases]))
    grads = torch.vmap(torch.func.grad(lambda bias: multiply(kernel)(a, b, bias, residual)))(biases)
    expected = [torch.func.grad(lambda x: multiply("library")(a, b, x, residual))(x) for x in biases]
    torch.testing.assert_close(grads, torch.stack(expected))


def test_a_second_derivative_is_a_clear_error(kernel):
    q, k, v = attention_leaves()
    (first,) = torch.autograd.grad(attend(kernel)(q, k, v), q, create_graph=True)
    with pytest.raises(crosstile.UnsupportedError, match="double backward.*implementation='library'"):
        first.sum().backward()


def test_strided_views_and_shared_storage(kernel):
    storage = torch.full((2, 9, 4, 24), float("nan"))
    views = [storage[:, 1:8, :, start : start + 8] for start in (0, 8, 16)]
    for view in views:
        view.copy_(torch.randn(2, 7, 4, 8))
    expected = crosstile.attention(*(view.contiguous() for view in views), causal=True)
    torch.testing.assert_close(crosstile.attention(*views, causal=True, implementation=kernel), expected)
    a, b = torch.randn(6, 5).T, torch.randn(7, 6).T
    torch.testing.assert_close(crosstile.matmul(a, b, implementation=kernel), a @ b)
    row = torch.randn(1, 6).expand(5, 6)
    torch.testing.assert_close(crosstile.matmul(row, b, implementation=kernel), row @ b)


def test_bfloat16_through_pallas_and_numpy():
    q = torch.randn(1, 9, 2, 16, dtype=torch.bfloat16)
    exact = crosstile.attention(*(q.double(),) * 3, causal=True, implementation="numpy")
    for implementation in ("pallas", "numpy"):
        out = crosstile.attention(q, q, q, causal=True, implementation=implementation)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact, rtol=2.0**-7, atol=2.0**-7)


def test_broadcast_batches_of_matmul(kernel):
    a, b = leaf(2, 1, 4, 5), leaf(3, 5, 6)
    residual = leaf(3, 1, 6)
    out = crosstile.matmul(a, b, residual=residual, activation="relu", implementation=kernel)
    expected = torch.relu(a @ b) + residual
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(expected)
    inputs = (a, b, residual)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    )


def test_what_the_host_knows_is_copied_once():
    """Into a CUDA graph no copy can go; the device "meta" stands for one."""
    device, ids = torch.device("meta"), np.arange(8, dtype=np.int32)
    copy = glue._on_device(ids, device)
    assert glue._on_device(ids.copy(), device) is copy
    assert glue._on_device(ids + 1, device) is not copy
    assert glue._on_device(ids.astype(np.int64), device).dtype == torch.int64
    large = np.zeros(glue._LARGE + 1, np.int8)
    assert glue._on_device(large, device) is not glue._on_device(large, device)


def test_devices_must_agree():
    with pytest.raises(ValueError, match=r"k: is on meta; it must be on cpu, as q is: use .to\(\)"):
        crosstile.attention(
            torch.ones(1, 2, 1, 4), *(torch.ones(1, 2, 1, 4, device="meta"),) * 2, implementation="numpy"
        )
