"""crosstile.linear_cross_entropy: its options, frameworks, implementations, shards and errors."""

from __future__ import annotations

import doctest
import itertools
import re
import subprocess
import sys
from importlib.util import find_spec
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sweeps import one_in
from torch.nn import functional

import crosstile
from crosstile import cross_entropy, linear_cross_entropy, linear_cross_entropy_shard, merge_cross_entropy
from crosstile import torch as glue
from crosstile.kernels.linear_cross_entropy.tiles import LinearCrossEntropyConfig, LinearCrossEntropyTiles

KERNELS = ["numpy", "triton", "pallas", "library"]
OPTIONS = [
    {},
    {"reduction": "sum", "softcap": 2.0},
    {"reduction": "none", "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 3.0, "ignore_index": 2},
]
SHAPE, VOCAB, FEATURES = (2, 9), 33, 12


def make(seed=0, shape=SHAPE, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    hidden, weight = rng.standard_normal((*shape, FEATURES)), rng.standard_normal((vocab, FEATURES))
    targets = rng.integers(0, vocab, shape)
    targets[..., 2::4] = -100
    return hidden.astype(np.float32), weight.astype(np.float32), targets


def by_torch(
    hidden, weight, targets, *, softcap=None, z_loss=0.0, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """The loss by torch's cross_entropy, of logits built whole."""
    logits = functional.linear(hidden, weight)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    flat, labels = logits.reshape(-1, weight.shape[0]), targets.reshape(-1)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = functional.cross_entropy(flat, labels, reduction="none", **options)
    counted = labels != ignore_index
    loss = loss + torch.where(counted, z_loss * torch.logsumexp(flat, dim=1) ** 2, 0)
    if reduction == "none":
        return loss.reshape(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def expected(arrays, options):
    """The loss, dhidden and dweight, in float64, of the sum of a loss weighed a little differently at each token."""
    hidden, weight = (torch.from_numpy(x).double().requires_grad_() for x in arrays[:2])
    targets = torch.from_numpy(arrays[2])
    if options.get("ignore_index") == 2:
        targets = targets.clamp(min=0)
    loss = by_torch(hidden, weight, targets, **options)
    gradients = torch.autograd.grad((loss * torch.from_numpy(weights(loss.shape))).sum(), (hidden, weight))
    return [x.detach().numpy() for x in (loss, *gradients)]


def weights(shape):
    return np.cos(np.arange(np.prod(shape, dtype=int))).reshape(shape)


def arguments(options):
    hidden, weight, targets = make()
    return (hidden, weight, np.maximum(targets, 0) if options.get("ignore_index") == 2 else targets)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
@pytest.mark.parametrize("kernel", KERNELS)
def test_torch(kernel, options):
    arrays = arguments(options)
    hidden, weight = (torch.from_numpy(x).requires_grad_() for x in arrays[:2])
    loss = linear_cross_entropy(hidden, weight, torch.from_numpy(arrays[2]), **options, implementation=kernel)
    gradients = torch.autograd.grad((loss * torch.from_numpy(weights(loss.shape)).float()).sum(), (hidden, weight))
    for ours, theirs in zip((loss.detach(), *gradients), expected(arrays, options), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
@pytest.mark.parametrize("kernel", KERNELS)
def test_jax(kernel, options):
    arrays = arguments(options)

    @jax.jit
    def value_and_gradients(hidden, weight, targets):
        def weighed(hidden, weight):
            loss = linear_cross_entropy(hidden, weight, targets, **options, implementation=kernel)
            return (loss * weights(loss.shape)).sum(), loss

        (_, loss), gradients = jax.value_and_grad(weighed, (0, 1), has_aux=True)(hidden, weight)
        return loss, *gradients

    for ours, theirs in zip(value_and_gradients(*map(jnp.asarray, arrays)), expected(arrays, options), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", ["numpy", "triton", "pallas"])
def test_numpy(kernel):
    arrays = arguments({})
    loss = linear_cross_entropy(*arrays, implementation=kernel)
    assert loss.dtype == np.float32
    assert loss.shape == ()
    np.testing.assert_allclose(loss, expected(arrays, {})[0], rtol=1e-6)


@pytest.mark.parametrize("make_array", [np.asarray, torch.from_numpy, jnp.asarray], ids=["numpy", "torch", "jax"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtypes_of_the_loss(make_array, reduction):
    """A loss is float32, whatever is narrower."""
    hidden, weight, targets = map(make_array, make())
    kind = {"torch": torch.float16}.get(type(hidden).__module__, "float16")
    narrow = [x.to(kind) if isinstance(x, torch.Tensor) else x.astype(kind) for x in (hidden, weight)]
    loss = linear_cross_entropy(*narrow, targets, reduction=reduction)
    assert str(loss.dtype).endswith("float32")
    assert tuple(loss.shape) == (SHAPE if reduction == "none" else ())


def test_float64():
    arrays = arguments({})
    wide = [arrays[0].astype(np.float64), arrays[1].astype(np.float64), arrays[2]]
    np.testing.assert_allclose(linear_cross_entropy(*wide), expected(arrays, {})[0], rtol=1e-13)
    loss = linear_cross_entropy(*map(torch.from_numpy, wide))
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss, expected(arrays, {})[0], rtol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mean_over_no_token_is_zero(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make())
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*leaves, torch.full_like(targets, -100), z_loss=0.1, implementation=kernel)
    gradients = torch.autograd.grad(loss, leaves)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens_at_all(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make(shape=(0, 9)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets, implementation=kernel)
    gradients = torch.autograd.grad(loss, leaves)
    assert loss == 0
    assert gradients[0].shape == hidden.shape
    assert (gradients[1] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_single_token(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make())
    loss = linear_cross_entropy(hidden[0, 0], weight, targets[0, 0], reduction="none", implementation=kernel)
    assert loss.shape == ()
    torch.testing.assert_close(loss, by_torch(hidden[0, 0], weight, targets[0, 0]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_ignored_tokens_may_hold_nan(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make())
    clean = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    hidden[targets == -100] = torch.nan
    dirty = [hidden.requires_grad_(), weight.requires_grad_()]
    results = []
    for leaves in (clean, dirty):
        loss = linear_cross_entropy(*leaves, targets, z_loss=0.1, implementation=kernel)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_runs_are_bit_equal(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make(shape=(90,), vocab=100))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    runs = [
        torch.autograd.grad(linear_cross_entropy(*leaves, targets, implementation=kernel), leaves) for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_every_integer_dtype():
    hidden, weight, targets = (torch.from_numpy(x) for x in make())
    expected = linear_cross_entropy(hidden, weight, targets.clamp(min=0))
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets.clamp(min=0).to(kind)), expected)


# ---- torch


def test_only_one_of_the_two_wants_a_gradient():
    for wanted, kernel in itertools.product((0, 1), KERNELS):
        arrays = [torch.from_numpy(x) for x in make()]
        arrays[wanted].requires_grad_()
        linear_cross_entropy(*arrays, implementation=kernel).backward()
        np.testing.assert_allclose(arrays[wanted].grad, expected(make(), {})[1 + wanted], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compile(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make())
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, implementation=kernel)

    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(ours, loss(*leaves))
    for first, second in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kernel", one_in(2, KERNELS))
def test_vmap_and_functional_gradients(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make())

    def loss(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, reduction="sum", implementation=kernel)

    mapped = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None, 0))(hidden, weight, targets)
    for at in range(SHAPE[0]):
        alone = torch.func.grad(loss, (0, 1))(hidden[at], weight, targets[at])
        for ours, theirs in zip(mapped, alone, strict=True):
            torch.testing.assert_close(ours[at], theirs)


@pytest.mark.parametrize("kernel", ["numpy", "triton", "pallas"])
def test_opcheck(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make(shape=(3,)))
    arguments = (
        hidden[None].requires_grad_(), weight[None].requires_grad_(), targets[None].int(), 2.0, True, kernel,
        "interpret", None,
    )  # fmt: skip
    torch.library.opcheck(glue._OPERATORS["linear_cross_entropy"].operator._opoverload, arguments)


def test_second_derivatives_by_the_library():
    rng = np.random.default_rng(0)
    hidden, weight = (torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in ((3, 4), (5, 4)))
    targets = torch.tensor([0, -100, 4])

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, z_loss=0.1, softcap=2.0)

    assert torch.autograd.gradgradcheck(loss, (hidden, weight))


def test_second_derivatives_of_kernels_are_refused():
    leaves = [torch.from_numpy(x).requires_grad_() for x in make()[:2]]
    loss = linear_cross_entropy(*leaves, torch.from_numpy(make()[2]), implementation="triton")
    (dhidden,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(crosstile.UnsupportedError, match="library"):
        dhidden.sum().backward()


# ---- JAX


@pytest.mark.parametrize("kernel", one_in(2, KERNELS))
def test_jax_vmap(kernel):
    hidden, weight, targets = map(jnp.asarray, make())

    def loss(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, reduction="sum", implementation=kernel)

    mapped = jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0))(hidden, weight, targets)
    for at in range(SHAPE[0]):
        for ours, theirs in zip(mapped, jax.grad(loss, (0, 1))(hidden[at], weight, targets[at]), strict=True):
            np.testing.assert_allclose(ours[at], theirs, rtol=1e-5, atol=1e-6)


def test_a_target_out_of_range_gives_nan_where_it_is_not_refused():
    hidden, weight, targets = map(jnp.asarray, make())
    loss = linear_cross_entropy(hidden, weight, targets.at[0, 0].set(VOCAB).at[1, 1].set(-1), reduction="none")
    np.testing.assert_array_equal(np.argwhere(np.isnan(loss)), [[0, 0], [1, 1]])


# ---- Shards of the vocabulary


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cuts", [(0, 33), (0, 1, 20, 33)], ids=["one", "three"])
def test_shards_are_the_whole(kernel, cuts):
    """The loss and both gradients, each shard with its own slice of weight."""
    options = {"label_smoothing": 0.1, "z_loss": 0.05}
    hidden, weight, targets = (torch.from_numpy(x) for x in make())
    hidden.requires_grad_()
    slices = [weight[start:end].clone().requires_grad_() for start, end in itertools.pairwise(cuts)]
    shards = [
        linear_cross_entropy_shard(
            hidden, part, targets, vocab_start=start, softcap=4.0, return_logit_sum=True, implementation=kernel
        )
        for start, part in zip(cuts, slices, strict=False)
    ]
    loss = merge_cross_entropy(*zip(*shards, strict=True), targets=targets, vocab=VOCAB, **options)
    dhidden, *dslices = torch.autograd.grad(loss, (hidden, *slices))
    exact = expected(make(), {**options, "softcap": 4.0})
    for ours, theirs in zip((loss.detach(), dhidden, torch.cat(dslices)), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_shards_in_jax():
    hidden, weight, targets = map(jnp.asarray, make())

    def loss(hidden, weight):
        shards = [
            linear_cross_entropy_shard(hidden, weight[start : start + 11], targets, vocab_start=start)
            for start in (0, 11, 22)
        ]
        return merge_cross_entropy(*zip(*shards, strict=True), targets=targets, vocab=VOCAB, reduction="sum")

    for ours, theirs in zip(
        jax.grad(loss, (0, 1))(hidden, weight), expected(make(), {"reduction": "sum"})[1:], strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_a_shard_returns_two_or_three():
    arrays = make()
    for framework in (np.asarray, torch.from_numpy, jnp.asarray):
        for kernel in ("triton", None):
            for wanted in (False, True):
                shard = linear_cross_entropy_shard(
                    *map(framework, arrays), vocab_start=0, return_logit_sum=wanted, implementation=kernel
                )
                assert [tuple(row.shape) for row in shard] == [SHAPE] * (2 + wanted)


# ---- What is said of it


def test_explain():
    text = str(crosstile.explain("linear_cross_entropy", *map(torch.from_numpy, make()), implementation="triton"))
    assert text.startswith("linear_cross_entropy runs with 'triton' in its interpreter")
    assert "block_vocab=32" in text
    text = str(crosstile.explain("linear_cross_entropy_shard", *map(torch.from_numpy, make()), vocab_start=0))
    assert "'library'" in text


@pytest.mark.parametrize("kernel", ["triton", "pallas"])
def test_tiles_of_a_call(kernel):
    hidden, weight, targets = (torch.from_numpy(x) for x in make(shape=(40,), vocab=50))
    hidden.requires_grad_()
    tiles = LinearCrossEntropyTiles(16, 16, 16)
    config = LinearCrossEntropyConfig(tiles, tiles, tiles, span=1, part_tokens=16, part_vocab=16)
    losses = [linear_cross_entropy(hidden, weight, targets, implementation=kernel, config=c) for c in (None, config)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


def test_the_manual():
    results = doctest.testmod(cross_entropy)
    assert results.attempted > 0
    assert results.failed == 0


def test_numpy_needs_no_framework():
    code = (
        "import crosstile, numpy, sys; crosstile.linear_cross_entropy(numpy.ones((2, 4)), numpy.ones((3, 4)), "
        "numpy.zeros(2, int)); assert not {'torch', 'jax', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Errors


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"hidden": ()}, {}, r"hidden: got rank 0"),
        ({"weight": (3, 33, 12)}, {}, r"weight: got rank 3, \[3, 33, 12\]; it must have rank 2, \[vocab, features\]"),
        ({"weight": (12, 33)}, {}, r"weight: features is 33 in \[12, 33\]; it must be 12, as in hidden \[2, 9, 12\]"),
        ({"weight": (0, 12)}, {}, r"weight: got \[0, 12\]; vocab and features must be at least 1"),
        ({"targets": (9,)}, {}, r"targets: got \[9\]; it must be \[2, 9\]"),
        ({}, {"softcap": -1.0}, r"softcap: got -1.0"),
        ({}, {"label_smoothing": 1.5}, r"label_smoothing: got 1.5; it must be from 0 to 1"),
        ({}, {"z_loss": float("inf")}, r"z_loss: got inf; it must be finite and not negative"),
        ({}, {"reduction": "max"}, r"reduction: got 'max'; it must be one of mean, sum, none"),
    ],
)
def test_values_that_do_not_fit(change, options, message):
    shapes = {"hidden": (*SHAPE, FEATURES), "weight": (VOCAB, FEATURES), "targets": SHAPE, **change}
    kinds = {"targets": "int64"}
    for framework in (np.asarray, torch.from_numpy, jnp.asarray):
        arrays = {name: framework(np.zeros(shape, kinds.get(name, "float32"))) for name, shape in shapes.items()}
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**arrays, **options)


@pytest.mark.parametrize(
    ("dtypes", "options", "message"),
    [
        ({"hidden": "int32"}, {}, r"hidden: dtype is int32"),
        ({"weight": "float16"}, {}, r"weight: dtype is float16; it must be float32, as hidden is"),
        ({"targets": "float32"}, {}, r"targets: dtype is float32; it must be an integer"),
        ({"targets": "bool"}, {}, r"targets: dtype is bool"),
        ({}, {"ignore_index": 1.0}, r"ignore_index: got float; it must be an integer"),
        ({}, {"label_smoothing": "much"}, r"label_smoothing: got str"),
        ({}, {"softcap": True}, r"softcap: got bool"),
    ],
)
def test_types_that_cannot_be(dtypes, options, message):
    kinds = {"hidden": "float32", "weight": "float32", "targets": "int64", **dtypes}
    shapes = {"hidden": (2, 4), "weight": (3, 4), "targets": (2,)}
    for framework in (np.asarray, torch.from_numpy, jnp.asarray):
        with pytest.raises(TypeError, match=message):
            linear_cross_entropy(**{n: framework(np.zeros(shapes[n], kinds[n])) for n in shapes}, **options)


@pytest.mark.parametrize("framework", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("wrong", [VOCAB, -1, 2**40])
def test_targets_out_of_range(framework, wrong):
    hidden, weight, targets = make()
    targets[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"targets: got {wrong}; it must be from 0 to 32, or ignore_index -100"):
        linear_cross_entropy(*map(framework, (hidden, weight, targets)))


def test_two_frameworks():
    hidden, weight, targets = make()
    with pytest.raises(TypeError, match="targets: got .*Tensor where hidden is"):
        linear_cross_entropy(hidden, weight, torch.from_numpy(targets))


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (((), ()), {}, r"lses: got 0 for 0 lses"),
        ((2, 1), {}, r"target_logits: got 1 for 2 lses"),
        ((1, 1), {"label_smoothing": 0.1}, r"logit_sums: got None; label smoothing needs them"),
        ((1, 1), {"vocab": -1}, r"vocab: got -1"),
        ((1, 1), {"targets": np.zeros(3, int)}, r"lses\[0\]: got \[4\]; it must be \[3\], as targets"),
        ((1, 1), {"targets": np.full(4, 9)}, r"targets: got 9; it must be from 0 to 4"),
    ],
)
def test_merging_what_does_not_fit(parts, options, message):
    lses, logits = ([np.zeros(4, np.float32)] * (len(n) if n == () else n) for n in parts)
    with pytest.raises(ValueError, match=message):
        merge_cross_entropy(lses, logits, **{"targets": np.zeros(4, int), "vocab": 5, **options})


def test_a_shard_wants_to_know_where_it_starts():
    with pytest.raises(ValueError, match="vocab_start: got -1; it must not be negative"):
        linear_cross_entropy_shard(*make(), vocab_start=-1)


@pytest.mark.skipif(find_spec("jax_triton") is None, reason="jax-triton lowers for CUDA")
def test_jax_on_a_gpu_keeps_a_part_of_the_gradient_of_the_logits():
    """Launches that write a part of dweight are given the whole, and no array is as large as the logits."""
    tokens, features, vocab = 4096, 64, 8192
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, features), (vocab, features))]
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def loss(hidden, weight, targets):
        return crosstile.linear_cross_entropy(hidden, weight, targets)

    with crosstile.target("sm_90"):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(*structs, targets)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "triton_kernel_call" in line]
    assert len([line for line in calls if "output_operand_alias" in line]) > 4
    sizes = [prod(map(int, dims.rstrip("x").split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)", text)]
    assert max(sizes) < tokens * vocab // 2
