"""Weights of 8 and 4 bits: `quantize` makes them once, and `matmul` reads them as they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

_NAMES = ("int8", "int4", "float8_e4m3fn", "mxfp8", "mxfp4")
_known_to_jax: list[bool] = []


@dataclass(frozen=True)
class Quantized:
    """A weight `[..., k, n]` as codes and scales, in the arrays of one framework; `quantize` makes it.

    It is a pytree of JAX's (its arrays are the leaves), so it can be an argument of jitted functions and a part of a
    tree of parameters, stacked and scanned over its leading axes. The arrays of a checkpoint that is quantised already
    can be put into one by hand: `crosstile.kernels.tiles.formats` says where each code lies.

    Attributes:
        values: the codes, `[..., k, n]`, or two a byte `[..., 128 * ceil(k / 256), n]` uint8; with activations
            `[..., n, k]`, or `[..., n, ceil(k / 2)]` uint8.
        scales: `[..., groups, n]` of a float dtype, or of MX formats uint8 (e8m0); with activations and an MX format
            `[..., n, groups]`.
        zeros: the zero points, like the scales, in the dtype of values; or None.
        format: "int8", "int4", "float8_e4m3fn", "mxfp8" or "mxfp4".
        k: how many rows the weight has, which packed values do not tell.
        group_size: how many of k share a scale; None means all.
        activations: the format to which `matmul` rounds what this weight is multiplied with, or None.
        dtype: that the weight had, the one that `dequantize` gives.
    """

    values: Any
    scales: Any
    zeros: Any
    format: str
    k: int
    group_size: int | None = None
    activations: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if "jax" in sys.modules and not _known_to_jax:
            _register_in_jax()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: `[..., k, n]`."""
        n = self.values.shape[-1 if self.activations is None else -2]
        return (*self.values.shape[:-2], self.k, n)

    def dequantize(self, dtype: Any = None) -> Any:
        """The weight `[..., k, n]` that the codes stand for, of that dtype or the original's."""
        from crosstile.arguments import dtype_name
        from crosstile.kernels.tiles.formats import FORMATS, cast, weights

        wanted = self.dtype if dtype is None else dtype_name(dtype)
        arrays = (self.values, self.scales, self.zeros)
        wide = "float64" if wanted == "float64" else "float32"
        turned = self.activations is not None
        found = weights(
            _module_of(self.values), arrays, FORMATS[self.format], self.group_size or 0, self.k, turned, wide
        )
        return cast(found, wanted)

    def to(self, device: Any) -> Quantized:
        """The same on another device, of torch or of JAX."""
        if _module_of(self.values).__name__ == "torch":
            return self._with(lambda array: array.to(device))
        import jax

        return self._with(lambda array: jax.device_put(array, device))

    def _with(self, function: Any) -> Quantized:
        zeros = None if self.zeros is None else function(self.zeros)
        return replace(self, values=function(self.values), scales=function(self.scales), zeros=zeros)


def quantize(
    w: Any,
    dtype: str,
    *,
    group_size: int | None = None,
    zero_points: bool = False,
    activations: str | None = None,
) -> Quantized:
    """The weight in 8 or 4 bits, for `matmul(a, quantized)` in place of `matmul(a, w)`.

    Every scale is the least with which nothing is clipped, and every code the nearest.

    Args:
        w: `[k, n]` or `[..., k, n]`, float, finite; each leading index is a weight of its own. A NaN or an infinity
            makes its group NaN.
        dtype: "int8", "int4", "float8_e4m3fn"; or "mxfp8", "mxfp4": OCP's floats of 8 (e4m3) and 4 (e2m1) bits in
            groups of 32 along k, whose scales are powers of two.
        group_size: 32, 64 or 128 of k share a scale; None: the whole k, one scale a column (MX formats: 32). k need not
            be a multiple of it.
        zero_points: of "int8" and "int4": spread the codes over [min(w, 0), max(w, 0)], not around zero.
        activations: `matmul` rounds each row of what it multiplies by this weight too, with a scale for each row, and
            multiplies codes by codes: "int8" and "float8_e4m3fn" with a dtype of the same name and a scale a column,
            "mxfp8" (a scale for every 32) with "mxfp8" and "mxfp4".

    Returns:
        A `Quantized` of the same framework, on the same device.

    The error of a weight, `abs(w - quantize(w, ...).dequantize())`, is at most half a step (`scale / 2`) of "int8" and
    "int4", and `max(abs(w) / 16, scale / 1024)` of the floats of 8 bits, `max(abs(w), scale) / 4` of "mxfp4", but for
    float32's own rounding. A product `a @ w` is off by at most `abs(a)` times that. The derivation is in
    `crosstile.kernels.tiles.formats`.

    Raises:
        TypeError: w is not a float array of NumPy, torch or JAX.
        ValueError: a name, a group size or a combination that is none; the message names the argument.

    >>> import numpy as np
    >>> w = np.array([[7.0, 1.0], [-3.0, 0.5]])
    >>> quantized = quantize(w, "int4", group_size=32)
    >>> quantized.values.shape, quantized.scales.shape
    ((128, 2), (1, 2))
    >>> quantized.dequantize().round(2).tolist()
    [[7.0, 1.0], [-3.0, 0.43]]
    """
    from crosstile.arguments import FLOATS, common_dtype, show
    from crosstile.kernels.tiles.formats import ACTIVATIONS, FORMATS, GROUP_SIZES, MX_GROUP
    from crosstile.kernels.tiles.formats import stored as as_stored

    original = common_dtype(("w",), (w,), FLOATS)
    if len(w.shape) < 2:
        raise ValueError(f"w: got rank {len(w.shape)}, {show(w.shape)}; it must be [k, n] or [..., k, n]")
    if dtype not in _NAMES:
        raise ValueError(f"dtype: got {dtype!r}; it must be one of {', '.join(_NAMES)}")
    form = FORMATS[dtype]
    sizes: tuple[int | None, ...] = (None, MX_GROUP) if form.block_scales else (None, *GROUP_SIZES)
    if group_size not in sizes:
        hint = ", the group of MX formats" if form.block_scales else ""
        raise ValueError(f"group_size: got {group_size!r}; it must be one of {', '.join(map(str, sizes))}{hint}")
    if zero_points and form.mantissa is not None:
        raise ValueError(f"zero_points: {dtype} has none, its codes are floats; leave it out, or use int8 or int4")
    if activations is not None:
        with_them = [name for name, weights in ACTIVATIONS.items() if dtype in weights]
        if activations not in with_them:
            known = " or ".join(map(repr, with_them)) or "None"
            raise ValueError(f"activations: got {activations!r}; beside a weight of {dtype} it must be {known}")
        if zero_points or (group_size is not None and not form.block_scales):
            name = "zero_points" if zero_points else "group_size"
            raise ValueError(
                f"{name}: with activations={activations!r} a column has one scale and no zero point: leave it out"
            )
    group_size = MX_GROUP if form.block_scales else group_size
    arrays = as_stored(_module_of(w), w, form, group_size or 0, zero_points, activations is not None)
    return Quantized(*arrays, dtype, w.shape[-2], group_size, activations, original)


def _module_of(array: Any) -> Any:
    """numpy, torch, or jax.numpy."""
    from crosstile.dispatch import framework_of

    name = framework_of(("values",), (array,))
    if name == "jax":
        import jax.numpy

        return jax.numpy
    return sys.modules[name]


def _register_in_jax() -> None:
    import jax

    _known_to_jax.append(True)
    jax.tree_util.register_dataclass(
        Quantized,
        data_fields=["values", "scales", "zeros"],
        meta_fields=["format", "k", "group_size", "activations", "dtype"],
    )
