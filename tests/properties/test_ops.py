"""Any call of any op besides attention: with any sizes, strides, dtype and features its error is an allowed one.

The quick examples are the same in every run; `pytest -m sweep` draws many new ones.
"""

from __future__ import annotations

import pytest
from features import REFUSED, check
from hypothesis import assume, given
from hypothesis import strategies as st
from layouts import LAYOUTS
from properties import IMPLEMENTATIONS, SWEEP, cases, dims, lengths, quick, skip_unless_it_runs
from subjects import SUBJECTS

SIZES = {
    "matmul": {"m": lengths, "k": lengths, "n": lengths},
    "glu_matmul": {"m": lengths, "k": lengths, "n": lengths},
    "grouped_matmul": {"tokens": lengths, "k": lengths, "n": lengths, "groups": st.integers(0, 9)},
    "quantized_matmul": {"m": lengths, "k": lengths, "n": lengths},
    "norm": {"rows": lengths, "hidden": st.one_of(dims, st.sampled_from([127, 128, 129, 300]))},
    "rotary": {
        "batch": st.integers(0, 2),
        "length": lengths,
        "heads": st.integers(1, 9),
        "kv_heads": st.integers(1, 3),
        "head_dim": dims.map(lambda size: 2 * size),
    },
    "linear_cross_entropy": {"tokens": lengths, "features": dims, "vocab": lengths.map(lambda size: max(size, 1))},
    "paged_attention": {
        "batch": st.integers(0, 3),
        "q_len": st.integers(0, 20),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 5),
        "dim": dims,
        "pages": st.integers(1, 4),
    },
}
FRAMEWORKS = {"cpu": ("numpy", "torch", "jax"), "cuda": ("torch",), "tpu": ("jax",)}
EVERY_OP = pytest.mark.parametrize("op", SIZES)


def check_any(data, op: str, implementation: str, device: str, backward: bool) -> None:
    """Gradients are taken in torch or JAX, which have no negative strides."""
    skip_unless_it_runs(implementation, device)
    layouts = LAYOUTS[: 4 if backward else 5]
    case = data.draw(cases(SUBJECTS[op], SIZES[op], layouts), "case")
    assume(case.lacking.get(implementation) != REFUSED)
    framework = data.draw(st.sampled_from([name for name in FRAMEWORKS[device] if name != "numpy" or not backward]))
    check(case, implementation, backward, framework, device)


@EVERY_OP
@IMPLEMENTATIONS
@quick(2)
@given(data=st.data())
def test_forward(data, op, implementation, device):
    check_any(data, op, implementation, device, backward=False)


@EVERY_OP
@IMPLEMENTATIONS
@quick(2)
@given(data=st.data())
def test_gradients(data, op, implementation, device):
    if not SUBJECTS[op].differentiable:
        pytest.skip(f"{op} is for inference only")
    check_any(data, op, implementation, device, backward=True)


@pytest.mark.sweep
@EVERY_OP
@IMPLEMENTATIONS
@SWEEP
@given(data=st.data())
def test_forward_swept(data, op, implementation, device):
    check_any(data, op, implementation, device, backward=False)


@pytest.mark.sweep
@EVERY_OP
@IMPLEMENTATIONS
@SWEEP
@given(data=st.data())
def test_gradients_swept(data, op, implementation, device):
    if not SUBJECTS[op].differentiable:
        pytest.skip(f"{op} is for inference only")
    check_any(data, op, implementation, device, backward=True)
