"""Hold the issue model's predictions against times that others measured, of the same kernels compiled here.

tokamax (openxla/tokamax, Apache-2.0) measured whole calls on an A100, an H100 and a B200; `tokamax_triton` has lowered
them to Triton IR. Left out are calls in which XLA computes much beside the kernels; the one product of a gradient of
attention, a sum along the head, is not predicted.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from crosstile.kernels.tiles.targets import get_target

from .gpu import gpu_target, read_compiled
from .gpus import A100_40, GPUS, Gpu
from .issue import IssueError, Program, predict_program
from .validation import Pair, agreement_rows, show_agreement

DEVICES: dict[str, Gpu] = {"a100": A100_40, "h100": GPUS["sm_90"], "b200": GPUS["sm_100"]}
_SMALL = {"iota", "broadcast_in_dim", "concatenate", "slice", "scan", "add", "output_operand_alias", "dot_general"}


@dataclass(frozen=True)
class Measured:
    """A call with its two times; `call` stands for its arguments, `tile` is the product of its blocks."""

    pair: Pair
    call: str
    tile: int


def calls(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The measured calls in a folder of `tokamax_triton` that are no more than their kernels."""
    for entry in sorted(folder.glob("*/*/entry.json")):
        record = json.loads(entry.read_text())
        if "error" not in record and record.get("launches") and not set(record["around"]) - _SMALL:
            yield entry.parent, record


def programs(folder: Path, record: dict[str, Any]) -> list[Program]:
    """The kernels of a call, compiled for the device that it was measured on."""
    import triton

    target = get_target(DEVICES[record["chip"]].target)
    found = []
    for number, launch in enumerate(record["launches"]):
        options = {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]}
        compiled = triton.compile(str(folder / f"{number}.ttir"), target=gpu_target(target), options=options)
        facts = read_compiled(compiled, target)
        found.append(
            Program(
                name=record["op"],
                tiles=record["config"],
                code=compiled.asm["sass"],
                ir=(folder / f"{number}.ttir").read_text(),
                arguments={},
                grid=tuple(launch["grid"]),
                warps=compiled.metadata.num_warps,
                registers=facts.registers,
                shared=compiled.metadata.shared,
                spills=facts.spills,
                memory_bytes=sum(launch["inputs"]) + sum(launch["outputs"]),
                tensor_memory=getattr(compiled.metadata, "tmem_size", 0),
                elements=_groups(record, launch),
            )
        )
    return found


def _groups(record: dict[str, Any], launch: dict[str, Any]) -> Any:
    """Where each group of a ragged product begins and ends, of equal size: the two arrays of 32-bit integers."""
    sizes = json.loads(record["arguments"]).get("group_sizes")
    if not isinstance(sizes, dict):
        return None
    groups, rows = sizes["num_groups"], sizes["total_size"]
    ends = [rows * (group + 1) // groups for group in range(groups)]
    integers = [at for at, size in enumerate(launch["inputs"]) if size == 4 * groups]

    def element(parameter: str, offset: int) -> int | None:
        at = int(parameter.removeprefix("arg"))
        if at not in integers[-2:] or not 0 <= offset < groups:
            return None
        return ends[offset] if at == integers[-1] else ends[offset] - rows // groups

    return element


def compare(folder: Path) -> list[Measured]:
    """Each measured call with its prediction; those without one have the reason in `refused`."""
    return [measure(place.name, record, _predicted(place, record)) for place, record in calls(folder)]


def _predicted(place: Path, record: dict[str, Any]) -> tuple[float, str]:
    try:
        issues = [predict_program(program, DEVICES[record["chip"]]) for program in programs(place, record)]
    except (IssueError, RuntimeError) as error:
        return 0.0, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return sum(issue.microseconds for issue in issues), ""


def measure(name: str, record: dict[str, Any], predicted: tuple[float, str]) -> Measured:
    """A call of tokamax's with its prediction."""
    time = median(record["data"]["evaluation_times_ms"]) * 1000
    pair = Pair(record["chip"], record["op"], name, predicted[0], time, predicted[1])
    blocks = [size for key, size in json.loads(record["config"]).items() if key.startswith("block_") and size]
    return Measured(pair, hashlib.sha256(record["arguments"].encode()).hexdigest()[:12], prod(blocks))


def ranking(found: Sequence[Measured]) -> tuple[int, int, int]:
    """Of pairs of tiles of one call whose times differ by 3 %: how many, and in how many the model and the larger tile
    name the faster."""
    by_call: defaultdict[tuple[str, str, str], list[Measured]] = defaultdict(list)
    for item in found:
        if not item.pair.refused:
            by_call[item.pair.chip, item.pair.op, item.call].append(item)
    pairs = model = larger = 0
    for group in by_call.values():
        for first, second in combinations(group, 2):
            gain = first.pair.measured / second.pair.measured
            if abs(gain - 1) < 0.03:
                continue
            pairs += 1
            model += (first.pair.predicted < second.pair.predicted) == (gain < 1)
            larger += (first.tile > second.tile) == (gain < 1)
    return pairs, model, larger


def groups(found: Sequence[Measured]) -> Iterator[tuple[str, str, list[Pair]]]:
    """The pairs by chip, then by chip and op."""
    pairs = [item.pair for item in found if not item.pair.refused]
    for chip in dict.fromkeys(pair.chip for pair in pairs):
        mine = [pair for pair in pairs if pair.chip == chip]
        yield chip, "all", mine
        for op in sorted({pair.op for pair in mine}):
            yield chip, op.removeprefix("pallas_triton_"), [pair for pair in mine if pair.op == op]


def table_rows(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    """The cells of the table, as `validation.agreement_rows` has them."""
    return agreement_rows(groups(found), digits=0)


def show(found: Sequence[Measured], console: Console) -> None:
    """The table, how often tiles are ranked right, and every reason why there is no prediction."""
    show_agreement("predicted by the issue model, measured by others", table_rows(found), console)
    pairs, model, larger = ranking(found)
    console.print(f"of {pairs} pairs of tiles of one call the model ranks {model} right, the larger tile {larger}")
    for reason, count in Counter(item.pair.refused for item in found if item.pair.refused).items():
        console.print(f"no prediction for {count}: {reason}", highlight=False, soft_wrap=True)


def read_csv(path: Path) -> list[Measured]:
    """What `write_csv` wrote."""
    found = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            pair = Pair(line["chip"], line["op"], line["name"], float(line["predicted_us"]), float(line["measured_us"]))
            found.append(Measured(pair, line["call"], int(line["tile"])))
    return found


def write_csv(found: Sequence[Measured], path: Path) -> None:
    """One line a call that has a prediction."""
    lines = ["chip,op,name,call,tile,predicted_us,measured_us"]
    for item in found:
        pair = item.pair
        if not pair.refused:
            lead = f"{pair.chip},{pair.op},{pair.name},{item.call},{item.tile}"
            lines.append(f"{lead},{pair.predicted:.1f},{pair.measured:.1f}")
    path.write_text("\n".join(lines) + "\n")
