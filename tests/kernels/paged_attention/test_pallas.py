"""The Pallas kernels, interpreted, against torch on the same keys in one dense array, in float64.

Tolerance: an error at most twice that of torch's own op in the same precision, plus a floor in ulps. The interpreter
fills scratch and outputs with NaN before they are written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_within
from paged_problems import PROBLEMS, Problem, by_torch, inputs
from sweeps import one_in

from crosstile.kernels.paged_attention import pallas as kernels
from crosstile.kernels.paged_attention.pallas_tiling import Tiling
from crosstile.kernels.paged_attention.spec import PagedAttentionInputs, PagedAttentionSpec
from crosstile.kernels.paged_attention.tiles import PagedAttentionConfig, PagedAttentionTiles, choose_config
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.kernels.tiles.pallas_tiles import interpreter
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

TPUS = [name for name, target in TARGETS.items() if target.is_tpu]
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def to_jax(arrays: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(None if array is None else jnp.asarray(array) for array in inputs(arrays))


def forward(problem: Problem, arrays: dict[str, Any], config: PagedAttentionConfig | None = None) -> dict[str, Any]:
    config = config or choose_config(problem.spec, INTERPRET)
    run = jax.jit(lambda *arrays: kernels.forward(problem.spec, config, INTERPRET, *arrays))
    placed = to_jax(arrays)
    return dict(zip(("out", "lse"), run.lower(*placed).compile(compiler_options=FAST)(*placed), strict=True))


def check(problem: Problem, config: PagedAttentionConfig | None = None) -> None:
    hold(problem, forward(problem, problem.arrays(), config))


def hold(problem: Problem, found: dict[str, Any]) -> None:
    assert found["out"].dtype == problem.dtype
    assert found["lse"].dtype == jnp.float32
    arrays = problem.arrays()
    exact, own = (by_torch(problem, arrays, dtype) for dtype in ("float64", problem.dtype))
    assert_within(found, own, exact, problem.dtype)


def tiling_of(problem: Problem, target: str = "interpret") -> Tiling:
    chip = get_target(target)
    arrays = PagedAttentionInputs(*to_jax(problem.arrays()))
    return Tiling.choose(problem.spec, choose_config(problem.spec, chip), chip, arrays)


@pytest.mark.parametrize(
    "name",
    one_in(
        2,
        [
            "decode",
            "not causal",
            "chunk longer than the cache",
            "window",
            "softcap and sinks",
            "many heads of one",
            "lengths out of range",
        ],
    ),
)
def test_agrees_with_the_definition(name):
    check(PROBLEMS[name])


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("decode", ("bfloat16", None)),
        ("chunk", ("bfloat16", "float8_e4m3fn")),
        ("window, decode", ("float16", "int8")),
    ],
)
def test_narrow_dtypes(name, dtypes):
    check(replace(PROBLEMS[name], dtype=dtypes[0], page_dtype=dtypes[1]))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.data())
def test_any_sizes(data):
    batch, q_len = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 12))
    page_size, max_pages = data.draw(st.sampled_from([16, 32, 64])), data.draw(st.integers(1, 4))
    problem = Problem(
        lengths=data.draw(st.tuples(*[st.integers(0, page_size * max_pages)] * batch)),
        q_len=q_len,
        q_lengths=data.draw(st.none() | st.tuples(*[st.integers(0, q_len)] * batch)),
        page_size=page_size,
        max_pages=max_pages,
        kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 5)),
        head_dim=data.draw(st.integers(1, 40)),
        v_dim=data.draw(st.integers(1, 40)),
        causal=data.draw(st.booleans()),
        window_left=data.draw(st.none() | st.integers(0, 50)),
        sinks=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 9)),
    )
    check(problem)


def test_wide_heads_in_pieces_of_128_columns():
    problem = Problem(q_len=12, head_dim=130, v_dim=200, lengths=(40, 17))
    assert not tiling_of(problem).together
    check(problem)


def test_other_tiles():
    """Blocks of less than a page, and several tiles of queries."""
    config = PagedAttentionConfig(PagedAttentionTiles(1, 16), PagedAttentionTiles(8, 16))
    check(replace(PROBLEMS["window"], page_size=32, max_pages=4), config)


@pytest.mark.parametrize("max_pages", [5, 128])
def test_tables_in_one_row(max_pages, monkeypatch):
    """A large table of rows that would have to be filled up; whole rows stay as they are."""
    monkeypatch.setattr(kernels, "_FILLED_UP", 0)
    check(replace(PROBLEMS["decode"], max_pages=max_pages))


def test_numbers_past_the_pages_are_the_nearest():
    """No copy comes from outside of an array, whatever the table says: this interpreter tests it, chips do not."""
    problem = Problem(lengths=(9, 7), kv_heads=1)
    arrays = {name: np.nan_to_num(array) if "pages" in name else array for name, array in problem.arrays().items()}
    last = len(arrays["k_pages"]) - 1
    arrays["page_table"][:, 0] = 0, last
    outside = {**arrays, "page_table": arrays["page_table"].copy()}
    outside["page_table"][:, 0] = -3, last + 1000
    expected = forward(problem, arrays)
    with interpreter(pltpu.InterpretParams(out_of_bounds_reads="raise")):
        found = kernels.forward(problem.spec, choose_config(problem.spec, INTERPRET), INTERPRET, *to_jax(outside))
    for name, array in zip(("out", "lse"), found, strict=True):
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, err_msg=name)


def test_both_ways_are_taken():
    assert tiling_of(PROBLEMS["decode"]).together
    assert not tiling_of(PROBLEMS["chunk"]).together
    assert tiling_of(PROBLEMS["many heads of one"]).together, "of one head there is nothing to pick"


@pytest.mark.parametrize("sizes", [{"max_pages": 0, "lengths": (5,)}, {"q_len": 0}, {"lengths": (0, 0)}])
def test_of_nothing(sizes):
    problem = Problem(**sizes, sinks=True)
    arrays = problem.arrays()
    found = forward(problem, arrays)
    assert (found["out"] == 0).all()
    expected = np.broadcast_to(arrays["sinks"][..., None], found["lse"].shape)
    np.testing.assert_allclose(found["lse"], expected, rtol=1e-6)


@pytest.mark.parametrize("siblings", [0, 1])
def test_races_and_reads_before_copies_land(siblings):
    """The strict interpreter, which simulates a chip's memories and copies, finds no race, and no NaN comes through."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    problem = replace(PROBLEMS["chunk"], lengths=(50, 0, 70), group=2, window_left=40)
    config = choose_config(problem.spec, INTERPRET)
    with interpreter(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        target = replace(INTERPRET, siblings=siblings)
        found = kernels.forward(problem.spec, config, target, *to_jax(problem.arrays()))
        jax.block_until_ready(found)
        assert not interpret_pallas_call.races.races_found
    hold(problem, dict(zip(("out", "lse"), found, strict=True)))


def test_under_jit_lengths_do_not_recompile():
    problem = PROBLEMS["chunk"]
    config, traces = choose_config(problem.spec, INTERPRET), []

    @jax.jit
    def run(*arrays: Any) -> Any:
        traces.append(1)
        return kernels.forward(problem.spec, config, INTERPRET, *arrays)

    for lengths in ((50, 0, 128), (1, 99, 3)):
        other = replace(problem, lengths=lengths)
        arrays = other.arrays()
        pages = {name: np.resize(arrays[name], (32, *arrays[name].shape[1:])) for name in ("k_pages", "v_pages")}
        found = run(*to_jax({**arrays, **pages}))
        hold(other, dict(zip(("out", "lse"), found, strict=True)))
    assert len(traces) == 1


# ---- For chips


def shapes(q_len: int, page_dtype: str = "bfloat16", head_dim: int = 128) -> tuple[Any, ...]:
    """A call of Llama 3's sizes, as JAX's descriptions of arrays."""
    pages = jax.ShapeDtypeStruct((1024, 16, 8, head_dim), page_dtype)
    q = jax.ShapeDtypeStruct((8, q_len, 32, head_dim), "bfloat16")
    table, lengths = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((8, 64), (8,)))
    scales = None if page_dtype == "bfloat16" else jax.ShapeDtypeStruct((8,), "float32")
    return q, pages, pages, table, lengths, lengths, scales, scales, None


@pytest.mark.parametrize(("name", "q_len"), [("v4", 64), ("v5e", 1), ("v5p", 64), ("v6e", 1), ("v7x", 64)])
def test_lowers_and_exports_for_every_chip(name, q_len):
    target, spec = get_target(name), PagedAttentionSpec("bfloat16", "bfloat16", 128, 128, window_left=100)
    config = choose_config(spec, target)
    step = jax.jit(lambda *arrays: kernels.forward(spec, config, target, *arrays))
    exported = jax.export.export(step, platforms=("tpu",))(*shapes(q_len))
    assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 1


CHILD = """
import json, sys
import jax
from crosstile.bench.facts import over_budget
from crosstile.bench.tpu import compile_program
from crosstile.kernels.paged_attention import pallas
from crosstile.kernels.paged_attention.spec import PagedAttentionSpec
from crosstile.kernels.paged_attention.tiles import choose_config
from crosstile.kernels.tiles.targets import get_target

for name, q_len, dim in json.loads(sys.argv[1]):
    target, spec = get_target(name), PagedAttentionSpec("bfloat16", "bfloat16", dim, dim)
    def run(*arrays):
        return pallas.forward(spec, choose_config(spec, target), target, *arrays)
    pages = jax.ShapeDtypeStruct((1024, 16, 8, dim), "bfloat16")
    table, lengths = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((8, 64), (8,)))
    arrays = jax.ShapeDtypeStruct((8, q_len, 32, dim), "bfloat16"), pages, pages, table, lengths
    [facts] = compile_program(run, [*arrays, None, None, None, None], name, lambda kernel: "")
    print(json.dumps([name, q_len, dim, sum(facts.matrix.values()), over_budget(facts, name)]))
"""


def test_compiles_within_the_budget_of_every_chip(tmp_path: Path) -> None:
    """Decoding for all, a chunk for one: what every feature compiles to is for the compile check."""
    pytest.importorskip("libtpu")
    from crosstile.bench.tpu import environment

    jobs = [*((name, 1, 128) for name in TPUS), ("v6e", 64, 64)]
    environ = {**os.environ, **environment(tmp_path / "llo")}
    command = [sys.executable, "-c", CHILD, json.dumps(jobs)]
    child = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("[")]
    assert [tuple(answer[:3]) for answer in answers] == jobs
    for *job, products, reasons in answers:
        assert products > 0, job
        assert reasons == [], job


def test_supports():
    spec = PagedAttentionSpec("bfloat16", "bfloat16", 128, 128)
    for name in TPUS:
        for kind in ("bfloat16", "int8", "float8_e4m3fn"):
            assert kernels.supports(replace(spec, page_dtype=kind), get_target(name), False) == ()
        [reason] = kernels.supports(replace(spec, dtype="float16"), get_target(name), False)
        assert "cast to bfloat16" in reason
    assert kernels.supports(replace(spec, dtype="float16"), INTERPRET, False) == ()
    assert "triton" in kernels.supports(spec, get_target("sm_90"), False)[0]
    assert "float64" in kernels.supports(replace(spec, dtype="float64"), INTERPRET, False)[0]
    assert "v_dim: got 300" in kernels.supports(replace(spec, v_dim=300), INTERPRET, False)[0]


def test_there_is_no_gradient():
    [reason] = kernels.supports(Problem().spec, INTERPRET, True)
    assert "for inference" in reason
    with pytest.raises(UnsupportedError, match="has no backward"):
        kernels.backward(Problem().spec)


def test_blocks_fit_the_chip():
    """With heads of their own, a block of 512 keys does not fit v4; with many queries, nor do all their rows."""
    many = Problem(q_len=256, kv_heads=32, group=1, head_dim=128, v_dim=128, dtype="bfloat16", max_pages=64)
    large, small = tiling_of(many, "v5e"), tiling_of(many, "v4")
    assert (large.block_kv, large.queries) == (512, 256)
    assert small.block_kv < 512
    assert small.queries < 256
