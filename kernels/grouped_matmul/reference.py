"""The product of each group's rows with its matrix, and the gate, in NumPy, forward and backward: the definition.

float64 inputs are computed in float64, all others in float32. The gate is a GLU variant (Shazeer, arXiv:2002.05202).
Quantised matrices are what their codes and scales say, exactly, and have no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..tiles.activations import activate, derivative
from ..tiles.formats import FORMATS, weights
from .spec import INPUTS, GroupedMatmulSpec


def rows_of_groups(group_sizes: np.ndarray, tokens: int) -> Iterator[tuple[int, int, slice]]:
    """(batch, group, its rows); sizes below 0 count as 0, and rows that lhs does not have are nobody's."""
    for item, sizes in enumerate(group_sizes):
        end = 0
        for group, size in enumerate(sizes):
            first, end = end, min(end + max(int(size), 0), tokens)
            yield item, group, slice(first, end)


def forward(
    spec: GroupedMatmulSpec,
    lhs: np.ndarray,
    rhs: np.ndarray,
    rhs_up: np.ndarray | None,
    group_sizes: np.ndarray,
    *scales_and_zeros: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """out, and the preactivations where the spec asks for them."""
    rhs, rhs_up = _matrices(spec, lhs, rhs, rhs_up, *scales_and_zeros)
    (batch, tokens, _), n = lhs.shape, rhs.shape[3]
    products: np.ndarray = np.zeros((batch, 2, tokens, n), _wide(lhs))
    for item, group, rows in rows_of_groups(group_sizes, tokens):
        for half, weight in enumerate((rhs, rhs_up)):
            if weight is not None:
                products[item, half, rows] = _product(lhs[item, rows], weight[item, group])
    out = products[:, 0]
    if spec.activation is not None:
        out = activate(spec.activation, out) * products[:, 1]
    return out.astype(lhs.dtype), (products.astype(lhs.dtype) if spec.save_preactivations else None)


def backward(
    spec: GroupedMatmulSpec,
    inputs: tuple[Any, ...],
    outputs: tuple[np.ndarray, np.ndarray | None],
    gradients: tuple[np.ndarray, None],
) -> tuple[np.ndarray | None, ...]:
    """dlhs, and of matrices that are not quantised drhs, and drhs_up where rhs_up is there."""
    lhs, rhs, rhs_up, group_sizes, *scales_and_zeros = inputs
    rhs, rhs_up = _matrices(spec, lhs, rhs, rhs_up, *scales_and_zeros)
    dlhs: np.ndarray = np.zeros(lhs.shape, _wide(lhs))
    drhs: np.ndarray = np.zeros(rhs.shape, _wide(lhs))
    drhs_up = None if rhs_up is None else np.zeros_like(drhs)
    for item, group, rows in rows_of_groups(group_sizes, lhs.shape[1]):
        dout: np.ndarray = gradients[0][item, rows].astype(_wide(lhs))
        dz_up = dout
        if spec.activation is not None:
            assert outputs[1] is not None, "a backward reads the saved preactivations"
            gate, up = outputs[1][item, :, rows].astype(_wide(lhs))
            dz_up = dout * activate(spec.activation, gate)
            dout = dout * up * derivative(spec.activation, gate)
        dlhs[item, rows] = _product(dout, rhs[item, group].T)
        drhs[item, group] = _product(lhs[item, rows].T, dout)
        if rhs_up is not None and drhs_up is not None:
            dlhs[item, rows] += _product(dz_up, rhs_up[item, group].T)
            drhs_up[item, group] = _product(lhs[item, rows].T, dz_up)
    narrow, others = lhs.dtype, (None,) * (len(INPUTS) - 3)
    if spec.format is not None:
        return dlhs.astype(narrow), None, None, *others
    return dlhs.astype(narrow), drhs.astype(narrow), (None if drhs_up is None else drhs_up.astype(narrow)), *others


def _matrices(
    spec: GroupedMatmulSpec,
    lhs: np.ndarray,
    rhs: np.ndarray,
    rhs_up: np.ndarray | None,
    scales: np.ndarray | None = None,
    zeros: np.ndarray | None = None,
    up_scales: np.ndarray | None = None,
    up_zeros: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """rhs and rhs_up, as numbers."""
    if spec.format is None:
        return rhs, rhs_up
    form, size, k, wide = FORMATS[spec.format], spec.group_size, lhs.shape[2], np.dtype(_wide(lhs)).name
    found = weights(np, (rhs, scales, zeros), form, size, k, False, wide)
    return found, (None if rhs_up is None else weights(np, (rhs_up, up_scales, up_zeros), form, size, k, False, wide))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, computed in float64 for float64 and in float32 for all others."""
    product: np.ndarray = a.astype(_wide(a)) @ b.astype(_wide(b))
    return product


def _wide(array: np.ndarray) -> type:
    return np.float64 if array.dtype == np.float64 else np.float32
