"""paged_attention as users call it: every framework and implementation, and what is refused."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import assert_within
from paged_problems import PROBLEMS, by_torch

import crosstile
from crosstile import paged
from crosstile.paged import paged_attention

jax = pytest.importorskip("jax")

CONVERT = {"numpy": lambda x: x, "torch": torch.from_numpy, "jax": jax.numpy.asarray}


def call(problem, framework, **options):
    """The public function on the problem's arrays; a problem of one query a sequence drops that dimension."""
    arrays = problem.arrays()
    arrays["sinks"] = None if arrays["sinks"] is None else arrays["sinks"][0]
    if problem.q_len == 1:
        arrays["q"] = arrays["q"][:, 0]
    arrays = {name: None if array is None else CONVERT[framework](array) for name, array in arrays.items()}
    window = None if problem.window_left is None else (problem.window_left, 0)
    options = {
        "causal": problem.causal,
        "scale": problem.scale,
        "softcap": problem.softcap,
        "window": window,
        **options,
    }
    return paged_attention(*[arrays.pop(name) for name in list(arrays)[:5]], **arrays, return_lse=True, **options)


WAYS = [
    *(("decode", framework, None) for framework in CONVERT),
    *(("decode", framework, "triton") for framework in CONVERT),
    *(("decode", framework, "pallas") for framework in CONVERT),
    ("chunk", "torch", "numpy"),
    ("chunk", "jax", "pallas"),
    ("int8", "torch", "triton"),
    ("int8", "jax", None),
]


@pytest.mark.parametrize(("name", "framework", "implementation"), WAYS)
def test_every_way(name, framework, implementation):
    problem = PROBLEMS[name]
    out, lse = call(problem, framework, implementation=implementation)
    arrays = problem.arrays()
    if problem.q_len == 1:
        assert tuple(out.shape) == (3, 6, 12)
        assert tuple(lse.shape) == (3, 6)
        out, lse = out[:, None], lse[..., None]
    exact, own = (by_torch(problem, arrays, dtype) for dtype in ("float64", "float32"))
    assert_within({"out": out, "lse": lse}, own, exact, "float32")


def test_only_the_output_without_return_lse():
    problem = PROBLEMS["decode"]
    arrays = problem.arrays()
    first = [arrays[name] for name in ("q", "k_pages", "v_pages", "page_table", "lengths")]
    assert paged_attention(*first).shape == (3, 1, 6, 12)


def test_sinks_of_heads():
    problem = replace(PROBLEMS["decode"], sinks=True)
    first = problem.arrays()["sinks"][0]
    _, lse = call(problem, "torch", implementation="triton")
    np.testing.assert_allclose(lse[1], first, rtol=1e-6, err_msg="the second sequence has no keys")


@pytest.mark.parametrize("implementation", ["triton", "pallas"])
def test_a_gradient_is_refused(implementation):
    arrays = {name: x for name, x in PROBLEMS["decode"].arrays().items() if x is not None}
    tensors = [torch.from_numpy(x) for x in arrays.values()]
    tensors[0].requires_grad_()
    with pytest.raises(crosstile.UnsupportedError, match="for inference and has no backward"):
        paged_attention(*tensors, implementation=implementation)
    paged_attention(*tensors).sum().backward()
    assert tensors[0].grad is not None


def test_a_gradient_is_refused_by_jax():
    arrays = [jax.numpy.asarray(x) for x in PROBLEMS["decode"].arrays().values() if x is not None]

    def loss(q, implementation):
        return paged_attention(q, *arrays[1:], implementation=implementation).sum()

    with pytest.raises(crosstile.UnsupportedError, match="for inference and has no backward"):
        jax.grad(loss)(arrays[0], "pallas")
    assert np.isfinite(jax.grad(loss)(arrays[0], None)[0]).all()


def test_under_jit_and_in_a_compiled_function():
    problem = PROBLEMS["decode"]
    arrays = [jax.numpy.asarray(x) for x in problem.arrays().values() if x is not None]
    found = jax.jit(lambda *arrays: paged_attention(*arrays, implementation="pallas"))(*arrays)
    np.testing.assert_allclose(found, paged_attention(*arrays), atol=1e-5 * float(abs(found).max()))


def test_explain():
    arrays = [torch.from_numpy(x) for x in PROBLEMS["decode"].arrays().values() if x is not None]
    text = str(crosstile.explain("paged_attention", *arrays, implementation="triton"))
    assert text.startswith("paged_attention runs with 'triton' in its interpreter")
    assert "block_rows=16" in text


def test_the_manual():
    results = doctest.testmod(paged)
    assert results.attempted > 0
    assert results.failed == 0


SHAPES = {
    "q": (2, 4, 8),
    "k_pages": (5, 16, 2, 8),
    "v_pages": (5, 16, 2, 6),
    "page_table": (2, 3),
    "lengths": (2,),
}


def zeros(shapes, **dtypes):
    kinds = {"page_table": "int64", "lengths": "int32", "q_lengths": "int32", **dtypes}
    return {name: np.zeros(shape, kinds.get(name, "float32")) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"q": (2, 8)}, {}, r"q: got rank 2, \[2, 8\]; it must have rank 4, \[batch, q_len, q_heads, head_dim\]"),
        ({"k_pages": (5, 16, 8)}, {}, r"k_pages: got rank 3"),
        ({"k_pages": (5, 24, 2, 8)}, {}, r"k_pages: page_size is 24; it must be one of 16, 32, 64, 128, 256"),
        ({"k_pages": (5, 16, 2, 6)}, {}, r"k_pages: head_dim is 6 .*; it must be 8"),
        ({"v_pages": (4, 16, 2, 6)}, {}, r"v_pages: got \[4, 16, 2, 6\]; its pages, rows and heads"),
        ({"k_pages": (5, 16, 3, 8), "v_pages": (5, 16, 3, 8)}, {}, r"k_pages: kv_heads is 3, which does not divide"),
        ({"page_table": (3, 3)}, {}, r"page_table: got \[3, 3\]; it must be \[batch, max_pages\] with batch 2"),
        ({"page_table": (3,)}, {}, r"page_table: got rank 1"),
        ({"lengths": (3,)}, {}, r"lengths: got \[3\]; it must be \[batch\] with batch 2"),
        ({"q_lengths": (1,)}, {}, r"q_lengths: got \[1\]"),
        ({"k_scales": (4,)}, {}, r"k_scales: got \[4\]; it must be \[kv_heads\] = \[2\]"),
        ({"sinks": (2,)}, {}, r"sinks: got \[2\]; it must be \[q_heads\] = \[4\]"),
        ({"v_pages": (5, 16, 2, 0)}, {}, r"v_pages: the last dimension is 0"),
        ({}, {"window": (3, 4), "causal": False}, r"window: the right side is 4; without causal it must be None"),
        ({}, {"softcap": 0.0}, r"softcap: got 0.0"),
        ({}, {"scale": float("inf")}, r"scale: got inf"),
    ],
)
def test_shapes_that_do_not_fit(change, options, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**zeros({**SHAPES, **change}), **options)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"q": "int32"}, r"q: dtype is int32"),
        ({"k_pages": "float16"}, r"k_pages: dtype is float16; it must be float32, as q is, or int8 or float8_e4m3fn"),
        ({"k_pages": "int8"}, r"v_pages: dtype is float32; it must be int8, as k_pages is"),
        ({"page_table": "float32"}, r"page_table: dtype is float32; it must be an integer"),
        ({"lengths": "bool"}, r"lengths: dtype is bool"),
        ({"k_scales": "int32"}, r"k_scales: dtype is int32; it must be a float"),
    ],
)
def test_dtypes_that_cannot_be(dtypes, message):
    shapes = {**SHAPES, **({"k_scales": (2,)} if "k_scales" in dtypes else {})}
    with pytest.raises(TypeError, match=message):
        paged_attention(**zeros(shapes, **dtypes))


def test_two_frameworks():
    arrays = zeros(SHAPES)
    arrays["lengths"] = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(TypeError, match="lengths: got .*Tensor where q is"):
        paged_attention(**arrays)
