"""The families with experts, and those with latent attention."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

from crosstile.kernels.rotary.spec import YarnScaling

from .config import Config
from .family import ATTENTION_BIAS, GRANITE_FIELDS, MLP_BIAS, Family, Values
from .fields import Field, Fields, Layers, alternating
from .names import EXPERTS, EXPERTS_OF_MIXTRAL, LATENT, LAYER, POST_NORMS, Stored, named

LATENT_FIELDS = (
    Field("kv_lora_rank", "latent.kv_rank"),
    Field("q_lora_rank", "latent.q_rank", None),
    Field("qk_nope_head_dim", "latent.nope_dim"),
    Field("qk_rope_head_dim", "latent.rope_dim"),
    Field("v_head_dim", "latent.v_dim"),
    *ATTENTION_BIAS,
)
QWEN_FIELDS = (
    Field("num_experts", "experts.count", lambda fields: fields["num_local_experts"]),
    Field("num_experts_per_tok", "experts.per_token"),
    Field("moe_intermediate_size", "experts.intermediate_size"),
    Field("norm_topk_prob", "experts.normalize", False),
    Field("router_aux_loss_coef", "experts.loss", 0.001),
)
OLMO_FIELDS = (
    Field("num_experts", "experts.count"),
    Field("num_experts_per_tok", "experts.per_token"),
    Field("intermediate_size", "experts.intermediate_size"),
    Field("norm_topk_prob", "experts.normalize", False),
    Field("router_aux_loss_coef", "experts.loss", 0.01),
    *ATTENTION_BIAS,
)
MIXTRAL_FIELDS = (
    Field("num_local_experts", "experts.count"),
    Field("num_experts_per_tok", "experts.per_token"),
    Field("intermediate_size", "experts.intermediate_size"),
    Field("router_aux_loss_coef", "experts.loss", 0.001),
)
DEEPSEEK_FIELDS = (
    Field("n_routed_experts", "experts.count"),
    Field("num_experts_per_tok", "experts.per_token"),
    Field("moe_intermediate_size", "experts.intermediate_size"),
    Field("routed_scaling_factor", "experts.scale", 1.0),
    Field("n_group", "experts.groups", 1),
    Field("topk_group", "experts.groups_per_token", 1),
)
SIGMOID = {"experts.score": "sigmoid", "experts.correction": True, "experts.group_score": "sum of two"}
EXPERTS_OF_GRANITE = {
    "router": "block_sparse_moe.router.layer.weight",
    "w_gate w_up": "block_sparse_moe.input_linear.weight",
    "w_down": "block_sparse_moe.output_linear.weight",
    "shared_w_gate shared_w_up": "shared_mlp.input_linear.weight",
    "shared_w_down": "shared_mlp.output_linear.weight",
}


def of_latent(values: Values, fields: Fields) -> Values:
    """Every head has keys of its own; YaRN also sharpens the scores, by `mscale_all_dim`."""
    head_dim = values["latent.nope_dim"] + values["latent.rope_dim"]
    derived: Values = {"head_dim": head_dim, "num_kv_heads": values["num_heads"]}
    rotary = values["layers"][0].rotary if values["layers"] else None
    if rotary and isinstance(rotary.scaling, YarnScaling) and rotary.scaling.mscale_all_dim:
        stretch = rotary.scaling.factor
        sharper = 1.0 if stretch <= 1 else 0.1 * rotary.scaling.mscale_all_dim * log(stretch) + 1
        derived["attention_scale"] = head_dim**-0.5 * sharper * sharper
    return derived


def of_deepseek(values: Values, fields: Fields) -> Values:
    """The shared experts are one, as wide as all; groups count where the method says so."""
    shared = fields.get("n_shared_experts") or 0
    derived: Values = {"experts.shared_size": shared * values["experts.intermediate_size"]}
    if fields.get("topk_method") == "greedy":
        derived |= {"experts.groups": 1, "experts.groups_per_token": 1}
    return derived | (of_latent(values, fields) if "latent.kv_rank" in values else {})


def to_deepseek(config: Config) -> Values:
    """What `of_deepseek` reads."""
    if config.experts is None:
        return {}
    method = "greedy" if config.experts.groups == 1 else "group_limited_greedy"
    return {
        "n_shared_experts": config.experts.shared_size // config.experts.intermediate_size,
        "topk_method": "noaux_tc" if config.experts.correction else method,
    }


def of_exaone(values: Values, fields: Fields) -> Values:
    """The shared experts are one, as wide as all."""
    return {"experts.shared_size": (fields.get("num_shared_experts") or 0) * values["experts.intermediate_size"]}


def to_exaone(config: Config) -> Values:
    """What `of_exaone` reads."""
    experts = config.experts
    return {"num_shared_experts": experts.shared_size // experts.intermediate_size} if experts else {}


def of_minicpm(values: Values, fields: Fields) -> Values:
    """What is added to the stream is scaled by the depth, the logits by the width."""
    return of_latent(values, fields) | {
        "residual_scale": fields.get("scale_depth", 1.4) / sqrt(len(values["layers"])),
        "logit_scale": fields.get("dim_model_base", 256) / values["hidden_size"],
    }


def to_minicpm(config: Config) -> Values:
    """What `of_minicpm` reads."""
    return {
        "scale_depth": round((config.residual_scale or 1.0) * sqrt(config.num_layers), 9),
        "dim_model_base": round((config.logit_scale or 1.0) * config.hidden_size),
    }


DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    (*LATENT_FIELDS, *DEEPSEEK_FIELDS, Field("norm_topk_prob", "experts.normalize", True)),
    facts=SIGMOID,
    layers=Layers(interleaved=True, experts="after"),
    derive=of_deepseek,
    beside=to_deepseek,
    absent=("head_dim",),
    fixed={"rope_interleave": True},
    layer_names=named(LAYER, LATENT),
)

FAMILIES_OF_EXPERTS: dict[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM",
        MIXTRAL_FIELDS,
        layers=Layers(windows="all", experts="all"),
        expert_names=EXPERTS_OF_MIXTRAL,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        (
            *QWEN_FIELDS,
            Field("qkv_bias", "qkv_bias", True),
            Field("shared_expert_intermediate_size", "experts.shared_size", 5632),
        ),
        facts={"experts.shared_gate": True},
        layers=Layers(experts="listed"),
        fixed={"use_sliding_window": False},
        expert_names=named(
            EXPERTS,
            {
                "shared_w_gate": "mlp.shared_expert.gate_proj.weight",
                "shared_w_up": "mlp.shared_expert.up_proj.weight",
                "shared_w_down": "mlp.shared_expert.down_proj.weight",
                "shared_router": "mlp.shared_expert_gate.weight",
            },
        ),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (*ATTENTION_BIAS, *QWEN_FIELDS),
        facts={"qk_norm": "head"},
        layers=Layers(experts="listed"),
        fixed={"use_sliding_window": False},
    ),
    "mellum": Family(
        "MellumForCausalLM",
        (*ATTENTION_BIAS, *QWEN_FIELDS, Field("head_dim", "head_dim", 128)),
        facts={"qk_norm": "head"},
        layers=Layers(windows="typed", types=alternating(1), rotary="typed", theta=500000.0, experts="typed"),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        OLMO_FIELDS,
        facts={"qk_norm": "whole"},
        layers=Layers(experts="all"),
        fixed={"clip_qkv": None},
    ),
    "flex_olmo": Family(
        "FlexOlmoForCausalLM",
        OLMO_FIELDS,
        facts={"pre_norm": False, "post_norm": True, "qk_norm": "whole"},
        layers=Layers(theta=500000.0, experts="all"),
        layer_names=named(LAYER, POST_NORMS),
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        GRANITE_FIELDS + MIXTRAL_FIELDS,
        layers=Layers(experts="all"),
        expert_names=EXPERTS_OF_GRANITE,
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        (*GRANITE_FIELDS, *MIXTRAL_FIELDS, Field("shared_intermediate_size", "experts.shared_size", 0)),
        layers=Layers(experts="all"),
        expert_names=EXPERTS_OF_GRANITE,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        (*MIXTRAL_FIELDS, Field("head_dim", "head_dim", 128)),
        facts={"experts.score": "sigmoid", "experts.correction": True, "qk_norm": "whole"},
        layers=Layers(theta=5e6, dim_field="rotary_dim", experts="all"),
        expert_names=EXPERTS_OF_MIXTRAL,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        (
            *MIXTRAL_FIELDS,
            Field("attention_bias", "qkv_bias", True),
            Field("attention_bias", "out_bias", True),
            Field("swiglu_alpha", "experts.alpha", 1.702),
            Field("swiglu_limit", "experts.limit", 7.0),
        ),
        facts={"sinks": True, "experts.router_bias": True, "experts.bias": True, "experts.gate": "clamped"},
        layers=Layers(windows="typed", types=alternating(2), theta=150000.0, experts="all"),
        expert_names={
            "router": "mlp.router.weight",
            "router_bias": "mlp.router.bias",
            "w_gate w_up": Stored("mlp.experts.gate_up_proj", groups="each", transposed=False),
            "b_gate b_up": Stored("mlp.experts.gate_up_proj_bias", groups="each"),
            "w_down": Stored("mlp.experts.down_proj", transposed=False),
            "b_down": "mlp.experts.down_proj_bias",
        },
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        (
            *DEEPSEEK_FIELDS,
            Field("norm_topk_prob", "experts.normalize", True),
            Field("attention_bias", "qkv_bias", False),
            Field("use_qk_norm", "qk_norm", False, {True: "head", False: None}.get, bool),
        ),
        facts=SIGMOID,
        layers=Layers(partial=0.5, experts="after"),
        derive=of_deepseek,
        beside=to_deepseek,
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        (
            Field("num_experts", "experts.count"),
            *(each for each in DEEPSEEK_FIELDS if each.here != "experts.count"),
            Field("norm_topk_prob", "experts.normalize", True),
        ),
        facts={**SIGMOID, "qk_norm": "head"},
        layers=Layers(windows="typed", types=alternating(4), rotary="windowed", experts="typed"),
        derive=of_exaone,
        beside=to_exaone,
        expert_names=named(EXPERTS, {"correction_bias": "mlp.e_score_correction_bias"}),
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        (*DEEPSEEK_FIELDS, *ATTENTION_BIAS, Field("norm_topk_prob", "experts.normalize", False)),
        facts={**SIGMOID, "qk_norm": "head"},
        layers=Layers(windows="typed", types=alternating(1), experts="after"),
        derive=of_deepseek,
        beside=to_deepseek,
    ),
    "solar_open": Family(
        "SolarOpenForCausalLM",
        (
            *DEEPSEEK_FIELDS,
            Field("attention_bias", "qkv_bias", False),
            Field("norm_topk_prob", "experts.normalize", True),
            Field("head_dim", "head_dim", 128),
            Field("moe_intermediate_size", "intermediate_size"),
        ),
        facts=SIGMOID,
        layers=Layers(theta=1e6, experts="all"),
        derive=of_deepseek,
        beside=to_deepseek,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        (*LATENT_FIELDS, *DEEPSEEK_FIELDS, *MLP_BIAS),
        facts={"experts.normalize": False},
        layers=Layers(interleaved=True, experts="after"),
        derive=of_deepseek,
        beside=to_deepseek,
        absent=("head_dim",),
        layer_names=named(LAYER, LATENT),
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "sarvam_mla": DEEPSEEK_V3,
    "glm4_moe_lite": replace(
        DEEPSEEK_V3, architecture="Glm4MoeLiteForCausalLM", layers=Layers(interleaved=True, experts="typed")
    ),
    "minicpm3": Family(
        "MiniCPM3ForCausalLM",
        (*LATENT_FIELDS, *MLP_BIAS, Field("scale_emb", "embedding_scale", 1)),
        derive=of_minicpm,
        beside=to_minicpm,
        absent=("head_dim",),
        layer_names=named(LAYER, LATENT),
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM",
        (
            *ATTENTION_BIAS,
            Field("num_experts", "experts.count"),
            Field("moe_topk", "experts.per_token"),
            Field("intermediate_size", "experts.intermediate_size"),
            Field("intermediate_size", "experts.shared_size"),
        ),
        facts={"qk_norm": "head after rotary"},
        layers=Layers(experts="all"),
        layer_names=named(
            LAYER, {"q_norm": "self_attn.query_layernorm.weight", "k_norm": "self_attn.key_layernorm.weight"}
        ),
        expert_names=named(
            EXPERTS,
            {
                "router": "mlp.gate.wg.weight",
                "shared_w_gate": "mlp.shared_mlp.gate_proj.weight",
                "shared_w_up": "mlp.shared_mlp.up_proj.weight",
                "shared_w_down": "mlp.shared_mlp.down_proj.weight",
            },
        ),
    ),
    "youtu": Family(
        "YoutuForCausalLM",
        (*LATENT_FIELDS, Field("tie_word_embeddings", "tie_embeddings", True)),
        layers=Layers(interleaved=True),
        derive=of_latent,
        absent=("head_dim",),
        fixed={"rope_interleave": True},
        layer_names=named(LAYER, LATENT),
    ),
}
