"""The arguments of the norms: checked, and made into a spec and the arrays that kernels take."""

from __future__ import annotations

from math import inf, prod
from typing import Any

from crosstile.arguments import common_dtype, constant, show
from crosstile.kernels.norm.spec import NormSpec


def prepare_rms_norm(
    x: Any, weight: Any, *, eps: float = 1e-6, residual: Any = None, zero_centered: bool = False
) -> tuple[NormSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    return _prepare("rms", x, weight, None, eps, residual, zero_centered)


def prepare_layer_norm(
    x: Any, weight: Any, bias: Any = None, *, eps: float = 1e-5, residual: Any = None
) -> tuple[NormSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    return _prepare("layer", x, weight, bias, eps, residual)


def _prepare(
    kind: str, x: Any, weight: Any, bias: Any, eps: float, residual: Any, zero_centered: bool = False
) -> tuple[NormSpec, tuple[Any, ...]]:
    arrays = (x, weight, bias, residual)
    dtype = common_dtype(("x", "weight", "bias", "residual"), arrays)
    shape = x.shape
    if not len(shape):
        raise ValueError("x: got rank 0; it must be [..., hidden]")
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and tuple(array.shape) != (shape[-1],):
            raise ValueError(f"{name}: got {show(array.shape)}; it must be [hidden] = [{shape[-1]}], as in x")
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual: got {show(residual.shape)}; it must have the shape of x, {show(shape)}")
    return NormSpec(dtype, shape[-1], kind, _check_eps(eps), bool(zero_centered)), arrays


def _check_eps(eps: Any) -> float:
    """Eps as a float."""
    if isinstance(eps, bool) or not (isinstance(eps, float | int) or hasattr(eps, "__float__")):
        raise TypeError(f"eps: got {type(eps).__name__}; it must be a number")
    value = float(constant(eps))
    if not 0 <= value < inf:
        raise ValueError(f"eps: got {value}; it must be finite and not negative")
    return value


def canonical_norm(xp: Any, spec: NormSpec, arrays: tuple[Any, ...]) -> tuple[NormSpec, tuple[Any, ...], Any]:
    """The arrays with one leading batch each, and the result's shape: all dimensions of x before the last are rows."""
    x, weight, bias, residual = arrays
    rows = (1, prod(x.shape[:-1]), x.shape[-1])
    bias = None if bias is None else bias[None]
    residual = None if residual is None else residual.reshape(rows)
    return spec, (x.reshape(rows), weight[None], bias, residual), x.shape
