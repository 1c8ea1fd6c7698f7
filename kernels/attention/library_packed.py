"""Packed sequences as a padded batch and back, by index arithmetic: no shape depends on a value, as jit wants it."""

from __future__ import annotations

from math import inf
from typing import Any

from .library_dense import Framework
from .spec import AttentionInputs, AttentionSpec


def unpack(framework: Framework, spec: AttentionSpec, arrays: AttentionInputs) -> AttentionInputs:
    """The arrays of a batch of sequences, each padded to max_seqlen_q and max_seqlen_k, with their lengths."""
    starts_q, starts_k = arrays.cu_seqlens_q, arrays.cu_seqlens_k
    q = _rows_of_sequences(framework, arrays.q[0], starts_q, spec.max_seqlen_q)
    k, v = (_rows_of_sequences(framework, array[0], starts_k, spec.max_seqlen_k) for array in (arrays.k, arrays.v))
    lengths = {"q_lengths": starts_q[1:] - starts_q[:-1], "kv_lengths": starts_k[1:] - starts_k[:-1]}
    return arrays._replace(q=q, k=k, v=v, cu_seqlens_q=None, cu_seqlens_k=None, **lengths)


def pack(framework: Framework, arrays: AttentionInputs, out: Any, lse: Any) -> tuple[Any, Any]:
    """out and lse (or None) of the padded batch, a row a token: 0 and -inf for tokens that no sequence has.

    arrays are those of the packed call.
    """
    xp, starts, tokens = framework.xp, arrays.cu_seqlens_q, arrays.q.shape[1]
    sequences, longest = out.shape[:2]
    token = xp.arange(tokens, dtype=xp.int32, **framework.place)
    sequence = xp.searchsorted(starts[1:], token, side="right")  # past the last: the number of sequences
    row = token - starts[sequence]
    within = (sequence < sequences) & (row < longest)
    index = xp.where(within, sequence * longest + row, sequences * longest)
    out = _rows(xp, out.reshape(sequences * longest, *out.shape[2:]), index, 0.0)[None]
    if lse is not None:
        by_row = xp.swapaxes(lse, 1, 2).reshape(sequences * longest, lse.shape[1])
        lse = xp.swapaxes(_rows(xp, by_row, index, -inf), 0, 1)[None]
    return out, lse


def _rows_of_sequences(framework: Framework, array: Any, starts: Any, longest: int | None) -> Any:
    """[sequences, longest, heads, dim] of the packed rows [tokens, heads, dim], with 0 past the end of a sequence."""
    xp = framework.xp
    index = starts[:-1, None] + xp.arange(longest, dtype=xp.int32, **framework.place)
    index = xp.where(index < starts[1:, None], index, array.shape[0])
    return _rows(xp, array, index, 0.0)


def _rows(xp: Any, array: Any, index: Any, otherwise: float) -> Any:
    """The rows at an index; that of the number of rows is a row of another value."""
    more = xp.full_like(array[:1], otherwise) if array.shape[0] else xp.full_like(array.sum(0)[None], otherwise)
    return xp.concatenate((array, more))[index]
