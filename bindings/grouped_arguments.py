"""The arguments of grouped_matmul and grouped_glu_matmul: checked, and made into a spec and the kernels' arrays."""

from __future__ import annotations

from typing import Any

from crosstile import dispatch
from crosstile.arguments import check_rank, common_dtype, dtype_name, show
from crosstile.kernels.grouped_matmul.spec import ACTIVATIONS, GroupedMatmulSpec
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.quantization import Quantized
from crosstile.quantized_arguments import check_stored


def prepare_grouped_matmul(lhs: Any, rhs: Any, group_sizes: Any) -> tuple[GroupedMatmulSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    if isinstance(rhs, Quantized):
        dtype = _checked_quantized("lhs", lhs, rhs=rhs)
        spec = GroupedMatmulSpec(dtype, format=rhs.format, group_size=rhs.group_size or 0)
    else:
        spec = GroupedMatmulSpec(common_dtype(("lhs", "rhs"), (lhs, rhs)))
    _check_rows("lhs", lhs, "rhs", rhs)
    sizes = _checked_sizes("lhs", lhs, "rhs", rhs, group_sizes)
    return spec, (lhs, _values(rhs), None, sizes, *_scales_and_zeros(rhs), None, None)


def prepare_grouped_glu_matmul(
    x: Any, w_gate: Any, w_up: Any, group_sizes: Any, *, activation: str = "silu"
) -> tuple[GroupedMatmulSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    if isinstance(w_gate, Quantized) or isinstance(w_up, Quantized):
        dtype = _checked_quantized("x", x, w_gate=w_gate, w_up=w_up)
        spec = GroupedMatmulSpec(dtype, activation, format=w_gate.format, group_size=w_gate.group_size or 0)
    else:
        spec = GroupedMatmulSpec(common_dtype(("x", "w_gate", "w_up"), (x, w_gate, w_up)), activation)
    _check_rows("x", x, "w_gate", w_gate)
    if tuple(w_up.shape) != tuple(w_gate.shape):
        raise ValueError(f"w_up: got {show(w_up.shape)}; it must have the shape of w_gate, {show(w_gate.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    sizes = _checked_sizes("x", x, "w_gate", w_gate, group_sizes)
    codes = _values(w_gate), _values(w_up)
    return spec, (x, *codes, sizes, *_scales_and_zeros(w_gate), *_scales_and_zeros(w_up))


def _checked_quantized(left: str, rows: Any, **weights: Any) -> str:
    """The dtype of a call whose weights are quantised, all of them alike."""
    dtype = common_dtype((left,), (rows,))
    (first, like), *_ = weights.items()
    for name, weight in weights.items():
        if not isinstance(weight, Quantized):
            other = next(name for name, weight in weights.items() if isinstance(weight, Quantized))
            raise TypeError(
                f"{name}: got {type(weight).__name__} where {other} is a Quantized; both must be, or neither"
            )
        if weight.activations is not None:
            raise UnsupportedError(
                f"{name}: got a Quantized for activations={weight.activations!r}; the kernels of groups multiply rows "
                "as they are: quantise without activations"
            )
        if _how(weight) != _how(like):
            raise ValueError(f"{name}: got {_show(weight)}; it must be quantised as {first} is, {_show(like)}")
        arrays = {f"{name}.{part}": getattr(weight, part) for part in ("values", "scales", "zeros")}
        dispatch.framework_of((left, *arrays), (rows, *arrays.values()))
        check_rank(name, weight.shape, 3, "[groups, k, n]")
        check_stored(weight, name)
    return dtype


def _how(weight: Any) -> tuple[Any, ...]:
    return weight.format, weight.group_size, weight.zeros is not None


def _show(weight: Any) -> str:
    grouped = "by columns" if weight.group_size is None else f"in groups of {weight.group_size}"
    return f"{weight.format} {grouped}" + (" with zero points" if weight.zeros is not None else "")


def _values(weight: Any) -> Any:
    return weight.values if isinstance(weight, Quantized) else weight


def _scales_and_zeros(weight: Any) -> tuple[Any, Any]:
    return (weight.scales, weight.zeros) if isinstance(weight, Quantized) else (None, None)


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
