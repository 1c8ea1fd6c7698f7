"""The recipe of a run: read from TOML, wrong ones refused by name; files of text, and rows of their documents."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from crosstile.models import Config, init, loss
from crosstile.models.arrays import to_numpy, tree_leaves
from crosstile.models.config import Layer
from crosstile.models.data import Corpus
from crosstile.models.learners import make_learner
from crosstile.models.packing import Batches, Rows, best_fit
from crosstile.models.recipe import Optimizer, Recipe, read_recipe, settings
from crosstile.models.texts import documents, read_texts
from crosstile.models.tokenizer import BYTES, Tokenizer

EXAMPLE = Path(__file__).parents[2] / "docs" / "train.toml"
FRAMEWORKS = ("torch", "jax")


def test_the_example_holds_every_key_and_its_default():
    as_toml = json.loads(json.dumps(asdict(Recipe())))
    assert tomllib.loads(EXAMPLE.read_text("utf-8")) == as_toml
    assert read_recipe(EXAMPLE) == Recipe()


def test_a_file_and_what_overrides_it(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text('framework = "jax"\n[data]\nseq = 64\n[optimizer]\nbetas = [0.8, 0.9]\nclip = 2\n')
    recipe = read_recipe(file, ["data.seq=32", "data.packing=segments", "steps=7", 'data.sources=["a", "b"]'])
    assert (recipe.framework, recipe.steps, recipe.data.seq, recipe.data.packing) == ("jax", 7, 32, "segments")
    assert (recipe.optimizer.betas, recipe.optimizer.clip) == ((0.8, 0.9), 2.0)
    assert recipe.data.sources == ("a", "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.leraning_rate=1.0",
            r"optimizer\.leraning_rate: there is no such key; the nearest is learning_rate",
        ),
        ("optimiser.clip=1.0", r"optimiser: there is no such key; the nearest is optimizer"),
        ("data.seq=2.5", r"data\.seq: got 2\.5; it must be a whole number"),
        ("data.seq=true", r"data\.seq: got True; it must be a whole number"),
        ("data.batch=0", r"data\.batch: got 0; it must be at least 1"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas: got \[0\.9\]; it must be a list of 2"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer\.betas: got \[0\.9, 1\.0\]; each must be from 0 to below 1"),
        ("data=3", r"data: got 3; it must be a table"),
        ("data.sources=3", r"data\.sources: got 3; it must be a list"),
        ("precision=float16", r"precision: got 'float16'; it must be float32 or bfloat16"),
        ("remat=some", r"remat: got 'some'; it must be none or products or full"),
        ("framework=numpy", r"framework: got 'numpy'; it must be torch or jax"),
        ("data.packing=best", r"data\.packing: got 'best'; it must be windows or segments or pad"),
        ("optimizer.accumulate=3", r"optimizer\.accumulate: got 3; data\.batch 8 must be a multiple"),
        ("parallel.stage=2", r"parallel\.stage: got 2 in torch; it must be 1 there"),
        ("parallel={stage=2, microbatches=-1}", r"parallel\.microbatches: got -1 with stage 2"),
        ("parallel.fsdp=0", r"parallel\.fsdp: got 0"),
        ("model.config={hidden_size=3}", r"model\.start: got 'demo'; with a table of fields it must be \"config\""),
        ("seq", r"--set: got 'seq'; it must be section\.key=value"),
        ("steps.x=1", r"steps: got {'x': 1}; it must be a whole number"),
    ],
)
def test_errors_name_the_key(override, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(overrides=[override])


def test_models_of_a_recipe(tmp_path):
    assert Recipe().model.read() == Config.demo()
    fields = "vocab_size=256, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16"
    by_count = read_recipe(overrides=["model.start=config", f"model.config={{{fields}, layers=3}}"]).model.read()
    assert by_count.layers == (Layer(),) * 3
    by_table = f"model.config={{{fields}, layers=[{{window=8}}, {{}}]}}"
    assert read_recipe(overrides=["model.start=config", by_table]).model.read().layers == (Layer(window=8), Layer())
    (tmp_path / "config.json").write_text(json.dumps(by_count.to_hugging_face()))
    assert read_recipe(overrides=[f"model.start={tmp_path / 'config.json'}"]).model.read() == by_count
    assert read_recipe(overrides=[f"model.start={tmp_path}"]).model.checkpoint == tmp_path
    wrong = ["model.start=config", f"model.config={{{fields}, layers=3, num_head=2}}"]
    with pytest.raises(ValueError, match=r"model\.config\.num_head: there is no such key; the nearest is num_heads"):
        read_recipe(overrides=wrong).model.read()
    with pytest.raises(ValueError, match=r"model\.start: there is no folder nowhere"):
        read_recipe(overrides=["model.start=nowhere"]).model.read()


def test_a_resumed_run_may_change_how_not_what():
    how = ["remat=full", "parallel.fsdp=2", "checkpoint.every=3", "optimizer.accumulate=2", "metrics.tensorboard=false"]
    assert settings(read_recipe(overrides=how)) == settings(Recipe())
    for what in ("seed=1", "precision=bfloat16", "optimizer.clip=2.0", "data.seq=64", "steps=601"):
        assert settings(read_recipe(overrides=[what])) != settings(Recipe())


@pytest.fixture
def folder(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number} é")
    (tmp_path / "more").mkdir()
    lines = [json.dumps({"text": f"line {number}", "id": number}) for number in range(3)]
    (tmp_path / "more" / "a.jsonl").write_text("\n".join([*lines, ""]))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    return tmp_path


def test_documents_of_files_and_lines(folder):
    found = dict(documents([str(folder)], "text"))
    assert len(found) == 43
    assert found["7.txt"] == "text 7 é"
    assert found["more/a.jsonl:2"] == "line 1"
    corpus = read_texts([str(folder)], BYTES, 256, end=0, field="text", held_out=4)
    parts = [bytes(tokens).decode().split("\0")[:-1] for tokens in (corpus.train, corpus.held_out)]
    assert sorted(parts[0] + parts[1]) == sorted(found.values())
    assert 3 < len(parts[1]) < 22
    assert [len(text.encode()) + 1 for text in parts[0]] == corpus.train_lengths.tolist()
    assert corpus.bytes_per_token == 1.0
    assert read_texts([str(folder)], BYTES, 256, end=0, field="text", held_out=4).digest == corpus.digest


def test_a_tokenizer_counts_bytes_and_ends_documents(folder):
    pairs = Tokenizer("pairs", lambda text: np.arange(-(-len(text.encode()) // 2)), lambda ids: "ab" * len(ids))
    corpus = read_texts([str(folder)], pairs, 300, end=299, field="text", held_out=4)
    assert corpus.train.dtype == np.uint16
    assert set(corpus.train[corpus.train_ends - 1]) == {299}
    assert 1.5 < corpus.bytes_per_token < 2
    with pytest.raises(ValueError, match=r"data\.tokenizer: pairs gives token 299 in .*; the model has 250"):
        read_texts([str(folder)], pairs, 250, end=299, field="text", held_out=4)


def test_one_document_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    corpus = read_texts([str(tmp_path / "a.txt")], BYTES, 256, end=None, field="text", held_out=10)
    assert (len(corpus.train), bytes(corpus.held_out)) == (90, b"0123456789")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "data.sources: there is no file or folder nowhere"),
        ("ignored.bin", "it must end in .txt, .md, .py, .jsonl"),
        ("more/b.jsonl", r"data.field: .*b.jsonl, line 1 has no text 'text'; it has words"),
        ("more/c.jsonl", r"c.jsonl, line 2 is not JSON"),
    ],
)
def test_sources_that_cannot_be_read(folder, source, message):
    (folder / "more" / "b.jsonl").write_text('{"words": "a"}\n')
    (folder / "more" / "c.jsonl").write_text('{"text": "a"}\n{\n')
    path = source if source == "nowhere" else str(folder / source)
    with pytest.raises(ValueError, match=message):
        read_texts([path], BYTES, 256, end=0, field="text", held_out=4)


@pytest.fixture
def packed(rng):
    """Documents of many lengths, whose tokens are all different."""
    lengths = np.array([1, 2, 3, 50, 16, 17, 18, 7, 7, 5, 33, 4, 9])
    tokens = np.arange(lengths.sum()).astype(np.uint16)
    return Corpus(tokens, tokens, "", lengths, lengths)


def test_each_token_is_predicted_once_from_its_own_document(packed):
    rows = Rows(packed.train, packed.train_ends, "segments", 16)
    batch = rows.of(list(range(len(rows))))
    known = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] != 0)
    assert (batch.tokens[:, 1:] - batch.tokens[:, :-1])[known].tolist() == [1] * known.sum()
    firsts = np.concatenate([[0], packed.train_ends[:-1]])
    assert sorted(batch.tokens[:, 1:][known]) == sorted(set(range(len(packed.train))) - set(firsts))
    assert batch.counted.tolist() == known.sum(1).tolist()
    assert (batch.segments == 0).sum() < 17  # of padding less than a row
    for row in batch.segments:
        assert set(np.diff(row)) <= {0, 1} or row[-1] == 0


def test_best_fit_fills_rows(rng):
    lengths = rng.integers(1, 13, 500)
    rows = best_fit(lengths, 32)
    filled = np.bincount(rows, lengths)
    assert filled.max() <= 32
    assert len(filled) <= 1.01 * lengths.sum() / 32 + 1


def test_padded_rows_are_documents_cut(packed):
    batch = Batches(packed, "pad", 12, 16, 0).at(0)
    assert sorted(batch.counted) == sorted(min(n, 17) - 1 for n in packed.train_lengths if n > 1)
    assert batch.segments.max() == 1


def test_windows_need_more_tokens_than_a_row(packed):
    with pytest.raises(ValueError, match=r"data\.seq: got 200, with 172 tokens to train on"):
        Batches(packed, "windows", 2, 200, 0)


def test_order_depends_on_seed_and_step_and_takes_each_row_once_an_epoch(packed):
    batches = Batches(packed, "segments", 2, 16, 3)
    again = Batches(packed, "segments", 2, 16, 3)
    count = len(Rows(packed.train, packed.train_ends, "segments", 16))
    epoch = np.concatenate([batches.at(step).tokens for step in range(count)])  # two epochs
    assert np.array_equal(again.at(3).tokens, epoch[6:8])
    first, second = epoch[:count], epoch[count:]
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert not np.array_equal(first, second)
    assert not np.array_equal(Batches(packed, "segments", 2, 16, 4).at(0).tokens, batches.at(0).tokens)


@pytest.fixture
def small():
    return Config(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16,
        layers=(Layer(),) * 2, max_seq_len=64, tie_embeddings=True,
    )  # fmt: skip


def test_the_loss_of_packed_rows_is_the_mean_over_their_documents_alone(packed, small):
    params = init(small, 0, "numpy", "float64")
    rows = Rows(packed.train % 251, packed.train_ends, "segments", 16)
    batch = rows.of([*range(len(rows)), -1])
    total = count = 0
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for number in range(1, segments.max() + 1):
            alone = tokens[segments == number][None]
            total += (alone.size - 1) * loss(params, alone, small)
            count += alone.size - 1
    assert loss(params, batch.tokens, small, segments=batch.segments) == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_micro_batches_are_one_batch(packed, small, framework):
    """Rows of unlike counts, one of padding alone: a mean of means would be off by a tenth."""
    rows = Rows(packed.train % 251, packed.train_ends, "segments", 16)
    batch = rows.of([0, 1, len(rows) - 1, -1])
    assert len(set(batch.counted.tolist())) > 2
    taken, params = {}, {}
    for name, count in (("torch", 1), (framework, 4)):
        recipe = Recipe(name, optimizer=Optimizer(accumulate=count, z_loss=1e-3, clip=0.5))
        learner = make_learner(recipe, init(small, 0, name), small)
        taken[count] = learner.step(batch, 1e-3)
        params[count] = {path: to_numpy(array) for path, array in tree_leaves(learner.params).items()}
    assert taken[4].loss == pytest.approx(taken[1].loss, rel=1e-6)
    assert taken[4].gradient_norm == pytest.approx(taken[1].gradient_norm, rel=1e-5)
    for path, array in params[1].items():
        assert np.quantile(np.abs(params[4][path] - array), 0.99) < 1e-6, path


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bfloat16_computes_in_it_and_keeps_float32(packed, small, framework):
    """The loss is off by a rounding of bfloat16 (0.4 %) at most, and steps below one of a weight are not lost."""
    batch = Batches(Corpus(packed.train % 251, packed.held_out, ""), "windows", 4, 16, 0).at(0)
    learners = [
        make_learner(Recipe(name, precision=precision, remat=remat), init(small, 0, name), small)
        for name, precision, remat in [("torch", "float32", "none"), (framework, "bfloat16", "full")]
    ]
    before = {path: np.array(to_numpy(array)) for path, array in tree_leaves(learners[1].params).items()}
    exact, rounded = (learner.step(batch, 1e-5) for learner in learners)
    assert exact.loss != rounded.loss == pytest.approx(exact.loss, rel=4e-3)
    assert rounded.gradient_norm == pytest.approx(exact.gradient_norm, rel=2e-2)
    for path, array in tree_leaves(learners[1].params).items():
        assert "float32" in str(array.dtype)
        changed = np.abs(to_numpy(array) - before[path])
        assert 0 < changed.max() < 1.2e-5, path
