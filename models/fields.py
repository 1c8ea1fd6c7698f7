"""How the fields of a Hugging Face `config.json` become parts of a `Config`, and how these become fields again.

`Field` is one of them; layers and rotary positions, which families spell in a few ways, have functions by the name of
the way. `families` says which family has which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import log, sqrt
from typing import Any

from crosstile.kernels.rotary.spec import LinearScaling, Llama3Scaling, YarnScaling, scaling_from

from .config import Config, Layer, LongRopeScaling, Rotary, Scaling

Fields = Mapping[str, Any]
REQUIRED = object()
SLIDING, FULL = "sliding_attention", "full_attention"
_KINDS = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn", LongRopeScaling: "longrope"}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def same(value: Any) -> Any:
    """The value itself."""
    return value


def inverse(scale: float | None) -> float | None:
    """The divisor of a scale that was read from one."""
    return None if scale is None else round(1 / scale, 9)


def inverse_square(scale: float | None) -> int | None:
    """The whole number whose root divides."""
    return None if scale is None else round(scale**-2)


def as_tuple(ids: Any) -> tuple[int, ...]:
    """One number or a list of them."""
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def one_or_list(ids: tuple[int, ...]) -> Any:
    """None, one number, or a list."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


@dataclass(frozen=True)
class Field:
    """A field of config.json and what it says.

    Attributes:
        there: its name there.
        here: of `Config`, or of a part of it: "experts.count".
        default: where config.json lacks it or has null; a function of the fields, or REQUIRED.
        read: what it becomes here.
        write: the other way.
    """

    there: str
    here: str
    default: Any = REQUIRED
    read: Callable[[Any], Any] = same
    write: Callable[[Any], Any] = same

    def value(self, fields: Fields) -> Any:
        """What the fields say for Config. Raises ValueError where nothing does."""
        found = fields.get(self.there)
        if found is None and self.default is REQUIRED:
            raise ValueError(f"config.json: the field {self.there!r} is missing; every checkpoint of the family has it")
        try:
            if found is None:
                found = self.default(fields) if callable(self.default) else self.default
        except KeyError as missing:
            raise ValueError(f"config.json: the field {missing} is missing, and so is {self.there!r}") from None
        return self.read(found)


def activation(there: str, default: Any = "silu", **meanings: str) -> Field:
    """The activation of the MLP under that name; meanings are what some names mean in this family alone."""

    def read(name: str) -> str:
        if name in meanings:
            return meanings[name]
        if name not in _ACTIVATIONS:
            raise ValueError(f"{there}: got {name!r}; supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    return Field(there, "activation", default, read, _activation_there)


def _activation_there(name: str) -> str:
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name


def number(fields: Fields, name: str) -> int:
    """A count that must be there."""
    return int(Field(name, "").value(fields))


# ---- The layers: which have windows, which have experts, which know positions


@dataclass(frozen=True)
class Layers:
    """How a family's config.json says what differs from layer to layer.

    Attributes:
        windows: "none"; "all" have `sliding_window`; or those that are "typed" so in `layer_types`.
        types: the layer_types of a config.json without: a function of its fields.
        flag: a field that must be true for `sliding_window` to count.
        rotary: "one" for all, one by layer type ("typed"), on those with a window alone ("windowed"), or where
            `no_rope_layers` is 1 ("listed").
        theta: the default base; where rotary is typed, of the full layers.
        local_theta: that of the layers with a window, where rotary is typed.
        partial: the default share of a head that is turned.
        interleaved: whether pairs are neighbours.
        theta_field: another name of `rope_theta`, as old checkpoints have it.
        partial_field: another name of `partial_rotary_factor`.
        dim_field: of how many elements are turned, where it is not a share.
        experts: "none", "all", those "after" `first_k_dense_replace`, those not "listed" in `mlp_only_layers`, or those
            that are "typed" so in `mlp_layer_types`.
        count_field: the number of layers.
    """

    windows: str = "none"
    types: Callable[[Fields], list[str]] | None = None
    flag: str | None = None
    rotary: str = "one"
    theta: float = 10000.0
    local_theta: float = 10000.0
    partial: float = 1.0
    interleaved: bool = False
    theta_field: str = "rope_theta"
    partial_field: str = "partial_rotary_factor"
    dim_field: str = ""
    experts: str = "none"
    count_field: str = "num_hidden_layers"

    def read(self, fields: Fields, head_dim: int) -> tuple[Layer, ...]:
        """The layers of a config.json; head_dim is what rotary positions turn."""
        count = number(fields, self.count_field)
        types = self._types(fields, count)
        windows = [fields.get("sliding_window") if name == SLIDING else None for name in types]
        rotaries = {name: self._rotary(fields, name, head_dim) for name in set(types)}
        knows = self._knowing(fields, types)
        experts = self._experts(fields, count)
        return tuple(
            Layer(windows[index], rotaries[types[index]] if knows[index] else None, experts[index])
            for index in range(count)
        )

    def write(self, config: Config, head_dim: int) -> dict[str, Any]:
        """The fields that `read` reads."""
        layers = config.layers
        fields: dict[str, Any] = {self.count_field: len(layers)}
        types = [FULL if layer.window is None else SLIDING for layer in layers]
        if self.windows != "none":
            windows = [layer.window for layer in layers if layer.window is not None]
            fields["sliding_window"] = windows[0] if windows else None
        if self.flag:
            fields[self.flag] = SLIDING in types
        if self.windows == "typed":
            fields["layer_types"] = types
        rotaries = {name: layer.rotary for name, layer in zip(types, layers, strict=True) if layer.rotary is not None}
        written = {name: write_rotary(rotary, head_dim) for name, rotary in rotaries.items()}
        if self.rotary == "typed":
            fields["rope_parameters"] = written
        elif written:
            fields["rope_parameters"] = next(iter(written.values()))
        for rotary in rotaries.values():
            if isinstance(rotary.scaling, LongRopeScaling):  # Phi-3 looks for it here first
                fields["original_max_position_embeddings"] = rotary.scaling.original_max_position_embeddings
        if self.rotary == "listed":
            fields["no_rope_layers"] = [int(layer.rotary is not None) for layer in layers]
        if self.dim_field:
            fields[self.dim_field] = next((rotary.dim or head_dim for rotary in rotaries.values()), head_dim)
        dense = [index for index, layer in enumerate(layers) if not layer.experts]
        if self.experts == "after":
            fields["first_k_dense_replace"] = len(dense)
        if self.experts == "listed":
            fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        if self.experts == "typed":
            fields["mlp_layer_types"] = ["sparse" if layer.experts else "dense" for layer in layers]
        return fields

    def _types(self, fields: Fields, count: int) -> list[str]:
        unused = self.flag is not None and not fields.get(self.flag)
        if self.windows == "none" or unused or (fields.get("sliding_window") is None and self.rotary != "typed"):
            return [FULL] * count
        if self.windows == "all":
            return [SLIDING] * count
        found = fields.get("layer_types")
        found = self.types(fields) if found is None and self.types else found
        if found is None or len(found) != count or not set(found) <= {SLIDING, FULL}:
            raise ValueError(f"layer_types: got {found}; it must name each of {count} layers {SLIDING!r} or {FULL!r}")
        return list(found)

    def _rotary(self, fields: Fields, layer_type: str, head_dim: int) -> Rotary | None:
        parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if self.rotary == "typed":
            if layer_type in parameters:
                parameters = parameters[layer_type]
            elif layer_type == SLIDING:  # of before transformers 5, where the scaling was of the full layers alone
                parameters = {"rope_theta": fields.get("rope_local_base_freq", self.local_theta)}
        partial = parameters.get("partial_rotary_factor") or fields.get(self.partial_field) or self.partial
        dim = fields.get(self.dim_field) or int(head_dim * partial)
        return Rotary(
            theta=float(parameters.get("rope_theta") or fields.get(self.theta_field) or self.theta),
            scaling=read_scaling(parameters, fields),
            dim=None if dim == head_dim else dim,
            interleaved=self.interleaved,
        )

    def _knowing(self, fields: Fields, types: list[str]) -> list[bool]:
        """Which layers know positions."""
        if self.rotary == "windowed":
            return [name == SLIDING for name in types] if SLIDING in types else [True] * len(types)
        if self.rotary == "listed":
            interval = fields.get("no_rope_layer_interval", 4)
            default = [(index + 1) % interval != 0 for index in range(len(types))]
            return [bool(flag) for flag in fields.get("no_rope_layers") or default]
        return [True] * len(types)

    def _experts(self, fields: Fields, count: int) -> list[bool]:
        if self.experts == "after":
            return [index >= fields.get("first_k_dense_replace", 0) for index in range(count)]
        if self.experts == "listed":
            dense, step = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step", 1)
            return [index not in dense and (index + 1) % step == 0 for index in range(count)]
        if self.experts == "typed":
            types = fields.get("mlp_layer_types") or ["dense"] + ["sparse"] * (count - 1)
            return [name == "sparse" for name in types]
        return [self.experts == "all"] * count


def alternating(period: int, first_full: bool = False) -> Callable[[Fields], list[str]]:
    """Layer types where each period's last layer is full, or its first; a config.json may say another period."""

    def types(fields: Fields) -> list[str]:
        every = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or period
        full = 0 if first_full else every - 1
        return [FULL if index % every == full else SLIDING for index in range(number(fields, "num_hidden_layers"))]

    return types


def windows_of_qwen(fields: Fields) -> list[str]:
    """Layer types of Qwen before layer_types: none has a window unless `use_sliding_window`, then the last ones."""
    first = fields.get("max_window_layers", 28) if fields.get("use_sliding_window") else None
    count = number(fields, "num_hidden_layers")
    return [SLIDING if first is not None and index >= first else FULL for index in range(count)]


# ---- Rotary positions


def read_scaling(parameters: Fields, fields: Fields) -> Scaling | None:
    """How the frequencies are stretched, from `rope_parameters` or the older `rope_scaling`."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in ("default", "linear"):
        return scaling_from(parameters)
    longest = fields.get("max_position_embeddings", 2048)
    original = fields.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = original or longest
    factor = parameters.get("factor") or longest / original
    if kind not in ("longrope", "su"):
        return scaling_from({**parameters, "original_max_position_embeddings": original, "factor": factor})
    for name in ("short_factor", "long_factor"):
        if not parameters.get(name):
            raise ValueError(f"scaling: a rope_type of {kind!r} must also give {name}")
    default = 1.0 if factor <= 1 else sqrt(1 + log(factor) / log(original))
    return LongRopeScaling(
        short_factor=tuple(parameters["short_factor"]),
        long_factor=tuple(parameters["long_factor"]),
        original_max_position_embeddings=original,
        attention_factor=float(parameters.get("attention_factor") or default),
    )


def write_rotary(rotary: Rotary, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 has them."""
    scaling = rotary.scaling
    fields: dict[str, Any] = {"rope_theta": rotary.theta, "rope_type": "default"}
    if scaling is not None:
        fields |= {"rope_type": _KINDS[type(scaling)], **asdict(scaling)}
    if rotary.dim is not None:
        fields["partial_rotary_factor"] = rotary.dim / head_dim
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
