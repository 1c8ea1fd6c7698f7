"""Broken kernels fail the check: each mutation is one plausible mistake, made in a copy of a kernel file.

The check is the suite's rule on small problems of several tiles. The copies keep their place in the package, so that
relative imports and `triton.jit`, which reads the source file, work.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from oracles import attention_by_torch, matmul_by_torch, multiples, rounded

import crosstile.kernels
from crosstile import plans
from crosstile.dispatch import OPS
from crosstile.kernels.attention.spec import AttentionSpec
from crosstile.kernels.matmul.spec import MatmulSpec
from crosstile.kernels.tiles.launch import Array
from crosstile.kernels.tiles.targets import INTERPRET

KERNELS = Path(crosstile.kernels.__path__[0])
_serial = itertools.count()


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


def broken(mutation: Mutation, kernel: str, folder: Path) -> ModuleType:
    """The kernel file, importing the mutated file if it is not that itself."""
    text = (KERNELS / mutation.file).read_text()
    assert mutation.old in text, f"{mutation.file} has no {mutation.old!r} any more: bring the mutation up to date"
    module = load(mutation.file, text.replace(mutation.old, mutation.new), folder)
    if mutation.file == kernel:
        return module
    text = (KERNELS / kernel).read_text()
    helper = f"..tiles.{Path(mutation.file).stem} import"
    assert helper in text
    return load(kernel, text.replace(helper, f"..tiles.{module.__name__.rsplit('.')[-1]} import"), folder)


def load(file: str, text: str, folder: Path) -> ModuleType:
    """A module made of the text, beside the one that the file is."""
    stem = f"{Path(file).stem}_mutated_{next(_serial)}"
    path = folder / f"{stem}.py"
    path.write_text(text)
    name = ".".join(("crosstile.kernels", *Path(file).parent.parts, stem))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def execute(module: ModuleType, op: str, direction: str, spec: Any, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """One direction of a kernel module, or of a reference, on NumPy arrays, interpreted."""
    name = Path(module.__file__).stem.split("_mutated")[0]
    if name == "reference":
        return getattr(module, direction)(spec, *operands)
    config = OPS[op].module("tiles").choose_config(spec, INTERPRET)
    if name == "triton":
        from crosstile.kernels.tiles import triton_interpreter

        described = plans.map_arrays(
            lambda x: Array(x.shape, x.dtype.name, tuple(stride // x.itemsize for stride in x.strides)), operands
        )
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
        groups = (("q", "k", "v"), ("out", "lse"), ("dout", "dlse"))
        return spec, *(tuple(single[name] for name in group) for group in groups), own, exact


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


PROBLEMS: dict[str, dict[str, Any]] = {
    "attention": {
        "causal": AttentionProblem(40, 52, True),
        "whole": AttentionProblem(40, 52, False),
        "blind": AttentionProblem(52, 40, True),
    },
    "matmul": {name or "plain": MatmulProblem(name) for name in (None, "relu", "gelu", "gelu_tanh", "silu")},
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

    @property
    def file(self) -> str:
        return f"{self.op}/{self.kernel}.py"


T, H = "attention/triton.py", "tiles/triton_tiles.py"
ATTENTION_TRITON = Suite(
    "attention",
    "triton",
    (
        Mutation("no causal mask", H, "mask = keys <= queries + (kv_len - q_len)", "mask = keys < kv_len"),
        Mutation(
            "no causal mask, backward", H, "mask = keys <= queries + (kv_len - q_len)", "mask = keys < kv_len", BACKWARD
        ),
        Mutation("aligned top-left", H, "keys <= queries + (kv_len - q_len)", "keys <= queries"),
        Mutation("aligned top-left, backward", H, "keys <= queries + (kv_len - q_len)", "keys <= queries", BACKWARD),
        Mutation("one key too few", H, "keys <= queries + (", "keys < queries + ("),
        Mutation("one key too many", H, "mask = keys < kv_len", "mask = keys <= kv_len", problems=("whole",)),
        Mutation("scale 1% off", T, "max(abs(spec.softmax_scale)", "max(1.01 * abs(spec.softmax_scale)"),
        Mutation("scale in base e", T, "abs(spec.softmax_scale) * log2(e)", "abs(spec.softmax_scale)"),
        Mutation(
            "scale in base e, backward",
            T,
            "tl.exp2(scores * log2_scale",
            "tl.exp2(scores * log2_scale * 0.69",
            BACKWARD,
        ),
        Mutation(
            "last tile of keys skipped",
            H,
            "        end = kv_len\n",
            "        end = kv_len // BLOCK_KV * BLOCK_KV\n",
            problems=("whole",),
        ),
        Mutation(
            "last tile of keys skipped, causal",
            H,
            "return full // BLOCK_KV * BLOCK_KV, end",
            "return full // BLOCK_KV * BLOCK_KV, end // BLOCK_KV * BLOCK_KV",
        ),
        Mutation(
            "first tile of queries skipped",
            H,
            "q_len - tl.cdiv(seeing_any, BLOCK_Q) * BLOCK_Q",
            "q_len - seeing_any // BLOCK_Q * BLOCK_Q",
            BACKWARD,
            ("whole",),
        ),
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
            T,
            "(dweights - delta_tile[None, :])",
            "(dweights + delta_tile[None, :])",
            BACKWARD,
        ),
        Mutation(
            "delta with the wrong sign in dq",
            T,
            "(dweights - delta_tile[:, None])",
            "(dweights + delta_tile[:, None])",
            BACKWARD,
        ),
        Mutation("dlse forgotten", T, "delta_tile -= load_rows", "delta_tile -= 0.0 * load_rows", BACKWARD),
        Mutation("dlse added", T, "delta_tile -= load_rows", "delta_tile += load_rows", BACKWARD),
        Mutation("only one head of a group", T, "tl.range(0, GROUP * tiles", "tl.range(0, tiles", BACKWARD),
        Mutation("dk not scaled", T, "dk_tile * scale", "dk_tile", BACKWARD),
        Mutation("dq not scaled", T, "dq_tile * scale", "dq_tile", BACKWARD),
        Mutation(
            "dv summed from float16",
            T,
            "dv = tl.dot(weights.to(dout_tile.dtype), dout_tile",
            "dv = tl.dot(weights, dout_tile.to(tl.float16).to(tl.float32)",
            BACKWARD,
        ),
    ),
)

P = "attention/pallas.py"
ATTENTION_PALLAS = Suite(
    "attention",
    "pallas",
    (
        Mutation(
            "no causal mask",
            P,
            "keys - lax.broadcasted_iota(jnp.int32, keys.shape, 1) <= query - key + self.offset",
            "keys < self.kv_len - key",
        ),
        Mutation(
            "no causal mask, backward", P, "if masked:\n            weights", "if False:\n            weights", BACKWARD
        ),
        Mutation("aligned top-left", P, "query - key + self.offset", "query - key"),
        Mutation("aligned top-left, backward", P, "query - key + self.offset", "query - key", BACKWARD),
        Mutation("tail of the keys not masked", P, "keys < self.kv_len - key", "keys >= 0", problems=("whole",)),
        Mutation("scale 1% off", P, "(scale * LOG2_E)", "(1.01 * scale * LOG2_E)"),
        Mutation("scale in base e, backward", P, "(scale * LOG2_E) - lse_ref", "scale - lse_ref", BACKWARD),
        Mutation(
            "last tile of keys skipped",
            P,
            "-(-self.kv_len // self.block_kv)",
            "self.kv_len // self.block_kv",
            problems=("whole",),
        ),
        Mutation("last tile of queries skipped", P, "fori_loop(whole, tiles,", "fori_loop(whole, tiles - 1,", BACKWARD),
        Mutation("the sum is not rescaled", P, "total * shrink", "total"),
        Mutation("the accumulator is not rescaled", P, "acc[...] * shrink", "acc[...]"),
        Mutation(
            "lse in base 2", P, "(peak_ref[...] + jnp.log2(divisor)) * LN_2", "(peak_ref[...] + jnp.log2(divisor))"
        ),
        Mutation("blind rows divide by 0", P, "jnp.where(empty, 1, total)", "total", problems=("blind",)),
        Mutation("the wrong key head", P, "lax.div(h, q_heads // kv_heads)", "lax.rem(h, kv_heads)"),
        Mutation("delta with the wrong sign", P, "dout) - delta_ref", "dout) + delta_ref", BACKWARD),
        Mutation("dlse forgotten", P, "delta = delta - jnp.where(lse == -jnp.inf, 0, dlse)", "pass", BACKWARD),
        Mutation("only the last head of a group", P, "@pl.when(head == 0)", "@pl.when(head >= 0)", BACKWARD),
        Mutation("dk not scaled", P, "(dk_acc[...] * scale)", "dk_acc[...]", BACKWARD),
        Mutation("dq not scaled", P, "(dq_acc[head] * scale)", "dq_acc[head]", BACKWARD),
    ),
)

T, A = "matmul/triton.py", "tiles/triton_activations.py"
PLAIN, GELU = ("plain",), ("gelu",)
MATMUL_TRITON = Suite(
    "matmul",
    "triton",
    (
        Mutation(
            "bias dropped", T, "if HAS_BIAS:\n            bias =", "if False:\n            bias =", problems=PLAIN
        ),
        Mutation(
            "residual dropped",
            T,
            "if HAS_RESIDUAL:\n            residual = advance(residual, col",
            "if False:\n            residual = advance(residual, col",
            problems=PLAIN,
        ),
        Mutation("activation dropped", T, "result = activate(sums, ACTIVATION)", "result = sums", problems=("relu",)),
        Mutation("the other gelu", A, "y = x * _normal_cdf(x)", "y = x * _tanh_cdf(x)", problems=GELU),
        Mutation(
            "last tile along k skipped",
            T,
            "for start in range(0, k, BLOCK_K)",
            "for start in range(0, k // BLOCK_K * BLOCK_K, BLOCK_K)",
            problems=PLAIN,
        ),
        Mutation("tail of k not masked", T, '"EVEN_K": k % block_k == 0', '"EVEN_K": True', problems=PLAIN),
        Mutation(
            "derivative replaced by 1", T, "result *= derivative(z, ACTIVATION)", "result *= 1.0", BACKWARD, ("silu",)
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
            '("b", _transposed(b))',
            '("b", Array((b.shape[0], b.shape[2], b.shape[1]), b.dtype, b.strides))',
            BACKWARD,
            PLAIN,
        ),
        Mutation(
            "dbias of one tile only",
            T,
            "for start in range(0, tiles, BLOCK_M)",
            "for start in range(0, tiles // 2, BLOCK_M)",
            BACKWARD,
            PLAIN,
        ),
    ),
)

P, A = "matmul/pallas.py", "tiles/pallas_activations.py"
MATMUL_PALLAS = Suite(
    "matmul",
    "pallas",
    (
        Mutation("bias dropped", P, "z += bias_ref", "z += 0 * bias_ref", problems=PLAIN),
        Mutation("residual dropped", P, "out += residual_ref", "out += 0 * residual_ref", problems=PLAIN),
        Mutation("activation dropped", P, "out = activate(activation, z)", "out = z", problems=("relu",)),
        Mutation("the other gelu", A, "return x * _normal_cdf(x)", "return x * _tanh_cdf(x)", problems=GELU),
        Mutation("last tile along k skipped", P, "lambda: multiply(tail)", "lambda: None", problems=PLAIN),
        Mutation("tail of k not masked", P, "lambda: multiply(tail)", "lambda: multiply(block_k)", problems=PLAIN),
        Mutation(
            "steps not summed", P, "product if steps == 1 else product +", "product if steps else", problems=PLAIN
        ),
        Mutation("the first sum is not cleared", P, "jnp.where(step == 0, 0, ", "(lambda sums: sums)(", problems=PLAIN),
        Mutation("derivative replaced by 1", P, "dz *= derivative(", "dz *= 1 + 0 * derivative(", BACKWARD, ("silu",)),
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
        Mutation("rows past the end in dbias", P, "jnp.where(row < ", "jnp.where(row >= 0 * ", BACKWARD, ("tall",)),
    ),
)

R = "attention/reference.py"
ATTENTION_REFERENCE = Suite(
    "attention",
    "reference",
    (
        Mutation("aligned top-left", R, "j <= i + (kv_len - q_len)", "j <= i"),
        Mutation("one key too few", R, "j <= i +", "j < i +"),
        Mutation("no causal mask", R, "np.where(visible(spec, q.shape[1], k.shape[1]), scores, -np.inf)", "scores"),
        Mutation("scale forgotten", R, "k) * spec.softmax_scale", "k)"),
        Mutation(
            "the wrong key head",
            R,
            "np.repeat(array.astype(dtype), group, axis=2)",
            "np.tile(array.astype(dtype), (1, 1, group, 1))",
        ),
        Mutation("dlse forgotten", R, "delta = delta - ", "delta = delta - 0 * ", BACKWARD),
        Mutation("delta with the wrong sign", R, "- delta[..., None]", "+ delta[..., None]", BACKWARD),
        Mutation("only one head of a group", R, ".sum(axis=3)", "[:, :, :, 0]", BACKWARD),
    ),
)

R = "matmul/reference.py"
MATMUL_REFERENCE = Suite(
    "matmul",
    "reference",
    (
        Mutation("bias dropped", R, "z = z + bias", "z = z + 0 * bias", problems=PLAIN),
        Mutation(
            "the other gelu",
            R,
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
        Mutation("gelu_tanh's cubic forgotten", R, "(1 + 3 * 0.044715 * x * x)", "1.0", BACKWARD, ("gelu_tanh",)),
        Mutation(
            "dbias summed over the wrong axis", R, "dz.sum(axis=1)", "dz.sum(axis=0)[:1].repeat(2, 0)", BACKWARD, PLAIN
        ),
    ),
)

PROBLEMS["matmul"]["square"] = MatmulProblem(None, (1, 40, 36, 36))
PROBLEMS["matmul"]["tall"] = MatmulProblem(None, (1, 600, 8, 8))

SUITES = (ATTENTION_TRITON, ATTENTION_PALLAS, MATMUL_TRITON, MATMUL_PALLAS, ATTENTION_REFERENCE, MATMUL_REFERENCE)
CASES = [
    pytest.param(suite, mutation, id=f"{suite.op}-{suite.kernel}-{mutation.name}".replace(" ", "_"))
    for suite in SUITES
    for mutation in suite.mutations
]


@cache
def sound(op: str, kernel: str, direction: str, problem: str) -> float:
    """The error of the kernel as it is."""
    return worst(OPS[op].module("numpy" if kernel == "reference" else kernel), op, direction, problem)


@pytest.mark.parametrize(("suite", "mutation"), CASES)
def test_the_check_notices(suite, mutation, tmp_path):
    for problem in mutation.problems:
        assert sound(suite.op, suite.kernel, mutation.direction, problem) <= 1
    module = broken(mutation, suite.file, tmp_path)
    for problem in mutation.problems:
        assert worst(module, suite.op, mutation.direction, problem) > 1, f"survives on {problem}"
