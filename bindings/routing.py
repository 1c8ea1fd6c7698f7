"""What stands around the experts of a mixture: which take a token, and its rows sorted by expert and put back.

    weights, experts = route(x @ router, top_k=2)  # [tokens, 2] each
    rows, group_sizes, places = permute(x, experts, groups)  # [tokens * 2, hidden], those of expert 0 first
    rows = ...  # the experts: grouped_glu_matmul and grouped_matmul with group_sizes
    out = unpermute(rows, weights, places)  # [tokens, hidden]

The arrays are NumPy's, torch's or JAX's; every size follows from the shapes, so that nothing waits for a number from
the device and all of it runs under jit and torch.compile. The gradients only gather, where autograd would scatter: a
token's copies are found by their places and summed in order, without atomics, and two runs are bit-equal.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from crosstile import dispatch, ops
from crosstile.arguments import FLOATS, check_count, check_rank, constant, dtype_name, show

SCORES = ("softmax", "sigmoid")


class Places(NamedTuple):
    """Where the rows of `permute` come from.

    Attributes:
        order: int `[tokens * top_k]`: row r is the copy number `order[r]`, of token `order[r] // top_k`.
        inverse: int `[tokens * top_k]`: the copy number c stands in row `inverse[c]`.
    """

    order: Any
    inverse: Any


def route(
    logits: Any,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    bias: Any = None,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """The experts that take each token, and what their results are weighted by.

    | | score | normalize | |
    |---|---|---|---|
    | Mixtral | softmax | True | the same as a softmax of the chosen logits alone |
    | Qwen3-MoE | softmax | `norm_topk_prob` | |
    | DeepSeek-V3 | sigmoid | True | with a bias and `scale=routed_scaling_factor` |

    Args:
        logits: `[tokens, groups]`, any float dtype: a token's product with the router's weights.
        top_k: how many experts take a token, from 1 to groups.
        score: "softmax" over all experts, or "sigmoid" of each logit alone; computed in float32.
        normalize: divide a token's weights by their sum.
        bias: `[groups]`, added to the scores for the choice alone, not to the weights; it has no gradient.
        scale: multiplies the weights in the end; None does not.

    Returns:
        (weights, experts), both `[tokens, top_k]`, the highest score first and of equal ones the expert of the lower
        number: weights float32 (float64 of float64), differentiable in logits; experts int32.

    Raises:
        TypeError: arrays of two frameworks, or logits that are no floats.
        ValueError: shapes or options that do not fit; the message names the argument.

    Algorithm: Shazeer et al. (arXiv:1701.06538); the bias is that of Wang et al. (arXiv:2408.15664).

    >>> import numpy as np
    >>> weights, experts = route(np.log([[1.0, 5.0, 3.0]]), top_k=2)
    >>> weights.round(4).tolist(), experts.tolist()
    ([[0.625, 0.375]], [[1, 2]])
    """
    side = _side(dispatch.framework_of(("logits", "bias"), (logits, bias)))
    kind = dtype_name(logits.dtype)
    if kind not in FLOATS:
        raise TypeError(f"logits: dtype is {kind}; it must be one of {', '.join(FLOATS)}: convert it first")
    check_rank("logits", logits.shape, 2, "[tokens, groups]")
    groups, top_k = logits.shape[1], constant(top_k)
    check_count("top_k", top_k)
    if not 1 <= top_k <= groups:
        raise ValueError(f"top_k: got {top_k}; it must be from 1 to groups = {groups}")
    if score not in SCORES:
        raise ValueError(f"score: got {score!r}; it must be one of {', '.join(SCORES)}")
    if bias is not None and tuple(bias.shape) != (groups,):
        raise ValueError(f"bias: got {show(bias.shape)}; it must be [groups] = [{groups}]")
    scores = side.scores(side.wide(logits), score)
    experts = side.chosen(scores if bias is None else scores + side.wide(bias), top_k)
    weights = side.pick(scores, experts)
    if normalize:
        weights = weights / side.sum(weights, 1, keep=True)
    return (weights if scale is None else weights * scale), side.as_int32(experts)


def permute(x: Any, experts: Any, groups: int) -> tuple[Any, Any, Places]:
    """A copy of each token for each of its experts, sorted by expert: what `grouped_matmul` takes.

    Args:
        x: `[tokens, hidden]`.
        experts: int `[tokens, top_k]`. A number below 0, or not below groups, is nobody: that copy goes past the sum of
            the sizes, where it gives zeros. So are padding and the experts of another device left out.
        groups: how many experts there are.

    Returns:
        rows `[tokens * top_k, hidden]`, those of one expert in the order of the tokens, differentiable in x;
        group_sizes int32 `[groups]`; and the `Places` that `unpermute` needs.

    Raises:
        TypeError: arrays of two frameworks, or experts that are no integers.
        ValueError: shapes that do not fit; the message names the argument.

    >>> import numpy as np
    >>> rows, group_sizes, places = permute(np.array([[1.0], [2.0], [3.0]]), np.array([[1, 0], [1, 3], [0, 1]]), 2)
    >>> rows.ravel().tolist(), group_sizes.tolist()
    ([1.0, 3.0, 1.0, 2.0, 3.0, 2.0], [2, 3])
    """
    side = _side(dispatch.framework_of(("x", "experts"), (x, experts)))
    check_rank("x", x.shape, 2, "[tokens, hidden]")
    check_rank("experts", experts.shape, 2, "[tokens, top_k]")
    _check_integers("experts", experts)
    if experts.shape[0] != x.shape[0]:
        raise ValueError(
            f"experts: got {show(experts.shape)}; it must be [tokens, top_k] with tokens = {x.shape[0]}, as in x "
            f"{show(x.shape)}"
        )
    groups = constant(groups)
    check_count("groups", groups)
    order, inverse, group_sizes = side.sort(experts.reshape(-1), groups)
    rows = side.take(x, order, inverse, experts.shape[1])
    return rows, group_sizes, Places(order, inverse)


def unpermute(rows: Any, weights: Any, places: Places) -> Any:
    """Each token's rows back together: their sum, weighted.

    Args:
        rows: `[tokens * top_k, hidden]`, in the order of `permute`.
        weights: `[tokens, top_k]`, any float dtype.
        places: from `permute`.

    Returns:
        `[tokens, hidden]` of rows' dtype, summed in float32 and rounded once; differentiable in rows and weights.

    Raises:
        TypeError: arrays of two frameworks.
        ValueError: shapes that do not fit; the message names the argument.

    >>> import numpy as np
    >>> rows, _, places = permute(np.array([[1.0], [2.0]]), np.array([[1, 0], [0, 1]]), 2)
    >>> unpermute(rows, np.array([[0.5, 0.25], [1.0, 0.0]]), places).ravel().tolist()
    [0.75, 2.0]
    """
    side = _side(dispatch.framework_of(("rows", "weights", "places.order"), (rows, weights, places.order)))
    check_rank("rows", rows.shape, 2, "[tokens * top_k, hidden]")
    check_rank("weights", weights.shape, 2, "[tokens, top_k]")
    tokens, top_k = weights.shape
    if rows.shape[0] != tokens * top_k:
        raise ValueError(
            f"rows: got {show(rows.shape)}; it must have tokens * top_k = {tokens * top_k} rows, as weights "
            f"{show(weights.shape)} has elements"
        )
    if tuple(places.order.shape) != (tokens * top_k,):
        raise ValueError(f"places: got {show(places.order.shape)}; it must be of {tokens * top_k} rows, as rows is")
    copies = side.take(rows, places.inverse, places.order, 1).reshape(tokens, top_k, rows.shape[1])
    summed = side.sum(side.wide(copies) * side.wide(weights)[:, :, None], 1)
    return side.narrow(summed, rows)


def load_balancing_loss(logits: Any, experts: Any) -> Any:
    """The loss that is least where the router gives every expert as many tokens: top_k there, and more elsewhere.

    It is `groups * sum(share * mean)` over the experts: share is the part of the tokens that an expert takes, a
    constant, and mean that of its softmax over all tokens.

    Args:
        logits: `[tokens, groups]` of the router.
        experts: int `[tokens, top_k]`, as `route` chose them.

    Returns:
        A number `[]` in float32 (float64 of float64), differentiable in logits.

    Raises:
        TypeError: arrays of two frameworks.
        ValueError: shapes that do not fit; the message names the argument.

    Algorithm: Fedus, Zoph & Shazeer, "Switch Transformers" (arXiv:2101.03961), summed over the top_k as Mixtral does.

    >>> import numpy as np
    >>> float(load_balancing_loss(np.zeros((2, 4)), np.array([[0, 1], [2, 3]])))
    2.0
    """
    side = _side(dispatch.framework_of(("logits", "experts"), (logits, experts)))
    check_rank("logits", logits.shape, 2, "[tokens, groups]")
    check_rank("experts", experts.shape, 2, "[tokens, top_k]")
    _check_integers("experts", experts)
    tokens, groups = logits.shape
    sizes = side.sort(experts.reshape(-1), groups)[2]
    mean = side.sum(side.scores(side.wide(logits), "softmax"), 0) / max(tokens, 1)
    return side.sum(side.narrow(sizes, mean) * mean, 0) * (groups / max(tokens, 1))


def moe(
    x: Any,
    router: Any,
    w_gate: Any,
    w_up: Any,
    w_down: Any,
    *,
    top_k: int,
    activation: str = "silu",
    score: str = "softmax",
    normalize: bool = True,
    bias: Any = None,
    scale: float | None = None,
    return_logits: bool = False,
    implementation: str | None = None,
) -> Any:
    """A feed-forward layer of experts: each token is taken by the top_k that the router scores highest.

    Args:
        x: `[..., hidden]`, float32, float16 or bfloat16.
        router: `[hidden, groups]`, x's dtype.
        w_gate: `[groups, hidden, n]`, x's dtype; or what `crosstile.quantize` made of it, as of the next two.
        w_up: `[groups, hidden, n]`, the same.
        w_down: `[groups, n, hidden]`, the same.
        top_k: how many experts take a token.
        activation: of the gate, as for `grouped_glu_matmul`.
        score: as for `route`, which says how models set these four.
        normalize: as for `route`.
        bias: as for `route`.
        scale: as for `route`.
        return_logits: also return the router's logits `[tokens, groups]`, for `load_balancing_loss`.
        implementation: of the products: "numpy", "triton", "pallas", "library" or None, the choice by device.

    Returns:
        out of x's shape and dtype, or (out, logits) with logits in float32; differentiable in x and all weights.

    Raises:
        TypeError: arrays of two frameworks or two dtypes, or of a dtype that cannot be.
        ValueError: shapes or options that do not fit; the message names the argument.
        crosstile.UnsupportedError: the implementation that was named cannot run, with the reason.

    >>> import numpy as np
    >>> x, router = np.ones((2, 3, 4)), np.eye(4, 5)
    >>> moe(x, router, np.ones((5, 4, 6)), np.ones((5, 4, 6)), np.ones((5, 6, 4)), top_k=2).shape
    (2, 3, 4)
    """
    kind = "float64" if dtype_name(x.dtype) == "float64" else "float32"
    tokens = x.reshape(prod(x.shape[:-1]), x.shape[-1])

    def choose(logits: Any, bias: Any) -> tuple[Any, Any]:
        return route(logits, top_k, score=score, normalize=normalize, bias=bias, scale=scale)

    def products(weights: Any, rows: Any, sizes: Any, owners: Any = None) -> Any:
        pair, options = (weights["w_gate"], weights["w_up"]), {"implementation": implementation}
        gated = ops.grouped_glu_matmul(rows, *pair, sizes, activation=activation, **options)
        return ops.grouped_matmul(gated, weights["w_down"], sizes, **options)

    weights = {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    if (sharding := dispatch.spreading()) and dispatch.framework_of(("x",), (x,)) == "jax":
        from crosstile.sharding_experts import experts as spread

        logits = ops.matmul(x, router, out_dtype=kind)
        out = spread(sharding, choose, products, x, logits, weights, bias)
        return (out, logits.reshape(tokens.shape[0], -1)) if return_logits else out
    logits = ops.matmul(tokens, router, out_dtype=kind, implementation=implementation)
    shares, experts = choose(logits, bias)
    rows, group_sizes, places = permute(tokens, experts, router.shape[1])
    out = unpermute(products(weights, rows, group_sizes), shares, places).reshape(x.shape)
    return (out, logits) if return_logits else out


def _side(framework: str) -> Any:
    """How that framework does what routing needs."""
    if framework == "torch":
        from crosstile import routing_torch

        return routing_torch
    if framework == "jax":
        from crosstile import routing_jax

        return routing_jax
    from crosstile import routing_numpy

    return routing_numpy


def _check_integers(name: str, array: Any) -> None:
    kind = dtype_name(array.dtype)
    if not kind.startswith(("int", "uint")):
        raise TypeError(f"{name}: dtype is {kind}; it must be an integer: convert it first")
