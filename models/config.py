"""The shape of a transformer of the Llama or Mixtral family, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crosstile.kernels.rotary.spec import LinearScaling, Llama3Scaling, YarnScaling, scaling_from

Scaling = LinearScaling | Llama3Scaling | YarnScaling
SUPPORTED = ("llama", "mixtral")
_SCALINGS = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}


@dataclass(frozen=True)
class Config:
    """A transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Llama), or experts of it (Mixtral).

    Attributes:
        vocab_size: of the tokens; ids are 0 to vocab_size - 1.
        hidden_size: the width of the residual stream.
        intermediate_size: the width inside the MLP, or inside each expert.
        num_layers: blocks of attention and MLP.
        num_heads: of the queries; a multiple of num_kv_heads.
        num_kv_heads: of the keys and values.
        head_dim: of each head, even; num_heads * head_dim need not be hidden_size.
        max_seq_len: the longest sequence that the positions are meant for.
        rope_theta: the base of the rotary frequencies.
        rope_scaling: None, or how the frequencies are stretched: see `crosstile.rotary`.
        rms_norm_eps: added to the mean square before its root.
        tie_embeddings: whether the head is the transposed embedding.
        num_experts: of each layer; 0 is one MLP for all tokens.
        experts_per_token: how many of them take a token.
        router_loss: the weight of the experts' balance in the training loss.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 2
    router_loss: float = 0.0

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_seq_len",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; it must be at least 1")
        if self.num_layers < 0:
            raise ValueError(f"num_layers: got {self.num_layers}; it must not be negative")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}; it must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}; it must be even, rotary positions turn it in pairs")
        if self.num_experts < 0:
            raise ValueError(f"num_experts: got {self.num_experts}; it must not be negative (0 is a model without)")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token: got {self.experts_per_token}; it must be from 1 to num_experts {self.num_experts}"
            )

    @classmethod
    def demo(cls) -> Config:
        """A model of bytes that a laptop trains in a minute."""
        return cls(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            max_seq_len=512,
            tie_embeddings=True,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Config:
        """Read `config.json` of a Llama or Mixtral checkpoint in the Hugging Face layout.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: another family, or an option of these that this model does not have.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint is a folder with config.json and *.safetensors"
            )
        return cls.from_hugging_face(json.loads(path.read_text("utf-8")))

    @classmethod
    def from_hugging_face(cls, fields: dict[str, Any]) -> Config:
        """The same from the parsed fields of a config.json."""
        family = fields.get("model_type")
        if family not in SUPPORTED:
            raise ValueError(
                f"model_type: got {family!r}; supported are {', '.join(SUPPORTED)} (Llama 1 to 3, and their kin)"
            )
        _refuse_unknown_options(fields)
        try:
            heads = fields["num_attention_heads"]
            rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
            return cls(
                vocab_size=fields["vocab_size"],
                hidden_size=fields["hidden_size"],
                intermediate_size=fields["intermediate_size"],
                num_layers=fields["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=fields.get("num_key_value_heads") or heads,
                head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
                max_seq_len=fields.get("max_position_embeddings", 2048),
                rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
                rope_scaling=scaling_from(rope),
                rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
                tie_embeddings=fields.get("tie_word_embeddings", False),
                **(_experts(fields) if family == "mixtral" else {}),
            )
        except KeyError as missing:
            raise ValueError(f"config.json: the field {missing} is missing; every checkpoint has it") from None

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a config.json that `from_hugging_face` and the transformers library read back."""
        fields: dict[str, Any] = {
            "architectures": ["MixtralForCausalLM" if self.num_experts else "LlamaForCausalLM"],
            "model_type": "mixtral" if self.num_experts else "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
        }
        if self.num_experts:
            fields |= {
                "num_local_experts": self.num_experts,
                "num_experts_per_tok": self.experts_per_token,
                "router_aux_loss_coef": self.router_loss,
                "sliding_window": None,
            }
        else:
            fields |= {"attention_bias": False, "mlp_bias": False}
        if self.rope_scaling is not None:
            fields["rope_scaling"] = {"rope_type": _SCALINGS[type(self.rope_scaling)], **asdict(self.rope_scaling)}
        return fields

    @property
    def num_params(self) -> int:
        """Of all weights, the embedding counted once where it is tied."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self._layer_params * self.num_layers + self.hidden_size * (2 * self.num_layers + 1)

    @property
    def _layer_params(self) -> int:
        return self._layer_products(self.num_experts)

    def _layer_products(self, experts: int) -> int:
        """The weights of a layer's matrices with that many experts; 0 is one MLP without a router."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        mlp = 3 * self.intermediate_size * max(experts, 1) + self.num_experts
        return self.hidden_size * (heads * self.head_dim + mlp)

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of one training token, forward and backward: the matrix products, a multiply and an add each.

        Three times the forward (the backward is two products for each); attention counts the half of the square that
        causality leaves. Looking up an embedding costs nothing, the head does. Of the experts those that take it count.
        """
        used = min(self.num_experts, self.experts_per_token)
        weights = self._layer_products(used) * self.num_layers + self.hidden_size * self.vocab_size
        attention = 2 * self.num_layers * self.num_heads * self.head_dim * (seq_len + 1) / 2
        return 3 * 2 * (weights + attention)


def _experts(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": fields["num_local_experts"],
        "experts_per_token": fields["num_experts_per_tok"],
        "router_loss": fields.get("router_aux_loss_coef", 0.001),
    }


def _refuse_unknown_options(fields: dict[str, Any]) -> None:
    """Options of these families that would change the result, and that this model does not have."""
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
    for name, value in wanted.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name}: got {fields[name]!r}; supported is {value!r}")
