"""The families of models that `load` reads and `save` writes: each is an entry of data, not a class.

An entry says how the fields of a `config.json` become a `Config`, what all its models have in common, and under which
names their parameters lie. `UNSUPPORTED` says of others what is missing.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from .families_of_experts import FAMILIES_OF_EXPERTS
from .family import ATTENTION_BIAS, GRANITE_FIELDS, MLP_BIAS, Family, Values
from .fields import Field, Fields, Layers, activation, alternating, inverse_square, windows_of_qwen
from .names import LAYER, MODEL, POST_NORMS, Stored, named
from .unsupported import MISSING

PARTS = (("w", "weight"), ("b", "bias"))
GATE_UP = {"w_gate w_up": "mlp.gate_up_proj.weight"}
LAYER_NORM = {"norm": "layer", "norm_bias": True}
LAYER_NORM_EPS = Field("layer_norm_eps", "norm_eps", 1e-5)
USE_BIAS = tuple(Field("use_bias", here, False) for here in ("qkv_bias", "out_bias", "mlp_bias"))
GEMMA_FIELDS = (
    Field("head_dim", "head_dim", 256),
    Field("tie_word_embeddings", "tie_embeddings", True),
    *ATTENTION_BIAS,
)
GEMMA_2_FIELDS = (
    *GEMMA_FIELDS,
    activation("hidden_activation", "gelu_pytorch_tanh"),
    Field("query_pre_attn_scalar", "attention_scale", 256, lambda scalar: scalar**-0.5, inverse_square),
    Field("attn_logit_softcapping", "softcap", None),
    Field("final_logit_softcapping", "logit_softcap", None),
)


def of_gemma(values: Values, fields: Fields) -> Values:
    """Embeddings are scaled by the root of their width."""
    return {"embedding_scale": sqrt(values["hidden_size"])}


COHERE = Family(
    "CohereForCausalLM",
    (
        *ATTENTION_BIAS,
        LAYER_NORM_EPS,
        Field("logit_scale", "logit_scale", 0.0625),
        Field("tie_word_embeddings", "tie_embeddings", True),
    ),
    facts={"norm": "layer", "parallel": "one norm"},
    layers=Layers(interleaved=True),
    fixed={"use_qk_norm": False},
)
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", ATTENTION_BIAS + MLP_BIAS),
    "mistral": Family("MistralForCausalLM", layers=Layers(windows="all")),
    "ministral": Family("MinistralForCausalLM", layers=Layers(windows="typed")),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        facts={"qkv_bias": True},
        layers=Layers(windows="typed", types=windows_of_qwen, flag="use_sliding_window"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (*ATTENTION_BIAS, Field("head_dim", "head_dim", 128)),
        facts={"qk_norm": "head"},
        layers=Layers(windows="typed", types=windows_of_qwen, flag="use_sliding_window"),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        (*GEMMA_FIELDS, activation("hidden_act", "gelu_pytorch_tanh", gelu="gelu_tanh")),
        facts={"zero_centered_norms": True},
        derive=of_gemma,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA_2_FIELDS,
        facts={"zero_centered_norms": True, "post_norm": True},
        layers=Layers(windows="typed", types=alternating(2)),
        derive=of_gemma,
        layer_names=named(LAYER, POST_NORMS),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        (
            *GEMMA_2_FIELDS,
            Field("vocab_size", "vocab_size", 262_208),  # the text_config of a model with pictures lacks these
            Field("num_attention_heads", "num_heads", 8),
            Field("num_key_value_heads", "num_kv_heads", 4),
        ),
        facts={"zero_centered_norms": True, "post_norm": True, "qk_norm": "head"},
        layers=Layers(windows="typed", types=alternating(6), rotary="typed", theta=1e6),
        derive=of_gemma,
        fixed={"use_bidirectional_attention": False},
        layer_names=named(LAYER, POST_NORMS),
    ),
    "vaultgemma": Family(
        "VaultGemmaForCausalLM",
        GEMMA_2_FIELDS,
        facts={"zero_centered_norms": True},
        layers=Layers(windows="typed", types=alternating(2)),
        derive=of_gemma,
        layer_names=named(LAYER, {"mlp_norm": "pre_feedforward_layernorm.weight"}),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        layers=Layers(windows="all"),
        layer_names=named(LAYER, {"wq wk wv": "self_attn.qkv_proj.weight", **GATE_UP}),
    ),
    "phi": Family(
        "PhiForCausalLM",
        (LAYER_NORM_EPS, activation("hidden_act", "gelu_new")),
        facts={
            **LAYER_NORM,
            **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "head_bias"), True),
            "gated": False,
            "parallel": "one norm",
        },
        layers=Layers(partial=0.5),
        fixed={"qk_layernorm": False},
        model_names=named(MODEL, {"norm": "model.final_layernorm.weight", "norm_bias": "model.final_layernorm.bias"}),
        layer_names=named(
            LAYER,
            {"wo": "self_attn.dense.weight", "bo": "self_attn.dense.bias"},
            {"w_up": "mlp.fc1.weight", "b_up": "mlp.fc1.bias", "w_down": "mlp.fc2.weight", "b_down": "mlp.fc2.bias"},
        ),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        (
            LAYER_NORM_EPS,
            activation("hidden_act", "gelu"),
            Field("attention_bias", "qkv_bias", True),
            Field("attention_bias", "out_bias", True),
            Field("use_parallel_residual", "parallel", True, {True: "two norms", False: None}.get, bool),
        ),
        facts={**LAYER_NORM, "mlp_bias": True, "gated": False},
        layers=Layers(partial=0.25, theta_field="rotary_emb_base", partial_field="rotary_pct"),
        model_names={
            "embedding": "gpt_neox.embed_in.weight",
            "norm": "gpt_neox.final_layer_norm.weight",
            "norm_bias": "gpt_neox.final_layer_norm.bias",
            "head": "embed_out.weight",
        },
        layer_names=named(
            LAYER,
            {
                "wq wk wv": Stored("attention.query_key_value.weight", groups="kv_heads"),
                "bq bk bv": Stored("attention.query_key_value.bias", groups="kv_heads"),
                "wo": "attention.dense.weight",
                "bo": "attention.dense.bias",
                "w_up": "mlp.dense_h_to_4h.weight",
                "b_up": "mlp.dense_h_to_4h.bias",
                "w_down": "mlp.dense_4h_to_h.weight",
                "b_down": "mlp.dense_4h_to_h.bias",
            },
        ),
        layers_at="gpt_neox.layers",
        ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        (
            LAYER_NORM_EPS,
            Field("use_qkv_bias", "qkv_bias", False),
            Field("use_parallel_residual", "parallel", False, {True: "one norm", False: None}.get, bool),
        ),
        facts=LAYER_NORM,
        layers=Layers(partial=0.25),
        fixed={"qk_layernorm": False},
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        (Field("norm_epsilon", "norm_eps", 1e-5), *USE_BIAS, Field("tie_word_embeddings", "tie_embeddings", True)),
        facts={**LAYER_NORM, "gated": False},
        layers=Layers(windows="all"),
        layer_names=named(
            LAYER,
            {"w_up": "mlp.c_fc.weight", "b_up": "mlp.c_fc.bias"},
            {"w_down": "mlp.c_proj.weight", "b_down": "mlp.c_proj.bias"},
        ),
    ),
    "cohere": COHERE,
    "cohere2": replace(
        COHERE,
        architecture="Cohere2ForCausalLM",
        layers=Layers(windows="typed", types=alternating(4), rotary="windowed", interleaved=True),
        fixed={},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        ATTENTION_BIAS,
        facts={"pre_norm": False, "post_norm": True, "qk_norm": "whole"},
        layer_names=named(LAYER, POST_NORMS),
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        ATTENTION_BIAS,
        facts={"pre_norm": False, "post_norm": True, "qk_norm": "whole"},
        layers=Layers(windows="typed", types=alternating(4), rotary="typed", theta=5e5, local_theta=5e5),
        layer_names=named(LAYER, POST_NORMS),
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        facts={"pre_norm": False, "post_norm": True, "qk_norm": "head"},
        layers=Layers(windows="typed", types=alternating(4), rotary="windowed"),
        layer_names=named(LAYER, POST_NORMS),
    ),
    "granite": Family("GraniteForCausalLM", GRANITE_FIELDS + MLP_BIAS),
    "glm": Family(
        "GlmForCausalLM",
        (Field("attention_bias", "qkv_bias", False), Field("head_dim", "head_dim", 128)),
        layers=Layers(partial=0.5, interleaved=True),
        layer_names=named(LAYER, GATE_UP),
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        (Field("attention_bias", "qkv_bias", False), Field("head_dim", "head_dim", 128)),
        facts={"post_norm": True},
        layers=Layers(partial=0.5, interleaved=True),
        layer_names=named(
            LAYER,
            GATE_UP,
            {
                "post_attention_norm": "post_self_attn_layernorm.weight",
                "post_mlp_norm": "post_mlp_layernorm.weight",
            },
        ),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        (*ATTENTION_BIAS, *MLP_BIAS, Field("tie_word_embeddings", "tie_embeddings", True)),
        layers=Layers(windows="typed", types=windows_of_qwen, flag="use_sliding_window", rotary="listed", theta=2e6),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        (
            Field("attention_bias", "qkv_bias", True),
            Field("attention_out_bias", "out_bias", False),
            *MLP_BIAS,
            Field("head_dim", "head_dim", 128),
        ),
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        (*USE_BIAS, Field("head_dim", "head_dim", 128), Field("tie_word_embeddings", "tie_embeddings", True)),
        layers=Layers(interleaved=True, theta=500000.0),
    ),
    "helium": Family(
        "HeliumForCausalLM",
        (Field("attention_bias", "qkv_bias", False), *MLP_BIAS, Field("head_dim", "head_dim", 128)),
        layers=Layers(interleaved=True, theta=100000.0),
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        ATTENTION_BIAS,
        facts={"qk_norm": "head after rotary"},
        layer_names=named(
            LAYER, {"q_norm": "self_attn.query_layernorm.weight", "k_norm": "self_attn.key_layernorm.weight"}
        ),
    ),
    "arcee": Family(
        "ArceeForCausalLM",
        (*ATTENTION_BIAS, *MLP_BIAS, activation("hidden_act", "relu2")),
        facts={"gated": False},
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        (*ATTENTION_BIAS, *MLP_BIAS, activation("hidden_act", "relu2"), Field("norm_eps", "norm_eps", 1e-5)),
        facts={**LAYER_NORM, "zero_centered_norms": True, "gated": False},
        layers=Layers(partial=0.5),
    ),
    "jais2": Family(
        "Jais2ForCausalLM",
        (
            Field("attention_bias", "qkv_bias", True),
            Field("attention_bias", "out_bias", True),
            Field("mlp_bias", "mlp_bias", True),
            activation("hidden_act", "relu2"),
            LAYER_NORM_EPS,
        ),
        facts={**LAYER_NORM, "gated": False},
    ),
    "cwm": Family(
        "CwmForCausalLM", MLP_BIAS, layers=Layers(windows="typed", types=alternating(4, first_full=True), theta=1e6)
    ),
    "internlm3": Family("LlamaForCausalLM", ATTENTION_BIAS + MLP_BIAS),
    "iquestcoder": Family("LlamaForCausalLM", ATTENTION_BIAS + MLP_BIAS),
    "exaone": Family(
        "LlamaForCausalLM",
        ATTENTION_BIAS + MLP_BIAS,
        layers=Layers(theta=500000.0),
        model_names={
            "embedding": "transformer.wte.weight",
            "norm": "transformer.ln_f.weight",
            "head": "lm_head.weight",
        },
        layer_names={
            "attention_norm": "ln_1.weight",
            **{f"{kind}{letter}": f"attn.attention.{letter}_proj.{part}" for letter in "qkv" for kind, part in PARTS},
            **{f"{kind}o": f"attn.attention.out_proj.{part}" for kind, part in PARTS},
            "mlp_norm": "ln_2.weight",
            "w_gate": "mlp.c_fc_0.weight",
            "w_up": "mlp.c_fc_1.weight",
            "w_down": "mlp.c_proj.weight",
            "b_gate": "mlp.c_fc_0.bias",
            "b_up": "mlp.c_fc_1.bias",
            "b_down": "mlp.c_proj.bias",
        },
        layers_at="transformer.h",
        ignored=("rotary.inv_freq",),
    ),
    "hyperclovax": Family(
        "HyperCLOVAXForCausalLM",
        (
            Field("embedding_multiplier", "embedding_scale", 1.0),
            Field("attention_multiplier", "attention_scale", None),
            Field("residual_multiplier", "residual_scale", 1.0),
            Field("logits_scaling", "logit_scale", 1.0),
            Field("use_post_norm", "post_norm", True),
            *ATTENTION_BIAS,
            *MLP_BIAS,
        ),
        layer_names=named(LAYER, {"post_attention_norm": "post_norm1.weight", "post_mlp_norm": "post_norm2.weight"}),
    ),
    "falcon": Family(
        "FalconForCausalLM",
        (
            activation("activation", "gelu"),
            Field("layer_norm_epsilon", "norm_eps", 1e-5),
            Field("ffn_hidden_size", "intermediate_size", lambda fields: 4 * fields["hidden_size"]),
            Field("tie_word_embeddings", "tie_embeddings", True),
            *(Field("bias", here, False) for here in ("qkv_bias", "out_bias", "mlp_bias")),
        ),
        facts={**LAYER_NORM, "gated": False, "parallel": "one norm", "num_kv_heads": 1},
        absent=("head_dim",),
        fixed={"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
        model_names={
            "embedding": "transformer.word_embeddings.weight",
            "norm": "transformer.ln_f.weight",
            "norm_bias": "transformer.ln_f.bias",
            "head": "lm_head.weight",
        },
        layer_names={
            "attention_norm": "input_layernorm.weight",
            "attention_norm_bias": "input_layernorm.bias",
            "wq wk wv": "self_attention.query_key_value.weight",
            "bq bk bv": "self_attention.query_key_value.bias",
            "wo": "self_attention.dense.weight",
            "bo": "self_attention.dense.bias",
            "w_up": "mlp.dense_h_to_4h.weight",
            "b_up": "mlp.dense_h_to_4h.bias",
            "w_down": "mlp.dense_4h_to_h.weight",
            "b_down": "mlp.dense_4h_to_h.bias",
        },
        layers_at="transformer.h",
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        (
            Field("n_embd", "hidden_size"),
            Field("n_inner", "intermediate_size", lambda fields: 4 * fields["n_embd"]),
            Field("n_head", "num_heads"),
            Field("n_positions", "max_seq_len", 2048),
            Field("layer_norm_epsilon", "norm_eps", 1e-5),
            activation("activation_function", "gelu_new"),
        ),
        facts={**LAYER_NORM, "mlp_bias": True, "head_bias": True, "gated": False, "parallel": "one norm"},
        layers=Layers(interleaved=True, dim_field="rotary_dim", count_field="n_layer"),
        absent=("head_dim", "num_kv_heads"),
        model_names={
            "embedding": "transformer.wte.weight",
            "norm": "transformer.ln_f.weight",
            "norm_bias": "transformer.ln_f.bias",
            "head": "lm_head.weight",
            "head_bias": "lm_head.bias",
        },
        layer_names={
            "attention_norm": "ln_1.weight",
            "attention_norm_bias": "ln_1.bias",
            "wq": "attn.q_proj.weight",
            "wk": "attn.k_proj.weight",
            "wv": "attn.v_proj.weight",
            "wo": "attn.out_proj.weight",
            "w_up": "mlp.fc_in.weight",
            "b_up": "mlp.fc_in.bias",
            "w_down": "mlp.fc_out.weight",
            "b_down": "mlp.fc_out.bias",
        },
        layers_at="transformer.h",
        ignored=("attn.bias", "attn.masked_bias"),
    ),
    **FAMILIES_OF_EXPERTS,
}

UNSUPPORTED = {name: reason for reason, names in MISSING.items() for name in names.split()}
