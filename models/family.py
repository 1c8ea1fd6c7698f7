"""What a family of models is: how its `config.json` becomes a `Config` and comes from one, and its tensors' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import fields as parts_of
from typing import Any

from .config import Config, Experts, Latent
from .fields import Field, Fields, Layers, activation, as_tuple, inverse, one_or_list
from .names import EXPERTS, LAYER, MODEL, Names

Values = dict[str, Any]

SHARED = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "intermediate_size"),
    Field("num_attention_heads", "num_heads"),
    Field("num_key_value_heads", "num_kv_heads", lambda fields: fields["num_attention_heads"]),
    Field("head_dim", "head_dim", lambda fields: fields["hidden_size"] // fields["num_attention_heads"]),
    Field("max_position_embeddings", "max_seq_len", 2048),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("tie_word_embeddings", "tie_embeddings", False),
    Field("bos_token_id", "begin_token", None),
    Field("eos_token_id", "end_tokens", (), as_tuple, one_or_list),
    Field("pad_token_id", "pad_token", None),
    activation("hidden_act"),
)


ATTENTION_BIAS = (Field("attention_bias", "qkv_bias", False), Field("attention_bias", "out_bias", False))
MLP_BIAS = (Field("mlp_bias", "mlp_bias", False),)
GRANITE_FIELDS = (
    Field("embedding_multiplier", "embedding_scale", 1.0),
    Field("attention_multiplier", "attention_scale", 1.0),
    Field("residual_multiplier", "residual_scale", 1.0),
    Field("logits_scaling", "logit_scale", 1.0, lambda divisor: 1 / divisor, inverse),
    *ATTENTION_BIAS,
)


@dataclass(frozen=True)
class Family:
    """What the checkpoints of a family have in common.

    Attributes:
        architecture: the class of transformers.
        fields: of config.json, beside or in place of `SHARED`.
        facts: what is so of every model of it, by the name in `Config`.
        layers: how config.json says what differs from layer to layer.
        derive: what follows from other values, given all of these and the fields.
        beside: the fields that `derive` reads.
        absent: of `SHARED`, what its config.json does not have; heads then share the width, and have keys each.
        fixed: fields that must have these values, since the model has not what others ask for.
        model_names: of the parameters around the layers.
        layer_names: of those in a layer.
        expert_names: in place of some of these, in a layer with experts.
        layers_at: where the layers are.
        ignored: ends of the names of tensors that are not needed.
    """

    architecture: str
    fields: tuple[Field, ...] = ()
    facts: Values = field(default_factory=dict)
    layers: Layers = field(default_factory=Layers)
    derive: Callable[[Values, Fields], Values] | None = None
    beside: Callable[[Config], Values] | None = None
    absent: tuple[str, ...] = ()
    fixed: Values = field(default_factory=dict)
    model_names: Names = field(default_factory=lambda: MODEL)
    layer_names: Names = field(default_factory=lambda: LAYER)
    expert_names: Names = field(default_factory=lambda: EXPERTS)
    layers_at: str = "model.layers"
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def all_fields(self) -> list[Field]:
        """Its fields of config.json, those of `SHARED` that it does not have otherwise first."""
        own = {each.here for each in self.fields} | set(self.facts) | set(self.absent)
        return [each for each in SHARED if each.here not in own] + list(self.fields)


def read_config(fields: Fields, family: str | None = None) -> Config:
    """The Config of a config.json, read as its own family or as another. Raises ValueError."""
    from .families import FAMILIES

    name = fields.get("model_type") if family is None else family
    inner = fields.get("text_config") or {}
    if name not in FAMILIES and inner.get("model_type") in FAMILIES:  # with pictures or sound, of which text is a part
        return read_config(inner, family)
    if name not in FAMILIES:
        raise ValueError(_refusal("model_type" if family is None else "family", name))
    entry = FAMILIES[name]
    for there, wanted in entry.fixed.items():
        if fields.get(there) not in (None, wanted):
            raise ValueError(f"{there}: got {fields[there]!r}; of {name!r} supported is {wanted!r}")
    values: Values = {each.here: each.value(fields) for each in entry.all_fields()}
    values |= entry.facts
    values.setdefault("head_dim", values["hidden_size"] // values["num_heads"])
    values.setdefault("num_kv_heads", values["num_heads"])
    values["layers"] = entry.layers.read(fields, values.get("latent.rope_dim") or values["head_dim"])
    if entry.derive:
        values |= entry.derive(values, fields)
    experts, latent = _part(values, "experts."), _part(values, "latent.")
    plain = {here: value for here, value in values.items() if "." not in here}
    sparse = any(layer.experts for layer in values["layers"])
    return Config(
        **plain,
        family=name,
        experts=Experts(**experts) if sparse else None,
        latent=Latent(**latent) if latent else None,
    )


def write_config(config: Config) -> dict[str, Any]:
    """The fields of a config.json that `read_config` and transformers read back. Raises ValueError."""
    from .families import FAMILIES

    if config.family not in FAMILIES:
        raise ValueError(f"family: got {config.family!r}; it must be one of {', '.join(FAMILIES)}")
    entry = FAMILIES[config.family]
    fields: dict[str, Any] = {"architectures": [entry.architecture], "model_type": config.family, **entry.fixed}
    for each in entry.all_fields():
        known, value = _get(config, each.here)
        if known:
            fields[each.there] = each.write(value)
    if entry.beside:
        fields |= entry.beside(config)
    fields |= entry.layers.write(config, config.latent.rope_dim if config.latent else config.head_dim)
    again = read_config(fields)
    if again != config:
        odd = [part.name for part in parts_of(config) if getattr(again, part.name) != getattr(config, part.name)]
        told = "; ".join(f"{name} is {getattr(config, name)}, not {getattr(again, name)}" for name in odd)
        raise ValueError(f"family: the config.json of {config.family!r} cannot say this model: {told}")
    return fields


def _part(values: Values, start: str) -> Values:
    return {here.removeprefix(start): value for here, value in values.items() if here.startswith(start)}


def _get(config: Config, here: str) -> tuple[bool, Any]:
    """Whether the config has that part, and its value."""
    *part, name = here.split(".")
    owner = getattr(config, part[0]) if part else config
    return owner is not None, getattr(owner, name, None)


def _refusal(argument: str, name: Any) -> str:
    """Why a family is none of these, and what can be done."""
    from .families import FAMILIES, UNSUPPORTED

    if name in UNSUPPORTED:
        return f"{argument}: got {name!r}, which `load` does not read: {UNSUPPORTED[name]}"
    return (
        f"{argument}: got {name!r}; known are {', '.join(FAMILIES)}. If its layers and the names of its tensors are "
        "those of one of these, say so: family='llama' of `load` reads a checkpoint as Llama"
    )
