"""Real compilations for TPUs that are not here, in a child process as libtpu wants it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu")
pytest.importorskip("jax")

from crosstile.bench import pool
from crosstile.bench.facts import over_budget
from crosstile.bench.programs import Job
from crosstile.bench.tpu import environment

CHILD = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from crosstile.bench.facts import over_budget
from crosstile.bench.tpu import compile_program

def scale(x, out):
    out[...] = x[...] * 2

def program(x):
    return pl.pallas_call(scale, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="scale")(x)

for size in (256, 4096):
    try:
        shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
        [facts] = compile_program(program, [shape], "v5e", "bfloat16", lambda kernel: "none")
        print(facts.kernel, facts.instructions > 0, facts.on_chip_bytes, *over_budget(facts, "v5e"))
    except Exception as error:
        print("refused", "vmem" in str(error).lower())
"""


def test_a_real_kernel_uses_the_mxu_and_says_what_it_takes() -> None:
    [outcome] = pool.run([Job("v6e", "matmul", "forward", "qwen-2.5-7b-qkv", "bfloat16")])
    assert outcome.error == ""
    [facts] = outcome.kernels
    assert facts.matrix["vmatmul.bf16"] > 0
    assert facts.units["MXU"] > 0
    assert facts.instructions > 0
    assert 0 < facts.on_chip_bytes < 128 * 2**20
    assert "n " in facts.tiles
    assert over_budget(facts, "v6e") == ()


def test_a_kernel_without_the_mxu_fails_and_a_refusal_is_told(tmp_path: Path) -> None:
    environ = {**os.environ, **environment(tmp_path / "llo")}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environ, capture_output=True, text=True, check=True)
    small, large = child.stdout.splitlines()
    assert small.startswith("scale True ")
    assert small.endswith("no MXU instruction, though it multiplies bfloat16")
    assert large == "refused True"


def test_a_worker_that_hangs_costs_its_job_alone() -> None:
    job = Job("v5e", "matmul", "forward", "qwen-2.5-7b-qkv", "bfloat16")
    [outcome] = pool.run([job], seconds=0.2)
    assert "stopped" in outcome.error
