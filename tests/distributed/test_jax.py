"""JAX on 8 devices of this CPU: ops and models against the same on one device, and that both tests can fail."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")
import jax_devices
from jax_devices import CALLS, HANDFUL

from crosstile.models.parallel_cases import SMALL, layers
from crosstile.models.pipeline_jax import Pipeline
from crosstile.models.sharding import Parallel, parameter_splits

SUPPORT = Path(jax_devices.__file__)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    file = tmp_path_factory.mktemp("devices") / "answers"
    subprocess.run([sys.executable, str(SUPPORT), str(file)], check=True, env=environment(), timeout=600)
    return pickle.loads(file.read_bytes())


@pytest.mark.parametrize("name", CALLS)
def test_an_op_on_a_mesh_is_that_of_whole_arrays(answers, name):
    assert answers["calls"][name] < 1e-13  # in float64


@pytest.mark.parametrize("name", HANDFUL)
def test_a_model_on_many_devices_is_that_on_one(answers, name):
    assert answers["rows"][name]


def test_a_pipeline_is_the_model_on_one_device(answers):
    assert answers["pipeline"] < 1e-6  # in float64; the routers' logits are float32


@pytest.mark.parametrize("name", sorted(jax_devices.broken() | jax_devices.broken_pipelines()))
def test_the_check_sees_what_is_broken(answers, name):
    assert answers["broken"][name]


REFUSED = """
import jax.numpy as jnp, pytest, crosstile
from jax.sharding import AbstractMesh
mesh = AbstractMesh((2, 2), ("data", "tensor"))
x, w = jnp.ones((2, 4, 2, 8)), jnp.ones((8, 8))
for name, call, kind in (
    ("rank 3", lambda: crosstile.attention(x[0], x, x), ValueError),
    ("dropout", lambda: crosstile.attention(x, x, x, dropout=0.5, dropout_seed=1), crosstile.UnsupportedError),
    ("matmul", lambda: crosstile.matmul(x, w, implementation="pallas"), crosstile.UnsupportedError),
    ("Quantized", lambda: crosstile.grouped_matmul(x[0, 0], crosstile.quantize(w[None], "int8"), jnp.ones(1, int)),
     crosstile.UnsupportedError),
):
    with crosstile.sharded(mesh), pytest.raises(kind, match=name):
        call()
for name, options, axes in (
    ("context_form", {"context_form": "star"}, "data"), ("'other' splits", {}, "other"),
    ("balanced", {"context_form": "ulysses", "balanced": True}, "data"),
):
    with pytest.raises(ValueError, match=name), crosstile.sharded(AbstractMesh((2,), (axes,)), **options):
        pass
"""


def test_stages_divide_the_layers_and_the_layers_are_stacked():
    config = layers(SMALL, 8)
    parameter_splits(config, Parallel(stage=4))
    with pytest.raises(ValueError, match=r"stage: got 3 for 8 layers, which repeat after 2; it must divide 4"):
        parameter_splits(config, Parallel(stage=3))
    with pytest.raises(ValueError, match="microbatches: got 4 with stage 1"):
        Parallel(microbatches=4)
    with pytest.raises(ValueError, match="a pipeline needs them stacked"):
        Pipeline(None, 2, 2, None, None, None)({}, None)


def test_what_cannot_be_is_refused():
    subprocess.run([sys.executable, "-c", REFUSED], check=True, env=environment())


PROCESS = """
from dataclasses import replace
import jax, optax, numpy as np
from crosstile.models import distributed_jax, transformer
from crosstile.models.parallel_cases import SMALL
from crosstile.models.sharding import Parallel
jax.config.update("jax_cpu_collectives_implementation", "gloo")
distributed_jax.initialize()
config, parallel = replace(SMALL, layers=SMALL.layers[:1]), Parallel(fsdp=2)
mesh = distributed_jax.make_mesh(parallel)
assert len(mesh.local_devices) == 1
whole, tokens = transformer.init(config, 0, "jax"), np.arange(34, dtype=np.int32).reshape(2, 17)
params = distributed_jax.place(whole, config, parallel, mesh)
optimizer = optax.sgd(0.1)
step = distributed_jax.train_step(config, parallel, mesh, optimizer)
alone = jax.jit(jax.value_and_grad(lambda params: transformer.loss(params, tokens, config)))
state = optimizer.init(params)
for _ in range(2):
    params, state, found = step(params, state, tokens)
    wanted, gradients = alone(whole)
    whole = jax.tree.map(lambda array, gradient: array - 0.1 * gradient, whole, gradients)
    assert abs(float(found) - float(wanted)) < 4e-7 * float(wanted), (found, wanted)
"""


def test_two_processes_are_one_program():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env=environment(**told, JAX_PROCESS_ID=str(rank)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [process.communicate(timeout=120) for process in processes]
    assert not any(process.returncode for process in processes), found[0][1] + found[1][1]
