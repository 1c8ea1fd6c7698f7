"""A transformer of the Llama and Mixtral families, one definition for NumPy, torch and JAX.

Pure functions over a tree of parameters; matrices are `[in, out]`, so a projection is `x @ w`:

    embedding       [vocab, hidden]
    layers[i]       attention_norm [hidden], wq [hidden, heads * dim], wk and wv [hidden, kv_heads * dim],
                    wo [heads * dim, hidden], mlp_norm [hidden], w_gate and w_up [hidden, inner], w_down [inner, hidden]
                    (with experts also router [hidden, experts], and w_gate, w_up and w_down lead with `experts`)
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
    framework_of,
    from_numpy,
    like,
    logsumexp,
    namespace,
    take,
    tree_map_with_path,
    write,
)
from .config import Config


def shapes(config: Config) -> Tree:
    """The shape of each parameter, in their tree."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    experts = (config.num_experts,) if config.num_experts else ()
    layer = {
        "attention_norm": (hidden,),
        "wq": (hidden, q_width),
        "wk": (hidden, kv_width),
        "wv": (hidden, kv_width),
        "wo": (q_width, hidden),
        "mlp_norm": (hidden,),
        "w_gate": (*experts, hidden, inner),
        "w_up": (*experts, hidden, inner),
        "w_down": (*experts, inner, hidden),
    }
    if experts:
        layer["router"] = (hidden, *experts)
    tree = {
        "embedding": (config.vocab_size, hidden),
        "layers": [dict(layer) for _ in range(config.num_layers)],
        "norm": (hidden,),
    }
    return tree if config.tie_embeddings else {**tree, "head": (hidden, config.vocab_size)}


def init(config: Config, seed: int = 0, framework: str = "torch", dtype: str = "float32", device: Any = None) -> Tree:
    """Random parameters, drawn by NumPy: the same numbers in every framework.

    Matrices are normal with deviation 0.02, those that write to the residual stream smaller by `sqrt(2 * num_layers)`.
    """
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> Array:
        if path.endswith("norm"):
            array = np.ones(shape, np.float32)
        else:
            scale = (2 * config.num_layers) ** -0.5 if path.endswith(("wo", "w_down")) else 1.0
            array = np.float32(0.02 * scale) * rng.standard_normal(shape, np.float32)
        return from_numpy(array, framework, dtype, device)

    return tree_map_with_path(draw, shapes(config))


def quantize(params: Tree, dtype: str, **options: Any) -> Tree:
    """The parameters with the matrices of every layer in 8 or 4 bits, to generate with: see `crosstile.quantize`.

    The embedding, the head, the norms and the routers stay as they are. Such matrices have no gradient.
    """

    def layer(arrays: Tree) -> Tree:
        kept = ("attention_norm", "mlp_norm", "router")
        return {
            name: array if name in kept else crosstile.quantize(array, dtype, **options)
            for name, array in arrays.items()
        }

    return {**params, "layers": [layer(arrays) for arrays in params["layers"]]}


def forward(params: Tree, tokens: Array, config: Config) -> Array:
    """The logits of the token after each: tokens int `[batch, seq]` -> float32 `[batch, seq, vocab]`."""
    x, _ = last_layer(params, tokens, config)
    return logits(params, x, config)


def loss(params: Tree, tokens: Array, config: Config) -> Array:
    """Mean cross-entropy in nats of tokens `[batch, seq + 1]`, each predicted from those before it.

    With experts, `config.router_loss` times what is least where every expert takes as many tokens is added.
    """
    x, routers = last_layer(params, tokens[:, :-1], config)
    head = params["embedding"] if config.tie_embeddings else params["head"].T
    targets = like(tokens[:, 1:], x)
    result = crosstile.linear_cross_entropy(norm(x, params["norm"], config), head, targets)
    if not (routers and config.router_loss):
        return result
    chosen = namespace(x).concatenate(routers)
    _, experts = route(chosen, config.experts_per_token)
    return result + config.router_loss * load_balancing_loss(chosen, experts)


def last_layer(params: Tree, tokens: Array, config: Config) -> tuple[Array, list[Array]]:
    """What the last layer writes, `[batch, seq, hidden]`, and the logits of each layer's router, if it has one."""
    x, routers = take(params["embedding"], tokens), []
    positions = arange(tokens.shape[1], x)
    for layer in params["layers"]:
        q, k, v = queries_keys_values(layer, x, positions, config)
        x = attention_output(layer, x, crosstile.attention(q, k, v, causal=True))
        x, router = mlp(layer, x, config)
        routers += [] if router is None else [router]
    return x, routers


def make_cache(params: Tree, config: Config, batch: int, size: int) -> Tree:
    """Keys and values of `size` positions for each layer, zeros: `[batch, size, kv_heads, head_dim]`."""
    embedding = params["embedding"]
    shape = (batch, size, config.num_kv_heads, config.head_dim)
    zeros = like(np.zeros(shape, np.float32), embedding)
    copy = namespace(embedding).zeros_like
    zeros = cast(zeros, dtype_name(embedding))
    return [{"k": copy(zeros), "v": copy(zeros)} for _ in range(config.num_layers)]


def extend(params: Tree, tokens: Array, config: Config, cache: Tree, position: Any) -> tuple[Array, Tree]:
    """Append tokens `[batch, length]` at `position`: the logits after each, and the cache with their keys and values.

    `position` is an int, or a traced scalar of JAX when length is 1. Positions before it must have been written;
    NumPy and torch write the cache in place.
    """
    x = take(params["embedding"], tokens)
    positions = arange(tokens.shape[1], x) + position
    extended = []
    for layer, past in zip(params["layers"], cache, strict=True):
        q, k, v = queries_keys_values(layer, x, positions, config)
        past = {"k": write(past["k"], k, position), "v": write(past["v"], v, position)}
        x = attention_output(layer, x, attend_cached(q, past["k"], past["v"], position))
        x, _ = mlp(layer, x, config)
        extended.append(past)
    return logits(params, x, config), extended


def queries_keys_values(layer: Tree, x: Array, positions: Array, config: Config) -> tuple[Array, Array, Array]:
    """`[batch, seq, heads, head_dim]` each, the queries and keys turned by their positions."""
    h = norm(x, layer["attention_norm"], config)
    q, k, v = (
        crosstile.matmul(h, layer[name]).reshape(*x.shape[:2], -1, config.head_dim) for name in ("wq", "wk", "wv")
    )
    q, k = crosstile.rotary((q, k), positions, base=config.rope_theta, scaling=config.rope_scaling)
    return q, k, v


def attention_output(layer: Tree, x: Array, heads: Array) -> Array:
    """`x + heads @ wo`: the heads mixed and added to the residual stream."""
    return crosstile.matmul(heads.reshape(*x.shape[:2], -1), layer["wo"], residual=x)


def mlp(layer: Tree, x: Array, config: Config) -> tuple[Array, Array | None]:
    """SwiGLU: `x + (silu(h @ w_gate) * (h @ w_up)) @ w_down`, with `h = norm(x)`, and None.

    Where there are experts each token passes through those that its router chooses, and the router's logits
    `[batch * seq, experts]` take the place of None.
    """
    h = norm(x, layer["mlp_norm"], config)
    if not config.num_experts:
        gated = gate(h, layer["w_gate"], layer["w_up"])
        return crosstile.matmul(gated, layer["w_down"], residual=x), None
    weights = (layer[name] for name in ("router", "w_gate", "w_up", "w_down"))
    mixed, router = crosstile.moe(h, *weights, top_k=config.experts_per_token, return_logits=True)
    return x + mixed, router


def gate(h: Array, w_gate: Any, w_up: Any) -> Array:
    """`silu(h @ w_gate) * (h @ w_up)`."""
    if isinstance(w_gate, crosstile.Quantized):
        return crosstile.matmul(h, w_gate, activation="silu") * crosstile.matmul(h, w_up)
    return crosstile.glu_matmul(h, w_gate, w_up)


def logits(params: Tree, x: Array, config: Config) -> Array:
    """`norm(x) @ head` in float32."""
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return crosstile.matmul(norm(x, params["norm"], config), head, out_dtype="float32")


def norm(x: Array, weight: Array, config: Config) -> Array:
    """`x / sqrt(mean(x^2) + eps) * weight`."""
    return crosstile.rms_norm(x, weight, eps=config.rms_norm_eps)


CHUNK = 32  # keys that one partial result of `attend_chunks` covers


def attend_cached(q: Array, k: Array, v: Array, position: Any) -> Array:
    """Causal attention of q `[batch, length, heads, head_dim]`, at `position`, over a cache written up to its end."""
    if framework_of(q) == "jax" and not isinstance(position, int):
        return attend_chunks(q, k, v, position)
    end = position + q.shape[1]
    return crosstile.attention(q, k[:, :end], v[:, :end], causal=True)


def attend_chunks(q: Array, k: Array, v: Array, position: Array) -> Array:
    """The same for one query and a `position` that is known only when the program runs, with every shape fixed.

    The cache is cut into chunks. In a causal square over one chunk, row i is what the query sees if the chunk ends
    after key i; so each chunk's row is picked by `position`, and the chunks are joined by their logsumexp
    (the split of Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
    """
    xp = namespace(q)
    batch, size, kv_heads, _ = k.shape
    chunk = CHUNK if size % CHUNK == 0 else size
    count = size // chunk
    k, v = (array.reshape(batch * count, chunk, kv_heads, -1) for array in (k, v))
    rows = xp.broadcast_to(q[:, None], (batch, count, chunk, *q.shape[2:])).reshape(-1, chunk, *q.shape[2:])
    out, lse = crosstile.attention(rows, k, v, causal=True, return_lse=True)

    last = position - chunk * xp.arange(count)  # the last key seen, counted within each chunk
    row = xp.clip(last, 0, chunk - 1)
    out = out.reshape(batch, count, chunk, *out.shape[2:])[:, xp.arange(count), row]
    lse = lse.reshape(batch, count, -1, chunk)[:, xp.arange(count), :, row].swapaxes(0, 1)
    lse = xp.where((last >= 0)[:, None], lse, -xp.inf)
    weights = xp.exp(lse - logsumexp(lse.swapaxes(1, 2))[:, None])[..., None]
    return cast((weights * cast(out, "float32")).sum(1)[:, None], dtype_name(q))
