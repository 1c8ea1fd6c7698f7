"""The second half of a layer: an MLP for all tokens, or experts of which a router chooses a few for each.

The experts stand on crosstile's grouped products; around them are the ways in which families choose and weigh them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crosstile
from crosstile.routing import permute, route, unpermute

from .arrays import Array, Tree, arange, cast, dtype_name, namespace, pick, sigmoid, softmax, take, top_k
from .config import Config, Experts

Mixture = Callable[..., tuple[Array, Array]]  # `mixture`, or what is called in its place with its arguments


def dense(weights: Tree, h: Array, config: Config, residual: Array | None = None, start: str = "") -> Array:
    """`(activation(h @ w_gate) * (h @ w_up)) @ w_down + residual`, or without the gate `activation(h @ w_up)`."""
    w = {name.removeprefix(start): array for name, array in weights.items() if name.startswith(start)}
    if config.gated:
        inner = gate(h, w["w_gate"], w["w_up"], config.activation, w.get("b_gate"), w.get("b_up"))
    else:
        inner = activate(h, w["w_up"], config.activation, w.get("b_up"))
    return crosstile.matmul(inner, w["w_down"], bias=w.get("b_down"), residual=residual)


def gate(h: Array, w_gate: Any, w_up: Any, activation: str, b_gate: Array = None, b_up: Array = None) -> Array:
    """`activation(h @ w_gate + b_gate) * (h @ w_up + b_up)`."""
    if isinstance(w_gate, crosstile.Quantized) or b_gate is not None:
        return activate(h, w_gate, activation, b_gate) * crosstile.matmul(h, w_up, bias=b_up)
    return crosstile.glu_matmul(h, w_gate, w_up, activation=activation)


def activate(h: Array, w: Any, activation: str, bias: Array | None) -> Array:
    """`activation(h @ w + bias)`; relu2 is the square of relu."""
    if activation == "relu2":
        positive = crosstile.matmul(h, w, bias=bias, activation="relu")
        return positive * positive
    return crosstile.matmul(h, w, bias=bias, activation=activation)


def mixture(weights: Tree, h: Array, config: Config, experts: Experts) -> tuple[Array, Array]:
    """The sum of a token's experts, weighted, and of the shared one; and the router's logits `[tokens, count]`."""
    tokens = h.reshape(-1, h.shape[-1])
    logits = crosstile.matmul(tokens, weights["router"], bias=weights.get("router_bias"), out_dtype="float32")
    shares, chosen = choose(logits, weights.get("correction_bias"), experts)
    rows, sizes, places = permute(tokens, chosen, experts.count)
    rows = of_experts(weights, rows, sizes, chosen.reshape(-1)[places.order], config, experts)
    out = unpermute(rows, shares, places).reshape(h.shape)
    if experts.shared_size:
        out = out + shared(weights, h, config, experts)
    return out, logits


def of_experts(weights: Tree, rows: Array, sizes: Array, owners: Array, config: Config, experts: Experts) -> Array:
    """What experts make of their rows `[rows, hidden]`: `sizes` of each, and `owners` their numbers, row by row."""

    def product(x: Array, name: str) -> Array:
        out = crosstile.grouped_matmul(x, weights[f"w_{name}"], sizes)
        return out + take(weights[f"b_{name}"], owners) if experts.bias else out

    if experts.gate == "clamped":
        gated = clamped_gate(product(rows, "gate"), product(rows, "up"), experts)
    else:
        pair = weights["w_gate"], weights["w_up"]
        gated = crosstile.grouped_glu_matmul(rows, *pair, sizes, activation=config.activation)
    return product(gated, "down")


def clamped_gate(gate: Array, up: Array, experts: Experts) -> Array:
    """GPT-OSS's: `gate * sigmoid(alpha * gate) * (up + 1)`, the gate at most the limit, up within it."""
    xp = namespace(gate)
    gate = xp.clip(gate, None, experts.limit)
    up = xp.clip(up, -experts.limit, experts.limit)
    return gate * sigmoid(experts.alpha * gate) * (up + 1)


def shared(weights: Tree, h: Array, config: Config, experts: Experts) -> Array:
    """The expert that takes every token, weighed by a sigmoid of its own where it has one."""
    out = dense(weights, h, config, start="shared_")
    return out * sigmoid(crosstile.matmul(h, weights["shared_router"])) if experts.shared_gate else out


def choose(logits: Array, correction: Array | None, experts: Experts) -> tuple[Array, Array]:
    """The weights of each token's experts and their numbers, `[tokens, per_token]` each.

    With groups, experts come from the best groups alone (DeepSeek-V2, arXiv:2405.04434, section 2.2.2).
    """
    if experts.groups == 1:
        return route(
            logits,
            experts.per_token,
            score=experts.score,
            normalize=experts.normalize,
            bias=correction,
            scale=experts.scale,
        )
    xp = namespace(logits)
    scores = sigmoid(logits) if experts.score == "sigmoid" else softmax(logits)
    choice = scores if correction is None else scores + cast(correction, dtype_name(scores))
    grouped = choice.reshape(len(logits), experts.groups, -1)
    if experts.group_score == "sum of two":
        best = pick(grouped, top_k(grouped, 2)).sum(-1)
    else:
        best = xp.amax(grouped, -1)
    kept = top_k(best, experts.groups_per_token)
    allowed = (kept[:, None] == arange(experts.groups, logits)[:, None]).any(-1)
    choice = xp.where(allowed[..., None], grouped, -xp.inf).reshape(logits.shape)
    chosen = top_k(choice, experts.per_token)
    shares = pick(scores, chosen)
    if experts.normalize:
        shares = shares / shares.sum(-1)[:, None]
    return shares * experts.scale, cast(chosen, "int32")
