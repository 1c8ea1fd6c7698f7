"""Any shape, dtype, stride and option: the kernels keep to the NumPy definition in float64, and to laws of their own.

The quick examples are the same in every run; `pytest -m sweep` draws many new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import assert_within, attention_by_torch, matmul_by_torch, rounded

import crosstile
from crosstile.kernels.attention import reference as attention_definition
from crosstile.kernels.attention.spec import AttentionSpec
from crosstile.kernels.matmul.spec import ACTIVATIONS

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["triton", "pallas"])
CHIPS = {"cuda": "triton", "tpu": "pallas"}

_suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
SWEEP = settings(max_examples=60, deadline=None, database=None, suppress_health_check=_suppressed, print_blob=True)


def quick(examples: int) -> settings:
    """The same few examples in every run."""
    return settings(SWEEP, derandomize=True, max_examples=examples)


# ---- Problems

LAYOUTS = ("contiguous", "sliced", "transposed", "broadcast", "reversed")
lengths = st.one_of(st.integers(0, 70), st.sampled_from([1, 31, 32, 33, 64, 65]))
dims = st.one_of(st.integers(1, 20), st.sampled_from([16, 33, 40, 64]))
scales = st.one_of(st.none(), st.floats(0.05, 2.0), st.sampled_from([0.0, -0.4]))


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
        dtype=draw(st.sampled_from(["float32", "narrow"])),
        layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(3)),
    )


@dataclass(frozen=True)
class Matmul:
    """One call: shapes, options, and how each array lies in memory."""

    lead_a: tuple[int, ...]
    lead_b: tuple[int, ...]
    m: int
    k: int
    n: int
    bias: bool = False
    activation: str | None = None
    residual: tuple[int, ...] | None = None  # which dimensions of the residual are 1, counted from the last
    dtype: str = "float32"
    layouts: tuple[str, str] = ("contiguous",) * 2

    def arrays(self) -> dict[str, np.ndarray]:
        """float64 arrays of values that `dtype` has."""
        whole = (*np.broadcast_shapes(self.lead_a, self.lead_b), self.m, self.n)
        shapes = {"a": (*self.lead_a, self.m, self.k), "b": (*self.lead_b, self.k, self.n), "dout": whole}
        if self.bias:
            shapes["bias"] = (self.n,)
        if self.residual is not None:
            shapes["residual"] = tuple(1 if len(whole) - i in self.residual else size for i, size in enumerate(whole))
        rng = np.random.default_rng(self.m * 71 + self.n)
        arrays = {name: rounded(rng.standard_normal(shape), self.dtype) for name, shape in shapes.items()}
        for name, layout in zip("ab", self.layouts, strict=True):
            arrays[name] = repeated(arrays[name], layout)
        return arrays


@st.composite
def matmul_problems(draw: Any, layouts: tuple[str, ...] = LAYOUTS) -> Matmul:
    lead_a, lead_b = draw(
        st.sampled_from([((), ()), ((2,), ()), ((2, 3), ()), ((2,), (2,)), ((1,), (3,)), ((2, 1), (3,)), ((0,), ())])
    )
    return Matmul(
        lead_a,
        lead_b,
        m=draw(lengths),
        k=draw(lengths),
        n=draw(lengths),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, *ACTIVATIONS])),
        residual=draw(st.sampled_from([None, (), (1,), (2,)])),
        dtype=draw(st.sampled_from(["float32", "narrow"])),
        layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(2)),
    )


def narrow(dtype: str, implementation: str, device: str) -> str:
    """The narrow precision that all chips have."""
    return "bfloat16" if dtype == "narrow" else dtype


def repeated(array: np.ndarray, layout: str) -> np.ndarray:
    """With the layout "broadcast" all rows are the first, as in an array of stride 0."""
    return np.broadcast_to(array[..., :1, :], array.shape) if layout == "broadcast" and array.size else array


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values in another layout. What lies between and around a slice is NaN, and must not be seen."""
    if layout == "sliced":
        storage = np.full([2 * size + 3 for size in array.shape], np.nan, array.dtype)
        view = storage[tuple(slice(1, 1 + 2 * size, 2) for size in array.shape)]
        view[...] = array
        return view
    if layout == "transposed":
        return np.ascontiguousarray(array.T).T
    if layout == "reversed":
        return np.ascontiguousarray(np.flip(array))[(slice(None, None, -1),) * array.ndim]
    if layout == "broadcast" and array.size:
        return np.broadcast_to(np.ascontiguousarray(array[..., :1, :]), array.shape)
    return np.ascontiguousarray(array)


# ---- Calls, on this CPU or on a chip


def native(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def to_device(array: np.ndarray, dtype: str, layout: str, device: str) -> Any:
    """NumPy's on a CPU, torch's on a GPU, JAX's on a TPU; torch has no negative strides, JAX none at all."""
    if device == "cuda":
        return to_torch(array, dtype, layout, device)
    laid = laid_out(array.astype(native(dtype)), layout)
    if device == "tpu":
        import jax.numpy as jnp

        return jnp.asarray(laid)
    return laid


def to_torch(array: np.ndarray, dtype: str, layout: str, device: str) -> torch.Tensor:
    layout = "contiguous" if layout == "reversed" else layout
    laid = laid_out(array, layout)
    strides = [stride // laid.itemsize for stride in laid.strides]
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, laid.shape, strict=True)) if laid.size else 0
    storage = torch.full((reach,), float("nan"), dtype=getattr(torch, dtype), device=device)
    tensor = torch.as_strided(storage, laid.shape, strides)
    if layout == "broadcast" and laid.size:
        tensor[..., :1, :].copy_(torch.from_numpy(laid[..., :1, :].copy()))
    else:
        tensor.copy_(torch.from_numpy(laid.copy()))
    return tensor


def to_numpy(array: Any) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().double().numpy()
    return np.asarray(array).astype(np.float64)


def run_attention(
    problem: Attention, arrays: dict[str, np.ndarray], implementation: str, device: str
) -> dict[str, np.ndarray]:
    """out and lse."""
    inputs = [
        to_device(arrays[name], problem.dtype, layout, device)
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


def skip_unless_it_runs(implementation: str, device: str) -> None:
    if CHIPS.get(device, implementation) != implementation:
        pytest.skip(f"{implementation} does not run on {device}")


# ---- Attention


def check_attention_forward(problem: Attention, implementation: str, device: str) -> None:
    skip_unless_it_runs(implementation, device)
    problem = Attention(**{**vars(problem), "dtype": narrow(problem.dtype, implementation, device)})
    arrays = problem.arrays()
    ours = run_attention(problem, arrays, implementation, device)
    assert_within(ours, own_attention(problem, arrays), expected_attention(problem, arrays), problem.dtype)


def check_attention_gradients(problem: Attention, implementation: str, device: str) -> None:
    skip_unless_it_runs(implementation, device)
    if device == "tpu":
        pytest.skip("gradients are taken through torch, which is on no TPU here")
    problem = Attention(**{**vars(problem), "dtype": narrow(problem.dtype, implementation, device)})
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
    Attention(2, 33, 64, 1, 2, 40, 24, causal=True, dtype="narrow", layouts=("sliced", "transposed", "broadcast")),
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


# ---- Matmul


def check_matmul(problem: Matmul, implementation: str, device: str, needs_grad: bool) -> None:
    skip_unless_it_runs(implementation, device)
    if device == "tpu" and needs_grad:
        pytest.skip("gradients are taken through torch, which is on no TPU here")
    problem = Matmul(**{**vars(problem), "dtype": narrow(problem.dtype, implementation, device)})
    arrays = problem.arrays()
    layouts = {**dict(zip("ab", problem.layouts, strict=True)), "residual": "sliced"}
    names = [name for name in arrays if name != "dout"]

    def function(a: Any, b: Any, **others: Any) -> Any:
        return crosstile.matmul(a, b, activation=problem.activation, implementation=implementation, **others)

    dtype = problem.dtype
    if needs_grad:
        inputs = {name: to_torch(arrays[name], dtype, layouts.get(name, "contiguous"), device) for name in names}
        (out,), ours = pull_back(function, inputs, [to_torch(arrays["dout"], dtype, "transposed", device)])
    else:
        inputs = {name: to_device(arrays[name], dtype, layouts.get(name, "contiguous"), device) for name in names}
        out, ours = function(**inputs), {}
    ours["out"] = to_numpy(out)
    own = matmul_by_torch(**arrays, activation=problem.activation, dtype=dtype)
    assert_within(ours, own, matmul_by_torch(**arrays, activation=problem.activation), dtype)


MATMUL_CORNERS = (
    Matmul((), (), 33, 0, 5, bias=True, activation="silu", residual=()),
    Matmul((2, 1), (3,), 33, 65, 31, True, "gelu_tanh", (2,), "narrow", ("sliced", "transposed")),
    Matmul((2,), (), 7, 40, 50, True, "relu", (1,), "narrow", ("transposed", "broadcast")),
)


@IMPLEMENTATIONS
@quick(6)
@given(problem=matmul_problems())
@example(problem=MATMUL_CORNERS[0])
@example(problem=MATMUL_CORNERS[1])
@example(problem=MATMUL_CORNERS[2])
def test_matmul_forward(problem, implementation, device):
    check_matmul(problem, implementation, device, needs_grad=False)


@IMPLEMENTATIONS
@quick(4)
@given(problem=matmul_problems(LAYOUTS[:4]))
@example(problem=MATMUL_CORNERS[0])
@example(problem=MATMUL_CORNERS[1])
@example(problem=MATMUL_CORNERS[2])
def test_matmul_gradients(problem, implementation, device):
    check_matmul(problem, implementation, device, needs_grad=True)


@pytest.mark.sweep
@IMPLEMENTATIONS
@SWEEP
@given(problem=matmul_problems())
def test_matmul_forward_swept(problem, implementation, device):
    check_matmul(problem, implementation, device, needs_grad=False)


@pytest.mark.sweep
@IMPLEMENTATIONS
@SWEEP
@given(problem=matmul_problems(LAYOUTS[:4]))
def test_matmul_gradients_swept(problem, implementation, device):
    check_matmul(problem, implementation, device, needs_grad=True)


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
