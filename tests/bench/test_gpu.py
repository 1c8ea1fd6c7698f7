"""Real compilations of small kernels for GPUs that are not here."""

import pytest

pytest.importorskip("triton")

from crosstile.bench.facts import over_budget
from crosstile.bench.gpu import compile_plan, gpu_target, specialise
from crosstile.kernels.tiles.launch import Array, Launch, contiguous
from crosstile.kernels.tiles.targets import get_target

from .plans import plan, product, product_by_hand


@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma")])
def test_a_good_kernel_is_within_budget(target: str, instruction: str) -> None:
    [facts] = compile_plan(plan(product), target)
    assert all(name.startswith(instruction) for name in facts.matrix)
    assert sum(facts.matrix.values()) > 0
    assert facts.spills == 0
    assert facts.on_chip_bytes > 0
    assert 0 < facts.registers <= 255
    assert over_budget(facts, target) == ()


def test_a_kernel_without_tensor_cores_fails() -> None:
    [facts] = compile_plan(plan(product_by_hand, 32), "sm_90")
    assert over_budget(facts, "sm_90") == ("no tensor-core instruction, though it multiplies bfloat16",)


def test_a_kernel_that_spills_fails() -> None:
    [facts] = compile_plan(plan(product_by_hand, 128, num_warps=1), "sm_80")
    assert facts.spills > 0
    assert any("register spills" in reason for reason in over_budget(facts, "sm_80"))


def test_a_float32_dot_by_ieee_has_no_tensor_core_to_go_to_on_nvidia() -> None:
    [facts] = compile_plan(plan(product_by_hand, 32, "float32", dot_dtype="float32"), "sm_80")
    assert over_budget(facts, "sm_80") == ()
    assert over_budget(facts, "gfx942") != ()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("number", [0, 1, 16, 17, -16, 2**31 - 1, 2**31, 1.5, True])
def test_numbers_are_specialised_as_triton_does(number: float, target: str) -> None:
    from triton._C.libtriton import native_specialize_impl
    from triton.compiler.compiler import make_backend

    chip = get_target(target)
    array = contiguous((64, 64), "bfloat16")
    launch = Launch(product, (1,), ("a", "b"), ("c",), {"stride": number}, {"BLOCK": 64})
    signature, constants, attributes = specialise(launch, {"a": array, "b": array, "c": array}, chip)
    kind, hint = native_specialize_impl(make_backend(gpu_target(chip)), number, False, True, True)
    assert signature["stride"] == kind
    assert constants.get("stride") == (number if kind == "constexpr" else None)
    assert ((3,) in attributes) == (hint == "D")
    pointer = [["tt.divisibility", 16]] + [["tt.pointer_range", 32]] * (target == "gfx942")
    assert attributes[(0,)] == pointer
    assert signature["a"] == "*bf16"


def test_an_array_past_2_gib_is_not_promised_to_be_near() -> None:
    far = Array((2, 8), "float16", (2**30, 1))
    launch = Launch(product, (1,), ("a", "b"), ("c",), {"stride": 64}, {"BLOCK": 64})
    _, _, attributes = specialise(launch, dict.fromkeys("abc", far), get_target("gfx942"))
    assert attributes[(0,)] == [["tt.divisibility", 16]]


def test_an_absent_array_is_none() -> None:
    array = contiguous((64, 64), "float16")
    launch = Launch(product, (1,), ("a", ""), ("c",), {"stride": 64}, {"BLOCK": 64})
    signature, constants, _ = specialise(launch, {"a": array, "c": array}, get_target("sm_80"))
    assert signature["b"] == "constexpr"
    assert constants["b"] is None
