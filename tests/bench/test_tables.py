"""The tuned tables hold nothing that no call can reach, and the check of that finds what is wrong."""

import json
import shutil
from pathlib import Path

import pytest

import crosstile.kernels
from crosstile.bench.tables import files, problems
from crosstile.kernels.tiles.tuned import package_table, read_table, write_table

KERNELS = Path(crosstile.kernels.__path__[0])


def test_no_table_has_an_orphan() -> None:
    assert files(KERNELS)
    assert problems(KERNELS) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A table of its own, in a folder of ops."""
    file = tmp_path / "matmul" / "tuned" / "v6e.json"
    file.parent.mkdir(parents=True)
    shutil.copy(package_table("matmul", "v6e"), file)
    assert problems(tmp_path) == []
    return file


def _broken(file: Path, change) -> list[str]:
    document = json.loads(file.read_text())
    change(document["entries"][0])
    file.write_text(json.dumps(document))
    return problems(file.parents[2])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda entry: entry["kinds"].pop("activation"), "kinds: got"),
        (lambda entry: entry["kinds"].update(colour="red"), "kinds: got"),
        (lambda entry: entry["kinds"].pop("dtype"), "no dtype"),
        (lambda entry: entry["sizes"].update(m=12), "sizes: got"),
        (lambda entry: entry["sizes"].pop("m"), "sizes: got"),
        (lambda entry: entry["tiles"].update(block_x=128), "no such fields"),
        (lambda entry: entry["tiles"].update(block_m=0), "above 0"),
        (lambda entry: entry["tiles"].update(block_m="128"), "above 0"),
        (lambda entry: entry.update(source="llama-9"), "shape: got 'llama-9'"),
        (lambda entry: entry.update(source="llama-3-8b-gate@tokens=1"), "no size 'tokens'"),
        (lambda entry: entry.update(source="llama-3-8b"), "a shape of attention"),
        (lambda entry: entry.update(by="guessed"), "by: got"),
        (lambda entry: entry["tuned"].update(dict.fromkeys(entry["tuned"], 1e9)), "the heuristic's tiles take"),
        (lambda entry: entry.pop("tiles"), "cannot be read"),
    ],
)
def test_an_orphan_is_found(copy: Path, change, complaint: str) -> None:
    assert any(complaint in problem for problem in _broken(copy, change))


def test_a_table_of_no_chip_or_op_is_found(copy: Path) -> None:
    shutil.copy(copy, copy.with_name("v9.json"))
    assert any("a table is named CHIP.json" in problem for problem in problems(copy.parents[2]))
    copy.with_name("v9.json").unlink()
    shutil.copy(copy, copy.with_name("v5e.json"))
    assert any("says that it is of matmul on v6e" in problem for problem in problems(copy.parents[2]))
    copy.with_name("v5e.json").unlink()
    (copy.parents[2] / "sorting").mkdir()
    copy.parent.rename(copy.parents[2] / "sorting" / "tuned")
    assert any("no op 'sorting'" in problem for problem in problems(copy.parents[2]))


def test_two_entries_of_one_key_are_found(copy: Path) -> None:
    entries = read_table(copy)
    write_table(copy, "matmul", "v6e", [*entries, entries[0]])
    assert any("the same key" in problem for problem in problems(copy.parents[2]))
    document = json.loads(copy.read_text())
    document["entries"] = [json.loads(json.dumps(vars(entry))) for entry in reversed(entries)]
    copy.write_text(json.dumps(document))
    assert len(entries) < 2 or any("not sorted" in problem for problem in problems(copy.parents[2]))


def test_writing_a_table_twice_changes_nothing(copy: Path) -> None:
    before = copy.read_text()
    write_table(copy, "matmul", "v6e", list(reversed(read_table(copy))))
    assert copy.read_text() == before
