"""Which implementation runs, and what the library says of it."""

import threading
import warnings

import numpy as np
import pytest

import crosstile
from crosstile import dispatch
from crosstile.kernels.attention.spec import AttentionSpec
from crosstile.kernels.attention.tiles import AttentionConfig, AttentionTiles
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS

torch = pytest.importorskip("torch")
jnp = pytest.importorskip("jax.numpy")


def tensors(dtype="float32", dim=16):
    x = torch.randn(1, 5, 2, dim).to(getattr(torch, dtype))
    return x, x, x


@pytest.fixture
def spy(monkeypatch):
    """Which implementation's file each call took."""
    taken = []
    module = dispatch.Op.module

    def record(self, file):
        if file in dispatch.IMPLEMENTATIONS:
            taken.append(file)
        return module(self, file)

    monkeypatch.setattr(dispatch.Op, "module", record)
    return taken


def test_the_choice_by_arrays(spy):
    crosstile.attention(*tensors())
    assert set(spy) == {"library"}
    spy.clear()
    x = np.ones((1, 2, 1, 4))
    crosstile.attention(x, x, x)
    assert set(spy) == {"numpy"}
    spy.clear()
    x = jnp.ones((1, 2, 1, 4))
    crosstile.attention(x, x, x)
    assert set(spy) == {"library"}


def test_the_call_overrides_use_which_overrides_the_environment(spy, monkeypatch):
    monkeypatch.setenv("CROSSTILE_IMPLEMENTATION", "numpy")
    crosstile.attention(*tensors())
    assert set(spy) == {"numpy"}
    with crosstile.use("library"):
        spy.clear()
        crosstile.attention(*tensors())
        assert set(spy) == {"library"}
        with crosstile.use("triton"):
            spy.clear()
            crosstile.attention(*tensors())
            assert set(spy) == {"triton"}
        spy.clear()
        crosstile.attention(*tensors(), implementation="pallas")
        assert set(spy) == {"pallas"}
    spy.clear()
    crosstile.attention(*tensors())
    assert set(spy) == {"numpy"}


def test_use_ends_with_an_error_and_stays_in_its_thread(spy):
    with pytest.raises(RuntimeError), crosstile.use("numpy"):
        raise RuntimeError
    crosstile.attention(*tensors())
    assert set(spy) == {"library"}
    spy.clear()
    with crosstile.use("numpy"):
        thread = threading.Thread(target=lambda: crosstile.attention(*tensors()))
        thread.start()
        thread.join()
    assert set(spy) == {"library"}


@pytest.mark.parametrize(
    "call", [lambda: crosstile.attention(*tensors(), implementation="cuda"), lambda: crosstile.use("cuda").__enter__()]
)
def test_an_unknown_implementation_is_named_with_those_there_are(call):
    with pytest.raises(ValueError, match=r"'cuda'; it must be one of numpy, triton, pallas, library"):
        call()


def test_an_unknown_target_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"target: got 'v9'; it must be one of sm_80, .*v7x"), crosstile.target("v9"):
        pass


def test_a_named_implementation_that_cannot_run_is_an_error_with_its_reason():
    with pytest.raises(crosstile.UnsupportedError, match=r"'triton' cannot run attention here.*float16.*float64"):
        crosstile.attention(*tensors("float64"), implementation="triton")
    x = np.ones((1, 2, 1, 4))
    with pytest.raises(crosstile.UnsupportedError, match=r"NumPy has none: use numpy"):
        crosstile.attention(x, x, x, implementation="library")
    with crosstile.target("v6e"), pytest.raises(crosstile.UnsupportedError, match=r"Triton kernels are for GPUs"):
        crosstile.attention(*[jnp.ones((1, 2, 1, 4))] * 3, implementation="triton")
    with crosstile.target("sm_90"), pytest.raises(crosstile.UnsupportedError, match=r"tensors are on this CPU"):
        crosstile.attention(*tensors(), implementation="triton")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(dispatch, "installed", lambda package: package != "triton")
    reasons = crosstile.supports("attention", "triton", AttentionSpec("float32", 64, 64))
    assert reasons == ("triton is not installed: pip install 'crosstile[triton]'",)


def test_supports_is_pure_and_answers_for_any_target():
    spec = AttentionSpec("bfloat16", 128, 128, causal=True)
    assert crosstile.supports("attention", "triton", spec, "sm_90", needs_grad=True) == ()
    assert crosstile.supports("attention", "pallas", spec, "v6e", needs_grad=True) == ()
    assert crosstile.supports("attention", "triton", AttentionSpec("float64", 128, 128), INTERPRET)
    assert crosstile.supports("attention", "pallas", spec, TARGETS["sm_90"])
    too_wide = AttentionSpec("bfloat16", 1024, 128)
    for implementation, target in (("triton", "sm_90"), ("pallas", "v6e")):
        assert "head_dim" in " ".join(crosstile.supports("attention", implementation, too_wide, target))


def test_the_automatic_choice_steps_down_with_one_warning(monkeypatch, spy):
    monkeypatch.setattr(dispatch.glue("torch"), "on_cpu", lambda array: False)
    monkeypatch.setitem(dispatch._AUTOMATIC, "cpu", ("triton", "library"))
    arrays = tensors("float64")
    with pytest.warns(UserWarning, match="runs with 'library', a step down. triton: .*float64"):
        crosstile.attention(*arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crosstile.attention(*arrays)
    assert spy[-1] == "library"


def test_explain_says_what_runs_and_why_the_others_do_not():
    text = str(crosstile.explain("attention", *tensors("float64"), causal=True))
    assert text.startswith("attention runs with 'library'")
    assert "triton: The Triton" in text
    assert "float64" in text
    text = str(crosstile.explain("attention", *tensors(), causal=True, implementation="triton"))
    assert "runs with 'triton' in its interpreter on this CPU, as the call says" in text
    assert "block_q=" in text
    with crosstile.target("v6e"):
        text = str(crosstile.explain("attention", *[jnp.ones((1, 2, 1, 64))] * 3))
        assert "runs with 'pallas' for v6e (TPU v6e)" in text
    with crosstile.use("numpy"):
        assert "as crosstile.use says" in str(crosstile.explain("matmul", torch.ones(2, 3), torch.ones(3, 4)))
    with pytest.raises(ValueError, match=r"op: got 'attend'; it must be one of attention, varlen_attention, paged"):
        crosstile.explain("attend")


def test_config_sets_the_tiles_of_a_call():
    q, k, v = tensors()
    tiles = AttentionTiles(block_q=16, block_kv=64)
    config = AttentionConfig(tiles, tiles, tiles)
    expected = crosstile.attention(q, k, v, causal=True)
    for implementation in ("triton", "pallas"):
        out = crosstile.attention(q, k, v, causal=True, implementation=implementation, config=config)
        torch.testing.assert_close(out, expected)
    assert "block_kv=64" in str(crosstile.explain("attention", q, k, v, implementation="triton", config=config))
    with pytest.raises(TypeError, match=r"config: got dict; attention takes a .*AttentionConfig"):
        crosstile.attention(q, k, v, implementation="triton", config={})
