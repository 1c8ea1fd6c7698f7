"""What a user would call instead of an op on a GPU: the framework's ops, and the kernels of FLA and Liger if installed.

Peers take the op's arrays by name and return what the op does. FLA is fla-core's `parallel_attn` (Yang & Zhang, MIT);
Liger is liger-kernel (Hsu et al., arXiv:2410.10989, BSD-2). Both choose their own tiles for the chip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .attention_shapes import AttentionShape
from .cross_entropy_shapes import CrossEntropyShape
from .norm_shapes import NormShape
from .rotary_shapes import RotaryShape
from .shape import Shape

Peer = Callable[[Mapping[str, Any]], Any]


def peers_of(shape: Shape, direction: str) -> dict[str, Peer]:
    """The peers of one direction by name; "both" is a forward and its backward in one call."""
    peers: dict[str, Peer] = {"torch's ops": partial(shape.run, implementation="library")}
    if isinstance(shape, CrossEntropyShape):
        peers["logits"] = partial(_loss_of_logits, shape)
        if direction == "both" and shape.softcap is None and _installed("liger_kernel"):
            peers["Liger"] = _liger_loss
    if isinstance(shape, AttentionShape) and _causal_alone(shape) and _installed("fla"):
        peers["FLA"] = partial(_fla, shape)
    if isinstance(shape, NormShape) and _liger_norms(shape) and _installed("liger_kernel"):
        peers["Liger"] = _liger_norm
    if isinstance(shape, RotaryShape) and _liger_turns(shape) and _installed("liger_kernel"):
        peers["Liger, in place"] = partial(_liger_rope, shape)
    return peers


def attention_of_float8(shape: AttentionShape, arrays: Mapping[str, Any], *, rounds: bool) -> Any:
    """Causal attention of float8 arrays by torch's ops in float32.

    `rounds`: with weights in float8, as kernels have them: before the division by their sum, each row's largest 256.
    """
    import torch

    q, k, v = (_scaled(arrays[name], arrays[f"{name}_scale"]) for name in "qkv")
    k, v = (array.repeat_interleave(q.shape[1] // k.shape[1], 1) for array in (k, v))
    scores = q @ k.mT * shape.head_dim**-0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + shape.kv_len - shape.q_len)
    scores = scores.masked_fill_(later, float("-inf"))
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if rounds:
        # What a block of values is scaled by goes into the weights, as a share of the head's largest scale.
        scales = arrays["v_scale"]
        shares = scales / scales.amax(-1, keepdim=True) if shape.float8 > 1 else torch.ones_like(scales)[..., None]
        shares = shares.repeat_interleave(shape.kv_len // shares.shape[-1], -1)
        shares = shares.repeat_interleave(shape.q_heads // shape.kv_heads, 1)[:, :, None]
        weights = (weights * shares).to(torch.float8_e4m3fn).float() / shares
    return (weights @ v / total).transpose(1, 2)


def _scaled(array: Any, scale: Any) -> Any:
    """[batch, heads, tokens, dim] in float32, of [batch, tokens, heads, dim] and a scale a head, or for many tokens."""
    array = array.float().transpose(1, 2)
    if scale.dim() == 2:
        return array * scale[:, :, None, None]
    return array * scale.repeat_interleave(array.shape[2] // scale.shape[2], 2)[..., None]


def _loss_of_logits(shape: CrossEntropyShape, arrays: Mapping[str, Any]) -> Any:
    """The loss of logits that are kept in memory."""
    import torch
    import torch.nn.functional as F

    logits = F.linear(arrays["hidden"], arrays["weight"]).float()
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return F.cross_entropy(logits, arrays["targets"].long())


def _liger_loss(arrays: Mapping[str, Any]) -> Any:
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    loss = function.apply(arrays["hidden"], arrays["weight"], arrays["targets"].long())
    return loss[0] if isinstance(loss, tuple) else loss


def _liger_norm(arrays: Mapping[str, Any]) -> Any:
    function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return function.apply(arrays["x"], arrays["residual"], arrays["weight"], 1e-6, 0.0, "llama", False)


def _liger_norms(shape: NormShape) -> bool:
    return shape.residual and not shape.bias and not shape.zero_centered


def _liger_turns(shape: RotaryShape) -> bool:
    return not shape.interleaved and shape.rotary_dim is None


def _liger_rope(shape: RotaryShape, arrays: Mapping[str, Any]) -> Any:
    """It writes over the queries and keys that it is given, and is given the cosines and sines, which ours computes."""
    function = import_module("liger_kernel.ops.rope").LigerRopeFunction
    q, k = arrays["q"], arrays["k"]
    cos, sin = _rope_tables(shape, q.device, q.dtype)
    return tuple(turned.transpose(1, 2) for turned in function.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin))


@lru_cache(maxsize=1)
def _rope_tables(shape: RotaryShape, device: Any, dtype: Any) -> tuple[Any, Any]:
    import torch

    frequencies = shape.base ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = (torch.arange(shape.length, device=device)[None, :, None] * frequencies).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _causal_alone(shape: AttentionShape) -> bool:
    """Whether the call is causal attention with no more than a window or packed sequences."""
    beside = (shape.softcap, shape.sinks, shape.bias, shape.alibi, shape.prefix, shape.segments, shape.documents)
    return (
        shape.causal
        and shape.q_len == shape.kv_len
        and shape.v_dim is None
        and not any((*beside, shape.lengths, shape.dropout, shape.float8))
    )


def _fla(shape: AttentionShape, arrays: Mapping[str, Any]) -> Any:
    function = import_module("fla.ops.attn.parallel").parallel_attn
    q, k, v = (arrays[name] if arrays[name].dim() == 4 else arrays[name][None] for name in "qkv")
    window = None if shape.window is None else shape.window + 1  # it counts a query's own key
    starts = _long(arrays["cu_seqlens_q"]) if shape.packed else None
    out = function(q, k, v, scale=shape.head_dim**-0.5, window_size=window, cu_seqlens=starts)
    return out.reshape(arrays["q"].shape)


@lru_cache(maxsize=1)
def _long(starts: Any) -> Any:
    """Once, for FLA keeps what it makes of the very tensor."""
    return starts.long()


def _installed(package: str) -> bool:
    return find_spec(package) is not None
