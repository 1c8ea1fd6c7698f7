"""The frequencies against those of transformers, which models are trained and served with."""

from __future__ import annotations

import numpy as np
import pytest

from crosstile.kernels.rotary.frequencies import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    frequencies_of,
    scaling_from,
)

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_2_5 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK_V3 = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
GPT_OSS = {**QWEN_2_5, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
CASES = [
    ({"rope_type": "default"}, 500000.0, 128),
    ({"rope_type": "linear", "factor": 8.0}, 1000000.0, 256),
    (LLAMA_3_1, 500000.0, 128),
    ({**LLAMA_3_1, "factor": 32.0}, 500000.0, 64),
    (QWEN_2_5, 1000000.0, 128),
    ({**QWEN_2_5, "attention_factor": 0.75}, 1000000.0, 80),
    (DEEPSEEK_V3, 10000.0, 64),
    (GPT_OSS, 150000.0, 64),
]


def by_transformers(parameters, base, dim):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    kind = parameters.get("rope_type", parameters.get("type"))
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={**parameters, "rope_type": kind, "rope_theta": base},
    )
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rotary = LlamaRotaryEmbedding(config)
        return rotary.inv_freq.numpy(), rotary.attention_scaling
    found, factor = utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return found.numpy(), factor


@pytest.mark.parametrize(("parameters", "base", "dim"), CASES)
def test_are_those_of_transformers(parameters, base, dim):
    """To three units in the last place: NumPy's power may round in its own way."""
    ours, factor = frequencies_of(dim, base, scaling_from(parameters))
    theirs, their_factor = by_transformers(parameters, base, dim)
    np.testing.assert_allclose(ours, theirs, rtol=3 * 2.0**-23, atol=0)
    assert factor == pytest.approx(their_factor, rel=1e-12)


def test_are_float32():
    ours, _ = frequencies_of(64, 10000.0, None)
    assert len(ours) == 32
    np.testing.assert_array_equal(ours, np.array(ours, np.float32))


def test_scalings_of_hugging_face_configs():
    assert scaling_from({"rope_type": "default", "rope_theta": 1e4}) is None
    assert scaling_from({}) is None
    assert scaling_from(LLAMA_3_1) == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert scaling_from(QWEN_2_5) == YarnScaling(4.0, 32768)
    assert scaling_from({"type": "linear", "factor": 2.0}) == LinearScaling(2.0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope"}, r"scaling: its rope_type is 'longrope'; it must be default, linear, llama3, yarn"),
        ({"rope_type": "llama3", "factor": 8.0}, r"must also give low_freq_factor, high_freq_factor, original_max"),
        ({"rope_type": "yarn", "factor": 8.0}, r"must also give original_max_position_embeddings$"),
        ({"rope_type": "linear", "factor": 0.0}, r"scaling: factor is 0.0; it must be finite and greater than 0"),
        ({**LLAMA_3_1, "low_freq_factor": 4.0}, r"low_freq_factor is 4.0; it must be less than high_freq_factor, 4.0"),
    ],
)
def test_scalings_that_cannot_be(parameters, message):
    with pytest.raises(ValueError, match=message):
        scaling_from(parameters)
