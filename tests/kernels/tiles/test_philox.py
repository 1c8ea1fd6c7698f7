"""The random bits of dropout: Random123's known answers, and one mask in every implementation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import crosstile
from crosstile.kernels.tiles import philox as bits

ONES = 0xFFFFFFFF
KNOWN = {  # kat_vectors of Random123 1.14: philox4x32, counter, key -> words, with 7 rounds
    ((0, 0, 0, 0), (0, 0)): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    ((ONES,) * 4, (ONES,) * 2): (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
}


@pytest.mark.parametrize("counter", KNOWN)
def test_known_answers(counter):
    assert bits.philox(counter[1], counter[0], int) == KNOWN[counter]


def dropped(implementation: str, make, dropout: float, seed, q_len: int = 70, kv_len: int = 90) -> np.ndarray:
    """Which weights are 0: with scores of 0 and values that are unit vectors a result is a row of weights."""
    q, k = np.zeros((2, q_len, 4, kv_len), np.float32), np.zeros((2, kv_len, 2, kv_len), np.float32)
    v = np.broadcast_to(np.eye(kv_len, dtype=np.float32)[:, None], k.shape)
    arrays = (make(np.ascontiguousarray(array)) for array in (q, k, v))
    out = crosstile.attention(*arrays, dropout=dropout, dropout_seed=seed, implementation=implementation)
    out = np.asarray(out)
    np.testing.assert_allclose(out[out != 0], 1 / (kv_len * (1 - dropout)), rtol=1e-5)
    return out == 0


def test_every_implementation_drops_the_same():
    seed, share = 2**40 + 12345, 0.3
    expected = dropped("numpy", lambda array: array, share, seed)
    assert abs(expected.mean() - share) < 0.01
    cases = [("library", torch.from_numpy), ("library", jnp.asarray), ("triton", torch.from_numpy)]
    for implementation, make in [*cases, ("pallas", jnp.asarray)]:
        np.testing.assert_array_equal(dropped(implementation, make, share, seed), expected)


def test_of_a_seed_as_an_array():
    expected = dropped("numpy", lambda array: array, 0.5, 7, 9, 33)
    words = np.array([7, 0], np.int32)
    for make, seed in ((torch.from_numpy, torch.tensor(7)), (jnp.asarray, jnp.asarray(words)), (np.asarray, words)):
        implementation = "numpy" if make is np.asarray else "library"
        np.testing.assert_array_equal(dropped(implementation, make, 0.5, seed, 9, 33), expected)
    assert (dropped("numpy", np.asarray, 0.5, 8, 9, 33) != expected).any()


def test_places_are_independent():
    """Neighbours along every index, and seeds, share no more than chance has them share."""
    grids = np.ix_(*map(np.arange, (2, 3, 40, 96)))
    stay = bits.kept((3, 0), 0.5, grids, int, np.where)
    for axis in range(4):
        same = np.diff(stay.astype(int), axis=axis) == 0
        assert abs(same.mean() - 0.5) < 0.02
    assert abs((stay == bits.kept((4, 0), 0.5, grids, int, np.where)).mean() - 0.5) < 0.02
    assert abs((stay == bits.kept((3, 1), 0.5, grids, int, np.where)).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.0, "dropout_seed": 1}, ValueError, r"dropout: got 1.0; it must be at least 0 and less than 1"),
        ({"dropout": -0.1, "dropout_seed": 1}, ValueError, r"dropout: got -0.1"),
        ({"dropout": "0.1", "dropout_seed": 1}, TypeError, r"dropout: got str; it must be a number"),
        ({"dropout": 0.1}, ValueError, r"dropout_seed: got None; with dropout it must be an integer"),
        ({"dropout": 0.1, "dropout_seed": 0.5}, TypeError, r"dropout_seed: got float; it must be an integer"),
        ({"dropout": 0.1, "dropout_seed": -1}, ValueError, r"dropout_seed: got -1; it must not be negative"),
        ({"dropout": 0.1, "dropout_seed": np.zeros(3, int)}, ValueError, r"dropout_seed: got \[3\]; it must be one"),
    ],
)
def test_errors(options, error, message):
    x = np.ones((1, 2, 1, 4))
    with pytest.raises(error, match=message):
        crosstile.attention(x, x, x, **options)
