"""Machine code with control words, its loops, and what instructions move and multiply."""

from crosstile.bench.amdgcn import matrix_work as amd_work
from crosstile.bench.amdgcn import parse_amdgcn
from crosstile.bench.loops import find_loops
from crosstile.bench.sass import Instruction, access_bytes, matrix_work, parse_sass

NESTED = """\
Function:kernel
--:-:-:Y:1\tMOV R1, c[0x0][0x28];
LBB0:
--:-:0:-:2\tLDG.E.128 R4, [R2.64];
LBB1:
01:-:-:-:a\tFFMA R8, R4, R5, R8;
--:-:1:-:1\tSYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2;
02:-:-:-:5\t@!P0 BRA LBB2;
LBB3:
--:-:-:-:5\t@P1 BRA LBB1;
--:-:-:-:5\tBRA.U UP0, 0x10;
--:-:-:-:5\tEXIT;
LBB2:
--:-:1:-:2\tSYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2;
02:-:-:-:5\t@!P0 BRA LBB2;
--:-:-:-:5\tBRA LBB3;
"""

AMD = """\
\ts_mov_b32 s0, 0
.LBB0_1:                                ; %loop
\tds_read_b128 v[0:3], v9
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_control_words_and_branches() -> None:
    code = parse_sass(NESTED)
    assert code[1] == Instruction("LDG.E.128", "R4, [R2.64]", stall=2, writes=0)
    assert code[2].waits == (0,)
    assert code[2].stall == 10
    assert code[4].target == 8  # a label
    assert code[6].target == 1  # an address
    assert code[4].falls
    assert not code[7].falls


def test_loops_are_nested_and_a_wait_out_of_line_is_no_part_of_them() -> None:
    tree = find_loops(parse_sass(NESTED))
    outer, inner, spin = tree.flat()
    assert (outer.header, inner.header, spin.header) == (1, 2, 8)
    assert inner.own == [2, 3, 4, 5, 10]
    assert inner.every == {2, 3, 4, 5}  # the way back from the wait is not
    assert outer.own == [1, 6]
    assert tree.own == [0, 7]


def test_what_matrix_instructions_multiply() -> None:
    assert matrix_work(Instruction("HMMA.16816.F32.BF16")) == 16 * 8 * 16
    assert matrix_work(Instruction("HMMA.1688.F32.TF32")) == 16 * 8 * 8
    assert 4 * matrix_work(Instruction("HGMMA.64x128x16.F32.BF16")) == 64 * 128 * 16
    assert matrix_work(Instruction("FFMA")) == 0


def test_bytes_of_a_warp() -> None:
    assert access_bytes(Instruction("LDG.E.128")) == 512
    assert access_bytes(Instruction("LDS")) == 128
    assert access_bytes(Instruction("LDSM.16.M88.4")) == 512
    assert access_bytes(Instruction("STS.U8")) == 32


def test_amd_assembly() -> None:
    code = parse_amdgcn(AMD)
    [loop] = find_loops(code).flat()
    assert loop.own == [1, 2, 3]
    assert amd_work(code[2]) == 32 * 32 * 8
    assert not code[4].falls
