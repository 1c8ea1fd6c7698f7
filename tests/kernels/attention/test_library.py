"""Attention by torch's and by JAX's own ops against the definition in float64, forward and backward.

Tolerance: twice the error that torch makes of the same call in the same precision, plus a floor of a few ulps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from attention_problems import FEATURES, PACKED, SHAPE, SPOILT, PackedProblem, Problem
from oracles import assert_equal_in_float64, assert_within, attention_by_torch, packed_attention_by_torch, rounded

from crosstile.kernels.attention import library, library_dense, reference
from crosstile.kernels.attention.spec import INPUTS, AttentionSpec
from crosstile.kernels.tiles.expressions import SCORE, const, plane

ALL = FEATURES | PACKED
# a compilation each in JAX, so only what its code tells apart
WITH_LSE_IN_JAX = ["lengths 0 and 1", "sinks on rows without keys", "softcap, bias, mask", "packed, window, sinks"]
WITHOUT_LSE_IN_JAX = ["window", "mask of keys", "bias, lengths, causal", "packed, bias of heads and keys"]
BY_OWN_OP = [
    "window",
    "lengths",
    "key lengths, causal",
    "mask",
    "segments",
    "bias",
    "bias, lengths, causal",
    "packed, bias",
]
INVARIANT = ["bias of queries", "bias that hides all"]  # the same for a whole row, so that its gradient is that of lse


def narrowed(problem, dtype):
    """The problem with values that the precision has (sinks and the gradient of lse in float32)."""
    kinds = {name: "float32" if name == "sinks" else dtype for name in problem.arrays}
    floats = {name for name, array in problem.arrays.items() if array.dtype == np.float64}
    problem.arrays |= {name: rounded(problem.arrays[name], kinds[name]) for name in floats}
    for name in problem.oracle.keys() & {"bias", "sinks"}:
        source = "sinks" if name == "sinks" else f"plane{problem.options['plane_gradients'][0]}"
        problem.oracle[name] = problem.arrays[source]
    problem.gradients = rounded(problem.gradients[0], dtype), rounded(problem.gradients[1], "float32")
    return problem


def by_library(framework, problem, dtype="float32", compiled=None, **options):
    """out, lse (if asked for) and the gradients, as float64."""
    spec = problem.spec(dtype, **options)
    return (in_torch if framework == "torch" else in_jax)(spec, problem, dtype, compiled)


def in_torch(spec, problem, dtype, compiled):
    forward = compiled or library.forward
    kinds = {name: torch.float32 if name == "sinks" else getattr(torch, dtype) for name in problem.arrays}
    tensors = {
        name: torch.from_numpy(np.array(array)).to(kinds[name] if array.dtype == np.float64 else None)
        for name, array in problem.arrays.items()
    }
    leaves = [tensors[name].requires_grad_() for name in problem.differentiable()]
    out, lse = forward(spec, *map(tensors.get, INPUTS))
    assert (lse is None) == (not spec.return_lse)
    results, gradients = [out], [torch.from_numpy(problem.gradients[0]).to(out.dtype)]
    if lse is not None:
        results, gradients = [out, lse], [*gradients, torch.from_numpy(problem.gradients[1]).to(lse.dtype)]
    found = torch.autograd.grad(results, leaves, gradients)
    assert out.dtype == getattr(torch, dtype)
    return named(problem, *(tensor.detach().double().numpy() for tensor in (*results, *found)))


def in_jax(spec, problem, dtype, compiled):
    jax = pytest.importorskip("jax")
    wide = {name: "float32" if name == "sinks" else dtype for name in problem.arrays}
    arrays = {
        name: jax.numpy.asarray(array.astype(wide[name]) if array.dtype == np.float64 else array)
        for name, array in problem.arrays.items()
    }

    @jax.jit
    def run(arrays, dout, dlse):
        def attend(leaves):
            return library.forward(spec, *map((arrays | leaves).get, INPUTS))

        (out, lse), pull_back = jax.vjp(attend, {name: arrays[name] for name in problem.differentiable()})
        results = [out] if lse is None else [out, lse]
        found = pull_back((dout.astype(out.dtype), None if lse is None else dlse.astype(lse.dtype)))[0]
        return *results, *(found[name] for name in problem.differentiable())

    results = run(arrays, *map(jax.numpy.asarray, problem.gradients))
    assert results[0].dtype == dtype
    return named(problem, *(np.asarray(result, np.float64) for result in results))


def by_definition(problem):
    outputs = reference.forward(problem.spec("float64"), *problem.inputs())
    gradients = reference.backward(problem.spec("float64"), problem.inputs(), outputs, problem.gradients)
    return named(problem, *outputs, *(gradients[INPUTS.index(name)] for name in problem.differentiable()))


def named(problem, *results):
    gradients = ["dbias" if name.startswith("plane") else f"d{name}" for name in problem.differentiable()]
    outputs = ["out", "lse"][: len(results) - len(gradients)]
    return dict(zip((*outputs, *gradients), results, strict=True))


def by_torch(problem, dtype):
    arrays = (*(problem.arrays[name] for name in "qkv"), *problem.gradients)
    if isinstance(problem, PackedProblem):
        return packed_attention_by_torch(*arrays, *problem.starts, **problem.oracle, dtype=dtype)
    return attention_by_torch(*arrays, **problem.oracle, dtype=dtype)


@pytest.mark.parametrize(
    ("framework", "feature"), [("torch", name) for name in ALL] + [("jax", name) for name in WITH_LSE_IN_JAX]
)
def test_with_lse(rng, framework, feature):
    problem = narrowed(ALL[feature](rng), "float32")
    ours = by_library(framework, problem)
    assert_within(ours, by_torch(problem, "float32"), by_definition(problem), "float32")


@pytest.mark.parametrize(
    ("framework", "feature"),
    [("torch", name) for name in ALL if name not in INVARIANT] + [("jax", name) for name in WITHOUT_LSE_IN_JAX],
)
def test_without_lse(rng, framework, feature):
    problem = narrowed(ALL[feature](rng), "float32")
    problem.gradients = problem.gradients[0], np.zeros_like(problem.gradients[1])
    ours = by_library(framework, problem, return_lse=False)
    assert "lse" not in ours
    assert_within(ours, by_torch(problem, "float32"), by_definition(problem), "float32")


@pytest.mark.parametrize(
    ("framework", "feature"),
    [
        ("torch", "bias, lengths, causal"),
        ("torch", "softcap, bias, mask"),
        ("torch", "packed, window, sinks"),
        ("jax", "softcap, bias, mask"),
    ],
)
def test_in_bfloat16(rng, framework, feature):
    problem = narrowed(ALL[feature](rng), "bfloat16")
    ours = by_library(framework, problem, "bfloat16")
    assert_within(ours, by_torch(problem, "bfloat16"), by_definition(problem), "bfloat16")


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_values_of_another_width(rng, framework):
    problem = Problem(rng, (*SHAPE[:6], 3))
    problem.has_lengths([6, 4], [7, 9])
    ours = by_library(framework, narrowed(problem, "float32"), return_lse=False)
    problem.gradients = problem.gradients[0], np.zeros_like(problem.gradients[1])
    assert_within(ours, by_torch(problem, "float32"), by_definition(problem), "float32")


@pytest.mark.parametrize(("framework", "feature"), [("torch", feature) for feature in BY_OWN_OP] + [("jax", "bias")])
def test_masks_and_biases_are_left_to_the_framework(rng, monkeypatch, framework, feature):
    def whole(*_):
        raise AssertionError("the scores were built whole")

    monkeypatch.setattr(library_dense, "attend", whole)
    by_library(framework, narrowed(ALL[feature](rng), "float32"), return_lse=False)


DISTANCE = ("sub", ("j",), ("i",))


@pytest.mark.parametrize(
    ("score", "added"),
    [
        (("add", SCORE, plane(0)), plane(0)),
        (("add", plane(0), SCORE), plane(0)),
        (("sub", SCORE, DISTANCE), ("neg", DISTANCE)),
        (("add", ("sub", SCORE, DISTANCE), plane(0)), ("add", ("neg", DISTANCE), plane(0))),
        (("sub", plane(0), SCORE), None),
        (("add", SCORE, SCORE), None),
        (("add", ("mul", SCORE, const(2.0)), plane(0)), None),
        (("add", plane(0), plane(1)), None),
        (plane(0), None),
        (SCORE, None),
    ],
)
def test_what_an_expression_adds(score, added):
    assert library._added(score) == added


@pytest.mark.parametrize(
    "score", [plane(0), ("sub", plane(0), SCORE), ("sub", SCORE, DISTANCE), const(1.5), ("add", SCORE, const(1))]
)
def test_expressions_that_hardly_read_the_score(rng, score):
    problem = narrowed(Problem(rng, SHAPE, arrays={"plane0": rng.standard_normal((1, 4, 1, 9))}), "float32")
    problem.changes_score(score)
    inputs = [None if array is None else torch.from_numpy(array).float() for array in problem.inputs()]
    for return_lse in (False, True):
        ours = library.forward(problem.spec("float32", return_lse=return_lse), *inputs)
        expected = reference.forward(problem.spec("float64"), *problem.inputs())
        for result, exact in zip(ours[: 1 + return_lse], expected, strict=False):
            np.testing.assert_allclose(result.numpy(), exact, rtol=0, atol=16 * 2.0**-23 * np.abs(exact).max())


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", SPOILT)
def test_what_is_hidden_reaches_nothing(rng, name, framework):
    clean, spoilt = (narrowed(problem, "float32") for problem in SPOILT[name](rng))
    expected = by_definition(clean)
    ours = by_library(framework, spoilt)
    own = by_library(framework, clean)
    assert_within(ours, {name: own.get(name) for name in ours}, expected, "float32")


@pytest.mark.parametrize(("framework", "lse"), [("torch", False), ("torch", True), ("jax", False)])
def test_the_logarithm_of_nothing_hides(rng, framework, lse):
    """Its slope is infinite; a row of nothing else sees no key."""
    problem = Problem(rng, SHAPE, {"return_lse": lse})
    weights = rng.random((1, 4, 6, 9)) * (rng.random((1, 4, 6, 9)) < 0.7)
    weights[:, :, 2] = 0
    problem.arrays["plane0"] = weights
    problem.changes_score(("add", SCORE, ("log", plane(0))))
    problem.options["plane_gradients"] = (0,)
    if not lse:
        problem.gradients = problem.gradients[0], np.zeros_like(problem.gradients[1])
    narrowed(problem, "float32")
    with np.errstate(divide="ignore"):
        problem.oracle["bias"] = np.log(problem.arrays["plane0"])
    expected, own = by_definition(problem), by_torch(problem, "float32")
    with np.errstate(divide="ignore", invalid="ignore"):
        own["dbias"] = np.where(weights == 0, 0, own["dbias"] / problem.arrays["plane0"])
    assert_within(by_library(framework, problem), own, expected, "float32")


def test_indices_count_in_each_packed_sequence(rng):
    problem = narrowed(PackedProblem(rng, SHAPE), "float32")
    slope = ("add", ("mul", ("b",), const(0.25)), ("mul", ("mul", ("i",), ("j",)), const(0.5)))
    problem.changes_score(("add", ("mul", SCORE, const(2.0)), ("mul", slope, ("h",))))
    expected = by_definition(problem)
    scores = np.arange(5)[:, None, None, None] * 0.25 + np.multiply.outer(np.arange(4), np.arange(5)) * 0.5
    problem.oracle |= {"bias": scores * np.arange(4)[:, None, None], "scale": 2 / 5**0.5}
    exact = by_torch(problem, "float64")
    assert_equal_in_float64(expected, exact)
    assert_within(by_library("torch", problem), by_torch(problem, "float32"), exact, "float32")


def test_gradients_of_gradients_in_torch(rng):
    problem = SPOILT["much"](rng)[1]
    spec = replace(problem.spec("float64"), return_lse=False)
    leaves = [torch.from_numpy(problem.arrays[name]) for name in problem.differentiable()]
    others = {name: torch.from_numpy(np.array(array)) for name, array in problem.arrays.items()}

    def loss(*moved):
        tensors = others | dict(zip(problem.differentiable(), moved, strict=True))
        return library.forward(spec, *map(tensors.get, INPUTS))[0]

    def seen_part(direction):
        """The derivative of the gradients along what is finite of a direction."""
        moving = [leaf.clone().requires_grad_() for leaf in leaves]
        gradients = torch.autograd.grad(loss(*moving).square().sum(), moving, create_graph=True)
        along = sum((gradient * step).sum() for gradient, step in zip(gradients, direction, strict=True))
        return gradients, torch.autograd.grad(along, moving)

    direction = [torch.where(leaf.isfinite(), torch.randn_like(leaf), 0) for leaf in leaves]
    _, found = seen_part(direction)
    step = 1e-5
    leaves = [leaf + step * way for leaf, way in zip(leaves, direction, strict=True)]
    ahead, _ = seen_part(direction)
    leaves = [leaf - 2 * step * way for leaf, way in zip(leaves, direction, strict=True)]
    behind, _ = seen_part(direction)
    for second, after, before in zip(found, ahead, behind, strict=True):
        torch.testing.assert_close(second, (after - before) / (2 * step), rtol=1e-6, atol=1e-8)


def test_one_graph_of_torch_for_packed_sequences():
    def make(tokens):
        problem = PackedProblem(np.random.default_rng(tokens), SHAPE, q_lens=(3, tokens, 4), kv_lens=(tokens, 2, 3))
        problem.options |= {"max_seqlen_q": 8, "max_seqlen_k": 8}
        problem.has_window(3, 1)
        problem.adds_bias((3, 4, 1, 8))
        problem.has_sinks()
        return problem

    def call(*inputs):
        score = ("add", SCORE, plane(0))
        lengths = {"max_seqlen_q": 8, "max_seqlen_k": 8}
        spec = AttentionSpec("float32", 5, 5, False, None, True, 3, 1, score, plane_gradients=(0,), **lengths)
        return library.forward(spec, *inputs)

    assert_compiled_once(make, call)


def test_one_graph_of_torch_for_a_padded_batch():
    def make(kv_len):
        problem = Problem(np.random.default_rng(kv_len), (2, 6, kv_len, 4, 2, 5, 5), {"return_lse": False})
        problem.has_lengths(None, [2, kv_len - 1])
        problem.is_causal()
        problem.adds_bias((1, 4, 6, kv_len))
        return problem

    def call(*inputs):
        spec = AttentionSpec("float32", 5, 5, causal=True, score=("add", SCORE, plane(0)), plane_gradients=(0,))
        return library.forward(spec, *inputs)

    assert_compiled_once(make, call)


def assert_compiled_once(make, call):
    """A call gives compiled, without a graph break, what it gives uncompiled; and again for another size."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for size in (7, 6):
        problem = narrowed(make(size), "float32")
        ours = by_library("torch", problem, compiled=lambda spec, *inputs: compiled(*inputs))
        for name, result in by_library("torch", problem).items():
            np.testing.assert_array_equal(ours[name], result, err_msg=name)
    assert counter.frame_count == 1


@pytest.mark.parametrize("lengths", [((0, 0), (0, 3)), ((2, 1), (0, 0))], ids=["no query", "no key"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_packed_sequences_of_nothing(rng, framework, lengths):
    problem = PackedProblem(rng, SHAPE, q_lens=lengths[0], kv_lens=lengths[1])
    ours = by_library(framework, problem)
    assert all((result == (-np.inf if name == "lse" else 0)).all() for name, result in ours.items())


def test_arrays_without_elements():
    problem = PackedProblem(np.random.default_rng(0), SHAPE, q_lens=(), kv_lens=())
    for options in ({}, {"max_seqlen_q": 3, "max_seqlen_k": 3}):
        for tokens in (0, 2):
            arrays = {
                name: torch.ones(1, tokens, heads, 5).requires_grad_() for name, heads in (("q", 4), ("k", 2), ("v", 2))
            }
            starts = {name: torch.zeros(1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
            spec = problem.spec("float32", **{"max_seqlen_q": 0, "max_seqlen_k": 0, **options})
            out, lse = library.forward(spec, *map((arrays | starts).get, INPUTS))
            assert out.shape == (1, tokens, 4, 5)
            assert not out.any()
            assert torch.isneginf(lse).all()
            out.sum().backward()
            assert not arrays["q"].grad.any()
