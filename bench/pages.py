"""What a tool writes into a page of the docs, between two comments."""

from __future__ import annotations

from pathlib import Path


def between(page: Path, begin: str, end: str) -> str:
    """What stands in a page between the two comments."""
    return page.read_text().partition(begin)[2].partition(end)[0].strip() + "\n"


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text into a page, between its two comments. Raises ValueError where it has none."""
    whole = page.read_text()
    if begin not in whole or end not in whole:
        raise ValueError(f"page: {page} has no place for the tables; it must hold the lines {begin!r} and {end!r}")
    before, _, rest = whole.partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
