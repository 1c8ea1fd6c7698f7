"""The compile command: what fails, what it says, what it writes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosstile.bench import compile as compiling
from crosstile.bench import pool, programs
from crosstile.bench.attention_shapes import AttentionShape
from crosstile.bench.cli import app
from crosstile.bench.facts import KernelFacts, over_budget
from crosstile.bench.programs import Job
from crosstile.bench.shape import Shape
from crosstile.bench.shapes import SHAPES, get_shape
from crosstile.calls import PREPARE
from crosstile.dispatch import supports
from crosstile.kernels.tiles.targets import TARGETS

GOOD = KernelFacts("forward", "q 64", 100, {"HGMMA": 8}, "bfloat16", 0, 1024, registers=128)
SPILLS = KernelFacts("dkv", "q 64", 100, {"HGMMA": 8}, "bfloat16", 12, 1024, registers=255)


def outcomes_of(*kernels: KernelFacts, error: str = ""):
    def run(jobs: Sequence[Job], processes: int = 2) -> Iterator[pool.Outcome]:
        return (pool.Outcome(job, kernels, error) for job in jobs)

    return run


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({"matrix": {}}, "sm_80", "no tensor-core instruction, though it multiplies bfloat16"),
        ({"matrix": {}}, "v6e", "no MXU instruction, though it multiplies bfloat16"),
        ({"spills": 3}, "sm_90", "3 register spills"),
        ({"spills": 101, "instructions": 100}, "v6e", "101 register spills"),
        ({"local_bytes": 8}, "gfx942", "8 bytes of private memory per thread"),
        ({"on_chip_bytes": 65537}, "gfx942", "65537 bytes of shared memory, more than the chip's 65536"),
        ({"on_chip_bytes": 2**25}, "v4", "33554432 bytes of VMEM, more than the chip's 16777216"),
        ({"registers": 256}, "sm_100", "256 registers, more than the chip's 255"),
    ],
)
def test_each_budget(change: dict[str, object], target: str, reason: str) -> None:
    good = {"on_chip_bytes": 1024, "registers": 128, "matrix": {"MMA": 8}}
    facts = {**GOOD.as_dict(), **good}
    assert over_budget(KernelFacts(**facts), target) == ()
    assert over_budget(KernelFacts(**{**facts, **change}), target) == (reason,)


def test_a_tpu_may_spill_one_vector_a_bundle() -> None:
    facts = KernelFacts(**{**GOOD.as_dict(), "on_chip_bytes": 1024, "instructions": 100, "spills": 100})
    assert over_budget(facts, "v6e") == ()
    assert over_budget(facts, "sm_90") == ("100 register spills",)


def test_a_failure_names_the_job_the_kernel_and_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.pool, "run", outcomes_of(GOOD, SPILLS))
    result = CliRunner().invoke(app, ["compile", "--target", "sm_90", "--shape", "llama-3-8b-decode"])
    assert result.exit_code == 1
    assert "sm_90 attention forward llama-3-8b-decode bfloat16: dkv (q 64): 12 register spills" in result.output
    assert "1 fail" in result.output
    assert "not measured" in result.output


def test_within_budget_exits_0_and_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling.pool, "run", outcomes_of(GOOD))
    file = tmp_path / "out.json"
    command = ["compile", "--target", "sm_90", "--op", "attention", "--quick", "--json", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    assert document["schema"] == compiling.SCHEMA
    assert document["ok"] is True
    assert document["compilers"]["crosstile"]
    assert {job["shape"] for job in document["jobs"]} == {"llama-3-8b", "gpt-oss-20b"}
    assert {job["direction"] for job in document["jobs"]} == {"forward", "backward"}
    for job in document["jobs"]:
        assert set(job) == {"target", "op", "direction", "shape", "dtype", "error", "unsupported", "kernels"}
        [kernel] = job["kernels"]
        assert kernel == {**GOOD.as_dict(), "failures": []}


def test_a_refusal_fails_with_the_compilers_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.pool, "run", outcomes_of(error="RuntimeError: Ran out of memory in VMEM"))
    result = CliRunner().invoke(app, ["compile", "--target", "v4", "--shape", "llama-3-8b-decode"])
    assert result.exit_code == 1
    assert "the compiler refused. RuntimeError: Ran out of memory in VMEM" in result.output


def test_an_op_that_multiplies_by_hand_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand = KernelFacts("forward", "q 64", 100, {}, "", 0, 1024)
    monkeypatch.setattr(compiling.pool, "run", outcomes_of(by_hand, by_hand))
    command = ["compile", "--target", "v6e", "--shape", "llama-3-8b-decode"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "not one of its kernels uses the matrix units" in result.output
    command = ["compile", "--target", "sm_80", "--shape", "llama-3-8b-decode", "--dtype", "float32"]
    assert CliRunner().invoke(app, command).exit_code == 0


def test_no_kernel_at_all_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.pool, "run", outcomes_of())
    result = CliRunner().invoke(app, ["compile", "--target", "v4", "--shape", "llama-3-8b-decode"])
    assert result.exit_code == 1
    assert "compiled to no kernel" in result.output


@pytest.mark.parametrize(("package", "target", "kind"), [("triton", "sm_90", "triton"), ("libtpu", "v6e", "tpu")])
def test_a_missing_compiler_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, package: str, target: str, kind: str
) -> None:
    monkeypatch.setattr(compiling, "find_spec", lambda name: None if name == package else object())
    monkeypatch.setattr(compiling.pool, "run", outcomes_of(GOOD))
    result = CliRunner().invoke(app, ["compile", "--quick", "--target", target])
    assert result.exit_code == 2
    assert f"pip install 'crosstile[{kind}]'" in result.output
    other = "v6e" if target == "sm_90" else "sm_90"
    assert CliRunner().invoke(app, ["compile", "--quick", "--target", other, "--op", "attention"]).exit_code == 0


@pytest.mark.parametrize("arguments", [["--target", "sm_75"], ["--op", "conv"], ["--shape", "x"], ["--dtype", "int8"]])
def test_unknown_names_are_refused_with_those_there_are(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["compile", *arguments])
    assert result.exit_code == 2
    assert "must be one of" in " ".join(result.output.replace("│", "").split())


def test_every_shape_has_its_directions_on_every_target() -> None:
    jobs = programs.jobs_for(TARGETS, SHAPES, ["bfloat16"])
    assert len(set(jobs)) == len(jobs)
    assert {job.target for job in jobs} == set(TARGETS)
    assert programs.directions(get_shape("llama-3-8b")) == ("forward", "backward")
    assert programs.directions(get_shape("llama-3-8b-gate")) == ("forward", "saving", "backward")
    assert programs.directions(get_shape("llama-3-8b-decode")) == ("forward",)
    assert programs.directions(get_shape("llama-3-8b-paged")) == ("forward",)


def test_the_long_list_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling.pool, "run", outcomes_of(GOOD))
    found = {}
    for options in ((), ("--all",), ("--quick",)):
        file = tmp_path / "out.json"
        result = CliRunner().invoke(app, ["compile", "--target", "sm_90", *options, "--json", str(file)])
        assert result.exit_code == 0, result.output
        found[options] = {job["shape"] for job in json.loads(file.read_text())["jobs"]}
    assert found["--quick",] < found[()] < found["--all",]
    assert found[()] == {shape.name for shape in SHAPES if shape.everyday}
    assert found["--all",] == {shape.name for shape in SHAPES}


def test_what_the_library_does_not_offer_there_is_shown_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = "Pages of float8_e4m3fn are read by sm_90"

    def run(jobs: Sequence[Job], processes: int = 2) -> Iterator[pool.Outcome]:
        return (pool.Outcome(job, unsupported=reason) for job in jobs)

    monkeypatch.setattr(compiling.pool, "run", run)
    file = tmp_path / "out.json"
    command = ["compile", "--target", "sm_80", "--shape", "llama-3-8b-decode-16-fp8", "--json", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "not offered there" in result.output
    [job] = json.loads(file.read_text())["jobs"]
    assert job["unsupported"] == reason


def test_what_a_chip_does_not_multiply_is_not_offered() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("jax")
    found = set()
    for shape in SHAPES:
        spec, _ = shape.prepare("bfloat16")
        for name, target in TARGETS.items():
            if supports(shape.op, "triton" if target.is_gpu else "pallas", spec, target, shape.trains):
                found.add((name, shape.name))

    def but(offered: str, *endings: str) -> set[tuple[str, str]]:
        shapes = [shape.name for shape in SHAPES if shape.name.endswith(endings)]
        return {(target, name) for target in set(TARGETS) - set(offered.split()) for name in shapes}

    queries = tuple(shape.name for shape in SHAPES if shape.op == "attention" and "float8" in shape.name)
    pages = tuple(shape.name for shape in SHAPES if shape.op == "paged_attention" and shape.name.endswith("-fp8"))
    tpus = "v4 v5e v5p v6e v7x"
    assert found == (
        but("sm_90 sm_100 gfx950 v7x", *queries, "-fp8-fp8")
        | but(f"sm_90 sm_100 gfx950 {tpus}", *pages)
        | but("sm_80 sm_90 sm_100 gfx942 gfx950 v5e v5p v6e", "-int8-int8")
        | but("sm_100 gfx950", "-mxfp8-mxfp8", "-mxfp4-mxfp8")
        | but("sm_80 sm_90 sm_100", "-tf32x3")
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_s_spec_is_that_of_the_public_call(shape: Shape) -> None:
    """NumPy stand-ins give what a framework that differentiates gives: the planes that want a gradient, above all."""
    jax = pytest.importorskip("jax")
    spec, inputs = shape.prepare("bfloat16")
    structs = {name: jax.ShapeDtypeStruct(size, kind) for name, (size, kind) in shape.arrays("bfloat16").items()}
    found = []

    def call(traced):
        found.extend(PREPARE[shape.function](**shape.call(traced)))
        return [array for array in found[1] if array is not None]

    jax.eval_shape(call, structs)
    assert found[0] == spec
    assert [array is None for array in found[1]] == [array is None for array in inputs]
    assert shape.bytes("bfloat16") > 0
    assert shape.flops > 0 or not shape.multiplies


def test_kernels_hear_of_a_mask_that_the_host_knows() -> None:
    pytest.importorskip("triton")
    for name, told in (("llama-3-8b-documents", True), ("llama-3-8b-segments", False)):
        plan = programs.gpu_plan(Job("sm_90", "attention", "forward", name, "bfloat16"))
        assert any(array.endswith("runs") for array in plan.inputs) == told


@pytest.mark.sweep
@pytest.mark.parametrize("target", TARGETS)
def test_no_compiler_refuses_a_shape(target: str) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("libtpu")
    outcomes = list(pool.run(programs.jobs_for([target], SHAPES, ["bfloat16"])))
    assert [str(outcome.job) for outcome in outcomes if outcome.error] == []


def test_pairs_of_a_window_and_of_packed_sequences() -> None:
    plain = AttentionShape("x", 1, 1, 8, q_len=12, kv_len=12)
    seen = [(i, j) for i in range(12) for j in range(12) if i - 3 <= j <= i]
    assert replace(plain, window=3).flops == 4 * 8 * len(seen)
    seen = [(i, j) for i in range(12) for j in range(12) if j <= i and i // 4 == j // 4]
    assert replace(plain, packed=3).flops == replace(plain, documents=3).flops == 4 * 8 * len(seen)
    seen = [(i, j) for i in range(12) for j in range(12) if j <= i or j < 5]
    assert replace(plain, causal=False, prefix=5).flops == 4 * 8 * len(seen)


def test_an_op_without_products_needs_no_matrix_units() -> None:
    by_hand = KernelFacts("forward", "q 64", 100, {}, "", 0, 1024)
    job = Job("v6e", "attention", "forward", "llama-3-8b", "bfloat16")
    assert compiling.CompileReport((pool.Outcome(job, (by_hand,)),), 1.0).failures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionShape, "multiplies", False)
        assert not compiling.CompileReport((pool.Outcome(job, (by_hand,)),), 1.0).failures


def test_a_job_that_cannot_be_made_is_an_outcome_not_an_end() -> None:
    bad = Job("sm_90", "no_such_op", "forward", "llama-3-8b", "bfloat16")
    [outcome] = pool.run([bad])
    assert "no_such_op" in outcome.error
    assert outcome.kernels == ()
