"""Checkpoints: round trips in every framework and dtype, the Hugging Face layout, shards, and the errors."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crosstile.kernels.rotary.spec import LinearScaling, Llama3Scaling, YarnScaling
from crosstile.models import Config, init, load, names, save
from crosstile.models.arrays import FRAMEWORKS, dtype_name, framework_of, to_numpy, tree_leaves
from crosstile.models.config import Experts, Latent, Layer, LongRopeScaling, Rotary


@pytest.fixture
def folder(config, tmp_path):
    save(init(config, 5, "torch"), config, tmp_path)
    return tmp_path


@pytest.mark.parametrize("source", FRAMEWORKS)
@pytest.mark.parametrize("target", FRAMEWORKS)
def test_round_trip(config, source, target, tmp_path):
    params = init(config, 1, source)
    save(params, config, tmp_path)
    loaded, read = load(tmp_path, target)
    assert read == config
    for path, array in tree_leaves(loaded).items():
        assert framework_of(array) == target
        assert np.array_equal(to_numpy(array), to_numpy(tree_leaves(params)[path])), path


@pytest.mark.parametrize("source", ["torch", "jax"])
def test_bfloat16_survives_and_numpy_reads_it_as_float32(config, source, tmp_path):
    params = init(config, 1, source, "bfloat16")
    save(params, config, tmp_path)
    for target in FRAMEWORKS:
        for path, array in tree_leaves(load(tmp_path, target)[0]).items():
            assert dtype_name(array) == ("float32" if target == "numpy" else "bfloat16")
            assert np.array_equal(to_numpy(array), to_numpy(tree_leaves(params)[path])), path


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dtype_is_cast(folder, framework):
    params, _ = load(folder, framework, dtype="float16")
    assert {dtype_name(array) for array in tree_leaves(params).values()} == {"float16"}


def test_names_and_orientation_are_hugging_faces(config, folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (2 * 10, 24)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (24, 40)
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (259, 24)
    assert set(tensors) == {
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *(f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qkvo"),
        *(f"model.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("gate", "up", "down")),
        *(f"model.layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")),
    }


def test_matrices_lie_as_in_the_files_on_a_cpu(folder):
    params, _ = load(folder, "torch")
    for path, array in tree_leaves(params).items():
        assert array.ndim < 2 or (array if path == "embedding" else array.T).is_contiguous(), path


def test_tied_embeddings_have_no_head(stretched, tmp_path):
    save(init(stretched, framework="numpy"), stretched, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    params, config = load(tmp_path)
    assert config == stretched
    assert "head" not in params


def test_shards_are_read_by_their_index(config, folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    index = {}
    for position, (name, tensor) in enumerate(tensors.items()):
        shard = ("a.safetensors", "b.safetensors")[position % 2]
        shards[shard][name], index[name] = tensor, shard
    whole = tree_leaves(load(folder)[0])
    file.unlink()
    for shard, part in shards.items():
        save_file(part, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for path, array in tree_leaves(load(folder)[0]).items():
        assert torch.equal(array, whole[path])
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        load(folder)


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder):
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}, file)
    load(folder)


def test_a_wrong_checkpoint_is_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match=name):
        load(folder)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(40)}, file)
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        load(folder)
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(ValueError, match=rf"{name}: got \[39, 24\]; config.json makes it \[40, 24\], of layers.1.wq"):
        load(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(folder)


def test_saving_checks_that_params_fit_the_config(config, stretched, tmp_path):
    with pytest.raises(ValueError, match="head"):
        save(init(config, framework="numpy"), stretched, tmp_path)


def test_unknown_framework_is_named(folder):
    with pytest.raises(ValueError, match=r"framework: got 'tensorflow'.*numpy, torch, jax"):
        load(folder, "tensorflow")


LLAMA_3_2_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu", "mlp_bias": False,
    "attention_bias": False, "pretraining_tp": 1, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


def test_config_of_a_real_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_2_1B))
    config = Config.from_pretrained(tmp_path)
    assert config.num_params == 1_235_814_400  # as the model's card says
    assert {layer.rotary.scaling for layer in config.layers} == {Llama3Scaling(32.0, 1.0, 4.0, 8192)}
    assert Config.from_hugging_face(config.to_hugging_face()) == config
    renamed = {key: value for key, value in LLAMA_3_2_1B.items() if key not in ("rope_theta", "rope_scaling")}
    renamed["rope_parameters"] = {**LLAMA_3_2_1B["rope_scaling"], "rope_theta": 500000.0}
    assert Config.from_hugging_face(renamed) == config


def test_config_defaults_of_old_models():
    fields = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = Config.from_hugging_face({**fields, "num_attention_heads": 8, "vocab_size": 100})
    assert (config.num_kv_heads, config.head_dim, config.layers) == (8, 8, (Layer(rotary=Rotary(10000.0)),) * 2)
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"model_type: got 'mamba', which `load` does not read: its layers are state spaces"),
        ({"model_type": "novel"}, r"model_type: got 'novel'; known are llama, .*family='llama'"),
        ({"model_type": None}, r"model_type: got None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, r"scaling: its rope_type is 'dynamic'; it must be"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2}},
            r"scaling: a rope_type of 'longrope' must also give short_f",
        ),
        ({"model_type": "mixtral"}, r"config.json: the field 'num_local_experts' is missing"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, r"experts.per_token: got 5"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 16, "sliding_window": 8}, r"layer_types: got"),
        ({"hidden_act": "xielu"}, r"hidden_act: got 'xielu'; supported are silu, "),
        ({"num_key_value_heads": 5}, r"num_heads: got 32; it must be a multiple of num_kv_heads 5"),
        ({"head_dim": 63}, r"head_dim: got 63; it must be even"),
        ({"hidden_size": 0}, r"hidden_size: got 0; it must be at least 1"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hugging_face({**LLAMA_3_2_1B, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, r"norm: got 'batch'; it must be one of 'rms', 'layer'"),
        ({"activation": "relu2"}, r"activation: got 'relu2'; it must be one of 'silu', 'gelu', 'gelu_tanh', 'relu'$"),
        ({"layers": (Layer(experts=True),)}, r"experts: got None; a layer has experts"),
        ({"layers": (Layer(window=0),)}, r"layers: got a window of 0; it must be at least 1"),
        (
            {"layers": (Layer(rotary=Rotary(dim=12)),)},
            r"rotary.dim: got 12; it must be even, and from 2 to head_dim 10",
        ),
        ({"latent": Latent(8, None, 4, 4, 4)}, r"head_dim: got 10; latent attention makes it nope_dim \+ rope_dim, 8"),
        ({"family": "novel"}, r"family: got 'novel'; it must be one of llama, "),
    ],
)
def test_what_makes_no_model_is_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change).to_hugging_face()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_token": 5}, r"experts.per_token: got 5; it must be from 1 to count 4"),
        ({"groups": 3}, r"experts.groups: got 3; count 4 must be a multiple of it"),
        ({"groups": 4, "groups_per_token": 5}, r"experts.groups_per_token: got 5; it must be from 1 to groups 4"),
        ({"groups": 4}, r"experts.per_token: got 2; 1 of 4 groups have only 1 experts"),
        ({"bias": True}, r"experts.bias: got True; experts with a bias have the clamped gate alone"),
        ({"score": "cosine"}, r"experts.score: got 'cosine'"),
    ],
)
def test_what_makes_no_mixture_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Experts(**{"count": 4, "per_token": 2, "intermediate_size": 8, **change})


def test_config_names_a_missing_field():
    fields = {key: value for key, value in LLAMA_3_2_1B.items() if key != "vocab_size"}
    with pytest.raises(ValueError, match="'vocab_size' is missing"):
        Config.from_hugging_face(fields)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(4.0),
        Llama3Scaling(8.0, 1.0, 4.0, 64),
        YarnScaling(4.0, 32, beta_fast=16.0, truncate=False),
        LongRopeScaling((1.0, 1.1, 1.2, 1.3, 1.4), (1.0, 2.0, 3.0, 4.0, 5.0), 32, 1.1),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
def test_a_config_reads_back_what_it_writes(config, scaling):
    stretched = (Layer(rotary=Rotary(500.0, scaling)),) * 2
    sparse = tuple(replace(layer, experts=True) for layer in stretched)
    experts = Experts(count=4, per_token=2, intermediate_size=40, loss=0.5)
    for changed in (
        replace(config, layers=stretched),
        replace(config, layers=sparse, experts=experts, family="mixtral"),
    ):
        fields = json.loads(json.dumps(changed.to_hugging_face()))
        assert Config.from_hugging_face(fields) == changed


def test_what_a_family_cannot_say_is_named(config):
    with pytest.raises(ValueError, match=r"config.json of 'llama' cannot say this model: softcap is 30.0, not None"):
        replace(config, softcap=30.0).to_hugging_face()
    with pytest.raises(
        ValueError, match=r"a checkpoint of 'llama' has no place for post_attention_norm, post_mlp_norm"
    ):
        names.places(replace(config, post_norm=True))
