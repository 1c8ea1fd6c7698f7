"""What is computed again changes no gradient, and leaves less in memory."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from installed import needs_jax_triton
from jax.extend.core import jaxprs_in_params
from torch.utils._python_dispatch import TorchDispatchMode

import crosstile
from crosstile.models import init, loss
from crosstile.models.arrays import tree_leaves
from crosstile.models.config import Config, Layer
from crosstile.models.remat import POLICIES, remat
from crosstile.models.stacking import stack, unstack
from crosstile.models.transformer import block

CONFIG = Config(64, 32, 96, 4, 2, 8, (Layer(window=5), Layer()) * 2)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 25)).astype(np.int32)


class Counting(TorchDispatchMode):
    """Counts the calls of torch's operators, those of the backward too."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.overloadpacket.__name__] += 1
        return operator(*args, **kwargs or {})


def in_torch(policy):
    """Gradients by path, and how often products and activations were computed."""
    params = init(CONFIG, 0, "torch")
    leaves = {path: array.requires_grad_() for path, array in tree_leaves(params).items()}
    with Counting() as counting:
        loss(params, torch.as_tensor(TOKENS), CONFIG, run=remat(policy, "torch", block)).backward()
    calls = counting.calls
    return {path: array.grad.numpy() for path, array in leaves.items()}, calls["mm"] + calls["addmm"], calls["silu"]


def in_jax(policy):
    """The same, of layers that are scanned."""
    params = stack(init(CONFIG, 0, "jax"), CONFIG)
    value, pull = jax.vjp(lambda params: loss(params, TOKENS, CONFIG, run=remat(policy, "jax", block)), params)
    gradients = unstack(pull(np.ones_like(value))[0], CONFIG)
    return tree_leaves(jax.tree.map(np.asarray, gradients)), sum(leaf.nbytes for leaf in jax.tree.leaves(pull))


def assert_alike(got, wanted):
    for path, gradient in wanted.items():
        assert np.abs(got[path] - gradient).max() <= 4e-7 * np.abs(gradient).max(), path


def test_torch_computes_again_what_the_policy_says():
    whole, products, activations = in_torch("none")
    assert activations == CONFIG.num_layers
    gradients, few, again = in_torch("products")
    assert_alike(gradients, whole)
    assert (few, again) == (products, 2 * activations)
    gradients, more, again = in_torch("full")
    assert_alike(gradients, whole)
    assert more >= products + 6 * CONFIG.num_layers
    assert again == 2 * activations


def test_jax_computes_again_what_the_policy_says():
    whole, kept = in_jax("none")
    sizes = [kept]
    for policy in POLICIES[1:]:
        gradients, saved = in_jax(policy)
        assert_alike(gradients, whole)
        sizes.append(saved)
    assert sizes[0] > 1.1 * sizes[1] > 1.1 * sizes[2]
    assert sizes[3] <= sizes[2]


def kernels_in_jax(policy, chip):
    """How many kernels a chip runs for the gradients of one layer."""

    def count(jaxpr):
        own = sum(equation.primitive.name in ("pallas_call", "triton_kernel_call") for equation in jaxpr.eqns)
        return own + sum(count(inner) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params))

    config = replace(CONFIG, layers=CONFIG.layers[:1])
    params = init(config, 0, "jax", "bfloat16")
    with crosstile.target(chip):
        run = remat(policy, "jax", block)
        return count(jax.make_jaxpr(jax.grad(lambda params: loss(params, TOKENS, config, run=run)))(params).jaxpr)


@pytest.mark.parametrize("chip", ["v5e", pytest.param("sm_90", marks=needs_jax_triton)])
def test_jax_runs_no_kernel_of_a_product_again(chip):
    most, some, least = (kernels_in_jax(policy, chip) for policy in ("full", "products", "none"))
    assert some == least + 3  # two norms, and rotary
    assert most >= some + 6  # four products, attention and the gate; nothing reads the last product's result


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="remat: got 'some'; it must be one of none, products, full, offload"):
        remat("some", "jax", block)
    with pytest.raises(ValueError, match="offload', which JAX has alone"):
        remat("offload", "torch", block)
