"""The parameters of a model: their names, their shapes, and how many there are.

Matrices are `[in, out]`, so a projection is `x @ w`.
"""

from __future__ import annotations

from math import prod

from .arrays import Tree, tree_leaves
from .config import Config, Experts, Latent, Layer

Shapes = dict[str, tuple[int, ...]]
OF_EXPERTS = ("w_gate", "w_up", "w_down")


def shapes(config: Config) -> Tree:
    """The shape of each parameter, in their tree."""
    hidden = config.hidden_size
    tree: Tree = {
        "embedding": (config.vocab_size, hidden),
        "layers": [_layer(config, layer) for layer in config.layers],
        **_norm(config, "norm", hidden),
    }
    if not config.tie_embeddings:
        tree["head"] = (hidden, config.vocab_size)
    if config.head_bias:
        tree["head_bias"] = (config.vocab_size,)
    return tree


def is_matrix(name: str) -> bool:
    """Whether a parameter of that name is one that rows are multiplied by; its last two dimensions are in and out."""
    return name.startswith(("w", "shared_w", "router", "shared_router", "head")) and not name.endswith("_bias")


def count(config: Config) -> int:
    """The number of all weights."""
    return sum(prod(shape) for shape in tree_leaves(shapes(config)).values())


def products_per_token(config: Config) -> float:
    """The weights that a token is multiplied with on its way: of the experts those that take it."""
    tree = shapes(config)
    total = float(config.hidden_size * config.vocab_size)
    for layer, arrays in zip(config.layers, tree["layers"], strict=True):
        for name, shape in arrays.items():
            if is_matrix(name):
                share = config.experts.per_token / config.experts.count if config.experts and layer.experts else 1
                total += prod(shape) * (share if name in OF_EXPERTS else 1)
    return total


def _layer(config: Config, layer: Layer) -> Shapes:
    hidden = config.hidden_size
    found: Shapes = {}
    if config.pre_norm:
        found |= _norm(config, "attention_norm", hidden)
    found |= _latent(config, config.latent) if config.latent else _heads(config)
    found["wo"] = (config.num_heads * config.v_dim, hidden)
    if config.out_bias:
        found["bo"] = (hidden,)
    if config.sinks:
        found["sinks"] = (config.num_heads,)
    if config.post_norm:
        found |= _norm(config, "post_attention_norm", hidden)
    if config.pre_norm and config.parallel != "one norm":
        found |= _norm(config, "mlp_norm", hidden)
    found |= _experts(config, config.experts) if config.experts and layer.experts else _mlp(config)
    if config.post_norm:
        found |= _norm(config, "post_mlp_norm", hidden)
    return found


def _norm(config: Config, name: str, width: int) -> Shapes:
    return {name: (width,), **({f"{name}_bias": (width,)} if config.norm_bias else {})}


def _heads(config: Config) -> Shapes:
    widths = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    found: Shapes = {}
    for name, heads in widths.items():
        width = heads * config.head_dim
        found[f"w{name}"] = (config.hidden_size, width)
        if config.qkv_bias:
            found[f"b{name}"] = (width,)
        if config.qk_norm and name != "v":
            found[f"{name}_norm"] = (width if config.qk_norm == "whole" else config.head_dim,)
    return found


def _latent(config: Config, latent: Latent) -> Shapes:
    hidden, q_width = config.hidden_size, config.num_heads * config.head_dim
    found: Shapes = {"wq": (hidden, q_width)}
    if latent.q_rank:
        found = {
            "wq_down": (hidden, latent.q_rank),
            "q_latent_norm": (latent.q_rank,),
            "wq_up": (latent.q_rank, q_width),
        }
    found |= {
        "wkv_down": (hidden, latent.kv_rank + latent.rope_dim),
        "kv_latent_norm": (latent.kv_rank,),
        "wkv_up": (latent.kv_rank, config.num_heads * (latent.nope_dim + latent.v_dim)),
    }
    biased = [name for name in ("wq_down", "wkv_down") if config.qkv_bias and name in found]
    return found | {f"b{name[1:]}": found[name][1:] for name in biased}


def _mlp(config: Config) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    widths = {**({"gate": inner} if config.gated else {}), "up": inner, "down": hidden}
    found: Shapes = {}
    for name, width in widths.items():
        found[f"w_{name}"] = (inner if name == "down" else hidden, width)
        if config.mlp_bias:
            found[f"b_{name}"] = (width,)
    return found


def _experts(config: Config, experts: Experts) -> Shapes:
    hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.count
    found: Shapes = {"router": (hidden, count)}
    if experts.router_bias:
        found["router_bias"] = (count,)
    if experts.correction:
        found["correction_bias"] = (count,)
    found |= {"w_gate": (count, hidden, inner), "w_up": (count, hidden, inner), "w_down": (count, inner, hidden)}
    if experts.bias:
        found |= {"b_gate": (count, inner), "b_up": (count, inner), "b_down": (count, hidden)}
    if experts.shared_size:
        width = experts.shared_size
        found |= {"shared_w_gate": (hidden, width), "shared_w_up": (hidden, width), "shared_w_down": (width, hidden)}
    if experts.shared_gate:
        found["shared_router"] = (hidden, 1)
    return found
