"""Tokenizers of a checkpoint, built here: no downloads; and the command that uses them."""

import json

import numpy as np
import pytest
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

from crosstile.models import generate, load, load_tokenizer, parity
from crosstile.models.cli import register
from crosstile.models.tokenizer import BYTES

TEXTS = ["def double(x):\n    return x + x\n", "naïve café – 日本語 🙂", "0123456789 " * 3]


@pytest.fixture(scope="module")
def backend():
    """Byte pairs in the manner of Llama 3: no text is unknown, and each begins with a token of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<begin>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    return backend


@pytest.fixture(scope="module")
def folder(backend, tmp_path_factory):
    """A small Qwen with that tokenizer; ids that the tokenizer does not know are never the likeliest."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parity.SIZES, "vocab_size", backend.get_vocab_size())
        parity.subject("qwen2", folder)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole_and_in_pieces(folder, tmp_path, text):
    for tokenizer in (load_tokenizer(folder), load_tokenizer(tmp_path)):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        pieces = list(tokenizer.stream(ids.tolist()))
        assert "".join(pieces) == text
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
        assert len(pieces) > 3


def test_which_tokenizer(folder, tmp_path):
    assert load_tokenizer(tmp_path) is BYTES
    tokenizer = load_tokenizer(folder)
    assert tokenizer.name == "tokenizer.json"
    assert tokenizer.encode("def")[0] == 0, "the begin token is the tokenizer's own to add"


def test_bytes_that_are_no_text_are_shown_as_such():
    assert "".join(BYTES.stream([100, 255, 101, 0xC3])) == "d\N{REPLACEMENT CHARACTER}e\N{REPLACEMENT CHARACTER}"


def test_older_files_are_read_by_transformers(tmp_path):
    words = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abba").tolist() == [3, 2, 1]
    assert tokenizer.decode([3, 2, 1]) == "abba"


def test_the_command_writes_the_models_text(folder):
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)
    command = ["generate", "--model", str(folder), "--prompt", "def ", "--tokens", "7", "--temperature", "0"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    params, config = load(folder)
    tokenizer = load_tokenizer(folder)
    ids = generate(params, config, tokenizer.encode("def "), 7).tolist()
    assert result.stdout == tokenizer.decode(ids) + "\n"
    quantized = CliRunner().invoke(app, [*command, "--quantize", "int8", "--dtype", "bfloat16"])
    assert quantized.exit_code == 0, quantized.output


def test_the_command_stops_at_an_end(folder, tmp_path):
    params, config = load(folder)
    tokenizer = load_tokenizer(folder)
    ids = generate(params, config, tokenizer.encode("def "), 7).tolist()
    fields = json.loads((folder / "config.json").read_text())
    stop = ids[-4]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "eos_token_id": [stop, 299]}))
    app = typer.Typer()
    register(app)
    command = ["generate", "--model", str(tmp_path), "--prompt", "def ", "--tokens", "7", "--temperature", "0"]
    first = ids.index(stop, len(tokenizer.encode("def ")))
    assert CliRunner().invoke(app, command).stdout == tokenizer.decode(ids[:first]) + "\n"


def test_a_checkpoint_without_a_tokenizer_is_refused(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["generate", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "no tokenizer.json" in result.output
