"""The Triton kernels, interpreted, against the definition in float64.

Tolerance: an error at most twice that of torch's own op in the same precision, plus a floor of a few ulps, each as a
fraction of the largest entry and of the root mean square.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstile.kernels.attention import reference, triton_common
from crosstile.kernels.attention import triton as kernels
from crosstile.kernels.attention.spec import AttentionSpec
from crosstile.kernels.attention.tiles import AttentionConfig, AttentionTiles, choose_config
from crosstile.kernels.tiles.launch import Array
from crosstile.kernels.tiles.targets import INTERPRET, get_target
from crosstile.kernels.tiles.triton_interpreter import run
from crosstile.kernels.tiles.triton_tiles import needs_wide_offsets, padded

ULP = {"float16": 2.0**-10, "float32": 2.0**-23}
FLOOR = {"float16": 1, "float32": 8}  # ulps: one rounding of the result; sums of a few hundred in another order


@dataclass(frozen=True)
class Case:
    """Sizes of one call; every name below is a field, so that a case reads as its difference from this one."""

    q_len: int = 65
    kv_len: int = 65
    head_dim: int = 16
    v_dim: int = 16
    q_heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    causal: bool = True
    scale: float | None = None

    def spec(self, dtype: str) -> AttentionSpec:
        return AttentionSpec(dtype, self.head_dim, self.v_dim, self.causal, self.scale)

    def arrays(self, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
        """q, k, v and the gradients dout and dlse."""
        draw = np.random.default_rng(seed).standard_normal
        return {
            "q": draw((self.batch, self.q_len, self.q_heads, self.head_dim)).astype(dtype),
            "k": draw((self.batch, self.kv_len, self.kv_heads, self.head_dim)).astype(dtype),
            "v": draw((self.batch, self.kv_len, self.kv_heads, self.v_dim)).astype(dtype),
            "dout": draw((self.batch, self.q_len, self.q_heads, self.v_dim)).astype(dtype),
            "dlse": draw((self.batch, self.q_heads, self.q_len)).astype(np.float32),
        }


CASES = {
    "square": Case(head_dim=64, v_dim=64),
    "not causal": Case(causal=False, q_len=64, kv_len=96, batch=2),
    "tails everywhere": Case(q_len=33, kv_len=70, head_dim=40, v_dim=24, causal=False),
    "causal, more keys": Case(q_len=33, kv_len=131, head_dim=40, v_dim=40),
    "causal, rows without a key": Case(q_len=70, kv_len=33),
    "causal, whole tiles without a key": Case(q_len=130, kv_len=5),
    "grouped heads": Case(q_heads=6, kv_heads=2, q_len=20, kv_len=40),
    "one key head": Case(q_heads=2, kv_heads=1, head_dim=80, batch=2, q_len=33, kv_len=33),
    "narrow head, wide value": Case(head_dim=3, v_dim=129, q_len=33, kv_len=33),
    "wide head": Case(head_dim=256, v_dim=256, q_len=33, kv_len=40),
    "head in two tiles": Case(head_dim=192, v_dim=128, q_len=33, kv_len=40, kv_heads=1),
    "widest head": Case(head_dim=576, v_dim=512, q_len=20, kv_len=33, q_heads=1, kv_heads=1),
    "one query": Case(q_len=1, kv_len=65),
    "one key": Case(q_len=65, kv_len=1),
    "negative scale": Case(scale=-0.7),
    "scale 0": Case(scale=0.0, q_len=40, kv_len=33),
    "large scale": Case(scale=20.0),
}
EMPTY = {
    "no query": Case(q_len=0),
    "no key": Case(kv_len=0),
    "no key, not causal": Case(kv_len=0, causal=False),
    "no batch": Case(batch=0),
    "neither": Case(q_len=0, kv_len=0),
}


def describe(array: np.ndarray | None) -> Array | None:
    if array is None:
        return None
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def forward(spec: AttentionSpec, arrays: dict, config: AttentionConfig | None = None) -> tuple[np.ndarray, np.ndarray]:
    inputs = {name: arrays[name] for name in ("q", "k", "v")}
    plan = kernels.forward(spec, config or choose_config(spec, INTERPRET), *map(describe, inputs.values()))
    return run(plan, inputs)


def backward(spec: AttentionSpec, arrays: dict, out, lse, config: AttentionConfig | None = None) -> tuple:
    named = {**arrays, "out": out, "lse": lse}
    groups = [
        tuple(describe(named.get(name)) for name in names)
        for names in (("q", "k", "v"), ("out", "lse"), ("dout", "dlse"))
    ]
    plan = kernels.backward(spec, config or choose_config(spec, INTERPRET), *groups)
    return run(plan, {name: array for name, array in named.items() if name in plan.inputs})


def forward_and_backward(spec: AttentionSpec, arrays: dict, config: AttentionConfig | None = None) -> dict:
    out, lse = forward(spec, arrays, config)
    return dict(
        zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *backward(spec, arrays, out, lse, config)), strict=True)
    )


def definition(case: Case, arrays: dict) -> dict:
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    spec = case.spec("float64")
    inputs = wide["q"], wide["k"], wide["v"]
    outputs = reference.forward(spec, *inputs)
    gradients = reference.backward(spec, inputs, outputs, (wide["dout"], wide.get("dlse")))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*outputs, *gradients[:3]), strict=True))


def framework(case: Case, arrays: dict) -> dict:
    """torch's own attention in the same precision; its lse from the same scores."""
    q, k, v = (torch.tensor(arrays[name]).transpose(1, 2).requires_grad_() for name in ("q", "k", "v"))
    spec = case.spec(arrays["q"].dtype.name)
    seen = torch.tensor(reference.visible(spec, case.q_len, case.kv_len))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(q, k, v, attn_mask=seen, scale=spec.softmax_scale, enable_gqa=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.tensor(arrays["dout"]).transpose(1, 2))
    heads = k.detach().repeat_interleave(case.q_heads // case.kv_heads, 1).float()
    scores = (q.detach().float() @ heads.mT * spec.softmax_scale).masked_fill(~seen, -torch.inf)
    found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return {"lse": scores.logsumexp(-1).numpy()} | {
        name: array.detach().transpose(1, 2).float().numpy() for name, array in found.items()
    }


def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(max-relative, RMS-relative)."""
    infinite = np.isinf(expected)
    difference = np.where(infinite, 0, found.astype(np.float64) - np.where(infinite, 0, expected))
    size = np.where(infinite, 0, expected)
    if not np.any(size):
        return np.array([np.abs(difference).max(initial=0), 0.0])
    return np.array([np.abs(difference).max() / np.abs(size).max(), np.sqrt(np.mean(difference**2) / np.mean(size**2))])


def check(found: dict, expected: dict, allowed: dict, dtype: str) -> None:
    for name, array in found.items():
        assert array.shape == expected[name].shape
        assert not np.isnan(array).any(), name
        np.testing.assert_array_equal(np.isinf(array), np.isinf(expected[name]), err_msg=name)
        precision = "float32" if name == "lse" else dtype
        error, limit = errors(array, expected[name]), 2 * allowed[name] + FLOOR[precision] * ULP[precision]
        assert (error <= limit).all(), f"{name}: error {error}, allowed {limit}"


def check_against_torch(case: Case, dtype: str, seed: int = 0) -> None:
    arrays = case.arrays(dtype, seed)
    without = {name: array for name, array in arrays.items() if name != "dlse"}
    expected, peer = definition(case, without), framework(case, without)
    allowed = {name: errors(np.nan_to_num(peer[name], nan=0, neginf=-np.inf), expected[name]) for name in expected}
    spec = case.spec(dtype)
    found = forward_and_backward(spec, without)
    check(found, expected, allowed, dtype)
    assert found["out"].dtype == dtype
    assert found["lse"].dtype == np.float32

    # torch's op has no lse to differentiate, so it sets the bar without dlse.
    with_dlse = backward(spec, arrays, found["out"], found["lse"])
    check(dict(zip(("dq", "dk", "dv"), with_dlse, strict=True)), definition(case, arrays), allowed, dtype)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name):
    check_against_torch(CASES[name], "float16")


@pytest.mark.parametrize("name", ["square", "tails everywhere", "causal, rows without a key", "one key head"])
def test_agrees_with_the_definition_in_float32(name):
    check_against_torch(CASES[name], "float32")


@pytest.mark.parametrize("name", EMPTY)
def test_empty_arrays(name):
    case = EMPTY[name]
    found = forward_and_backward(case.spec("float16"), case.arrays("float16"))
    assert (found.pop("lse") == -np.inf).all()
    assert all((array == 0).all() for array in found.values())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        q_len=st.integers(1, 70),
        kv_len=st.integers(1, 70),
        head_dim=st.integers(1, 48),
        v_dim=st.integers(1, 48),
        q_heads=st.just(1),
        kv_heads=st.just(1),
        causal=st.booleans(),
    )
)
def test_any_size(case):
    check_against_torch(case, "float32")


def _equal(found: dict, expected: dict) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def _between_nans(array: np.ndarray) -> np.ndarray:
    """The same values as a view with NaN before, after and between the rows and the columns."""
    storage = np.full([2 * size + 3 for size in array.shape], np.nan, array.dtype)
    view = storage[tuple(slice(1, 2 * size + 1, 2) for size in array.shape)]
    view[...] = array
    return view


LAYOUTS = {
    "heads before rows": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
    "columns first": lambda x: np.asfortranarray(x),
    "NaN around": _between_nans,
    "backwards": lambda x: np.ascontiguousarray(x[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    """The same values in another layout give the same bits."""
    case = Case(q_len=35, kv_len=40, head_dim=40, v_dim=24, batch=2)
    arrays = case.arrays("float16")
    placed = {name: array if name == "dlse" else LAYOUTS[layout](array) for name, array in arrays.items()}
    placed["dlse"] = arrays["dlse"].swapaxes(1, 2).copy().swapaxes(1, 2)
    _equal(forward_and_backward(case.spec("float16"), placed), forward_and_backward(case.spec("float16"), arrays))


def test_outputs_with_strides():
    """backward takes out and lse as the caller kept them."""
    case = Case(q_len=35, kv_len=33, batch=2)
    arrays, spec = case.arrays("float16"), case.spec("float16")
    out, lse = forward(spec, arrays)
    moved = backward(spec, arrays, _between_nans(out), lse.swapaxes(0, 2).copy().swapaxes(0, 2))
    for found, expected in zip(moved, backward(spec, arrays, out, lse), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_stride_0():
    """Broadcast arrays, such as the gradient of a sum."""
    case = Case(q_len=20, kv_len=40, batch=2)
    arrays = case.arrays("float16")
    broadcast = {
        "q": np.broadcast_to(arrays["q"][:1], arrays["q"].shape),
        "k": np.broadcast_to(arrays["k"][:, :, :1], arrays["k"].shape),
        "v": np.broadcast_to(arrays["v"][:1, :, :1], arrays["v"].shape),
        "dout": np.broadcast_to(np.float16(1), arrays["dout"].shape),
        "dlse": np.broadcast_to(np.float32(0.5), arrays["dlse"].shape),
    }
    copied = {name: np.ascontiguousarray(array) for name, array in broadcast.items()}
    _equal(forward_and_backward(case.spec("float16"), broadcast), forward_and_backward(case.spec("float16"), copied))


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_tiles_above_the_diagonal_are_not_read():
    case = Case(q_len=96, kv_len=96)
    arrays, spec = case.arrays("float16"), case.spec("float16")
    poisoned = {**arrays, "k": arrays["k"].copy(), "v": arrays["v"].copy()}
    for name in ("k", "v"):
        poisoned[name][:, 64:] = np.nan
    clean, found = forward(spec, arrays), forward(spec, poisoned)
    np.testing.assert_array_equal(found[0][:, :64], clean[0][:, :64])
    np.testing.assert_array_equal(found[1][:, :, :64], clean[1][:, :, :64])
    assert np.isnan(found[0][:, 64:]).all()


def test_gradient_of_lse_is_ignored_where_no_key_is_seen():
    case = Case(q_len=40, kv_len=10)
    arrays, spec = case.arrays("float16"), case.spec("float16")
    without_key = {**arrays, "dlse": arrays["dlse"].copy()}
    without_key["dlse"][:, :, :30] = np.nan
    _equal(forward_and_backward(spec, without_key), forward_and_backward(spec, arrays))


def test_two_runs_are_bit_equal():
    case = Case(q_len=33, kv_len=40, kv_heads=1)
    arrays, spec = case.arrays("float16"), case.spec("float16")
    _equal(forward_and_backward(spec, arrays), forward_and_backward(spec, arrays))


@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 64), (64, 16), (128, 128)])
def test_any_tiles(block_q, block_kv):
    tiles = AttentionTiles(block_q, block_kv)
    case = Case(q_len=70, kv_len=90, q_heads=1, kv_heads=1)
    arrays = case.arrays("float32")
    found = forward_and_backward(case.spec("float32"), arrays, AttentionConfig(tiles, tiles, tiles))
    check(found, definition(case, arrays), dict.fromkeys(found, 0.0), "float32")


@pytest.mark.parametrize("name", ["tails everywhere", "causal, rows without a key", "grouped heads"])
def test_the_copy_engine_loads_what_addresses_do(name):
    case = CASES[name]
    arrays, spec = case.arrays("float16"), case.spec("float16")
    addresses, descriptors = (AttentionTiles(16, 32, descriptors=given) for given in (0, 1))
    one, other = (AttentionConfig(tiles, tiles, tiles) for tiles in (addresses, descriptors))
    _equal(forward_and_backward(spec, arrays, other), forward_and_backward(spec, arrays, one))


@pytest.mark.parametrize(
    ("array", "loads"),
    [
        (Array((2, 64, 4, 24), "bfloat16", (6144, 96, 24, 1)), True),
        (Array((2, 64, 4, 24), "bfloat16", (6144, 96, 24, 1), aligned=False), False),
        (Array((2, 64, 4, 24), "bfloat16", (6144, 96, 24, 2)), False),
        (Array((2, 64, 4, 20), "bfloat16", (5120, 80, 20, 1)), False),
        (Array((2, 64, 4, 20), "float32", (5120, 80, 20, 1)), True),
        (Array((2, 64, 4, 24), "bfloat16", (1540, 96, 24, 1)), False),
        (Array((2, 64, 4, 24), "bfloat16", (1536, 24, 0, 1)), False),
        (Array((2, 64, 4, 24), "bfloat16", (6144, -96, 24, 1)), False),
        (Array((2, 64, 4, 192), "bfloat16", (49152, 768, 192, 1)), False),
    ],
    ids=[
        "contiguous", "not at 16 bytes", "columns apart", "heads not at 16 bytes", "of float32",
        "items not at 16 bytes", "one head for all", "rows backwards", "two tiles a head",
    ],
)  # fmt: skip
def test_what_the_copy_engine_can_load(array, loads):
    assert triton_common.by_descriptors(AttentionTiles(16, 16, descriptors=1), array) is loads
    assert not triton_common.by_descriptors(AttentionTiles(16, 16), array)


@pytest.mark.parametrize("size", [8, 48])
def test_refuses_tiles_that_no_dot_can_have(size):
    case = Case()
    spec, arrays = case.spec("float16"), case.arrays("float16")
    config = choose_config(spec, INTERPRET)
    with pytest.raises(ValueError, match=rf"config\.forward\.block_q: got {size}; it must be a power of two"):
        forward(spec, arrays, replace(config, forward=AttentionTiles(size, 32)))


# 64-bit offsets


def test_wide_offsets_give_the_same_bits(monkeypatch):
    case = Case(q_len=35, kv_len=40, head_dim=24, v_dim=40, q_heads=1, kv_heads=1)
    arrays, spec = case.arrays("float16"), case.spec("float16")
    narrow = forward_and_backward(spec, arrays)
    monkeypatch.setattr(triton_common, "needs_wide_offsets", lambda tiles: True)
    _equal(forward_and_backward(spec, arrays), narrow)


def test_arrays_past_2_to_the_31_elements(tmp_path):
    """Columns 2**28 elements apart inside a tile, and batch items 2**32 apart, in a sparse file."""
    case = Case(q_len=3, kv_len=40, q_heads=1, kv_heads=1, batch=2)
    arrays, spec = case.arrays("float16"), case.spec("float16")
    near = forward_and_backward(spec, arrays)
    storage = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=(2, 16, 2**28))
    far = storage[:, :, None, : case.kv_len].transpose(0, 3, 2, 1)
    far[...] = arrays["k"]
    assert describe(far).reach > 2**31
    _equal(forward_and_backward(spec, {**arrays, "k": far}), near)


def test_width_of_offsets_is_chosen_from_the_strides():
    assert not needs_wide_offsets([(128, 128, 2**23, 1)])
    assert needs_wide_offsets([(128, 128, 2**24 + 2**18, 1)])
    assert needs_wide_offsets([(128, 128, -(2**25), 1), (16, 16, 1, 1)])


def test_padded():
    assert [padded(size) for size in (1, 16, 17, 40, 64, 65, 256)] == [16, 16, 32, 64, 64, 128, 256]


# What is compiled, and what is refused


def test_lengths_do_not_recompile():
    spec = Case().spec("float16")
    short, long = (Case(q_len=size, kv_len=3 * size).arrays("float16") for size in (5, 100))

    def constants(arrays):
        config = choose_config(spec, get_target("sm_90"))
        out, lse = np.empty_like(arrays["dout"]), np.empty_like(arrays["dlse"])
        inputs, outputs, gradients = (
            tuple(map(describe, group))
            for group in ((arrays["q"], arrays["k"], arrays["v"]), (out, lse), (arrays["dout"], arrays["dlse"]))
        )
        plans = kernels.forward(spec, config, *inputs), kernels.backward(spec, config, inputs, outputs, gradients)
        return [dict(launch.constants) for plan in plans for launch in plan.launches]

    assert constants(short) == constants(long)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_supports_gpus(target, dtype):
    assert kernels.supports(AttentionSpec(dtype, 256, 80), get_target(target), needs_grad=True) == ()


@pytest.mark.parametrize(
    ("spec", "target", "reason"),
    [
        (AttentionSpec("float8_e4m3fn", 64, 64), get_target("sm_80"), "sm_80 has no products of float8_e4m3fn; sm_90"),
        (AttentionSpec("float8_e4m3fn", 64, 64), get_target("gfx942"), "its own float8 is e4m3fnuz"),
        (AttentionSpec("float64", 64, 64), INTERPRET, "the arrays are float64; cast them"),
        (AttentionSpec("float16", 577, 64), get_target("sm_90"), "head_dim is 577, and it must be 1 to 576"),
        (AttentionSpec("float16", 64, 600), get_target("sm_90"), "v_dim is 600"),
        (AttentionSpec("float32", 257, 64), get_target("sm_90"), "head_dim is 257, and it must be 1 to 256"),
        (AttentionSpec("float16", 64, 64), get_target("v6e"), "the target is v6e; use implementation='pallas'"),
    ],
)
def test_reasons_why_not(spec, target, reason):
    reasons = kernels.supports(spec, target, needs_grad=False)
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert reasons[0].endswith(".")
