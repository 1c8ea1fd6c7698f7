"""Arrays of any framework in any layout: sliced, transposed, of stride 0, reversed; and back as NumPy's of float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

LAYOUTS = ("contiguous", "sliced", "transposed", "broadcast", "reversed")
FORWARD = LAYOUTS[:4]  # those that torch has: no stride of it is negative


def native(dtype: str) -> Any:
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def repeated(array: np.ndarray, layout: str) -> np.ndarray:
    """With the layout "broadcast" all rows (of a vector, all elements) are the first, as in an array of stride 0."""
    return np.broadcast_to(_first(array), array.shape) if layout == "broadcast" and array.size else array


def _first(array: np.ndarray) -> np.ndarray:
    return array[..., :1, :] if array.ndim > 1 else array[:1]


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values in another layout. NaN, or the least integer, lies around a slice, where nothing may look."""
    if layout == "sliced":
        unseen = np.iinfo(array.dtype).min if array.dtype.kind in "iu" else np.nan
        storage = np.full([2 * size + 3 for size in array.shape], unseen, array.dtype)
        view = storage[tuple(slice(1, 1 + 2 * size, 2) for size in array.shape)]
        view[...] = array
        return view
    if layout == "transposed" and array.ndim:
        return np.ascontiguousarray(array.T).T
    if layout == "reversed" and array.ndim:
        return np.ascontiguousarray(np.flip(array))[(slice(None, None, -1),) * array.ndim]
    if layout == "broadcast" and array.size:
        return np.broadcast_to(np.ascontiguousarray(_first(array)), array.shape)
    return array.copy(order="C")


def placed(array: np.ndarray, dtype: str, layout: str, framework: str, device: str = "cpu") -> Any:
    """The array in that dtype and layout: torch has no negative strides, JAX none at all."""
    if framework == "torch":
        return to_torch(array, dtype, layout, device)
    laid = laid_out(array.astype(native(dtype)), layout)
    if framework == "jax":
        import jax.numpy as jnp

        return jnp.asarray(laid)
    return laid


def to_torch(array: np.ndarray, dtype: str, layout: str, device: str = "cpu") -> torch.Tensor:
    laid = laid_out(array.astype(native(dtype)), "contiguous" if layout == "reversed" else layout)
    bits = torch.from_numpy(_whole(laid).view(f"u{laid.itemsize}")).view(getattr(torch, dtype))
    strides = [stride // laid.itemsize for stride in laid.strides]
    return torch.as_strided(bits.to(device), laid.shape, strides, (laid.ctypes.data - _start(laid)) // laid.itemsize)


def _whole(view: np.ndarray) -> np.ndarray:
    """The vector of all elements of the storage that the view is of, copied."""
    return np.array(_base(view).ravel(order="K"))


def _start(view: np.ndarray) -> int:
    return _base(view).ctypes.data


def _base(view: np.ndarray) -> np.ndarray:
    while isinstance(view.base, np.ndarray):
        view = view.base
    return view


def to_numpy(array: Any) -> np.ndarray:
    """Its values in float64."""
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().double().numpy()
    return np.asarray(array).astype(np.float64)


def dtype_of(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")
