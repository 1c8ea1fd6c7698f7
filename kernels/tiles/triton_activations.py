"""Activations and their derivatives on float32 tiles, for Triton kernels. NAME is None or one of matmul's names."""

import triton
import triton.language as tl

# A constexpr stands to the right of its tensor: the interpreter has no product the other way round.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of x."""
    if NAME == "relu":
        y = tl.where(x <= 0, 0.0, x)  # not maximum(x, 0), which would turn NaN into 0
    elif NAME == "gelu":
        y = x * _normal_cdf(x)
    elif NAME == "gelu_tanh":
        y = x * _tanh_cdf(x)
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(NAME is None, "unknown activation")
        y = x
    return y


@triton.jit
def derivative(x, NAME: tl.constexpr):
    """The derivative of the activation at x."""
    if NAME == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "gelu":
        y = _normal_cdf(x) + x * tl.exp(-0.5 * x * x) * INV_SQRT_2PI
    elif NAME == "gelu_tanh":
        cdf = _tanh_cdf(x)
        slope = (1 + 3 * (x * x * TANH_CUBIC)) * TANH_SCALE
        y = cdf + x * cdf * _tanh_cdf(-x) * slope  # 1 - cdf would cancel for positive x
    else:
        tl.static_assert(NAME == "silu", "unknown activation")
        sigmoid = tl.sigmoid(x)
        y = sigmoid * (1 + x * (1 - sigmoid))
    return y


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * SQRT_HALF)


@triton.jit
def _tanh_cdf(x):
    """`(1 + tanh(u)) / 2` is `sigmoid(2 u)`, which does not cancel for negative u."""
    return tl.sigmoid((x + x * x * x * TANH_CUBIC) * TANH_SCALE)
