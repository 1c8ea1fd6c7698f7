"""The command as a whole: quick to start, and what the small commands print."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from crosstile.bench import overhead
from crosstile.bench.cli import app
from crosstile.bench.overhead import Overhead


def test_help_names_the_commands_and_loads_no_framework() -> None:
    program = (
        "import sys; from crosstile.bench.cli import app\n"
        "assert not {'torch', 'jax', 'triton', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
        "app(['--help'])"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for command in ("compile", "verify", "bench", "roofline", "explain", "demo", "train", "generate"):
        assert command in child.stdout


def test_roofline_says_predicted() -> None:
    result = CliRunner().invoke(app, ["roofline", "--target", "v6e"])
    assert result.exit_code == 0
    assert "predicted" in result.output
    assert "llama-3-8b" in result.output


def test_explain_speaks_of_a_named_shape() -> None:
    result = CliRunner().invoke(app, ["explain", "attention", "--framework", "numpy"])
    assert result.exit_code == 0, result.output
    assert "numpy" in result.output
    wrong = CliRunner().invoke(app, ["explain", "attention", "--shape", "llama-3-8b-gate", "--framework", "numpy"])
    assert wrong.exit_code == 2


def test_overhead_is_the_paired_difference() -> None:
    import time

    found = overhead.measure("sleep", lambda: time.sleep(2e-4), lambda: None, rounds=6, calls=2)
    assert found.difference > 150
    assert found.difference == pytest.approx(found.ours - found.theirs, rel=0.3)


@pytest.mark.parametrize(("difference", "seconds", "code"), [(9.0, 0.1, 0), (16.0, 0.1, 1), (9.0, 0.2, 1)])
def test_bench_holds_the_bar(difference: float, seconds: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Overhead("attention", 20.0, 11.0, difference, (8.0, 10.0))
    monkeypatch.setattr(overhead, "torch_overheads", lambda rounds: [row])
    monkeypatch.setattr(overhead, "import_seconds", lambda: seconds)
    assert CliRunner().invoke(app, ["bench"]).exit_code == code
