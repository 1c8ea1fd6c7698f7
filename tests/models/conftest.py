"""Small models and small text for the tests of the transformer."""

import numpy as np
import pytest

from crosstile.kernels.rotary.spec import Llama3Scaling
from crosstile.models.config import Config, Layer, Rotary
from crosstile.models.data import Corpus


@pytest.fixture
def config():
    """Grouped queries, a head_dim that is not hidden / heads, an odd vocabulary, a head of its own."""
    return Config(
        vocab_size=259,
        hidden_size=24,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        layers=(Layer(rotary=Rotary(500.0)),) * 2,
        max_seq_len=128,
        norm_eps=1e-3,
    )


@pytest.fixture
def stretched():
    """Tied embeddings and Llama 3.1's frequencies, some kept, some between, some stretched."""
    return Config(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=(Layer(rotary=Rotary(scaling=Llama3Scaling(8.0, 1.0, 4.0, 64))),),
        max_seq_len=256,
        tie_embeddings=True,
    )


@pytest.fixture
def tokens():
    return np.random.default_rng(7).integers(0, 256, (2, 13)).astype(np.int32)


@pytest.fixture(scope="session")
def corpus():
    text = np.frombuffer(b"def double(x):\n    return x + x\n\n" * 800, np.uint8)
    return Corpus(text[:20_000], text[20_000:], "a test")
