"""Kernels of tokamax (openxla/tokamax, Apache-2.0), called as `tpu_peers.py` calls those of jax.

They need an interpreter that has tokamax; `crosstile standings --tokamax PYTHON` names one. Their own kernels are
called, below tokamax's choice of tiles, so that every tile can be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .attention_shapes import AttentionShape
from .cross_entropy_shapes import CrossEntropyShape
from .grouped_shapes import GroupedShape
from .peers import Call, Tiles


def splash(shape: AttentionShape, dtype: str, tiles: Tiles) -> Call:
    """tokamax' splash attention: its backward is one kernel; `scheduler`, `diagonal` and `reduction` are its options.

    `seq_minor` is as in jax' splash attention; `diagonal` is the grid in which it skips products above the diagonal.
    """
    import jax
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as module
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    blocks: dict[str, Any] = {"block_q": 1024, "block_kv": 1024, **tiles}
    turned = ("", "k", "kv", "qkv")[blocks.pop("seq_minor", 0)]
    layouts = {f"{name}_layout": module.QKVLayout.SEQ_MINOR for name in turned}
    diagonal = blocks.pop("diagonal", 0)
    skips = {"qk_diag_skip": True, "sv_diag_skip": True, "qk_diag_grid": diagonal} if diagonal else {}
    reduction = blocks.pop("reduction", 0) or None
    config = module.SplashConfig(
        use_experimental_scheduler=bool(blocks.pop("scheduler", 0)),
        dq_reduction_steps=reduction,
        **blocks,
        **layouts,
        **skips,
    )
    size = shape.q_len, shape.kv_len
    mask = masks.CausalMask(size) if shape.window is None else masks.LocalMask(size, (shape.window, 0), 0)
    kernel = module.make_splash_mha_single_device(mask, config=config, downcast_smem_data=False)

    def call(floats: Mapping[str, Any], integers: Mapping[str, Any]) -> Any:
        arrays = {name: array.swapaxes(1, 2) if name in turned else array for name, array in floats.items()}
        segments = module.SegmentIds(integers["segments"], integers["segments"]) if integers else None
        return kernel(**arrays, segment_ids=segments)

    floats = {}
    for name, heads, length in (
        ("q", shape.q_heads, shape.q_len),
        ("k", shape.kv_heads, shape.kv_len),
        ("v", shape.kv_heads, shape.kv_len),
    ):
        ends = (shape.head_dim, length) if name in turned else (length, shape.head_dim)
        floats[name] = jax.ShapeDtypeStruct((heads, *ends), dtype)
    documents = np.arange(shape.q_len, dtype=np.int32) // (shape.q_len // max(1, shape.packed))
    return Call(call, floats, {"segments": documents} if shape.packed else {})


def ragged_dot(shape: GroupedShape, dtype: str, tiles: Tiles) -> Call:
    """The kernel behind `tokamax.ragged_dot`; of int8 matrices it takes a scale for each column."""
    import jax
    import qwix
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as module

    def call(floats: Mapping[str, Any], integers: Mapping[str, Any]) -> Any:
        rhs = qwix.QArray(floats["rhs"], floats["scales"]) if shape.format else floats["rhs"]
        return module.gmm(
            floats["lhs"],
            rhs,
            integers["sizes"],
            (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT),
            np.dtype(floats["lhs"].dtype),
            (tiles["block_m"], tiles["block_k"], tiles["block_n"]),
            tiles.get("buffers", 2),
        )

    return Call(call, _grouped(shape, dtype), _sizes(shape))


def gmm_v2(shape: GroupedShape, dtype: str, tiles: Tiles) -> Call:
    """tokamax' second kernel for the same; without tiles it chooses them itself."""
    from tokamax._src.ops.gmm_v2 import gmm_v2 as module

    given = {}
    if tiles:
        block_m, block_k, block_n = (tiles[f"block_{axis}"] for axis in "mkn")
        given["tile_info"] = module.TileSizes(tile_m=block_m, tile_k=block_k, tile_n=block_n, bucket_base=block_m)

    def call(floats: Mapping[str, Any], integers: Mapping[str, Any]) -> Any:
        scales = floats["scales"][:, None] if shape.format else None
        return module.gmm_v2(
            floats["lhs"],
            floats["rhs"],
            integers["sizes"],
            rhs_scale=scales,
            zero_initialize=False,
            maybe_quantize_lhs=False,
            preferred_element_type=np.dtype(floats["lhs"].dtype),
            **given,
        )

    return Call(call, _grouped(shape, dtype), _sizes(shape))


def _grouped(shape: GroupedShape, dtype: str) -> dict[str, Any]:
    import jax

    found = {
        "lhs": jax.ShapeDtypeStruct((shape.tokens, shape.k), dtype),
        "rhs": jax.ShapeDtypeStruct((shape.groups, shape.k, shape.n), shape.format or dtype),
    }
    if shape.format:
        found["scales"] = jax.ShapeDtypeStruct((shape.groups, 1, shape.n), "float32")
    return found


def _sizes(shape: GroupedShape) -> dict[str, np.ndarray]:
    return {"sizes": np.asarray(shape.integers()["group_sizes"], np.int32)}


def cross_entropy(shape: CrossEntropyShape, dtype: str, tiles: Tiles) -> Call:
    """tokamax' linear cross-entropy, whose weight is [features, vocab]; the tiles are those of the direction."""
    import jax
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu_kernel as module

    forward = partial(module.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu, reduction="mean", **tiles)
    backward = partial(module.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu, reduction="mean", **tiles)

    @jax.custom_vjp
    def loss(hidden: Any, weight: Any, targets: Any) -> Any:
        return forward(hidden, targets, weight)[0]

    def saving(hidden: Any, weight: Any, targets: Any) -> Any:
        out, lse = forward(hidden, targets, weight)
        return out, (lse, hidden, targets, weight)

    loss.defvjp(saving, lambda saved, gradient: (*backward(gradient, *saved), None))
    floats = {
        "hidden": jax.ShapeDtypeStruct((shape.tokens, shape.features), dtype),
        "weight": jax.ShapeDtypeStruct((shape.features, shape.vocab), dtype),
    }
    return Call(
        lambda floats, integers: loss(**floats, **integers),
        floats,
        {"targets": np.asarray(shape.integers()["targets"], np.int32)},
    )


TOKAMAX: dict[str, Callable[..., Call]] = {
    "tokamax splash": splash,
    "tokamax ragged_dot": ragged_dot,
    "tokamax gmm_v2": gmm_v2,
    "tokamax cross-entropy": cross_entropy,
}
