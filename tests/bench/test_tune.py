"""`crosstile tune`: which shapes and fields it searches, what it writes, and that it goes on where it stopped."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosstile.bench import search, tune
from crosstile.bench.cli import app
from crosstile.bench.ladders import OPS as TUNED_OPS
from crosstile.bench.ladders import spaces
from crosstile.bench.programs import Job
from crosstile.bench.search import RefusedError
from crosstile.bench.shapes import get_shape
from crosstile.dispatch import OPS
from crosstile.kernels.tiles import tuned
from crosstile.kernels.tiles.targets import TARGETS

V6E = TARGETS["v6e"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The user's folder, empty, beside empty tables of the package; trials are counted instead of compiled."""
    monkeypatch.setenv("CROSSTILE_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuned, "package_table", lambda op, chip: tmp_path / "package" / op / "tuned" / f"{chip}.json")
    monkeypatch.setattr(search, "predicting", fastest_in_the_middle)
    Count.trials = 0
    tuned.forget()
    yield tmp_path
    monkeypatch.undo()
    tuned.forget()


class Count:
    trials = 0


def fastest_in_the_middle(job: Job):
    """Every field is fastest at 512, block_m of 128 spills, and a forward that saves nothing wants block_k of 256."""

    def evaluate(tiles) -> float:
        Count.trials += 1
        if any(name.endswith("block_m") and value == 128 for name, value in tiles.items()):
            raise RefusedError("spills")
        if job.shape == "gemma-2-2b-gate" and job.direction == "forward" and tiles["block_k"] != 256:
            raise RefusedError("only 256 works here")
        return 10 + sum(abs(value.bit_length() - 10) for value in tiles.values())

    return evaluate


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("op", TUNED_OPS)
@pytest.mark.parametrize("chip", ["v4", "v6e", "sm_90"])
def test_what_is_searched_are_fields_of_the_configuration(op: str, chip: str) -> None:
    declared = OPS[op].module("tiles")
    for name in tune.shapes_of(op, None, ()):
        shape, target = get_shape(name), TARGETS[chip]
        spec, inputs = shape.prepare("bfloat16")
        config = declared.choose_config(spec, target)
        sizes = declared.sizes_of(spec, inputs)._asdict()
        found = spaces(shape, target, sizes, config)
        tuned.changed_tiles(config, {field: 1 for space in found for field in space.ladders})
        assert ("num_warps" in str(found)) == target.is_gpu
        assert {way for space in found for way in (*space.directions, *space.must_work)} >= {"forward"}
        assert any("backward" in space.directions for space in found) == shape.trains


def test_blocks_are_no_larger_than_their_arrays() -> None:
    declared = OPS["grouped_matmul"].module("tiles")
    shape = get_shape("qwen3-30b-a3b-down")  # k 768, n 2048
    spec, inputs = shape.prepare("bfloat16")
    sizes = declared.sizes_of(spec, inputs)._asdict()
    forward, backward = spaces(shape, V6E, sizes, declared.choose_config(spec, V6E))
    assert forward.ladders["forward.block_k"][-1] == 1024
    assert forward.ladders["forward.block_n"][-1] == 2048
    assert backward.ladders["dlhs.block_n"][-1] == 1024


def test_an_entry_is_written_and_then_used(folder: Path) -> None:
    output = run("--op", "matmul", "--target", "v6e", "--shape", "square-4096")
    assert "predicted, not measured" in output
    (entry,) = tuned.read_table(folder / "package" / "matmul" / "tuned" / "v6e.json")
    assert entry.tiles == {"block_m": 512, "block_n": 512, "block_k": 512}
    assert entry.source == "square-4096"
    assert entry.by == "predicted"
    assert entry.tuned["forward+backward"] < entry.heuristic["forward+backward"]
    spec, inputs = get_shape("square-4096").prepare("bfloat16")
    assert OPS["matmul"].tiles(spec, V6E, inputs)[0].block_n == 512


def test_a_second_run_tries_nothing_and_changes_nothing(folder: Path) -> None:
    asked = ("--op", "glu_matmul", "--target", "v6e", "--shape", "llama-3-8b-glu")
    run(*asked)
    file = folder / "package" / "glu_matmul" / "tuned" / "v6e.json"
    before, trials = file.read_text(), Count.trials
    assert trials > 10
    run(*asked)
    assert Count.trials == trials
    assert file.read_text() == before
    output = run(*asked, "--dry-run")
    assert "median 1.000, largest 1.000" in output


def test_another_shape_leaves_the_others(folder: Path) -> None:
    for shape in ("square-4096", "long-k", "square-4096"):
        run("--op", "matmul", "--target", "v6e", "--shape", shape)
    entries = tuned.read_table(folder / "package" / "matmul" / "tuned" / "v6e.json")
    assert sorted(entry.source for entry in entries) == ["long-k", "square-4096"]


def test_a_dry_run_writes_nothing_and_a_users_run_writes_to_his_own(folder: Path) -> None:
    asked = ("--op", "matmul", "--target", "v6e", "--shape", "square-4096")
    run(*asked, "--dry-run")
    assert not (folder / "package").exists()
    run(*asked, "--user")
    assert not (folder / "package").exists()
    assert tuned.read_table(folder / "user" / "tuned" / "matmul" / "v6e.json")


def test_no_time_makes_no_more_than_the_heuristics_entry(folder: Path) -> None:
    output = run("--op", "matmul", "--target", "v6e", "--shape", "square-4096", "--budget", "0")
    assert "time was up" in output
    (entry,) = tuned.read_table(folder / "package" / "matmul" / "tuned" / "v6e.json")
    assert entry.tuned == entry.heuristic


def test_shapes_that_no_time_is_left_for_are_counted(folder: Path) -> None:
    asked = ("--shape", "square-4096", "--shape", "long-k", "--shape", "odd", "--budget", "0")
    assert "2 shapes are left" in run("--op", "matmul", "--target", "v6e", *asked)


def test_tiles_must_work_without_saving_too(folder: Path) -> None:
    run("--op", "matmul", "--target", "v6e", "--shape", "gemma-2-2b-gate")
    (entry,) = tuned.read_table(folder / "package" / "matmul" / "tuned" / "v6e.json")
    assert entry.tiles["block_k"] == 256


def test_lengths_replace_the_tokens_of_training_shapes() -> None:
    found = tune.shapes_of("attention", ["llama-3-8b", "llama-3-8b-decode"], [1024, 4096])
    assert found == ["llama-3-8b@q_len=1024,kv_len=1024", "llama-3-8b", "llama-3-8b-decode"]
    assert tune.shapes_of("matmul", ["llama-3-8b"], []) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "llama-9"], "llama-9"),
        (["--shape", "llama-3-8b@x=1"], "no size 'x'"),
        (["--shape", "llama-3-8b@q_len"], "SIZE=NUMBER"),
        (["--op", "sort"], "sort"),
        (["--target", "sm_91"], "sm_91"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == 2
    assert complaint in result.output.replace("\n", " ")


def test_a_machine_without_a_chip_says_so() -> None:
    result = CliRunner().invoke(app, ["tune", "--device", "cuda", "--op", "matmul"])
    assert result.exit_code == 2
