"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of a kernel file.

The check is the suite's rule on small problems of several tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mutations import describe, mutated
from oracles import attention_by_torch, matmul_by_torch, multiples, rounded
from sweeps import one_in

from crosstile import plans
from crosstile.dispatch import OPS
from crosstile.kernels.attention import reference as attention_reference
from crosstile.kernels.attention.sparsity import flat
from crosstile.kernels.attention.spec import INPUTS, AttentionSpec
from crosstile.kernels.matmul.spec import MatmulSpec
from crosstile.kernels.tiles.expressions import SCORE, Expression, const, plane
from crosstile.kernels.tiles.targets import INTERPRET
from crosstile.kernels.tiles.visibility import visible_tiles


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: what is wrong.
        file: where, below kernels/.
        old: the text that is replaced, everywhere it occurs.
        new: by what.
        problems: on which of the op's problems the check must notice it.
        direction: "forward" or "backward".
    """

    name: str
    file: str
    old: str
    new: str
    direction: str = "forward"
    problems: tuple[str, ...] = ("causal",)


def broken(op: str, mutation: Mutation, kernel: str, folder: Path) -> ModuleType:
    """The kernel file of a copy of the op with the mistake in it."""
    module: ModuleType = getattr(mutated(op, mutation, folder), kernel)
    return module


def execute(module: ModuleType, op: str, direction: str, spec: Any, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """One direction of a kernel module, or of a reference, on NumPy arrays, interpreted."""
    name = Path(module.__file__).stem
    if name == "reference":
        return getattr(module, direction)(spec, *operands)
    config = OPS[op].module("tiles").choose_config(spec, INTERPRET)
    if name == "triton":
        from crosstile.kernels.tiles import triton_interpreter

        described = plans.map_arrays(describe, operands)
        plan = getattr(module, direction)(spec, config, *described)
        return plans.collect(OPS[op], direction, plan, triton_interpreter.run(plan, plans.by_name(OPS[op], operands)))
    import jax

    # Each copy is compiled and runs once: the compiler's efforts would not pay.
    run = jax.jit(
        lambda operands: getattr(module, direction)(spec, config, INTERPRET, *operands),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return run(operands)


# ---- Problems: several tiles of 32 each way, none full


def before_nan(array: np.ndarray) -> np.ndarray:
    """In float32, with room of NaN behind it: what a kernel reads past the end is no accident, and shows."""
    storage = np.full(array.size + 2**14, np.nan, np.float32)
    view = storage[: array.size].reshape(array.shape)
    view[...] = array
    return view


@dataclass(frozen=True)
class AttentionProblem:
    q_len: int
    kv_len: int
    causal: bool
    shapes: tuple[int, int, int, int] = (2, 2, 20, 12)  # kv_heads, group, head_dim, v_dim

    def __hash__(self) -> int:
        return id(self)

    @cache  # noqa: B019 (a handful of constants)
    def known(self) -> tuple[Any, ...]:
        """(spec, inputs, outputs, gradients, the framework's own answer, the exact one), in float32."""
        kv_heads, group, head_dim, v_dim = self.shapes
        heads = kv_heads * group
        rng = np.random.default_rng(0)
        shapes = {
            "q": (1, self.q_len, heads, head_dim),
            "k": (1, self.kv_len, kv_heads, head_dim),
            "v": (1, self.kv_len, kv_heads, v_dim),
            "dout": (1, self.q_len, heads, v_dim),
            "dlse": (1, heads, self.q_len),
        }
        arrays = {name: rounded(rng.standard_normal(shape), "float32") for name, shape in shapes.items()}
        exact = attention_by_torch(**arrays, causal=self.causal)
        own = attention_by_torch(**arrays, causal=self.causal, dtype="float32")
        single = {name: before_nan(array) for name, array in {**arrays, **exact}.items()}
        spec = AttentionSpec("float32", head_dim, v_dim, causal=self.causal, return_lse=True)
        inputs = tuple(single.get(name) for name in INPUTS)
        groups = (("out", "lse"), ("dout", "dlse"))
        return spec, inputs, *(tuple(single[name] for name in group) for group in groups), own, exact


@dataclass(frozen=True)
class FeatureProblem:
    """Attention with options and other arrays; the definition is the exact answer, and in float32 the peer."""

    options: dict[str, Any]
    others: dict[str, Any]  # arrays, or the shapes of normal numbers
    q_len: int = 40
    kv_len: int = 52
    batch: int = 2

    def __hash__(self) -> int:
        return id(self)

    @cache  # noqa: B019 (a handful of constants)
    def known(self) -> tuple[Any, ...]:
        """As of plain attention."""
        rng = np.random.default_rng(0)
        shapes = {
            "q": (self.batch, self.q_len, 2, 20),
            "k": (self.batch, self.kv_len, 1, 20),
            "v": (self.batch, self.kv_len, 1, 12),
            "dout": (self.batch, self.q_len, 2, 12),
            "dlse": (self.batch, 2, self.q_len),
            **{name: other for name, other in self.others.items() if isinstance(other, tuple)},
        }
        arrays = {name: rounded(rng.standard_normal(shape), "float32") for name, shape in shapes.items()}
        answers = []
        for dtype in ("float64", "float32"):
            given = {name: array.astype(dtype) for name, array in arrays.items()} | {
                name: other for name, other in self.others.items() if not isinstance(other, tuple)
            }
            spec = AttentionSpec(dtype, 20, 12, return_lse=True, **self.options)
            inputs = tuple(given.get(name) for name in INPUTS)
            outputs = attention_reference.forward(spec, *inputs)
            gradients = attention_reference.backward(spec, inputs, outputs, (given["dout"], given["dlse"]))
            found = dict(zip(("out", "lse", *plans.gradient_names(INPUTS)), (*outputs, *gradients), strict=True))
            answers.append({name: array for name, array in found.items() if array is not None})
        exact, own = answers
        groups = (INPUTS, ("out", "lse"), ("dout", "dlse"))
        single = {
            name: before_nan(array) for name, array in {**arrays, "out": exact["out"], "lse": exact["lse"]}.items()
        }
        single |= {name: array for name, array in given.items() if name not in single}
        return spec, *(tuple(single.get(name) for name in group) for group in groups), own, exact


@dataclass(frozen=True)
class MatmulProblem:
    activation: str | None
    sizes: tuple[int, int, int, int] = (2, 40, 50, 36)  # batch, m, k, n

    def __hash__(self) -> int:
        return id(self)

    @cache  # noqa: B019 (a handful of constants)
    def known(self) -> tuple[Any, ...]:
        """As of attention."""
        batch, m, k, n = self.sizes
        rng = np.random.default_rng(0)
        shapes = {
            "a": (batch, m, k),
            "b": (batch, k, n),
            "bias": (batch, 1, n),
            "residual": (batch, m, n),
            "dout": (batch, m, n),
        }
        arrays = {name: rounded(rng.standard_normal(shape), "float32") for name, shape in shapes.items()}
        exact = matmul_by_torch(**arrays, activation=self.activation)
        own = matmul_by_torch(**arrays, activation=self.activation, dtype="float32")
        for answer in (exact, own):
            answer["dbias"] = answer["dbias"][:, 0]
        single = {name: before_nan(array) for name, array in {**arrays, "out": exact["out"]}.items()}
        single["bias"] = single["bias"][:, 0]
        preactivation = before_nan(arrays["a"] @ arrays["b"] + arrays["bias"])
        saved = preactivation if self.activation else None
        spec = MatmulSpec("float32", "float32", self.activation, save_preactivation=self.activation is not None)
        inputs = tuple(single[name] for name in ("a", "b", "bias", "residual"))
        return spec, inputs, (single["out"], saved), (single["dout"], None), own, exact


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def with_runs(mask: Expression, q_len: int, kv_len: int) -> dict[str, Any]:
    """The lists of the tiles that the interpreted kernels visit under the mask."""
    runs = visible_tiles(mask, q_len, kv_len, 32, 32)
    return {"forward_runs": flat(runs), "dq_runs": flat(runs), "dkv_runs": flat(runs.transposed())}


DOCUMENTS: Expression = ("eq", ("floordiv", ("i",), const(70)), ("floordiv", ("j",), const(75)))
PROBLEMS: dict[str, dict[str, Any]] = {
    "attention": {
        "causal": AttentionProblem(40, 52, True),
        "whole": AttentionProblem(40, 52, False),
        "square": AttentionProblem(40, 40, True),
        "blind": AttentionProblem(52, 40, True),
        "window": FeatureProblem({"window_left": 11, "window_right": 6}, {}, 100, 120, 1),
        "wide window": FeatureProblem({"window_left": 60, "window_right": 40}, {}, 100, 120, 1),
        "window of tiles": FeatureProblem({"causal": True, "window_left": 31}, {}, 64, 64, 1),
        "following": FeatureProblem({"causal": True, "window_left": 31}, {}, 130, 162, 1),
        "lengths": FeatureProblem({"causal": True}, {"q_lengths": ints(40, 13), "kv_lengths": ints(20, 52)}),
        "padded": FeatureProblem({}, {"q_lengths": ints(40, 13), "kv_lengths": ints(20, 52)}),
        "packed": FeatureProblem(
            {"causal": True}, {"cu_seqlens_q": ints(0, 18, 18, 55), "cu_seqlens_k": ints(0, 50, 51, 90)}, 60, 99, 1
        ),
        "packed, sinks": FeatureProblem(
            {}, {"cu_seqlens_q": ints(0, 18, 18, 55), "cu_seqlens_k": ints(0, 50, 51, 90), "sinks": (1, 2)}, 60, 99, 1
        ),
        "packed, sinks, dropout": FeatureProblem(
            {"dropout": 0.4},
            {
                "cu_seqlens_q": ints(0, 18, 18, 55),
                "cu_seqlens_k": ints(0, 50, 51, 90),
                "sinks": (1, 2),
                "dropout_seed": ints(7, 1),
            },
            60,
            99,
            1,
        ),
        "sinks": FeatureProblem({"causal": True}, {"sinks": (2, 2)}, 52, 40),
        "softcap": FeatureProblem({"score": ("mul", ("tanh", SCORE), const(2.0))}, {}),
        "plane": FeatureProblem(
            {"score": ("add", SCORE, ("mul", plane(0), ("sub", ("j",), ("i",)))), "plane_gradients": (0,)},
            {"plane0": (1, 2, 40, 1)},
        ),
        "gentle plane": FeatureProblem(
            {
                "score": ("add", SCORE, ("mul", plane(0), ("mul", ("sub", ("j",), ("i",)), const(0.125)))),
                "plane_gradients": (0,),
            },
            {"plane0": (1, 2, 40, 1)},
        ),
        "padded, sinks": FeatureProblem({}, {"q_lengths": ints(40, 13), "kv_lengths": ints(20, 52), "sinks": (2, 2)}),
        "tightly packed": FeatureProblem(
            {"max_seqlen_q": 37, "max_seqlen_k": 50},
            {"cu_seqlens_q": ints(0, 18, 18, 55), "cu_seqlens_k": ints(0, 50, 51, 90)},
            60,
            99,
            1,
        ),
        "runs": FeatureProblem({"mask": DOCUMENTS}, with_runs(DOCUMENTS, 128, 128), 128, 128, 1),
        "dropout": FeatureProblem({"dropout": 0.4}, {"dropout_seed": ints(7, 1)}),
        "few": AttentionProblem(3, 150, True),
        "few, many heads": AttentionProblem(1, 70, True, (12, 1, 20, 12)),
        "few, window, sinks": FeatureProblem(
            {"window_left": 60, "window_right": 2},
            {"q_lengths": ints(3, 2), "kv_lengths": ints(150, 97), "sinks": (2, 2)},
            3,
            150,
        ),
        "few, padded": FeatureProblem({}, {"q_lengths": ints(3, 1), "kv_lengths": ints(150, 70)}, 3, 150),
        "mask": FeatureProblem(
            {"mask": ("ne", ("mod", ("sub", ("i",), ("j",)), const(3)), plane(0))},
            {"plane0": np.resize(np.arange(3, dtype=np.int32), (2, 1, 40, 1))},
        ),
    },
    "matmul": {
        **{name or "plain": MatmulProblem(name) for name in (None, "relu", "gelu", "gelu_tanh", "silu")},
        "one matrix": MatmulProblem(None, (1, 40, 48, 40)),  # which the copy engine loads and stores
    },
}


def worst(module: ModuleType, op: str, direction: str, problem: str) -> float:
    """The largest error of one direction on one problem, as a multiple of the allowed."""
    spec, inputs, outputs, gradients, own, exact = PROBLEMS[op][problem].known()
    operands = inputs if direction == "forward" else (inputs, outputs, gradients)
    results = execute(module, op, direction, spec, operands)
    names = OPS[op].outputs if direction == "forward" else plans.gradient_names(OPS[op].inputs)
    ours = {name: result for name, result in zip(names, results, strict=True) if name in exact}
    found = multiples(ours, own, exact, "float32")
    return max(np.inf if np.isnan(multiple) else multiple for multiple in found.values())


# ---- Mistakes

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Suite:
    """The mistakes made in one kernel."""

    op: str
    kernel: str
    mutations: tuple[Mutation, ...] = field(default=())


T, H, X = "attention/triton.py", "tiles/triton_tiles.py", "tiles/triton_expressions.py"
KV, DQ, TP, TW, TG = (f"attention/triton_{part}.py" for part in ("dkv", "dq", "planes", "weights", "programs"))
RN = "tiles/triton_philox.py"
ATTENTION_TRITON = Suite(
    "attention",
    "triton",
    (
        Mutation("no causal mask", H, "mask = keys <= queries + (kv_len - q_len + RIGHT)", "mask = keys < kv_len"),
        Mutation(
            "no causal mask, backward",
            H,
            "mask = keys <= queries + (kv_len - q_len + RIGHT)",
            "mask = keys < kv_len",
            BACKWARD,
        ),
        Mutation("aligned top-left", H, "queries + (kv_len - q_len + RIGHT)", "queries"),
        Mutation("aligned top-left, backward", H, "queries + (kv_len - q_len + RIGHT)", "queries", BACKWARD),
        Mutation("one key too few", H, "keys <= queries + (", "keys < queries + ("),
        Mutation("one key too many", H, "mask = keys < kv_len", "mask = keys <= kv_len", problems=("whole",)),
        Mutation("scale 1% off", T, "(abs(spec.softmax_scale)", "(1.01 * abs(spec.softmax_scale)"),
        Mutation("scale in base e", T, "log2_scale = log2(e) * (abs", "log2_scale = (abs"),
        Mutation(
            "scale in base e, backward",
            TW,
            "tl.exp2(scores * log2_scale",
            "tl.exp2(scores * log2_scale * 0.69",
            BACKWARD,
        ),
        Mutation(
            "last tile of keys skipped",
            H,
            "    end = kv_len\n",
            "    end = kv_len // BLOCK_KV * BLOCK_KV\n",
            problems=("whole",),
        ),
        Mutation(
            "last tile of keys skipped, causal",
            H,
            "return start, full_start, full_end, end\n\n\n@triton.jit\ndef q_ranges",
            "return start, full_start, full_end, end // BLOCK_KV * BLOCK_KV\n\n\n@triton.jit\ndef q_ranges",
        ),
        Mutation(
            "first tile of queries skipped",
            H,
            "q_len - tl.cdiv(seeing_any, BLOCK_Q) * BLOCK_Q",
            "q_len - seeing_any // BLOCK_Q * BLOCK_Q",
            BACKWARD,
            ("whole",),
        ),
        Mutation("the copy engine loads row 0", H, "load([head, first_row, 0])", "load([head, 0, 0])", BACKWARD),
        Mutation("the copy engine loads head 0", H, "load([head, first_row, 0])", "load([0, first_row, 0])", BACKWARD),
        Mutation("the sum is not rescaled", H, "total * rescale + tl.sum", "total + tl.sum"),
        Mutation("the accumulator is not rescaled", T, "acc * rescale[:, None]", "acc"),
        Mutation("lse in base 2", T, "(peak + tl.log2(total)) * LN_2", "(peak + tl.log2(total))"),
        Mutation("blind rows divide by 0", T, "tl.where(total == 0.0, 1.0, total)", "total", problems=("blind",)),
        Mutation(
            "the wrong key head",
            T,
            "advance(advance(k, batch, k_batch), head // GROUP, k_head)",
            "advance(advance(k, batch, k_batch), head % 2, k_head)",
        ),
        Mutation(
            "delta with the wrong sign in dk",
            KV,
            "(dweights - delta_tile[None, :])",
            "(dweights + delta_tile[None, :])",
            BACKWARD,
        ),
        Mutation(
            "delta with the wrong sign in dq",
            DQ,
            "(dweights - delta_tile[:, None])",
            "(dweights + delta_tile[:, None])",
            BACKWARD,
        ),
        Mutation("dlse forgotten", TW, "delta_tile -= load_rows", "delta_tile -= 0.0 * load_rows", BACKWARD),
        Mutation("dlse added", TW, "delta_tile -= load_rows", "delta_tile += load_rows", BACKWARD),
        Mutation("only one head of a group", KV, "tl.range(0, GROUP * tiles", "tl.range(0, tiles", BACKWARD),
        Mutation("dk not scaled", KV, "dk_tile * scale", "dk_tile", BACKWARD),
        Mutation("dq not scaled", DQ, "dq_tile * scale", "dq_tile", BACKWARD),
        Mutation(
            "dv summed from float16",
            KV,
            "dv = tl.dot(dropped.to(dout_tile.dtype), dout_tile",
            "dv = tl.dot(dropped, dout_tile.to(tl.float16).to(tl.float32)",
            BACKWARD,
        ),
        Mutation(
            "window a key too wide", H, "(kv_len - q_len - LEFT)", "(kv_len - q_len - LEFT - 1)", problems=("window",)
        ),
        Mutation(
            "window a key too narrow, backward",
            H,
            "(kv_len - q_len - LEFT)",
            "(kv_len - q_len - LEFT + 1)",
            BACKWARD,
            ("window",),
        ),
        Mutation(
            "keys before a window",
            H,
            "// BLOCK_KV * BLOCK_KV\n        full_end = tl",
            "// BLOCK_KV * BLOCK_KV + BLOCK_KV\n        full_end = tl",
            problems=("window",),
        ),
        Mutation(
            "the left edge in whole tiles",
            H,
            "tl.cdiv(tl.maximum(hidden_to_last, 0), BLOCK_KV)",
            "(tl.maximum(hidden_to_last, 0) // BLOCK_KV)",
            problems=("wide window",),
        ),
        Mutation(
            "queries at a window's left edge",
            H,
            "tl.cdiv(beyond_any, BLOCK_Q) * BLOCK_Q",
            "beyond_any // BLOCK_Q * BLOCK_Q",
            BACKWARD,
            ("wide window",),
        ),
        Mutation(
            "queries past a window",
            H,
            "end = q_len - beyond_all",
            "end = full_start + 0 * beyond_all",
            BACKWARD,
            ("wide window",),
        ),
        Mutation(
            "queries past their length",
            T,
            "acc = tl.where(exist[:, None], acc, 0.0)",
            "acc = acc",
            problems=("lengths",),
        ),
        Mutation(
            "keys past their length",
            KV,
            "dv_tile = tl.where(exist, dv_tile, 0.0)",
            "dv_tile = dv_tile",
            BACKWARD,
            ("padded",),
        ),
        Mutation(
            "aligned by the padded size",
            TG,
            "q_len = length_of(q_lengths, batch, q_size, Q_LENGTHS)",
            "q_len = q_size",
            problems=("lengths",),
        ),
        Mutation(
            "the last tile of queries is forgotten", TG, "- tl.program_id(1)", "- tl.maximum(tl.program_id(1), 1)"
        ),
        Mutation("a head twice", TG, "head, batch = pair % heads", "head, batch = pair % 2"),
        Mutation("a tile of keys twice", TG, "tile = within // together", "tile = within // together // 2", BACKWARD),
        Mutation("the sequence before", TG, "return low\n", "return tl.maximum(low - 1, 0)\n", problems=("packed",)),
        Mutation("schedule without the extra tiles", TG, "// BLOCK + middle\n", "// BLOCK\n", problems=("packed",)),
        Mutation(
            "rows past the last sequence see keys",
            TG,
            "kv_len = tl.where(item < sequences, kv_len, 0)",
            "kv_len = kv_size - kv_first",
            problems=("packed",),
        ),
        Mutation(
            "no sink in the denominator",
            T,
            'tl.where(first_peak == float("-inf"), 0.0, ONE)',
            "0.0",
            problems=("sinks",),
        ),
        Mutation("runs begin a tile late", TG, "~first, first) * BLOCK", "-first, first) * BLOCK", problems=("runs",)),
        Mutation(
            "runs begin a tile late, dq", TG, "~first, first) * BLOCK", "-first, first) * BLOCK", BACKWARD, ("runs",)
        ),
        Mutation("every run whole", TG, "whole = first < 0", "whole = first == first", problems=("runs",)),
        Mutation(
            "runs of the next row of keys",
            KV,
            "first_head, tile, seq",
            "first_head, tile + 1, seq",
            BACKWARD,
            ("runs",),
        ),
        Mutation("words in another order", RN, "tl.join(one, three)", "tl.join(three, one)", problems=("dropout",)),
        Mutation(
            "a round too few", RN, "tl.static_range(_ROUNDS)", "tl.static_range(_ROUNDS - 1)", problems=("dropout",)
        ),
        Mutation("dv from all weights", KV, "tl.where(stay, weights, 0.0)", "weights", BACKWARD, ("dropout",)),
        Mutation(
            "dq from all gradients",
            DQ,
            "tl.where(stay, dweights / kept_share, 0.0)",
            "dweights",
            BACKWARD,
            ("dropout",),
        ),
        Mutation("the others not made larger", T, "acc = acc / kept_share", "acc = acc", problems=("dropout",)),
        Mutation("sink in base 2", T, "head * sinks_head) * LOG2_E", "head * sinks_head)", problems=("sinks",)),
        Mutation(
            "gradient of the sinks with the wrong sign", TP, "-tl.sum(total", "tl.sum(total", BACKWARD, ("sinks",)
        ),
        Mutation(
            "the derivative left out of dq and dk",
            KV,
            "dscores * evaluate(SLOPE, raw, at, plane_tiles)",
            "dscores",
            BACKWARD,
            ("softcap",),
        ),
        Mutation(
            "the derivative of the changed score",
            TW,
            "return weights, scores\n",
            "return weights, changed\n",
            BACKWARD,
            ("softcap",),
        ),
        Mutation("tanh saturates too early", X, "size < 0.625", "size < 1.5", problems=("softcap",)),
        Mutation(
            "the scale forgotten before an expression",
            T,
            "raw = scores * score_scale",
            "raw = scores",
            problems=("softcap",),
        ),
        Mutation(
            "a plane's derivative left out",
            TP,
            "change * evaluate(SLOPE, raw, at, tiles)",
            "change",
            BACKWARD,
            ("plane",),
        ),
        Mutation(
            "one batch item of a plane only",
            TP,
            "for item in tl.range(item_begin, item_end,",
            "for item in tl.range(item_begin, item_begin + 1,",
            BACKWARD,
            ("plane",),
        ),
        Mutation(
            "integers divided towards 0",
            X,
            "value = remainder + tl.where((remainder != 0) & ((remainder ^ y) < 0), y, 0)",
            "value = remainder",
            problems=("mask",),
        ),
        Mutation(
            "a mask left out",
            T,
            "truth(evaluate(MASK, raw, at, tiles))",
            "truth(evaluate(MASK, raw, at, tiles)) | True",
            problems=("mask",),
        ),
        Mutation(
            "a mask left out, backward",
            TW,
            "truth(evaluate(MASK, scores, at, planes))",
            "truth(evaluate(MASK, scores, at, planes)) | True",
            BACKWARD,
            ("mask",),
        ),
    ),
)

P, PT, PN = "attention/pallas.py", "attention/pallas_tiling.py", "tiles/pallas_philox.py"
PF, PB, PP, PS, PK, PV = (
    f"attention/pallas_{part}.py" for part in ("forward", "backward", "planes", "scores", "packed", "visits")
)
ATTENTION_PALLAS = Suite(
    "attention",
    "pallas",
    (
        Mutation("no causal mask", PT, "keys - queries <= query - key", "keys - queries <= 1000 + query - key"),
        Mutation(
            "no causal mask, backward",
            PT,
            "keys - queries <= query - key",
            "keys - queries <= 1000 + query - key",
            BACKWARD,
        ),
        Mutation("aligned top-left", PT, "return self.kv_len - self.q_len", "return 0"),
        Mutation("aligned top-left, backward", PT, "return self.kv_len - self.q_len", "return 0", BACKWARD),
        Mutation(
            "tail of the keys not masked",
            PT,
            "keys < self.kv_len - key - group",
            "keys >= 0 * group",
            problems=("whole",),
        ),
        Mutation("scale 1% off", PS, "(self.scale * LOG2_E)", "(1.01 * self.scale * LOG2_E)"),
        Mutation("scale in base e, backward", PS, "(self.scale * LOG2_E)", "self.scale", BACKWARD),
        Mutation(
            "last tile of keys skipped",
            PT,
            "_div(end + block - 1, block)",
            "_div(end, block)",
            problems=("whole",),
        ),
        Mutation(
            "last tile of queries skipped",
            PB,
            "whole_end = jnp.minimum(whole_end, end)",
            "whole_end = jnp.minimum(whole_end, end) - 1",
            BACKWARD,
        ),
        Mutation("the sum is not rescaled", PF, "total_ref[...] * shrink", "total_ref[...]"),
        Mutation("the accumulator is not rescaled", PF, "acc[dims, strip] * shrink[:, strip]", "acc[dims, strip]"),
        Mutation(
            "no mask on a diagonal", PT, "return keys.stop - 1 > strip.start", "return False", problems=("square",)
        ),
        Mutation(
            "a part of a diagonal's keys skipped",
            PT,
            "-(-strip.stop // part) * part",
            "strip.stop - part",
            problems=("square",),
        ),
        Mutation(
            "no mask on a window's left diagonal",
            PT,
            "return keys.start < strip.stop",
            "return False",
            problems=("window of tiles",),
        ),
        Mutation(
            "no mask on a diagonal, backward",
            PB,
            "Seen.UP_TO_DIAGONAL if tiling.diagonal",
            "Seen.WHOLE if tiling.diagonal",
            BACKWARD,
            ("square",),
        ),
        Mutation(
            "no mask on a window's left diagonal, backward",
            PB,
            "Seen.PAST_DIAGONAL if tiling.left_diagonal",
            "Seen.WHOLE if tiling.left_diagonal",
            BACKWARD,
            ("window of tiles",),
        ),
        Mutation(
            "a part of a diagonal's queries skipped",
            PT,
            "return slice(keys.start, block_q)",
            "return slice(block_q - keys.stop + keys.start, block_q)",
            BACKWARD,
            ("square",),
        ),
        Mutation(
            "a part of a left diagonal's queries skipped",
            PT,
            "keys.stop if self is Seen.PAST_DIAGONAL",
            "keys.stop - keys.start if self is Seen.PAST_DIAGONAL",
            BACKWARD,
            ("window of tiles",),
        ),
        Mutation("sums that follow start from others", PB, "clear(tiles - 1)", "pass", BACKWARD, ("following",)),
        Mutation(
            "queries begin with the keys",
            PB,
            "first_seen(*step) * block_q",
            "step[3] * block_q",
            BACKWARD,
            ("following",),
        ),
        Mutation(
            "dq of one head",
            PB,
            "return step[0], q_head(*step), 0, first_seen(*step)",
            "return step[0], step[1] * heads, 0, first_seen(*step)",
            BACKWARD,
            ("following",),
        ),
        Mutation(
            "a tile of queries too few follows",
            PT,
            "max(self.left, 0)) // self.block_q + 1",
            "max(self.left, 0)) // self.block_q",
            BACKWARD,
            ("following",),
        ),
        Mutation("lse in base 2", PF, "(peak + jnp.log2(divisor)) * LN_2", "(peak + jnp.log2(divisor))"),
        Mutation("blind rows divide by 0", PF, "jnp.where(empty, 1, total)", "total", problems=("blind",)),
        Mutation("the wrong key head", PF, "lax.div(h, q_heads // kv_heads)", "lax.rem(h, kv_heads)"),
        Mutation("delta with the wrong sign", PB, "(dweights - delta)", "(dweights + delta)", BACKWARD),
        Mutation("dlse forgotten", P, "delta = delta - subtracted", "pass", BACKWARD),
        Mutation("only the last head of a group", PB, "@pl.when(head == 0)", "@pl.when(head >= 0)", BACKWARD),
        Mutation("dk not scaled", PB, "(dk_acc[...] * scale)", "dk_acc[...]", BACKWARD),
        Mutation(
            "dq not scaled", PB, "(dq_acc[head, :, sums_of(tile)] * scale)", "dq_acc[head, :, sums_of(tile)]", BACKWARD
        ),
        Mutation(
            "window a key too wide",
            PT,
            "self.offset - tiling.left - group",
            "self.offset - tiling.left - 1 - group",
            problems=("window",),
        ),
        Mutation(
            "window a key too narrow, backward",
            PT,
            "self.offset - tiling.left - group",
            "self.offset - tiling.left + 1 - group",
            BACKWARD,
            ("window",),
        ),
        Mutation(
            "keys before a window not masked",
            PF,
            "first = jnp.clip(unshared, begin, end - 1)",
            "first = begin",
            problems=("wide window",),
        ),
        Mutation(
            "keys before a window skipped",
            PT,
            "begin, whole_begin = clip(first - tiling.left)",
            "begin, whole_begin = clip(last - tiling.left)",
            problems=("wide window",),
        ),
        Mutation(
            "queries past a window",
            PT,
            "end = clip(last + tiling.left + 1)",
            "end = clip(first + tiling.left + 1)",
            BACKWARD,
            ("wide window",),
        ),
        Mutation(
            "queries at a window's end not masked",
            PB,
            "jnp.maximum(whole_begin, whole_end), end, partial(run, seen=last_edge)",
            "jnp.maximum(whole_begin, whole_end), end, partial(run, seen=Seen.WHOLE)",
            BACKWARD,
            ("wide window",),
        ),
        Mutation(
            "queries past their length",
            PF,
            "summed = jnp.where(exist, summed, 0)",
            "summed = summed",
            problems=("lengths", "padded"),
        ),
        Mutation(
            "keys past their length", PT, "keys < self.kv_len - key - group", "keys >= 0 * group", problems=("padded",)
        ),
        Mutation(
            "queries past their length, backward",
            P,
            "blind |= jnp.arange",
            "blind &= jnp.arange",
            BACKWARD,
            ("padded, sinks",),
        ),
        Mutation(
            "the lengths of the first item", PT, "scalars[0][1, b]", "scalars[0][1, 0]", problems=("lengths", "padded")
        ),
        Mutation(
            "the next sequence's keys",
            PK,
            "self.size), self.starts[:-1])",
            "self.size), self.starts[1:])",
            BACKWARD,
            ("packed",),
        ),
        Mutation(
            "tokens of no sequence",
            PK,
            "nothing[: self.size], self.starts[-1]",
            "tokens[: self.size], 0",
            problems=("packed, sinks, dropout",),
        ),
        Mutation(
            "no room past the last token",
            PK,
            "self.tokens + self.size)\n",
            "self.tokens)\n",
            BACKWARD,
            ("tightly packed",),
        ),
        Mutation(
            "the first sequence last",
            PK,
            "self.starts[:-1]))\n",
            "self.starts[:-1]), reverse=True)\n",
            BACKWARD,
            ("packed",),
        ),
        Mutation(
            "neighbours' keys",
            PT,
            "keys >= self.kv_first - key - group",
            "keys >= -1000 - 0 * group",
            problems=("packed", "tightly packed"),
        ),
        Mutation(
            "results of the sequence before",
            PV,
            "+ visit.query >= visit.q_first",
            "+ visit.query >= 0",
            problems=("packed",),
        ),
        Mutation(
            "the last row of lanes not kept", PV, "kept_ref[...] = tile[:, last]", "pass", problems=("tightly packed",)
        ),
        Mutation(
            "tokens of no sequence not visited",
            PV,
            "jnp.where(last, tokens, ends)",
            "jnp.where(last, 0, ends)",
            problems=("packed",),
        ),
        Mutation(
            "sinks of tokens of no sequence", PV, "< arrays.cu_seqlens_q[-1]", ">= 0", problems=("packed, sinks",)
        ),
        Mutation("runs begin a tile late", PT, "~listed[at], listed", "-listed[at], listed", problems=("runs",)),
        Mutation("runs begin a tile late, dkv", PT, "~listed[at], listed", "-listed[at], listed", BACKWARD, ("runs",)),
        Mutation("all weights stay", PF, "scores.changed(weights, place)", "weights", problems=("dropout",)),
        Mutation("dropout of another head", PN, "full(counters, h", "full(counters, b", problems=("dropout",)),
        Mutation(
            "gradients of all",
            PB,
            "scores.dropped(dweights / (1",
            "(lambda x, _: x)(dweights / (1",
            BACKWARD,
            ("dropout",),
        ),
        Mutation(
            "dv not made larger", PB, "dv_acc[...] / (1 - scores.dropout) if", "dv_acc[...] if", BACKWARD, ("dropout",)
        ),
        Mutation("sinks count twice", PF, "one / SUBLANES", "2 / SUBLANES", problems=("sinks",)),
        Mutation(
            "sinks in base e", PF, "sinks[:, :, None, None] * LOG2_E", "sinks[:, :, None, None]", problems=("sinks",)
        ),
        Mutation("dsinks with the wrong sign", P, "-(weights * delta)", "(weights * delta)", BACKWARD, ("sinks",)),
        Mutation("score not applied", PS, "if self.score is None:", "if True:", problems=("softcap", "plane")),
        Mutation("slope of the score forgotten", PB, "if slope != const(1.0):", "if False:", BACKWARD, ("softcap",)),
        Mutation(
            "slope of a plane forgotten",
            PP,
            "slope_of(spec, plane_leaf(slot))",
            "slope_of(spec)",
            BACKWARD,
            ("gentle plane",),
        ),
        Mutation(
            "plane's sum not cleared", PP, "@pl.when(first)", "@pl.when(first & (i < 0))", BACKWARD, ("gentle plane",)
        ),
        Mutation(
            "only the last tile of a plane",
            PP,
            "@pl.when(first)",
            "@pl.when(first | (j >= 0))",
            BACKWARD,
            ("gentle plane",),
        ),
        Mutation(
            "plane's tiles skipped",
            PP,
            "(j >= begin) & (j < end)",
            "(j >= begin) & (j < end - 1)",
            BACKWARD,
            ("gentle plane",),
        ),
        Mutation(
            "mask not applied", PS, "if self.masks(masked) and self.mask is not None:", "if False:", problems=("mask",)
        ),
        Mutation(
            "mask not applied, backward",
            PS,
            "if self.masks(masked) and self.mask is not None:",
            "if False:",
            BACKWARD,
            ("mask",),
        ),
        Mutation(
            "indices of queries and keys swapped",
            PS,
            "row, 2) + (place.query",
            "row, 2) + (place.key",
            problems=("mask",),
        ),
        Mutation(
            "indices of keys from 0 in each group",
            PS,
            "row, 1) + keys + (place.key",
            "row, 1) + (place.key",
            problems=("mask",),
        ),
    ),
)

T, E, A = "matmul/triton.py", "tiles/triton_epilogue.py", "tiles/triton_activations.py"
PLAIN, GELU = ("plain",), ("gelu",)
MATMUL_TRITON = Suite(
    "matmul",
    "triton",
    (
        Mutation(
            "bias dropped", E, "if HAS_BIAS:\n            bias =", "if False:\n            bias =", problems=PLAIN
        ),
        Mutation(
            "residual dropped",
            E,
            "if HAS_RESIDUAL:\n            residual =",
            "if False:\n            residual =",
            problems=PLAIN,
        ),
        Mutation("activation dropped", E, "result = activate(sums, ACTIVATION)", "result = sums", problems=("relu",)),
        Mutation(
            "the copy engine stores in row 0", E, "out.store([row, col]", "out.store([0, col]", problems=("one matrix",)
        ),
        Mutation(
            "the copy engine loads the first step",
            "matmul/triton_product.py",
            "start = begin + step * BLOCK_K",
            "start = begin",
            problems=("one matrix",),
        ),
        Mutation("the other gelu", A, "y = x * _normal_cdf(x)", "y = x * _tanh_cdf(x)", problems=GELU),
        Mutation(
            "last tile along k skipped",
            "tiles/triton_products.py",
            "for start in range(0, k, BLOCK_K)",
            "for start in range(0, k // BLOCK_K * BLOCK_K, BLOCK_K)",
            problems=PLAIN,
        ),
        Mutation(
            "tail of k not masked",
            "matmul/triton_launches.py",
            '"EVEN_K": k % config.block_k == 0',
            '"EVEN_K": True',
            problems=PLAIN,
        ),
        Mutation(
            "derivative replaced by 1", E, "result *= derivative(z, ACTIVATION)", "result *= 1.0", BACKWARD, ("silu",)
        ),
        Mutation(
            "derivative of silu without its second term",
            A,
            "y = sigmoid * (1 + x * (1 - sigmoid))",
            "y = sigmoid",
            BACKWARD,
            ("silu",),
        ),
        Mutation(
            "derivative of gelu without its second term",
            A,
            "_normal_cdf(x) + x * tl.exp",
            "_normal_cdf(x) + 0.0 * tl.exp",
            BACKWARD,
            GELU,
        ),
        Mutation(
            "derivative of gelu_tanh with a wrong cubic",
            A,
            "slope = (1 + 3 *",
            "slope = (1 + 2 *",
            BACKWARD,
            ("gelu_tanh",),
        ),
        Mutation(
            "derivative of relu the wrong way round",
            A,
            "tl.where(x > 0, 1.0, 0.0)",
            "tl.where(x < 0, 1.0, 0.0)",
            BACKWARD,
            ("relu",),
        ),
        Mutation(
            "da from b, not b transposed",
            T,
            '("b", transposed(b))',
            '("b", Array((b.shape[0], b.shape[2], b.shape[1]), b.dtype, b.strides))',
            BACKWARD,
            PLAIN,
        ),
        Mutation(
            "dbias of one tile only",
            E,
            "for start in range(0, tiles, BLOCK_M)",
            "for start in range(0, tiles // 2, BLOCK_M)",
            BACKWARD,
            PLAIN,
        ),
    ),
)

P, E, A = "matmul/pallas.py", "tiles/pallas_epilogue.py", "tiles/pallas_activations.py"
MATMUL_PALLAS = Suite(
    "matmul",
    "pallas",
    (
        Mutation("bias dropped", E, "z = z + bias_ref", "z = z + 0 * bias_ref", problems=PLAIN),
        Mutation("residual dropped", E, "out = out + residual_ref", "out = out + 0 * residual_ref", problems=PLAIN),
        Mutation("activation dropped", E, "out = activate(activation, z)", "out = z", problems=("relu",)),
        Mutation("the other gelu", A, "return x * _normal_cdf(x)", "return x * _tanh_cdf(x)", problems=GELU),
        Mutation("last tile along k skipped", P, "lambda: multiply(tail, last=True)", "lambda: None", problems=PLAIN),
        Mutation(
            "tail of k not masked", P, "multiply(tail, last=True)", "multiply(block_k, last=True)", problems=PLAIN
        ),
        Mutation(
            "steps not summed", P, "product if steps == 1 else product +", "product if steps else", problems=PLAIN
        ),
        Mutation("the first sum is not cleared", P, "jnp.where(step == 0, 0, ", "(lambda sums: sums)(", problems=PLAIN),
        Mutation("derivative replaced by 1", E, "dz *= derivative(", "dz *= 1 + 0 * derivative(", BACKWARD, ("silu",)),
        Mutation(
            "derivative of gelu without its second term",
            A,
            "_normal_cdf(x) + x * jnp.exp",
            "_normal_cdf(x) + 0.0 * jnp.exp",
            BACKWARD,
            GELU,
        ),
        Mutation(
            "da from b, not b transposed",
            P,
            "transpose_b=True)",
            "transpose_b=False)",
            BACKWARD,
            ("square",),
        ),
        Mutation("rows past the end in dbias", E, "jnp.where(row < ", "jnp.where(row >= 0 * ", BACKWARD, ("tall",)),
    ),
)

D = "attention/pallas_decode.py"
FEW, FEW_WINDOW, FEW_PADDED = ("few",), ("few, window, sinks",), ("few, padded",)
ATTENTION_DECODE = Suite(
    "attention",
    "pallas",
    (
        Mutation("few: no causal mask", D, "<= query + sequence.offset", "<= 1000 + sequence.offset", problems=FEW),
        Mutation("few: window a key too wide", D, "- tiling.left", "- tiling.left - 1", problems=FEW_WINDOW),
        Mutation(
            "few: keys past their length", D, "(key < sequence.kv_len, shape)", "(key >= 0, shape)", problems=FEW_PADDED
        ),
        Mutation("few: the sum is not rescaled", D, "total_ref[head] * shrink", "total_ref[head]", problems=FEW),
        Mutation("few: the accumulator is not rescaled", D, "acc[head] * shrink", "acc[head]", problems=FEW),
        Mutation("few: the last block skipped", D, "(block < end)\n", "(block < end - 1)\n", problems=FEW),
        Mutation("few: whole blocks skipped", D, "pl.when(is_whole)", "pl.when(is_whole & (block < 0))", problems=FEW),
        Mutation(
            "few: another block held",
            D,
            "jnp.clip(number, first, last)",
            "jnp.clip(number - 2, first, last)",
            problems=FEW,
        ),
        Mutation(
            "few: a window begins elsewhere",
            D,
            "first = begin + ((which - begin)",
            "first = begin + ((which + 1)",
            problems=FEW_WINDOW,
        ),
        Mutation(
            "few: queries and heads in the other order",
            D,
            "[row // self.group, row % self.group]",
            "[row % self.group, row // self.group]",
            problems=FEW,
        ),
        Mutation(
            "few: only the first heads", D, "(b, h, block)), 0", "(b, 0 * h, block)), 0", problems=("few, many heads",)
        ),
        Mutation(
            "few: scale 1% off",
            D,
            "products * (spec.softmax_scale",
            "1.01 * products * (spec.softmax_scale",
            problems=FEW,
        ),
        Mutation("few: lse in base 2", D, "jnp.log2(divisor)) * LN_2", "jnp.log2(divisor))", problems=FEW),
        Mutation(
            "few: sinks count for nothing",
            D,
            "total_ref[...] = jnp.where(sinks_ref[...] == -jnp.inf, 0.0, 1.0)",
            "total_ref[...] = jnp.zeros_like(total_ref)",
            problems=FEW_WINDOW,
        ),
        Mutation(
            "few: queries past their length",
            D,
            "summed = jnp.where(exist, summed, 0)",
            "summed = summed",
            problems=FEW_PADDED,
        ),
    ),
)

R = "attention/reference.py"
ATTENTION_REFERENCE = Suite(
    "attention",
    "reference",
    (
        Mutation("aligned top-left", R, "aligned = i + (kv_len - q_len)", "aligned = i + 0 * q_len"),
        Mutation("one key too few", R, "(j <= aligned + spec.right)", "(j < aligned + spec.right)"),
        Mutation("no causal mask", R, "if spec.right is not None", "if False"),
        Mutation("scale forgotten", R, "scores = scores * spec.softmax_scale", "scores = scores * 1.0"),
        Mutation(
            "the wrong key head",
            R,
            "np.repeat(array, q_heads // array.shape[2], axis=2)",
            "np.tile(array, (1, 1, q_heads // array.shape[2], 1))",
        ),
        Mutation("dlse forgotten", R, "delta = delta - ", "delta = delta - 0 * ", BACKWARD),
        Mutation("delta with the wrong sign", R, "- delta[..., None]", "+ delta[..., None]", BACKWARD),
        Mutation("only one head of a group", R, ".sum(axis=3)", "[:, :, :, 0]", BACKWARD),
    ),
)

R, A = "matmul/reference.py", "tiles/activations.py"
MATMUL_REFERENCE = Suite(
    "matmul",
    "reference",
    (
        Mutation("bias dropped", R, "z = z + bias", "z = z + 0 * bias", problems=PLAIN),
        Mutation(
            "the other gelu",
            A,
            "return x * _normal_cdf(x)",
            "return 0.5 * x * (1 + np.tanh(_tanh_argument(x)))",
            problems=GELU,
        ),
        Mutation(
            "derivative replaced by 1",
            R,
            "dz = dout * derivative",
            "dz = dout * 1.0 + 0 * derivative",
            BACKWARD,
            ("silu",),
        ),
        Mutation("gelu_tanh's cubic forgotten", A, "(1 + 3 * 0.044715 * x * x)", "1.0", BACKWARD, ("gelu_tanh",)),
        Mutation(
            "dbias summed over the wrong axis", R, "dz.sum(axis=1)", "dz.sum(axis=0)[:1].repeat(2, 0)", BACKWARD, PLAIN
        ),
    ),
)

PROBLEMS["matmul"]["square"] = MatmulProblem(None, (1, 40, 36, 36))
PROBLEMS["matmul"]["tall"] = MatmulProblem(None, (1, 600, 8, 8))

SUITES = (
    ATTENTION_TRITON,
    ATTENTION_PALLAS,
    ATTENTION_DECODE,
    MATMUL_TRITON,
    MATMUL_PALLAS,
    ATTENTION_REFERENCE,
    MATMUL_REFERENCE,
)
CASES = one_in(7, ((suite, mutation) for suite in SUITES for mutation in suite.mutations))


def name_of(given: Any) -> str:
    """Of a suite and of a mutation, for a test's name."""
    return f"{given.op}-{given.kernel}" if isinstance(given, Suite) else given.name.replace(" ", "_")


@cache
def sound(op: str, kernel: str, direction: str, problem: str) -> float:
    """The error of the kernel as it is."""
    return worst(OPS[op].module("numpy" if kernel == "reference" else kernel), op, direction, problem)


@pytest.mark.parametrize(("suite", "mutation"), CASES, ids=name_of)
def test_the_check_notices(suite, mutation, tmp_path):
    for problem in mutation.problems:
        assert sound(suite.op, suite.kernel, mutation.direction, problem) <= 1
    module = broken(suite.op, mutation, suite.kernel, tmp_path)
    for problem in mutation.problems:
        assert worst(module, suite.op, mutation.direction, problem) > 1, f"survives on {problem}"
