"""The transformer, one definition of all families for NumPy, torch and JAX.

Pure functions over a tree of parameters; matrices are `[in, out]`, so a projection is `x @ w`. `shapes` lists those of
any config, and what a family does not have is not in its tree. Llama's is

    embedding       [vocab, hidden]
    layers[i]       attention_norm [hidden], wq [hidden, heads * dim], wk and wv [hidden, kv_heads * dim],
                    wo [heads * dim, hidden], mlp_norm [hidden], w_gate and w_up [hidden, inner], w_down [inner, hidden]
    norm            [hidden]
    head            [hidden, vocab], absent where the embedding is tied

All that costs is an op of crosstile's, so `with crosstile.use(...)` runs the model through any of its kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import crosstile
from crosstile.routing import load_balancing_loss, route

from .arrays import (
    Array,
    Tree,
    arange,
    cast,
    dtype_name,
    from_numpy,
    like,
    namespace,
    take,
    tree_map_with_path,
    write,
)
from .config import Config, Latent, Layer
from .mlp import Mixture, dense, mixture
from .positions import turn
from .shapes import is_matrix, shapes
from .stacking import Run, is_stacked, scan
from .targets import IGNORED, within_documents


def init(config: Config, seed: int = 0, framework: str = "torch", dtype: str = "float32", device: Any = None) -> Tree:
    """Random parameters, drawn by NumPy: the same numbers in every framework.

    Matrices are normal with deviation 0.02, those that write to the residual stream smaller by `sqrt(2 * num_layers)`;
    norms leave rows as they are, biases and sinks are 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> Array:
        name = path.rpartition(".")[2]
        if is_matrix(name) or name == "embedding":
            scale = (2 * config.num_layers) ** -0.5 if name.endswith(("wo", "w_down")) else 1.0
            array = np.float32(0.02 * scale) * rng.standard_normal(shape, np.float32)
        else:
            array = np.full(shape, float(name.endswith("norm") and not config.zero_centered_norms), np.float32)
        return from_numpy(array, framework, dtype, device)

    return tree_map_with_path(draw, shapes(config))


def quantize(params: Tree, dtype: str, **options: Any) -> Tree:
    """The parameters with the matrices of every layer in 8 or 4 bits, to generate with: see `crosstile.quantize`.

    The embedding, the head, the norms, the biases and the routers stay as they are. Such matrices have no gradient.
    """

    def layer(weights: Tree) -> Tree:
        return {
            name: crosstile.quantize(array, dtype, **options) if quantizable(name) else array
            for name, array in weights.items()
        }

    return {**params, "layers": [layer(weights) for weights in params["layers"]]}


def quantizable(name: str) -> bool:
    """Whether `quantize` takes that parameter of a layer."""
    return is_matrix(name) and "router" not in name


def forward(params: Tree, tokens: Array, config: Config) -> Array:
    """The logits of the token after each: tokens int `[batch, seq]` -> float32 `[batch, seq, vocab]`."""
    x, _ = last_layer(params, tokens, config)
    return logits(params, x, config)


def loss(
    params: Tree,
    tokens: Array,
    config: Config,
    *,
    segments: Array | None = None,
    z_loss: float = 0.0,
    run: Run | None = None,
) -> Array:
    """Mean cross-entropy in nats of tokens `[batch, seq + 1]`, each predicted from those before it.

    Args:
        params: the tree.
        tokens: int `[batch, seq + 1]`.
        config: of the model.
        segments: int `[batch, seq + 1]`, the document of each token, which sees and is predicted from its own alone; 0
            is padding, which nothing sees and nobody predicts. None is one document a row.
        z_loss: the weight of the mean square of the logsumexp (PaLM, arXiv:2204.02311, section 5).
        run: how a layer is run: see `last_layer`.
    """
    targets = cast(like(tokens[:, 1:], params["embedding"]), "int32")
    if segments is not None:
        segments = like(segments, params["embedding"])
        targets, segments = within_documents(targets, segments), segments[:, :-1]
    return loss_of_targets(params, tokens[:, :-1], targets, config, segments=segments, z_loss=z_loss, run=run)


def loss_of_targets(
    params: Tree,
    tokens: Array,
    targets: Array,
    config: Config,
    *,
    positions: Array | None = None,
    segments: Array | None = None,
    z_loss: float = 0.0,
    run: Run | None = None,
) -> Array:
    """The same of tokens and what follows each, int `[batch, seq]`; `IGNORED` is not counted.

    With experts, `config.experts.loss` times what is least where every expert takes as many tokens is added. positions
    int `[seq]` are those of the tokens, where they do not lie in their order.
    """
    x, routers = last_layer(params, tokens, config, positions=positions, segments=segments, run=run)
    hidden, head = before_logits(params, x, config)
    if "head_bias" in params:  # as one more input that is 1
        xp = namespace(x)
        hidden = xp.concatenate([hidden, xp.ones_like(hidden[..., :1])], -1)
        head = xp.concatenate([head, params["head_bias"][:, None]], -1)
    options: dict[str, Any] = {"ignore_index": IGNORED, "softcap": config.logit_softcap, "z_loss": z_loss}
    result = crosstile.linear_cross_entropy(hidden, head, targets, **options)
    if not (routers and config.experts and config.experts.loss):
        return result
    chosen = namespace(x).concatenate(routers)
    _, experts = route(chosen, config.experts.per_token)
    return result + config.experts.loss * load_balancing_loss(chosen, experts)


def last_layer(
    params: Tree,
    tokens: Array,
    config: Config,
    *,
    positions: Array | None = None,
    segments: Array | None = None,
    run: Run | None = None,
) -> tuple[Array, list[Array]]:
    """What the last layer writes, `[batch, seq, hidden]`, and the logits of each layer's router, if it has one.

    `run` is called in the place of `block`, with its arguments: to compute a layer again in the backward, to say where
    its result lies, or as a module of torch. Layers of JAX may be stacked: see `stacking`.
    """
    x, routers, run = embed(params, tokens, config), [], run or block
    positions = arange(tokens.shape[1], x) if positions is None else positions
    long = config.is_long(tokens.shape[1])
    if is_stacked(params["layers"], config):
        return scan(run, params["layers"], x, config, positions, segments, long)
    for weights, layer in zip(params["layers"], config.layers, strict=True):
        x, router = run(weights, x, layer, config, positions, segments, long)
        routers += [] if router is None else [router]
    return x, routers


def block(
    weights: Tree,
    x: Array,
    layer: Layer,
    config: Config,
    positions: Array,
    segments: Array | None,
    long: bool,
    experts: Mixture = mixture,
) -> tuple[Array, Array | None]:
    """One layer: what it makes of the stream x `[batch, seq, hidden]`, and its router's logits, if it has one."""
    h = norm(weights, "attention_norm", x, config)
    q, k, v = queries_keys_values(weights, layer, h, positions, long, config)
    heads = crosstile.attention(q, k, v, segment_ids=segments, **scores(weights, layer, config))
    return after_attention(weights, layer, x, h, heads, config, experts)


def make_cache(params: Tree, config: Config, batch: int, size: int) -> Tree:
    """Keys and values of `size` positions for each layer, zeros: `[batch, kv_heads, size, head_dim]` and `v_dim`.

    A head's keys lie together, as kernels read them. Latent attention keeps the keys and values of all heads, not the
    narrow vectors that they come from.
    """
    embedding = params["embedding"]

    def zeros(dim: int) -> Array:
        whole = like(np.zeros((batch, config.num_kv_heads, size, dim), np.float32), embedding)
        return namespace(embedding).zeros_like(cast(whole, dtype_name(embedding)))

    return [{"k": zeros(config.head_dim), "v": zeros(config.v_dim)} for _ in range(config.num_layers)]


def extend(
    params: Tree, tokens: Array, config: Config, cache: Tree, position: Any, long: bool = False, only: Any = None
) -> tuple[Array, Tree]:
    """Append tokens `[batch, length]` at `position`: the logits after each, and the cache with their keys and values.

    `position` is an int, or a traced scalar of JAX when length is 1. Positions before it must have been written;
    NumPy and torch write the cache in place. `long` is `config.is_long` of the whole. `only`: the number of
    the one token whose logits are wanted, `[batch, 1, vocab]`.
    """
    x = embed(params, tokens, config)
    positions = arange(tokens.shape[1], x) + position
    extended = []
    for weights, layer, past in zip(params["layers"], config.layers, cache, strict=True):
        h = norm(weights, "attention_norm", x, config)
        q, k, v = queries_keys_values(weights, layer, h, positions, long, config)
        past = {"k": write(past["k"], k, position), "v": write(past["v"], v, position)}
        heads = attend_cached(q, past["k"], past["v"], position, scores(weights, layer, config))
        x, _ = after_attention(weights, layer, x, h, heads, config)
        extended.append(past)
    return logits(params, x if only is None else x[:, only][:, None], config), extended


def attend_cached(q: Array, k: Array, v: Array, position: Any, options: dict[str, Any]) -> Array:
    """Attention of q `[batch, length, heads, head_dim]`, at `position`, over a cache written up to its end."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if isinstance(position, int):
        end = position + q.shape[1]
        return crosstile.attention(q, k[:, :end], v[:, :end], **options)
    seen = namespace(q).broadcast_to(position + q.shape[1], (q.shape[0],))  # its shape must not follow its value
    return crosstile.attention(q, k, v, kv_lengths=seen, **options)


def embed(params: Tree, tokens: Array, config: Config) -> Array:
    """The rows of the embedding, times `embedding_scale` in their dtype."""
    x = take(params["embedding"], tokens)
    if config.embedding_scale is None:
        return x
    return x * cast(like(np.float32(config.embedding_scale), x), dtype_name(x))


def queries_keys_values(
    weights: Tree, layer: Layer, h: Array, positions: Array, long: bool, config: Config
) -> tuple[Array, Array, Array]:
    """`[batch, seq, heads, dim]` each, the queries and keys normalised in some families, and turned."""
    if config.latent:
        return latent_queries_keys_values(weights, layer, h, positions, long, config, config.latent)

    def heads(name: str) -> Array:
        out = crosstile.matmul(h, weights[f"w{name}"], bias=weights.get(f"b{name}"))
        if config.qk_norm == "whole":
            out = norm(weights, f"{name}_norm", out, config)
        out = out.reshape(*h.shape[:2], -1, config.head_dim)
        return norm(weights, f"{name}_norm", out, config) if config.qk_norm == "head" else out

    q, k, v = heads("q"), heads("k"), heads("v")
    if layer.rotary:
        q, k = turn((q, k), positions, layer.rotary, long)
    if config.qk_norm == "head after rotary":
        q, k = norm(weights, "q_norm", q, config), norm(weights, "k_norm", k, config)
    return q, k, v


def latent_queries_keys_values(
    weights: Tree, layer: Layer, h: Array, positions: Array, long: bool, config: Config, latent: Latent
) -> tuple[Array, Array, Array]:
    """The same from narrow vectors; of a head the last `rope_dim` elements know positions, in a key those of all."""
    xp = namespace(h)
    if latent.q_rank:
        narrow = crosstile.matmul(h, weights["wq_down"], bias=weights.get("bq_down"))
        q = crosstile.matmul(norm(weights, "q_latent_norm", narrow, config, latent.norm_eps), weights["wq_up"])
    else:
        q = crosstile.matmul(h, weights["wq"])
    q = q.reshape(*h.shape[:2], config.num_heads, config.head_dim)
    both = crosstile.matmul(h, weights["wkv_down"], bias=weights.get("bkv_down"))
    narrow = norm(weights, "kv_latent_norm", both[..., : latent.kv_rank], config, latent.norm_eps)
    kv = crosstile.matmul(narrow, weights["wkv_up"]).reshape(*h.shape[:2], config.num_heads, -1)
    q_turned, k_turned = q[..., latent.nope_dim :], both[..., None, latent.kv_rank :]
    if layer.rotary:
        q_turned, k_turned = turn((q_turned, k_turned), positions, layer.rotary, long)
    k_turned = xp.broadcast_to(k_turned, q_turned.shape)
    q = xp.concatenate([q[..., : latent.nope_dim], q_turned], -1)
    k = xp.concatenate([kv[..., : latent.nope_dim], k_turned], -1)
    return q, k, kv[..., latent.nope_dim :]


def scores(weights: Tree, layer: Layer, config: Config) -> dict[str, Any]:
    """How attention scores, as the op's arguments."""
    return {
        "causal": True,
        "window": None if layer.window is None else (layer.window - 1, 0),
        "scale": config.attention_scale,
        "softcap": config.softcap,
        "sinks": weights.get("sinks"),
    }


def after_attention(
    weights: Tree, layer: Layer, x: Array, h: Array, heads: Array, config: Config, experts: Mixture = mixture
) -> tuple[Array, Array | None]:
    """The stream x with `heads @ wo` added, and then the MLP's result; and the router's logits, if it has one."""
    plain = not config.post_norm and config.residual_scale is None
    heads = heads.reshape(*x.shape[:2], -1)
    out = crosstile.matmul(heads, weights["wo"], bias=weights.get("bo"), residual=x if plain else None)
    y = out if plain else added(x, out, weights, "post_attention_norm", config)
    if config.parallel != "one norm":
        h = norm(weights, "mlp_norm", x if config.parallel else y, config)
    if layer.experts and config.experts:
        out, router = experts(weights, h, config, config.experts)
        return added(y, out, weights, "post_mlp_norm", config), router
    out = dense(weights, h, config, residual=y if plain else None)
    return (out if plain else added(y, out, weights, "post_mlp_norm", config)), None


def added(x: Array, out: Array, weights: Tree, post_norm: str, config: Config) -> Array:
    """`x + residual_scale * norm(out)`, where the family has these."""
    out = norm(weights, post_norm, out, config)
    return x + (out if config.residual_scale is None else config.residual_scale * out)


def logits(params: Tree, x: Array, config: Config) -> Array:
    """`norm(x) @ head` in float32, scaled and capped."""
    hidden, head = before_logits(params, x, config)
    out = crosstile.matmul(hidden, head.T, bias=params.get("head_bias"), out_dtype="float32")
    cap = config.logit_softcap
    return out if cap is None else cap * namespace(out).tanh(out / cap)


def before_logits(params: Tree, x: Array, config: Config) -> tuple[Array, Array]:
    """The rows `[batch, seq, hidden]` and the head `[vocab, hidden]` whose product the logits are."""
    hidden = norm(params, "norm", x, config)
    hidden = hidden if config.logit_scale is None else hidden * config.logit_scale
    return hidden, params["embedding"] if config.tie_embeddings else params["head"].T


def norm(weights: Tree, name: str, x: Array, config: Config, eps: float | None = None) -> Array:
    """`x / sqrt(mean(x^2) + eps) * weight`, or a layer norm; x itself where the family has no norm there."""
    if name not in weights:
        return x
    weight, eps = weights[name], config.norm_eps if eps is None else eps
    if config.norm == "rms":
        return crosstile.rms_norm(x, weight, eps=eps, zero_centered=config.zero_centered_norms)
    weight = weight + 1 if config.zero_centered_norms else weight
    return crosstile.layer_norm(x, weight, weights.get(f"{name}_bias"), eps=eps)
