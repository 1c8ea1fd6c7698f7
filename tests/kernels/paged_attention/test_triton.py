"""The Triton kernels, interpreted, against torch on the same keys in one dense array, in float64.

Tolerance: an error at most twice that of torch's own op in the same precision, plus a floor in ulps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_within
from paged_problems import PROBLEMS, Problem, by_torch, inputs

pytest.importorskip("triton")

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan
from crosstile.kernels.paged_attention import triton as kernels
from crosstile.kernels.paged_attention.spec import INPUTS, PagedAttentionSpec
from crosstile.kernels.paged_attention.tiles import (
    PagedAttentionConfig,
    PagedAttentionTiles,
    choose_config,
    split_count,
)
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.kernels.tiles.launch import Array, Plan, contiguous
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target
from crosstile.kernels.tiles.triton_interpreter import run

GPUS = [name for name, target in TARGETS.items() if target.is_gpu]


def describe(array: np.ndarray | None) -> Array | None:
    if array is None:
        return None
    return Array(array.shape, array.dtype.name, tuple(stride // array.itemsize for stride in array.strides))


def plan_of(problem: Problem, arrays: dict, config: PagedAttentionConfig | None = None) -> Plan:
    return kernels.forward(
        problem.spec, config or choose_config(problem.spec, INTERPRET), *map(describe, inputs(arrays))
    )


def forward(problem: Problem, arrays: dict, config: PagedAttentionConfig | None = None) -> dict[str, np.ndarray]:
    present = {name: array for name, array in arrays.items() if array is not None}
    return dict(zip(("out", "lse"), run(plan_of(problem, arrays, config), present), strict=True))


def check(problem: Problem, config: PagedAttentionConfig | None = None) -> None:
    arrays = problem.arrays()
    found = forward(problem, arrays, config)
    assert found["out"].dtype == problem.dtype
    assert found["lse"].dtype == np.float32
    assert_within(found, by_torch(problem, arrays, problem.dtype), by_torch(problem, arrays, "float64"), problem.dtype)


def equal(found: dict, expected: dict) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_the_definition(name):
    check(PROBLEMS[name])


@pytest.mark.parametrize("name", ["decode", "softcap and sinks", "int8"])
def test_in_float16(name):
    check(replace(PROBLEMS[name], dtype="float16"))


@pytest.mark.parametrize("pages", [None, "float8_e4m3fn"])
def test_in_bfloat16(pages):
    check(replace(PROBLEMS["decode"], dtype="bfloat16", page_dtype=pages))


@settings(max_examples=8, deadline=None, derandomize=True)
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
        kv_heads=data.draw(st.integers(1, 2)),
        group=data.draw(st.integers(1, 5)),
        head_dim=data.draw(st.integers(1, 40)),
        v_dim=data.draw(st.integers(1, 40)),
        causal=data.draw(st.booleans()),
        window_left=data.draw(st.none() | st.integers(0, 50)),
        sinks=data.draw(st.booleans()),
        page_dtype=data.draw(st.sampled_from([None, "int8"])),
        seed=data.draw(st.integers(0, 9)),
    )
    check(problem, choose_config(problem.spec, INTERPRET) if data.draw(st.booleans()) else unsplit(16, 32))


def unsplit(block_rows: int, block_kv: int) -> PagedAttentionConfig:
    tiles = PagedAttentionTiles(block_rows, block_kv)
    return PagedAttentionConfig(tiles, tiles, programs=1)


@pytest.mark.parametrize("tiles", [(16, 16), (64, 64), (16, 128)])
def test_any_tiles(tiles):
    """Tiles of less than a page, of two pages, and of four, in one part or split."""
    problem = replace(PROBLEMS["window"], page_size=32, max_pages=4)
    check(problem, unsplit(*tiles))
    check(problem, replace(unsplit(*tiles), programs=64))


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_any_number_of_splits(programs):
    """More parts than a sequence has tiles, too: those see nothing."""
    problem = Problem(lengths=(1, 400, 0), kv_heads=1, q_len=2, max_pages=40, window_left=300, sinks=True)
    config = replace(unsplit(16, 16), programs=programs)
    splits = plan_of(problem, problem.arrays(), config).launches[0].grid[1]
    assert splits == {1: 1, 7: 3, 1000: 20}[programs]
    check(problem, config)


def test_the_number_of_splits():
    assert split_count(programs=64, tiles=128, wanted=264) == 5
    assert split_count(programs=264, tiles=128, wanted=264) == 1
    assert split_count(programs=1, tiles=10**6, wanted=264) == 128
    assert split_count(programs=1, tiles=8, wanted=264) == 4, "two tiles a part at least"
    assert split_count(programs=0, tiles=0, wanted=264) == 1


@pytest.mark.parametrize(
    "sizes", [{"lengths": ()}, {"max_pages": 0, "lengths": (5,)}, {"q_len": 0}, {"lengths": (0, 0)}]
)
def test_of_nothing(sizes):
    problem = Problem(**sizes)
    found = forward(problem, problem.arrays())
    assert (found["out"] == 0).all()
    assert (found["lse"] == -np.inf).all()


def test_two_runs_are_bit_equal():
    problem = PROBLEMS["decode"]
    equal(forward(problem, problem.arrays()), forward(problem, problem.arrays()))


def test_pages_in_another_order_give_the_same_bits():
    problem = PROBLEMS["decode"]
    arrays = problem.arrays()
    order = np.random.default_rng(1).permutation(len(arrays["k_pages"]))
    moved = {name: arrays[name][order] for name in ("k_pages", "v_pages")}
    table = arrays["page_table"].copy()
    valid = (table >= 0) & (table < len(order))
    table[valid] = np.argsort(order)[table[valid]]
    equal(forward(problem, {**arrays, **moved, "page_table": table}), forward(problem, arrays))


def test_pages_that_two_sequences_share():
    problem = Problem(lengths=(40, 40), q_len=2)
    arrays = problem.arrays()
    arrays["page_table"][1], arrays["q"][1] = arrays["page_table"][0], arrays["q"][0]
    out = forward(problem, arrays)["out"]
    np.testing.assert_array_equal(out[0], out[1])


def between_nans(array: np.ndarray) -> np.ndarray:
    """The same values as a view with garbage before, after and between the elements."""
    filler = np.nan if array.dtype.kind == "f" else 10**6 % 2 ** (8 * array.itemsize - 1)
    storage = np.full([2 * size + 3 for size in array.shape], filler, array.dtype)
    view = storage[tuple(slice(1, 2 * size + 1, 2) for size in array.shape)]
    view[...] = array
    return view


@pytest.mark.parametrize("layout", [between_nans, np.asfortranarray, lambda x: x[::-1].copy()[::-1]])
def test_any_strides(layout):
    problem = replace(PROBLEMS["softcap and sinks"], page_dtype="int8")
    arrays = problem.arrays()
    placed = {name: None if array is None else layout(array) for name, array in arrays.items()}
    equal(forward(problem, placed), forward(problem, arrays))


def test_wide_offsets_give_the_same_bits(monkeypatch):
    problem = PROBLEMS["decode"]
    arrays = problem.arrays()
    narrow = forward(problem, arrays)
    monkeypatch.setattr(kernels, "needs_wide_offsets", lambda tiles: True)
    equal(forward(problem, arrays), narrow)


def test_pages_past_2_to_the_31_elements(tmp_path):
    """Pages 2**30 elements apart, in a sparse file."""
    problem = Problem(lengths=(64,), kv_heads=1, dtype="float16")
    arrays = problem.arrays()
    pages = arrays["k_pages"]
    storage = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=(len(pages), 2**30))
    far = storage[:, : pages[0].size].reshape(len(pages), *pages.shape[1:])
    far[...] = pages
    assert describe(far).reach > 2**31
    equal(forward(problem, {**arrays, "k_pages": far}), forward(problem, arrays))


@pytest.mark.parametrize("size", [8, 48])
def test_refuses_tiles_that_no_dot_can_have(size):
    problem = PROBLEMS["chunk"]
    with pytest.raises(ValueError, match=rf"config\.decode\.block_rows: got {size}; it must be a power of two"):
        forward(problem, problem.arrays(), unsplit(size, 32))


def test_refuses_other_pages():
    problem = Problem(page_size=8, max_pages=4, lengths=(5,))
    with pytest.raises(ValueError, match="k_pages: page_size is 8; it must be one of 16, 32, 64, 128, 256"):
        forward(problem, problem.arrays())


# ---- What is compiled, and what is refused


def test_neither_lengths_nor_numbers_of_pages_recompile():
    def compiled(problem: Problem) -> list[tuple]:
        plan = plan_of(problem, problem.arrays(), choose_config(problem.spec, get_target("sm_90")))
        kinds = [
            {name: type(value) for name, value in launch.numbers.items() if not name.endswith(("_batch", "_page"))}
            for launch in plan.launches
        ]
        return [
            (launch.kernel, dict(launch.constants), kind) for launch, kind in zip(plan.launches, kinds, strict=True)
        ]

    few = Problem(lengths=(5, 17), max_pages=60)
    assert compiled(few) == compiled(replace(few, lengths=(900, 64), max_pages=120))
    numbers = {"q_len", "max_keys", "splits", "window_left"}
    assert numbers <= {p.name for p in kernels._attend_kernel.params if p.do_not_specialize}


@pytest.mark.parametrize("target", GPUS)
def test_compiles_for_every_chip(target):
    """A step of decoding, within the chip's budget; what every feature compiles to is for the compile check."""
    spec = PagedAttentionSpec("bfloat16", "bfloat16", 64, 64)
    pages = contiguous((1024, 16, 8, 64), "bfloat16")
    arrays = {"q": contiguous((8, 1, 32, 64), "bfloat16"), "k_pages": pages, "v_pages": pages}
    arrays |= {"page_table": contiguous((8, 64), "int32"), "lengths": contiguous((8,), "int32")}
    plan = kernels.forward(spec, choose_config(spec, get_target(target)), *map(arrays.get, INPUTS))
    attend = replace(plan, launches=plan.launches[:1])
    [facts] = compile_plan(attend, target)
    assert over_budget(facts, target) == ()
    assert facts.matrix


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtypes", [("float16", "int8"), ("bfloat16", "bfloat16"), ("float32", "int8")])
def test_supports_gpus(target, dtypes):
    assert kernels.supports(PagedAttentionSpec(*dtypes, 256, 80), get_target(target), needs_grad=False) == ()


@pytest.mark.parametrize(
    ("dtypes", "sizes", "target", "reason"),
    [
        (("float64", "float64"), (64, 64), "interpret", "q is float64; cast it"),
        (("float16", "float8_e4m3fn"), (64, 64), "sm_80", "read by sm_90, sm_100, gfx950, interpret, and the target"),
        (("float16", "float8_e4m3fn"), (64, 64), "gfx942", "use int8 pages there"),
        (("float16", "float16"), (257, 64), "sm_90", "head_dim is 257, and it must be 1 to 256"),
        (("float16", "float16"), (64, 64), "v6e", "the target is v6e; use implementation='pallas'"),
    ],
)
def test_reasons_why_not(dtypes, sizes, target, reason):
    [found] = kernels.supports(PagedAttentionSpec(*dtypes, *sizes), get_target(target), needs_grad=False)
    assert reason in found
    assert found.endswith(".")


def test_float8_where_a_chip_has_it():
    for target in ("sm_90", "sm_100", "gfx950"):
        spec = PagedAttentionSpec("bfloat16", "float8_e4m3fn", 128, 128)
        assert kernels.supports(spec, get_target(target), needs_grad=False) == ()


def test_there_is_no_gradient():
    [reason] = kernels.supports(Problem().spec, INTERPRET, needs_grad=True)
    assert reason.startswith("Paged attention is for inference")
    with pytest.raises(UnsupportedError, match="has no backward"):
        kernels.backward(Problem().spec)
