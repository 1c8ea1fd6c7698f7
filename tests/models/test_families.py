"""Every family beside transformers: logits, gradients and greedy tokens of small random models, and checkpoints."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import crosstile
from crosstile.kernels.rotary.spec import LinearScaling
from crosstile.models import Config, Transformer, forward, generate, load, parity
from crosstile.models.arrays import FRAMEWORKS, like, to_numpy, tree_leaves
from crosstile.models.config import Rotary
from crosstile.models.families import FAMILIES, UNSUPPORTED
from crosstile.models.learners import make_learner
from crosstile.models.packing import Batch
from crosstile.models.parity_cases import CASES
from crosstile.models.recipe import Recipe

NAMED = (
    "llama:3.1", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3:longrope", "mixtral", "qwen3_moe",
    "gpt_oss", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
IN_JAX = ("gemma3_text", "phi3:longrope", "gpt_oss", "deepseek_v3")  # which together have almost every part
ALWAYS = [
    *((name, "torch", kind) for name in NAMED for kind in parity.KINDS),
    *((name, "numpy", kind) for name in NAMED for kind in ("logits", "generation")),
    *((name, "jax", kind) for name in IN_JAX for kind in ("gradients", "generation")),
    *((name, "torch", kind) for name in CASES if name not in NAMED for kind in ("logits", "saved")),
]
SWEEP = [
    (name, framework, kind)
    for name in CASES
    for framework in FRAMEWORKS
    for kind in parity.KINDS
    if (name, framework, kind) not in ALWAYS and (framework, kind) != ("numpy", "gradients")
]
_subjects = {}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small products are slower on more, and much so where tests run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def subject_of(tmp_path_factory):
    """The subject of a case's name, built once."""

    def find(name):
        if name not in _subjects:
            _subjects[name] = parity.subject(name, tmp_path_factory.mktemp("subject"))
        return _subjects[name]

    return find


@pytest.mark.parametrize(("name", "framework", "kind"), ALWAYS, ids=map("-".join, ALWAYS))
def test_equals_transformers(subject_of, name, framework, kind):
    error = parity.measure(subject_of(name), framework, kind)
    assert parity.passes(subject_of(name), error, kind), error


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "framework", "kind"), SWEEP, ids=map("-".join, SWEEP))
def test_equals_transformers_in_the_rest(subject_of, name, framework, kind):
    error = parity.measure(subject_of(name), framework, kind)
    assert parity.passes(subject_of(name), error, kind), error


def test_every_family_has_a_case():
    assert {name.partition(":")[0] for name in CASES} == set(FAMILIES)
    assert not set(FAMILIES) & set(UNSUPPORTED)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    assert all(f"`{name}`" in page for name in FAMILIES)


def test_every_decoder_of_transformers_is_a_family_or_has_a_reason():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text_in_a_part = {"gemma3"}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(FAMILIES) | set(UNSUPPORTED) | text_in_a_part
    for name in UNSUPPORTED:
        with pytest.raises(ValueError, match=f"model_type: got '{name}', which `load` does not read: "):
            Config.from_hugging_face({"model_type": name})


@pytest.mark.parametrize("name", CASES)
def test_random_tokens_are_not_one_and_the_same(subject_of, name):
    """So that equal greedy tokens say something."""
    if name in NAMED:
        assert len(set(subject_of(name).generated()[:, parity.PROMPT :].flatten().tolist())) > 4


def each_layer(config, **changes):
    return replace(config, layers=tuple(replace(layer, **changes) for layer in config.layers))


def without(*names):
    """A change of the parameters that leaves those of a layer out, as if the model did not have them."""

    def change(params, config):
        layers = [{key: x for key, x in layer.items() if key not in names} for layer in params["layers"]]
        return {**params, "layers": layers}, config

    return change


def configured(change):
    return lambda params, config: (params, change(config))


BROKEN = {
    "sinks": ("gpt_oss", without("sinks")),
    "experts' biases": ("gpt_oss", configured(lambda c: replace(c, experts=replace(c.experts, bias=False)))),
    "router's bias": ("gpt_oss", without("router_bias")),
    "clamp": ("gpt_oss", configured(lambda c: replace(c, experts=replace(c.experts, limit=100.0)))),
    "window": ("gpt_oss", configured(lambda c: each_layer(c, window=None))),
    "window's edge": ("gpt_oss", configured(lambda c: each_layer(c, window=7))),
    "output's bias": ("gpt_oss", without("bo")),
    "embedding scale": ("gemma3_text", configured(lambda c: replace(c, embedding_scale=None))),
    "query and key norm": ("gemma3_text", without("q_norm", "k_norm")),
    "post norms": ("gemma3_text", without("post_attention_norm", "post_mlp_norm")),
    "zero-centred norms": ("gemma3_text", configured(lambda c: replace(c, zero_centered_norms=False))),
    "local positions": ("gemma3_text", configured(lambda c: each_layer(c, rotary=c.layers[1].rotary))),
    "query scale": ("gemma2", configured(lambda c: replace(c, attention_scale=None))),
    "scores' cap": ("gemma2", configured(lambda c: replace(c, softcap=None))),
    "logits' cap": ("gemma2", configured(lambda c: replace(c, logit_softcap=None))),
    "tanh of gelu": ("gemma2", configured(lambda c: replace(c, activation="gelu"))),
    "query bias": ("qwen2", without("bq")),
    "long factors": ("phi3:longrope", configured(lambda c: replaced_scaling(c, long_factor=(1.0, 1.2)))),
    "attention factor": ("phi3:longrope", configured(lambda c: replaced_scaling(c, attention_factor=1.0))),
    "weights' sum": ("qwen3_moe", configured(lambda c: replace(c, experts=replace(c.experts, normalize=False)))),
    "shared expert": ("deepseek_v3", configured(lambda c: replace(c, experts=replace(c.experts, shared_size=0)))),
    "groups": ("deepseek_v3", configured(lambda c: replace(c, experts=replace(c.experts, groups_per_token=4)))),
    "correction": ("deepseek_v3", without("correction_bias")),
    "routed scale": ("deepseek_v3", configured(lambda c: replace(c, experts=replace(c.experts, scale=1.0)))),
    "sharper scores": ("deepseek_v3", configured(lambda c: replace(c, attention_scale=None))),
    "neighbours": (
        "deepseek_v3",
        configured(lambda c: each_layer(c, rotary=replace(c.layers[0].rotary, interleaved=False))),
    ),
    "latent norm": ("deepseek_v3", without("kv_latent_norm")),
    "two of a group": ("deepseek_v3", configured(lambda c: replace(c, experts=replace(c.experts, group_score="max")))),
}


def replaced_scaling(config, **changes):
    rotary = config.layers[0].rotary
    return each_layer(config, rotary=replace(rotary, scaling=replace(rotary.scaling, **changes)))


@pytest.mark.parametrize("broken", BROKEN)
def test_logits_show_a_missing_part(subject_of, broken):
    name, change = BROKEN[broken]
    subject = subject_of(name)
    params, config = change(*load(subject.folder, "numpy"))
    assert parity.max_relative(forward(params, subject.tokens, config), subject.logits()) > 10 * parity.LOGITS_BAR


def test_a_wrong_gradient_shows(subject_of):
    subject = subject_of("gpt_oss")
    wanted = tree_leaves(subject.gradients())
    assert all(np.abs(array).max() > 0 for path, array in wanted.items()), "some parameter does nothing"


def test_the_family_can_be_said(subject_of, tmp_path):
    folder = subject_of("llama:3.1").folder
    fields = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "novel"}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model_type: got 'novel'; known are .*family='llama' of `load`"):
        load(tmp_path)
    params, config = load(tmp_path, "numpy", family="llama")
    assert config == Config.from_pretrained(folder)
    assert (
        parity.max_relative(forward(params, subject_of("llama:3.1").tokens, config), subject_of("llama:3.1").logits())
        < 1e-5
    )
    with pytest.raises(ValueError, match=r"family: got 'novel'"):
        load(tmp_path, family="novel")


def test_the_text_part_of_a_model_with_pictures(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**parity.SIZES, **CASES["gemma3_text"]},
        vision_config={**eyes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=98,
        boi_token_index=96,
        eoi_token_index=97,
    )
    theirs = Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 96, (2, 20)).astype(np.int32)
    params, config = load(tmp_path, "torch")
    assert config.family == "gemma3_text"
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(tokens).long()).logits
    assert parity.max_relative(forward(params, torch.as_tensor(tokens), config), wanted) < parity.LOGITS_BAR


GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
MISTRAL_7B_V0_1 = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000, "hidden_act": "silu",
    "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_2_5_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
    "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "vocab_size": 201088, "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "attention_bias": False, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip

PYTHIA_160M = {
    "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
    "vocab_size": 50304,
}  # fmt: skip
PHI_2 = {
    "model_type": "phi", "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
}  # fmt: skip
FALCON_7B = {
    "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 4544, "layer_norm_epsilon": 1e-05,
    "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
    "parallel_attn": True, "vocab_size": 65024,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "billions"),
    [
        (GEMMA_3_4B, 3.880),
        (MISTRAL_7B_V0_1, 7.242),
        (QWEN_2_5_7B, 7.616),
        (GPT_OSS_20B, 20.915),
        (PYTHIA_160M, 0.162323),
        (PHI_2, 2.779684),
        (FALCON_7B, 6.921721),
        (DEEPSEEK_V3, 671.026),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_released_models_have_the_parameters_that_their_makers_count(fields, billions):
    """From the fields of the config.json of a release, older names included."""
    config = Config.from_hugging_face(fields)
    assert config.num_params / 1e9 == pytest.approx(billions, rel=2e-4)
    assert Config.from_hugging_face(config.to_hugging_face()) == config


def test_what_releases_say_of_their_layers():
    gemma = Config.from_hugging_face(GEMMA_3_4B)
    assert [layer.window for layer in gemma.layers[:7]] == [1024] * 5 + [None, 1024]
    assert (gemma.layers[0].rotary, gemma.layers[5].rotary) == (Rotary(1e4), Rotary(1e6, LinearScaling(8.0)))
    assert {layer.window for layer in Config.from_hugging_face(MISTRAL_7B_V0_1).layers} == {4096}
    assert {layer.window for layer in Config.from_hugging_face(QWEN_2_5_7B).layers} == {None}
    deepseek = Config.from_hugging_face(DEEPSEEK_V3)
    assert [layer.experts for layer in deepseek.layers[:4]] == [False, False, False, True]
    pythia, phi = Config.from_hugging_face(PYTHIA_160M), Config.from_hugging_face(PHI_2)
    assert (pythia.layers[0].rotary, phi.layers[0].rotary) == (Rotary(dim=16), Rotary(dim=32))
    assert deepseek.attention_scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)


def test_layers_that_draft_further_tokens_are_left_out(subject_of, tmp_path):
    """DeepSeek-V3 and GLM-4.5 are released with one past the last; transformers leaves it out too."""
    folder = subject_of("deepseek_v3").folder
    tensors = load_file(folder / "model.safetensors")
    draft = {name.replace(".1.", ".2."): x.clone() for name, x in tensors.items() if name.startswith("model.layers.1.")}
    save_file({**tensors, **draft, "model.layers.2.eh_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    assert fields["num_nextn_predict_layers"] == 1
    (tmp_path / "config.json").write_text(json.dumps(fields))
    params, config = load(tmp_path, "numpy")
    assert np.array_equal(params["layers"][1]["wo"], load(folder, "numpy")[0]["layers"][1]["wo"])
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"the checkpoint has model\.layers\.2"):
        load(tmp_path)


def test_the_table_fails_where_a_cell_does(monkeypatch, capsys):
    monkeypatch.setattr(parity, "FRAMEWORKS", ("numpy",))
    assert parity.main(["phi"])
    assert "all is well" in capsys.readouterr().out
    monkeypatch.setattr(parity, "LOGITS_BAR", 0.0)
    assert not parity.main(["phi"])
    assert "over the bar: phi, numpy, logits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="case: got 'novel'"):
        parity.main(["novel"])


def typical_error(got, wanted):
    """The median token's: of a few tokens rounding makes the router choose others."""
    return np.median(np.abs(np.asarray(got, np.float64) - wanted).max(-1)) / np.abs(wanted).max()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_rounds_as_little_as_transformers(subject_of, name):
    subject = subject_of(name)
    rows = torch.as_tensor(subject.tokens)
    theirs = copy.deepcopy(subject.model).to(torch.bfloat16)
    params, config = load(subject.folder, "torch", "bfloat16")
    for path, array in tree_leaves(params).items():
        assert array.dtype == (torch.float32 if path.endswith("correction_bias") else torch.bfloat16), path
    with torch.no_grad():
        allowed = typical_error(theirs(rows.long()).logits.float(), subject.logits())
        assert typical_error(forward(params, rows, config), subject.logits()) < 2 * allowed


def test_a_module_of_any_family(subject_of):
    subject = subject_of("deepseek_v3")
    model = Transformer.from_pretrained(subject.folder)
    assert parity.max_relative(model(torch.as_tensor(subject.tokens)).detach(), subject.logits()) < parity.LOGITS_BAR


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.sweep)])
def test_the_bias_that_chooses_experts_is_not_trained(subject_of, framework):
    """And a run that goes on from what it saved takes the same step."""
    subject = subject_of("deepseek_v3")
    rows, recipe = Batch(subject.tokens), Recipe(framework)
    before = tree_leaves(load(subject.folder, "numpy")[0])
    first, second = (make_learner(recipe, *load(subject.folder, framework)) for _ in range(2))
    first.step(rows, 1e-3)
    second.restore(copy.deepcopy(first.state()))
    assert first.step(rows, 1e-3) == second.step(rows, 1e-3)
    for path, array in tree_leaves(first.params).items():
        moved = not np.array_equal(to_numpy(array), before[path])
        assert moved is not path.endswith("correction_bias"), path


@pytest.mark.parametrize(
    ("framework", "kernel"), [("torch", "triton"), pytest.param("jax", "pallas", marks=pytest.mark.sweep)]
)
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_the_kernels_run_every_part(subject_of, name, framework, kernel):
    """Caps, windows, sinks, experts, heads of two widths, and a cache, through the interpreters."""
    subject = subject_of(name)
    prompt = subject.tokens[:1, : parity.PROMPT]
    plain, config = load(subject.folder, "numpy")
    params, _ = load(subject.folder, framework)
    with crosstile.use(kernel):
        got = to_numpy(forward(params, like(prompt, params["embedding"]), config))
        tokens = to_numpy(generate(params, config, prompt, 3))
    assert parity.max_relative(got, forward(plain, prompt, config)) < parity.LOGITS_BAR
    assert np.array_equal(tokens, generate(plain, config, prompt, 3))
