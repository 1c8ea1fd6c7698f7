"""Reading what the TPU compiler dumps: the final VLIW schedule of each Pallas kernel, and its VMEM.

`--xla_jf_dump_to` writes files named `<time>-<HLO instruction>-<step>-<what>.txt`; only those of the final steps are
asked for, as all seventy of a kernel take longer than compiling it. Read are the schedule's length
(`schedule-analysis_final_bundles`), its use of each unit (`final_hlo-static-per-bundle-utilization`), the program as
text (`final_bundles`), and the module's `vmem_report.html`, whose data is JSON.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"

_ANALYSIS = re.compile(r"(\d+)-(.+)-\d+-schedule-analysis_final_bundles\.txt")
_MATMUL = re.compile(r"\bvmatmul(?:\.(?:msk|mubr))*\.(\w+)")
_SCALAR_SPILL = re.compile(r"\[smem:\[#allocation\w*_spill\]\]")


class DumpError(RuntimeError):
    """The compiler's dump is not as this version of the reader knows it."""


@dataclass(frozen=True)
class Schedule:
    """One Pallas kernel's program.

    Attributes:
        name: given in `pallas_call(name=...)`.
        bundles: VLIW bundles, one a cycle, counted once whatever the trip counts.
        units: slots that the bundles fill, by unit; `VLOAD:FILL` and `VSTORE:SPILL` are vectors that did not fit.
        matrix: products by dtype, such as `{"vmatmul.bf16": 512}`.
        vmem: bytes of windows, scratch and spills.
        scalar_spills: scalars kept in SMEM; loop counters of a deep grid, at one slot each, and no sign of trouble.
    """

    name: str
    bundles: int
    units: dict[str, int]
    matrix: dict[str, int]
    vmem: int
    scalar_spills: int

    @property
    def vector_spills(self) -> int:
        return self.units.get("VLOAD:FILL", 0) + self.units.get("VSTORE:SPILL", 0)


def read_dump(folder: Path) -> tuple[Schedule, ...]:
    """The Pallas kernels of the programs compiled since the folder was empty, in the order of compilation."""
    vmem = _vmem(folder)
    found = []
    for path in sorted(folder.glob("*-schedule-analysis_final_bundles.txt")):
        match = _ANALYSIS.fullmatch(path.name)
        text = path.read_text(errors="replace")
        if match and 'custom_call_target="tpu_custom_call"' in text and match.group(2) != "TLP":
            found.append(_schedule(folder, match.group(1), match.group(2), text, vmem))
    return tuple(found)


def _schedule(folder: Path, stamp: str, instruction: str, analysis: str, vmem: dict[str, int]) -> Schedule:
    total = re.search(r"total scheduled bundles:\s*(\d+)", analysis)
    if total is None:
        raise DumpError(f"no bundle count in the schedule analysis of {instruction}")
    program = _only(folder, stamp, instruction, "final_bundles.txt").read_text(errors="replace")
    usage = _only(folder, stamp, instruction, "final_hlo-static-per-bundle-utilization.txt").read_text()
    return Schedule(
        name=re.sub(r"\.\d+$", "", instruction),
        bundles=int(total.group(1)),
        units=_units(usage),
        matrix=dict(Counter(f"vmatmul.{dtype}" for dtype in _MATMUL.findall(program))),
        vmem=vmem.get(instruction, 0),
        scalar_spills=len(_SCALAR_SPILL.findall(program)),
    )


def _only(folder: Path, stamp: str, instruction: str, what: str) -> Path:
    prefix = f"{stamp}-{instruction}-"
    found = [
        path for path in folder.iterdir() if re.fullmatch(re.escape(prefix) + r"\d+-" + re.escape(what), path.name)
    ]
    if len(found) != 1:
        raise DumpError(f"expected one {prefix}*-{what} in the compiler's dump, found {len(found)}")
    return found[0]


def _units(text: str) -> dict[str, int]:
    """The table's second line names the units; the rows after `== UTILIZATION` are the bundles."""
    head, _, body = text.partition("== UTILIZATION:")
    lines = head.splitlines()
    if len(lines) < 2 or not body:
        raise DumpError("the utilization table has no heading")
    names = [name.strip() for name in lines[1].split(",")]
    rows = [list(map(int, line.split())) for line in body.splitlines() if line.strip()]
    return {name: sum(row[at] for row in rows) for at, name in enumerate(names)}


def _vmem(folder: Path) -> dict[str, int]:
    """VMEM bytes by HLO instruction, from every report in the folder."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*vmem_report.html"):
        text = path.read_text(errors="replace")
        start = text.find("const DATA")
        if start < 0:
            raise DumpError("the VMEM report holds no data")
        data, _ = json.JSONDecoder().raw_decode(text, text.index("{", start))
        sizes |= {name: entry["total_size"] for name, entry in data["hlo_breakdowns"].items()}
    return sizes
