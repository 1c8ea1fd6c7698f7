"""The tables of `crosstile standings`: on the console, and in `docs/tpu_standings.md` between two comments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .contests import CHIPS, CONTESTS, get_contest
from .pages import between, write_between
from .shapes import get_shape
from .standings import Entry, Standing, standings

BEGIN, END = "<!-- standings: made by `crosstile standings --page` -->", "<!-- end of standings -->"
HEADINGS = ("contest", "ours µs", "of limit", "as chosen", "best peer", "its µs", "its tiles", "ours / peer", "kernels")


def show(entries: Sequence[Entry], console: Console) -> None:
    """A table of each chip, what had no time, and how many contests are lost."""
    found = standings(entries)
    for chip in dict.fromkeys(standing.chip for standing in found):
        table = Table(title=f"predicted, not measured: {chip}", box=None, title_justify="left", header_style="bold")
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if number in (1, 2, 3, 5, 7, 8) else "left")
        for standing in found:
            if standing.chip == chip:
                table.add_row(*cells(standing), style="red" if standing.ratio > 1 else None)
        console.print(table)
    for entry in entries:
        if entry.refusal:
            said = f"no time: {entry.chip} {entry.contest} {entry.contestant}: {entry.refusal}"
            console.print(said, highlight=False, markup=False)
    console.print(summary(found), highlight=False)


def cells(standing: Standing) -> tuple[str, ...]:
    """One row. Times are of whole calls, in parentheses of the kernels alone."""
    ours, peer = standing.ours, standing.peer
    return (
        standing.contest,
        _times(ours),
        f"{100 * ours.share:.0f} %",
        f"{standing.chosen.microseconds:.0f}" if standing.chosen else "?",
        peer.contestant,
        _times(peer),
        f"{peer.tiles} ({peer.trials} tried)".strip(),
        f"{standing.ratio:.2f}",
        f"{standing.kernel_ratio:.2f}",
    )


def _times(entry: Entry) -> str:
    return f"{entry.microseconds:.0f} ({entry.kernels:.0f})"


def summary(found: Sequence[Standing]) -> str:
    """Wins and losses, in a sentence."""
    if not found:
        return "No contest has both a time of ours and one of a peer."
    lost = [standing for standing in found if standing.ratio > 1]
    if not lost:
        return f"Of {len(found)} contests none is lost."
    worst = max(lost, key=lambda standing: standing.ratio)
    return (
        f"Of {len(found)} contests {len(lost)} are lost: a peer is faster. The worst is {worst.contest} on "
        f"{worst.chip}, where ours takes {worst.ratio:.2f} times as long as {worst.peer.contestant}."
    )


def missing(entries: Sequence[Entry]) -> list[str]:
    """What has not been run: contests by chip, and peers of contests that have a standing."""
    there = {(entry.chip, entry.contest, entry.contestant) for entry in entries}
    stood = {(standing.chip, standing.contest) for standing in standings(entries)}
    found = []
    for chip in CHIPS:
        names = [contest.name for contest in CONTESTS if (chip, contest.name) not in stood]
        if names:
            found.append(f"{chip}: {', '.join(names)}")
    for peer in dict.fromkeys(peer for contest in CONTESTS for peer in contest.peers):
        at = [
            f"{contest.name} on {chip}"
            for chip in CHIPS
            for contest in CONTESTS
            if peer in contest.peers and (chip, contest.name) in stood and (chip, contest.name, peer) not in there
        ]
        if at:
            found.append(f"{peer}: {', '.join(at)}")
    return found


def markdown(entries: Sequence[Entry]) -> str:
    """The same for a page: one table a chip, a loss in bold, and what each contest is."""
    found = standings(entries)
    lines = [summary(found), ""]
    for chip in dict.fromkeys(standing.chip for standing in found):
        lines += [f"### {chip}", "", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
        for standing in found:
            if standing.chip == chip:
                row = list(cells(standing))
                row[7] = f"**{row[7]}**" if standing.ratio > 1 else row[7]
                lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    if left := missing(entries):
        lines += ["### Not run yet", "", *(f"* {item}" for item in left), ""]
    lines += ["### What they are", "", "| contest | op | sizes | contestants |", "|---|---|---|---|"]
    for name in dict.fromkeys(entry.contest for entry in entries):
        contest = get_contest(name)
        shape = get_shape(contest.shape)
        lines.append(f"| {name} | {shape.op}, {contest.direction} | {shape.summary} | {', '.join(contest.peers)} |")
    return "\n".join(lines) + "\n"


def write_page(entries: Sequence[Entry], page: Path) -> None:
    """Put the tables into a page, between its two comments. Raises ValueError where it has none."""
    write_between(page, BEGIN, END, markdown(entries))


def table_of(page: Path) -> str:
    """What stands in a page between the two comments."""
    return between(page, BEGIN, END)
