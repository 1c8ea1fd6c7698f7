"""Experts in the model: the logits, loss, gradients and tokens of transformers' Mixtral, and its checkpoints."""

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import crosstile
from crosstile.models import Config, Transformer, forward, init, load, loss
from crosstile.models.arrays import FRAMEWORKS, like, to_numpy, tree_leaves
from crosstile.models.config import Experts, Layer

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
def test_the_loss_is_that_of_transformers(theirs, folder, tokens, framework):
    params, config = load(folder, framework)
    assert (config.experts.count, config.experts.per_token, config.experts.loss) == (5, 2, 0.7)
    ours = like(tokens, params["embedding"])
    rows = torch.as_tensor(tokens).long()
    with torch.no_grad():
        # transformers balances all the tokens it is given, the last of which predicts nothing.
        inputs = theirs(rows[:, :-1])
        targets = rows[:, 1:].flatten()
        entropy = torch.nn.functional.cross_entropy(inputs.logits.flatten(0, 1), targets)
        whole = (entropy + 0.7 * inputs.aux_loss).item()
        assert float(loss(params, ours, config)) == pytest.approx(whole, rel=2e-6)
        assert abs(entropy.item() - whole) > 0.5


@pytest.mark.parametrize(
    ("framework", "kernel"), [("torch", "triton"), pytest.param("jax", "pallas", marks=pytest.mark.sweep)]
)
def test_any_kernel_can_run_the_experts(folder, tokens, framework, kernel):
    params, config = load(folder, framework)
    ours = like(tokens[:1, :5], params["embedding"])
    wanted = forward(params, ours, config)
    with crosstile.use(kernel):
        assert max_relative(forward(params, ours, config), wanted) < 1e-5


def test_a_missing_expert_and_a_wrong_shape_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"the checkpoint lacks {name}"):
        load(tmp_path)
    save_file({**tensors, name: tensors[name][:, :3].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"{name}: got \[24, 3\]; config.json makes it \[24, 40\], of layers.1.w_down"
    ):
        load(tmp_path)


def test_counts_and_module(tokens):
    config = Config(
        vocab_size=256, hidden_size=8, intermediate_size=16, num_heads=2, num_kv_heads=1, head_dim=4,
        layers=(Layer(experts=True),) * 3, family="mixtral",
        experts=Experts(count=4, per_token=2, intermediate_size=16),
    )  # fmt: skip
    params = init(config)
    assert sum(array.numel() for array in tree_leaves(params).values()) == config.num_params
    attention = 2 * (2 * 4) * (sum(range(1, 11)) / 10)
    layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 2 * 3 * 8 * 16 + 8 * 4  # two of the four experts, and the router
    assert config.flops_per_token(10) == 6 * (3 * (layer + attention) + 8 * 256)
    rows = torch.as_tensor(tokens)
    assert torch.equal(Transformer(config, params=params)(rows), forward(params, rows, config))
