"""Generation: equal tokens in the three frameworks, equal to a loop without a cache, few programs in JAX."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from crosstile.models import forward, generate, init
from crosstile.models.arrays import FRAMEWORKS, framework_of, from_numpy, to_numpy, tree_map_with_path
from crosstile.models.generate import _compiled, choose


@pytest.fixture
def stretched(stretched):
    """With a head of its own: a tied one mostly repeats the last token."""
    return replace(stretched, tie_embeddings=False)


@pytest.fixture
def weights(stretched):
    """Larger than at initialisation, so that the likeliest tokens vary and lead by more than rounding."""
    params = init(stretched, 2, "numpy")
    return lambda framework: tree_map_with_path(
        lambda path, array: from_numpy(array if path.endswith("norm") else 10 * array, framework), params
    )


def without_cache(params, config, prompt, count):
    tokens = prompt
    for _ in range(count):
        chosen = forward(params, tokens, config)[:, -1].argmax(-1)
        tokens = np.concatenate([tokens, chosen[:, None]], 1)
    return tokens


def test_greedy_is_equal_everywhere_and_to_a_loop_without_cache(stretched, weights, tokens):
    wanted = without_cache(weights("numpy"), stretched, tokens, 40)
    assert len(set(wanted[:, 13:].flatten().tolist())) > 8
    for framework in FRAMEWORKS:
        got = generate(weights(framework), stretched, tokens, 40)
        assert framework_of(got) == framework
        assert np.array_equal(to_numpy(got), wanted), framework


def test_draws_are_equal_everywhere_and_follow_the_seed(stretched, weights, tokens):
    params = weights("numpy")
    wanted = generate(params, stretched, tokens, 20, temperature=0.8, seed=3)
    for framework in ("torch", "jax"):
        assert np.array_equal(to_numpy(generate(weights(framework), stretched, tokens, 20, 0.8, 3)), wanted)
    assert not np.array_equal(generate(params, stretched, tokens, 20, 0.8, 4), wanted)
    assert not np.array_equal(generate(params, stretched, tokens, 20), wanted)


def test_draws_have_the_probabilities_of_the_softmax():
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    many = choose(np.repeat(logits, 20_000, 0), 1.0, np.random.default_rng(0))
    assert np.allclose(np.bincount(many) / 20_000, [0.5, 0.3, 0.2], atol=4 * 0.5 / 20_000**0.5)
    cold = choose(np.repeat(logits, 1000, 0), 0.5, np.random.default_rng(0))
    assert np.bincount(cold)[0] / 1000 == pytest.approx(0.25 / 0.38, abs=0.06)


def test_jax_compiles_two_programs_for_many_lengths(stretched, weights, tokens):
    _compiled.cache_clear()
    params = weights("jax")
    for length, count in ((3, 5), (13, 9), (7, 20), (1, 1)):
        generate(params, stretched, tokens[:, :length], count)
    (program,) = [_compiled(stretched, *key) for key in [(False, ("library", "interpret"))]]
    assert _compiled.cache_info().currsize == 1
    assert program._cache_size() == 2


def test_prompts_of_any_kind(stretched, weights, tokens):
    params = weights("torch")
    wanted = generate(params, stretched, tokens[0], 6)
    assert wanted.shape == (19,)
    for prompt in (
        tokens[0].tolist(),
        torch.as_tensor(tokens[0]),
        jax.numpy.asarray(tokens[0]),
        tokens[0].astype("int64"),
    ):
        assert torch.equal(generate(params, stretched, prompt, 6), wanted)
    assert torch.equal(generate(params, stretched, tokens[:1], 6)[0], wanted)
    assert generate(params, stretched, tokens, 0).tolist() == tokens.tolist()


@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_the_whole_context_can_be_used(stretched, weights, framework):
    prompt = np.arange(200, dtype=np.int32)[None]
    got = to_numpy(generate(weights(framework), stretched, prompt, 56))
    assert np.array_equal(got, to_numpy(generate(weights("torch"), stretched, prompt, 56)))


@pytest.mark.parametrize(
    ("prompt", "count", "temperature", "message"),
    [
        ([], 1, 0, r"prompt: got .*length >= 1"),
        ([0.5], 1, 0, r"prompt: got float64"),
        ([[[1]]], 1, 0, r"prompt: got int64 \[1, 1, 1\]"),
        ([1, 256], 1, 0, r"prompt: ids go from 1 to 256; they must be 0 to 255"),
        ([-1], 1, 0, r"prompt: ids go from -1"),
        ([1, 2], 255, 0, r"max_new_tokens: got 255 after a prompt of 2.*256"),
        ([1], -1, 0, r"max_new_tokens: got -1"),
        ([1], 1, -0.5, r"temperature: got -0.5"),
    ],
)
def test_errors_name_the_argument(stretched, weights, prompt, count, temperature, message):
    with pytest.raises(ValueError, match=message):
        generate(weights("numpy"), stretched, prompt, count, temperature)
