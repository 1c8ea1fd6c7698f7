"""The search for tiles: what it tries, what it keeps, and what it does with refusals."""

import json
import subprocess
from math import inf
from pathlib import Path

import pytest

from crosstile.bench import issue_child, search
from crosstile.bench.cycles import CyclesError, Prediction
from crosstile.bench.programs import Job
from crosstile.bench.search import Cache, Found, RefusedError, descend, predicting, sources_digest

LADDER = (128, 256, 512, 1024)
JOB = Job("v6e", "matmul", "forward", "square-4096", "bfloat16")


class Trials:
    """A bowl with its bottom at (512, 256), too large above 1024 * 512; counts what is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, int]] = []

    def __call__(self, tiles) -> float:
        self.asked.append(dict(tiles))
        if tiles["m"] * tiles["n"] > 1024 * 512:
            raise RefusedError("too large")
        return 100 + abs(tiles["m"] - 512) + abs(tiles["n"] - 256)


def test_search_sorts_and_keeps_refusals() -> None:
    trials = Trials()
    found = search.search(trials, [{"m": m, "n": 1024} for m in (1024, 128, 512, 128)])
    assert [each.tiles["m"] for each in found] == [512, 128, 1024]
    assert found[-1] == Found({"m": 1024, "n": 1024}, inf, "too large")
    assert len(trials.asked) == 3


@pytest.mark.parametrize(
    "refusal",
    [CyclesError("no"), RefusedError("no"), subprocess.TimeoutExpired("child", 3.0)],
)
def test_a_failed_candidate_is_no_disaster(refusal: Exception) -> None:
    def evaluate(tiles) -> float:
        raise refusal

    (found,) = search.search(evaluate, [{"m": 1}])
    assert found.microseconds == inf
    assert "no" in found.refusal or "3 s" in found.refusal


def test_another_error_is_the_callers() -> None:
    def evaluate(tiles) -> float:
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        search.search(evaluate, [{"m": 1}])


@pytest.mark.parametrize("start", [(128, 128), (1024, 1024), (256, 1024), (300, 300)])
def test_descend_finds_the_bottom_from_anywhere(start: tuple[int, int]) -> None:
    trials = Trials()
    found = descend(trials, dict(zip("mn", start, strict=True)), {"m": LADDER, "n": LADDER})
    assert found[0].tiles == {"m": 512, "n": 256}
    assert len(trials.asked) <= 12


def test_descend_trades_where_there_is_no_room() -> None:
    def evaluate(tiles) -> float:
        if tiles["a.m"] * tiles["a.n"] > 512 * 256:
            raise RefusedError("no room")
        return 2000 - tiles["a.n"]  # the larger n, the better, and m does not matter

    ladders = {"a.m": LADDER, "a.n": LADDER, "b.n": LADDER}
    found = descend(evaluate, {"a.m": 512, "a.n": 256, "b.n": 128}, ladders)
    assert found[0].tiles["a.n"] == 1024
    assert found[0].tiles["a.m"] == 128


@pytest.mark.parametrize("towards", [1, -1])
def test_descend_moves_two_blocks_together(towards: int) -> None:
    """On a ridge of squares a step of one block alone loses."""

    def evaluate(tiles) -> float:
        q, kv = (tiles[f"forward.block_{name}"] for name in ("q", "kv"))
        return 2000 - towards * q + (1000 if q != kv else 0)

    bottom, top = (LADDER[0], LADDER[-1])[::towards]
    blocks = ("forward.block_q", "forward.block_kv")
    found = descend(evaluate, dict.fromkeys(blocks, bottom), dict.fromkeys(blocks, LADDER))
    assert found[0].tiles == dict.fromkeys(blocks, top)


def test_descend_leaves_fields_without_a_ladder() -> None:
    found = descend(Trials(), {"m": 128, "n": 256}, {"m": LADDER})
    assert found[0].tiles == {"m": 512, "n": 256}
    assert {each.tiles["n"] for each in found} == {256}


def test_descend_stops_when_its_time_is_up() -> None:
    trials = Trials()
    assert len(descend(trials, {"m": 128, "n": 128}, {"m": LADDER, "n": LADDER}, seconds=0)) == 1


def test_what_is_not_allowed_is_neither_tried_nor_kept(tmp_path: Path) -> None:
    start, ladders, cache = {"m": 128, "n": 128}, {"m": LADDER, "n": LADDER}, Cache("key", "digest", tmp_path)
    trials = Trials()
    found = descend(trials, start, ladders, cache=cache, allowed=lambda tiles: tiles["m"] < 512)
    assert found[0].tiles == {"m": 256, "n": 256}
    assert all(tiles["m"] < 512 for tiles in trials.asked)
    assert descend(Trials(), start, ladders, cache=cache)[0].tiles == {"m": 512, "n": 256}
    again = descend(Trials(), start, ladders, cache=cache, allowed=lambda tiles: tiles["m"] < 512)
    assert again[0].tiles == {"m": 256, "n": 256}


def test_a_second_search_asks_for_nothing(tmp_path: Path) -> None:
    first, again = Trials(), Trials()
    start, ladders = {"m": 1024, "n": 1024}, {"m": LADDER, "n": LADDER}
    found = descend(first, start, ladders, cache=Cache("key", "digest", tmp_path))
    assert descend(again, start, ladders, cache=Cache("key", "digest", tmp_path)) == found
    assert not again.asked


@pytest.mark.parametrize(("key", "digest"), [("other", "digest"), ("key", "other")])
def test_results_belong_to_their_key_and_sources(tmp_path: Path, key: str, digest: str) -> None:
    Cache("key", "digest", tmp_path).put(Found({"m": 1}, 2.0))
    assert Cache("key", "digest", tmp_path).get({"m": 1}) == Found({"m": 1}, 2.0)
    assert Cache("key", "digest", tmp_path).get({"m": 2}) is None
    assert Cache(key, digest, tmp_path).get({"m": 1}) is None


def test_results_belong_to_the_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache("key", "digest", tmp_path).put(Found({"m": 1}, 2.0))
    monkeypatch.setattr(search, "compiler_versions", lambda: ("libtpu==9",))
    assert Cache("key", "digest", tmp_path).get({"m": 1}) is None


def test_a_broken_file_is_no_result(tmp_path: Path) -> None:
    cache = Cache("key", "digest", tmp_path)
    cache.put(Found({"m": 1}, inf, "too large"))
    (file,) = (tmp_path / "trials").iterdir()
    assert json.loads(file.read_text())["refusal"] == "too large"
    assert cache.get({"m": 1}) == Found({"m": 1}, inf, "too large")
    file.write_text("{")
    assert cache.get({"m": 1}) is None


def test_a_prediction_that_spills_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(spills: float) -> tuple[Prediction, ...]:
        return (Prediction("matmul", "v6e", True, 1750.0, 0, 0, {"spills": spills}, {}, 0, 0, 0),)

    monkeypatch.setattr(search, "predict", lambda job, tiles: predicted(438.0 if tiles["block_m"] > 512 else 437.0))
    assert predicting(JOB)({"block_m": 512}) == pytest.approx(2.0)
    with pytest.raises(RefusedError, match="spills"):
        predicting(JOB)({"block_m": 1024})


def test_a_gpus_refusal_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("sm_90", "matmul", "forward", "square-4096", "bfloat16")
    monkeypatch.setattr(issue_child, "ask", lambda job, tiles: (3.0, "" if tiles["block_m"] < 256 else "spills"))
    assert predicting(job)({"block_m": 128}) == 3.0
    with pytest.raises(RefusedError, match="spills"):
        predicting(job)({"block_m": 256})


def test_the_digest_is_of_the_kernels_alone() -> None:
    digests = {sources_digest(op, kind) for op in ("matmul", "norm") for kind in ("triton", "pallas")}
    assert len(digests) == 4
    assert sources_digest("matmul", "pallas") in digests
