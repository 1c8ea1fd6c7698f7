"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of the op's files.

The check is the suite's rule on small problems of several tiles and groups of heads.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from mutations import describe, mutated
from oracles import multiples
from rotary_problems import FLOATS, OPERANDS, Problem
from sweeps import one_in

import crosstile.kernels.rotary as package
from crosstile.kernels.rotary.tiles import choose_config
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

CHECKED = {
    "half": Problem(rotary_dim=12, factor=1.25),
    "interleaved": Problem(rotary_dim=12, interleaved=True, factor=1.25),
    "many heads": Problem(q_heads=5, k_heads=3),
    "wide": Problem(head_dim=80, rotary_dim=32),
}


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "half"


T, P, R = "triton", "pallas", "reference"
MUTATIONS = (
    Mutation("turned the wrong way", T, "left * cos - right * sin", "left * cos + right * sin"),
    Mutation("the other half not turned", T, "right * cos + left * sin", "right * cos"),
    Mutation("the backward turns on", T, "sin = -sin", "sin = sin"),
    Mutation("factor of cos forgotten", T, "tl.cos(angle) * factor", "tl.cos(angle)"),
    Mutation("factor of sin forgotten", T, "tl.sin(angle) * factor", "tl.sin(angle)"),
    Mutation("the first tile's positions", T, "advance(advance(positions, batch, positions_batch), row, positions_row)",
             "advance(positions, batch, positions_batch)"),
    Mutation("the first item's positions", T, "advance(advance(positions, batch, positions_batch), row",
             "advance(advance(positions, batch, 0), row"),
    Mutation("the rest not copied", T, "        if REST:\n", "        if REST < 0:\n"),
    Mutation("one head too few", T, "tl.minimum(first_head + BLOCK_HEADS, HEADS)",
             "tl.minimum(first_head + BLOCK_HEADS - 1, HEADS)"),
    Mutation("a group too few", T, "for heads in (q_heads, k_heads)", "for heads in (k_heads, k_heads)", "many heads"),
    Mutation("groups of k from those of q", T, "(group - Q_GROUPS) * BLOCK_HEADS", "group * BLOCK_HEADS"),
    Mutation("the wrong head", T, "advance(array[0], head, array[2])", "advance(array[0], 0, array[2])"),
    Mutation("halves of the head, not of what turns", T, "_load(source, head, ROTARY_DIM // 2,",
             "_load(source, head, HEAD_DIM // 2,"),
    Mutation("frequencies of the head", T, "pairs < ROTARY_DIM // 2", "pairs < ROTARY_DIM // 2 - 1"),
    Mutation("pairs stored as halves", T, "tl.join(turned_left, turned_right)", "tl.join(turned_left, left)",
             "interleaved"),
    Mutation("turned the wrong way", P, "direction * spec.factor * jnp.sin", "-direction * spec.factor * jnp.sin"),
    Mutation("the backward turns on", P, "*gradients, positions, frequencies, -1",
             "*gradients, positions, frequencies, 1"),
    Mutation("factor of cos forgotten", P, "spec.factor * jnp.cos(angles), ", "jnp.cos(angles), "),
    Mutation("sign of the partner", P, "((cos, cos), (-sin, sin)))\n    copies",
             "((cos, cos), (sin, sin)))\n    copies"),
    Mutation("sign of the partner", P, "((cos, cos), (-sin, sin)))\n    else", "((cos, cos), (sin, sin)))\n    else",
             "interleaved"),
    Mutation("partners exchanged", P, "jnp.where(role == FIRST, after, before)",
             "jnp.where(role == FIRST, before, after)"),
    Mutation("partners of a head's half", P, "else spec.rotary_dim // 2\n    before",
             "else spec.head_dim // 2\n    before"),
    Mutation("the rest turned", P, "jnp.where(role == ALONE, x, out)", "jnp.where(role == ALONE, out, out)"),
    Mutation("heads not repeated", P, "np.arange(width) % spec.head_dim", "np.arange(width)"),
    Mutation("a chunk that cuts heads", P, "min(lcm(spec.head_dim, LANES)", "min(LANES", "wide"),
    Mutation("turned the wrong way", R, "* cos - wide[..., second] * sin", "* cos + wide[..., second] * sin"),
    Mutation("the backward turns on", R, "gradients[0], positions, frequencies, -1",
             "gradients[0], positions, frequencies, 1"),
)  # fmt: skip


def worst(op: ModuleType, kernel: str, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem = CHECKED[name]
    exact = problem.exact_arrays
    arrays = {name: array.astype(problem.dtype) if name in FLOATS else array for name, array in exact.items()}
    run = {"triton": interpreted, "pallas": traced, "reference": defined}[kernel]
    ours = run(op, problem, choose_config(problem.spec, INTERPRET), arrays)
    excess = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(op: ModuleType, problem: Problem, config: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    from crosstile.kernels.tiles.triton_interpreter import run

    inputs = tuple(describe(arrays[name]) for name in OPERANDS)
    plans = (
        op.triton.forward(problem.spec, config, *inputs),
        op.triton.backward(
            problem.spec, config, inputs, inputs[:2], (describe(arrays["drotated_q"]), describe(arrays["drotated_k"]))
        ),
    )
    found: dict[str, Any] = {}
    for plan in plans:
        found |= zip(plan.outputs, run(plan, {name: arrays[name] for name in plan.inputs}), strict=True)
    return found


def traced(op: ModuleType, problem: Problem, config: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    def run(inputs: Any, gradients: Any) -> Any:
        outputs = op.pallas.forward(problem.spec, config, INTERPRET, *inputs)
        return outputs, op.pallas.backward(problem.spec, config, INTERPRET, inputs, outputs, gradients)

    fast = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    inputs = tuple(arrays[name] for name in OPERANDS)
    outputs, gradients = fast(inputs, (arrays["drotated_q"], arrays["drotated_k"]))
    return by_name(outputs, gradients)


def defined(op: ModuleType, problem: Problem, config: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    inputs = tuple(arrays[name] for name in OPERANDS)
    outputs = op.reference.forward(problem.spec, *inputs)
    gradients = (arrays["drotated_q"], arrays["drotated_k"])
    return by_name(outputs, op.reference.backward(problem.spec, inputs, outputs, gradients))


def by_name(outputs: tuple[Any, ...], gradients: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("rotated_q", "rotated_k", "dq", "dk"), (*outputs, *gradients[:2]), strict=True))


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(package, kernel, name)


@pytest.mark.parametrize(
    "mutation", one_in(7, MUTATIONS), ids=lambda m: f"{m.file}-{m.name}-{m.problem}".replace(" ", "_")
)
def test_the_check_notices(mutation, tmp_path):
    assert sound(mutation.file, mutation.problem) <= 1
    assert worst(mutated("rotary", mutation, tmp_path), mutation.file, mutation.problem) > 1
