"""The arguments of a matmul with a quantised weight: checked, and made into a spec and the arrays that kernels take."""

from __future__ import annotations

from math import prod
from typing import Any

from crosstile import arguments
from crosstile.arguments import broadcast_shape, dtype_name, show
from crosstile.kernels.quantized_matmul.spec import QuantizedMatmulSpec
from crosstile.quantization import Quantized


def prepare_matmul(a: Any, b: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """The spec and the arrays of `matmul`, whose weight may be quantised."""
    if isinstance(b, Quantized):
        return prepare_quantized_matmul(a, b, **options)
    return arguments.prepare_matmul(a, b, **options)


def prepare_quantized_matmul(
    a: Any,
    b: Quantized,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    out_dtype: Any = None,
    precision: str | None = None,
) -> tuple[QuantizedMatmulSpec, tuple[Any, ...]]:
    """The spec and the arrays of a call, in the order of the op's inputs."""
    dtype = arguments.common_dtype(("a", "bias", "residual"), (a, bias, residual))
    a_shape, b_shape = a.shape, b.shape
    arguments.check_product(a_shape, b_shape)
    check_stored(b)
    if precision is not None:
        raise ValueError(f"precision: got {precision!r}; beside a quantised weight it must be None")
    kind = dtype if out_dtype is None else out_dtype
    name = arguments.check_epilogue(a_shape, b_shape, bias, activation, residual, kind)
    spec = QuantizedMatmulSpec(dtype, name, b.format, b.group_size or 0, b.activations, activation)
    return spec, (a, b.values, b.scales, b.zeros, bias, residual)


def check_stored(b: Quantized, named: str = "b") -> None:
    """Refuse a weight put together by hand whose arrays do not fit; named is the argument that it came as."""
    from crosstile.kernels.tiles.formats import FORMATS, stored_shapes

    form, (*lead, k, n) = FORMATS[b.format], b.shape
    values, scales = stored_shapes(form, b.group_size or 0, k, n, b.activations is not None)
    kinds = ("uint8",) if form.block_scales else arguments.FLOATS
    wanted = [("values", b.values, values, (form.storage,)), ("scales", b.scales, scales, kinds)]
    if b.zeros is not None:
        wanted.append(("zeros", b.zeros, scales, (form.storage,)))
    for name, array, shape, dtypes in wanted:
        if tuple(array.shape) != (*lead, *shape):
            raise ValueError(
                f"{named}.{name}: got {show(array.shape)}; of {b.format} it must be {show((*lead, *shape))}"
            )
        if (kind := dtype_name(array.dtype)) not in dtypes:
            raise TypeError(f"{named}.{name}: dtype is {kind}; of {b.format} it must be {' or '.join(dtypes)}")


def canonical_quantized_matmul(
    xp: Any, spec: QuantizedMatmulSpec, arrays: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """The arrays with one leading batch each, and the shape to give the result.

    With a weight `[k, n]` all of a's leading dimensions become rows; else a and the weight broadcast.
    """
    a, *weight, bias, residual = arrays
    values = weight[0]
    m, k, n = a.shape[-2], a.shape[-1], values.shape[-1 if spec.a_format is None else -2]
    if len(values.shape) == 2:
        lead, batch, rows = a.shape[:-2], 1, prod(a.shape[:-1])
        weight = [None if array is None else array[None] for array in weight]
    else:
        lead = broadcast_shape("b", values.shape[:-2], a.shape[:-2])
        batch, rows = prod(lead), m
        a = xp.broadcast_to(a, (*lead, m, k))
        weight = [None if array is None else _batched(xp, array, lead, batch) for array in weight]
    shape = (*lead, m, n)
    a = a.reshape(batch, rows, k)
    if bias is not None:
        bias = xp.broadcast_to(bias, (batch, n))
    if residual is not None:
        residual = xp.broadcast_to(residual, shape).reshape(batch, rows, n)
    return spec, (a, *weight, bias, residual), shape


def _batched(xp: Any, array: Any, lead: tuple[int, ...], batch: int) -> Any:
    return xp.broadcast_to(array, (*lead, *array.shape[-2:])).reshape(batch, *array.shape[-2:])
