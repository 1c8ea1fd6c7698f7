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

def multiply(x, out):
    def step(index, total):
        return total + jnp.dot(x[...], x[...], preferred_element_type=jnp.float32)
    out[...] = jax.lax.fori_loop(0, 3, step, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)

def call(kernel, x):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name=kernel.__name__)(x)

def good(x):
    return call(scale, jax.jit(lambda y: call(multiply, y))(x))

def too_large(x):
    return call(scale, x)

for program, size in ((good, 256), (too_large, 4096)):
    try:
        shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
        for facts in compile_program(program, [shape], "v5e", lambda kernel: "none"):
            found = over_budget(facts, "v5e")
            print(facts.kernel, facts.dot_dtype or "none", *facts.matrix, bool(facts.spills), *found)
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


def test_products_spills_and_refusals_are_told(tmp_path: Path) -> None:
    environ = {**os.environ, **environment(tmp_path / "llo")}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environ, capture_output=True, text=True, check=True)
    multiply, refused, scale = sorted(child.stdout.splitlines())
    assert multiply == "multiply bfloat16 vmatmul.bf16 True", (
        "a tile of 256 by 256 in float32 is more than the registers hold"
    )
    assert (refused, scale) == ("refused True", "scale none False")


def test_a_worker_that_hangs_costs_its_job_alone() -> None:
    job = Job("v5e", "matmul", "forward", "qwen-2.5-7b-qkv", "bfloat16")
    [outcome] = pool.run([job], seconds=0.2)
    assert "stopped" in outcome.error
