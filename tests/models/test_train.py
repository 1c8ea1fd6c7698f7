"""Training: one seed, one list of losses, resumed or not; two frameworks, the same steps; and the text is learnt."""

import json
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from crosstile.models import Config, load, train
from crosstile.models.arrays import to_numpy, tree_leaves, tree_map_with_path
from crosstile.models.cli import register
from crosstile.models.config import Layer
from crosstile.models.data import batch_at, decode, encode, held_out_batches, read_corpus, standard_library
from crosstile.models.packing import Batch
from crosstile.models.recipe import Checkpoints, Metrics, Recipe
from crosstile.models.run import last_checkpoint, last_step
from crosstile.models.train import schedule

STEPS = 12
FRAMEWORKS = ("torch", "jax")


@pytest.fixture(scope="module")
def small():
    return Config(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16,
        layers=(Layer(),), max_seq_len=64, tie_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(small, corpus):
    """train() on small things."""

    def run(framework, **options):
        options = {
            "recipe": OFTEN,
            "steps": STEPS,
            "batch": 2,
            "seq": 16,
            "learning_rate": 1e-2,
            "progress": False,
            **options,
        }
        return train(small, framework, corpus=corpus, **options)

    return run


@pytest.fixture(scope="module")
def uninterrupted(run):
    return {framework: run(framework) for framework in FRAMEWORKS}


OFTEN = Recipe(checkpoint=Checkpoints(every=5), metrics=Metrics(evaluate_every=5, tensorboard=False))


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(done, loss):
        if done == step:
            raise Crash

    return on_step


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_same_seed_same_losses(run, uninterrupted, framework):
    result = run(framework)
    assert result.losses == uninterrupted[framework].losses
    assert result.held_out == uninterrupted[framework].held_out


def test_another_seed_gives_other_losses(run, uninterrupted):
    assert run("torch", seed=1, steps=2).losses[0] != uninterrupted["torch"].losses[0]


def test_torch_and_jax_take_the_same_steps(uninterrupted):
    """AdamW divides by the root of squares, which magnifies rounding: hence 1e-4 after 12 steps."""
    torch_losses, jax_losses = (uninterrupted[framework].losses for framework in FRAMEWORKS)
    assert torch_losses == pytest.approx(jax_losses, rel=1e-4)
    for path, array in tree_leaves(uninterrupted["torch"].params).items():
        other = to_numpy(tree_leaves(uninterrupted["jax"].params)[path])
        assert np.abs(to_numpy(array) - other).max() < 1e-3 * np.abs(other).max(), path


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_resumed_losses_equal_uninterrupted_ones(run, uninterrupted, framework, tmp_path):
    with pytest.raises(Crash):
        run(framework, out=tmp_path, on_step=crash_at(8))
    assert last_step(tmp_path) == 5
    result = run(framework, out=tmp_path, resume=True)
    assert result.losses == uninterrupted[framework].losses
    assert result.bits_after == uninterrupted[framework].bits_after
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records if "loss" in record] == result.losses
    assert [record["step"] for record in records if "held_out_bits" in record] == [0, 5, 10, 12]
    again = run(framework, out=tmp_path, resume=True)
    assert again.losses == result.losses
    assert again.finished


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_does_not_count(run, uninterrupted, tmp_path, damage):
    with pytest.raises(Crash):
        run("torch", out=tmp_path, on_step=crash_at(11))
    (file,) = (last_checkpoint(tmp_path) / "state").glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "gone":
        file.unlink()
    assert last_step(tmp_path) == 5
    assert last_checkpoint(tmp_path).name == "step-000010"  # whose weights are as they were written
    assert run("torch", out=tmp_path, resume=True).losses == uninterrupted["torch"].losses


def test_half_a_line_of_metrics_does_not_count(run, uninterrupted, tmp_path):
    with pytest.raises(Crash):
        run("torch", out=tmp_path, on_step=crash_at(8))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')
    assert run("torch", out=tmp_path, resume=True).losses == uninterrupted["torch"].losses


def test_ctrl_c_finishes_the_step_and_saves(run, uninterrupted, tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(done, loss):
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("torch", out=tmp_path, on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_step(tmp_path) == 4
    assert run("torch", out=tmp_path, resume=True).losses == uninterrupted["torch"].losses


def test_a_budget_of_seconds_stops_and_can_be_resumed(run, uninterrupted, tmp_path):
    first = run("torch", out=tmp_path, seconds=0.0)
    assert (len(first.losses), first.finished) == (1, False)
    result = run("torch", out=tmp_path, resume=True, seconds=1e6)
    assert result.finished
    assert result.losses == uninterrupted["torch"].losses


def test_a_crash_while_saving_leaves_the_last_checkpoint(run, uninterrupted, tmp_path, monkeypatch):
    from crosstile.models import checkpoint

    write = checkpoint.write_tensors

    def torn(file, tensors):
        if "000010" in str(file):
            raise Crash
        write(file, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", torn)
    with pytest.raises(Crash):
        run("torch", out=tmp_path)
    assert last_step(tmp_path) == 5
    monkeypatch.undo()
    assert run("torch", out=tmp_path, resume=True).losses == uninterrupted["torch"].losses


def test_old_checkpoints_go_and_the_last_holds_the_parameters(run, tmp_path):
    result = run("torch", out=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000010", "step-000012"]
    params, config = load(last_checkpoint(tmp_path), "numpy")
    assert config == result.config
    assert all(
        np.array_equal(array, to_numpy(tree_leaves(result.params)[path])) for path, array in tree_leaves(params).items()
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_simple_text_is_learnt(run, framework):
    result = run(framework, steps=60, batch=4, seq=32)
    assert result.bits_before > 7.5
    assert result.bits_after < 3.0
    assert result.finished
    assert 0 < result.mfu < 1


def test_steps_are_adamw_with_clipping_and_decay_of_matrices(small, corpus):
    """Against the paper's formulas in float64, on gradients that are clipped by another factor at each step."""
    from crosstile.models import init, loss
    from crosstile.models.learners import make_learner

    rates = [1e-3, 3e-3, 2e-3]
    batches = [batch_at(corpus, step, 0, 2, 16) for step in range(3)]
    weights = {path: array.astype(float) for path, array in tree_leaves(init(small, 0, "numpy")).items()}
    first = dict.fromkeys(weights, 0.0)
    second = dict.fromkeys(weights, 0.0)
    factors = []
    learners = [make_learner(Recipe(framework), init(small, 0, framework), small) for framework in FRAMEWORKS]
    for step, (rate, tokens) in enumerate(zip(rates, batches, strict=True), 1):
        tree = tree_map_with_path(lambda path, _: torch.tensor(weights[path]).float().requires_grad_(), init(small))
        loss(tree, torch.as_tensor(tokens), small).backward()
        gradients = {path: array.grad.numpy().astype(float) for path, array in tree_leaves(tree).items()}
        factors.append(min(1.0, 1.0 / sum((gradient**2).sum() for gradient in gradients.values()) ** 0.5))
        for path, gradient in gradients.items():
            first[path] = 0.9 * first[path] + 0.1 * factors[-1] * gradient
            second[path] = 0.95 * second[path] + 0.05 * (factors[-1] * gradient) ** 2
            mean, square = first[path] / (1 - 0.9**step), second[path] / (1 - 0.95**step)
            decay = 0.1 * weights[path] if weights[path].ndim > 1 else 0.0
            weights[path] = weights[path] - rate * (mean / (square**0.5 + 1e-8) + decay)
        for learner in learners:
            taken = learner.step(Batch(tokens), rate)
            assert taken.gradient_norm == pytest.approx(1 / factors[-1], rel=1e-5)
    assert max(factors) < 0.9
    assert len(set(factors)) == 3
    for learner in learners:
        for path, array in tree_leaves(learner.params).items():
            error = np.abs(to_numpy(array) - weights[path])
            assert np.quantile(error, 0.99) < 1e-5, path


def test_schedule_warms_up_and_decays():
    shares = [schedule(step, 600) for step in range(600)]
    assert shares[0] == pytest.approx(1 / 50)
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.05)
    assert all(a < b for a, b in pairwise(shares[:50]))
    assert all(a >= b for a, b in pairwise(shares[50:]))
    assert all(0 < schedule(step, steps) <= 1 for steps in (1, 2, 5, 60) for step in range(steps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"framework": "numpy"}, r"framework: got 'numpy'.*torch or jax"),
        ({"framework": "torch", "batch": 0}, r"batch: got 0"),
        ({"framework": "torch", "steps": 0}, r"steps: got 0"),
        ({"framework": "torch", "seq": 65}, r"seq: got 65.*64"),
    ],
)
def test_errors_name_the_argument(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(run, tmp_path):
    run("torch", out=tmp_path, steps=1)
    with pytest.raises(ValueError, match="holds a run already"):
        run("torch", out=tmp_path, steps=1)
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        run("torch", out=tmp_path, steps=1, seed=1, resume=True)
    with pytest.raises(ValueError, match="framework was torch and is now jax"):
        run("jax", out=tmp_path, steps=1, resume=True)


def test_vocabulary_must_hold_bytes(small, corpus):
    with pytest.raises(ValueError, match="vocab_size is 255"):
        train(replace(small, vocab_size=255), corpus=corpus)


def test_batches_depend_on_seed_and_step_alone(corpus):
    batch = batch_at(corpus, 5, 0, 3, 16)
    assert batch.shape == (3, 17)
    assert np.array_equal(batch, batch_at(corpus, 5, 0, 3, 16))
    assert not np.array_equal(batch, batch_at(corpus, 6, 0, 3, 16))
    assert not np.array_equal(batch, batch_at(corpus, 5, 1, 3, 16))
    assert [rows.shape for rows in held_out_batches(corpus, 4, 3, 16)] == [(3, 17)] * 4


def test_corpus_is_split_by_file_without_tests(tmp_path):
    for name in [*(f"module_{i}.py" for i in range(120)), "test/test_a.py", "site-packages/x.py", "notes.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n" * 150)
    corpus = read_corpus(tmp_path)
    train, held_out = (decode(part) for part in (corpus.train, corpus.held_out))
    for i in range(120):
        assert (f"# module_{i}.py" in train) != (f"# module_{i}.py" in held_out)
    for name in ("test_a", "site-packages", "notes"):
        assert name not in train + held_out
    assert read_corpus(tmp_path).digest == corpus.digest
    (tmp_path / "module_0.py").write_text("changed\n")
    assert read_corpus(tmp_path).digest != corpus.digest


def test_standard_library_is_enough_text():
    corpus = standard_library()
    assert len(corpus.train) > 5e6
    assert len(corpus.held_out) > 1e5
    assert decode(encode("déf")) == "déf"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_commands(framework, tmp_path, monkeypatch, small):
    monkeypatch.setattr(Config, "demo", classmethod(lambda cls: small))
    app = typer.Typer()
    register(app)
    command = ["train", "--framework", framework, "--out", str(tmp_path), "--steps", "3", "--batch", "2", "--seq", "16"]
    runner = CliRunner()
    result = runner.invoke(app, [*command, "--seconds", "0"])
    assert result.exit_code == 0, result.output
    assert "Step 1 of 3" in result.output
    assert runner.invoke(app, command).exit_code == 2
    result = runner.invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert "bits per byte" in result.output
    result = runner.invoke(app, ["generate", "--out", str(tmp_path), "--prompt", "def ", "--tokens", "8"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("def ")
    assert runner.invoke(app, ["generate", "--out", str(tmp_path / "nowhere")]).exit_code == 2
    assert runner.invoke(app, ["generate", "--out", str(tmp_path), "--tokens", "100"]).exit_code == 2
