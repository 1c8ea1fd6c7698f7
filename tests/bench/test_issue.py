"""The issue model from end to end: compiled here, predicted, and held to what must be so."""

from dataclasses import replace
from pathlib import Path

import pytest

from crosstile.bench.gpus import A100_40, GPUS
from crosstile.bench.issue import IssueError, Program, match_loops, predict_program
from crosstile.bench.issue_programs import predict, program_of
from crosstile.bench.issue_validation import Measured, ranking, read_csv, table_rows
from crosstile.bench.loops import Loop
from crosstile.bench.programs import Job, gpu_plan
from crosstile.bench.trips import Counter
from crosstile.bench.validation import Pair
from crosstile.kernels.tiles.targets import get_target

DOCS = Path(__file__).parents[2] / "docs"


def _matmul(target: str) -> Program:
    plan = gpu_plan(Job(target, "matmul", "forward", "square-4096", "bfloat16"))
    [launch] = plan.launches
    return program_of(launch, {**plan.inputs, **plan.outputs, **plan.scratch}, get_target(target))


@pytest.fixture(scope="module", params=["sm_80", "gfx942"])
def program(request: pytest.FixtureRequest) -> tuple[str, Program]:
    pytest.importorskip("triton")
    return request.param, _matmul(request.param)


def test_time_follows_the_trips_and_stays_under_the_peak(program: tuple[str, Program]) -> None:
    target, compiled = program
    gpu = GPUS[target]
    issue = predict_program(compiled, gpu)
    longer = predict_program(replace(compiled, arguments={**compiled.arguments, "k": 8192}), gpu)
    assert 1.7 < longer.microseconds / issue.microseconds < 2.05
    rate = 2 * 4096**3 / issue.microseconds / 1e6
    peak = 2e-3 * gpu.matrix_rate * gpu.processors * gpu.clock
    assert 0.3 * peak < rate <= peak
    assert 0.3 < issue.tensor_share <= 1
    assert 0 < issue.tensor_issue < 1


def test_memory_is_a_floor(program: tuple[str, Program]) -> None:
    target, compiled = program
    slow = replace(compiled, memory_bytes=10**11)
    issue = predict_program(slow, GPUS[target])
    assert issue.limit == "memory"
    assert issue.microseconds == pytest.approx(issue.floor, rel=0.01)


def test_a_chip_that_nobody_measured_says_so(program: tuple[str, Program]) -> None:
    target, compiled = program
    notes = " ".join(predict_program(compiled, GPUS[target]).notes)
    assert ("unchecked" in notes) == (target != "sm_80")
    assert ("lower bound" in notes) == (target != "sm_80")


def test_slower_memory_is_slower() -> None:
    assert A100_40.memory_seconds(10**9) > GPUS["sm_80"].memory_seconds(10**9)
    assert GPUS["sm_80"].memory_seconds(10**6) < 10**6 / 1e9 / GPUS["sm_80"].bandwidth  # from the cache


def test_an_array_that_is_read_in_part_counts_in_part() -> None:
    """The launches that make dweight, each a part of the vocabulary from all tokens, write it once together."""
    plan = gpu_plan(Job("sm_90", "linear_cross_entropy", "backward", "llama-3-8b-head@tokens=512", "bfloat16"))
    arrays = {**plan.inputs, **plan.outputs, **plan.scratch}
    makers = [launch for launch in plan.launches if "dweight" in launch.outputs]
    assert len(makers) > 50
    assert sum(launch.shares["dweight"] for launch in makers) == pytest.approx(1.0)
    assert all(0 < share <= 1 for launch in plan.launches for share in launch.shares.values())
    part, whole = (
        program_of(launch, arrays, get_target("sm_90")).memory_bytes
        for launch in (makers[0], replace(makers[0], shares={}))
    )
    assert part < 0.05 * whole


def test_a_target_that_is_no_gpu_is_refused() -> None:
    with pytest.raises(IssueError, match="v6e"):
        predict(Job("v6e", "matmul", "forward", "square-4096", "bfloat16"))


def test_loops_that_do_not_match_are_refused() -> None:
    text = "tt.func public @k(%n: i32) {\n%c = arith.constant 1 : i32\nscf.for %i = %c to %n step %c : i32 {\n"
    text += "%d = tt.dot %a, %b, %z : tensor<16x16xf16> * tensor<16x16xf16> -> tensor<16x16xf32>\n}\ntt.return\n}"
    counter = Counter(text)
    [(_, number, scale)] = match_loops([(Loop(3), 2 * 16**3, True)], counter, {0: 8})
    assert (number, scale) == (0, 0.5)  # the compiler unrolled twice
    with pytest.raises(IssueError, match="1 loops that multiply, the machine code 2"):
        match_loops([(Loop(3), 16**3, True), (Loop(9), 16**3, True)], counter, {0: 8})


def test_ranking_counts_pairs_of_tiles_of_one_call() -> None:
    def call(predicted: float, measured: float, tile: int, name: str = "x") -> Measured:
        return Measured(Pair("h100", "op", "0", predicted, measured), name, tile)

    found = [call(10, 11, 64), call(20, 22, 128), call(15, 30, 256), call(1, 1, 1, "other")]
    assert ranking(found) == (3, 2, 0)
    assert ranking([call(10, 10, 64), call(20, 10.1, 128)]) == (0, 0, 0)  # too near to tell


def test_the_page_says_what_the_pairs_do() -> None:
    page = (DOCS / "issue.md").read_text()
    found = read_csv(DOCS / "issue_validation.csv")
    for cells in table_rows(found):
        assert f"| {' | '.join(cells)} |" in page
    pairs, model, larger = ranking(found)
    assert (
        f"Of {pairs} pairs of tiles of one call, the model ranks {model} right; the larger tile would {larger}" in page
    )
