from __future__ import annotations

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from crosstile.bench import batches, model_speed
from crosstile.bench.batches import WAYS, Measured, by_packing, by_size, documents
from crosstile.bench.model_speed import Timed, ratio
from crosstile.models.config import Config, Layer

TINY = Config(64, 32, 64, 2, 1, 16, (Layer(),), max_seq_len=64, tie_embeddings=True)


def made(way: str, count: int = 6) -> list[batches.Batch]:
    tokens, ends = documents(64, 32, 300)
    return list(batches._batches(way, tokens, ends, 4, 32, count))


def test_rows_are_as_long_as_their_way_says():
    whole, longest, power = (made(way) for way in WAYS[1:])
    assert all(batch.tokens.shape == (4, 33) for batch in [*made(WAYS[0]), *whole])
    for batch, shorter, rounded in zip(whole, longest, power, strict=True):
        needed = int((batch.segments != 0).sum(1).max())
        assert shorter.tokens.shape[1] == needed
        assert rounded.tokens.shape[1] - 1 in (2, 4, 8, 16, 32)
        assert needed <= rounded.tokens.shape[1]
        assert batch.counted.sum() == shorter.counted.sum() == rounded.counted.sum()
    assert len({batch.tokens.shape for batch in longest}) > len({batch.tokens.shape for batch in power})


def test_packed_rows_hold_more_of_the_text():
    packed, padded = (sum(batch.counted.sum() for batch in made(way)) for way in WAYS[:2])
    assert packed > 1.5 * padded


def test_jax_compiles_once_for_each_size():
    found = by_size(["jax"], [1, 2], 16, 4, TINY)
    assert [(one.what, one.compilations, one.tokens) for one in found] == [("1", 1, 16), ("2", 1, 32)]
    assert all(len(one.seconds) == 4 and one.waited > max(one.seconds) for one in found)


def test_torch_takes_every_length_as_it_is():
    found = {one.what: one for one in by_packing(["torch"], 2, 32, 4, TINY)}
    assert list(found) == list(WAYS)
    assert all(one.compilations == 0 and len(one.seconds) == 4 for one in found.values())
    assert found[WAYS[0]].padding < found[WAYS[2]].padding < found[WAYS[1]].padding
    assert found[WAYS[0]].tokens > found[WAYS[1]].tokens == found[WAYS[2]].tokens


def test_a_table_tells_microseconds_of_a_predicted_token():
    one = Measured("jax", "packed", 100, [0.001, 0.002, 0.003], 2, 1.5, 0.25)
    assert one.microseconds == pytest.approx(20)
    out = StringIO()
    batches.show("title", [one], Console(file=out, width=140))
    assert all(word in out.getvalue() for word in ("20.0", "50,000", "25%", "1.5", "measured"))


def test_the_peers_better_time_is_held_against_ours():
    found = [
        Timed("transformers, eager", [3.0, 3.0, 3.0]),
        Timed("transformers, compiled", [2.0, 2.0, 2.0]),
        Timed("crosstile torch", [1.0, 1.6, 1.6]),
        Timed("crosstile jax", [0.1, 0.1, 0.1]),
    ]
    assert ratio(found, "crosstile torch") == pytest.approx(2.0 / 1.6)
    assert ratio(found) == pytest.approx(2.0 / 0.1)
    out = StringIO()
    assert model_speed.show("title", found[:3], 1.25, 10, 0, Console(file=out, width=140))
    assert not model_speed.show("title", found[:3], 1.3, 10, 0, Console(file=out, width=140))
    assert "torch 1.25" in out.getvalue()


def test_different_losses_are_not_timed():
    with pytest.raises(AssertionError, match="different losses"):
        model_speed._in_turns({"one": lambda: 1.0, "two": lambda: 1.1}, 2)
    seconds = model_speed._in_turns({"one": lambda: 1.0, "two": lambda: float(np.float32(1.0))}, 3)
    assert {name: len(times) for name, times in seconds.items()} == {"one": 3, "two": 3}
