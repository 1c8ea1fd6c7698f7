"""What `crosstile bench --device cuda` compares, as far as it can be seen without a GPU."""

from functools import partial

import pytest

import crosstile
from crosstile.bench import chip, chip_peers
from crosstile.bench.shapes import get_shape

FEW_HEADS = "q_heads=4,kv_heads=2"


@pytest.mark.parametrize("name", ["llama-3-8b-bias", "llama-3.2-1b"])
def test_results_of_other_strides_have_the_same_gradients(name):
    """torch's attention with a bias returns heads before tokens in memory."""
    shape = get_shape(f"{name}@q_len=64,kv_len=64,{FEW_HEADS}")
    arrays, leaves = chip.random_arrays(shape, "bfloat16", "cpu"), shape.leaves("bfloat16")
    ours = chip._results(partial(shape.run, implementation="triton"), arrays, leaves)
    theirs, exact = (
        chip._results(partial(shape.run, implementation="library"), given, leaves)
        for given in (arrays, chip._in_float32(arrays, "bfloat16"))
    )
    assert len(ours) == 1 + len(leaves)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert chip._compare(mine, other, true, "bfloat16")[1] <= 1


@pytest.mark.parametrize("name", ["llama-3-8b-float8", "llama-3-8b-float8-blocks"])
def test_float8_is_held_to_ops_that_round_weights(name):
    shape = get_shape(f"{name}@q_len=256,kv_len=256,{FEW_HEADS}")
    arrays = chip.random_arrays(shape, "bfloat16", "cpu")
    rounded, exact = (chip_peers.attention_of_float8(shape, arrays, rounds=rounds) for rounds in (True, False))
    definition = crosstile.attention(**shape.call(arrays), out_dtype="float32", implementation="library")
    assert chip._errors(definition, exact)[0] < 1e-5
    for implementation, least, most in (("triton", 0.25, 1.0), ("library", 0.0, 0.25)):
        out = crosstile.attention(**shape.call(arrays), out_dtype="float32", implementation=implementation)
        assert least < chip._compare(out, rounded, exact, "float32")[1] <= most


def test_peers_are_those_that_do_the_same(monkeypatch):
    monkeypatch.setattr(chip_peers, "_installed", lambda package: True)
    named = {
        "llama-3-8b": ["FLA"],
        "mistral-7b": ["FLA"],
        "llama-3-8b-varlen": ["FLA"],
        "gpt-oss-20b": [],
        "gemma-2-2b-window": [],
        "deepseek-v3": [],
        "llama-3-8b-decode": [],
        "llama-3-8b-norm": ["Liger"],
        "gpt-2-norm": [],
        "llama-3-8b-rotary": ["Liger, in place"],
        "gpt-neox-rotary": [],
        "llama-3-8b-head": ["logits"],
    }
    for name, others in named.items():
        assert list(chip_peers.peers_of(get_shape(name), "forward")) == ["torch's ops", *others], name
    assert list(chip_peers.peers_of(get_shape("llama-3-8b-head"), "both")) == ["torch's ops", "logits", "Liger"]
