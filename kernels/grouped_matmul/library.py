"""grouped_matmul and its gate by the framework's own ops, differentiable as the framework does.

JAX has `ragged_dot`. torch's `grouped_mm` takes rows of whole 16 bytes only, and leaves the rows past the sum as they
were: here the groups are cut into blocks of as many rows as a group has on average, padded, and multiplied by `bmm`.
Every size is known from the shapes, so that nothing waits for the numbers in group_sizes. Quantised matrices are
dequantised, whole, to lhs' dtype.
"""

from __future__ import annotations

import sys
from typing import Any

from ..tiles.formats import FORMATS, cast, weights
from .spec import GroupedMatmulSpec


def forward(
    spec: GroupedMatmulSpec,
    lhs: Any,
    rhs: Any,
    rhs_up: Any,
    group_sizes: Any,
    rhs_scales: Any = None,
    rhs_zeros: Any = None,
    rhs_up_scales: Any = None,
    rhs_up_zeros: Any = None,
) -> tuple[Any, None]:
    """out, and None in the place of the preactivations; the arrays have no batch."""
    in_torch = type(lhs).__module__.startswith("torch") or not hasattr(lhs, "aval")
    if spec.format is not None:
        rhs = _dequantised(spec, in_torch, lhs, (rhs, rhs_scales, rhs_zeros))
        if rhs_up is not None:
            rhs_up = _dequantised(spec, in_torch, lhs, (rhs_up, rhs_up_scales, rhs_up_zeros))
    return (_torch if in_torch else _jax)(spec, lhs, rhs, rhs_up, group_sizes), None


def _dequantised(spec: GroupedMatmulSpec, in_torch: bool, lhs: Any, weight: tuple[Any, Any, Any]) -> Any:
    xp: Any = sys.modules["torch" if in_torch else "jax.numpy"]
    assert spec.format is not None
    wide = "float64" if spec.dtype == "float64" else "float32"
    return cast(weights(xp, weight, FORMATS[spec.format], spec.group_size, lhs.shape[1], False, wide), spec.dtype)


def _torch(spec: GroupedMatmulSpec, lhs: Any, rhs: Any, rhs_up: Any, group_sizes: Any) -> Any:
    import torch
    from torch.nn import functional

    tokens, groups = lhs.shape[0], rhs.shape[0]
    if groups == 0:  # nobody has a row: a sum of nothing, which all inputs take part in
        nothing = lhs[:, :0] @ rhs.reshape(0, rhs.shape[2])
        return nothing if rhs_up is None else nothing + lhs[:, :0] @ rhs_up.reshape(0, rhs.shape[2])
    block = torch.sym_max(1, (tokens + groups - 1) // groups)
    slots = (tokens + (block - 1) * torch.sym_min(groups, tokens)) // block  # enough, however the rows are shared out
    sizes = group_sizes.clamp(min=0).long()
    ends = sizes.cumsum(0).clamp(max=tokens)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    slot_ends = ((ends - starts + block - 1) // block).cumsum(0)
    slot_starts = torch.cat((ends.new_zeros(1), slot_ends[:-1]))

    slot = torch.arange(slots, device=lhs.device)
    group = torch.searchsorted(slot_ends, slot, right=True).clamp(max=groups - 1)
    rows = (starts[group] + (slot - slot_starts[group]) * block)[:, None] + torch.arange(block, device=lhs.device)
    exist = rows < ends[group][:, None]  # a slot past the last begins where its group ends, or later
    padded = torch.where(exist[:, :, None], lhs[rows.clamp(max=tokens - 1)], 0)

    row = torch.arange(tokens, device=lhs.device)
    owner = torch.searchsorted(ends, row, right=True).clamp(max=groups - 1)
    place = slot_starts[owner] * block + (row - starts[owner])
    owned = (row < ends[-1])[:, None]

    def product(weight: Any) -> Any:
        found = torch.bmm(padded, weight[group]).reshape(slots * block, weight.shape[2])
        return torch.where(owned, found[torch.where(owned[:, 0], place, 0)], 0)

    gate = product(rhs)
    if spec.activation is None:
        return gate
    if spec.activation == "gelu_tanh":
        bent = functional.gelu(gate, approximate="tanh")
    else:
        bent = getattr(functional, spec.activation)(gate)
    return bent * product(rhs_up)


def _jax(spec: GroupedMatmulSpec, lhs: Any, rhs: Any, rhs_up: Any, group_sizes: Any) -> Any:
    import jax
    import jax.numpy as jnp

    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    tokens, groups = lhs.shape[0], rhs.shape[0]
    if groups == 0 or tokens == 0:
        return jnp.zeros((tokens, rhs.shape[2]), lhs.dtype)
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0)), tokens)
    sizes = jnp.diff(ends, prepend=0)
    owned = (jnp.arange(tokens) < ends[-1])[:, None]
    lhs = jnp.where(owned, lhs, 0)

    def product(weight: Any) -> Any:
        return jnp.where(owned, jax.lax.ragged_dot(lhs, weight, sizes, preferred_element_type=wide), 0)

    gate = product(rhs)
    if spec.activation is None:
        return gate.astype(lhs.dtype)
    if spec.activation in ("gelu", "gelu_tanh"):
        bent = jax.nn.gelu(gate, approximate=spec.activation == "gelu_tanh")
    else:
        bent = getattr(jax.nn, spec.activation)(gate)
    return (bent * product(rhs_up)).astype(lhs.dtype)
