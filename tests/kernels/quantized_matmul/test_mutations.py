"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of the op's files.

The check is the suite's rule on small problems of several tiles, steps and groups.
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
from quantized_problems import Problem, named_gradients
from sweeps import swept

import crosstile.kernels.quantized_matmul as package
from crosstile.kernels.quantized_matmul.spec import INPUTS
from crosstile.kernels.tiles.targets import INTERPRET

pytest.importorskip("triton")

_COMMON = {"m": 20, "n": 20, "batch": 1}
CHECKED = {
    "int4": Problem("int4-64", k=300, **_COMMON),
    "zeros": Problem("int4-128-zeros", k=300, **_COMMON),
    "column": Problem("int8-zeros", k=70, m=20, n=40, batch=2),
    "mxfp4": Problem("mxfp4", k=140, activation="relu", **_COMMON),
    "fp8": Problem("fp8-64", k=70, activation=None, **_COMMON),
    "codes": Problem("int8-int8", k=150, m=20, n=20, batch=2),
    "blocks": Problem("mxfp4-mxfp8", k=150, **_COMMON),
}


class Mutation(NamedTuple):
    """One mistake: what is wrong, in which file, the text that is replaced, by what, and on which problem it shows."""

    name: str
    file: str
    old: str
    new: str
    problem: str = "int4"


T, P, R = "triton", "pallas", "reference"
W, C, F, E = "triton_weights", "triton_codes", "tiles/triton_formats", "tiles/triton_epilogue"
PF, PC, PE = "tiles/pallas_formats", "pallas_codes", "tiles/pallas_epilogue"
MUTATIONS = (
    Mutation("halves exchanged", F, "codes >> 4 if HIGH else codes & 15", "codes & 15 if HIGH else codes >> 4"),
    Mutation("high half beside its neighbour", W, "start = first + high * ROWS_APART", "start = first + high"),
    Mutation("group of the low half", W, "codes, scales, zeros, start, cols_exist",
             "codes, scales, zeros, first, cols_exist"),
    Mutation("not centred", F, "tl.full([1, 1], 8, tl.uint8)", "tl.full([1, 1], 7, tl.uint8)"),
    Mutation("zeros of the first group", F, "tl.load(advance(zeros, group, zeros_row), mask",
             "tl.load(zeros, mask", "zeros"),
    Mutation("k past the end counts", W, "a_mask = a_mask & (inner < k - start)[None, :]", "a_mask = a_mask"),
    Mutation("a column's scale forgotten", W, "    if not GROUP_SIZE:  # one", "    if False:  # one", "column"),
    Mutation("zero of a column forgotten", W, "zero_of_column = tl.load(zeros, mask=cols_exist, other=0)[None, :]",
             "zero_of_column = tl.load(zeros, mask=cols_exist, other=0)[None, :] & 0", "column"),
    Mutation("the other batch's scales", W, "scales = advance(advance(scales, batch, scales_batch)",
             "scales = advance(advance(scales, 0, scales_batch)", "column"),
    Mutation("sign of e2m1", F, "((codes & 8) << 12) | ((codes & 7) << 9)", "((codes & 7) << 9)", "mxfp4"),
    Mutation("exponent of e8m0", F, "(byte << 23) | special", "((byte + 1) << 23) | special", "mxfp4"),
    Mutation("exponent of e4m3", F, "tl.constexpr(2.0**8)", "tl.constexpr(2.0**7)", "fp8"),
    Mutation("da without scales", W, "HAS_ZEROS, False, True, dz_tile.dtype",
             "HAS_ZEROS, False, False, dz_tile.dtype"),
    Mutation("da of high halves where low ones belong", W, "batch, row, first + apart, between",
             "batch, row, first, between"),
    Mutation("da's neighbours side by side", W, "first, apart, between = 2 * code_row, 1, 2",
             "first, apart, between = 2 * code_row, 1, 1", "blocks"),
    Mutation("last steps of n skipped", W, "for start in range(0, n, BLOCK_N)",
             "for start in range(0, n - 16, BLOCK_N)",
             "column"),
    Mutation("every split from the start", W, "for step in range(split, tl", "for step in range(0, tl"),
    Mutation("a split lost", E, "for split in range(SPLITS)", "for split in range(SPLITS - 1)"),
    Mutation("residual forgotten", E, "    if HAS_RESIDUAL:\n            residual = ",
             "    if False:\n            residual = "),
    Mutation("slope forgotten", E, "result *= derivative(z, ACTIVATION)", "result *= 1.0"),
    Mutation("row's scale forgotten", C, "* row_scales[:, None]", "", "codes"),
    Mutation("rounded towards zero", F, "near = tl.minimum(tl.maximum(quotients, -127.0), 127.0) + 12582912.0",
             "near = quotients.to(tl.int32).to(tl.float32) + 12582912.0", "codes"),
    Mutation("largest of positive numbers", C, "tops = tl.maximum(tops, tl.abs(tile))",
             "tops = tl.maximum(tops, tile)", "codes"),
    Mutation("scales of the next blocks", C, "a_scales + step * blocks + of_blocks", "a_scales + of_blocks", "blocks"),
    Mutation("a block's scale too small", F, "- 8 + ((bits", "- 9 + ((bits", "blocks"),
    Mutation("halves exchanged", PF, "codes >> 4 if high else codes", "codes if high else codes >> 4"),
    Mutation("not centred", PF, "codes = codes - 8", "codes = codes - 7"),
    Mutation("first group's scale", PF, "row = group if group_size else 0", "row = 0"),
    Mutation("value of e2m1", PF, "4 * magnitude - 16", "4 * magnitude - 12", "mxfp4"),
    Mutation("sign of e2m1", PF, "codes >= 8, -0.5, 0.5", "codes >= 10, -0.5, 0.5", "mxfp4"),
    Mutation("exponent of e8m0", PF, "(byte << 23)", "((byte - 1) << 23)", "mxfp4"),
    Mutation("column's scale forgotten", P, "if not group_size and not scales_left:", "if False:", "column"),
    Mutation("scales beside dz forgotten", P, "left * scales_ref[:, cols] if scales_left else left", "left", "column"),
    Mutation("the block's first rows of codes", PF, "* HALF + first % HALF if packed", "* HALF if packed"),
    Mutation("lower parts forgotten", P, "z += jnp.where(jnp.isnan(low), 0, low)", "z += 0 * low"),
    Mutation("row's scale forgotten", PC, "* row_scales_ref[rows, :]", "", "codes"),
    Mutation("rounded towards zero", PC, "jnp.round(quotients)", "quotients", "codes"),
    Mutation("residual forgotten", PE, "out = out + residual_ref[rows, cols].astype(jnp.float32)", "out = out"),
    Mutation("slope forgotten", PE, "dz *= derivative(activation,", "dz += 0 * derivative(activation,"),
    Mutation("activations not rounded", R, "if spec.a_format is not None:\n        x =",
             "if False:\n        x =", "codes"),
    Mutation("da of the weight as it lies", R, "w.swapaxes(1, 2)", "w.swapaxes(1, 2)[:, ::-1]"),
)  # fmt: skip


def worst(op: ModuleType, kernel: str, name: str) -> float:
    """The largest error on one problem, as a multiple of the allowed."""
    problem = CHECKED[name]
    ours = {T: interpreted, P: traced, R: defined}[kernel](op, problem, problem.native())
    excess = multiples(ours, problem.answers(problem.dtype), problem.answers(), problem.dtype)
    return max(np.inf if np.isnan(multiple) else multiple for multiple in excess.values())


def interpreted(op: ModuleType, problem: Problem, arrays: dict[str, Any]) -> dict[str, Any]:
    from crosstile.kernels.tiles.triton_interpreter import run

    spec, config = problem.spec, op.tiles.choose_config(problem.spec, INTERPRET)
    inputs = op.triton.completed(spec, config, INTERPRET, tuple(arrays.get(name) for name in INPUTS))
    named = arrays | {name: array for name, array in zip(INPUTS, inputs, strict=True) if array is not None}
    described = tuple(map(describe, inputs))
    plan = op.triton.forward(spec, config, *described)
    named |= dict(zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True))
    outputs = (describe(named["out"]), describe(named.get("preactivation")))
    plan = op.triton.backward(spec, config, described, outputs, (describe(named["dout"]), None))
    return {"out": named["out"]} | dict(
        zip(plan.outputs, run(plan, {name: named[name] for name in plan.inputs}), strict=True)
    )


def traced(op: ModuleType, problem: Problem, arrays: dict[str, Any]) -> dict[str, Any]:
    tile = op.tiles.QuantizedMatmulTiles(32, 128, 128)
    config = op.tiles.QuantizedMatmulConfig(tile, tile, tile)

    def run(inputs: Any, dout: Any) -> Any:
        outputs = op.pallas.forward(problem.spec, config, INTERPRET, *inputs)
        return outputs[0], op.pallas.backward(problem.spec, config, INTERPRET, inputs, outputs, (dout, None))

    fast = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    out, gradients = fast(tuple(arrays.get(name) for name in INPUTS), arrays["dout"])
    return {"out": out, **named_gradients(gradients)}


def defined(op: ModuleType, problem: Problem, arrays: dict[str, Any]) -> dict[str, Any]:
    inputs = tuple(arrays.get(name) for name in INPUTS)
    outputs = op.reference.forward(problem.spec, *inputs)
    gradients = op.reference.backward(problem.spec, inputs, outputs, (arrays["dout"], None))
    return {"out": outputs[0], **named_gradients(gradients)}


@cache
def sound(kernel: str, name: str) -> float:
    """The error of the kernel as it is."""
    return worst(package, kernel, name)


def swept_mutation(mutation: Mutation) -> bool:
    """Those of Pallas whose namesakes are mistakes in Triton, but for the two of the shared epilogue."""
    return mutation.file in (P, PC, PF) and mutation.name in {m.name for m in MUTATIONS if m.file in (W, C, F)}


@pytest.mark.parametrize(
    "mutation", swept(MUTATIONS, swept_mutation), ids=lambda m: f"{m.file.split('/')[-1]}-{m.name}".replace(" ", "_")
)
def test_the_check_notices(mutation, tmp_path):
    name = mutation.file.split("/")[-1]
    kernel = next(kind for kind in (T, P, R) if name.startswith(kind))
    assert sound(kernel, mutation.problem) <= 1
    assert worst(mutated("quantized_matmul", mutation, tmp_path), kernel, mutation.problem) > 1
