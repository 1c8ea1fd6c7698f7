"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of a kernel file.

The check is the suite's rule on small problems of several tiles and parts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_entropy_problems import GRADIENTS, Problem, named
from mutations import describe, mutated
from oracles import multiples

import crosstile.kernels.linear_cross_entropy as package
from crosstile.kernels.linear_cross_entropy.spec import INPUTS, OUTPUTS
from crosstile.kernels.linear_cross_entropy.tiles import choose_config
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

ALL = Problem(tokens=40, vocab=70, features=40, softcap=3.0)
CHECKED = {"all": ALL, "parts": replace(ALL, softcap=None), "batch": replace(ALL, tokens=20, vocab=40, batch=2)}
CHECKED["strips"] = replace(ALL, tokens=64)  # an even number of strips of a tile: one is taken in while one is summed
CHECKED["cores"] = ALL  # three tiles of the vocabulary on two cores


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "all"


T, B, C, R = "triton", "triton_backward", "triton_common", "reference"
P, Q, S = "pallas", "pallas_tiling", "pallas_passing"
MUTATIONS = (
    Mutation("places past the vocabulary weigh", T,
             "if not EVEN_V:\n            logits = tl", "if False:\n            logits = tl"),
    Mutation("the last tile skipped", T,
             "last = tl.minimum(first + SPAN, tiles_v)", "last = tl.minimum(first + SPAN, tiles_v - 1)"),
    Mutation("sums not rescaled", T,
             "total = total * tl.exp2((peak - base) * LOG2_E) + tl.sum(weights", "total = total + tl.sum(weights"),
    Mutation("parts not weighed", T, "tl.exp2((part - base[None, :]) * LOG2_E)", "tl.exp2(part * 0.0)"),
    Mutation("the wrong part's target", T, "target // (SPAN * BLOCK_V))", "target // (2 * SPAN * BLOCK_V))"),
    Mutation("lse in base 2", T, "peak + tl.log2(total) * LN_2, 0.0", "peak + tl.log2(total), 0.0"),
    Mutation("ignored tokens have a logsumexp", T,
             "result = tl.where(counted, peak", "result = tl.where(rows >= 0, peak"),
    Mutation("logit sums of the last tile only", T, "logit_sum += tl.sum(logits", "logit_sum = tl.sum(logits"),
    Mutation("the target one row on", B, "tl.where(target[:, None] == cols", "tl.where(target[:, None] + 1 == cols"),
    Mutation("the cap's slope forgotten", B, "gradient *= 1.0 - bent * bent", "gradient *= 1.0"),
    Mutation("the gradient of the sums forgotten", B, "gradient += every[:, None]", "gradient += 0.0"),
    Mutation("ignored tokens reach dweight", B, "b_exists = b_exists & (target != NO_TOKEN)", "b_exists = b_exists"),
    Mutation("ignored tokens have a gradient", B,
             "scale = tl.where(counted, per_token(dlse", "scale = tl.where(row >= 0, per_token(dlse"),
    Mutation("only the last part of dhidden", B, "previous=between if part.first_row else None", "previous=None"),
    Mutation("parts overlap", B, "range(0, vocab, width)", "range(0, vocab, width // 2)"),
    Mutation("the rows of the first part", B, "b_first, b_row), col, b_col", "0, b_row), col, b_col"),
    Mutation("the last features forgotten", C,
             "range(0, features, BLOCK_F)", "range(0, features // BLOCK_F * BLOCK_F, BLOCK_F)"),
    Mutation("the cap as a clip", C,
             "bent = tanh(raw / softcap)", "bent = tl.minimum(tl.maximum(raw / softcap, -1.0), 1.0)"),
    Mutation("the first batch item's targets", C,
             "pointer = advance(advance(pointer, batch, batch_stride)",
             "pointer = advance(advance(pointer, 0, batch_stride)",
             "batch"),
    Mutation("places past the vocabulary weigh", P, "jnp.where(there, logits, -jnp.inf)", "logits"),
    Mutation("sums not rescaled", P,
             "total_ref[:, cols] * jnp.exp(before - peak) + jnp.sum", "total_ref[:, cols] + jnp.sum"),
    Mutation("the target one row on", P,
             "gradient += jnp.where(row == targets_ref", "gradient += jnp.where(row + 1 == targets_ref"),
    Mutation("the cap's slope forgotten", P, "gradient if softcap is None else gradient * slope", "gradient"),
    Mutation("the last tile read whole", Q,
             "pl.when(step == steps - 1)(lambda: run(tail))", "pl.when(step == steps - 1)(lambda: run(block))"),
    Mutation("ignored tokens reach dweight", P,
             "hidden = jnp.where(counted[..., None], hidden, 0)", "hidden = hidden"),
    Mutation("sums start from what was there", Q, "jnp.where(first, 0, sums_ref[:, cols])", "sums_ref[:, cols]"),
    Mutation("parts start from what was there", Q, "first & (number == 0)", "number < 0", "parts"),
    Mutation("the vocabulary's tile of the wrong step", P, "- tile * block_v, dtarget", "- inner * block_v, dtarget"),
    Mutation("a core's tiles begin with the first", P,
             "tile, (block_t, features) = share * steps + step", "tile, (block_t, features) = step", "cores"),
    Mutation("the last tile counts for a core without", P, "pl.when(tile < count)", "pl.when(tile >= 0)", "cores"),
    Mutation("the last core's sums alone", P, ".sum(axis=1).astype", "[:, -1].astype", "cores"),
    Mutation("passing sums start from what was there", S, "number < per_pass)", "number < 0)"),
    Mutation("passing sums start anew", S, "number < per_pass)", "number >= 0)"),
    Mutation("the part before", S, "part = lax.rem(number, self", "part = lax.rem(number + 1, self"),
    Mutation("the first part only of a row", S, "lax.rem(part, of_row) * width", "0 * width"),
    Mutation("a slot keeps its last part", S, "self._read(coming).start()", "None"),
    Mutation("small parts forgotten", Q, "((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))", "((0, 0),)", "parts"),
    Mutation("not turned", P, "cols, rows, gradient.T)", "cols, rows, gradient)", "strips"),
    Mutation("the strip before is of this step", Q, "jnp.where(strip > 0, step, step - 1)", "step", "strips"),
    Mutation("a strip before the first", Q, "step_before < 0, NOWHERE", "step_before < 0, 0", "strips"),
    Mutation("the last strip forgotten", Q,
             "pl.when(step == steps - 1)(take_in_last)", "pl.when(step < 0)(take_in_last)", "strips"),
    Mutation("strips start from what was there", Q,
             "jnp.where(inner.start == 0, 0, strip_ref[rows, :])", "strip_ref[rows, :]", "strips"),
    Mutation("a strip joins the tokens of the next", Q, "lax.rem(strip + count - 1, count)", "strip", "strips"),
    Mutation("the gradient's sign", R,
             "+ np.where(_is_target(targets, weight), dtarget, 0)",
             "- np.where(_is_target(targets, weight), dtarget, 0)"),
    Mutation("the cap's slope forgotten", R, "dlogits * slope, 0)", "dlogits, 0)"),
    Mutation("ignored tokens reach dweight", R,
             "np.where(counted[..., None], hidden, 0).astype(logits.dtype)\n    return dhidden",
             "hidden.astype(logits.dtype)\n    return dhidden"),
)  # fmt: skip


def worst(kernel: str, module: ModuleType, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem = CHECKED[name]
    if kernel == P and name != "parts":  # float32 is in parts there, and takes XLA several times as long
        problem = replace(problem, dtype="bfloat16")
    arrays = problem.arrays()
    inputs = tuple(arrays[name] for name in INPUTS)
    gradients = tuple(arrays[name] for name in GRADIENTS)
    config = choose_config(problem.spec, INTERPRET)
    if kernel == R:
        statistics = module.forward(problem.spec, *inputs)
        ours = named(statistics, module.backward(problem.spec, inputs, statistics, gradients))
    elif kernel == T:
        ours = interpreted(module, problem, arrays)
    else:
        target = replace(INTERPRET, siblings=int(name == "cores"))

        def run(inputs, gradients):
            statistics = module.forward(problem.spec, config, target, *inputs)
            found = module.backward(problem.spec, config, target, inputs, statistics, gradients)
            return named(statistics, found)

        compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        ours = compiled(tuple(map(jnp.asarray, inputs)), tuple(map(jnp.asarray, gradients)))
    excess = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(module: ModuleType, problem: Problem, arrays: dict) -> dict:
    from crosstile.kernels.tiles.triton_interpreter import run

    config = choose_config(problem.spec, INTERPRET)
    inputs = {name: arrays[name] for name in INPUTS}
    plan = module.forward(problem.spec, config, *map(describe, inputs.values()))
    outputs = dict(zip(plan.outputs, run(plan, inputs), strict=True))
    statistics = tuple(outputs[name] for name in OUTPUTS)
    given = tuple(arrays[name] for name in GRADIENTS)
    described = (tuple(map(describe, group)) for group in (inputs.values(), statistics, given))
    plan = module.backward(problem.spec, config, *described)
    results = run(plan, {**inputs, "lse": outputs["lse"], **dict(zip(GRADIENTS, given, strict=True))})
    return named(
        statistics, tuple(dict(zip(plan.outputs, results, strict=True))[f"d{n}"] for n in ("hidden", "weight"))
    )


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(kernel, getattr(package, kernel), name)


def marked(mutation: Mutation) -> Any:
    """Those of the Pallas kernels take XLA seconds each: a few run always, the others in the sweep."""
    slow = mutation.file in (P, Q) and mutation.name not in (
        "the last tile read whole",
        "the target one row on",
        "the strip before is of this step",
    )
    name = f"{mutation.file}-{mutation.name}".replace(" ", "_")
    return pytest.param(mutation, id=name, marks=pytest.mark.sweep if slow else ())


@pytest.mark.parametrize("mutation", [marked(mutation) for mutation in MUTATIONS])
def test_the_check_notices(mutation, tmp_path):
    kernel = mutation.file.split("_")[0]
    assert sound(kernel, mutation.problem) <= 1
    assert worst(kernel, getattr(mutated("linear_cross_entropy", mutation, tmp_path), kernel), mutation.problem) > 1
