"""The error table: its measure, and that it catches what is wrong."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from crosstile.bench import verify
from crosstile.bench.case import Case, TorchSide
from crosstile.bench.cases import AttentionCase, FeaturesCase, MatmulCase, PagedCase
from crosstile.bench.cli import app
from crosstile.bench.verify import Check, compare

ATTENTION = AttentionCase("small", 1, 9, 14, 4, 2, 8, causal=True)
FEATURES = FeaturesCase("small", 1, 9, 14, 4, 2, 8, causal=True, window=5, softcap=3.0)
PAGED = PagedCase("small", (20, 3), q_len=2, q_heads=4, kv_heads=2, head_dim=8, page_size=16)
MATMUL = MatmulCase("small", 5, 8, 7, "silu")


def test_the_multiple_is_of_twice_the_own_error() -> None:
    exact = np.ones(100)
    theirs = exact + 1e-3
    floor = 0.5 * 2.0**-10 + 4 * 2.0**-23
    error, multiple = compare(exact + 2e-3, theirs, exact, "float16")
    assert error == pytest.approx(2e-3)
    assert multiple == pytest.approx(2e-3 / (2e-3 + floor))
    assert compare(exact + 4e-3, theirs, exact, "float16")[1] > 1


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.ones(3)])
def test_nan_inf_and_shape_are_infinitely_wrong(bad: np.ndarray) -> None:
    assert compare(bad, np.ones(2), np.ones(2), "float32")[1] == np.inf


@pytest.mark.parametrize("case", [ATTENTION, FEATURES, PAGED, MATMUL], ids=lambda case: type(case).__name__)
def test_the_framework_s_own_op_passes(case: Case) -> None:
    checks = list(verify.check(case, TorchSide(), "library", "float32"))
    assert [check.direction for check in checks] == (["forward"] if case is PAGED else ["forward", "backward"])
    assert all(check.passes for check in checks)


@pytest.mark.parametrize("mutation", ["scale", "causal"])
def test_a_wrong_attention_does_not_pass(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import crosstile

    change = {"scale": {"scale": 0.36, "causal": True}, "causal": {"causal": False}}[mutation]

    def wrong(self, implementation):
        return partial(crosstile.attention, implementation=implementation, **change)

    monkeypatch.setattr(AttentionCase, "public", wrong)
    assert not any(check.passes for check in verify.check(ATTENTION, TorchSide(), "library", "float32"))


FEATURE_MISTAKES = {
    "window": {"window": (4, None)},
    "softcap": {"softcap": 3.1},
    "sinks": {"sinks": None},
    "slopes": {"score_mod": None},
}


@pytest.mark.parametrize("mutation", FEATURE_MISTAKES)
def test_attention_with_a_wrong_feature_does_not_pass(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import crosstile

    right = {"causal": True, "window": (5, None), "softcap": 3.0}

    def wrong(self, implementation):
        def attention(q, k, v, sinks, slopes):
            options = right | {"sinks": sinks, "score_mod": crosstile.mods.alibi(slopes)} | FEATURE_MISTAKES[mutation]
            out = crosstile.attention(q, k, v, **options, implementation=implementation)
            return out + 0 * (sinks.sum() + slopes.sum())  # so that each has a gradient

        return attention

    monkeypatch.setattr(FeaturesCase, "right", FeaturesCase.public, raising=False)
    monkeypatch.setattr(FeaturesCase, "own", lambda self, side: self.right("library"))
    monkeypatch.setattr(FeaturesCase, "public", wrong)
    assert not any(check.passes for check in verify.check(FEATURES, TorchSide(), "library", "float32"))


def test_pages_read_in_a_wrong_order_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import crosstile

    def wrong(self, implementation):
        if implementation == "numpy":  # the definition, to which the wrong order is compared
            return self.right(implementation)

        def paged(page_table, **others):
            return crosstile.paged_attention(page_table=page_table.flip(1), **others, implementation=implementation)

        return paged

    monkeypatch.setattr(PagedCase, "right", PagedCase.public, raising=False)
    monkeypatch.setattr(PagedCase, "own", lambda self, side: self.right("library"))
    monkeypatch.setattr(PagedCase, "public", wrong)
    assert not any(check.passes for check in verify.check(PAGED, TorchSide(), "library", "float32"))


@pytest.mark.parametrize(("multiple", "code"), [(0.5, 0), (1.5, 1)])
def test_the_command_s_exit_code(multiple: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Check("matmul", "small", "torch", "triton", "forward", "float32", 1e-7, multiple)
    monkeypatch.setattr(verify, "verify", lambda *args: [row])
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == code
    assert f"{multiple:.2f}" in result.output


def test_a_missing_framework_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "find_spec", lambda name: None if name == "jax" else object())
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == 2
    assert "pip install 'crosstile[jax]'" in result.output
