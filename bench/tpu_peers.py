"""Kernels of jax that do the same work on a TPU, each called at its best: in its own layout, with any tiles.

One function a peer. Arrays come as the peer wants them in memory, so that nothing is charged to it but its own work;
a scale that the peer leaves to its caller is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .attention_shapes import AttentionShape
from .grouped_shapes import GroupedShape
from .matmul_shapes import MatmulShape
from .paged_shapes import PagedAttentionShape
from .peers import Call, Tiles


def flash(shape: AttentionShape, dtype: str, tiles: Tiles) -> Call:
    """`jax.experimental.pallas.ops.tpu.flash_attention`: it has no groups of heads, so keys come once for each."""
    import jax
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    blocks = {"block_b": 1, "block_q": 128, "block_k_major": 128, "block_k": 128} | dict(tiles)
    function = partial(
        module.flash_attention, causal=shape.causal, sm_scale=1.0, block_sizes=module.BlockSizes(**blocks)
    )
    array = jax.ShapeDtypeStruct((shape.batch, shape.q_heads, shape.q_len, shape.head_dim), dtype)

    def call(floats: Mapping[str, Any], integers: Mapping[str, Any]) -> Any:
        given = integers.get("segments")
        return function(**floats, segment_ids=None if given is None else module.SegmentIds(given, given))

    return Call(call, dict.fromkeys("qkv", array), {"segments": _segments(shape)[None]} if shape.packed else {})


def splash(shape: AttentionShape, dtype: str, tiles: Tiles) -> Call:
    """`jax.experimental.pallas.ops.tpu.splash_attention`: one sequence, its mask known to the host.

    `seq_minor` are the arrays that lie in memory with their sequence innermost: 1 k, 2 k and v, 3 q, k and v.
    """
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as module

    blocks: dict[str, Any] = {"block_q": 128, "block_kv": 128, **tiles}
    turned = ("", "k", "kv", "qkv")[blocks.pop("seq_minor", 0)]
    layouts: dict[str, Any] = {f"{name}_layout": module.QKVLayout.SEQ_MINOR for name in turned}
    blocks["use_fused_bwd_kernel"] = bool(blocks.get("use_fused_bwd_kernel", 0))
    size = shape.q_len, shape.kv_len
    head = module.CausalMask(size) if shape.window is None else module.LocalMask(size, (shape.window, 0), 0)
    kernel = module.make_splash_mha_single_device(
        mask=module.MultiHeadMask([head] * shape.q_heads),
        block_sizes=module.BlockSizes(**blocks, **layouts),
        downcast_smem_data=False,
    )

    def call(floats: Mapping[str, Any], integers: Mapping[str, Any]) -> Any:
        arrays = {name: array.swapaxes(1, 2) if name in turned else array for name, array in floats.items()}
        segments = module.SegmentIds(integers["segments"], integers["segments"]) if integers else None
        return kernel(**arrays, segment_ids=segments)

    lengths = {
        "q": (shape.q_heads, shape.q_len),
        "k": (shape.kv_heads, shape.kv_len),
        "v": (shape.kv_heads, shape.kv_len),
    }
    floats = {}
    for name, (heads, length) in lengths.items():
        ends = (shape.head_dim, length) if name in turned else (length, shape.head_dim)
        floats[name] = jax.ShapeDtypeStruct((heads, *ends), dtype)
    return Call(call, floats, {"segments": _segments(shape)} if shape.packed else {})


def _segments(shape: AttentionShape) -> np.ndarray:
    """The number of its document, of every token."""
    return np.arange(shape.q_len, dtype=np.int32) // (shape.q_len // shape.packed)


def pallas_matmul(shape: MatmulShape, dtype: str, tiles: Tiles) -> Call:
    """`jax.experimental.pallas.ops.tpu.matmul`: the product alone, of sizes that its tiles divide."""
    from jax.experimental.pallas.ops.tpu.matmul import matmul

    block = tiles["block_m"], tiles["block_n"]
    return Call(
        lambda floats, _: matmul(floats["a"], floats["b"], block_shape=block, block_k=tiles["block_k"]),
        _product(shape, dtype),
        {},
    )


def xla_matmul(shape: MatmulShape, dtype: str, tiles: Tiles) -> Call:
    """XLA's own product, with the tiles that it chooses."""
    import jax.numpy as jnp

    return Call(
        lambda floats, _: jnp.dot(floats["a"], floats["b"], preferred_element_type=dtype), _product(shape, dtype), {}
    )


def _product(shape: MatmulShape, dtype: str) -> dict[str, Any]:
    import jax

    return {
        "a": jax.ShapeDtypeStruct((shape.m, shape.k), dtype),
        "b": jax.ShapeDtypeStruct((shape.k, shape.n), dtype),
    }


def megablox(shape: GroupedShape, dtype: str, tiles: Tiles) -> Call:
    """`jax.experimental.pallas.ops.tpu.megablox.gmm`."""
    import jax
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    turned = shape.weight_rows_are_outputs
    tiling = tiles["block_m"], tiles["block_k"], tiles["block_n"]
    floats = {
        "lhs": jax.ShapeDtypeStruct((shape.tokens, shape.k), dtype),
        "rhs": jax.ShapeDtypeStruct((shape.groups, *((shape.n, shape.k) if turned else (shape.k, shape.n))), dtype),
    }
    sizes = np.asarray(shape.integers()["group_sizes"], np.int32)
    return Call(
        lambda floats, integers: gmm(
            floats["lhs"], floats["rhs"], integers["sizes"], np.dtype(floats["lhs"].dtype), tiling, transpose_rhs=turned
        ),
        floats,
        {"sizes": sizes},
    )


def ragged_paged(shape: PagedAttentionShape, dtype: str, tiles: Tiles) -> Call:
    """`jax.experimental.pallas.ops.tpu.ragged_paged_attention`, whose pages have keys and values by turns."""
    import jax
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    given = shape.integers()
    pages = shape.kv_len // shape.page_size
    floats = {
        "q": jax.ShapeDtypeStruct((shape.batch * shape.q_len, shape.q_heads, shape.head_dim), dtype),
        "kv_pages": jax.ShapeDtypeStruct(
            (shape.batch * pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim), dtype
        ),
    }
    integers = {
        "kv_lens": np.asarray(given["lengths"], np.int32),
        "page_indices": np.asarray(given["page_table"], np.int32),
        "cu_q_lens": np.arange(shape.batch + 1, dtype=np.int32) * shape.q_len,
        "num_seqs": np.array([shape.batch], np.int32),
    }
    blocks = {
        "num_kv_pages_per_block": tiles["tokens"] // shape.page_size,
        "num_queries_per_block": tiles["queries"],
    }
    return Call(lambda floats, integers: ragged_paged_attention(**floats, **integers, **blocks), floats, integers)


def paged(shape: PagedAttentionShape, dtype: str, tiles: Tiles) -> Call:
    """`jax.experimental.pallas.ops.tpu.paged_attention`: one query a sequence, pages of one head each."""
    import jax
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    given = shape.integers()
    used = shape.batch * shape.kv_len // shape.page_size
    pages = jax.ShapeDtypeStruct((shape.kv_heads, used, shape.page_size, shape.head_dim), dtype)
    query = jax.ShapeDtypeStruct((shape.batch, shape.q_heads, shape.head_dim), dtype)
    return Call(
        lambda floats, integers: paged_attention(
            **floats, **integers, pages_per_compute_block=tiles["tokens"] // shape.page_size
        ),
        {"q": query, "k_pages": pages, "v_pages": pages},
        {
            name: np.asarray(given[of], np.int32)
            for name, of in (("lengths", "lengths"), ("page_indices", "page_table"))
        },
    )


JAX: dict[str, Callable[..., Call]] = {
    "flash": flash,
    "splash": splash,
    "pallas matmul": pallas_matmul,
    "XLA": xla_matmul,
    "megablox": megablox,
    "ragged paged attention": ragged_paged,
    "paged attention": paged,
}
