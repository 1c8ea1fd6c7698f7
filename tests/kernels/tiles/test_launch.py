"""What a launch plan says of arrays."""

from __future__ import annotations

import numpy as np
import pytest

from crosstile.kernels.tiles.launch import Array, Launch, Plan, contiguous


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (4, 0, 2), (1, 1)])
def test_contiguous_strides_are_numpys(shape):
    array = contiguous(shape, "float32")
    assert array.shape == shape
    if 0 not in shape:  # NumPy gives an empty array other strides, which nobody steps along
        assert array.strides == tuple(stride // 4 for stride in np.empty(shape, np.float32).strides)


def test_contiguous_takes_any_sequence():
    assert contiguous([2, 3], "float16") == Array((2, 3), "float16", (3, 1))


@pytest.mark.parametrize(
    ("shape", "strides", "reach"),
    [
        ((2, 3), (3, 1), 5),
        ((2, 3), (0, 1), 2),  # stride 0: both rows are one
        ((2, 3), (-3, -1), 5),
        ((), (), 0),
        ((4, 0), (7, 1), 21),
        ((2**16, 2**16), (2**16, 1), 2**32 - 1),
    ],
)
def test_reach_is_the_largest_distance(shape, strides, reach):
    assert Array(shape, "float32", strides).reach == reach


def test_arrays_are_hashable_so_that_plans_are_made_once():
    assert len({contiguous((2, 3), "float32"), contiguous((2, 3), "float32"), contiguous((2, 3), "float16")}) == 2


def test_a_launch_takes_names_of_arrays_only():
    with pytest.raises(TypeError, match="put numbers in numbers="):
        Launch(None, (1,), ("x", 3), ("y",), {}, {})


def test_a_plan_needs_no_scratch():
    plan = Plan((), {"x": contiguous((2,), "float32")}, {})
    assert plan.scratch == {}
