"""The model: the same logits and gradients in the three frameworks, equal to an oracle, with and without a cache."""

from dataclasses import replace

import jax
import llama
import numpy as np
import pytest
import torch

import crosstile
from crosstile.models import Config, forward, generate, init, loss, quantize, save
from crosstile.models.arrays import FRAMEWORKS, from_numpy, like, to_numpy, tree_leaves, tree_map_with_path
from crosstile.models.config import Experts, Layer
from crosstile.models.transformer import attend_cached, extend, make_cache


def max_relative(got, wanted):
    got, wanted = (np.asarray(array, np.float64) for array in (got, wanted))
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def lively(config, framework, dtype="float32", seed=0):
    """Weights large enough that every part of the model shows in the logits, norms that are not all ones."""
    rng = np.random.default_rng(seed)

    def draw(path, array):
        fan_in = array.shape[0] if array.ndim > 1 and path != "embedding" else 1
        offset = 1.0 if path.endswith("norm") else 0.0
        noise = offset + rng.standard_normal(array.shape) / np.sqrt(fan_in) * (0.3 if offset else 1.5)
        return from_numpy(noise, framework, dtype)

    return tree_map_with_path(draw, init(config, framework="numpy"))


def hugging_face(config, folder):
    from safetensors.torch import load_file

    save(lively(config, "torch"), config, folder)
    fields = config.to_hugging_face()
    rope = fields["rope_parameters"]
    scaling = rope if rope["rope_type"] != "default" else None
    return load_file(folder / "model.safetensors"), {
        **fields,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
    }


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["config", "stretched"])
def test_logits_equal_the_oracle(request, name, framework, tokens, tmp_path):
    config = request.getfixturevalue(name)
    tokens = np.tile(tokens, (1, 4))  # past the context where frequencies are stretched
    wanted = llama.logits(*hugging_face(config, tmp_path), torch.as_tensor(tokens))
    params = lively(config, framework)
    got = forward(params, like(tokens, params["embedding"]), config)
    assert str(got.dtype).endswith("float32")
    assert max_relative(to_numpy(got), wanted) < 1e-5


@pytest.mark.parametrize("change", ["rope_theta", "rms_norm_eps", "rope_scaling", "heads"])
def test_the_oracle_sees_a_wrong_config(stretched, tokens, tmp_path, change):
    tensors, fields = hugging_face(stretched, tmp_path)
    fields |= {
        "rope_theta": {"rope_theta": 20000.0},
        "rms_norm_eps": {"rms_norm_eps": 1e-2},
        "rope_scaling": {"rope_scaling": None},
        "heads": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16},
    }[change]
    if change == "heads":
        for name in ("q_proj", "o_proj"):
            tensors[f"model.layers.0.self_attn.{name}.weight"] = tensors[f"model.layers.0.self_attn.{name}.weight"][
                :16, :16
            ]
    tokens = np.tile(tokens, (1, 4))
    wrong = llama.logits(tensors, fields, torch.as_tensor(tokens))
    assert max_relative(forward(lively(stretched, "numpy"), tokens, stretched), wrong) > 1e-4


def test_init_is_the_same_in_every_framework(config):
    trees = [tree_leaves(init(config, 3, framework)) for framework in FRAMEWORKS]
    for path, array in trees[0].items():
        assert all(np.array_equal(array, to_numpy(tree[path])) for tree in trees)
    assert not np.array_equal(trees[0]["layers.0.wq"], to_numpy(init(config, 4, "jax")["layers"][0]["wq"]))
    assert sum(array.size for array in trees[0].values()) == config.num_params


def test_gradients_are_equal_in_torch_and_jax(config, tokens):
    params = lively(config, "torch")
    for array in tree_leaves(params).values():
        array.requires_grad_()
    loss(params, torch.as_tensor(tokens), config).backward()
    wanted = tree_leaves(jax.jit(jax.grad(loss), static_argnums=2)(lively(config, "jax"), tokens, config))
    for path, array in tree_leaves(params).items():
        assert max_relative(array.grad, wanted[path]) < 2e-5, path


def test_loss_is_cross_entropy(config, tokens):
    params = lively(config, "torch")
    predicted = forward(params, torch.as_tensor(tokens[:, :-1]), config)
    wanted = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), torch.as_tensor(tokens[:, 1:]).long().flatten())
    assert loss(params, torch.as_tensor(tokens), config).item() == pytest.approx(wanted.item(), rel=1e-6)
    for framework in ("numpy", "jax"):
        assert float(loss(lively(config, framework), tokens, config)) == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("size", [13, 96])
def test_cache_gives_the_logits_of_the_whole(config, tokens, framework, size):
    params = lively(config, framework)
    whole = to_numpy(forward(params, like(tokens, params["embedding"]), config))
    cache = make_cache(params, config, 2, size)
    step = extend
    lengths = (1, 5, 1, 1, 4, 1)
    if framework == "jax":  # two programs: a prompt at 0, and one token at a position that is data
        prompt, one = jax.jit(extend, static_argnums=(2, 4)), jax.jit(extend, static_argnums=2)
        lengths = (8, 1, 1, 1, 1, 1)

        def step(params, tokens, config, cache, position):
            return (prompt if position == 0 else one)(params, tokens, config, cache, position)

    pieces, position = [], 0
    for length in lengths:
        piece = like(tokens[:, position : position + length], params["embedding"])
        logits, cache = step(params, piece, config, cache, position)
        pieces.append(to_numpy(logits))
        position += length
    assert max_relative(np.concatenate(pieces, 1), whole) < 1e-5


@pytest.mark.parametrize("position", [0, 1, 30, 63])
@pytest.mark.parametrize("window", [None, 5])
def test_a_position_that_is_data_sees_what_a_slice_does(position, window):
    rng = np.random.default_rng(position)
    q, sinks = rng.standard_normal((2, 1, 4, 8), np.float32), rng.standard_normal(4, np.float32)
    k, v = rng.standard_normal((2, 2, 64, 2, 8), np.float32)
    options = {"causal": True, "window": None if window is None else (window - 1, 0)}
    seen = (x[:, : position + 1].astype(float) for x in (k, v))
    wanted = crosstile.attention(q.astype(float), *seen, sinks=sinks.astype(float), **options)

    @jax.jit
    def step(q, k, v, sinks, position):
        return attend_cached(q, k, v, position, {**options, "sinks": sinks})

    cached = k.swapaxes(1, 2), v.swapaxes(1, 2)
    got = step(*(jax.numpy.asarray(x) for x in (q, *cached, sinks)), position)
    assert max_relative(got, wanted) < 2e-6


def test_any_kernel_can_run_the_model(stretched, tokens):
    params = lively(stretched, "jax")
    wanted = forward(params, tokens[:1, :5], stretched)
    with crosstile.use("numpy"):
        params = lively(stretched, "numpy")
        assert max_relative(forward(params, tokens[:1, :5], stretched), wanted) < 1e-5
    for framework, kernel in (("torch", "triton"), ("jax", "pallas")):
        params = lively(stretched, framework)
        with crosstile.use(kernel):
            got = forward(params, like(tokens[:1, :5], params["embedding"]), stretched)
        assert max_relative(to_numpy(got), wanted) < 1e-5


@pytest.mark.parametrize(
    ("framework", "dtype"),
    [
        pytest.param(framework, dtype, marks=[pytest.mark.sweep] if framework == "jax" and dtype != "int8" else [])
        for framework in FRAMEWORKS
        for dtype in ("int8", "int4", "mxfp4")
    ],
)
def test_quantized_layers_compute_with_the_weights_they_stand_for(config, tokens, framework, dtype):
    if dtype == "int4":
        experts = Experts(count=3, per_token=2, intermediate_size=40)
        config = replace(config, layers=(Layer(experts=True),) * 2, experts=experts, family="mixtral")
    params = lively(config, framework)
    quantized = quantize(params, dtype)
    rough = {
        **quantized,
        "layers": [
            {name: x.dequantize() if isinstance(x, crosstile.Quantized) else x for name, x in layer.items()}
            for layer in quantized["layers"]
        ],
    }
    ours = like(tokens, params["embedding"])
    got = to_numpy(forward(quantized, ours, config))
    assert max_relative(got, to_numpy(forward(rough, ours, config))) < 1e-5
    assert max_relative(got, to_numpy(forward(params, ours, config))) > 1e-3
    assert np.array_equal(
        to_numpy(generate(quantized, config, tokens[:1, :4], 3)), to_numpy(generate(rough, config, tokens[:1, :4], 3))
    )


def test_bfloat16_keeps_its_dtype_and_gives_float32_logits(config, tokens):
    wanted = forward(lively(config, "numpy"), tokens, config)
    for framework in ("torch", "jax"):
        params = lively(config, framework, "bfloat16")
        got = forward(params, like(tokens, params["embedding"]), config)
        assert str(got.dtype).endswith("float32")
        assert str(make_cache(params, config, 1, 4)[0]["k"].dtype).endswith("bfloat16")
        assert (
            1e-4 < max_relative(to_numpy(got.astype("float32") if framework == "jax" else got.detach()), wanted) < 0.1
        )


def test_module_is_the_same_model(config, tokens):
    from crosstile.models import Transformer

    params = lively(config, "torch")
    model = Transformer(config, params=params)
    assert torch.equal(model(torch.as_tensor(tokens)), forward(params, torch.as_tensor(tokens), config))
    assert set(model.state_dict()) == set(tree_leaves(params))
    model(torch.as_tensor(tokens)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    other = Transformer(config, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(torch.as_tensor(tokens)), model(torch.as_tensor(tokens)))


def test_import_brings_no_framework():
    import subprocess
    import sys

    code = "import sys, crosstile.models; assert not {'torch', 'jax', 'triton'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flops_count_what_a_step_multiplies():
    """By hand: weights of one layer and the head, thrice the forward, two operations each; attention's half square."""
    config = Config(
        vocab_size=256,
        hidden_size=8,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        layers=(Layer(), Layer(window=4), Layer()),
    )
    layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16
    pairs = sum(range(1, 11)) / 10  # keys that a query of a sequence of 10 sees
    windowed = (1 + 2 + 3 + 7 * 4) / 10
    attention = 2 * (2 * 4) * (2 * pairs + windowed)
    assert config.flops_per_token(10) == pytest.approx(6 * (3 * layer + attention + 8 * 256))
