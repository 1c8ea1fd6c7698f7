"""Standings: the contests name what there is, peers do the same work as we, and the tables are what the results say."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import crosstile
from crosstile.bench import standings as module
from crosstile.bench import standings_table
from crosstile.bench.attention_shapes import AttentionShape
from crosstile.bench.cli import app
from crosstile.bench.contests import CHIPS, CONTESTS, GRIDS, LADDERS, OURS, Contest, get_contest, grid, ladders
from crosstile.bench.cores import CORES
from crosstile.bench.cycles import CyclesError, Prediction, predict_child
from crosstile.bench.grouped_shapes import GroupedShape
from crosstile.bench.matmul_shapes import MatmulShape
from crosstile.bench.paged_shapes import PagedAttentionShape
from crosstile.bench.peers import peers
from crosstile.bench.programs import Job, chosen_tiles, directions
from crosstile.bench.shapes import get_shape
from crosstile.bench.standings import CHOSEN, Entry, merged, read_csv, run, standings, write_csv
from crosstile.kernels.tiles.tuned import changed_tiles

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "tpu_standings.csv", DOCS / "tpu_standings.md"


def entry(chip, contest, contestant, microseconds, refusal=""):
    return Entry(chip, contest, contestant, microseconds, 0.9 * microseconds, 0.5, "block_q 512", 3, refusal)


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.name)
def test_a_contest_names_what_there_is(contest):
    shape = get_shape(contest.shape)
    assert contest.direction in directions(shape)
    for peer in contest.peers:
        assert peer in peers()
        assert grid(contest, peer)
        assert all(set(tiles) <= set().union(*GRIDS[peer, contest.direction]) for tiles in grid(contest, peer))


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.name)
def test_the_ladders_of_ours_are_fields_of_its_tiles(contest):
    shape = get_shape(contest.shape)
    for chip in CHIPS:
        config = chosen_tiles(Job(chip, shape.op, contest.direction, contest.shape, "bfloat16"))
        changed_tiles(config, {name: steps[0] for name, steps in ladders(contest, shape.op, None).items()})


def test_names_are_unique_and_an_unknown_one_is_refused():
    names = [contest.name for contest in CONTESTS]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match=r"got 'none'; it must be one of llama-3-8b, "):
        get_contest("none")
    assert set(CHIPS) <= set(CORES)


def test_no_tile_is_longer_than_the_sequence():
    short = Contest("llama-3-8b-lengths", "forward", ("splash",))
    assert max(tiles["block_q"] for tiles in grid(short, "splash")) == 2048
    assert max(ladders(short, "attention", None)["forward.block_q"]) == 2048


def small_attention(**options):
    return AttentionShape("small", q_heads=2, kv_heads=1, head_dim=128, q_len=256, kv_len=256, **options)


SMALL = {"block_m": 128, "block_n": 128, "block_k": 128}
PEER_CALLS = {
    "splash": ("splash", small_attention(), {"block_q": 128, "block_kv": 128}),
    "splash-window": ("splash", small_attention(window=99), {"block_q": 128, "block_kv": 128, "seq_minor": 3}),
    "splash-varlen": ("splash", small_attention(packed=2), {"block_q": 128, "block_kv": 128}),
    "flash": ("flash", small_attention(), {}),
    "flash-varlen": ("flash", small_attention(packed=2), {}),
    "pallas matmul": ("pallas matmul", MatmulShape("small", 256, 128, 256), SMALL),
    "XLA": ("XLA", MatmulShape("small", 256, 128, 256), {}),
    "megablox": ("megablox", GroupedShape("small", 256, 3, 128, 128), SMALL),
    "ragged paged attention": (
        "ragged paged attention",
        PagedAttentionShape("small", q_heads=8, kv_heads=4, head_dim=128, page_size=16, kv_len=64, batch=2),
        {"tokens": 32, "queries": 8},
    ),
    "paged attention": (
        "paged attention",
        PagedAttentionShape("small", q_heads=8, kv_heads=4, head_dim=128, page_size=16, kv_len=64, batch=2),
        {"tokens": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PEER_CALLS)
def test_a_peer_does_the_same_work_as_we(name, monkeypatch):
    """Interpreted on this CPU, from the same numbers in its own layout.

    jax cannot interpret ragged paged attention; the definition beside the kernel takes the same arguments.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

    def defined(*, num_kv_pages_per_block, num_queries_per_block, **arrays):
        return ragged.ref_ragged_paged_attention(arrays.pop("q"), **arrays)

    monkeypatch.setattr(ragged, "ragged_paged_attention", defined)
    peer, shape, tiles = PEER_CALLS[name]
    call = peers()[peer](shape, "float32", tiles)
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(size, np.float32) * np.float32(0.3)
        for name, (size, kind) in shape.arrays("float32").items()
        if kind == "float32"
    }
    arrays |= {name: np.asarray(value, np.int32) for name, value in shape.integers().items()}
    options = {} if shape.op in ("matmul", "grouped_matmul") else {"scale": 1.0}
    expected = np.asarray(getattr(crosstile, shape.function)(**shape.call(arrays), **options), np.float64)
    given = {key: jnp.asarray(layout_of(peer, key, arrays, call)) for key in call.floats}
    assert {key: array.shape for key, array in given.items()} == {key: a.shape for key, a in call.floats.items()}
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
        found = np.asarray(call.function(given, {key: jnp.asarray(value) for key, value in call.integers.items()}))
    if shape.op == "attention":
        found = found.reshape(shape.q_heads, shape.q_len, -1).swapaxes(0, 1)
    error = 1e-2 if peer == "paged attention" else 2e-5  # that one rounds to bfloat16
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=error * np.abs(expected).max())


def layout_of(peer, key, arrays, call):
    """What the peer takes, of our arrays."""
    if key == "kv_pages":
        k, v = arrays["k_pages"], arrays["v_pages"]
        return np.stack((k, v), 3).reshape(*k.shape[:2], -1, k.shape[-1])
    if key in ("k_pages", "v_pages"):
        return np.moveaxis(arrays[key], 2, 0)
    if peer not in ("flash", "splash"):
        return arrays[key]
    array = arrays[key].reshape(-1, *arrays[key].shape[-2:]).swapaxes(0, 1)  # [heads, length, width]
    if peer == "flash":
        return np.repeat(array, arrays["q"].shape[-2] // len(array), 0)[None]
    return array if call.floats[key].shape == array.shape and array.shape[1] != array.shape[2] else array.swapaxes(1, 2)


def prediction(microseconds, kernel=True, spills=0.0):
    cycles = (microseconds - 1) * CORES["v5e"].clock / 1e6  # and 1 µs between programs
    return Prediction("it", "v5e", kernel, cycles, 0.0, 0.0, {"spills": spills * cycles}, {}, 0, 0.0, 0)


def test_every_contestant_is_searched_from_its_grid_along_its_ladders(monkeypatch, tmp_path):
    tried = []

    def peer_time(child, asked, chip, python):
        tiles = asked["tiles"]
        tried.append(tiles)
        if tiles["block_k"] > tiles["block_k_major"]:
            raise CyclesError("too large")
        return [prediction(1000 + abs(tiles["block_q"] - 2048) / 16), prediction(11, kernel=False)]

    def own_time(job, tiles):
        size = tiles.get("forward.block_q", 512)
        return [prediction(900 - size / 10, spills=float(size > 1024))]

    monkeypatch.setenv("CROSSTILE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "predict_child", peer_time)
    monkeypatch.setattr(module, "predict", own_time)
    contest = Contest("llama-3-8b", "forward", ("flash", "tokamax splash"))
    found = {entry.contestant: entry for entry in run(["v5e"], [contest])}
    assert list(found) == [CHOSEN, OURS, "flash"]  # tokamax only where its interpreter is named
    assert found["flash"].tiles.startswith("block_q 2048 ")  # which is on no row of the grid
    assert found["flash"].microseconds == pytest.approx(1011)
    assert found["flash"].kernels == pytest.approx(999)
    assert found[OURS].tiles.startswith("forward.block_q 1024 ")  # faster ones spill
    count = len(tried)
    assert [entry.contestant for entry in run(["v5e"], [contest], ["flash"])] == ["flash"]
    assert len(tried) == count + 1  # all known but for what the best is made of


def test_refusals_are_kept_as_such(monkeypatch, tmp_path):
    def refuse(*_):
        raise CyclesError("RESOURCE_EXHAUSTED:\n  too much")

    monkeypatch.setenv("CROSSTILE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "predict_child", refuse)
    [found] = run(["v5e"], [Contest("square-4096", "forward", ("XLA",))], ["XLA"])
    assert found.refusal == "RESOURCE_EXHAUSTED: too much"
    assert not standings([found, entry("v5e", "square-4096", OURS, 800.0)])


def test_what_no_chip_could_do_is_no_result(monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSTILE_CACHE", str(tmp_path))
    for microseconds, refusal in ((705, ""), (650, "the model does not follow its loops")):  # v5e's limit is 697
        monkeypatch.setattr(module, "predict_child", lambda *_, time=microseconds: [prediction(time)])
        [found] = run(["v5e"], [Contest("square-4096", "forward", ("XLA",))], ["XLA"])
        assert refusal in found.refusal
        assert bool(found.refusal) == bool(refusal)


def test_a_standing_is_ours_at_its_best_against_the_best_peer():
    entries = [
        entry("v5e", "llama-3-8b", CHOSEN, 900.0),
        entry("v5e", "llama-3-8b", OURS, 800.0),
        entry("v5e", "llama-3-8b", "splash", 1000.0),
        entry("v5e", "llama-3-8b", "flash", 0.0, "refused"),
        entry("v6e", "llama-3-8b", OURS, 500.0),
        entry("v6e", "llama-3-8b", "splash", 400.0),
        entry("v6e", "square-4096", OURS, 1.0),
    ]
    first, second = standings(entries)
    assert (first.ours.contestant, first.chosen.microseconds, first.peer.contestant) == (OURS, 900.0, "splash")
    assert first.ratio == first.kernel_ratio == 0.8
    assert second.ratio == 1.25
    said = standings_table.markdown(entries)
    row = "| llama-3-8b | 500 (450) | 50 % | ? | splash | 400 (360) | block_q 512 (3 tried) | **1.25** | 1.25 |"
    assert row in said
    assert "* flash: llama-3-8b on v6e\n" in said
    assert "* v7x: llama-3-8b, llama-3-8b-backward, " in said
    assert said.startswith("Of 2 contests 1 are lost: a peer is faster. The worst is llama-3-8b on v6e, where ours ")


def test_new_results_take_the_place_of_old_ones_and_survive_the_file(tmp_path):
    old = [entry("v6e", "llama-3-8b", OURS, 2.0), entry("v5e", "square-4096", "XLA", 3.0)]
    new = [entry("v5e", "square-4096", "XLA", 4.0), entry("v6e", "llama-3-8b", CHOSEN, 0.0, 'refused, "so"')]
    both = merged(old, new)
    assert both == [new[1], old[0], new[0]]
    write_csv(both, tmp_path / "it.csv")
    assert read_csv(tmp_path / "it.csv") == both
    assert read_csv(tmp_path / "none.csv") == []


def test_the_published_results_are_of_contests_that_there_are():
    entries = read_csv(RESULTS)
    assert entries == merged(entries, ())  # in order, each once
    for found in entries:
        assert found.chip in CHIPS
        assert found.contestant in (CHOSEN, OURS, *get_contest(found.contest).peers)
        assert found.refusal or 0 < found.kernels <= found.microseconds
        assert found.refusal or 0 < found.share < 1.05  # no faster than the chip


def test_the_page_shows_the_published_results(tmp_path):
    assert standings_table.table_of(PAGE) == standings_table.markdown(read_csv(RESULTS))
    copy = tmp_path / "page.md"
    copy.write_text("a\n" + standings_table.BEGIN + "\nold\n" + standings_table.END + "\nb\n")
    standings_table.write_page(read_csv(RESULTS), copy)
    assert standings_table.table_of(copy) == standings_table.table_of(PAGE)
    assert copy.read_text().startswith("a\n")
    assert copy.read_text().endswith("\nb\n")
    copy.write_text("none")
    with pytest.raises(ValueError, match="has no place for the tables"):
        standings_table.write_page([], copy)


def test_the_command_shows_the_results_and_says_where_there_are_none(tmp_path):
    file = tmp_path / "it.csv"
    missing = CliRunner().invoke(app, ["standings", "--csv", str(file)])
    assert missing.exit_code == 2
    assert "no results in" in missing.output
    write_csv([entry("v5e", "llama-3-8b", OURS, 500.0), entry("v5e", "llama-3-8b", "splash", 400.0)], file)
    result = CliRunner().invoke(app, ["standings", "--csv", str(file), "--json", str(tmp_path / "it.json")])
    assert result.exit_code == 0, result.output
    assert "1 are lost" in result.output
    assert '"contestant": "splash"' in (tmp_path / "it.json").read_text()
    assert CliRunner().invoke(app, ["standings", "--contest", "none"]).exit_code == 2


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler")
def test_a_kernel_without_a_name_is_steered():
    """megablox gives its kernel no name, and prefetches which group each of its steps is of."""
    shape = get_shape("qwen3-30b-a3b-decode-down")
    asked = {
        "peer": "megablox", "shape": shape.name, "dtype": "bfloat16", "direction": "forward", "target": "v5e",
        "tiles": {"block_m": 64, "block_n": 2048, "block_k": 768},
    }  # fmt: skip
    [kernel] = [prediction for prediction in predict_child("peer_dumping", asked, "v5e") if prediction.kernel]
    used = np.count_nonzero(shape.integers()["group_sizes"])
    assert kernel.unknown == 0
    assert used * shape.k * shape.n * 2 < kernel.bytes_moved < 1.1 * used * shape.k * shape.n * 2


def test_every_grid_belongs_to_a_peer_and_every_ladder_to_one_of_its_fields():
    for (name, direction), tiles in GRIDS.items():
        assert name in peers()
        fields = set().union(*tiles)
        assert set(LADDERS.get((name, direction), {})) <= fields
