"""Every framework asks for tiles with the sizes of its arrays, and `explain` says where they come from."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import crosstile
from crosstile import plans
from crosstile import torch as torch_glue
from crosstile.dispatch import OPS
from crosstile.kernels.matmul import pallas as matmul_kernels
from crosstile.kernels.matmul.spec import MatmulSpec
from crosstile.kernels.matmul.tiles import MatmulSizes, choose_config, kinds_of
from crosstile.kernels.tiles import tuned
from crosstile.kernels.tiles.targets import TARGETS
from crosstile.kernels.tiles.tuned import Entry

MATMUL = OPS["matmul"]
SPEC = MatmulSpec("float32", "float32")


@pytest.fixture(params=["v6e", "sm_90"])
def chip(request, tmp_path, monkeypatch):
    """A chip with one entry: products of [512, 256] by [256, 512] have block_m 64."""
    monkeypatch.setenv("CROSSTILE_CACHE", str(tmp_path))
    sizes = MatmulSizes(1, 512, 512, 256, False, False, False)
    times = {"forward": 1.0}
    entry = Entry(kinds_of(SPEC), sizes._asdict(), {"block_m": 64}, times, times, "measured", "square")
    tuned.write_table(tuned.user_table("matmul", request.param), "matmul", request.param, [entry])
    tuned.forget()
    yield TARGETS[request.param]
    monkeypatch.undo()
    tuned.forget()


class Asked(Exception):
    """Carries the configuration that a kernel was asked to run with."""


def ask(spec, config, *others):
    raise Asked(config)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_jax_asks_with_static_sizes(chip, lead, monkeypatch):
    if chip.is_gpu:
        monkeypatch.setattr(plans, "make", lambda op, direction, spec, config, arrays: ask(spec, config))
        pytest.importorskip("jax_triton")
    monkeypatch.setattr(matmul_kernels, "forward", ask)
    a, b = jnp.ones((*lead, 512 // (2 if lead else 1), 256)), jnp.ones((256, 512))
    with crosstile.target(chip.name), pytest.raises(Asked) as asked:
        jax.jit(lambda a, b: crosstile.matmul(a, b, implementation="triton" if chip.is_gpu else "pallas"))(a, b)
    assert asked.value.args[0] == replace(choose_config(SPEC, chip), block_m=64)


def test_symbolic_sizes_get_the_heuristic(chip, monkeypatch):
    if chip.is_gpu:
        pytest.skip("jax-triton exports no symbolic shapes")
    monkeypatch.setattr(matmul_kernels, "forward", ask)
    rows = jax.export.symbolic_shape("rows")
    a = jax.ShapeDtypeStruct((*rows, 256), jnp.float32)
    with crosstile.target(chip.name), pytest.raises(Asked) as asked:
        jax.jit(lambda a: crosstile.matmul(a, jnp.ones((256, 512)), implementation="pallas")).trace(a)
    assert asked.value.args[0] == choose_config(SPEC, chip)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_torch_asks_where_the_sizes_are_known(chip, direction, monkeypatch):
    if chip.is_tpu:
        pytest.skip("a GPU's choice says it all")
    monkeypatch.setattr(plans, "make", lambda op, direction, spec, config, arrays: ask(spec, config))
    inputs = (torch.ones(1, 512, 256), torch.ones(1, 256, 512), None, None)
    out = torch.ones(1, 512, 512)
    operands = inputs if direction == "forward" else (inputs, (out, torch.empty(0)), (out, None))
    options = ("float32", None, False, None, "triton", chip.name, None)
    with pytest.raises(Asked) as asked:
        torch_glue._execute(MATMUL, direction, operands, inputs, options)
    assert asked.value.args[0] == replace(choose_config(SPEC, chip), block_m=64)


def test_torch_compile_makes_one_graph_for_all_sizes():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(
        lambda a, b: crosstile.matmul(a, b, implementation="triton"), backend=backend, dynamic=True, fullgraph=True
    )
    for size in (24, 40, 72):
        a, b = torch.ones(size, 16), torch.ones(16, 32)
        assert torch.equal(compiled(a, b), a @ b)
    assert len(graphs) == 1


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_explain_says_where_the_tiles_come_from(chip, framework):
    ones = jnp.ones if framework == "jax" else torch.ones
    implementation = "triton" if chip.is_gpu else "pallas"
    near, far, config = ones((512, 256)), ones((512 << 4, 256)), choose_config(SPEC, chip)
    with crosstile.target(chip.name):
        explain = lambda a, **options: crosstile.explain("matmul", a, ones((256, 512)), **options)  # noqa: E731
        found = explain(near, implementation=implementation)
        if found.choice.implementation is None:
            pytest.skip("that framework's GPU plugin is not here")
        assert found.config == replace(config, block_m=64)
        assert "block_m=64" in str(found)
        assert f"your own table for {chip.name}: its own entry, measured for square" in str(found)
        assert "heuristic" in str(explain(far, implementation=implementation))
        assert "as the call says" in str(explain(near, implementation=implementation, config=config))


def test_explain_says_that_interpreters_have_small_tiles():
    x = np.ones((4, 4), np.float32)
    assert "for the interpreter" in str(crosstile.explain("matmul", x, x, implementation="triton"))
