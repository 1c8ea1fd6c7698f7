"""The shape of a transformer, as data: `Config`, and the small parts of which it is made.

`families` says how a Hugging Face `config.json` becomes one, and how one becomes a `config.json` again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosstile.kernels.rotary.spec import LinearScaling, Llama3Scaling, YarnScaling

NORMS = ("rms", "layer")
PARALLEL = ("one norm", "two norms")
QK_NORMS = ("head", "whole", "head after rotary")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
GATES = ("glu", "clamped")
GROUP_SCORES = ("max", "sum of two")


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv:2402.13753): each pair's frequency divided by a factor of its own, in two sets.

    Attributes:
        short_factor: of each pair, for sequences of up to `original_max_position_embeddings`.
        long_factor: for longer ones.
        original_max_position_embeddings: the longest sequence of the first training.
        attention_factor: of cos and sin.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float = 1.0


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of a layer.

    Attributes:
        theta: the base of the frequencies.
        scaling: None, or how the frequencies are stretched: see `crosstile.rotary`.
        dim: how many leading elements of a head are turned; None is all.
        interleaved: pairs are neighbours, not the halves' elements.
    """

    theta: float = 10000.0
    scaling: Scaling | None = None
    dim: int | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer.

    Attributes:
        window: how many keys a query sees, its own included; None is all before it.
        rotary: the positions; None is a layer that knows none.
        experts: whether its MLP is the mixture of `Config.experts`.
    """

    window: int | None = None
    rotary: Rotary | None = Rotary()
    experts: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        count: of the experts.
        per_token: how many of them take a token.
        intermediate_size: the width inside each.
        shared_size: the width inside the expert that takes every token; 0 is none.
        shared_gate: whether a sigmoid of its own weighs that expert.
        score: "softmax" or "sigmoid" of the router's logits.
        normalize: whether the weights of a token's experts are divided by their sum.
        scale: multiplies the weights in the end.
        correction: whether scores are chosen, not weighed, with a bias that keeps the experts balanced.
        groups: experts are chosen from the best `groups_per_token` of so many groups; 1 is no groups.
        groups_per_token: how many groups a token's experts come from.
        group_score: of a group: its "max", or the "sum of two" highest.
        router_bias: whether the router has a bias.
        bias: whether the experts' products have.
        gate: "glu", or "clamped" to `limit` as GPT-OSS has it.
        alpha: the clamped gate is `gate * sigmoid(alpha * gate) * (up + 1)`.
        limit: gate is at most this, up within it on both sides.
        loss: the weight of the experts' balance in the training loss.
    """

    count: int
    per_token: int
    intermediate_size: int
    shared_size: int = 0
    shared_gate: bool = False
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_score: str = "max"
    router_bias: bool = False
    bias: bool = False
    gate: str = "glu"
    alpha: float = 1.702
    limit: float = 7.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self, "count", "intermediate_size", "groups")
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"experts.per_token: got {self.per_token}; it must be from 1 to count {self.count}")
        if self.count % self.groups:
            raise ValueError(f"experts.groups: got {self.groups}; count {self.count} must be a multiple of it")
        if not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(
                f"experts.groups_per_token: got {self.groups_per_token}; it must be from 1 to groups {self.groups}"
            )
        if self.per_token > self.groups_per_token * (self.count // self.groups):
            raise ValueError(
                f"experts.per_token: got {self.per_token}; {self.groups_per_token} of {self.groups} groups have only "
                f"{self.groups_per_token * (self.count // self.groups)} experts"
            )
        if self.bias and self.gate != "clamped":
            raise ValueError("experts.bias: got True; experts with a bias have the clamped gate alone")
        _check_choices("experts.", self, score=("softmax", "sigmoid"), gate=GATES, group_score=GROUP_SCORES)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): queries, keys and values from narrow vectors.

    Attributes:
        kv_rank: the width of what keys and values come from.
        q_rank: that of the queries; None makes them from the hidden state.
        nope_dim: of a query's and a key's head, the elements without positions, which come first.
        rope_dim: those with; a key's are the same for all heads.
        v_dim: of a value's head.
        norm_eps: of the norms of the narrow vectors.
    """

    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_sizes(self, "kv_rank", "nope_dim", "rope_dim", "v_dim")


@dataclass(frozen=True)
class Config:
    """A transformer: norms, rotary positions, grouped-query attention, and an MLP or experts in each layer.

    Attributes:
        vocab_size: of the tokens; ids are 0 to vocab_size - 1.
        hidden_size: the width of the residual stream.
        intermediate_size: the width inside the MLP of a layer without experts.
        num_heads: of the queries; a multiple of num_kv_heads.
        num_kv_heads: of the keys and values.
        head_dim: of each head; num_heads * head_dim need not be hidden_size.
        layers: of each layer what may differ; their number is that of the layers.
        family: the entry of `families.FAMILIES` as which `save` writes it.
        max_seq_len: the longest sequence that the positions are meant for.
        norm: "rms" or "layer".
        norm_eps: added to the mean square, or the variance, before its root.
        norm_bias: whether layer norms have a bias.
        zero_centered_norms: whether rows are scaled by 1 + weight.
        pre_norm: whether attention and MLP read a normalised stream.
        post_norm: whether their results are normalised before they are added to it.
        parallel: None: the MLP reads what attention has added to. Or both read the same stream, through "one norm" or
            "two norms".
        qk_norm: None, or queries and keys are normalised, each "head", the "whole" of all, or each "head after rotary".
        qkv_bias: whether queries, keys and values have a bias.
        out_bias: whether attention's last product has one.
        mlp_bias: whether the MLP's products have.
        head_bias: whether the logits have.
        activation: "silu", "gelu", "gelu_tanh" or "relu"; without a gate also "relu2", the square of relu.
        gated: whether the MLP is `(activation(h @ w_gate) * (h @ w_up)) @ w_down`, else it is
            `activation(h @ w_up) @ w_down`.
        attention_scale: of the scores; None is `1 / sqrt(head_dim)`.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them.
        sinks: whether each head has a logit that takes attention and gives nothing.
        embedding_scale: multiplies the embeddings; None does not.
        residual_scale: multiplies what is added to the stream; None does not.
        logit_scale: multiplies the logits; None does not.
        logit_softcap: caps them, after that; None leaves them.
        tie_embeddings: whether the head is the transposed embedding.
        begin_token: with which a text begins, or None.
        end_tokens: with any of which it ends.
        pad_token: that stands for nothing, or None.
        experts: of the layers that have them.
        latent: None, or attention's heads come from narrow vectors.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    family: str = "llama"
    max_seq_len: int = 2048
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    zero_centered_norms: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    parallel: str | None = None
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    attention_scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    embedding_scale: float | None = None
    residual_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    begin_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    experts: Experts | None = None
    latent: Latent | None = None

    def __post_init__(self) -> None:
        _check_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_seq_len",
        )
        _check_choices("", self, norm=NORMS, parallel=(None, *PARALLEL), qk_norm=(None, *QK_NORMS))
        _check_choices("", self, activation=ACTIVATIONS[:-1] if self.gated else ACTIVATIONS)
        if self.latent and self.head_dim != self.latent.nope_dim + self.latent.rope_dim:
            raise ValueError(
                f"head_dim: got {self.head_dim}; latent attention makes it nope_dim + rope_dim, "
                f"{self.latent.nope_dim + self.latent.rope_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}; it must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.experts is None and any(layer.experts for layer in self.layers):
            raise ValueError("experts: got None; a layer has experts, so say how many and how wide: Experts(...)")
        for layer in self.layers:
            if layer.rotary is not None:
                self._check_rotary(layer.rotary)
            if layer.window is not None and layer.window < 1:
                raise ValueError(f"layers: got a window of {layer.window}; it must be at least 1, the token itself")

    def _check_rotary(self, rotary: Rotary) -> None:
        whole = self.latent.rope_dim if self.latent else self.head_dim
        if rotary.dim is None and whole % 2:
            raise ValueError(f"head_dim: got {whole}; it must be even, rotary positions turn it in pairs")
        dim = rotary.dim or whole
        if rotary.dim is not None and (dim % 2 or not 2 <= dim <= whole):
            raise ValueError(f"rotary.dim: got {dim}; it must be even, and from 2 to head_dim {whole}")
        if isinstance(rotary.scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                factors = getattr(rotary.scaling, name)
                if len(factors) != dim // 2:
                    raise ValueError(f"{name}: got {len(factors)} numbers; it must have {dim // 2}, one for each pair")

    @classmethod
    def demo(cls) -> Config:
        """A model of bytes that a laptop trains in a minute."""
        return cls(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            layers=(Layer(),) * 4,
            max_seq_len=512,
            tie_embeddings=True,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, family: str | None = None) -> Config:
        """Read `config.json` of a checkpoint in the Hugging Face layout.

        Args:
            folder: where it lies.
            family: read it as this one, whatever its model_type says.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: another family, or an option of these that this model does not have.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint is a folder with config.json and *.safetensors"
            )
        return cls.from_hugging_face(json.loads(path.read_text("utf-8")), family)

    @classmethod
    def from_hugging_face(cls, fields: dict[str, Any], family: str | None = None) -> Config:
        """The same from the parsed fields of a config.json."""
        from .family import read_config

        return read_config(fields, family)

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a config.json that `from_hugging_face` and the transformers library read back.

        Raises:
            ValueError: the family's config.json cannot say all of it.
        """
        from .family import write_config

        return write_config(self)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def v_dim(self) -> int:
        """The width of a value's head."""
        return self.latent.v_dim if self.latent else self.head_dim

    def is_long(self, length: int) -> bool:
        """Whether a sequence of that length takes LongRoPE's long factors."""
        scalings = {layer.rotary.scaling for layer in self.layers if layer.rotary}
        long = [scaling for scaling in scalings if isinstance(scaling, LongRopeScaling)]
        return any(length > scaling.original_max_position_embeddings for scaling in long)

    @property
    def num_params(self) -> int:
        """Of all weights, the embedding counted once where it is tied."""
        from .shapes import count

        return count(self)

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of one training token, forward and backward: the matrix products, a multiply and an add each.

        Three times the forward (the backward is two products for each); attention counts the keys that causality and
        the window leave. Looking up an embedding costs nothing, the head does. Of the experts those that take it count.
        """
        from .shapes import products_per_token

        pairs = 0.0  # keys that a query sees, on average, in all layers
        for layer in self.layers:
            seen = min(layer.window or seq_len, seq_len)
            pairs += (seen * (seen + 1) / 2 + (seq_len - seen) * seen) / seq_len
        attention = self.num_heads * (self.head_dim + self.v_dim) * pairs
        return 3 * 2 * (products_per_token(self) + attention)


def _check_sizes(part: Any, *names: str) -> None:
    for name in names:
        if getattr(part, name) < 1:
            raise ValueError(f"{name}: got {getattr(part, name)}; it must be at least 1")


def _check_choices(start: str, part: Any, **choices: tuple[Any, ...]) -> None:
    for name, known in choices.items():
        if getattr(part, name) not in known:
            raise ValueError(
                f"{start}{name}: got {getattr(part, name)!r}; it must be one of {', '.join(map(repr, known))}"
            )
