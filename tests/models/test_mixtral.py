"""Experts in the model: the logits, loss, gradients and tokens of transformers' Mixtral, and its checkpoints."""

import jax
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import crosstile
from crosstile.models import Config, Transformer, forward, generate, init, load, loss, save
from crosstile.models.arrays import FRAMEWORKS, like, to_numpy, tree_leaves

SIZES = {"vocab_size": 259, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 10}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(3)
    config = MixtralConfig(**SIZES, **HEADS, **EXPERTS, sliding_window=None, output_router_logits=True)
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    theirs.save_pretrained(folder)
    return folder


def max_relative(got, wanted):
    got, wanted = (np.asarray(to_numpy(array), np.float64) for array in (got, wanted))
    return np.abs(got - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_logits_loss_and_tokens_are_those_of_transformers(theirs, folder, tokens, framework):
    params, config = load(folder, framework)
    assert (config.num_experts, config.experts_per_token, config.router_loss) == (5, 2, 0.7)
    ours = like(tokens, params["embedding"])
    rows = torch.as_tensor(tokens).long()
    with torch.no_grad():
        wanted = theirs(rows)
        assert max_relative(forward(params, ours, config), wanted.logits) < 1e-5
        # transformers balances all the tokens it is given, the last of which predicts nothing.
        inputs = theirs(rows[:, :-1])
        targets = rows[:, 1:].flatten()
        entropy = torch.nn.functional.cross_entropy(inputs.logits.flatten(0, 1), targets)
        whole = (entropy + 0.7 * inputs.aux_loss).item()
        assert float(loss(params, ours, config)) == pytest.approx(whole, rel=2e-6)
        assert abs(entropy.item() - whole) > 0.5
        greedy = theirs.generate(rows[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert np.array_equal(to_numpy(generate(params, config, tokens[:, :5], 6)), greedy)


def test_gradients_are_those_of_transformers(theirs, folder, tokens):
    params, config = load(folder, "torch")
    for array in tree_leaves(params).values():
        array.requires_grad_()
    loss(params, torch.as_tensor(tokens), config).backward()
    rows = torch.as_tensor(tokens).long()
    out = theirs(rows[:, :-1])
    entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
    names = dict(theirs.named_parameters())
    wanted = dict(zip(names, torch.autograd.grad(entropy + 0.7 * out.aux_loss, list(names.values())), strict=True))
    for index, layer in enumerate(params["layers"]):
        start = f"model.layers.{index}.mlp"
        gate_up = wanted[f"{start}.experts.gate_up_proj"].swapaxes(1, 2)
        assert max_relative(torch.cat([layer["w_gate"].grad, layer["w_up"].grad], -1), gate_up) < 2e-5
        assert max_relative(layer["w_down"].grad, wanted[f"{start}.experts.down_proj"].swapaxes(1, 2)) < 2e-5
        assert max_relative(layer["router"].grad, wanted[f"{start}.gate.weight"].T) < 2e-5
    assert max_relative(params["embedding"].grad, wanted["model.embed_tokens.weight"]) < 2e-5

    in_jax, _ = load(folder, "jax")
    found = tree_leaves(jax.jit(jax.grad(loss), static_argnums=2)(in_jax, tokens, config))
    for path, array in tree_leaves(params).items():
        assert max_relative(found[path], array.grad) < 2e-5, path


@pytest.mark.parametrize(("framework", "kernel"), [("torch", "triton"), ("jax", "pallas")])
def test_any_kernel_can_run_the_experts(folder, tokens, framework, kernel):
    params, config = load(folder, framework)
    ours = like(tokens[:1, :5], params["embedding"])
    wanted = forward(params, ours, config)
    with crosstile.use(kernel):
        assert max_relative(forward(params, ours, config), wanted) < 1e-5


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_transformers_reads_what_is_saved(theirs, folder, tokens, framework, tmp_path):
    params, config = load(folder, framework)
    save(params, config, tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path)
    rows = torch.as_tensor(tokens).long()
    with torch.no_grad():
        assert torch.equal(again(rows).logits, theirs(rows).logits)
    for path, array in tree_leaves(load(tmp_path, framework)[0]).items():
        assert np.array_equal(to_numpy(array), to_numpy(tree_leaves(params)[path])), path


def test_a_missing_expert_and_a_wrong_shape_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"the checkpoint lacks {name}"):
        load(tmp_path)
    save_file({**tensors, name: tensors[name][:, :3].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}: its shape makes layers.1.w_down \[3, 24\]; .* makes it \[40, 24\]"):
        load(tmp_path)


def test_counts_and_module(tokens):
    config = Config(
        vocab_size=256, hidden_size=8, intermediate_size=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4,
        num_experts=4, experts_per_token=2,
    )  # fmt: skip
    params = init(config)
    assert sum(array.numel() for array in tree_leaves(params).values()) == config.num_params
    attention = 2 * (2 * 4) * (sum(range(1, 11)) / 10)
    layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 2 * 3 * 8 * 16 + 8 * 4  # two of the four experts, and the router
    assert config.flops_per_token(10) == 6 * (3 * (layer + attention) + 8 * 256)
    rows = torch.as_tensor(tokens)
    assert torch.equal(Transformer(config, params=params)(rows), forward(params, rows, config))
