"""Small launch plans for the compile check: one that is as it must be, and bad ones."""

import triton
import triton.language as tl

from crosstile.kernels.tiles.launch import Launch, Plan, contiguous


@triton.jit
def product(a, b, c, stride, BLOCK: tl.constexpr):
    """c = a @ b for one tile of BLOCK by BLOCK."""
    at = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(c.dtype.element_ty))


@triton.jit
def product_by_hand(a, b, c, stride, BLOCK: tl.constexpr):
    """The same by multiplying and adding: no tensor core."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(BLOCK):
        x = tl.load(a + rows * stride + k).to(tl.float32)
        y = tl.load(b + k * stride + columns).to(tl.float32)
        total += x[:, None] * y[None, :]
    tl.store(c + rows[:, None] * stride + columns[None, :], total.to(c.dtype.element_ty))


def plan(kernel, block: int = 64, dtype: str = "bfloat16", num_warps: int = 4, dot_dtype: str = "bfloat16") -> Plan:
    """One launch over three square arrays."""
    array = contiguous((block, block), dtype)
    launch = Launch(
        kernel, (1,), ("a", "b"), ("c",), {"stride": block}, {"BLOCK": block}, num_warps=num_warps, dot_dtype=dot_dtype
    )
    return Plan((launch,), {"a": array, "b": array}, {"c": array})
