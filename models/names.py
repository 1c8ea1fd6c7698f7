"""Where the parameters lie in a checkpoint: the names of its tensors, and which parameters each holds, and how.

There a projection is `[out, in]`, and each expert's is often a tensor of its own; here it is `[in, out]`, those of all
experts in one array. Some families keep several projections in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .arrays import Array, namespace
from .config import Config
from .shapes import is_matrix, shapes

Names = Mapping[str, "str | Stored"]

MODEL: Names = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "norm_bias": "model.norm.bias",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
}
LAYER: Names = {
    "attention_norm": "input_layernorm.weight",
    "attention_norm_bias": "input_layernorm.bias",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "bo": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_norm_bias": "post_attention_layernorm.bias",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}
EXPERTS: Names = {
    "router": "mlp.gate.weight",
    "correction_bias": "mlp.gate.e_score_correction_bias",
    "w_gate": "mlp.experts.{}.gate_proj.weight",
    "w_up": "mlp.experts.{}.up_proj.weight",
    "w_down": "mlp.experts.{}.down_proj.weight",
    "shared_w_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_w_up": "mlp.shared_experts.up_proj.weight",
    "shared_w_down": "mlp.shared_experts.down_proj.weight",
}
EXPERTS_OF_MIXTRAL: Names = {
    "router": "block_sparse_moe.gate.weight",
    "correction_bias": "block_sparse_moe.e_score_correction_bias",
    "w_gate": "block_sparse_moe.experts.{}.w1.weight",
    "w_up": "block_sparse_moe.experts.{}.w3.weight",
    "w_down": "block_sparse_moe.experts.{}.w2.weight",
}
LATENT: Names = {
    "wq_down": "self_attn.q_a_proj.weight",
    "bq_down": "self_attn.q_a_proj.bias",
    "q_latent_norm": "self_attn.q_a_layernorm.weight",
    "wq_up": "self_attn.q_b_proj.weight",
    "wkv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "bkv_down": "self_attn.kv_a_proj_with_mqa.bias",
    "kv_latent_norm": "self_attn.kv_a_layernorm.weight",
    "wkv_up": "self_attn.kv_b_proj.weight",
}
POST_NORMS: Names = {
    "post_attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}


@dataclass(frozen=True)
class Stored:
    """A tensor that does not hold one parameter, or not transposed.

    Attributes:
        name: with {} where each expert has its own.
        groups: of several parameters: None: one after the other along the outputs; "kv_heads": for each of these a
            piece of every parameter; "each": an output of every parameter by turns.
        transposed: whether a matrix is `[out, in]` there.
    """

    name: str
    groups: str | None = None
    transposed: bool = True


@dataclass(frozen=True)
class Place:
    """The tensors in which some parameters of one model lie.

    Attributes:
        names: of the tensors: one, or one for each expert.
        paths: of the parameters, "layers.0.wq", which share each tensor.
        shapes: of the parameters.
        groups: into how many pieces the parameters are cut, which lie by turns.
        transposed: whether the last two dimensions are swapped there.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each tensor in the checkpoint."""
        first = self.shapes[0] if len(self.names) == 1 else self.shapes[0][1:]
        shape = (*first[:-1], sum(shape[-1] for shape in self.shapes))
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def split(self, tensors: Sequence[Array]) -> dict[str, Array]:
        """The parameters that lie in the tensors; or their scales, of which there are fewer rows."""
        arrays = [tensor.swapaxes(-1, -2) if self.transposed else tensor for tensor in tensors]
        whole = arrays[0] if len(arrays) == 1 else namespace(arrays[0]).stack(arrays)
        if len(self.paths) == 1:
            return {self.paths[0]: whole}
        parts = whole.reshape(*whole.shape[:-1], self.groups, -1)
        found, start = {}, 0
        for path, shape in zip(self.paths, self.shapes, strict=True):
            width = shape[-1] // self.groups
            found[path] = parts[..., start : start + width].reshape(*whole.shape[:-1], shape[-1])
            start += width
        return found

    def join(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors, from the parameters by their paths."""
        parts = [arrays[path] for path in self.paths]
        whole = parts[0]
        if len(parts) > 1:
            cut = [part.reshape(*part.shape[:-1], self.groups, -1) for part in parts]
            joined = namespace(whole).concatenate(cut, -1)
            whole = joined.reshape(*whole.shape[:-1], prod(joined.shape[-2:]))
        pieces = [whole] if len(self.names) == 1 else list(whole)
        turned = [piece.swapaxes(-1, -2) if self.transposed else piece for piece in pieces]
        return dict(zip(self.names, turned, strict=True))


def named(base: Names, *changes: Names) -> dict[str, str | Stored]:
    """The names with changes; where several parameters share a tensor ("wq wk wv"), their own names go."""
    found: dict[str, Any] = dict(base)
    for change in changes:
        shared = {part for key in change if " " in key for part in key.split()}
        found = {key: value for key, value in found.items() if key not in shared} | dict(change)
    return found


def places(config: Config) -> list[Place]:
    """All tensors of a checkpoint of that model."""
    from .families import FAMILIES

    family, tree = FAMILIES[config.family], shapes(config)
    model = {name: shape for name, shape in tree.items() if name != "layers"}
    found = _places(config, model, family.model_names, "", "")
    for index, arrays in enumerate(tree["layers"]):
        sparse = config.layers[index].experts
        names = named(family.layer_names, family.expert_names) if sparse else family.layer_names
        found += _places(config, arrays, names, f"{family.layers_at}.{index}.", f"layers.{index}.")
    return found


def _places(config: Config, arrays: Mapping[str, Any], names: Names, there: str, here: str) -> list[Place]:
    """Those of one layer, or of what is around the layers."""
    found = []
    for key, value in names.items():
        parts = tuple(key.split())
        if parts[0] not in arrays:
            continue
        stored = value if isinstance(value, Stored) else Stored(value)
        each = range(config.experts.count) if "{}" in stored.name and config.experts else range(1)
        groups = {None: 1, "kv_heads": config.num_kv_heads, "each": arrays[parts[0]][-1]}[stored.groups]
        found.append(
            Place(
                names=tuple(there + stored.name.format(number) for number in each),
                paths=tuple(here + part for part in parts),
                shapes=tuple(arrays[part] for part in parts),
                groups=groups,
                transposed=stored.transposed and is_matrix(parts[0]),
            )
        )
    unnamed = set(arrays) - {part for key in names for part in key.split()}
    if unnamed:
        raise ValueError(
            f"family: a checkpoint of {config.family!r} has no place for {', '.join(sorted(unnamed))}; "
            "choose a family that has these"
        )
    return found
