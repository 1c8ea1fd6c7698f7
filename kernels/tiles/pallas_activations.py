"""Activations and their derivatives on float32 tiles, for Pallas kernels. name is None or one of matmul's names."""

from __future__ import annotations

from math import pi, sqrt

import jax
import jax.numpy as jnp

_TANH_SCALE = 2 * sqrt(2 / pi)
_TANH_CUBIC = 0.044715


def activate(name: str | None, x: jax.Array) -> jax.Array:
    """The activation of x."""
    if name is None:
        return x
    if name == "relu":
        return jnp.maximum(x, 0)
    if name == "gelu":
        return x * _normal_cdf(x)
    if name == "gelu_tanh":
        return x * _tanh_cdf(x)
    return x * jax.nn.sigmoid(x)


def derivative(name: str, x: jax.Array) -> jax.Array:
    """The derivative of the activation at x."""
    if name == "relu":
        return jnp.where(x > 0, 1.0, 0.0)
    if name == "gelu":
        return _normal_cdf(x) + x * jnp.exp(-0.5 * x * x) * (1 / sqrt(2 * pi))
    if name == "gelu_tanh":
        cdf, rest = _tanh_cdf(x), _tanh_cdf(-x)  # 1 - cdf would cancel for positive x
        return cdf + x * cdf * rest * (_TANH_SCALE * (1 + 3 * _TANH_CUBIC * (x * x)))
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * sqrt(0.5))


def _tanh_cdf(x: jax.Array) -> jax.Array:
    """`(1 + tanh(u)) / 2` is `sigmoid(2 u)`, which does not cancel for negative u."""
    return jax.nn.sigmoid(_TANH_SCALE * (x + _TANH_CUBIC * (x * x * x)))
