"""Fused kernels for transformers, hand-written for each chip, behind one function an op.

>>> import numpy as np
>>> import crosstile
>>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
>>> crosstile.attention(q, k, v, causal=True).shape
(1, 4, 2, 8)
"""

from crosstile.cross_entropy import linear_cross_entropy, linear_cross_entropy_shard, merge_cross_entropy
from crosstile.dispatch import explain, supports, target, use
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.merge import merge_attention
from crosstile.ops import (
    attention,
    glu_matmul,
    grouped_glu_matmul,
    grouped_matmul,
    layer_norm,
    matmul,
    rms_norm,
    rotary,
    varlen_attention,
)
from crosstile.paged import paged_attention
from crosstile.quantization import Quantized, quantize
from crosstile.routing import moe
from crosstile.sharding import sharded

__version__ = "0.1.0"

__all__ = [
    "Quantized",
    "UnsupportedError",
    "attention",
    "explain",
    "glu_matmul",
    "grouped_glu_matmul",
    "grouped_matmul",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_shard",
    "matmul",
    "merge_attention",
    "merge_cross_entropy",
    "moe",
    "paged_attention",
    "quantize",
    "rms_norm",
    "rotary",
    "sharded",
    "supports",
    "target",
    "use",
    "varlen_attention",
]
