"""Write the tables of features into docs/: `python tests/support/feature_tables.py`.

A table stands between two marks, in a section of its own. The cells come from the lists that the tests run, so that
a cell is there because a test proves it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from features import COLUMNS, Subject
from subjects import SUBJECTS

DOCS = Path(__file__).parents[2] / "docs"
SECTION = """
## What is proved

Every cell below is a test of `tests/test_features.py`, and `python tests/support/feature_tables.py` writes the table
from the list of these tests. Kernels run interpreted on a CPU; results are within twice the error of torch's own ops
in the same precision, against the definition in float64. (The definition is held to torch's own ops in float64.) The
columns torch and JAX are `implementation="library"`. Every round of the tests has each feature in some call of each
column; `nox -s sweep` adds each alone for Pallas and JAX, and a covering array, in which every two features meet.
"""


def table(subject: Subject) -> str:
    """The features as Markdown."""
    lines = ["| | " + " | ".join(f"{column}: forward | backward" for column in COLUMNS.values()) + " |"]
    lines.append("|---|" + "---|" * (2 * len(COLUMNS)))
    backward = "✓" if subject.differentiable else "inference only"
    for case in subject.singles():
        cells = [case.lacking.get(column) or cell for column in COLUMNS for cell in ("✓", backward)]
        lines.append(f"| {case.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- features of {name}: begin -->", f"<!-- features of {name}: end -->"


def written(name: str, table: str, text: str) -> str:
    """The page with the table, at its end where there was none."""
    begin, end = marks(name)
    if begin not in text:
        text = f"{text.rstrip()}\n{'' if SECTION in text else SECTION}\n{begin}\n{end}\n"
    return re.sub(f"{begin}.*?{end}", f"{begin}\n\n{table}\n\n{end}", text, flags=re.DOTALL)


def pages() -> Iterator[tuple[Path, str, str]]:
    """The page of every table, the name in its marks, and the table."""
    for subject in SUBJECTS.values():
        yield DOCS / subject.page, subject.name, table(subject)


if __name__ == "__main__":
    for page, name, found in pages():
        page.write_text(written(name, found, page.read_text()))
