"""A run that is killed at random moments, however often, ends with the losses of one that was not."""

import json
import random
import subprocess
import sys
import time

from crosstile.models.run import last_step

STEPS, KILLS = 150, 20
PROGRAM = """
import sys

import numpy as np

from crosstile.models import Config, train
from crosstile.models.config import Layer
from crosstile.models.data import Corpus

module = sys.modules["crosstile.models.train"]
module.CHECKPOINT_EVERY, module.EVALUATE_EVERY = 3, 50
config = Config(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16,
    layers=(Layer(),), max_seq_len=64, tie_embeddings=True,
)
text = np.frombuffer(b"def double(x):\\n    return x + x\\n\\n" * 800, np.uint8)
corpus = Corpus(text[:20_000], text[20_000:], "a test")
print("begins", flush=True)
steps = int(sys.argv[2])
train(config, "torch", steps=steps, batch=2, seq=16, out=sys.argv[1], resume=True, corpus=corpus, progress=False)
"""


def start(out):
    """The run in a process of its own, past its imports."""
    command = [sys.executable, "-c", PROGRAM, str(out), str(STEPS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    return process


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_a_killed_run_loses_nothing(tmp_path):
    began = time.monotonic()
    assert start(tmp_path / "whole").wait(300) == 0
    whole = time.monotonic() - began
    rng = random.Random(0)
    steps = [0]
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0, whole / KILLS))
        process.kill()
        process.wait()
        steps.append(last_step(tmp_path / "killed"))
    assert steps == sorted(steps)
    assert steps[-1] < STEPS  # else nothing was resumed
    assert start(tmp_path / "killed").wait(300) == 0
    assert last_step(tmp_path / "killed") == STEPS
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
