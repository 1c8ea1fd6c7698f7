"""The reader of libtpu's dump, on a small one."""

from pathlib import Path

import pytest

from crosstile.bench.llo import DumpError, read_dump

ANALYSIS = """Schedule analysis:
\ttotal scheduled bundles:    42
\t42.00 scheduled bundles: %forward.3 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"
"""
USAGE = """== CAPACTIY:
MXU, VALU, VLOAD:FILL, VSTORE:SPILL
   4    4           3            1
== UTILIZATION:
1 0 0 0
2 1 1 0
0 1 0 1
"""
PROGRAM = """
 0x1 : { %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v0 ;; %v2 = vmatmul.msk.f32.vlgmr.msra.gmra.mxu1 %v0 }
 0x2 : { %v3 = vmatmul.mubr.msk.bf16.gmra.mrb %v0 ;; %9 = sst [smem:[#allocation12_spill]] %s3 }
"""
VMEM = 'x <script>const DATA ={"hlo_breakdowns": {"forward.3": {"total_size": 4096}}}; const heading = {};</script>'


def dump(folder: Path, **changes: str) -> Path:
    files = {
        "71-schedule-analysis_final_bundles.txt": ANALYSIS,
        "70-final_hlo-static-per-bundle-utilization.txt": USAGE,
        "72-final_bundles.txt": PROGRAM,
    }
    for name, text in files.items():
        kind = "analysis" if "analysis" in name else "usage" if "utilization" in name else "program"
        (folder / f"123-forward.3-{name}").write_text(changes.get(kind, text))
    (folder / "123-fusion-71-schedule-analysis_final_bundles.txt").write_text(
        ANALYSIS.replace("custom_call_target", "")
    )
    (folder / "123-TLP-83-vmem_report.html").write_text(changes.get("vmem", VMEM))
    return folder


def test_it_reads_bundles_units_products_and_memory(tmp_path: Path) -> None:
    [schedule] = read_dump(dump(tmp_path))
    assert schedule.name == "forward"
    assert schedule.bundles == 42
    assert schedule.units == {"MXU": 3, "VALU": 2, "VLOAD:FILL": 1, "VSTORE:SPILL": 1}
    assert schedule.vector_spills == 2
    assert schedule.scalar_spills == 1
    assert schedule.matrix == {"vmatmul.bf16": 2, "vmatmul.f32": 1}
    assert schedule.vmem == 4096


@pytest.mark.parametrize(
    "change", [{"analysis": ANALYSIS.replace("total", "all")}, {"usage": "new format"}, {"vmem": ""}]
)
def test_a_dump_of_another_form_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(DumpError):
        read_dump(dump(tmp_path, **change))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    next(dump(tmp_path).glob("*-72-final_bundles.txt")).unlink()
    with pytest.raises(DumpError, match="found 0"):
        read_dump(tmp_path)
