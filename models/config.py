"""The shape of a transformer of the Llama family, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SUPPORTED = ("llama",)


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch their rotary frequencies to a longer context than they were trained on.

    Attributes:
        factor: wavelengths longer than the original context are stretched by it.
        low_freq_factor: a wavelength above `original_max_seq_len / low_freq_factor` is stretched whole.
        high_freq_factor: a wavelength below `original_max_seq_len / high_freq_factor` is left as it is.
        original_max_seq_len: the context that the model was trained on first.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True)
class Config:
    """A transformer of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
        vocab_size: of the tokens; ids are 0 to vocab_size - 1.
        hidden_size: the width of the residual stream.
        intermediate_size: the width inside the MLP.
        num_layers: blocks of attention and MLP.
        num_heads: of the queries; a multiple of num_kv_heads.
        num_kv_heads: of the keys and values.
        head_dim: of each head, even; num_heads * head_dim need not be hidden_size.
        max_seq_len: the longest sequence that the positions are meant for.
        rope_theta: the base of the rotary frequencies.
        rope_scaling: None, or the stretching of Llama 3.1.
        rms_norm_eps: added to the mean square before its root.
        tie_embeddings: whether the head is the transposed embedding.
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
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False

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
        """Read `config.json` of a Llama checkpoint in the Hugging Face layout.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: another family, or an option of Llama that this model does not have.
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
                f"model_type: got {family!r}; supported is {', '.join(SUPPORTED)} (Llama 1 to 3 and its kin)"
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
                rope_scaling=_rope_scaling(rope),
                rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
                tie_embeddings=fields.get("tie_word_embeddings", False),
            )
        except KeyError as missing:
            raise ValueError(f"config.json: the field {missing} is missing; every Llama checkpoint has it") from None

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a config.json that `from_hugging_face` and the transformers library read back."""
        fields: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
            "attention_bias": False,
            "mlp_bias": False,
        }
        if self.rope_scaling is not None:
            scaling = asdict(self.rope_scaling)
            scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
            fields["rope_scaling"] = {"rope_type": "llama3", **scaling}
        return fields

    @property
    def num_params(self) -> int:
        """Of all weights, the embedding counted once where it is tied."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self._layer_params * self.num_layers + self.hidden_size * (2 * self.num_layers + 1)

    @property
    def _layer_params(self) -> int:
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of one training token, forward and backward: the matrix products, a multiply and an add each.

        Three times the forward (the backward is two products for each); attention counts the half of the square that
        causality leaves. Looking up an embedding costs nothing, the head does.
        """
        weights = self._layer_params * self.num_layers + self.hidden_size * self.vocab_size
        attention = 2 * self.num_layers * self.num_heads * self.head_dim * (seq_len + 1) / 2
        return 3 * 2 * (weights + attention)


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_scaling: got the type {kind!r}; supported are default and llama3")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_seq_len=int(rope["original_max_position_embeddings"]),
    )


def _refuse_unknown_options(fields: dict[str, Any]) -> None:
    """Options of Llama's config that would change the result, and that this model does not have."""
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in wanted.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name}: got {fields[name]!r}; supported is {value!r}")
