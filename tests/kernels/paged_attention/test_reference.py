"""The definition, and the framework's own ops, against torch on the same keys in one dense array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_equal_in_float64, assert_within, attention_by_torch
from paged_problems import PROBLEMS, Problem, by_torch, in_float64, inputs

from crosstile.kernels.paged_attention import library, reference
from crosstile.kernels.paged_attention.spec import no_gradient
from crosstile.kernels.tiles.errors import UnsupportedError

NAMES = ("out", "lse")


def hold_the_definition(problem: Problem) -> None:
    arrays = in_float64(problem.arrays())
    found = dict(zip(NAMES, reference.forward(problem.spec, *inputs(arrays)), strict=True))
    assert_equal_in_float64(found, by_torch(problem, arrays, "float64"))


@pytest.mark.parametrize("name", PROBLEMS)
def test_definition(name):
    hold_the_definition(PROBLEMS[name])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_definition_of_any_lengths(data):
    batch, q_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    page_size, max_pages = data.draw(st.sampled_from([16, 32])), data.draw(st.integers(1, 4))
    counts = st.tuples(*[st.integers(0, q_len)] * batch)
    problem = Problem(
        lengths=data.draw(st.tuples(*[st.integers(0, page_size * max_pages)] * batch)),
        q_len=q_len,
        q_lengths=data.draw(st.none() | counts),
        page_size=page_size,
        max_pages=max_pages,
        kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 3)),
        causal=data.draw(st.booleans()),
        window_left=data.draw(st.none() | st.integers(0, 40)),
        sinks=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    hold_the_definition(problem)


def test_it_is_attention_where_the_pages_are_in_order():
    """One sequence whose pages lie one after another is a dense cache: attention's own oracle."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((1, 7, 4, 8), (1, 48, 2, 8), (1, 48, 2, 8)))
    pages = (array.reshape(3, 16, 2, 8) for array in (k, v))
    problem = Problem(head_dim=8, v_dim=8)
    table, lengths = np.arange(3, dtype=np.int32)[None], np.array([48], np.int32)
    found = reference.forward(problem.spec, q, *pages, table, lengths, None, None, None, None)
    exact = attention_by_torch(q, k, v, np.zeros_like(q), causal=True)
    assert_equal_in_float64(dict(zip(NAMES, found, strict=True)), exact)


def test_there_is_no_gradient():
    with pytest.raises(UnsupportedError, match="for inference and has no backward"):
        reference.backward()
    assert "implementation='library'" in no_gradient()


# ---- The framework's smaller ops


def to_torch(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)


def to_jax(array: np.ndarray | None) -> jax.Array | None:
    return None if array is None else jnp.asarray(array)


def hold_the_library(problem: Problem, found: tuple) -> None:
    arrays = problem.arrays()
    exact, own = (by_torch(problem, arrays, dtype) for dtype in ("float64", problem.dtype))
    assert_within(dict(zip(NAMES, found, strict=True)), own, exact, problem.dtype)


@pytest.mark.parametrize("name", PROBLEMS)
def test_library_of_torch(name):
    problem = PROBLEMS[name]
    hold_the_library(problem, library.forward(problem.spec, *map(to_torch, inputs(problem.arrays()))))


@pytest.mark.parametrize("name", ["chunk", "window", "softcap and sinks", "int8"])
def test_library_of_jax(name):
    problem = PROBLEMS[name]
    run = jax.jit(lambda *arrays: library.forward(problem.spec, *arrays))
    hold_the_library(problem, run(*map(to_jax, inputs(problem.arrays()))))


@pytest.mark.parametrize("sizes", [{"lengths": ()}, {"max_pages": 0, "lengths": (5,)}, {"q_len": 0}])
def test_library_of_nothing(sizes):
    problem = Problem(**sizes, sinks=True)
    arrays = problem.arrays()
    out, lse = library.forward(problem.spec, *map(to_torch, inputs(arrays)))
    expected = reference.forward(problem.spec, *inputs(arrays))
    np.testing.assert_array_equal(np.asarray(out), expected[0])
    np.testing.assert_allclose(np.asarray(lse), expected[1], rtol=1e-6)


def test_library_is_differentiable():
    problem = Problem(lengths=(20, 7))
    arrays = {name: to_torch(array) for name, array in in_float64(problem.arrays()).items()}
    arrays["q"].requires_grad_()
    arrays["k_pages"].requires_grad_()
    out, _ = library.forward(Problem(lengths=(20, 7), dtype="float64").spec, *inputs(arrays))
    dq, dk = torch.autograd.grad(out.sum(), (arrays["q"], arrays["k_pages"]))
    assert torch.isfinite(dq).all()
    assert torch.isfinite(dk).all()
    assert dk.abs().sum() > 0
