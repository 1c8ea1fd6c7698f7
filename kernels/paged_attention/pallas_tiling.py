"""How the TPU kernel cuts a call: tiles of queries, their rows, blocks of keys, and parts of those."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ..tiles.pallas_tiles import LANES, SUBLANES, pad_to, round_up
from ..tiles.targets import MIB, Target
from ..tiles.tpu_blocks import vmem_budget
from .spec import PagedAttentionInputs, PagedAttentionSpec
from .tiles import PagedAttentionConfig

_ROWS = 16  # a multiple of what fills the sublanes of any dtype


def _registers(spec: PagedAttentionSpec, target: Target, kv_heads: int) -> tuple[int, int, int]:
    """How many columns of scores stay in registers at a time, with how many rows of all heads, and of one.

    Keys of so few heads that they do not fill a register's sublanes pass through twice as many.
    """
    wide = 2 if max(spec.head_dim, spec.v_dim) > LANES or 1 < kv_heads < SUBLANES else 1
    if spec.dtype == "float32":  # whose products pass in pieces
        return 128, 16, 16
    if target.is_tpu and target.on_chip_bytes <= 16 * MIB:  # v4, which unpacks bfloat16 in more steps
        return (256 // wide, 16, 24) if spec.page_dtype == spec.dtype else (128 // wide, 16, 16)
    return 512 // wide, 32, 64


@dataclass(frozen=True)
class Span:
    """Some query of a tile sees a key in [start, end), and every query each key in [full_start, full_end)."""

    start: Any
    end: Any
    full_start: Any
    full_end: Any


@dataclass(frozen=True)
class Tiling:
    """How a call is cut: tiles of `queries` queries, whose rows are in `groups` (one, or one a key head) of `rows`.

    A block of keys is computed in parts of `part` columns for `chunk` rows at a time, and copied in pieces of a page.
    """

    together: bool
    queries: int
    tiles: int
    rows: int
    chunk: int
    block_kv: int
    part: int
    kv_heads: int
    group: int
    page_size: int
    max_pages: int

    @staticmethod
    def choose(
        spec: PagedAttentionSpec, config: PagedAttentionConfig, target: Target, arrays: PagedAttentionInputs
    ) -> Tiling:
        (_, q_len, q_heads, _), (_, page_size, kv_heads, _) = arrays.q.shape, arrays.k_pages.shape
        max_pages, group = arrays.page_table.shape[1], q_heads // kv_heads
        few = q_heads * q_len <= config.decode.block_rows
        together = few or kv_heads == 1
        tiles = config.decode if few else config.prefill
        block_kv = min(tiles.block_kv, 1 << (max_pages * page_size - 1).bit_length())
        queries = min(q_len, max(1, tiles.block_rows // (q_heads if together else group)))
        while True:
            sizes = q_len, queries, block_kv, kv_heads, group, page_size, max_pages
            tiling = Tiling._cut(together, *sizes, *_registers(spec, target, kv_heads))
            if target.interpreted or tiling._vmem_bytes(spec, arrays) <= vmem_budget(target) * 7 // 8:
                return tiling
            if block_kv > LANES or queries == 1:
                block_kv //= 2
            else:
                queries = -(-queries // 2)
            if block_kv < 16:
                return tiling

    @staticmethod
    def _cut(
        together: bool, q_len: int, queries: int, block_kv: int, kv_heads: int, group: int, page_size: int,
        max_pages: int, part: int, rows_together: int, rows_by_head: int,
    ) -> Tiling:  # fmt: skip
        rows = round_up(queries * group * (kv_heads if together else 1), _ROWS)
        chunk = min(rows, rows_together if together else rows_by_head)
        rows = round_up(rows, chunk)
        stride = kv_heads if together else 1
        # Parts begin at whole registers of 128 lanes.
        keys = max(LANES // gcd(LANES, stride), 1 << max(part // stride, 1).bit_length() - 1)
        part = min(keys, block_kv) * stride
        tiles = -(-q_len // queries)
        return Tiling(together, queries, tiles, rows, chunk, block_kv, part, kv_heads, group, page_size, max_pages)

    def _vmem_bytes(self, spec: PagedAttentionSpec, arrays: PagedAttentionInputs) -> int:
        """An estimate: blocks of keys, rows and what is kept of each, scores."""
        width, v_width = round_up(spec.head_dim, LANES) + round_up(spec.v_dim, LANES), round_up(spec.v_dim, LANES)
        keys, rows = self.block_kv * round_up(self.kv_heads, 8), self.groups * self.rows
        found = 2 * keys * width * arrays.k_pages.dtype.itemsize
        if not self.together:
            found += 4 * (keys + self.block_kv) * width
        columns = 6 if arrays.sinks is not None or arrays.k_scales is not None or arrays.v_scales is not None else 4
        found += rows * (2 * width * arrays.q.dtype.itemsize + 4 * v_width + 4 * LANES * columns)
        return found + 4 * self.chunk * self.columns

    @property
    def groups(self) -> int:
        return 1 if self.together else self.kv_heads

    @property
    def columns(self) -> int:
        return self.block_kv * (self.kv_heads if self.together else 1)

    @property
    def piece(self) -> int:
        return min(self.page_size, self.block_kv)

    def for_each_chunk(self, act: Any) -> None:
        """act(group, slice of rows)."""

        def one(number: Any, _: None) -> None:
            chunks = self.rows // self.chunk
            at = pl.multiple_of(lax.rem(number, chunks) * self.chunk, self.chunk)
            act(lax.div(number, chunks), pl.ds(at, self.chunk))

        lax.fori_loop(0, self.groups * self.rows // self.chunk, one, None)

    def span(self, spec: PagedAttentionSpec, first_query: Any, length: Any, q_length: Any) -> Span:
        """For the tile of queries from that one."""
        offset = length - q_length
        last_query = jnp.minimum(first_query + self.queries, q_length) - 1
        start, full_start = jnp.int32(0), jnp.int32(0)
        end, full_end = length, length
        if spec.causal:
            end = jnp.minimum(last_query + offset + 1, length)
            full_end = jnp.minimum(first_query + offset + 1, length)
        if spec.window_left is not None:
            start = jnp.maximum(first_query + offset - spec.window_left, 0)
            full_start = jnp.maximum(last_query + offset - spec.window_left, 0)
        end = jnp.where(last_query < first_query, 0, end)
        return Span(start, jnp.maximum(end, start), full_start, full_end)

    def pack(self, array: jax.Array) -> jax.Array:
        """[batch, q_len, q_heads, dim] -> [batch, tiles, groups, rows, dim]."""
        batch, _, _, dim = array.shape
        array = pad_to(array, 1, self.tiles * self.queries)
        array = array.reshape(batch, self.tiles, self.queries, self.kv_heads, self.group, dim)
        array = array.transpose(0, 1, 3, 2, 4, 5).reshape(batch, self.tiles, self.groups, -1, dim)
        return pad_to(array, 3, self.rows)

    def unpack(self, array: jax.Array, q_len: int) -> jax.Array:
        """The inverse of `pack`."""
        batch, dim = array.shape[0], array.shape[4]
        array = array[:, :, :, : self._real_rows]
        array = array.reshape(batch, self.tiles, self.kv_heads, self.queries, self.group, dim)
        array = array.transpose(0, 1, 3, 2, 4, 5).reshape(batch, self.tiles * self.queries, -1, dim)
        return array[:, :q_len]

    @property
    def _real_rows(self) -> int:
        return self.queries * self.group * self.kv_heads // self.groups

    @property
    def row_numbers(self) -> jax.Array:
        """int32 [rows, 2]: each row's query and key head; the head of one that pads is none."""
        row = np.arange(self.rows)
        per_head = self.queries * self.group
        query = np.where(row < self._real_rows, row % per_head // self.group, np.iinfo(np.int32).max // 2)
        head = np.where(row < self._real_rows, row // per_head, -1)
        return jnp.asarray(np.stack([query, head], axis=1), jnp.int32)

    @property
    def column_heads(self) -> jax.Array:
        """int32 [1, columns]."""
        return jnp.asarray(np.arange(self.columns) % (self.columns // self.block_kv), jnp.int32)[None]
