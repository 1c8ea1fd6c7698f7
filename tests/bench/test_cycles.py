"""The cycle model, on programs small enough to count by hand, and on a real kernel."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from crosstile.bench import cycles as cycles_module
from crosstile.bench import machine as machine_module
from crosstile.bench import scalars
from crosstile.bench.bundles import BundleError, parse_bundles
from crosstile.bench.cores import CORES
from crosstile.bench.cycles import COMPILER, WAITING, CyclesError, predict
from crosstile.bench.dma import DeadlockError, Memory, Queue
from crosstile.bench.dumping import changed_tiles, stand_ins
from crosstile.bench.machine import Delay, Machine, MachineError
from crosstile.bench.matrix import MatrixUnits
from crosstile.bench.programs import Job
from crosstile.bench.scalars import ScalarError
from crosstile.bench.shapes import SHAPES, get_shape
from crosstile.bench.steering import known_results, steering
from crosstile.bench.validation import Pair, agreement, compare, rank_correlation, read_csv, show
from crosstile.kernels.tiles.targets import TARGETS

MEMORY = Memory(bytes_a_cycle=64, latency=100, on_chip_bytes_a_cycle=64)


def bundles(*lines):
    """The text of a dump: `LB:`, the bundle's content, and a comment behind it, of each."""
    rows = []
    for at, line in enumerate(lines):
        kind, _, rest = line.rpartition("| ")
        content, _, comment = rest.partition(" # ")
        address = "0" if at == 0 else f"{at:#x}"
        rows.append(f" {address:>6} {kind or '  '}: > {{ {content} }}" + (f" /* {comment} */" if comment else ""))
    return parse_bundles("= control target key start\nLB: loop body\n\n" + "\n".join(rows) + "\n")


# A counter goes from 0 to 5; the body is bundles 1 to 8, of which four stand behind the branch.
LOOP = (
    "%s1_s3 = smov 0 /* copy */",
    "LB| %s2_s3 = sphi %s1_s3, %s3_s3 # Start region 7",
    "%s3_s3 = sadd.s32 1, %s2_s3",
    "%p4_p1 = scmp.ge.s32.totalorder %s3_s3, 5",
    "%5 = sbr.rel (!%p4_p1) target = $region7  ;;  %v6_v1 = vadd.f32 %v7_v0, %v7_v0",
    "",
    "",
    "",
    " # End region 7",
    "%9 = vst [vmem:[#allocation2]] sm:$0xff %v6_v1",
)


def test_a_loop_takes_its_bundles_times_its_trips():
    run = Machine(bundles(*LOOP), Delay(4)).run(MEMORY)
    assert run.cycles == 1 + 5 * 8 + 1
    assert run.visits == {0: 1, 1: 5, 9: 1}
    assert run.unknown == 0


def test_fewer_bundles_run_behind_the_branch_of_a_v4():
    program = bundles(*LOOP[:5], " # End region 7", LOOP[9])
    assert Machine(program, Delay(1)).run(MEMORY).cycles == 1 + 5 * 5 + 1


def test_one_empty_bundle_may_stand_for_a_whole_delay():
    program = bundles(*LOOP[:5], "", "%9 = vst %v6_v1 # Start region 8")
    assert Machine(program, Delay(6, packed=True)).run(MEMORY).cycles == 1 + 5 * (4 + 6) + 1


def test_an_empty_bundle_may_stand_for_some_of_a_delay_before_the_bundles_that_end_it():
    moved = ("", "%s8_s3 = smov %s3_s4", " # End region 7", "%9 = vst %v6_v1")  # what the next trip counts on
    loop = (line.replace("%s3_s3 =", "%s3_s4 =").replace("%s3_s3,", "%s3_s4,") for line in LOOP[2:5])
    program = bundles(LOOP[0], LOOP[1].replace("%s3_s3", "%s8_s3"), *loop, *moved)
    assert Machine(program, Delay(6, packed=True)).run(MEMORY).cycles == 1 + 5 * (4 + 6) + 1


def test_a_branch_not_taken_falls_through_and_one_without_a_region_ends():
    skip = ("%p1_p0 = scmp.eq.s32.totalorder {}, 1", "%2 = sbr.rel (%p1_p0) target = $region9", "", "%3 = vmov 0")
    for value, cycles in ((0, 4), (1, 3)):
        program = bundles(*(line.format(value) for line in skip))
        assert Machine(program, Delay(1)).run(MEMORY).cycles == cycles


def test_reads_of_a_bundle_come_before_its_writes():
    program = bundles(
        "%s1_s0 = smov 3  ;;  %s2_s1 = smov 4",
        "%s3_s0 = smov %s2_s1  ;;  %s4_s1 = smov %s1_s0",  # exchange
        "%p5_p0 = scmp.lt.s32.totalorder %s3_s0, %s4_s1  ;;  %s6_s2 = ssub.s32 %s4_s1, %s3_s0",
        "%7 = sbr.rel (%p5_p0) target = $region9",
        "",
        "%p8_p0 = scmp.lt.s32.totalorder %s6_s2, 0",  # -1, not 2**32 - 1
        "%9 = sbr.rel (%p8_p0) target = $region9",
        "",
        "%10 = vmov 0",
    )
    assert Machine(program, Delay(1)).run(MEMORY).cycles == 8


def test_a_guard_and_a_selection_keep_what_was_there():
    program = bundles(
        "%s1_s0 = smov 1  ;;  %p2_p0 = scmp.eq.s32.totalorder 0, 1",
        "%s3_s1 = smov (%p2_p0, %s1_s0), 0  ;;  %s4_s0 = sadd.s32 (%p2_p0), 5, %s1_s0",
        "%p5_p1 = scmp.eq.s32.totalorder %s3_s1, %s4_s0",
        "%6 = sbr.rel (!%p5_p1) target = $region9",
        "",
        "%7 = vmov 0",
    )
    assert Machine(program, Delay(1)).run(MEMORY).cycles == 6  # the old 1 against the guarded 1


COPY = (
    "%1 = dma.hbm_to_vmem {}/*hbm=*/%s0_s0, /*size_in_granules=*/64, /*vmem=*/%s1_s1, "
    "/*dst_syncflagno=*/[#allocation3]{}",
    "%2 = dma.done.wait [#allocation3 + {}], 64",
    "%3 = vsyncadd [#allocation3], 4294967232",
    "%4 = vmov 0",
)


def copies(*fields):
    return bundles(*(line.format(*fields) if "{}" in line else line for line in COPY))


def test_a_wait_ends_when_the_bytes_and_the_latency_have_passed():
    program = bundles(COPY[0].format("", ""), COPY[1].format("$0x0"), *COPY[2:])
    run = Machine(program, Delay(4)).run(MEMORY)
    assert run.waits == {1: 64 * 32 / 64 + 100 - 1}
    assert run.cycles == 4 + run.waits[1]
    assert run.bytes_moved == 2048
    assert run.memory_busy == 32


def test_copies_queue_one_behind_the_other():
    copy = COPY[0].format("", "")
    program = bundles(copy, copy, "%9 = dma.done.wait [#allocation3], 128")
    assert Machine(program, Delay(4)).run(MEMORY).cycles == 2 * 32 + 100 + 1


def test_a_wait_for_nothing_is_said():
    program = bundles(COPY[0].format("(0), ", ""), COPY[1].format("$0x0"))
    with pytest.raises(DeadlockError, match="waits for 64 granules"):
        Machine(program, Delay(4)).run(MEMORY)
    program = bundles(COPY[0].format("", ""), COPY[1].format("$0x1"))
    with pytest.raises(DeadlockError, match="no copy"):
        Machine(program, Delay(4)).run(MEMORY)


def test_what_neighbours_copy_is_there_when_it_is_asked_for():
    program = bundles(COPY[0].format("", ""), COPY[1].format("$0x1"), *COPY[2:])
    run = Machine(program, Delay(4)).run(MEMORY, neighbours=True)
    assert (run.cycles, run.waits) == (4, {})
    own = bundles(COPY[0].format("", ""), COPY[1].format("$0x0"), *COPY[2:])
    assert Machine(own, Delay(4)).run(MEMORY, neighbours=True).cycles == Machine(own, Delay(4)).run(MEMORY).cycles


def test_the_high_half_of_a_product():
    program = bundles(
        "%s1_s0 = smov 2863311531",  # by which a compiler divides by 3
        "%s2_s1 = smulhi.u32 21, %s1_s0",
        "%p3_p0 = scmp.eq.s32.totalorder %s2_s1, 14",
        "%4 = sbr.rel (%p3_p0) target = $region9",
        "",
        "%5 = vmov 0",
    )
    assert Machine(program, Delay(1)).run(MEMORY).cycles == 5


def test_prefetched_words_steer():
    program = bundles(
        "%s1_s0 = inlined_call_operand.vmem [shape: s32[3], index: 2, kind: input, shape index: {}]  ;;  "
        "%s2_s1 = smov [#allocation4]",
        "%s3_s0 = sshll.u32 %s1_s0, 4  ;;  %s4_s0 = int_to_ptr.vmem [resolvable:$true] %s3_s0",
        "%5 = dma.vmem_to_smem /*vmem=*/%s4_s0, /*size_in_granules=*/16, /*smem=*/%s2_s1, "
        "/*dst_syncflagno=*/[#allocation3]",
        "%6 = dma.done.wait [#allocation3], 16",
        "%s7_s3 = smov 0",
        "LB| %s8_s3 = sphi %s7_s3, %s10_s3  ;;  %s9_s4 = sld [smem:[#allocation4 + $0x1]] # Start region 7",
        "%s10_s3 = sadd.s32 1, %s8_s3",
        "%p11_p0 = scmp.ge.s32.totalorder %s10_s3, %s9_s4",
        "%12 = sbr.rel (!%p11_p0) target = $region7",
        " # End region 7",
    )
    waits = 16 * 32 / 64 - 1
    for trips in (3, 11):
        run = Machine(program, Delay(1)).run(MEMORY, {2: [99, trips, 99]})
        assert (run.cycles, run.unknown) == (5 + waits + 5 * trips, 0)
    assert Machine(program, Delay(1)).run(MEMORY).unknown > 0


def test_a_value_of_the_vector_half_is_taken_for_zero_and_counted():
    program = bundles(
        "%1 = vpush %v1_v1",
        "%s2_s0 = spop %1",
        "%p3_p0 = scmp.eq.s32.totalorder %s2_s0, 0",
        "%4 = sbr.rel (%p3_p0) target = $region9",
        "",
        "%5 = vmov 0",
    )
    run = Machine(program, Delay(1)).run(MEMORY)
    assert (run.cycles, run.unknown) == (5, 1)


def test_words_come_from_hbm_without_a_shift_too():
    program = bundles(
        "%s1_s0 = inlined_call_operand.hbm [shape: s32[3], index: 2, kind: input, shape index: {}]",
        "%2 = dma.hbm_to_smem /*hbm=*/%s1_s0, /*size_in_granules=*/16, /*smem=*/[#allocation4], "
        "/*dst_syncflagno=*/[#allocation3]",
        "%s3_s1 = sld [smem:[#allocation4 + $0x2]]",
        "%p4_p0 = scmp.eq.s32.totalorder %s3_s1, 7",
        "%5 = sbr.rel (%p4_p0) target = $region9",
        "",
        "%6 = vmov 0",
    )
    assert Machine(program, Delay(1)).run(MEMORY, {2: [0, 0, 7]}).cycles == 6


def test_matrix_units_hold_back_a_stretch_that_asks_too_much():
    products = [f"%{at} = vmatmul.bf16.gmra.mxu{at % 2} %v1_v1" for at in range(6)]
    program = bundles(*products)
    units = MatrixUnits(count=2, rows_a_cycle=1, narrow_rows_a_cycle=2)
    machine = Machine(program, Delay(4), lambda first, end: units.stalls(program, first, end))
    assert machine.run(MEMORY).cycles == 3 * 16
    wide = MatrixUnits(count=2, rows_a_cycle=2, narrow_rows_a_cycle=4)
    assert max(wide.work(program, 0, 6).values()) == 3 * 8
    assert MatrixUnits(2, 1, 2).work(bundles("%1 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mrb[0].mxu0 %v1_v1"), 0, 1) == {
        "0": 16
    }
    kept = bundles("%1 = vmatmul.lmr.bf16.vlgmr.msra.gmra.16.mxu0", "%2 = vmatmul.lmr.bf16.gmra.16.mxu0")
    assert MatrixUnits(2, 1, 2).work(kept, 0, 2) == {"0": 16}


def test_what_is_not_known_is_said():
    with pytest.raises(ScalarError, match=r"sfrob\.s32"):
        Machine(bundles("%s1_s0 = sfrob.s32 1, 2", "%2 = vsyncadd [#allocation1], %s1_s0"), Delay(4)).run(MEMORY)
    with pytest.raises(BundleError, match="holds no bundle"):
        parse_bundles("nothing")
    with pytest.raises(BundleError, match="are missing"):
        parse_bundles("  0x4   :  { %1 = vmov 0 }\n")
    branch = "%1 = sbr.rel target = $region1"
    with pytest.raises(MachineError, match="in the delay slots"):
        Machine(bundles(branch, branch, ""), Delay(4)).run(MEMORY)


def test_a_program_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr(machine_module, "MOST_STRETCHES", 100)
    with pytest.raises(MachineError, match="no end after 100"):
        Machine(bundles("%1 = sbr.rel target = $region1 # Start region 1", ""), Delay(1)).run(MEMORY)


BREAKS = {
    "a delay slot too few": lambda patch: patch.setattr(Delay, "after", lambda self, program, at: at + self.cycles),
    "no value computed": lambda patch: patch.setattr(machine_module, "needed_values", lambda program: set()),
    "another comparison": lambda patch: patch.setitem(scalars._COMPARISONS, "ge", ">"),
}


@pytest.mark.parametrize("wrong", BREAKS.values(), ids=BREAKS)
def test_broken_machines_miscount_the_loop(monkeypatch, wrong):
    wrong(monkeypatch)
    monkeypatch.setattr(machine_module, "MOST_STRETCHES", 100)
    try:
        cycles = Machine(bundles(*LOOP), Delay(4)).run(MEMORY).cycles
    except MachineError:
        return
    assert cycles != 1 + 5 * 8 + 1


def test_a_machine_that_never_waits_is_caught(monkeypatch):
    monkeypatch.setattr(Queue, "wait", lambda self, flag, granules, now: now)
    with pytest.raises(AssertionError):
        test_a_wait_ends_when_the_bytes_and_the_latency_have_passed()


@pytest.mark.parametrize("name", [name for name in CORES if name != "v7x"])  # its clock is fitted
def test_constants_agree_with_the_published_peak(name):
    core, target = CORES[name], TARGETS[name]
    products = core.matrix.count * core.matrix.rows_a_cycle * target.matrix_unit**2
    assert 2 * products * core.clock == pytest.approx(target.bf16_tflops * 1e12, rel=0.005)


def test_what_steers_is_computed_through_calls():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(starts, x, out):
        out[...] = x[...] + starts[pl.program_id(0)]

    @jax.jit
    def called(sizes, x):
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(3,),
            in_specs=[pl.BlockSpec((8, 128), lambda i, starts: (starts[i], 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, starts: (i, 0)),
        )
        shape = jax.ShapeDtypeStruct((24, 128), jnp.float32)
        return pl.pallas_call(kernel, grid_spec=spec, out_shape=shape, name="moved")(jnp.cumsum(sizes), x * 2)

    x = jax.ShapeDtypeStruct((24, 128), jnp.float32)
    program = jax.make_jaxpr(lambda sizes, x: (called(sizes, x), sizes + 1))(jnp.arange(3, dtype=jnp.int32), x)
    sizes = np.array([0, 1, 1], np.int32)
    assert steering(program, (sizes, x)) == [("moved", {0: [0, 1, 2]})]
    out, more = known_results(program, (sizes, x))
    assert out is None
    assert np.array_equal(more, [1, 2, 2])


def test_a_kernel_on_many_devices_is_steered_by_what_the_first_has():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.sharding import AbstractMesh, PartitionSpec

    mesh = AbstractMesh((2, 2), ("rows", "others"))

    def kernel(lengths, at, out):
        out[...] = lengths[...] + at[...]

    def of_one(lengths):
        at = jnp.broadcast_to(jax.lax.axis_index("rows"), lengths.shape)
        total = jax.lax.psum(lengths, "others")  # nobody here knows what the others have
        return (
            pl.pallas_call(kernel, jax.ShapeDtypeStruct(lengths.shape, jnp.int32), name="one")(lengths + 1, at) + total
        )

    spread = jax.shard_map(
        of_one, mesh=mesh, in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"), check_vma=False
    )
    program = jax.make_jaxpr(spread)(jnp.zeros(4, jnp.int32))
    assert steering(program, (np.array([5, 6, 7, 8], np.int32),)) == [("one", {0: [6, 7], 1: [0, 0]})]


@pytest.mark.parametrize("name", [shape.name for shape in SHAPES])
def test_every_integer_of_a_named_shape_has_a_value(name):
    shape = get_shape(name)
    values = stand_ins(shape, "bfloat16")
    assert {array: value.shape for array, value in values.items()} == {
        array: size for array, (size, kind) in shape.arrays("bfloat16").items() if kind == "int32"
    }


def test_tiles_change_by_name():
    from crosstile.bench.programs import spec_of
    from crosstile.kernels.attention.tiles import choose_config

    config = choose_config(spec_of(Job("v5e", "attention", "forward", "llama-3-8b", "bfloat16")), TARGETS["v5e"])
    changed = changed_tiles(config, {"forward.block_q": 128})
    assert changed.forward.block_q == 128
    assert changed.dq == config.dq
    for name in ("forward", "forward.block_x", "block_q"):
        with pytest.raises(ValueError, match=r"config: got .*; it must be one of"):
            changed_tiles(config, {name: 1})


def test_agreement_counts_ranks_and_errors():
    pairs = [Pair("v5e", "op", f"{at:x}", predicted, 100.0 * (at + 1)) for at, predicted in enumerate((90, 240, 300))]
    found = agreement([*pairs, Pair("v5e", "op", "f", 0.0, 1.0, "refused")])
    assert (found.count, found.rank) == (3, pytest.approx(1))
    assert found.median == pytest.approx(0.1)
    assert {pair.half for pair in pairs} == {"fitted", "held out"}
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
def test_the_published_pairs_keep_the_bar(chip):
    pairs = read_csv(Path(__file__).parents[2] / "docs" / "cycles_validation.csv")
    found = agreement([pair for pair in pairs if pair.chip == chip and pair.half == "held out"])
    assert found.median <= 0.15
    assert found.rank >= 0.9


needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None or sys.platform != "linux", reason="needs libtpu, the TPU compiler"
)


@needs_libtpu
def test_a_real_matmul_is_near_its_matrix_units_and_its_lines():
    [found, *around] = sorted(
        predict(Job("v5e", "matmul", "forward", "llama-3-8b-gate", "bfloat16")), key=lambda found: not found.kernel
    )
    assert found.kernel
    assert found.unknown == 0
    least = 4096 * 4096 * 14336 / (4 * 128 * 128)  # a row of 128 products in each of four units a cycle
    assert least < found.cycles < 1.25 * least
    assert found.mxu_share == pytest.approx(least / found.cycles, rel=0.01)
    assert found.limit == "MXU"
    assert sum(found.lines.values()) == pytest.approx(found.cycles)
    assert {COMPILER, WAITING} < set(found.lines)
    assert any("kernels/matmul/pallas.py" in line for line in found.lines)
    least_bytes = 2 * (4096 * 4096 + 4096 * 14336 + 4096 * 14336)
    assert least_bytes <= found.bytes_moved < 20 * least_bytes


@needs_libtpu
def test_a_prediction_refuses_what_it_cannot():
    with pytest.raises(CyclesError, match="it must be a TPU"):
        predict(Job("sm_90", "matmul", "forward", "qwen-2.5-7b-qkv", "bfloat16"))
    with pytest.raises(CyclesError, match=r"config: got 'block_x'"):
        predict(Job("v5e", "matmul", "forward", "qwen-2.5-7b-qkv", "bfloat16"), {"block_x": 8})


@needs_libtpu
def test_the_command_prints_and_writes_what_it_predicts(tmp_path):
    from crosstile.bench.cli import app

    file = tmp_path / "predicted.json"
    asked = "cycles --op matmul --target v6e --shape qwen-2.5-7b-qkv --direction forward --lines 2 --config block_m=512"
    result = CliRunner().invoke(app, [*asked.split(), "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "predicted, not measured: v6e matmul forward qwen-2.5-7b-qkv bfloat16" in result.output
    [job] = json.loads(file.read_text())["predicted"]
    assert [program["kernel"] for program in job["programs"]].count(True) == 1
    refused = CliRunner().invoke(app, [*asked.replace("block_m", "block_x").split()])
    assert refused.exit_code == 1
    assert "config: got 'block_x'" in refused.output


def test_the_comparison_reads_entries_and_says_what_it_leaves_out(tmp_path):
    data = {"evaluation_times_ms": [0.002, 0.002, 0.003]}
    for name, error in (("a1", {}), ("b2", {"error": "too new"})):
        folder = tmp_path / "v5e" / name
        folder.mkdir(parents=True)
        record = {"op": "op", "chip": "v5e", "data": data, "steering": [], **error}
        (folder / "entry.json").write_text(json.dumps(record))
        (folder / "1-copy-03-final_bundles.txt").write_text(" 0 : { %1 = vmov 0 }\n")
    [good, bad] = compare(tmp_path)
    assert good.predicted == pytest.approx(1 + 1 / 1500)
    assert good.measured == 2
    assert bad.refused == "too new"
    console = Console(width=160, record=True)
    show([good, bad], console)
    assert "no prediction for 1 of v5e op: too new" in console.export_text()


def test_a_program_that_cannot_be_counted_is_a_refusal(monkeypatch) -> None:
    def compile_nothing(module: str, folder: Path, *_: object) -> None:
        (folder / "steering.json").write_text("[]")

    def count(*_: object) -> None:
        raise DeadlockError("flag 3 waits")

    monkeypatch.setattr(cycles_module, "run_child", compile_nothing)
    monkeypatch.setattr(cycles_module, "predict_dump", count)
    with pytest.raises(CyclesError, match="not counted: DeadlockError: flag 3 waits"):
        cycles_module.predict_child("dumping", {}, "v5e")
