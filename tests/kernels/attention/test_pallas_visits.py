"""Packed sequences where they lie, in Pallas, interpreted in float32 against the definition in float64.

Tolerance: an error at most twice that of the definition itself computed in float32, plus a floor in ulps. Tiles are of
32 tokens, which is what a sequence's first token is aligned to here; on a chip it is 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within, rounded

import crosstile
from crosstile.kernels.attention.pallas_visits import can_visit
from crosstile.kernels.attention.spec import AttentionInputs, AttentionSpec
from crosstile.kernels.attention.tiles import choose_config
from crosstile.kernels.tiles.expressions import SCORE, const, plane
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET

UNEVEN = (40, 70, 3, 0, 100, 64)
OTHER_KEYS = (50, 20, 0, 9, 130, 70)
CASES: dict[str, tuple[Sequence[int], Sequence[int] | None, dict[str, Any]]] = {
    "causal": (UNEVEN, None, {"causal": True}),
    "aligned": ((64, 64, 32), None, {"causal": True}),
    "several in a row of lanes": ((5, 6, 1, 1, 0, 7, 40, 2), None, {"causal": True}),
    "other keys": (UNEVEN, OTHER_KEYS, {}),
    "other keys, causal": (UNEVEN, OTHER_KEYS, {"causal": True}),
    "window": (UNEVEN, None, {"window": (13, 4)}),
    "wide window, softcap": (UNEVEN, None, {"window": (45, 0), "softcap": 2.0}),
    "score of indices": (UNEVEN, OTHER_KEYS, {"score_mod": lambda s, b, h, i, j: s + 0.1 * (i - j) * (h + b)}),
    "sinks": (UNEVEN, OTHER_KEYS, {"causal": True, "sinks": np.array([0.5, -np.inf, 1.0, 0.0])}),
}


def arrays(lengths: Sequence[int], kv_lengths: Sequence[int] | None, unused: int = 9) -> dict[str, np.ndarray]:
    """Queries, keys and values with some tokens that no sequence has, which are NaN."""
    rng = np.random.default_rng(0)
    starts = [np.cumsum([0, *sizes]).astype(np.int32) for sizes in (lengths, kv_lengths or lengths)]
    found = {"q": (4, 24, 0), "k": (2, 24, 1), "v": (2, 20, 1)}
    result = {}
    for name, (heads, dim, side) in found.items():
        result[name] = rounded(rng.standard_normal((starts[side][-1] + unused, heads, dim)), "float32")
        result[name][starts[side][-1] :] = np.nan
    return {**result, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}


def ours(given: dict[str, np.ndarray], same_tokens: bool, **options: Any) -> tuple[jax.Array, jax.Array]:
    named = {
        name: jnp.asarray(array, jnp.float32 if array.dtype == np.float64 else None) for name, array in given.items()
    }
    if same_tokens:
        named["cu_seqlens_k"] = named["cu_seqlens_q"]
    return crosstile.varlen_attention(**named, **bounds(given), **options, return_lse=True, implementation="pallas")


def bounds(given: dict[str, np.ndarray]) -> dict[str, int]:
    return {f"max_seqlen_{side}": int(np.diff(given[f"cu_seqlens_{side}"]).max()) for side in "qk"}


def definition(given: dict[str, np.ndarray], dtype: str, **options: Any) -> dict[str, np.ndarray]:
    typed = {name: array.astype(dtype) if array.dtype == np.float64 else array for name, array in given.items()}
    results = crosstile.varlen_attention(**typed, **bounds(given), **options, return_lse=True)
    return dict(zip(("out", "lse"), results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name):
    lengths, kv_lengths, options = CASES[name]
    given = arrays(lengths, kv_lengths)
    in_jax = options | ({"sinks": jnp.asarray(options["sinks"], jnp.float32)} if "sinks" in options else {})
    out, lse = ours(given, kv_lengths is None, **in_jax)
    exact = definition(given, "float64", **options)
    assert_within({"out": out, "lse": lse}, definition(given, "float32", **options), exact, "float32")


def test_several_stretches_of_keys():
    """Of heads so wide that the memory holds 64 keys at a time."""
    rng = np.random.default_rng(0)
    given = arrays((200, 3, 150), None)
    for name in "qkv":
        given[name] = rounded(rng.standard_normal((*given[name].shape[:2], 128)), "float32")
    out, lse = ours(given, True, causal=True)
    exact = definition(given, "float64", causal=True)
    assert_within({"out": out, "lse": lse}, definition(given, "float32", causal=True), exact, "float32")


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"window": (10, 3)}], ids=str)
def test_nothing_of_the_neighbours_comes_in(options):
    """NaN in all of one sequence changes no bit of the others."""
    given = arrays(UNEVEN, None)
    first, end = 40, 110
    spoilt = dict(given)
    for name in "qkv":
        spoilt[name] = given[name].copy()
        spoilt[name][first:end] = np.nan
    sound, found = ours(given, True, **options), ours(spoilt, True, **options)
    others = np.r_[0:first, end : len(given["q"])]
    np.testing.assert_array_equal(found[0][others], sound[0][others])
    np.testing.assert_array_equal(found[1][:, others], sound[1][:, others])
    assert np.isnan(found[0][first:end]).any()


def test_copies_do_not_race():
    """The order of the copies is simulated, with two cores that share the heads."""
    given = arrays(UNEVEN, None)
    with interpreter(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        out, lse = jax.block_until_ready(ours(given, True, causal=True))
    assert not interpret_pallas_call.races.races_found
    exact = definition(given, "float64", causal=True)
    assert_within({"out": out, "lse": lse}, definition(given, "float32", causal=True), exact, "float32")


def test_one_compilation_serves_all_lengths():
    given = arrays(UNEVEN, None, unused=0)
    limits = {"max_seqlen_q": 120, "max_seqlen_k": 120, "causal": True}
    call = jax.jit(
        lambda q, k, v, starts: crosstile.varlen_attention(q, k, v, starts, starts, **limits, implementation="pallas")
    )
    typed = [given[name].astype("float32") for name in "qkv"]
    for lengths in (UNEVEN, (1, 1, 1, 1, 1, 120), (0,) * 6):
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        found = call(*typed, starts)
        exact, peer = (
            crosstile.varlen_attention(*(array.astype(dtype) for array in typed), starts, starts, **limits)
            for dtype in ("float64", "float32")
        )
        assert_within({"out": found}, {"out": peer}, {"out": exact}, "float32")
    assert call._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "visits"),
    [
        ({}, True),
        ({"score": ("mul", SCORE, const(2.0))}, True),
        ({"score": ("add", SCORE, plane(0))}, False),
        ({"dropout": 0.5}, False),
        ({"max_seqlen_q": 4}, False),
    ],
    ids=str,
)
def test_what_is_visited(options, visits):
    """Planes and dropout count from each sequence's first token, which no tile begins with; few queries are decoded."""
    spec = AttentionSpec("float32", 16, 16, **{"max_seqlen_q": 99, "max_seqlen_k": 99, **options})
    shapes = [jax.ShapeDtypeStruct((1, 200, heads, 16), jnp.float32) for heads in (4, 2, 2)]
    starts = jax.ShapeDtypeStruct((4,), jnp.int32)
    inputs = AttentionInputs(*shapes, cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert can_visit(spec, choose_config(spec, INTERPRET), inputs) is visits
