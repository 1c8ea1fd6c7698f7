"""Which function makes the spec and the arrays of a public call, and which brings an op's arrays to canonical form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosstile import (
    arguments,
    cross_entropy,
    glu_arguments,
    grouped_arguments,
    norm_arguments,
    paged,
    quantized_arguments,
    rotary_arguments,
)
from crosstile.kernels.quantized_matmul.spec import QuantizedMatmulSpec

RUN_BY = {  # public functions that are another op's kernels
    "grouped_glu_matmul": "grouped_matmul",
    "linear_cross_entropy_shard": "linear_cross_entropy",
    "varlen_attention": "attention",
    "rms_norm": "norm",
    "layer_norm": "norm",
}


def run_by(function: str, spec: Any) -> str:
    """The op whose kernels run a call of that public function; a matmul's weight may be quantised."""
    return "quantized_matmul" if isinstance(spec, QuantizedMatmulSpec) else RUN_BY.get(function, function)


PREPARE: dict[str, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    "attention": arguments.prepare_attention,
    "varlen_attention": arguments.prepare_varlen_attention,
    "paged_attention": paged.prepare_paged_attention,
    "matmul": quantized_arguments.prepare_matmul,
    "glu_matmul": glu_arguments.prepare_glu_matmul,
    "grouped_matmul": grouped_arguments.prepare_grouped_matmul,
    "grouped_glu_matmul": grouped_arguments.prepare_grouped_glu_matmul,
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
    "grouped_matmul": grouped_arguments.canonical_grouped_matmul,
    "quantized_matmul": quantized_arguments.canonical_quantized_matmul,
    "norm": norm_arguments.canonical_norm,
    "rotary": rotary_arguments.canonical_rotary,
}
