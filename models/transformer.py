"""A transformer of the Llama family, one definition for NumPy, torch and JAX.

Pure functions over a tree of parameters; matrices are `[in, out]`, so a projection is `x @ w`:

    embedding       [vocab, hidden]
    layers[i]       attention_norm [hidden], wq [hidden, heads * dim], wk and wv [hidden, kv_heads * dim],
                    wo [heads * dim, hidden], mlp_norm [hidden], w_gate and w_up [hidden, inner], w_down [inner, hidden]
    norm            [hidden]
    head            [hidden, vocab], absent where the embedding is tied

Matrix products and attention are crosstile's, so `with crosstile.use(...)` runs the model through any of its kernels.
"""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np

import crosstile

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
    take_along_last,
    tree_map_with_path,
    write,
)
from .config import Config


def shapes(config: Config) -> Tree:
    """The shape of each parameter, in their tree."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "attention_norm": (hidden,),
        "wq": (hidden, q_width),
        "wk": (hidden, kv_width),
        "wv": (hidden, kv_width),
        "wo": (q_width, hidden),
        "mlp_norm": (hidden,),
        "w_gate": (hidden, inner),
        "w_up": (hidden, inner),
        "w_down": (inner, hidden),
    }
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


def forward(params: Tree, tokens: Array, config: Config) -> Array:
    """The logits of the token after each: tokens int `[batch, seq]` -> float32 `[batch, seq, vocab]`."""
    x = take(params["embedding"], tokens)
    angles = rotary_angles(arange(tokens.shape[1], x), config)
    for layer in params["layers"]:
        q, k, v = queries_keys_values(layer, x, angles, config)
        x = attention_output(layer, x, crosstile.attention(q, k, v, causal=True))
        x = mlp(layer, x, config)
    return logits(params, x, config)


def loss(params: Tree, tokens: Array, config: Config) -> Array:
    """Mean cross-entropy in nats of tokens `[batch, seq + 1]`, each predicted from those before it."""
    predicted, targets = forward(params, tokens[:, :-1], config), tokens[:, 1:]
    return (logsumexp(predicted) - take_along_last(predicted, targets)).mean()


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
    angles = rotary_angles(arange(tokens.shape[1], x) + position, config)
    extended = []
    for layer, past in zip(params["layers"], cache, strict=True):
        q, k, v = queries_keys_values(layer, x, angles, config)
        past = {"k": write(past["k"], k, position), "v": write(past["v"], v, position)}
        x = attention_output(layer, x, attend_cached(q, past["k"], past["v"], position))
        x = mlp(layer, x, config)
        extended.append(past)
    return logits(params, x, config), extended


def queries_keys_values(layer: Tree, x: Array, angles: Array, config: Config) -> tuple[Array, Array, Array]:
    """`[batch, seq, heads, head_dim]` each, the queries and keys turned by their positions."""
    h = rms_norm(x, layer["attention_norm"], config.rms_norm_eps)
    q, k, v = (
        crosstile.matmul(h, layer[name]).reshape(*x.shape[:2], -1, config.head_dim) for name in ("wq", "wk", "wv")
    )
    return rotary(q, angles), rotary(k, angles), v


def attention_output(layer: Tree, x: Array, heads: Array) -> Array:
    """`x + heads @ wo`: the heads mixed and added to the residual stream."""
    return crosstile.matmul(heads.reshape(*x.shape[:2], -1), layer["wo"], residual=x)


def mlp(layer: Tree, x: Array, config: Config) -> Array:
    """SwiGLU: `x + (silu(h @ w_gate) * (h @ w_up)) @ w_down`, with `h = norm(x)`."""
    h = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
    gated = crosstile.matmul(h, layer["w_gate"], activation="silu") * crosstile.matmul(h, layer["w_up"])
    return crosstile.matmul(gated, layer["w_down"], residual=x)


def logits(params: Tree, x: Array, config: Config) -> Array:
    """`norm(x) @ head` in float32."""
    h = rms_norm(x, params["norm"], config.rms_norm_eps)
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return crosstile.matmul(h, head, out_dtype="float32")


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps) * weight`, the norm in float32."""
    wide = cast(x, "float32")
    scale = ((wide * wide).mean(axis=-1, keepdims=True) + eps) ** -0.5
    return cast(wide * scale, dtype_name(x)) * weight


def rotary(x: Array, angles: Array) -> Array:
    """Turn x `[batch, seq, heads, head_dim]` by angles `[seq, head_dim / 2]`.

    Pair i is the dimensions i and i + head_dim / 2.
    """
    xp = namespace(x)
    cos, sin = xp.cos(angles)[:, None, :], xp.sin(angles)[:, None, :]
    half = x.shape[-1] // 2
    left, right = cast(x[..., :half], "float32"), cast(x[..., half:], "float32")
    turned = xp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return cast(turned, dtype_name(x))


def rotary_angles(positions: Array, config: Config) -> Array:
    """`position / theta^(2i / head_dim)` for int positions `[seq]`: float32 `[seq, head_dim / 2]`."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_seq_len * frequencies / (2 * pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return cast(positions, "float32")[:, None] * like(frequencies.astype(np.float32), positions)


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
