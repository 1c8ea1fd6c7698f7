"""Every example in a docstring, in the README and in docs/ runs, and every relative link leads somewhere.

A block of Python in Markdown is run in the order of its file, in one namespace. A block that cannot run here is marked
on the line before it with `<!-- not run: reason -->`.
"""

from __future__ import annotations

import doctest
import importlib
import re
import textwrap
from pathlib import Path
from urllib.parse import unquote

import pytest

import crosstile

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "bindings": "crosstile",
    "kernels": "crosstile.kernels",
    "models": "crosstile.models",
    "bench": "crosstile.bench",
}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_BLOCK = re.compile(r"^( *)```python[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)


def modules_with_examples():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                yield ".".join((package, *(part for part in parts if part != "__init__")))


def blocks(text):
    """(line, code, runs) of the Python blocks of a page; line is that of the opening fence, from 1."""
    for match in _BLOCK.finditer(text):
        before = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        yield text[: match.start()].count("\n") + 1, textwrap.dedent(match[2]), _NOT_RUN.search(before) is None


def anchors(text):
    """What GitHub makes of the headings."""
    for heading in _HEADING.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code, runs in blocks(page.read_text()):
        if runs:
            padded = "\n" * line + code  # so that a traceback shows the page's own line
            exec(compile(padded, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in (first or second for first, second in _LINK.findall(text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert not broken


def test_public_names_have_a_manual():
    for name in crosstile.__all__:
        assert getattr(crosstile, name).__doc__, name


def test_blocks_and_marks_are_understood():
    page = (
        "text\n```python\nx = 1\n```\n"
        "\n<!-- not run: needs a GPU -->\n```python\nboom\n```\n"
        "- item\n  ```python\n  y = x\n  ```\n"
    )
    assert list(blocks(page)) == [(2, "x = 1\n", True), (7, "boom\n", False), (11, "y = x\n", True)]
    assert list(anchors("# `a` & B\n```sh\n# no\n```\n## c (d)\n")) == ["a--b", "c-d"]
