"""Arrays whose elements lie past 2**31 of each other: the addresses of the GPU kernels, interpreted, in sparse storage.

Gigabytes are reserved and a few pages of them touched. One axis of one array of a call is spread out at a time, and
forward and backward must give the bits that they give of the same values side by side. An axis that fits a tile makes
the tile's own offsets pass 32 bits; one of several tiles makes the address of the last one.
"""

from __future__ import annotations

from typing import Any

import features
import numpy as np
import pytest
import torch
from features import Case, run
from layouts import placed
from subjects import SUBJECTS
from sweeps import one_in

from crosstile import plans

PRODUCT = [{"m": 130, "k": 20, "n": 17}, {"m": 5, "k": 130, "n": 17}, {"m": 5, "k": 20, "n": 130}]
CALLS: list[tuple[str, str, tuple[str, ...], list[dict[str, int]]]] = [
    ("matmul", "a [m, k], b [k, n]", (), PRODUCT),
    ("matmul", "a [m, k], b [k, n]", ("bias", "activation: silu", "residual"), PRODUCT[2:]),
    ("glu_matmul", "x [m, k]", (), PRODUCT),
    ("grouped_matmul", "grouped_matmul", (), [{"tokens": 130, "k": 130, "n": 17, "groups": 3}]),
    ("grouped_matmul", "grouped_glu_matmul", (), [{"tokens": 20, "k": 17, "n": 130, "groups": 3}]),
    ("quantized_matmul", "int8", (), PRODUCT),
    ("quantized_matmul", "int4", (), PRODUCT[1:]),
    ("norm", "layer_norm", ("layer_norm with a bias",), [{"rows": 2, "hidden": 130}]),
    ("linear_cross_entropy", "mean over the tokens", (), [{"tokens": 130, "features": 17, "vocab": 40}]),
    ("linear_cross_entropy", "mean over the tokens", (), [{"tokens": 5, "features": 130, "vocab": 200}]),
]


LEFT_OUT = {
    ("norm", "x"),  # a copy is made of rows that are no longer one run; tests/kernels/norm has its test
    ("grouped_matmul", "group_sizes"),  # int32, contiguous, when a kernel gets them
    ("linear_cross_entropy", "targets"),  # the same
}


def spread(array: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values with the axis' elements so far apart that all of it passes 2**31."""
    size = array.shape[axis]
    apart = 2**31 // (size - 1) + 16
    inside = torch.empty_like(array.select(axis, 0), memory_format=torch.contiguous_format)
    strides = list(inside.stride())
    strides.insert(axis, apart)
    storage = torch.empty((size - 1) * apart + inside.numel(), dtype=array.dtype)
    return torch.as_strided(storage, array.shape, strides).copy_(array)


def spreads() -> Any:
    for op, form, names, chosen in CALLS:
        for sizes in chosen:
            case = Case(SUBJECTS[op], form, (*names, "float16"), tuple(sizes.items()))
            call = case.call()
            for name, array in {**call.floats, **call.others}.items():
                for axis, size in enumerate(array.shape):
                    if size > 2 and (op, name) not in LEFT_OUT:
                        yield case, name, axis


@pytest.mark.parametrize(("case", "name", "axis"), one_in(4, spreads()), ids=str)
def test_past_2_to_the_31_elements(case, name, axis, monkeypatch):
    call = case.call()
    near = run(call, call.dtype, "triton", "torch", backward=True)
    made = plans.make
    reaches = []

    def recorded(op: Any, direction: str, spec: Any, config: Any, described: tuple[Any, ...]) -> Any:
        if direction == "forward":
            reaches.extend(array.reach for array in described if array is not None)
        return made(op, direction, spec, config, described)

    names = iter((*call.floats, *call.others))

    def placed_far(*arguments: Any) -> torch.Tensor:
        there = placed(*arguments)
        return spread(there, axis) if next(names, None) == name else there

    monkeypatch.setattr(plans, "make", recorded)
    monkeypatch.setattr(features, "placed", placed_far)
    far = run(call, call.dtype, "triton", "torch", backward=True)
    assert max(reaches) > 2**31
    for result, (values, _) in near.items():
        np.testing.assert_array_equal(far[result][0], values, err_msg=result)
