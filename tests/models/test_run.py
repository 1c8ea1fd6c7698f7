"""The folder of a run, by the commands: a recipe, TensorBoard, a profile, weights written on request."""

import gzip
import json

import numpy as np
import pytest
import typer
from tensorboardX.proto import event_pb2
from typer.testing import CliRunner

from crosstile.models import load
from crosstile.models.cli import register
from crosstile.models.run import last_checkpoint

RECIPE = """
framework = "{framework}"
steps = 8
remat = "full"

[model]
start = "config"

[model.config]
vocab_size = 256
hidden_size = 32
intermediate_size = 48
num_heads = 2
num_kv_heads = 1
head_dim = 16
layers = 2
max_seq_len = 64

[data]
sources = ["{text}"]
seq = 16
batch = 2
packing = "segments"

[checkpoint]
every = 4
weights = false

[metrics]
evaluate_every = 4
evaluated = 2
"""


def events(folder):
    """(tag, step, value) of each scalar in TensorBoard's files: records of a length, its sum, the bytes, their sum."""
    found = []
    for file in folder.glob("events.*"):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_recipe_from_beginning_to_end(framework, tmp_path):
    text, recipe, out = tmp_path / "text.txt", tmp_path / "recipe.toml", tmp_path / "run"
    text.write_text("def double(x):\n    return x + x\n\n" * 40)
    recipe.write_text(RECIPE.format(framework=framework, text=text))
    app, runner = typer.Typer(), CliRunner()
    register(app)

    def invoke(*arguments):
        result = runner.invoke(app, [str(one) for one in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    command = ["train", "--config", recipe, "--out", out]
    assert "Step 1 of 8" in invoke(*command, "--seconds", 0)
    assert "perfetto" in invoke(*command, "--resume", "--profile", "--set", "checkpoint.kept=3")

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = {(tag, step): value for tag, step, value in events(out / "tensorboard")}
    assert len(told) == len(events(out / "tensorboard"))  # no step twice
    assert [step for tag, step in told if tag == "loss"] == list(range(1, 9))
    for record in records:
        for name in set(record) - {"step"}:
            assert told[name, record["step"]] == np.float32(record[name])
    assert records[-1]["step"] == 8
    assert {"loss", "gradient_norm", "learning_rate", "mfu"} <= set(records[1])

    if framework == "torch":
        trace = json.loads((out / "profile" / "trace.json").read_text())["traceEvents"]
        assert any("aten::mm" in event.get("name", "") for event in trace)
    else:
        (file,) = (out / "profile").rglob("perfetto_trace.json.gz")
        assert b"traceEvents" in gzip.decompress(file.read_bytes())

    assert [path.name for path in sorted(out.glob("step-*"))] == ["step-000001", "step-000004", "step-000008"]
    assert not (last_checkpoint(out) / "model.safetensors").exists()
    refused = runner.invoke(app, ["generate", "--out", str(out)])
    assert refused.exit_code == 2
    assert "crosstile export" in refused.output
    invoke("export", tmp_path / "weights", "--out", out)
    params, config = load(tmp_path / "weights", "numpy")
    assert (config.num_layers, str(params["layers"][1]["wq"].dtype)) == (2, "float32")
    if framework == "jax":
        return
    assert invoke("generate", "--model", tmp_path / "weights", "--prompt", "def ", "--tokens", 4).startswith("def ")
    again = ["train", "--config", recipe, "--set", f"model.start={tmp_path / 'weights'}", "--set", "model.config={}"]
    assert "Step 1 of 8" in invoke(*again, "--out", tmp_path / "again", "--seconds", 0)
    further = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert further[0]["held_out_bits"] == pytest.approx(records[-1]["held_out_bits"], rel=1e-5)


def test_wrong_recipes_are_refused_by_name(tmp_path):
    app, runner = typer.Typer(), CliRunner()
    register(app)
    result = runner.invoke(app, ["train", "--out", str(tmp_path), "--set", "data.sek=3"])
    assert result.exit_code == 2
    assert "data.sek" in result.output
    result = runner.invoke(app, ["train", "--out", str(tmp_path), "--set", "parallel.fsdp=2"])
    assert result.exit_code == 2
    assert "torchrun" in result.output
