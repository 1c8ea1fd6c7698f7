"""Fused kernels for transformers, hand-written for each chip, behind one function an op.

>>> import numpy as np
>>> import crosstile
>>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
>>> crosstile.attention(q, k, v, causal=True).shape
(1, 4, 2, 8)
"""

from crosstile.dispatch import explain, supports, target, use
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.ops import attention, matmul

__version__ = "0.1.0"

__all__ = ["UnsupportedError", "attention", "explain", "matmul", "supports", "target", "use"]
