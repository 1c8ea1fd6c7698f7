"""The public functions besides attention, and their features: one list for the tests and the tables of the docs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from features import DTYPES, REFUSED, STRIDES, Call, Feature, Form, Sizes, Subject, array, option
from layouts import native

import crosstile
from crosstile.kernels.matmul.spec import ACTIVATIONS
from crosstile.kernels.rotary.spec import LinearScaling, Llama3Scaling, YarnScaling

Generator = np.random.Generator


def activations(*forms: str) -> dict[str, Feature]:
    return {f"activation: {name}": Feature(option(activation=name), forms) for name in ACTIVATIONS}


def centred(rng: Generator, *shape: int) -> np.ndarray:
    """A left operand whose products are about as large as 2, so that activations bend."""
    return rng.standard_normal(shape) * 2 / max(1, shape[-1]) ** 0.5


# ---- Products


def product(
    sizes: Sizes,
    rng: Generator,
    lead_a: tuple[int, ...] = (),
    lead_b: tuple[int, ...] = (),
    summed: tuple[str, ...] = (),
) -> Call:
    m, k, n = (sizes[name] for name in "mkn")
    floats = {"a": centred(rng, *lead_a, m, k), "b": rng.standard_normal((*lead_b, k, n))}
    return Call(crosstile.matmul, floats, summed=summed, distinct=("b",))


def one_row(call: Call, sizes: Sizes) -> tuple[int, ...]:
    return (1, sizes["n"])


def whole(call: Call, sizes: Sizes) -> tuple[int, ...]:
    return sizes["m"], sizes["n"]


def precise(precision: str) -> Feature:
    """The values are bfloat16's, which no precision rounds: its own tests hold each to its own error."""

    def change(call: Call, sizes: Sizes, rng: Generator) -> None:
        call.options["precision"], call.values = precision, "bfloat16"

    lacking = {"pallas": REFUSED} if precision.startswith("tf32") else {}
    return Feature(change, without=("activation", "dtype"), lacking=lacking)


EPILOGUE = {
    "bias": {"bias": Feature(array("bias", lambda call, sizes: (sizes["n"],), summed=True))},
    "activation": activations(),
    "residual": {
        "residual": Feature(array("residual", whole, summed=True)),
        "residual, repeated rows": Feature(array("residual", one_row, summed=True)),
    },
    "out_dtype": {"out_dtype: float32": Feature(option(out_dtype="float32"))},
}
MATMUL = Subject(
    "matmul",
    "matmul.md",
    {
        "a [m, k], b [k, n]": product,
        "a with leading dimensions": lambda sizes, rng: product(sizes, rng, (2, 2)),
        "a b for each batch item": lambda sizes, rng: product(sizes, rng, (3,), (3,)),
        "leading dimensions that broadcast": lambda sizes, rng: product(sizes, rng, (2, 1), (3,)),
    },
    {
        **EPILOGUE,
        "precision": {f"precision: {name}": precise(name) for name in ("tf32", "bf16x3", "tf32x3", "bf16x6")},
        "dtype": DTYPES,
        "strides": STRIDES,
    },
    ({"m": 21, "k": 40, "n": 35}, {"m": 1, "k": 33, "n": 64}, {"m": 34, "k": 1, "n": 1}),
)


# ---- Gated products


def glu(sizes: Sizes, rng: Generator, lead: tuple[int, ...] = ()) -> Call:
    m, k, n = (sizes[name] for name in "mkn")
    floats = {"x": centred(rng, *lead, m, k)} | {name: rng.standard_normal((k, n)) for name in ("w_gate", "w_up")}
    return Call(crosstile.glu_matmul, floats, distinct=("w_gate", "w_up"))


GLU_MATMUL = Subject(
    "glu_matmul",
    "glu_matmul.md",
    {"x [m, k]": glu, "x with leading dimensions": lambda sizes, rng: glu(sizes, rng, (2, 2))},
    {"activation": activations(), "dtype": DTYPES, "strides": STRIDES},
    ({"m": 21, "k": 40, "n": 35}, {"m": 1, "k": 33, "n": 64}, {"m": 34, "k": 1, "n": 1}),
)


# ---- Norms


def rms(sizes: Sizes, rng: Generator) -> Call:
    rows, hidden = sizes["rows"], sizes["hidden"]
    floats = {"x": rng.standard_normal((2, rows, hidden)), "weight": rng.standard_normal(hidden)}
    return Call(crosstile.rms_norm, floats, summed=("weight",))


def layer(sizes: Sizes, rng: Generator) -> Call:
    call = rms(sizes, rng)
    call.function = crosstile.layer_norm
    return call


def far_from_zero(call: Call, sizes: Sizes, rng: Generator) -> None:
    call.floats["x"] = call.floats["x"] + 4


NORM = Subject(
    "norm",
    "norm.md",
    {"rms_norm": rms, "layer_norm": layer},
    {
        "bias": {"layer_norm with a bias": Feature(array("bias", lambda c, s: (s["hidden"],), True), ("layer_norm",))},
        "zero_centered": {"zero_centered": Feature(option(zero_centered=True), ("rms_norm",))},
        "residual": {"residual": Feature(array("residual", lambda c, s: c.floats["x"].shape))},
        "eps": {"eps": Feature(option(eps=0.25))},
        "mean": {"rows far from zero": Feature(far_from_zero)},
        "dtype": DTYPES,
        "strides": STRIDES,
    },
    ({"rows": 9, "hidden": 40}, {"rows": 1, "hidden": 129}, {"rows": 70, "hidden": 18}),
)


# ---- Rotary


def turn(sizes: Sizes, rng: Generator) -> Call:
    batch, length = sizes["batch"], sizes["length"]
    q = rng.standard_normal((batch, length, sizes["heads"], sizes["head_dim"]))
    positions = rng.integers(0, 3000, (batch, length))
    return Call(crosstile.rotary, {"x": q}, {"positions": positions})


def turn_both(sizes: Sizes, rng: Generator) -> Call:
    call = turn(sizes, rng)
    q = call.floats["x"]
    call.floats = {"q": q, "k": rng.standard_normal((*q.shape[:2], sizes["kv_heads"], q.shape[3]))}
    call.function = lambda q, k, positions, **options: crosstile.rotary((q, k), positions, **options)
    return call


def shared_positions(call: Call, sizes: Sizes, rng: Generator) -> None:
    call.others["positions"] = rng.integers(0, 3000, sizes["length"])


def some_columns(call: Call, sizes: Sizes, rng: Generator) -> None:
    call.options["rotary_dim"] = max(2, sizes["head_dim"] // 4 * 2)


SCALINGS = {
    "scaling: linear": LinearScaling(8.0),
    "scaling: Llama 3": Llama3Scaling(8.0, 1.0, 4.0, 2048),
    "scaling: YaRN": YarnScaling(4.0, 1024),
}
ROTARY = Subject(
    "rotary",
    "rotary.md",
    {"q and k together": turn_both, "one array": turn},
    {
        "pairs": {"interleaved": Feature(option(interleaved=True))},
        "rotary_dim": {"rotary_dim": Feature(some_columns)},
        "positions": {"positions [length]": Feature(shared_positions)},
        "base": {"base": Feature(option(base=500000.0))},
        "scaling": {name: Feature(option(scaling=scaling)) for name, scaling in SCALINGS.items()},
        "dtype": DTYPES,
        "strides": STRIDES,
    },
    (
        {"batch": 2, "length": 9, "heads": 3, "kv_heads": 2, "head_dim": 16},
        {"batch": 1, "length": 1, "heads": 9, "kv_heads": 1, "head_dim": 40},
        {"batch": 3, "length": 34, "heads": 1, "kv_heads": 1, "head_dim": 2},
    ),
)


# ---- Linear cross-entropy


def loss(sizes: Sizes, rng: Generator) -> Call:
    tokens, features, vocab = (sizes[name] for name in ("tokens", "features", "vocab"))
    floats = {"hidden": centred(rng, tokens, features), "weight": rng.standard_normal((vocab, features))}
    targets = {"targets": rng.integers(0, vocab, tokens)}
    return Call(crosstile.linear_cross_entropy, floats, targets, distinct=("weight",))


def sharded(sizes: Sizes, rng: Generator) -> Call:
    call = loss(sizes, rng)
    call.function = _by_shards
    return call


def _by_shards(
    hidden: Any, weight: Any, targets: Any, softcap: Any = None, implementation: Any = None, **options: Any
) -> Any:
    """Two shards of the vocabulary, merged."""
    vocab, smoothed = weight.shape[0], bool(options.get("label_smoothing"))
    cut = (vocab + 1) // 3 or vocab
    shards = [
        crosstile.linear_cross_entropy_shard(
            hidden, rows, targets, vocab_start=start, softcap=softcap, return_logit_sum=smoothed,
            implementation=implementation, **{name: x for name, x in options.items() if name == "ignore_index"},
        )
        for start, rows in ((0, weight[:cut]), (cut, weight[cut:]))
        if rows.shape[0]
    ]  # fmt: skip
    return crosstile.merge_cross_entropy(*zip(*shards, strict=True), targets=targets, vocab=vocab, **options)


def ignored(call: Call, sizes: Sizes, rng: Generator) -> None:
    """Every third token, whose row is NaN."""
    call.options["ignore_index"] = -7
    call.others["targets"][1::3] = -7
    call.floats["hidden"][1::3] = np.nan


def no_token(call: Call, sizes: Sizes, rng: Generator) -> None:
    call.others["targets"][:] = -100


def in_batches(call: Call, sizes: Sizes, rng: Generator) -> None:
    """Twice as many tokens, in two rows."""
    more = loss(sizes, rng)
    call.floats["hidden"] = np.stack([call.floats["hidden"], more.floats["hidden"]])
    call.others["targets"] = np.stack([call.others["targets"], more.others["targets"]])


CROSS_ENTROPY = Subject(
    "linear_cross_entropy",
    "cross_entropy.md",
    {"mean over the tokens": loss, "shards of the vocabulary": sharded},
    {
        "reduction": {f"reduction: {name}": Feature(option(reduction=name)) for name in ("sum", "none")},
        "tokens": {"ignored tokens, of NaN": Feature(ignored), "no token that counts": Feature(no_token)},
        "lead": {"hidden with leading dimensions": Feature(in_batches)},
        "softcap": {"softcap": Feature(option(softcap=2.5))},
        "smoothing": {"label smoothing": Feature(option(label_smoothing=0.2))},
        "z_loss": {"z-loss": Feature(option(z_loss=0.01))},
        "dtype": DTYPES,
        "strides": STRIDES,
    },
    (
        {"tokens": 19, "features": 40, "vocab": 70},
        {"tokens": 1, "features": 17, "vocab": 130},
        {"tokens": 37, "features": 2, "vocab": 3},
    ),
)


# ---- Products of groups of rows


def grouped(sizes: Sizes, rng: Generator) -> Call:
    tokens, k, n, groups = (sizes[name] for name in ("tokens", "k", "n", "groups"))
    floats = {"lhs": centred(rng, tokens, k), "rhs": rng.standard_normal((groups, k, n))}
    return Call(
        crosstile.grouped_matmul,
        floats,
        {"group_sizes": rng.multinomial(tokens, [1 / groups] * groups) if groups else np.zeros(0, int)},
        distinct=("rhs", "w_gate", "w_up"),
    )


def grouped_glu(sizes: Sizes, rng: Generator) -> Call:
    call = grouped(sizes, rng)
    x, w_gate = call.floats.values()
    call.floats = {"x": x, "w_gate": w_gate, "w_up": rng.standard_normal(w_gate.shape)}
    call.function = crosstile.grouped_glu_matmul
    return call


def empty_groups(call: Call, sizes: Sizes, rng: Generator) -> None:
    """Every second group has the rows of two."""
    there = call.others["group_sizes"]
    there[1:] += np.where(np.arange(len(there) - 1) % 2, 0, there[:-1])
    there[:-1] = np.where(np.arange(len(there) - 1) % 2, there[:-1], 0)


def rows_past_the_sum(call: Call, sizes: Sizes, rng: Generator) -> None:
    """The last group gives half its rows away, which hold NaN."""
    there = call.others["group_sizes"]
    there[-1:] //= 2
    next(iter(call.floats.values()))[there.sum() :] = np.nan


GROUPED_MATMUL = Subject(
    "grouped_matmul",
    "grouped_matmul.md",
    {"grouped_matmul": grouped, "grouped_glu_matmul": grouped_glu},
    {
        "activation": activations("grouped_glu_matmul"),
        "groups": {"empty groups": Feature(empty_groups)},
        "sum": {"rows past the sum, of NaN": Feature(rows_past_the_sum)},
        "dtype": DTYPES,
        "strides": STRIDES,
    },
    (
        {"tokens": 37, "k": 40, "n": 35, "groups": 3},
        {"tokens": 5, "k": 33, "n": 64, "groups": 8},
        {"tokens": 33, "k": 1, "n": 1, "groups": 1},
    ),
)


# ---- Products with quantised weights


def quantised(form: str) -> Form:
    def made(sizes: Sizes, rng: Generator) -> Call:
        m, k, n = (sizes[name] for name in "mkn")
        call = Call(crosstile.matmul, {"a": centred(rng, m, k)}, {"w": rng.standard_normal((k, n), np.float32)})
        call.options["quantised"] = {"dtype": form}
        call.finish = with_codes
        return call

    return made


def with_codes(call: Call) -> None:
    """Quantise by NumPy, so that all precisions and frameworks multiply the same codes."""
    weight = crosstile.quantize(call.others.pop("w"), **call.options.pop("quantised"))
    arrays = {name: getattr(weight, name) for name in ("values", "scales", "zeros")}
    call.others |= {name: found for name, found in arrays.items() if found is not None}
    call.precision = call.dtype  # to which the weight is rounded, whatever the result is

    def function(a: Any, values: Any, scales: Any, zeros: Any = None, **options: Any) -> Any:
        return crosstile.matmul(a, replace(weight, values=values, scales=scales, zeros=zeros), **options)

    call.function = function


def quantised_by(*forms: str, **options: Any) -> Feature:
    def change(call: Call, sizes: Sizes, rng: Generator) -> None:
        call.options["quantised"] = {**call.options["quantised"], **options}

    return Feature(change, forms)


def rounding(activations: str, *forms: str) -> Feature:
    """a is rounded too. It holds codes, of which no precision rounds one differently."""

    def change(call: Call, sizes: Sizes, rng: Generator) -> None:
        call.options["quantised"] = {**call.options["quantised"], "activations": activations}
        a = call.floats["a"]
        largest, kind = (127, "int8") if activations == "int8" else (448, "float8_e4m3fn")
        a = (40 * a).clip(-largest, largest).astype(native(kind)).astype(np.float64)
        a[:, ::32] = largest
        call.floats["a"] = a / 1024

    lacking = {"pallas": REFUSED} if activations == "mxfp8" else {}
    return Feature(change, forms, ("group_size", "zero_points"), lacking)


QUANTIZED_MATMUL = Subject(
    "quantized_matmul",
    "quantization.md",
    {form: quantised(form) for form in ("int8", "int4", "float8_e4m3fn", "mxfp8", "mxfp4")},
    {
        "group_size": {
            f"group_size: {size}": quantised_by("int8", "int4", "float8_e4m3fn", group_size=size)
            for size in (32, 64, 128)
        },
        "zero_points": {"zero points": quantised_by("int8", "int4", zero_points=True)},
        "activations": {
            "activations: int8": rounding("int8", "int8"),
            "activations: float8_e4m3fn": rounding("float8_e4m3fn", "float8_e4m3fn"),
            "activations: mxfp8": rounding("mxfp8", "mxfp8", "mxfp4"),
        },
        **EPILOGUE,
        "dtype": DTYPES,
        "strides": STRIDES,
    },
    ({"m": 19, "k": 70, "n": 35}, {"m": 1, "k": 33, "n": 64}, {"m": 34, "k": 300, "n": 18}),
)


# ---- Attention to pages


def one_token(sizes: Sizes, rng: Generator) -> Call:
    call = chunk({**sizes, "q_len": 1}, rng)
    call.floats["q"] = call.floats["q"][:, 0]
    return call


def chunk(sizes: Sizes, rng: Generator) -> Call:
    batch, q_len, kv_heads, group, dim, pages = (
        sizes[name] for name in ("batch", "q_len", "kv_heads", "group", "dim", "pages")
    )
    cache = (batch * pages + 1, 16, kv_heads, dim)
    floats = {
        "q": rng.standard_normal((batch, q_len, kv_heads * group, dim)),
        "k_pages": rng.standard_normal(cache),
        "v_pages": rng.standard_normal(cache),
    }
    others = {
        "page_table": rng.permutation(batch * pages).reshape(batch, pages),
        "lengths": rng.integers(0, 16 * pages + 1, batch),
    }
    return Call(crosstile.paged_attention, floats, others, {"return_lse": True})


def some_queries(call: Call, sizes: Sizes, rng: Generator) -> None:
    call.others["q_lengths"] = rng.integers(0, sizes["q_len"] + 1, sizes["batch"])


def stray_pages(call: Call, sizes: Sizes, rng: Generator) -> None:
    """Entries past the pages in use are no pages, and rows past the keys hold NaN."""
    used = -(-call.others["lengths"] // 16)
    for item, count in enumerate(used):
        call.others["page_table"][item, count:] = -1
        rest = call.others["lengths"][item] % 16
        if rest:
            for name in ("k_pages", "v_pages"):
                call.floats[name][call.others["page_table"][item, count - 1], rest:] = np.nan


def int8_pages(call: Call, sizes: Sizes, rng: Generator) -> None:
    for name in ("k", "v"):
        call.floats.pop(f"{name}_pages")
        shape = (sizes["batch"] * sizes["pages"] + 1, 16, sizes["kv_heads"], sizes["dim"])
        call.others[f"{name}_pages"] = rng.integers(-127, 128, shape, np.int8)
        call.floats[f"{name}_scales"] = rng.uniform(0.01, 0.04, sizes["kv_heads"])


PAGED_ATTENTION = Subject(
    "paged_attention",
    "attention.md",
    {"one token each": one_token, "a chunk of tokens": chunk},
    {
        "causal": {"not causal": Feature(option(causal=False), ("a chunk of tokens",))},
        "window": {"window": Feature(option(window=(9, None)))},
        "softcap": {"softcap": Feature(option(softcap=2.5))},
        "scale": {"scale": Feature(option(scale=-0.3))},
        "sinks": {"sinks": Feature(array("sinks", lambda c, s: (s["kv_heads"] * s["group"],)))},
        "q_lengths": {"q_lengths": Feature(some_queries, ("a chunk of tokens",))},
        "pages": {
            "stray entries, and NaN past the keys": Feature(stray_pages),
            "int8 pages": Feature(int8_pages),
        },
        "dtype": DTYPES,
        "strides": STRIDES,
    },
    (
        {"batch": 2, "q_len": 5, "kv_heads": 2, "group": 2, "dim": 16, "pages": 3},
        {"batch": 3, "q_len": 1, "kv_heads": 1, "group": 1, "dim": 40, "pages": 1},
        {"batch": 1, "q_len": 20, "kv_heads": 1, "group": 5, "dim": 8, "pages": 2},
    ),
    differentiable=False,
)


SUBJECTS = {
    subject.name: subject
    for subject in (MATMUL, GLU_MATMUL, GROUPED_MATMUL, QUANTIZED_MATMUL, NORM, ROTARY, CROSS_ENTROPY, PAGED_ATTENTION)
}
