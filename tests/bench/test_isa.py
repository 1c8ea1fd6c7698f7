"""The readers of machine code, on short pieces of it."""

from crosstile.bench.isa import read_amdgcn, read_sass

SASS = """\
Function:kernel
--:-:-:Y:1\tMOV R1, c[0x0][0x28];
--:-:0:-:2\tLDGSTS.E.BYPASS.128 [R131], [R2.64];
--:-:-:-:4\tWARPGROUP.ARRIVE;
--:-:-:-:0\t@!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT;
--:-:-:-:0\tHGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24;
--:-:-:-:1\tUTMALDG.2D [UR8], [UR4];
--:-:-:-:1\tSTL.64 [R1+0x8], R30;
--:-:-:-:1\t@P1 LDL R40, [R1+0x8];
--:-:-:-:5\tEXIT;
"""

AMDGCN = """\
\tv_mov_b32_e32 v1, 0
\tbuffer_load_dwordx4 v[2:5], v1, s[0:3], 0 offen
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\ts_endpgm
amdhsa.kernels:
  - .agpr_count:     16
    .private_segment_fixed_size: 24
    .sgpr_count:     40
    .sgpr_spill_count: 2
    .vgpr_count:     84
    .vgpr_spill_count: 5
"""


def test_sass_counts_matrix_instructions_spills_and_registers() -> None:
    code = read_sass(SASS)
    assert code.matrix == {"HGMMA": 2}
    assert code.spills == 2
    assert code.registers == 132
    assert code.instructions == 9
    assert code.notes == {"tma": 1, "async_copies": 1}


def test_sass_names_each_generation_of_tensor_cores() -> None:
    for instruction in ("HMMA.16816.F32", "HGMMA.64x64x16.F32", "UTCHMMA.2CTA", "UTCQMMA", "IMMA.16832.S8.S8"):
        assert sum(read_sass(f"-\t{instruction} R0, R1;").matrix.values()) == 1
    assert read_sass("-\tFFMA R0, R1, R2, R3;\n-\tUTCBAR R0;").matrix == {}


def test_amdgcn_reads_metadata() -> None:
    code = read_amdgcn(AMDGCN)
    assert code.matrix == {"v_mfma_f32_32x32x8_bf16": 2}
    assert code.spills == 7
    assert code.registers == 84
    assert code.local_bytes == 24
    assert code.instructions == 5
    assert code.notes == {"accumulation_registers": 16, "scalar_registers": 40, "scalar_register_spills": 2}
