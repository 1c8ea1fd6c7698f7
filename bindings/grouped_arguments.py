"""The arguments of grouped_matmul and grouped_glu_matmul: checked, and made into a spec and the kernels' arrays."""

from __future__ import annotations

from typing import Any

from crosstile import dispatch
from crosstile.arguments import check_rank, common_dtype, dtype_name, show
from crosstile.kernels.grouped_matmul.spec import ACTIVATIONS, GroupedMatmulSpec
from crosstile.kernels.tiles.errors import UnsupportedError


def prepare_grouped_matmul(lhs: Any, rhs: Any, group_sizes: Any) -> tuple[GroupedMatmulSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    _refuse_quantized(rhs=rhs)
    dtype = common_dtype(("lhs", "rhs"), (lhs, rhs))
    _check_rows("lhs", lhs, "rhs", rhs)
    return GroupedMatmulSpec(dtype), (lhs, rhs, None, _checked_sizes("lhs", lhs, "rhs", rhs, group_sizes))


def prepare_grouped_glu_matmul(
    x: Any, w_gate: Any, w_up: Any, group_sizes: Any, *, activation: str = "silu"
) -> tuple[GroupedMatmulSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    _refuse_quantized(w_gate=w_gate, w_up=w_up)
    dtype = common_dtype(("x", "w_gate", "w_up"), (x, w_gate, w_up))
    _check_rows("x", x, "w_gate", w_gate)
    if tuple(w_up.shape) != tuple(w_gate.shape):
        raise ValueError(f"w_up: got {show(w_up.shape)}; it must have the shape of w_gate, {show(w_gate.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    sizes = _checked_sizes("x", x, "w_gate", w_gate, group_sizes)
    return GroupedMatmulSpec(dtype, activation), (x, w_gate, w_up, sizes)


def _refuse_quantized(**weights: Any) -> None:
    for name, weight in weights.items():
        if hasattr(weight, "dequantize") and not hasattr(weight, "__array__"):
            raise UnsupportedError(
                f"{name}: got a Quantized; the kernels of groups take arrays: pass {name}.dequantize()"
            )


def _check_rows(left: str, rows: Any, right: str, weight: Any) -> None:
    check_rank(left, rows.shape, 2, "[tokens, k]")
    check_rank(right, weight.shape, 3, "[groups, k, n]")
    if weight.shape[1] != rows.shape[1]:
        hint = f" (weights [groups, n, k]: {right}.swapaxes(1, 2))" if weight.shape[2] == rows.shape[1] else ""
        raise ValueError(
            f"{right}: k is {weight.shape[1]} in {show(weight.shape)}; it must be {rows.shape[1]}, as in "
            f"{left} {show(rows.shape)}{hint}"
        )


def _checked_sizes(left: str, rows: Any, right: str, weight: Any, group_sizes: Any) -> Any:
    """group_sizes as int32. What they hold is known here only of NumPy's arrays: others may be on a device."""
    framework = dispatch.framework_of((left, "group_sizes"), (rows, group_sizes))
    kind = dtype_name(group_sizes.dtype)
    if not kind.startswith(("int", "uint")):
        raise TypeError(f"group_sizes: dtype is {kind}; it must be an integer: convert it first")
    if tuple(group_sizes.shape) != (weight.shape[0],):
        raise ValueError(
            f"group_sizes: got {show(group_sizes.shape)}; it must be [groups] = [{weight.shape[0]}], as in "
            f"{right} {show(weight.shape)}"
        )
    if framework == "numpy" and group_sizes.size:
        if group_sizes.min() < 0:
            raise ValueError(f"group_sizes: got {group_sizes.min()}; a size must not be negative")
        if int(group_sizes.sum()) > rows.shape[0]:
            raise ValueError(
                f"group_sizes: their sum is {int(group_sizes.sum())}; it must be at most the {rows.shape[0]} rows of "
                f"{left}"
            )
    return dispatch.glue(framework).as_int32(group_sizes)


def canonical_grouped_matmul(
    xp: Any, spec: GroupedMatmulSpec, arrays: tuple[Any, ...]
) -> tuple[GroupedMatmulSpec, tuple[Any, ...], tuple[int, ...]]:
    """The arrays with one leading batch each, and the result's shape."""
    lhs, rhs = arrays[:2]
    return spec, tuple(None if array is None else array[None] for array in arrays), (lhs.shape[0], rhs.shape[2])
