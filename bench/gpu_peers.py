"""Our GPU kernels beside other packages' Triton kernels: the same compiler, the same machine code, the same model.

    python -m crosstile.bench.gpu_peers --packages FOLDER --csv docs/gpu_standings.csv --page docs/gpu_standings.md

The folder holds Liger (liger-kernel), FLA (fla-core) and einops, unpacked with `pip install --no-deps --target FOLDER`,
vLLM's source distribution, unpacked, and Triton's tutorials (docs/gpu_standings.md). Their launchers are called with
tensors on this CPU and the launches kept (`captured.py`). Nothing is measured.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from crosstile.kernels.tiles.targets import get_target

from .captured import Captured, capture, memory_bytes, tiles_in_words
from .gpu_calls import CONTESTS, Contest, Peers
from .gpus import GPUS
from .issue import Issue, IssueError, predict_program
from .issue_programs import predict, program_of
from .pages import write_between
from .programs import Job

OURS = "crosstile"
BEGIN, END = "<!-- made by `python -m crosstile.bench.gpu_peers` -->", "<!-- end of what was made -->"


@dataclass(frozen=True)
class Row:
    """One kernel of one contestant on one chip, as the machine code and the model have it; `error` says why not."""

    target: str
    contest: str
    contestant: str
    kernel: str
    tiles: str
    predicted_us: float = 0.0
    tensor_issue: float = 0.0
    tensor_busy: float = 0.0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    programs: int = 0
    occupancy: float = 0.0
    limit: str = ""
    error: str = ""


def rows(target: str, contest: Contest, folder: Path) -> Iterator[Row]:
    """Our kernels, then the peer's with the predicted best of the tiles that its autotuner would try."""
    job = Job(target, contest.op, contest.direction, contest.shape, contest.dtype)
    try:
        for issue in predict(job) if contest.op else ():
            yield _row(target, contest, OURS, issue)
    except (IssueError, RuntimeError) as error:
        yield Row(target, contest.name, OURS, "", "", error=_first(error))
    peers = Peers(folder, target)
    with peers.present():
        launches = capture(lambda: contest.launch(peers), target)
    for call in dict.fromkeys(item.call for item in launches):
        choices = [_peer(target, contest, item) for item in launches if item.call == call]
        yield min(choices, key=lambda row: (bool(row.error), row.predicted_us))


def _peer(target: str, contest: Contest, item: Captured) -> Row:
    name, tiles = item.launch.kernel.__name__.strip("_"), tiles_in_words(item.launch)
    try:
        program = program_of(item.launch, item.arrays, get_target(target), item.integers)
        size = memory_bytes(item) * (2 if contest.in_place else 1)
        program = replace(program, name=name, tiles=tiles, memory_bytes=size)
        issue = predict_program(program, GPUS[target])
    except (IssueError, RuntimeError) as error:
        return Row(target, contest.name, contest.peer, name, tiles, error=_first(error))
    return _row(target, contest, contest.peer, issue)


def _row(target: str, contest: Contest, contestant: str, issue: Issue) -> Row:
    return Row(
        target=target,
        contest=contest.name,
        contestant=contestant,
        kernel=issue.program.partition(" →")[0],
        tiles=issue.tiles.replace("_", " "),
        predicted_us=round(issue.microseconds, 1),
        tensor_issue=round(issue.tensor_issue, 3),
        tensor_busy=round(issue.tensor_share, 2),
        registers=issue.registers,
        spills=issue.spills,
        shared=issue.shared,
        programs=issue.resident.programs,
        occupancy=round(issue.resident.share, 2),
        limit=issue.limit,
    )


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def write_csv(found: Sequence[Row], path: Path) -> None:
    """One line a kernel."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in found)


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote."""
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(file)
        ]


def tables(found: Sequence[Row]) -> str:
    """The page's tables: who is predicted to be faster, then every kernel."""
    parts = [_summary(found)]
    for target in dict.fromkeys(row.target for row in found):
        mine = [row for row in found if row.target == target]
        gpu = GPUS[target]
        note = "" if gpu.measured else " The times are unchecked: nobody compared this chip with the model."
        parts.append(f"### {target}, {gpu.product}\n\n{_kernels(mine)}\n\n{note}".rstrip())
    return "\n\n".join(parts)


def _summary(found: Sequence[Row]) -> str:
    lines = ["| chip | call | ours µs | peer | its µs | ours / peer | spills, ours | spills, peer |"]
    lines.append("|---|---|--:|---|--:|--:|--:|--:|")
    for target, contest in dict.fromkeys((row.target, row.contest) for row in found):
        sides: Mapping[bool, list[Row]] = {
            ours: [r for r in found if (r.target, r.contest, r.contestant == OURS) == (target, contest, ours)]
            for ours in (True, False)
        }
        times = {ours: sum(row.predicted_us for row in side) for ours, side in sides.items()}
        spills = {ours: sum(row.spills for row in side) for ours, side in sides.items()}
        whole = all(side and not any(row.error for row in side) for side in sides.values())
        ratio = times[True] / times[False] if whole and times[False] else 0.0
        shown = {
            ours: f"{times[ours]:,.0f}" if side and not any(row.error for row in side) else "none"
            for ours, side in sides.items()
        }
        text = "" if not ratio else f"{ratio:.2f}" if ratio <= 1 else f"**{ratio:.2f}**"
        peer = sides[False][0].contestant if sides[False] else ""
        lines.append(
            f"| {target} | {contest} | {shown[True]} | {peer} | {shown[False]} | {text} "
            f"| {spills[True]} | {spills[False]} |"
        )
    return "\n".join(lines)


def _kernels(found: Sequence[Row]) -> str:
    lines = [
        "| call | of | kernel | tiles | µs | matrix instructions % | tensor busy % | regs | spills | KiB | resident "
        "| limit |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in found:
        lead = f"| {row.contest} | {row.contestant} | {row.kernel} | {row.tiles} |"
        if row.error:
            lines.append(f"{lead} {row.error} | | | | | | | |")
            continue
        lines.append(
            f"{lead} {row.predicted_us:,.1f} | {100 * row.tensor_issue:.1f} | {100 * row.tensor_busy:.0f} "
            f"| {row.registers} | {row.spills} | {row.shared / 1024:.0f} | {row.programs} "
            f"({100 * row.occupancy:.0f} %) | {row.limit} |"
        )
    return "\n".join(lines)


def write_page(found: Sequence[Row], path: Path) -> None:
    """Put the tables between the page's two marks."""
    write_between(path, BEGIN, END, tables(found))


def main() -> None:
    """Compile and predict every contest on every chip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="where the peers are; without, the page is made of the CSV")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    if options.packages:
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        sys.path.insert(0, str(options.packages))
        found = []
        for target in GPUS:
            for contest in CONTESTS:
                for row in rows(target, contest, options.packages):
                    found.append(row)
                    print(row, flush=True)
                write_csv(found, options.csv)
    if options.page:
        write_page(read_csv(options.csv), options.page)


if __name__ == "__main__":
    main()
