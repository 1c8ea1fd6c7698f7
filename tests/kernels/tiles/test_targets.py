"""The table of chips."""

from __future__ import annotations

import pytest

from crosstile.kernels.tiles.targets import INTERPRET, TARGETS, get_target

GPUS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
TPUS = ("v4", "v5e", "v5p", "v6e", "v7x")


def test_the_ten_targets():
    assert tuple(TARGETS) == (*GPUS, *TPUS)
    assert all(TARGETS[name].is_gpu and not TARGETS[name].is_tpu for name in GPUS)
    assert all(TARGETS[name].is_tpu and not TARGETS[name].is_gpu for name in TPUS)
    assert not any(target.interpreted for target in TARGETS.values())


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_states_its_chip(name):
    target = TARGETS[name]
    assert target.name == name
    assert target.chip
    assert target.bf16_tflops > 0
    assert target.bandwidth > 0
    assert target.on_chip_bytes >= 2**16
    assert (target.matrix_unit > 0) == target.is_tpu
    # a chip multiplies tens to a thousand numbers for each byte that it loads
    assert 50 < target.bf16_tflops * 1000 / target.bandwidth < 1000


@pytest.mark.parametrize(
    ("name", "capability"), [("sm_80", 80), ("sm_90", 90), ("sm_100", 100), ("gfx942", 0), ("v6e", 0)]
)
def test_capability(name, capability):
    assert get_target(name).capability == capability


def test_interpret_is_a_target_of_its_own():
    assert get_target("interpret") is INTERPRET
    assert INTERPRET.interpreted
    assert not INTERPRET.is_gpu
    assert not INTERPRET.is_tpu


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="sm_70") as caught:
        get_target("sm_70")
    assert all(name in str(caught.value) for name in TARGETS)


def test_targets_are_hashable_facts():
    assert len({TARGETS["v4"], TARGETS["v4"], TARGETS["v6e"]}) == 2
    with pytest.raises(AttributeError):
        TARGETS["v4"].name = "v8"
