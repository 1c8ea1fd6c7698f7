"""Linear cross-entropy by the framework's own ops: right to twice their own error, in a hundredth of the memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cross_entropy_problems import GRADIENTS, Problem
from oracles import assert_within

from crosstile import linear_cross_entropy
from crosstile.kernels.linear_cross_entropy import library, library_jax, library_torch
from crosstile.kernels.linear_cross_entropy.spec import INPUTS, OUTPUTS


@pytest.fixture
def _small_tiles(monkeypatch):
    for module in (library_torch, library_jax):
        monkeypatch.setattr(module, "TOKENS", 16)
        monkeypatch.setattr(module, "ROWS", 16)


def by_torch(problem):
    arrays = problem.arrays()
    inputs = [torch.from_numpy(np.asarray(arrays[name], None if name == "targets" else "float32")) for name in INPUTS]
    kind = getattr(torch, problem.dtype)
    leaves = [array.to(kind).requires_grad_() for array in inputs[:2]]
    statistics = library.forward(problem.spec, *leaves, inputs[2])
    there = [row for row in statistics if row is not None]
    upstream = [torch.from_numpy(arrays[name]) for name in GRADIENTS if name in arrays]
    gradients = torch.autograd.grad(there, leaves, upstream)
    assert {gradient.dtype for gradient in gradients} == {kind}
    return results([row.detach() for row in there], [gradient.double() for gradient in gradients])


def by_jax(problem):
    arrays = {name: jnp.asarray(array) for name, array in problem.arrays().items()}
    hidden, weight = (arrays[name].astype(problem.dtype) for name in INPUTS[:2])

    def function(hidden, weight):
        return tuple(row for row in library.forward(problem.spec, hidden, weight, arrays["targets"]) if row is not None)

    statistics, pull = jax.vjp(jax.jit(function), hidden, weight)
    gradients = pull(tuple(arrays[name] for name in GRADIENTS if name in arrays))
    assert {gradient.dtype.name for gradient in gradients} == {problem.dtype}
    return results(statistics, gradients)


def results(statistics, gradients):
    return dict(zip(OUTPUTS, statistics, strict=False)) | dict(zip(("dhidden", "dweight"), gradients, strict=True))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("run", [by_torch, by_jax])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "capped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_definition(run, softcap, dtype):
    problem = Problem(softcap=softcap, sums=softcap is None, dtype=dtype, batch=2)
    assert_within(run(problem), problem.answers(dtype), problem.answers(), dtype)


@pytest.mark.parametrize("run", [by_torch, by_jax])
def test_large_logits(run):
    """The logits' own rounding is all that counts, and torch has it too."""
    problem = Problem(offset=1e4, sums=False)
    exact, theirs = problem.answers(), problem.answers("float32")
    for name, result in run(problem).items():
        error, allowed = (np.abs(array - exact[name]).max() for array in (np.asarray(result), theirs[name]))
        assert error <= 2 * allowed, name


@pytest.mark.sweep
def test_memory_of_torch():
    """Measured: the most memory that forward and backward held beyond inputs and gradients, of this process.

    The logits are those of 8192 tokens of gemma-2-2b, of an eighth of its features, which change little but the time:
    beyond inputs and gradients only a tile's tokens have any.
    """
    sizes = (8192, 288, 256_000)
    code = f"""
        import torch, crosstile
        from pathlib import Path

        def kib(name):
            status = Path("/proc/self/status").read_text()
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))

        def run(tokens, features, vocab):
            hidden = torch.randn(tokens, features).requires_grad_()
            weight = torch.empty(vocab, features).normal_(std=features ** -0.5).requires_grad_()
            targets = torch.randint(vocab, (tokens,))
            held, _ = kib("VmRSS"), Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            crosstile.linear_cross_entropy(hidden, weight, targets, softcap=30.0, label_smoothing=0.1).backward()
            gradients = 4 * (hidden.numel() + weight.numel()) / 2**10
            return kib("VmHWM") - held - gradients

        run({sizes[0]}, {sizes[1]}, 4000)  # so that what the libraries keep is there before
        print(run{sizes} / ({sizes[0]} * {sizes[2]} * 4 / 2**10))
    """
    share = float(
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True).stdout
    )
    assert share < 0.01, share


@pytest.mark.sweep
def test_memory_of_jax():
    """By XLA's own plan of what it allocates beyond inputs and gradients, for 8192 tokens of gemma-2-2b."""
    tokens, features, vocab = 8192, 2304, 256_000
    struct = jax.ShapeDtypeStruct
    shapes = (struct((tokens, features), "float32"), struct((vocab, features), "float32"), struct((tokens,), "int32"))
    loss = jax.value_and_grad(lambda *arrays: linear_cross_entropy(*arrays, softcap=30.0, label_smoothing=0.1), (0, 1))
    memory = jax.jit(loss).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.01 * tokens * vocab * 4
