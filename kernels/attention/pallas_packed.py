"""Packed sequences on TPUs: spread over a batch of the longest's length, and gathered again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..tiles.pallas_tiles import pad_to
from .spec import AttentionInputs, AttentionSpec


@dataclass(frozen=True)
class Packing:
    """Where the tokens of one side are: `[1, tokens, ...]` packed, `[sequences, size, ...]` spread.

    Attributes:
        starts: int32 `[sequences + 1]`.
        tokens: of the packed array.
        size: of the spread one, not below the longest sequence.
    """

    starts: jax.Array
    tokens: int
    size: int

    @property
    def sequences(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def lengths(self) -> jax.Array:
        return jnp.diff(self.starts)

    def spread(self, array: Any) -> Any:
        """What stands past the end of a sequence is some other token's, or 0."""
        if array is None:
            return None
        padded = pad_to(array[0], 0, self.tokens + self.size)
        return lax.map(lambda start: lax.dynamic_slice_in_dim(padded, start, self.size), self.starts[:-1])

    def packed(self, array: jax.Array, absent: float = 0.0) -> jax.Array:
        """The reverse; tokens that no sequence has get the value `absent`.

        What a sequence leaves past its end the next one writes over.
        """

        def write(tokens: jax.Array, sequence: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return lax.dynamic_update_slice_in_dim(tokens, *sequence, axis=0), None

        nothing = jnp.full((self.tokens + self.size, *array.shape[2:]), absent, array.dtype)
        tokens, _ = lax.scan(write, nothing, (array, self.starts[:-1]))
        return lax.dynamic_update_slice_in_dim(tokens, nothing[: self.size], self.starts[-1], 0)[None, : self.tokens]


def packings(spec: AttentionSpec, arrays: AttentionInputs) -> tuple[Packing, Packing]:
    """Of the queries and of the keys."""
    tokens = arrays.q.shape[1], arrays.k.shape[1]
    starts = arrays.cu_seqlens_q, arrays.cu_seqlens_k
    return tuple(
        Packing(start.astype(jnp.int32), count, size)
        for start, count, size in zip(starts, tokens, longest(spec, arrays), strict=True)
    )  # type: ignore[return-value]


def longest(spec: AttentionSpec, arrays: AttentionInputs) -> tuple[int, int]:
    """How many queries, and how many keys, a sequence has at most; those of the arrays where nothing is packed."""
    q_count, kv_count = arrays.q.shape[1], arrays.k.shape[1]
    q_bound, kv_bound = spec.max_seqlen_q, spec.max_seqlen_k
    return (
        q_count if q_bound is None else min(q_bound, q_count),
        kv_count if kv_bound is None else min(kv_bound, kv_count),
    )


def spread_inputs(arrays: AttentionInputs, queries: Packing, keys: Packing) -> AttentionInputs:
    """The inputs as a batch of sequences with lengths."""
    sinks = arrays.sinks
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, (queries.sequences, sinks.shape[1]))
    return arrays._replace(
        q=queries.spread(arrays.q),
        k=keys.spread(arrays.k),
        v=keys.spread(arrays.v),
        q_lengths=queries.lengths,
        kv_lengths=keys.lengths,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sinks=sinks,
    )


def spread_rows(statistic: Any, queries: Packing) -> Any:
    """`[1, heads, tokens]` -> `[sequences, heads, size]`, -inf past the end of a sequence."""
    if statistic is None:
        return None
    exists = jnp.arange(queries.size) < queries.lengths[:, None, None]
    return jnp.where(exists, queries.spread(statistic.swapaxes(1, 2)).swapaxes(1, 2), -jnp.inf)


def packed_rows(statistic: jax.Array, queries: Packing) -> jax.Array:
    """The reverse; -inf for tokens that no sequence has."""
    return queries.packed(statistic.swapaxes(1, 2), -jnp.inf).swapaxes(1, 2)
