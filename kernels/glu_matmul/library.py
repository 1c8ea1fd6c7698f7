"""glu_matmul by the framework's own ops, differentiable as the framework does; any leading dimensions.

On narrow types torch rounds each product and the activation before the gate; JAX computes all three in float32.
"""

from __future__ import annotations

from typing import Any

from .spec import GluMatmulSpec


def forward(spec: GluMatmulSpec, x: Any, w_gate: Any, w_up: Any) -> tuple[Any, None]:
    """out, and None in the place of the preactivations."""
    if type(x).__module__.startswith("torch") or not hasattr(x, "aval"):
        return _torch(spec, x, w_gate, w_up), None
    return _jax(spec, x, w_gate, w_up), None


def _torch(spec: GluMatmulSpec, x: Any, w_gate: Any, w_up: Any) -> Any:
    from torch.nn import functional

    from ..tiles.torch_products import product

    gate = product(x, w_gate)
    if spec.activation == "gelu_tanh":
        bent = functional.gelu(gate, approximate="tanh")
    else:
        bent = getattr(functional, spec.activation)(gate)
    return bent * product(x, w_up)


def _jax(spec: GluMatmulSpec, x: Any, w_gate: Any, w_up: Any) -> Any:
    import jax
    import jax.numpy as jnp

    wide = jnp.promote_types(x.dtype, jnp.float32)
    gate, up = (jnp.matmul(x, weight, preferred_element_type=wide) for weight in (w_gate, w_up))
    if spec.activation in ("gelu", "gelu_tanh"):
        bent = jax.nn.gelu(gate, approximate=spec.activation == "gelu_tanh")
    else:
        bent = getattr(jax.nn, spec.activation)(gate)
    return (bent * up).astype(x.dtype)
