"""A run that is killed at random moments, twenty times in all, ends with the losses of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from crosstile.models.run import last_step

STEPS, KILLS = 70, {"torch": 12, "jax": 8}
MOST = 5  # steps until a kill, which a checkpoint after each third outlives
PROGRAM = """
import os
import sys
import time

import numpy as np
import tensorboardX

from crosstile.models import Config, learner_{framework}, state_{framework}, train
from crosstile.models.config import Layer
from crosstile.models.data import Corpus
from crosstile.models.recipe import Checkpoints, Metrics, Recipe

sys.modules["crosstile.models.train"].measured_peak = lambda *_: 1e9  # which takes longer than the run
if "{framework}" == "jax":
    import jax

    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
config = Config(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16,
    layers=(Layer(),), max_seq_len=64, tie_embeddings=True,
)
text = np.frombuffer(b"def double(x):\\n    return x + x\\n\\n" * 800, np.uint8)
corpus = Corpus(text[:20_000], text[20_000:], "a test")
recipe = Recipe("{framework}", checkpoint=Checkpoints(every=3), metrics=Metrics(50, 2))


def on_step(done, loss):
    global left
    print("steps", flush=True)
    left -= 1
    if left == 0:
        time.sleep(60)  # and wait to be killed


for line in sys.stdin:
    out, steps, left = line.split()
    left = int(left)
    child = os.fork()
    if child == 0:
        train(
            config, recipe=recipe, steps=int(steps), batch=2, seq=16, out=out, resume=True, corpus=corpus,
            on_step=on_step, progress=False,
        )
        os._exit(0)
    print(child, flush=True)
    print("ends", os.waitpid(child, 0)[1], flush=True)
"""


class Runs:
    """Runs in forks of a process that has imported all they need, which is what takes time."""

    def __init__(self, framework, cache):
        self.kills = KILLS[framework]
        command = [sys.executable, "-c", PROGRAM.format(framework=framework), str(cache)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, out, most=STEPS + 1):
        """The process id of a run that stands still after so many steps."""
        self._process.stdin.write(f"{out} {STEPS} {most}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def until(self, word):
        """Wait for a line with it, or for the end; that line."""
        return next(line for line in self._process.stdout if line.startswith((word, "ends")))

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(params=["torch", "jax"])
def runs(request, tmp_path):
    runs = Runs(request.param, tmp_path / "programs")
    yield runs
    runs.close()


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_a_killed_run_loses_nothing(runs, tmp_path):
    began = time.monotonic()
    runs.start(tmp_path / "whole")
    assert runs.until("steps") == "steps\n"
    starting = time.monotonic() - began
    assert runs.until("ends") == "ends 0\n"
    step_and_save = (time.monotonic() - began - starting) / STEPS
    rng = random.Random(0)
    steps, in_mid_save = [0], 0
    for kill in range(runs.kills):
        process = runs.start(tmp_path / "killed", MOST)
        if kill % 4 == 0:
            time.sleep(rng.uniform(0, starting))
        else:
            for _ in range(rng.randint(1, MOST)):
                assert runs.until("steps") == "steps\n"
            time.sleep(rng.uniform(0, 2 * step_and_save))
        os.kill(process, signal.SIGKILL)
        assert runs.until("ends") == f"ends {signal.SIGKILL.value}\n"
        in_mid_save += any((tmp_path / "killed").glob("*.part"))
        steps.append(last_step(tmp_path / "killed"))
    assert steps == sorted(steps)
    assert 0 < steps[-1] < STEPS  # else nothing was resumed
    assert in_mid_save > runs.kills // 4
    runs.start(tmp_path / "killed")
    assert runs.until("ends") == "ends 0\n"
    assert last_step(tmp_path / "killed") == STEPS
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
