"""torch on a TPU, as far as it goes without one: the kernels handed to a stand-in of torch_tpu's `jax_op`.

The stand-in holds what torch_tpu 0.2.0's source asks of a function: every parameter annotated as an array, and a tuple
of arrays as the return annotation, from which it makes the schema of a torch op.
"""

import inspect
import types
import typing

import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from crosstile import torch as glue  # noqa: E402
from crosstile import torch_tpu  # noqa: E402
from crosstile.dispatch import OPS  # noqa: E402
from crosstile.kernels.attention.spec import AttentionInputs, AttentionSpec  # noqa: E402
from crosstile.kernels.matmul.spec import MatmulSpec  # noqa: E402
from crosstile.kernels.tiles.targets import INTERPRET  # noqa: E402


@pytest.fixture
def registered(monkeypatch):
    names = []

    def jax_op(name, function):
        namespace, _, operator = name.partition("::")
        assert namespace.isidentifier()
        assert operator.isidentifier()
        signature = inspect.signature(inspect.unwrap(function), eval_str=True)
        assert all(parameter.annotation is jax.Array for parameter in signature.parameters.values())
        assert typing.get_origin(signature.return_annotation) is tuple
        results = typing.get_args(signature.return_annotation)
        assert set(results) == {jax.Array}
        names.append(name)

        def run(*tensors):
            arrays = jax.jit(function)(*(jax.numpy.asarray(glue.to_numpy(tensor)) for tensor in tensors))
            assert len(arrays) == len(results)
            return tuple(glue.from_numpy(jax.device_get(array)) for array in arrays)

        return run

    tpu = types.SimpleNamespace(pallas=types.SimpleNamespace(jax_op=jax_op), get_device_name=lambda device: "TPU v6e")
    monkeypatch.setattr(torch, "tpu", tpu, raising=False)
    torch_tpu._operator.cache_clear()
    yield names
    torch_tpu._operator.cache_clear()


def test_attention_forward_and_backward(registered):
    q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 7, 2, 8), torch.randn(1, 7, 2, 6)
    op, spec = OPS["attention"], AttentionSpec("float32", 8, 6, causal=True)
    config = op.module("tiles").choose_config(spec, INTERPRET)
    reference = op.module("reference")
    exact = reference.forward(spec, *(x.double().numpy() for x in (q, k, v)))
    arrays = AttentionInputs(q, k, v)
    outputs = torch_tpu.execute(op, "forward", spec, arrays, config, INTERPRET)
    for ours, theirs in zip(outputs, exact, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs).float())
    dout = torch.randn_like(outputs[0])
    operands = (arrays, tuple(outputs), (dout, None))
    gradients = torch_tpu.execute(op, "backward", spec, operands, config, INTERPRET)
    inputs = AttentionInputs(*(x.double().numpy() for x in (q, k, v)))
    expected = reference.backward(spec, inputs, exact, (dout.double().numpy(), None))
    assert gradients[3:] == [None] * len(gradients[3:])
    for ours, theirs in zip(gradients[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs).float())
    assert len(registered) == 2


def test_absent_arrays_stay_absent(registered):
    a, b = torch.randn(1, 4, 5), torch.randn(1, 5, 6)
    op, spec = OPS["matmul"], MatmulSpec("float32", "float32", "relu", save_preactivation=True)
    config = op.module("tiles").choose_config(spec, INTERPRET)
    out, preactivation = torch_tpu.execute(op, "forward", spec, (a, b, None, None), config, INTERPRET)
    torch.testing.assert_close(out, torch.relu(a @ b))
    operands = ((a, b, None, None), (out, preactivation), (torch.ones_like(out), None))
    da, db, dbias, dresidual = torch_tpu.execute(op, "backward", spec, operands, config, INTERPRET)
    torch.testing.assert_close(da, (out > 0).float() @ b.mT)
    assert dbias is None
    assert dresidual is None
    again = torch_tpu.execute(op, "forward", spec, (a, b, None, None), config, INTERPRET)
    torch.testing.assert_close(again[0], out)
    assert len(registered) == 2  # made once, used twice


def test_the_device_names_its_target(registered):
    assert torch_tpu.target_of("tpu:0").name == "v6e"
    torch.tpu.get_device_name = lambda device: "TPU v99"
    with pytest.raises(ValueError, match=r"torch_tpu names its device 'TPU v99'; known are TPU v4"):
        torch_tpu.target_of("tpu:0")
