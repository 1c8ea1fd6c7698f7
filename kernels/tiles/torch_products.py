"""Products of torch's tensors for the ops that run by its own operations."""

from __future__ import annotations

from typing import Any

import torch


def product(x: Any, weight: Any, bias: Any = None) -> Any:
    """`x @ weight + bias`: [..., in], [in, out] or with leading dimensions, and [out].

    One row on a CPU takes sums along the columns of a matrix that is stored by columns: a product of MKL's stays at a
    third of the memory's bandwidth there, and what torch compiles of the sums reaches it.
    """
    one_row = x.shape[:-1].numel() == 1 and weight.dim() == 2
    if one_row and weight.stride(0) == 1 and x.device.type == "cpu":
        out = torch.mv(weight.T, x.reshape(-1)).reshape(*x.shape[:-1], weight.shape[1])
    elif bias is not None and weight.dim() == 2:
        return torch.nn.functional.linear(x, weight.T, bias)
    else:
        out = torch.matmul(x, weight)
    return out if bias is None else out + bias
