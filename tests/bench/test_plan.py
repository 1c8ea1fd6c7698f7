from __future__ import annotations

import numpy as np
import pytest

from crosstile.bench.hlo import HloError, array_bytes, exchanged_bytes, parse, replica_groups
from crosstile.bench.ici import pod, seconds, span
from crosstile.bench.plan import Plan, PlanError, _refused, search
from crosstile.bench.plan_asked import Asked
from crosstile.bench.plan_estimate import estimate
from crosstile.bench.plan_report import facts, line
from crosstile.bench.published import PUBLISHED, published
from crosstile.bench.timeline import COPIES, KERNELS, LINKS, PRODUCTS, REST, Timeline, replay
from crosstile.models.known import MODELS, known
from crosstile.models.remat import POLICIES
from crosstile.models.sharding import Parallel

START = 'custom_call_target="AsyncCollectiveStart"'
PAIRS = "replica_groups={{0,1},{2,3}}"
GROUPS = "replica_groups=mesh['a'=1,'b'=4] {'b'}"
MODULE = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{()->f32[8]{{0}}}}

%product (p.0: bf16[8,8]) -> f32[8,8] {{
  %p.0 = bf16[8,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %convolution.1 = f32[8,8]{{1,0}} convolution(%p.0, %p.0), dim_labels=bf_io->bf
}}

%gather_start (p.1: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {{
  %p.1 = bf16[2,8]{{1,0}} parameter(0)
  %all-gather.1 = bf16[8,8]{{1,0}} all-gather(%p.1), channel_id=7, {GROUPS}, dimensions={{0}}
  ROOT %custom-call.1 = (bf16[2,8]{{1,0}}, bf16[8,8]{{1,0}}) custom-call(%all-gather.1), {START}
}}

%gather_step (p.2: bf16[8,8]) -> f32[8,8] {{
  %p.2 = bf16[8,8]{{1,0}} parameter(0)
  %all-gather.2 = bf16[8,8]{{1,0}} all-gather(%p.2), channel_id=7, {GROUPS}, dimensions={{0}}
  ROOT %convolution.2 = f32[8,8]{{1,0}} convolution(%p.2, %all-gather.2), dim_labels=bf_io->bf
}}

%gather_done (p.3: bf16[8,8]) -> bf16[8,8] {{
  %p.3 = bf16[8,8]{{1,0}} parameter(0)
  %all-gather.3 = bf16[8,8]{{1,0}} all-gather(%p.3), channel_id=7, {GROUPS}, dimensions={{0}}
  ROOT %custom-call.2 = bf16[8,8]{{1,0}} custom-call(%p.3, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}

%body (arg.0: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {{
  %arg.0 = (s32[]{{:T(128)}}, bf16[8,8]{{1,0}}) parameter(0)
  %start.1 = (bf16[2,8]{{1,0}}, bf16[8,8]{{1,0}}) fusion(%arg.0), kind=kCustom, calls=%gather_start
  %product.1 = f32[8,8]{{1,0}} fusion(%start.1), kind=kOutput, calls=%gather_step
  %attention_forward.1 = f32[8,8]{{1,0}} custom-call(%product.1), custom_call_target="tpu_custom_call"
  %done.1 = bf16[8,8]{{1,0}} fusion(%start.1), kind=kCustom, calls=%gather_done
  %product.2 = f32[8,8]{{1,0}} fusion(%done.1), kind=kOutput, calls=%product
  ROOT %tuple.1 = (s32[]{{:T(128)}}, bf16[8,8]{{1,0}}) tuple(%arg.0, %done.1)
}}

%condition (arg.1: (s32[], bf16[8,8])) -> pred[] {{
  %arg.1 = (s32[]{{:T(128)}}, bf16[8,8]{{1,0}}) parameter(0)
  %constant.1 = s32[]{{:T(128)}} constant(5)
  %element.1 = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  ROOT %less.1 = pred[]{{:T(512)}} compare(%element.1, %constant.1), direction=LT
}}

ENTRY %main (arg.2: bf16[8,8]) -> f32[8,8] {{
  %arg.2 = bf16[8,8]{{1,0}} parameter(0)
  %copy-start.1 = (bf16[8,8]{{1,0}}, bf16[8,8]{{1,0}}, u32[]) copy-start(%arg.2)
  %add.1 = bf16[8,8]{{1,0}} add(%arg.2, %arg.2)
  %copy-done.1 = bf16[8,8]{{1,0}} copy-done(%copy-start.1)
  %while.1 = (s32[], bf16[8,8]{{1,0}}) while(%copy-done.1), condition=%condition, body=%body
  ROOT %all-reduce.1 = f32[8,8]{{1,0}} all-reduce(%while.1), channel_id=9, {PAIRS}, to_apply=%product
}}
"""
CYCLES = {"product.1": 100.0, "attention_forward.1": 200.0, "product.2": 50.0, "add.1": 10.0}


def told(gather: float, reduce: float = 30.0, copy: float = 25.0) -> Timeline:
    def exchange(collective):
        return (gather if collective.opcode == "all-gather" else reduce), len(replica_groups(collective)[0])

    return replay(parse(MODULE), cycles=CYCLES, clock=1.0, between=0.0, exchange=exchange, copy=lambda size: copy)


def test_a_module_is_read_with_its_loops_collectives_and_sizes():
    module = parse(MODULE)
    loop = next(one for one in module.computations[module.entry] if one.opcode == "while")
    assert (module.entry, module.trips(loop), module.body(loop)) == ("main", 5, "body")
    start, step = module.computations["body"][1:3]
    assert (start.opcode, start.bytes, start.called) == ("fusion", 128, ["gather_start"])
    assert module.collective_in(start).channel == module.collective_in(step).channel == "7"
    assert list(array_bytes("(bf16[2,8]{1,0}, pred[4], s4[10], f8e4m3fn[3], s32[])")) == [32, 4, 5, 3, 4]
    with pytest.raises(HloError, match="not scheduled"):
        parse(MODULE.replace(", is_scheduled=true", ""))


def test_the_bytes_of_a_collective_are_those_of_its_whole_array():
    def of(result: str, opcode: str) -> int:
        line = f"  %a = {result} {opcode}(%p), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
        module = parse(f"HloModule m, is_scheduled=true\n\nENTRY %e (p: f32[4]) -> f32[4] {{\n{line}\n}}\n")
        return exchanged_bytes(module.computations["e"][0], 4)

    assert of("bf16[16,8]{1,0}", "all-gather") == 256
    assert of("bf16[4,8]{1,0}", "reduce-scatter") == 256
    assert of("(f32[4]{0}, f32[6]{0})", "all-reduce") == 40


def test_a_collective_that_is_offloaded_is_waited_for_where_it_is_done():
    called = "%offloaded (p.9: f32[8]) -> f32[8] {\n  %p.9 = f32[8]{0} parameter(0)\n"
    called += f"  ROOT %reduce-scatter.1 = f32[8]{{0}} reduce-scatter(%p.9), channel_id=3, {GROUPS}\n}}\n\n"
    lines = ("  %call-start.1 = ((f32[8]{0}), f32[8]{0}) call-start(%arg.2), to_apply=%offloaded", "%add.1")
    text = MODULE.replace("%product (p.0", called + "%product (p.0", 1).replace(
        f"  {lines[1]}", f"{lines[0]}\n  %add.1", 1
    )
    text = text.replace("  %copy-done.1", "  %call-done.1 = f32[8]{0} call-done(%call-start.1)\n  %copy-done.1", 1)
    options = {"cycles": CYCLES, "clock": 1.0, "between": 0.0, "copy": lambda size: 0.0}
    found = replay(parse(text), exchange=lambda one: (25.0 if one.opcode == "reduce-scatter" else 0.0, 4), **options)
    assert found.exchanges["reduce-scatter", 4, 128, ""].waited == 25 - 10


def test_groups_are_read_in_every_notation():
    def groups(text):
        entry = f"ENTRY %e (p: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} all-reduce(%p), {text}, x=1\n}}\n"
        line = f"HloModule m, is_scheduled=true\n\n{entry}"
        return replica_groups(parse(line).computations["e"][0])

    assert groups("replica_groups={{0,1},{2,3}}") == [[0, 1], [2, 3]]
    assert groups("replica_groups=[2,2]<=[4]") == [[0, 1], [2, 3]]
    assert groups("replica_groups=[2,2]<=[2,2]T(1,0)") == [[0, 2], [1, 3]]
    assert groups("replica_groups=mesh['a'=2,'b'=2] {'a'}") == [[0, 2], [1, 3]]
    assert groups("replica_groups=mesh['a'=2,'b'=3] {'b'}") == [[0, 1, 2], [3, 4, 5]]
    assert groups("source_target_pairs={{0,1},{1,0}}") == [[0, 1], [1, 0]]
    assert groups("channel_id=1") == []


def test_what_runs_beside_a_collective_hides_it_and_the_rest_is_waited_for():
    hidden = told(gather=300)
    assert hidden.seconds[LINKS] == 30  # the last sum, which nothing hides
    assert (hidden.seconds[PRODUCTS], hidden.seconds[KERNELS], hidden.seconds[REST]) == (750, 1000, 10)
    assert hidden.seconds[COPIES] == 15  # 25 for the copy, 10 of them beside an addition
    longer = told(gather=320)
    assert longer.seconds[LINKS] == 5 * 20 + 30
    gathers = longer.exchanges["all-gather", 4, 128, ""]
    assert (gathers.count, gathers.seconds, gathers.waited) == (5, 1600, 100)
    assert longer.total == 10 + 15 + 5 * (350 + 20) + 30


def test_the_compilers_guess_stands_in_for_what_was_not_counted():
    text = MODULE.replace("calls=%product\n", 'calls=%product, backend_config={"estimated_cycles":"70"}\n', 1)
    cycles = {name: count for name, count in CYCLES.items() if name != "product.2"}
    found = replay(
        parse(text), cycles=cycles, clock=2.0, between=0.5, exchange=lambda one: (0.0, 4), copy=lambda _: 0.0
    )
    assert found.guessed == 5 * 70 / 2
    assert found.seconds["between programs"] == 0.5 * (5 * 3 + 1)


def test_a_program_that_the_compiler_made_once_counts_wherever_it_runs():
    module = parse(MODULE.replace("%product.2 = f32[8,8]{1,0}", "%product.2 = f32[8,8]{0,1}"))
    assert module.for_all({"product.1": 100.0}) == {"product.1": 100.0, "product.2": 100.0}
    other = parse(MODULE.replace("%product.2 = f32[8,8]{1,0}", "%product.2 = f32[8,9]{1,0}"))
    assert other.for_all({"product.1": 100.0}) == {"product.1": 100.0}


def test_what_is_not_counted_is_named():
    cycles = {name: count for name, count in CYCLES.items() if name != "attention_forward.1"}
    large = MODULE.replace("f32[8,8]{1,0} custom-call(%product.1)", "f32[64,64]{1,0} custom-call(%product.1)")
    options = {"clock": 1.0, "between": 0.0, "exchange": lambda one: (0.0, 4), "copy": lambda size: 0.0}
    assert replay(parse(large), cycles=cycles, **options).unknown == {"attention_forward.1"}
    assert replay(parse(MODULE), cycles=CYCLES, **options).unknown == set()


def test_fewer_layers_are_continued_to_all():
    few, more = told(300), told(300)
    more.seconds[KERNELS] += 400
    assert few.extended(more, 8).seconds[KERNELS] == few.seconds[KERNELS] + 8 * 400
    assert few.extended(more, 8).exchanges["all-gather", 4, 128, ""].count == 5


def test_pods_have_the_devices_that_jax_has():
    assert (pod("v5e:16x16").devices, pod("v5p:4x8x8").devices, pod("v7x:4x4x4").devices) == (256, 256, 128)
    assert (pod("v7x:4x4x4").topology, pod("v6e:8x8").topology) == ("tpu7x:4x4x4", "v6e:8x8")
    for wrong in ("v5e", "v5e:256", "sm_90:2x2", "v5p:16x16"):
        with pytest.raises(ValueError, match="chips: got"):
            pod(wrong)


def places(*shape: int) -> list[tuple[int, ...]]:
    return [tuple(map(int, place)) for place in np.ndindex(*shape)]


def test_a_gather_takes_what_the_links_of_its_dimensions_allow():
    whole = pod("v5e:16x16")
    both, one = span(whole, places(16, 16)), span(whole, places(16, 1))
    assert (both.links, one.links) == (4, 2)
    size = 256e6
    assert seconds(whole, "all-gather", size, one) == pytest.approx(size * 15 / 16 / (2 * 45e9) + 16e-6)
    assert seconds(whole, "all-gather", size, both) == pytest.approx(size * 255 / 256 / (4 * 45e9) + 32e-6)
    assert seconds(whole, "all-reduce", size, one) - 16e-6 == pytest.approx(2 * size * 15 / 16 / (2 * 45e9))
    slice_of = pod("v5e:4x4")
    assert span(slice_of, places(4, 1)).links == 1  # no ring is closed
    assert span(pod("v5p:4x4x4"), places(4, 4, 4)).links == 6
    assert seconds(whole, "all-gather", size, span(whole, [(0, 0)])) == 0


def test_two_devices_of_a_chip_share_its_links():
    chip, other = pod("v7x:4x4x4"), pod("v5p:4x4x4")
    assert seconds(chip, "all-gather", 1e9, span(chip, places(4, 4, 4))) > 1.9 * seconds(
        other, "all-gather", 1e9, span(other, places(4, 4, 4))
    )


def test_known_models_have_their_sizes():
    billions = {name: known(name).num_params / 1e9 for name in MODELS}
    assert billions["llama-3-8b"] == pytest.approx(8.03, abs=0.01)
    assert billions["llama-3-70b"] == pytest.approx(70.55, abs=0.01)
    assert billions["mixtral-8x7b"] == pytest.approx(46.7, abs=0.01)
    with pytest.raises(ValueError, match="model: got 'llama'"):
        known("llama")


def test_what_does_not_fit_says_by_how_much():
    asked = Asked(known("llama-3-8b"), "train", Parallel(fsdp=16), 32, 4096)
    words = "Ran out of memory in memory space hbm. Used 21.16G of 15.75G hbm. Exceeded hbm capacity by 5.41G."
    found = _refused(asked, pod("v5e:4x4"), words)
    assert not found.fits
    assert line(found).endswith("does not fit, 21.2 GiB of 15.8, 5.4 too many")
    assert facts(found)["seconds"] is None
    with pytest.raises(PlanError, match="cannot be partitioned"):
        _refused(asked, pod("v5e:4x4"), "INTERNAL: cannot be partitioned")


def test_a_plan_counts_tokens_operations_and_money():
    config, where = known("llama-3-8b"), pod("v5e:16x16")
    timeline = Timeline(seconds={KERNELS: 2.0})
    plan = Plan(Asked(config, "train", Parallel(fsdp=256), 256, 4096), where, 1e9, 2e9, timeline=timeline)
    assert plan.tokens_per_device == 256 * 4096 / 2 / 256
    assert plan.mfu == pytest.approx(config.flops_per_token(4096) * 2048 / 197e12)
    assert plan.dollars_per_million == pytest.approx(1.2 * 256 * 2 / 3600 / (256 * 4096) * 1e6)
    decode = Plan(Asked(config, "decode", Parallel(data=64, tensor=4), 256, 4096), where, 1e9, 2e9, timeline=timeline)
    assert decode.tokens_per_device == 256 / 2 / 256


def test_what_is_asked_must_fit_the_mesh():
    config = known("llama-3-8b")
    with pytest.raises(ValueError, match=r"batch: got 100; it must be a multiple of 256"):
        Asked(config, "train", Parallel(fsdp=256), 100, 4096)
    with pytest.raises(ValueError, match=r"seq: got 4096; it must be a multiple of the context axis, 3"):
        Asked(config, "train", Parallel(context=3), 1, 4096)
    staged = Parallel(stage=4, microbatches=8, fsdp=4)
    with pytest.raises(ValueError, match=r"batch: got 16; it must be a multiple of 32, .* times 8 microbatches"):
        Asked(config, "train", staged, 16, 4096)
    with pytest.raises(ValueError, match="stage: got 4; decode has no pipeline"):
        Asked(config, "decode", staged, 32, 4096)
    with pytest.raises(ValueError, match="stage: got 5 for 32 layers"):
        Asked(config, "train", Parallel(stage=5), 5, 4096)
    with pytest.raises(ValueError, match="step: got 'serve'"):
        Asked(config, "serve", Parallel(), 1, 4096)
    with pytest.raises(ValueError, match="16 devices in all; v5e:2x2 has 4"):
        search(config, pod("v5e:2x2"), "train", 4096, meshes=[Parallel(fsdp=16)], batches=[16])
    with pytest.raises(ValueError, match="batch: no mesh"):
        search(config, pod("v5e:2x2"), "train", 4096, batches=[3], meshes=[Parallel(fsdp=4)])


def test_the_roofline_knows_what_cannot_fit_and_what_is_done_again():
    config, where = known("llama-3-8b"), pod("v5e:4x4")
    small = Asked(config, "train", Parallel(fsdp=16), 16, 4096, "full")
    assert estimate(small, where).fits
    assert not estimate(Asked(config, "train", Parallel(fsdp=16), 16, 4096, "none"), where).fits
    again = Asked(config, "train", Parallel(fsdp=16), 16, 4096, "products")
    assert estimate(small, where).seconds > estimate(again, where).seconds


@pytest.mark.parametrize("policy", POLICIES)
def test_the_roofline_knows_every_policy(policy):
    asked = Asked(known("llama-3-8b"), "train", Parallel(fsdp=16), 16, 4096, policy)
    least = estimate(Asked(asked.config, "train", asked.parallel, 16, 4096, "offload"), pod("v5e:4x4"))
    found = estimate(asked, pod("v5e:4x4"))
    assert 0 < least.bytes <= found.bytes
    assert found.seconds > 0


def test_published_runs_are_found_by_model_pod_and_length():
    assert all(run.model in MODELS and pod(run.pod) for run in PUBLISHED)
    assert published("llama-3-8b", pod("v6e:16x16"), 8192).tokens_per_device == 7207.3
    assert published("llama-3-8b", pod("v6e:16x16"), 4096) is None
