"""The Pallas kernels, interpreted, against the definition in float64.

Tolerance: an error at most twice that of `jax.nn.dot_product_attention` in the same precision, plus a floor in ulps.
The interpreter fills scratch and outputs with NaN before they are written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within, attention_by_torch, rounded
from sweeps import one_in, swept

from crosstile.kernels.attention import pallas as kernels
from crosstile.kernels.attention import pallas_backward, pallas_forward, reference
from crosstile.kernels.attention.pallas_tiling import Tiling
from crosstile.kernels.attention.spec import AttentionInputs, AttentionSpec
from crosstile.kernels.attention.tiles import AttentionConfig, AttentionTiles, choose_config
from crosstile.kernels.tiles.pallas_tiles import fit_block, interpreter, stretch, stretch_room
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

TPUS = [name for name, target in TARGETS.items() if target.is_tpu]
NAMES = ("out", "lse", "dq", "dk", "dv")


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
    window_left: int | None = None
    scale: float | None = None
    dtype: str = "float32"
    with_dlse: bool = True

    @property
    def spec(self) -> AttentionSpec:
        options = {"causal": self.causal, "scale": self.scale, "window_left": self.window_left}
        return AttentionSpec(self.dtype, self.head_dim, self.v_dim, **options)

    @cached_property
    def exact_arrays(self) -> dict[str, np.ndarray]:
        """q, k, v and the gradients dout and dlse in float64, of values that the dtype has."""
        draw = np.random.default_rng(0).standard_normal
        arrays = {
            "q": draw((self.batch, self.q_len, self.q_heads, self.head_dim)),
            "k": draw((self.batch, self.kv_len, self.kv_heads, self.head_dim)),
            "v": draw((self.batch, self.kv_len, self.kv_heads, self.v_dim)),
            "dout": draw((self.batch, self.q_len, self.q_heads, self.v_dim)),
        }
        arrays = {name: rounded(array, self.dtype) for name, array in arrays.items()}
        dlse = draw((self.batch, self.q_heads, self.q_len)) if self.with_dlse else None
        return {**arrays, "dlse": None if dlse is None else rounded(dlse, "float32")}

    @property
    def arrays(self) -> dict[str, Any]:
        dtypes = {"dlse": "float32"}
        return {
            name: None if array is None else jnp.asarray(array, dtypes.get(name, self.dtype))
            for name, array in self.exact_arrays.items()
        }

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "scale": self.scale, "dtype": self.dtype}

    @property
    def seen(self) -> np.ndarray:
        return reference.visible(self.spec, self.q_len, self.kv_len, (self.q_len, self.kv_len))


def forward_and_backward(case: Case, arrays: dict, config: AttentionConfig | None = None) -> dict[str, jax.Array]:
    spec, inputs = case.spec, tuple(arrays[name] for name in ("q", "k", "v"))
    config = config or choose_config(spec, INTERPRET)
    outputs = kernels.forward(spec, config, INTERPRET, *inputs)
    gradients = kernels.backward(spec, config, INTERPRET, inputs, outputs, (arrays["dout"], arrays["dlse"]))
    return dict(zip(NAMES, (*outputs, *gradients[:3]), strict=True))


def run(case: Case, config: AttentionConfig | None = None) -> dict[str, jax.Array]:
    return compiled(lambda arrays: forward_and_backward(case, arrays, config), case.arrays)


def compiled(function: Callable[[dict], Any], arrays: dict[str, Any]) -> Any:
    """What the function gives, in half the time to compile."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(arrays).compile(compiler_options=options)(arrays)


def definition(case: Case) -> dict[str, np.ndarray]:
    spec, arrays = replace(case.spec, dtype="float64"), case.exact_arrays
    inputs = tuple(arrays[name] for name in ("q", "k", "v"))
    outputs = reference.forward(spec, *inputs)
    gradients = reference.backward(spec, inputs, outputs, (arrays["dout"], arrays["dlse"]))
    return dict(zip(NAMES, (*outputs, *gradients[:3]), strict=True))


def framework(case: Case) -> dict[str, np.ndarray]:
    """`jax.nn.dot_product_attention`, narrower values padded for it, and the logsumexp of the same scores.

    On a CPU it has no float16: there torch's op is the measure.
    """
    seen = jnp.asarray(case.seen)
    has_keys = seen.any(axis=1)
    width = max(case.head_dim, case.v_dim)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[3])]) for x in (q, k, v))
        scale = case.spec.softmax_scale
        out = jax.nn.dot_product_attention(*wide, mask=seen[None, None], scale=scale)[..., : case.v_dim]
        k_heads = jnp.repeat(k, case.q_heads // case.kv_heads, axis=2)
        scores = jnp.einsum("bihd,bjhd->bhij", q, k_heads, preferred_element_type=jnp.float32) * scale
        lse = jax.nn.logsumexp(scores, axis=-1, where=seen | ~has_keys[:, None])
        return out * has_keys[:, None, None].astype(out.dtype), jnp.where(has_keys, lse, -jnp.inf)

    def everything(arrays: dict[str, Any]) -> tuple[Any, ...]:
        outputs, vjp = jax.vjp(attend, arrays["q"], arrays["k"], arrays["v"])
        dlse = jnp.zeros_like(outputs[1]) if arrays["dlse"] is None else arrays["dlse"]
        return *outputs, *vjp((arrays["dout"], jnp.where(has_keys, dlse, 0)))

    results = compiled(everything, case.arrays)
    return {name: np.asarray(array, np.float64) for name, array in zip(NAMES, results, strict=True)}


def check(case: Case, config: AttentionConfig | None = None) -> None:
    hold(case, run(case, config))


def hold(case: Case, ours: dict[str, jax.Array]) -> None:
    assert {name: array.dtype.name for name, array in ours.items()} == {
        name: "float32" if name == "lse" else case.dtype for name in NAMES
    }
    theirs = framework(case) if case.dtype != "float16" else attention_by_torch(**case.exact_arrays, **case.options)
    assert_within(ours, theirs, definition(case), case.dtype)


CASES = {
    "causal": Case(head_dim=64, v_dim=64, batch=2),
    "not causal, tails everywhere": Case(q_len=33, kv_len=100, head_dim=40, v_dim=24, causal=False),
    "whole tiles": Case(q_len=64, kv_len=96, causal=False),
    "causal, more keys": Case(q_len=33, kv_len=131, head_dim=40, v_dim=80),
    "rows without a key": Case(q_len=100, kv_len=33),
    "whole tiles without a key": Case(q_len=130, kv_len=5, with_dlse=False),
    "grouped heads": Case(q_heads=6, kv_heads=2, q_len=40, kv_len=70, head_dim=80),
    "one query": Case(q_len=1, q_heads=4, kv_heads=1),
    "one key": Case(kv_len=1, causal=False, dtype="bfloat16"),
    "negative scale": Case(scale=-0.7, kv_len=80),
}


@pytest.mark.parametrize("name", one_in(3, CASES))
def test_agrees_with_the_definition(name):
    check(CASES[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype):
    check(Case(q_len=80, kv_len=129, q_heads=4, head_dim=64, v_dim=40, dtype=dtype))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        q_len=st.integers(1, 70),
        kv_len=st.integers(1, 70),
        head_dim=st.integers(1, 48),
        v_dim=st.integers(1, 48),
        causal=st.booleans(),
        with_dlse=st.booleans(),
    )
)
def test_any_size(case):
    check(case)


@pytest.mark.parametrize("sizes", [{"q_len": 0}, {"kv_len": 0}, {"kv_len": 0, "causal": False}, {"batch": 0}])
def test_empty_arrays(sizes):
    ours = run(replace(Case(), **sizes))
    assert (ours.pop("lse") == -jnp.inf).all()
    assert all((array == 0).all() for array in ours.values())


def test_rows_without_a_key_are_exactly_zero():
    case = Case(q_len=70, kv_len=33)
    ours = run(case)
    blind = slice(0, case.q_len - case.kv_len)
    assert (ours["out"][:, blind] == 0).all()
    assert (ours["dq"][:, blind] == 0).all()
    assert (ours["lse"][..., blind] == -jnp.inf).all()


def test_large_scores():
    """The weights of scores in the thousands neither overflow nor leave the padding's mark."""
    for causal in (True, False):
        ours = run(Case(scale=500.0, causal=causal, q_len=50, kv_len=70))
        assert all(jnp.isfinite(array).all() for array in ours.values())


@pytest.mark.parametrize("tiles", [(8, 40), (64, 8), pytest.param((512, 512), marks=pytest.mark.sweep)])
def test_tiles_change_nothing(tiles):
    tiles = AttentionTiles(*tiles)
    check(Case(q_len=70, kv_len=90), AttentionConfig(tiles, tiles, tiles))


@pytest.mark.parametrize(
    "case",
    swept(
        [
            Case(q_len=128, kv_len=192),
            Case(q_len=192, kv_len=256, window_left=127),
            Case(q_len=128, kv_len=128, dtype="bfloat16"),
            Case(q_len=100, kv_len=100, kv_heads=1),
            Case(q_len=192, kv_len=64),
            Case(q_len=256, kv_len=256, window_left=63),
            Case(q_len=256, kv_len=128, window_left=127),
        ],
        lambda case: case.q_len != 128 or case.kv_len == 64,
    ),
    ids=["more keys", "window", "bfloat16", "padded", "rows without a key", "window of a tile", "window without a key"],
)
def test_a_diagonal_from_corner_to_corner(case, monkeypatch):
    """Square tiles of which a strip of queries sees the first keys only, or the last: the others are not computed."""
    monkeypatch.setattr(pallas_forward, "stretch_room", lambda other_bytes, target: 2**20)  # all keys in one stretch
    tiles = AttentionTiles(64, 64)
    tiling = Tiling.choose(case.spec, tiles, INTERPRET, (case.q_len, case.kv_len), False)
    assert tiling.diagonal
    assert tiling.left_diagonal == (case.window_left is not None)
    check(case, AttentionConfig(tiles, tiles, tiles))


@pytest.mark.parametrize(
    "case",
    swept(
        [
            Case(q_len=200, kv_len=200, q_heads=4, window_left=31),
            Case(q_len=200, kv_len=264, q_heads=4, window_left=40, dtype="bfloat16"),
            Case(q_len=96, kv_len=128, kv_heads=1, window_left=0, batch=2),
            Case(q_len=300, kv_len=300, kv_heads=1, window_left=100),
            Case(q_len=130, kv_len=130, kv_heads=1, window_left=50, v_dim=24),
        ],
        lambda case: case.q_len in (96, 300),
    ),
    ids=["left diagonal", "more keys", "window of one", "several tiles", "padded"],
)
def test_queries_that_follow_keys(case, monkeypatch):
    """Where a window is short, a tile of keys holds those queries only that see it, and dq is written on the way."""
    monkeypatch.setattr(pallas_backward, "stretch_room", lambda other_bytes, target: 2**20)
    tiles = AttentionTiles(32, 32)
    assert follows(case, tiles)
    check(case, AttentionConfig(tiles, tiles, tiles))


def test_queries_without_a_key_follow_none(monkeypatch):
    """They would never be written."""
    monkeypatch.setattr(pallas_backward, "stretch_room", lambda other_bytes, target: 2**20)
    case = Case(q_len=264, kv_len=200, q_heads=4, window_left=31)
    tiles = AttentionTiles(32, 32)
    assert not follows(case, tiles)
    check(case, AttentionConfig(tiles, tiles, tiles))


def follows(case: Case, tiles: AttentionTiles) -> bool:
    """Whether the backward holds those queries alone that see a tile of keys."""
    tiling = Tiling.choose(case.spec, tiles, INTERPRET, (case.q_len, case.kv_len), False)
    arrays = AttentionInputs(*(case.arrays[name] for name in ("q", "k", "v")))
    return pallas_backward.held(tiling, arrays, 0, INTERPRET)[0].follows


@pytest.mark.parametrize("left", [0, 1, 127, 128, 1023, 5000])
def test_tiles_of_every_window(left):
    """Tiles are squares no larger than what a window reaches, or than 512, in the forward and in the backward."""
    spec = Case(window_left=left, dtype="bfloat16").spec
    for name in ("v5e", "v5p", "v6e", "v7x"):
        config = choose_config(spec, get_target(name))
        assert config.dkv.block_q == config.dkv.block_kv == min(1024, max(512, 1 << (left + 1).bit_length() - 1))
        assert config.forward == config.dkv


def test_two_runs_are_bit_equal():
    first, second = run(CASES["grouped heads"]), run(CASES["grouped heads"])
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_under_vmap():
    case = Case(batch=3, q_len=40, kv_len=70, q_heads=4)
    one = jax.vmap(lambda arrays: forward_and_backward(case, jax.tree.map(lambda x: x[None], arrays)))
    hold(case, {name: array[:, 0] for name, array in compiled(one, case.arrays).items()})


@pytest.mark.sweep
def test_races_and_reads_before_writes():
    """The strict interpreter, which simulates a chip's memories, copies and two cores, finds no race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    case = Case(q_len=40, kv_len=65, q_heads=4)
    spec, inputs = case.spec, tuple(case.arrays[name] for name in ("q", "k", "v"))
    config = choose_config(spec, INTERPRET)
    with interpreter(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        outputs = jax.block_until_ready(kernels.forward(spec, config, INTERPRET, *inputs))
        assert not interpret_pallas_call.races.races_found
        cotangents = case.arrays["dout"], case.arrays["dlse"]
        gradients = jax.block_until_ready(kernels.backward(spec, config, INTERPRET, inputs, outputs, cotangents))
        assert not interpret_pallas_call.races.races_found
    hold(case, dict(zip(NAMES, (*outputs, *gradients[:3]), strict=True)))


@pytest.mark.parametrize("name", TPUS)
def test_lowers_and_exports_for_every_chip(name):
    """Tracing and lowering ask nothing of the machine they run on; the compiler itself is for the compile checks."""
    case = Case(q_len=1000, kv_len=700, head_dim=96, v_dim=40, q_heads=4, dtype="bfloat16")
    target = get_target(name)
    config = choose_config(case.spec, target)

    def step(arrays: dict[str, jax.Array]) -> Any:
        inputs = arrays["q"], arrays["k"], arrays["v"]
        outputs = kernels.forward(case.spec, config, target, *inputs)
        return kernels.backward(case.spec, config, target, inputs, outputs, (arrays["dout"], None))[:3]

    exported = jax.export.export(jax.jit(step), platforms=("tpu",))(case.arrays)
    assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 2


def test_supports():
    for name in TPUS:
        target = get_target(name)
        assert kernels.supports(Case(dtype="bfloat16").spec, target, True) == ()
        (reason,) = kernels.supports(Case(dtype="float16").spec, target, True)
        assert "cast to bfloat16" in reason
    assert kernels.supports(Case(dtype="float16").spec, INTERPRET, True) == ()
    assert "triton" in kernels.supports(Case().spec, get_target("sm_90"), False)[0]
    assert "float64" in kernels.supports(Case(dtype="float64").spec, INTERPRET, False)[0]
    assert "v_dim: got 600" in kernels.supports(Case(v_dim=600).spec, INTERPRET, False)[0]
    assert kernels.supports(Case(head_dim=576, v_dim=512).spec, INTERPRET, True) == ()


def test_blocks_and_stretches():
    chip = get_target("v5e")
    assert fit_block("block_kv", 1024, 1100, chip) == 640  # two tiles and 180 rows of padding, not 948
    assert fit_block("block_kv", 1024, 1, chip) == 128
    with pytest.raises(ValueError, match="block_q: got 100; it must be a positive multiple of 128"):
        fit_block("block_q", 100, 1000, chip)
    length, count = stretch(2**20, 1024, 1024, stretch_room(2**20, chip))
    assert count > 1
    assert length % 1024 == 0
    assert length * count >= 2**20
