"""A checkpoint of many devices is read by another number of them, and the losses go on as one device has them."""

import json
import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import sys

import numpy as np

from crosstile.models import Config, train
from crosstile.models.config import Layer
from crosstile.models.data import Corpus
from crosstile.models.processes import leave
from crosstile.models.recipe import Checkpoints, Data, Metrics, Optimizer, Recipe
from crosstile.models.sharding import Parallel

sys.modules["crosstile.models.train"].measured_peak = lambda *_: 1e9
config = Config(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
    layers=(Layer(),) * 2, max_seq_len=64,
)
text = np.random.default_rng(0).integers(97, 105, 3000).astype(np.uint8)
lengths = np.array([9, 30, 5, 17, 60, 4] * 16)
corpus = Corpus(text[:2000], text[2000:], "a test", lengths, None)


def run(out, stop=None, **parallel):
    class Stop(Exception):
        pass

    def on_step(done, loss):
        if done == stop:
            raise Stop

    recipe = Recipe(
        sys.argv[1], steps=6, data=Data(batch=4, seq=24, packing="segments"), optimizer=Optimizer(accumulate=2),
        parallel=Parallel(**parallel), checkpoint=Checkpoints(every=2), metrics=Metrics(6, 2, tensorboard=False),
    )
    try:
        train(config, recipe=recipe, out=out, resume=True, corpus=corpus, on_step=on_step, progress=False)
    except Stop:
        pass


"""
IN_JAX = """
run(sys.argv[2])
run(sys.argv[3], stop=3, stage=2, fsdp=4)
run(sys.argv[3], data=2, fsdp=2, tensor=2)
"""


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [record["loss"] for record in records if "loss" in record], [
        record["held_out_bits"] for record in records if "held_out_bits" in record
    ]


def start(program, *arguments, **variables):
    command = [sys.executable, "-c", PROGRAM + program, *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **variables})


def assert_alike(one, many):
    """Sums in another order, which AdamW magnifies where gradients are small."""
    for got, wanted in zip(losses(many), losses(one), strict=True):
        assert got == pytest.approx(wanted, rel=2e-5)


def test_jax_from_8_devices_to_8_others(tmp_path):
    quick = "--xla_backend_optimization_level=0"  # to compile
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {quick}", "JAX_PLATFORMS": "cpu", "NPROC": "64"}
    assert start(IN_JAX, "jax", tmp_path / "one", tmp_path / "many", **flags).wait(300) == 0
    assert len(losses(tmp_path / "many")[0]) == 6
    assert_alike(tmp_path / "one", tmp_path / "many")


def test_torch_from_2_processes_to_1(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    program = "run(sys.argv[2], stop=5, fsdp=2); leave('torch')"
    both = [start(program, "torch", tmp_path / "many", RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    assert [process.wait(300) for process in both] == [0, 0]
    assert start("run(sys.argv[2]); run(sys.argv[3])", "torch", tmp_path / "many", tmp_path / "one").wait(300) == 0
    assert len(losses(tmp_path / "many")[0]) == 6
    assert_alike(tmp_path / "one", tmp_path / "many")
