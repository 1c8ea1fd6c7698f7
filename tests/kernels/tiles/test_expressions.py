"""Expressions: what each op means, derivatives against differences, JAX and torch, and printing as they parse."""

from __future__ import annotations

from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import assert_equal_in_float64, finite_differences

from crosstile.kernels.tiles.expressions import (
    BINARY,
    INDICES,
    LOGICAL,
    SCORE,
    UNARY,
    children,
    const,
    derivative,
    evaluate,
    functions_of,
    leaves,
    parse,
    plane,
    planes,
    replace,
    text_of,
)
from crosstile.kernels.tiles.torch_functions import functions_of_torch

B, H, I, J = ((name,) for name in INDICES)  # noqa: E741
X, Y = SCORE, plane(0)
NUMPY, JAX = functions_of(np), functions_of(jnp)
quick = settings(max_examples=80, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])


def value(expression, functions=NUMPY, **arrays):
    """Its value at score=, i=, plane0=, ..."""
    named = {plane(int(name[5:])) if name.startswith("plane") else (name,): array for name, array in arrays.items()}
    return evaluate(expression, named, functions)


# ---- What the ops mean


def test_every_op_has_a_meaning():
    assert set(NUMPY) == set(JAX) == {*UNARY, *BINARY, "where"}
    assert set(LOGICAL) < {*UNARY, *BINARY}


@pytest.mark.parametrize("functions", [NUMPY, JAX], ids=["numpy", "jax"])
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("floordiv", [[2, -3, 0, -1], [-3, 2, -1, 0]]),
        ("mod", [[1, 2, 1, 2], [-2, -1, -2, -1]]),
    ],
)
def test_integers_divide_towards_minus_infinity(functions, op, expected):
    numbers, divisors = np.int32([7, -7, 1, -1]), np.int32([[3], [-3]])
    result = value((op, I, J), functions, i=numbers, j=divisors)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)
    by_number = value((op, I, const(3)), functions, i=numbers)
    np.testing.assert_array_equal(by_number, expected[0])


@pytest.mark.parametrize("functions", [NUMPY, JAX], ids=["numpy", "jax"])
def test_floats_floor_too(functions):
    x = np.float32([2.5, -2.5])
    np.testing.assert_array_equal(value(("floordiv", X, const(2)), functions, score=x), [1, -2])
    np.testing.assert_array_equal(value(("mod", X, const(2)), functions, score=x), [0.5, 1.5])


@pytest.mark.parametrize("functions", [NUMPY, JAX], ids=["numpy", "jax"])
def test_div_of_integers_is_a_fraction(functions):
    assert float(value(("div", I, const(2)), functions, i=np.int32(7))) == 3.5


def test_where_selects_and_does_not_multiply():
    mask = ("where", ("gt", X, const(0)), X, const(0.0))
    np.testing.assert_array_equal(value(mask, score=np.array([np.nan, -inf, 2.0])), [0, 0, 2])


def test_a_part_that_occurs_twice_is_computed_once():
    calls = []

    def counted(name):
        return lambda *operands: calls.append(name) or NUMPY[name](*operands)

    shared = ("exp", ("add", X, J))
    whole = ("mul", ("sub", shared, I), ("add", shared, ("exp", ("add", X, J))))
    evaluate(whole, {X: 1.0, I: 2.0, J: 3.0}, {name: counted(name) for name in NUMPY})
    assert sorted(calls) == ["add", "add", "exp", "mul", "sub"]


def test_a_part_that_is_given_is_not_computed():
    part = ("mul", I, J)
    assert evaluate(("add", part, const(1)), {part: 41}, NUMPY) == 42


# ---- What an expression consists of


def test_leaves_and_planes():
    whole = ("where", ("lt", I, plane(3)), ("mul", X, plane(1)), const(3))
    assert leaves(whole) == {I, X, plane(1), plane(3)}
    assert planes(whole) == (1, 3)
    assert (planes(None), planes(const(1)), leaves(const(1))) == ((), (), frozenset())
    assert children(whole) == whole[1:]
    assert children(plane(3)) == children(const(3)) == children(X) == ()


def test_replace_takes_leaves_and_whole_parts():
    whole = ("add", ("mul", X, plane(1)), ("exp", X))
    assert replace(whole, {X: Y}) == ("add", ("mul", Y, plane(1)), ("exp", Y))
    assert replace(whole, {("exp", X): const(2)}) == ("add", ("mul", X, plane(1)), const(2))
    assert replace(whole, {I: J}) == whole
    assert replace(const(1), {plane(1): X}) == const(1)  # the 1 of a leaf is no part


# ---- Derivatives

SMOOTH = {
    "neg": ("neg", X),
    "abs": ("abs", ("sub", X, const(1.5))),
    "exp": ("exp", ("mul", X, const(0.3))),
    "log": ("log", ("add", ("mul", X, X), const(1))),
    "sqrt": ("sqrt", ("add", ("mul", X, X), const(1))),
    "tanh": ("tanh", ("div", X, const(3.0))),
    "not": ("where", ("not", ("gt", X, Y)), X, ("mul", X, X)),
    "add": ("add", X, ("add", X, Y)),
    "sub": ("sub", ("mul", X, Y), ("sub", Y, X)),
    "mul": ("mul", ("mul", X, X), Y),
    "div": ("div", Y, ("add", ("mul", X, X), Y)),
    "floordiv": ("mul", X, ("floordiv", X, const(0.7))),
    "mod": ("mul", ("mod", X, Y), X),
    "min": ("min", ("mul", X, X), Y),
    "max": ("max", X, ("mul", Y, const(2))),
    "where": ("where", ("lt", X, Y), ("exp", X), ("mul", Y, Y)),
    "softcap": ("mul", const(2.0), ("tanh", ("div", X, const(2.0)))),
    "comparisons": ("where", ("and", ("le", X, Y), ("ne", X, const(0))), X, ("where", ("ge", X, Y), Y, X)),
}
POINTS = {
    "score": np.array([-2.3, -0.9, 0.35, 1.2, 2.9, 1.1]),
    "plane0": np.array([1.3, 0.6, 0.8, 1.9, 0.4, 1.6]),
}
VARIABLES = {"score": X, "plane0": Y}


def by_jax(expression, name, points):
    """The gradient of the sum of its values, in float64."""
    with jax.enable_x64(True):
        arrays = {key: jnp.asarray(points[key]) for key in points}

        def total(x):
            return jnp.sum(value(expression, JAX, **{**arrays, name: x}) * jnp.ones(len(POINTS["score"])))

        return np.asarray(jax.grad(total)(arrays[name]))


def by_torch(expression, name):
    """The same by torch, which compiles nothing."""
    arrays = {key: torch.from_numpy(points).requires_grad_(key == name) for key, points in POINTS.items()}
    total = torch.sum(value(expression, functions_of_torch(), **arrays) + torch.zeros(len(POINTS["score"])))
    if not total.requires_grad:
        return np.zeros(len(POINTS["score"]))
    (slope,) = torch.autograd.grad(total, arrays[name], materialize_grads=True)
    return slope.numpy()


def ours(expression, name, points):
    with np.errstate(all="ignore"):
        return np.broadcast_to(value(derivative(expression, VARIABLES[name]), **points), points[name].shape) * 1.0


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("case", SMOOTH)
def test_derivatives_are_those_of_differences_and_of_jax(case, name):
    expression = SMOOTH[case]
    found = ours(expression, name, POINTS)
    assert_equal_in_float64({"slope": found}, {"slope": by_jax(expression, name, POINTS)})

    def total(**points):
        return float(np.sum(value(expression, **points)))

    differences = finite_differences(total, POINTS, name, step=2.0**-17)  # h**2 of truncation: a few 1e-10
    largest = np.abs(differences).max(initial=1.0)
    np.testing.assert_allclose(found, differences, rtol=0, atol=2.0**-28 * largest)


def test_every_op_with_a_slope_has_a_case():
    assert {*UNARY, *BINARY, "where"} - set(LOGICAL) <= set(SMOOTH)


def test_at_a_corner_the_slope_is_the_mean():
    at = {"score": np.array([0.0]), "plane0": np.array([0.0])}
    assert ours(("abs", X), "score", at) == 0
    for op in ("min", "max"):
        assert ours((op, X, Y), "score", at) == ours((op, X, Y), "plane0", at) == 0.5
        assert ours((op, X, X), "score", at) == 1


def test_derivatives_are_simplified():
    assert derivative(("add", X, ("mul", X, Y)), Y) == X
    assert derivative(("mul", const(2.0), X), X) == const(2.0)
    assert derivative(("add", X, Y), plane(5)) == const(0.0)
    assert derivative(("lt", X, Y), X) == const(0.0)
    assert derivative(("where", ("lt", X, Y), X, ("add", X, I)), X) == const(1.0)


def test_a_derivative_does_not_leave_the_branch_that_is_taken():
    """As with where itself, what the other branch would give reaches nothing."""
    root = ("where", ("gt", X, const(0)), ("sqrt", X), const(0.0))
    np.testing.assert_array_equal(ours(root, "score", {"score": np.array([-1.0, 0.0, 4.0])}), [0, 0, 0.25])


def smooth(depth: int) -> Any:
    """Expressions that have a derivative nearly everywhere and stay of moderate size."""
    leaf = st.sampled_from([X, Y, const(0.5), const(-1.5), const(2)])
    if depth == 0:
        return leaf
    below = smooth(depth - 1)
    compared = st.tuples(st.sampled_from(["lt", "ge"]), below, below)
    return st.one_of(
        leaf,
        st.tuples(st.sampled_from(["neg", "abs", "tanh"]), below),
        st.tuples(st.just("exp"), st.tuples(st.just("tanh"), below)),
        st.tuples(st.sampled_from(["log", "sqrt"]), below.map(lambda x: ("add", ("mul", x, x), const(1.0)))),
        st.tuples(st.sampled_from(["add", "sub", "mul", "min", "max"]), below, below),
        st.tuples(st.just("div"), below, below.map(lambda x: ("add", ("abs", x), const(1.0)))),
        st.tuples(st.just("where"), compared, below, below),
    )


@quick
@given(smooth(3).filter(leaves), st.sampled_from(sorted(VARIABLES)))
def test_any_derivative_is_that_of_torch(expression, name):
    expected = by_torch(expression, name)
    found = ours(expression, name, POINTS)
    assert_equal_in_float64({"slope": found}, {"slope": expected}, ulps=4096)


# ---- Text


@pytest.mark.parametrize("number", [0, -3, 2**40, True, False, 0.1, -1e-30, 1e300, float("inf"), -float("inf")])
def test_a_number_prints_as_it_parses(number):
    back = parse(text_of(const(number)))[1]
    assert back == number
    assert type(back) is type(number)


@quick
@given(smooth(4))
def test_any_expression_prints_as_it_parses_and_can_be_a_key(expression):
    back = parse(text_of(expression))
    assert back == expression
    assert hash(back) == hash(expression)
    assert repr(back) == repr(expression)
    assert planes(derivative(back, X)) == planes(derivative(expression, X))
