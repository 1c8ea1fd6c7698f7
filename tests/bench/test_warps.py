"""The issue of warps side by side, on code whose pace is known."""

import pytest

from crosstile.bench.gpus import GPUS
from crosstile.bench.occupancy import occupancy
from crosstile.bench.sass import parse_sass
from crosstile.bench.warps import once, pace

H100, A100 = GPUS["sm_90"], GPUS["sm_80"]


def _code(*lines: str):
    return parse_sass("\n".join(line.replace(" ", "\t", 1) for line in lines))


def test_one_warp_issues_by_its_stall_counts() -> None:
    code = _code("--:-:-:-:4 IADD3 R1, R1, R2, RZ", "--:-:-:-:5 BRA UP0")
    assert pace(code, H100, 1, 4).cycles == 9


def test_warps_of_a_partition_hide_each_others_stalls() -> None:
    code = _code("--:-:-:-:4 FFMA R1, R1, R2, R1", "--:-:-:-:4 FFMA R1, R1, R2, R1")
    assert pace(code, H100, 1, 4).cycles == 8
    assert pace(code, H100, 2, 4).cycles == 8
    assert pace(code, H100, 8, 4).cycles == 16  # 8 warps of 2 instructions, one a cycle
    assert pace(code, H100, 8, 4).limit in ("FMA", "issue")


def test_matrix_units_set_the_pace() -> None:
    code = _code(*["--:-:-:-:1 HMMA.16816.F32.BF16 R1, R2, R3, R1"] * 8)
    found = pace(code, A100, 1, 8)
    assert found.cycles == pytest.approx(2 * 8 * 16 * 8 * 16 / 256)
    assert found.limit == "tensor"


def test_a_scoreboard_waits_for_memory() -> None:
    code = _code("--:-:0:-:1 LDG.E R1, [R2]", "01:-:-:-:1 IADD3 R1, R1, R2, RZ")
    assert once(code, H100, 1, 4).cycles > H100.latency
    assert pace(code, H100, 4, 4).cycles < 1.2 * pace(code, H100, 1, 4).cycles


def test_a_barrier_holds_the_fast_until_the_slow_are_there() -> None:
    free = _code("--:-:-:-:1 MUFU.EX2 R1, R1", "--:-:-:-:1 NOP")
    tied = _code("--:-:-:-:1 MUFU.EX2 R1, R1", "--:-:-:-:1 BAR.SYNC.DEFER_BLOCKING 0x0")
    assert pace(tied, H100, 1, 16).cycles > pace(free, H100, 1, 16).cycles


def test_groups_of_products_are_waited_for() -> None:
    product = "--:-:-:-:1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
    waits = _code(product, "--:-:-:-:1 WARPGROUP.DEPBAR.LE gsb0, 0x0", *["--:-:-:-:8 NOP"] * 8)
    ahead = _code(product, "--:-:-:-:1 WARPGROUP.DEPBAR.LE gsb0, 0x1", *["--:-:-:-:8 NOP"] * 8)
    assert pace(ahead, H100, 1, 4).cycles < pace(waits, H100, 1, 4).cycles


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs", "limit"),
    [
        (255, 0, 8, 1, "registers"),
        (32, 100_000, 4, 2, "shared memory"),
        (32, 0, 16, 4, "registers"),
        (32, 300_000, 4, 0, "shared memory"),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, programs: int, limit: str) -> None:
    found = occupancy(H100, registers, shared, warps)
    assert (found.programs, found.limit) == (programs, limit)
