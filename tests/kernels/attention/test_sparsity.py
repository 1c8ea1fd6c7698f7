"""What a mask hides: the runs of tiles that the host derives from it, and kernels that read nothing else.

That a result is right proves no skipping, so keys of hidden tiles are NaN here: a kernel that read them would show it.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import crosstile
from crosstile import mods
from crosstile.kernels.attention import pallas, triton
from crosstile.kernels.attention.reference import visible
from crosstile.kernels.attention.sparsity import HEADER, flat, with_runs
from crosstile.kernels.attention.spec import AttentionInputs, AttentionSpec
from crosstile.kernels.attention.tiles import AttentionConfig, AttentionTiles, choose_config
from crosstile.kernels.tiles.expressions import plane
from crosstile.kernels.tiles.targets import INTERPRET
from crosstile.kernels.tiles.visibility import visible_tiles
from crosstile.scores import visible_tiles as public_visible_tiles

Q_LEN, KV_LEN, BLOCK = 150, 170, 32
KERNELS = pytest.mark.parametrize("kernel", ["triton", "pallas"])
SMALL = AttentionTiles(16, 16)  # several to what a TPU kernel fetches at once, even in a short test
CONFIGS = {"triton": None, "pallas": AttentionConfig(SMALL, SMALL, SMALL)}
IDS = np.repeat([0, 1, 2], [70, 33, 67])  # documents that begin and end within tiles


def arrays(q_len: int = Q_LEN, kv_len: int = KV_LEN, q_heads: int = 2, kv_heads: int = 1) -> list[np.ndarray]:
    draw = np.random.default_rng(0).standard_normal
    shapes = (2, q_len, q_heads, 16), (2, kv_len, kv_heads, 16), (2, kv_len, kv_heads, 16)
    return [draw(shape).astype(np.float32) for shape in shapes]


def decoded(listed: np.ndarray, row: int) -> tuple[set[int], set[int]]:
    """The tiles that a row visits, and those of them that it sees whole."""
    start, stop = listed[HEADER + row], listed[HEADER + row + 1]
    seen, whole = set(), set()
    for first, end in listed[start:stop].reshape(-1, 2):
        tiles = set(range(~first if first < 0 else first, end))
        seen |= tiles
        whole |= tiles if first < 0 else set()
    return seen, whole


def tiles_of(mask: np.ndarray, row: int) -> tuple[set[int], set[int]]:
    """The same, by looking at every score."""
    part = mask[row * BLOCK : (row + 1) * BLOCK]
    columns = [part[:, at : at + BLOCK] for at in range(0, mask.shape[1], BLOCK)]
    return {n for n, x in enumerate(columns) if x.any()}, {n for n, x in enumerate(columns) if x.all()}


MASKS = {
    "documents": (mods.document(IDS), IDS[:Q_LEN, None] == IDS),
    "prefix": (mods.prefix(40), (np.arange(KV_LEN) < 40) | (np.arange(KV_LEN) <= np.arange(Q_LEN)[:, None])),
    "near the diagonal": (
        lambda b, h, i, j: (i - j < 20) & (j - i < 20),
        abs(np.arange(Q_LEN)[:, None] - np.arange(KV_LEN)) < 20,
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_list_is_the_mask_by_tiles(name):
    mask_mod, mask = MASKS[name]
    runs = public_visible_tiles(mask_mod, Q_LEN, KV_LEN, block_q=BLOCK, block_kv=BLOCK)
    for listed, seen in ((flat(runs), mask), (flat(runs.transposed()), mask.T)):
        assert listed.dtype == np.int32
        for row in range(listed[2]):
            visited, whole = tiles_of(seen, row)
            found, found_whole = decoded(listed, row)
            assert found == visited
            last = seen.shape[1] // BLOCK  # the tile at an end that is not full is masked in any case
            assert found_whole == whole - {last}


def test_rows_of_batch_items_and_heads():
    mask = np.zeros((2, 3, 64, 96), bool)
    mask[1, 2, :32, 64:] = mask[0, 1, 32:, :32] = True
    listed = flat(visible_tiles(plane(0), 64, 96, 32, 32, planes=[mask], batch=2, heads=3))
    assert listed[:HEADER].tolist() == [6, 2, 2]
    rows = {row: decoded(listed, row)[1] for row in range(12) if decoded(listed, row)[0]}
    assert rows == {0 * 6 + 1 * 2 + 1: {0}, 1 * 6 + 2 * 2 + 0: {2}}


@pytest.mark.parametrize(
    ("kernel", "name"), [("triton", "documents"), ("triton", "prefix"), ("pallas", "near the diagonal")]
)
def test_hidden_tiles_are_not_read(kernel, name):
    """Keys and values that only hidden tiles hold, of the queries that are looked at, are NaN."""
    mask_mod, mask = MASKS[name]
    first = slice(0, BLOCK)
    unread = [at for at in range(-(-KV_LEN // BLOCK)) if at not in tiles_of(mask, 0)[0]]
    assert unread
    q, k, v = arrays()
    for at in unread:
        k[:, at * BLOCK : (at + 1) * BLOCK] = v[:, at * BLOCK : (at + 1) * BLOCK] = np.nan
    leaves = [torch.from_numpy(array).requires_grad_() for array in (q, k, v)]
    out = crosstile.attention(*leaves, mask_mod=mask_mod, implementation=kernel)
    (dq,) = torch.autograd.grad(out[:, first].sum(), leaves[:1])
    assert torch.isfinite(out[:, first]).all()
    assert torch.isfinite(dq[:, first]).all()
    assert not torch.isfinite(out).all()


@KERNELS
def test_hidden_tiles_of_queries_are_not_read(kernel):
    """dk and dv of the first document, where the queries of the last are NaN."""
    q, k, v = arrays()
    q[:, 128:] = np.nan
    leaves = [torch.from_numpy(array).requires_grad_() for array in (q, k, v)]
    out = crosstile.attention(*leaves, mask_mod=mods.document(IDS), implementation=kernel)
    for gradient in torch.autograd.grad(out.sum(), leaves[1:]):
        assert torch.isfinite(gradient[:, :BLOCK]).all()
        assert not torch.isfinite(gradient).all()


CAUSAL, WINDOW = ({"causal": True}, True), ({"window": (30, 12)}, False)


@pytest.mark.parametrize(
    ("kernel", "changes", "lengths"),
    [
        pytest.param("triton", *CAUSAL, id="causal-triton"),
        pytest.param("pallas", *WINDOW, id="window-pallas"),
        pytest.param("triton", *WINDOW, id="window-triton", marks=pytest.mark.sweep),
        pytest.param("pallas", *CAUSAL, id="causal-pallas", marks=pytest.mark.sweep),
    ],
)
def test_a_run_does_not_change_the_result(kernel, changes, lengths, monkeypatch):
    """With runs and without, every score is computed alike, if in other tiles."""
    options = {**changes, "mask_mod": mods.document(IDS), "softcap": 3.0}
    if lengths:
        options |= {"q_lengths": torch.tensor([150, 61]), "kv_lengths": torch.tensor([170, 99])}

    def attend() -> list[torch.Tensor]:
        leaves = [torch.from_numpy(array).requires_grad_() for array in arrays()]
        out = crosstile.attention(*leaves, **options, implementation=kernel, config=CONFIGS[kernel])
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    module = {"triton": triton, "pallas": pallas}[kernel]
    with_lists = attend()
    monkeypatch.setattr(module, "with_runs", lambda spec, inputs, blocks: inputs)
    for ours, theirs in zip(with_lists, attend(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@KERNELS
@pytest.mark.parametrize("wrong", ["no last run", "all whole"])
def test_a_wrong_list_is_noticed(kernel, wrong, monkeypatch):
    """The runs decide: without the last of each list, or with each said to be whole, the result is another."""
    module = {"triton": triton, "pallas": pallas}[kernel]

    def spoilt(spec, inputs, blocks):
        listed = with_runs(spec, inputs, blocks).forward_runs.copy()
        bounds = listed[HEADER] + np.arange(0, len(listed) - listed[HEADER], 2)
        if wrong == "no last run":
            listed[bounds[-1] + 1] = 0
        else:
            listed[bounds] = np.where(listed[bounds] < 0, listed[bounds], ~listed[bounds])
        return inputs._replace(forward_runs=listed)

    mask_mod = mods.all_of(mods.document(IDS), mods.dilated(2))
    exact = crosstile.attention(*arrays(), mask_mod=mask_mod)
    monkeypatch.setattr(module, "with_runs", spoilt)
    out = crosstile.attention(*arrays(), mask_mod=mask_mod, implementation=kernel, config=CONFIGS[kernel])
    assert not np.allclose(out, exact, atol=1e-3)


@KERNELS
def test_heads_of_a_group_that_see_differently(kernel):
    def by_head(b, h, i, j):
        return (j // 64) == h % 3

    leaves, doubles = (
        [torch.from_numpy(array).to(dtype).requires_grad_() for array in arrays(q_heads=6, kv_heads=2)]
        for dtype in (torch.float32, torch.float64)
    )
    ours = crosstile.attention(*leaves, mask_mod=by_head, implementation=kernel)
    exact = crosstile.attention(*doubles, mask_mod=by_head, implementation="numpy")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(exact.sum(), doubles), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_what_the_host_does_not_know_is_seen_in_part():
    """A mask of JAX's own is computed in every tile; one of NumPy's, and indices alone, are known."""
    spec = AttentionSpec("float32", 16, 16, mask=plane(0))
    q, k, v = arrays()
    known = np.arange(Q_LEN)[:, None] // 50 == np.arange(KV_LEN) // 50
    blocks = {"forward_runs": (BLOCK, BLOCK), "dkv_runs": (BLOCK, BLOCK)}
    found = with_runs(spec, AttentionInputs(q, k, v, plane0=known[None, None]), blocks)
    assert found.forward_runs is not None
    assert found.dkv_runs is not None
    unknown = with_runs(spec, AttentionInputs(q, k, v, plane0=jnp.asarray(known[None, None])), blocks)
    assert unknown.forward_runs is unknown.dkv_runs is None


def test_masks_of_numpy_beside_tensors_and_jax_arrays():
    mask = np.arange(Q_LEN)[:, None] // 50 == np.arange(KV_LEN) // 50
    ids = np.broadcast_to(IDS, (2, KV_LEN))
    exact = crosstile.attention(*arrays(), mask=mask, segment_ids=(ids[:, :Q_LEN], ids))
    for make, kernel in ((torch.from_numpy, "library"), (jnp.asarray, "library"), (jnp.asarray, "pallas")):
        operands = [make(array) for array in arrays()]
        out = crosstile.attention(
            *operands, mask=mask[::-1][::-1], segment_ids=(ids[:, :Q_LEN], ids), implementation=kernel
        )
        np.testing.assert_allclose(np.asarray(out), exact, atol=2e-6)


def test_a_window_is_no_part_of_the_list():
    """The kernels cut the runs to it themselves, by the lengths that each batch item has."""
    spec = AttentionSpec("float32", 16, 16, causal=True, mask=("lt", ("j",), ("const", 64)))
    config = choose_config(spec, INTERPRET)
    found = triton.completed(spec, config, INTERPRET, AttentionInputs(*arrays()))
    rows = [decoded(found.forward_runs, row) for row in range(found.forward_runs[2])]
    assert rows == [({0, 1}, {0, 1})] * 5
    seen = visible(spec, Q_LEN, KV_LEN) & (np.arange(KV_LEN) < 64)
    exact = crosstile.attention(*arrays(), mask=seen)
    ours = crosstile.attention(*arrays(), causal=True, mask_mod=lambda b, h, i, j: j < 64, implementation="triton")
    np.testing.assert_allclose(ours, exact, atol=2e-6)


@pytest.mark.parametrize("kernel", ["library", "triton"])
def test_arrays_of_numpy_under_torch_compile(kernel):
    ids = np.repeat([0, 1, 2], [20, 13, 31])

    def attend(q, k):
        options = {"segment_ids": (ids[None], ids[None]), "mask_mod": mods.document(ids), "mask": ids[:, None] == ids}
        return crosstile.attention(q, k, k, **options, implementation=kernel)

    q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), attend(q, k))
