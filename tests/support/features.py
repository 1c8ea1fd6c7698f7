"""Features of public functions, as data: what each adds to a call, and how far a call is from the definition.

A `Subject` is a function, or a few that share kernels: its forms, and factors of features, of each of which a call has
one or none. Arrays hold float64 values that the dtype of the call has. The exact answer is the NumPy definition's in
float64 (for the definition itself, that of torch's own ops in float64); the measure of the error that a kernel may make
is the same call by torch's own ops in the call's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any
from zlib import crc32

import numpy as np
import torch
from allpairspy import AllPairs
from layouts import dtype_of, placed, repeated, to_numpy
from oracles import rounded

from crosstile.bench.verify import compare

COLUMNS = {
    "numpy": "NumPy",
    "library torch": "torch",
    "library jax": "JAX",
    "triton": "Triton",
    "pallas": "Pallas",
}
KERNELS = ("triton", "pallas")
REFUSED = "refused"  # by an UnsupportedError
COMPILED = ("library jax", "pallas")  # by XLA, for seconds a call


@dataclass
class Call:
    """One call of a public function.

    Attributes:
        function: of the arrays by name, the options and `implementation`; it returns an array or a tuple of them.
        floats: the arrays that are differentiated, in float64.
        others: arrays that are not, in their own dtypes.
        summed: names of floats that are broadcast, and whose gradients are sums over what they are broadcast to.
        distinct: names of floats whose rows may not all be the same, since then a gradient is 0 but for rounding.
        layout: of all arrays that layouts does not name.
        finish: what is done when all features have had their say.
        dtype: of the floats.
        values: the dtype whose values they hold, if it is a narrower one.
        precision: the dtype by which errors are measured, if it is not each result's own.
    """

    function: Callable[..., Any]
    floats: dict[str, np.ndarray]
    others: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = ""
    layouts: dict[str, str] = field(default_factory=dict)
    summed: tuple[str, ...] = ()
    distinct: tuple[str, ...] = ()
    dtype: str = "float32"
    values: str = ""
    precision: str = ""
    finish: Callable[[Call], None] | None = None

    def layout_of(self, name: str) -> str:
        """Only floats can have stride 0, since it changes their values."""
        layout = self.layouts.get(name, self.layout)
        fixed = name in self.distinct or name not in self.floats
        return "sliced" if fixed and layout == "broadcast" else layout


Sizes = Mapping[str, int]
Form = Callable[[Sizes, np.random.Generator], Call]
Change = Callable[[Call, Sizes, np.random.Generator], None]


@dataclass(frozen=True)
class Feature:
    """What a feature adds to a call.

    Attributes:
        forms: those that have it; () means all.
        without: factors that it does not go with.
        lacking: columns of the table that do not have it, and the word that stands there instead: REFUSED, or another
            where it makes no sense.
    """

    change: Change
    forms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """Public functions that share kernels.

    Attributes:
        page: the file in docs/ that has their table.
        sizes: of the singles, and of the pairs.
        differentiable: whether there is a backward.
    """

    name: str
    page: str
    forms: Mapping[str, Form]
    factors: Mapping[str, Mapping[str, Feature]]
    sizes: tuple[Sizes, ...]
    differentiable: bool = True

    @property
    def features(self) -> dict[str, Feature]:
        return {name: feature for factor in self.factors.values() for name, feature in factor.items()}

    def singles(self) -> Iterator[Case]:
        """Every form alone, and every feature in the first form that has it."""
        for form in self.forms:
            yield Case(self, form)
        for name, feature in self.features.items():
            yield Case(self, (feature.forms or tuple(self.forms))[0], (name,))

    def pairs(self) -> list[Case]:
        """A covering array: any two features that go together meet in some case, in every form that has both."""
        options: list[list[Any]] = [list(self.forms)]
        options += [[(), *((name,) for name in factor)] for factor in self.factors.values()]
        options.append(list(range(len(self.sizes))))
        rows = AllPairs(options, filter_func=self._goes_together)
        found = [Case(self, form, sum(chosen, ()), tuple(self.sizes[at].items())) for form, *chosen, at in rows]
        for form, both in self.twos():  # which a filter makes AllPairs forget
            if not any(case.form == form and set(case.features) >= set(both) for case in found):
                found.append(Case(self, form, both))
        return found

    def twos(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Any two features that go together, and a form that has both."""
        for first, second in combinations(self.features, 2):
            form = next((form for form in self.forms if self.goes_together(form, (first, second))), None)
            if form is not None:
                yield form, (first, second)

    def together(self) -> list[Case]:
        """A few calls, in one of which every form and every feature is."""
        factors, found, left = list(self.factors.values()), [], set(self.features)
        for at in range(max(len(self.forms), *map(len, factors))):
            form, features = list(self.forms)[at % len(self.forms)], ()
            for names in (list(factor) for factor in factors):
                wanted = (*features, names[at % len(names)])
                features = wanted if self.goes_together(form, wanted) else features
            found.append(Case(self, form, features, tuple(self.sizes[at % len(self.sizes)].items())))
            left -= set(features)
        return [*found, *(case for case in self.singles() if case.title in left)]

    def goes_together(self, form: str, features: tuple[str, ...]) -> bool:
        factor_of = {name: factor for factor, names in self.factors.items() for name in names}
        present = {factor_of[name] for name in features}
        if len(present) < len(features):
            return False
        for name in features:
            feature = self.features[name]
            if (feature.forms and form not in feature.forms) or present & set(feature.without):
                return False
        return True

    def _goes_together(self, row: list[Any]) -> bool:
        chosen = [part for part in row[1:] if isinstance(part, tuple)]
        return self.goes_together(row[0], sum(chosen, ()))


@dataclass(frozen=True)
class Case:
    """A form of a subject with some features, of some sizes and layouts of arrays."""

    subject: Subject = field(hash=False, compare=False)
    form: str
    features: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    layouts: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.subject.name)
        if not self.sizes:
            object.__setattr__(self, "sizes", tuple(self.subject.sizes[0].items()))

    def __str__(self) -> str:
        sizes = "x".join(str(size) for _, size in self.sizes)
        return f"{self.name} {' + '.join((self.form, *self.features))} {sizes}"

    @property
    def title(self) -> str:
        """What the table calls a single."""
        return self.features[0] if self.features else self.form

    @property
    def lacking(self) -> Mapping[str, str]:
        """Columns that cannot have the case, and why."""
        return {column: why for name in self.features for column, why in self.subject.features[name].lacking.items()}

    def call(self) -> Call:
        sizes = dict(self.sizes)
        rng = np.random.default_rng(crc32(repr((self.name, self.form, self.features, self.sizes)).encode()))
        call = self.subject.forms[self.form](sizes, rng)
        for name in self.features:
            self.subject.features[name].change(call, sizes, rng)
        if call.finish is not None:
            call.finish(call)
        call.layouts = dict(zip((*call.floats, *call.others), self.layouts, strict=False))
        for name, array in call.floats.items():
            values = rounded(array, call.values or call.dtype)
            call.floats[name] = repeated(values, call.layout_of(name))
        return call


def check(case: Case, column: str, backward: bool, framework: str = "torch", device: str = "cpu") -> None:
    """Assert that every result of a column is within the allowed error. Gradients are taken in torch or JAX."""
    if column.startswith("library "):
        column, framework = column.split()
    backward = backward and case.subject.differentiable
    exact = _exact(case, "library" if column == "numpy" else "numpy")
    theirs, call = _theirs(case), case.call()
    ours = run(call, call.dtype, column, framework, backward, device)
    assert set(ours) <= set(exact)
    # of a product in narrow precision torch has nothing else to give, whatever out_dtype it is cast to
    precision = call.precision or (call.dtype if column == "library" and "out_dtype" in call.options else "")
    over = {}
    for name, (result, dtype) in ours.items():
        assert dtype == theirs[name][1], f"{name} is {dtype}, where torch's own op gives {theirs[name][1]}"
        assert result.shape == exact[name][0].shape, name
        terms = max(exact["out"][0].size // max(result.size, 1), 1) if name[1:] in call.summed else 1
        few = 64 if np.unique(exact[name][0]).size < 16 else 1  # a few sums may all be of terms that cancel
        over[name] = compare(result, theirs[name][0], exact[name][0], precision or dtype, terms)[1] / few
    over = {name: multiple for name, multiple in over.items() if not multiple <= 1}
    assert not over, f"errors as multiples of the allowed: {over}"


Results = dict[str, tuple[np.ndarray, str]]


@lru_cache(16)
def _exact(case: Case, implementation: str) -> Results:
    return run(case.call(), "float64", implementation, "torch", case.subject.differentiable)


@lru_cache(16)
def _theirs(case: Case) -> Results:
    call = case.call()
    return run(call, call.dtype, "library", "torch", case.subject.differentiable)


def run(call: Call, dtype: str, implementation: str, framework: str, backward: bool, device: str = "cpu") -> Results:
    """The outputs and the gradients of all floats, in float64 beside the dtype each has."""
    floats = {
        name: placed(array, dtype, call.layout_of(name), framework, device) for name, array in call.floats.items()
    }
    others = {
        name: placed(array, array.dtype.name, call.layout_of(name), framework, device)
        for name, array in call.others.items()
    }
    exactly = ("out_dtype", "precision") if dtype == "float64" else ()
    options = {name: value for name, value in call.options.items() if name not in exactly}

    def function(arrays: dict[str, Any]) -> tuple[Any, ...]:
        found = call.function(**arrays, **others, **options, implementation=implementation)
        return found if isinstance(found, tuple) else (found,)

    runs = {"torch": _in_torch, "jax": _in_jax, "numpy": _in_numpy}[framework]
    outputs, gradients = runs(function, floats, backward)
    named = {f"out {at}" if at else "out": out for at, out in enumerate(outputs)}
    named |= {f"d{name}": gradient for name, gradient in gradients.items()}
    return {name: (to_numpy(array), dtype_of(array)) for name, array in named.items()}


Found = tuple[tuple[Any, ...], dict[str, Any]]


def _in_numpy(function: Callable[..., Any], floats: dict[str, Any], backward: bool) -> Found:
    assert not backward, "NumPy records no gradients"
    return function(floats), {}


def _in_torch(function: Callable[..., Any], floats: dict[str, Any], backward: bool) -> Found:
    if not backward:
        return function(floats), {}
    leaves = {name: tensor.requires_grad_() for name, tensor in floats.items()}
    outputs = function(leaves)
    upstream = [
        placed(_arriving(at, tuple(out.shape)), dtype_of(out), "transposed", "torch", out.device)
        for at, out in enumerate(outputs)
    ]
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return outputs, dict(zip(leaves, found, strict=True))


def _in_jax(function: Callable[..., Any], floats: dict[str, Any], backward: bool) -> Found:
    import jax

    @jax.jit  # one program is compiled sooner than many small ones
    def compiled(floats: dict[str, Any]) -> Found:
        if not backward:
            return function(floats), {}
        outputs, pull = jax.vjp(function, floats)
        upstream = [placed(_arriving(at, x.shape), dtype_of(x), "", "jax") for at, x in enumerate(outputs)]
        return outputs, pull(tuple(upstream))[0]

    found: Found = compiled(floats)
    return found


def _arriving(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of an output, of values that every dtype has."""
    return rounded(np.random.default_rng(number).standard_normal(shape), "bfloat16")


# ---- What features are made of


def option(**options: Any) -> Change:
    """Options of the call."""

    def change(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
        call.options |= options

    return change


def array(name: str, shape: Callable[[Call, Sizes], tuple[int, ...]], summed: bool = False) -> Change:
    """One more array that is differentiated."""

    def change(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
        call.floats[name] = rng.standard_normal(shape(call, sizes))
        if summed:
            call.summed += (name,)

    return change


def in_dtype(dtype: str) -> Change:
    """All floats in that dtype."""

    def change(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
        call.dtype = dtype

    return change


def in_layout(layout: str) -> Change:
    """All arrays in that layout."""

    def change(call: Call, sizes: Sizes, rng: np.random.Generator) -> None:
        call.layout = layout

    return change


DTYPES = {name: Feature(in_dtype(name)) for name in ("bfloat16", "float16")}
STRIDES = {
    title: Feature(in_layout(layout), lacking={"library jax": "no strides"})
    for title, layout in (
        ("strides: slices", "sliced"),
        ("strides: transposed", "transposed"),
        ("strides: 0, repeated rows", "broadcast"),
    )
}
