"""Which function makes the spec and the arrays of a public call, and which brings an op's arrays to canonical form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosstile import arguments, cross_entropy, glu_arguments, norm_arguments, paged, rotary_arguments

RUN_BY = {  # public functions that are another op's kernels
    "linear_cross_entropy_shard": "linear_cross_entropy",
    "varlen_attention": "attention",
    "rms_norm": "norm",
    "layer_norm": "norm",
}
PREPARE: dict[str, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    "attention": arguments.prepare_attention,
    "varlen_attention": arguments.prepare_varlen_attention,
    "paged_attention": paged.prepare_paged_attention,
    "matmul": arguments.prepare_matmul,
    "glu_matmul": glu_arguments.prepare_glu_matmul,
    "rms_norm": norm_arguments.prepare_rms_norm,
    "layer_norm": norm_arguments.prepare_layer_norm,
    "rotary": rotary_arguments.prepare_rotary,
    "linear_cross_entropy": cross_entropy.prepare_linear_cross_entropy,
    "linear_cross_entropy_shard": cross_entropy.prepare_linear_cross_entropy_shard,
}
CANONICAL: dict[str, Callable[..., Any]] = {
    "attention": arguments.canonical_as_it_is,
    "linear_cross_entropy": arguments.canonical_as_it_is,
    "paged_attention": arguments.canonical_as_it_is,
    "matmul": arguments.canonical_matmul,
    "glu_matmul": glu_arguments.canonical_glu_matmul,
    "norm": norm_arguments.canonical_norm,
    "rotary": rotary_arguments.canonical_rotary,
}
