"""The arguments of rotary: checked, and made into a spec and the arrays that kernels take."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from operator import index
from typing import Any

import numpy as np

from crosstile import dispatch
from crosstile.arguments import check_integers, check_rank, common_dtype, constant, show
from crosstile.kernels.rotary import frequencies
from crosstile.kernels.rotary.spec import RotarySpec

_tensors: dict[Any, Any] = {}  # of frequencies, by their values and device


def prepare_rotary(
    x: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    scaling: Any = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[RotarySpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs; positions have a dimension of the batch."""
    q, k = _pair(x)
    dtype = common_dtype(("x", "x[1]"), (q, k))
    for name, array in (("x", q), ("x[1]", k)):
        if array is not None:
            check_rank(name, array.shape, 4, "[batch, length, heads, head_dim]")
    batch, length, q_heads, head_dim = q.shape
    if k is not None and (*k.shape[:2], k.shape[3]) != (batch, length, head_dim):
        raise ValueError(
            f"x[1]: got {show(k.shape)}; its batch, length and head_dim must be those of x[0] {show(q.shape)}"
        )
    turned = _check_rotary_dim(rotary_dim, head_dim)
    framework = dispatch.framework_of(("x", "positions"), (q, positions))
    check_integers("positions", positions, q)
    if tuple(positions.shape) not in ((length,), (batch, length)):
        raise ValueError(
            f"positions: got {show(positions.shape)}; it must be [batch, length] = [{batch}, {length}], or [length]"
        )
    positions = dispatch.glue(framework).as_int32(positions)
    positions = positions[None] if len(positions.shape) == 1 else positions
    table, factor = _frequencies(index(turned), _check_base(base), scaling)
    heads = q_heads + (0 if k is None else k.shape[2])
    spec = RotarySpec(dtype, head_dim, heads, turned, bool(interleaved), factor)
    return spec, (q, k, positions, _as_array(table, q, framework))


def _pair(x: Any) -> tuple[Any, Any]:
    """q and k of a pair, or one array and None."""
    if not isinstance(x, tuple | list):
        return x, None
    if len(x) != 2:
        raise TypeError(f"x: got {len(x)} arrays; it must be one array, or a pair (q, k)")
    return x[0], x[1]


def _check_rotary_dim(rotary_dim: Any, head_dim: int) -> int:
    if rotary_dim is None:
        if not head_dim or head_dim % 2:
            raise ValueError(f"x: head_dim is {head_dim}; it must be even and at least 2, or pass an even rotary_dim")
        return head_dim
    if isinstance(rotary_dim, bool) or not (isinstance(rotary_dim, int) or hasattr(rotary_dim, "__index__")):
        raise TypeError(f"rotary_dim: got {type(rotary_dim).__name__}; it must be an integer or None")
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(f"rotary_dim: got {rotary_dim}; it must be even, and from 2 to head_dim = {head_dim}")
    return int(rotary_dim)


def _check_base(base: Any) -> float:
    if isinstance(base, bool) or not (isinstance(base, float | int) or hasattr(base, "__float__")):
        raise TypeError(f"base: got {type(base).__name__}; it must be a number")
    value = float(constant(base))
    if not 1 < value < inf:
        raise ValueError(f"base: got {value}; it must be finite and greater than 1")
    return value


def _frequencies(rotary_dim: int, base: float, scaling: Any) -> tuple[tuple[float, ...], float]:
    """The frequencies, and the factor of cos and sin."""
    if isinstance(scaling, Mapping):
        scaling = frequencies.scaling_from(scaling)
    elif scaling is not None and not isinstance(scaling, frequencies.Scaling):
        raise TypeError(
            f"scaling: got {type(scaling).__name__}; it must be None, a Llama3Scaling, YarnScaling or LinearScaling "
            "of crosstile.kernels.rotary.spec, or the rope_scaling of a Hugging Face config"
        )
    elif scaling is not None:
        frequencies.check(scaling)
    return frequencies.frequencies_of(rotary_dim, base, scaling)


# torch.compile calls it while it traces, as `torch.compiler.assume_constant_result` would have it.
_frequencies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _as_array(table: tuple[float, ...], like: Any, framework: str) -> Any:
    """float32 [1, rotary_dim / 2] of the same framework, on the same device."""
    if framework == "torch":
        import torch

        if torch.compiler.is_compiling() or isinstance(like, torch._subclasses.FakeTensor):
            return torch.tensor([table], dtype=torch.float32, device=like.device)
        key = (table, like.device)
        if key not in _tensors:  # a copy to the device would wait for it at every call
            _tensors[key] = torch.tensor([table], dtype=torch.float32, device=like.device)
        return _tensors[key]
    if framework == "jax":
        import jax.numpy as jnp

        return jnp.asarray([table], jnp.float32)
    return np.array([table], np.float32)


def canonical_rotary(xp: Any, spec: RotarySpec, arrays: tuple[Any, ...]) -> tuple[RotarySpec, tuple[Any, ...], Any]:
    """The arrays with one leading batch each; the results keep their shapes."""
    q, k, positions, table = arrays
    batch, length = q.shape[:2]
    positions = xp.broadcast_to(positions, (batch, length))
    return spec, (q, k, positions, xp.broadcast_to(table, (batch, spec.rotary_dim // 2))), ()
