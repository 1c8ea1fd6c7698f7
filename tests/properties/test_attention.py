"""Attention of any shape, dtype, stride and option: the NumPy definition in float64 holds, and laws of attention's own.

The quick examples are the same in every run; `pytest -m sweep` draws many new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from layouts import LAYOUTS, placed, repeated, to_numpy, to_torch
from oracles import assert_within, attention_by_torch, rounded
from properties import IMPLEMENTATIONS, SWEEP, dims, lengths, quick, skip_unless_it_runs

import crosstile
from crosstile.kernels.attention import reference as attention_definition
from crosstile.kernels.attention.spec import AttentionSpec

FRAMEWORKS = {"cpu": "numpy", "cuda": "torch", "tpu": "jax"}
scales = st.one_of(st.none(), st.floats(0.05, 2.0), st.sampled_from([0.0, -0.4]))

# ---- Problems


@dataclass(frozen=True)
class Attention:
    """One call: shapes, options, and how each array lies in memory."""

    batch: int
    q_len: int
    kv_len: int
    kv_heads: int
    group: int
    head_dim: int
    v_dim: int
    causal: bool = False
    scale: float | None = None
    dtype: str = "float32"
    layouts: tuple[str, str, str] = ("contiguous",) * 3

    def arrays(self) -> dict[str, np.ndarray]:
        """float64 arrays of values that `dtype` has."""
        q_heads = self.kv_heads * self.group
        shapes = {
            "q": (self.batch, self.q_len, q_heads, self.head_dim),
            "k": (self.batch, self.kv_len, self.kv_heads, self.head_dim),
            "v": (self.batch, self.kv_len, self.kv_heads, self.v_dim),
            "dout": (self.batch, self.q_len, q_heads, self.v_dim),
        }
        rng = np.random.default_rng(self.q_len * 71 + self.kv_len)
        arrays = {name: rounded(rng.standard_normal(shape), self.dtype) for name, shape in shapes.items()}
        for name, layout in zip("qkv", self.layouts, strict=True):
            arrays[name] = repeated(arrays[name], layout)
        return {**arrays, "dlse": rng.standard_normal((self.batch, q_heads, self.q_len))}


@st.composite
def attention_problems(draw: Any, layouts: tuple[str, ...] = LAYOUTS) -> Attention:
    return Attention(
        batch=draw(st.integers(0, 2)),
        q_len=draw(lengths),
        kv_len=draw(lengths),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(dims),
        v_dim=draw(dims),
        causal=draw(st.booleans()),
        scale=draw(scales),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(3)),
    )


# ---- Calls, on this CPU or on a chip


def run_attention(
    problem: Attention, arrays: dict[str, np.ndarray], implementation: str, device: str
) -> dict[str, np.ndarray]:
    """out and lse."""
    inputs = [
        placed(arrays[name], problem.dtype, layout, FRAMEWORKS[device], device)
        for name, layout in zip("qkv", problem.layouts, strict=True)
    ]
    options = {"causal": problem.causal, "scale": problem.scale, "implementation": implementation}
    out, lse = crosstile.attention(*inputs, **options, return_lse=True)
    assert tuple(out.shape) == arrays["dout"].shape
    assert tuple(lse.shape) == arrays["dlse"].shape
    return {"out": to_numpy(out), "lse": to_numpy(lse)}


def expected_attention(problem: Attention, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the NumPy definition in float64."""
    spec = AttentionSpec("float64", problem.head_dim, problem.v_dim, causal=problem.causal, scale=problem.scale)
    inputs = tuple(arrays[name] for name in "qkv")
    outputs = attention_definition.forward(spec, *inputs)
    gradients = attention_definition.backward(spec, inputs, outputs, (arrays["dout"], arrays["dlse"]))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*outputs, *gradients[:3]), strict=True))


def own_attention(problem: Attention, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return attention_by_torch(**arrays, causal=problem.causal, scale=problem.scale, dtype=problem.dtype)


def pull_back(
    function: Any, inputs: dict[str, torch.Tensor], gradients: list[torch.Tensor]
) -> tuple[Any, dict[str, np.ndarray]]:
    """The outputs and the inputs' gradients by torch's autograd."""
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pulled = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return outputs, {f"d{name}": to_numpy(gradient) for name, gradient in zip(leaves, pulled, strict=True)}


# ---- Against the definition


def check_attention_forward(problem: Attention, implementation: str, device: str) -> None:
    skip_unless_it_runs(implementation, device)
    arrays = problem.arrays()
    ours = run_attention(problem, arrays, implementation, device)
    assert_within(ours, own_attention(problem, arrays), expected_attention(problem, arrays), problem.dtype)


def check_attention_gradients(problem: Attention, implementation: str, device: str) -> None:
    skip_unless_it_runs(implementation, device)
    if device == "tpu":
        pytest.skip("gradients are taken through torch, which is on no TPU here")
    arrays = problem.arrays()

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        options = {"causal": problem.causal, "scale": problem.scale, "implementation": implementation}
        return crosstile.attention(q, k, v, **options, return_lse=True)

    inputs = {
        n: to_torch(arrays[n], problem.dtype, layout, device) for n, layout in zip("qkv", problem.layouts, strict=True)
    }
    dout = to_torch(arrays["dout"], problem.dtype, "sliced", device)
    dlse = to_torch(arrays["dlse"], "float32", "transposed", device)
    _, ours = pull_back(function, inputs, [dout, dlse])
    assert_within(ours, own_attention(problem, arrays), expected_attention(problem, arrays), problem.dtype)


CORNERS = (
    Attention(1, 5, 0, 1, 2, 8, 8),
    Attention(1, 0, 5, 1, 1, 8, 8, causal=True),
    Attention(2, 33, 64, 1, 2, 40, 24, causal=True, dtype="bfloat16", layouts=("sliced", "transposed", "broadcast")),
    Attention(1, 65, 33, 2, 1, 1, 3, causal=True, scale=-0.4),
)


@IMPLEMENTATIONS
@quick(6)
@given(problem=attention_problems())
@example(problem=CORNERS[0])
@example(problem=CORNERS[1])
@example(problem=CORNERS[2])
@example(problem=CORNERS[3])
def test_attention_forward(problem, implementation, device):
    check_attention_forward(problem, implementation, device)


@IMPLEMENTATIONS
@quick(4)
@given(problem=attention_problems(LAYOUTS[:4]))
@example(problem=CORNERS[0])
@example(problem=CORNERS[2])
@example(problem=CORNERS[3])
def test_attention_gradients(problem, implementation, device):
    check_attention_gradients(problem, implementation, device)


@pytest.mark.sweep
@IMPLEMENTATIONS
@SWEEP
@given(problem=attention_problems())
def test_attention_forward_swept(problem, implementation, device):
    check_attention_forward(problem, implementation, device)


@pytest.mark.sweep
@IMPLEMENTATIONS
@SWEEP
@given(problem=attention_problems(LAYOUTS[:4]))
def test_attention_gradients_swept(problem, implementation, device):
    check_attention_gradients(problem, implementation, device)


# ---- Laws

ODD = Attention(2, 37, 45, 2, 2, 24, 17)


@IMPLEMENTATIONS
def test_the_order_of_the_keys_does_not_matter(implementation, device):
    skip_unless_it_runs(implementation, device)
    arrays = ODD.arrays()
    order = np.random.default_rng(1).permutation(ODD.kv_len)
    shuffled = {**arrays, "k": arrays["k"][:, order], "v": arrays["v"][:, order]}
    expected, own = expected_attention(ODD, arrays), own_attention(ODD, shuffled)
    assert_within(run_attention(ODD, shuffled, implementation, device), own, expected, "float32")


@IMPLEMENTATIONS
def test_a_query_does_not_depend_on_later_keys(implementation, device):
    """Causal: change the last keys to other finite values, and the rows before them stay the same to the bit."""
    skip_unless_it_runs(implementation, device)
    problem = Attention(**{**vars(ODD), "causal": True})
    arrays = problem.arrays()
    changed = {**arrays, "k": arrays["k"].copy(), "v": arrays["v"].copy()}
    changed["k"][:, 40:] *= -3
    changed["v"][:, 40:] += 7
    before, after = (run_attention(problem, each, implementation, device) for each in (arrays, changed))
    rows = 40 - (problem.kv_len - problem.q_len)
    np.testing.assert_array_equal(before["out"][:, :rows], after["out"][:, :rows])
    np.testing.assert_array_equal(before["lse"][..., :rows], after["lse"][..., :rows])
    assert (before["out"][:, rows] != after["out"][:, rows]).any()


@IMPLEMENTATIONS
def test_scale_and_queries_trade_a_power_of_two(implementation, device):
    """(4 q, scale / 4) is (q, scale), exactly, since powers of two round nothing."""
    skip_unless_it_runs(implementation, device)
    arrays = ODD.arrays()
    problems = [Attention(**{**vars(ODD), "scale": scale}) for scale in (0.5, 0.125)]
    plain = run_attention(problems[0], arrays, implementation, device)
    traded = run_attention(problems[1], {**arrays, "q": 4 * arrays["q"]}, implementation, device)
    np.testing.assert_array_equal(plain["out"], traded["out"])


@IMPLEMENTATIONS
def test_grouped_heads_are_repeated_heads(implementation, device):
    skip_unless_it_runs(implementation, device)
    arrays = ODD.arrays()
    whole = Attention(**{**vars(ODD), "kv_heads": ODD.kv_heads * ODD.group, "group": 1})
    repeated_heads = {**arrays, **{name: arrays[name].repeat(ODD.group, axis=2) for name in "kv"}}
    grouped = run_attention(ODD, arrays, implementation, device)
    plain = run_attention(whole, repeated_heads, implementation, device)
    np.testing.assert_array_equal(grouped["out"], plain["out"])


@IMPLEMENTATIONS
def test_batch_items_do_not_mix(implementation, device):
    """The second item alone gives what it gives in a batch, even beside an item of NaN."""
    skip_unless_it_runs(implementation, device)
    arrays = ODD.arrays()
    for name in "qkv":
        arrays[name][0] = np.nan
    together = run_attention(ODD, arrays, implementation, device)
    alone = {name: array[1:] for name, array in arrays.items()}
    single = run_attention(Attention(**{**vars(ODD), "batch": 1}), alone, implementation, device)
    np.testing.assert_array_equal(together["out"][1:], single["out"])
    assert np.isnan(together["out"][0]).all()


@IMPLEMENTATIONS
def test_two_backward_runs_are_bit_equal(implementation, device):
    skip_unless_it_runs(implementation, device)
    if device == "tpu":
        pytest.skip("gradients are taken through torch, which is on no TPU here")
    arrays = ODD.arrays()

    def gradients() -> dict[str, np.ndarray]:
        inputs = {name: to_torch(arrays[name], "float32", "contiguous", device) for name in "qkv"}
        dout = to_torch(arrays["dout"], "float32", "contiguous", device)
        function = lambda q, k, v: crosstile.attention(q, k, v, causal=True, implementation=implementation)  # noqa: E731
        return pull_back(function, inputs, [dout])[1]

    first, second = gradients(), gradients()
    assert prod(first["dk"].shape)
    for name, gradient in first.items():
        np.testing.assert_array_equal(gradient, second[name])


@IMPLEMENTATIONS
def test_a_query_that_sees_no_key(implementation, device):
    """It gives 0 and -inf, and takes no part in the backward, not even with NaN as the gradient of its lse."""
    skip_unless_it_runs(implementation, device)
    if device == "tpu":
        pytest.skip("gradients are taken through torch, which is on no TPU here")
    problem = Attention(1, 37, 5, 1, 2, 8, 9, causal=True)
    blind = problem.q_len - problem.kv_len
    arrays = problem.arrays()
    exact, own = expected_attention(problem, arrays), own_attention(problem, arrays)
    arrays["dlse"][..., :blind] = np.nan

    inputs = {name: to_torch(arrays[name], "float32", "contiguous", device) for name in "qkv"}
    gradients = [to_torch(arrays[name], "float32", "contiguous", device) for name in ("dout", "dlse")]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return crosstile.attention(q, k, v, causal=True, return_lse=True, implementation=implementation)

    (out, lse), ours = pull_back(function, inputs, gradients)
    assert (to_numpy(out)[:, :blind] == 0).all()
    assert np.isneginf(to_numpy(lse)[..., :blind]).all()
    assert (ours["dq"][:, :blind] == 0).all()
    assert_within(ours, own, exact, "float32")
