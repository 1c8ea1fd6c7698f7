"""Hugging Face transformers: an attention function and its masks, under a name for `attn_implementation`.

A mask reaches the kernel as the rule that transformers made it of, recorded as a mod, in a torch `BlockMask` of one
block: no array over queries and keys is made, be there padding, a window, chunks or packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosstile import mods
from crosstile.kernels.attention.spec import MAX_PLANES
from crosstile.kernels.tiles.errors import UnsupportedError
from crosstile.ops import attention, varlen_attention
from crosstile.torch_mods import WHOLE, mask_mod_of, recorded


def register_with_transformers(name: str = "crosstile") -> None:
    """Let `from_pretrained(..., attn_implementation=name)`, configs and `set_attn_implementation` choose crosstile.

    Softcaps, attention sinks, sliding windows, padded and packed batches, position biases, dropout and caches work. A
    row that sees no key gives 0, where eager attention gives the mean of the values.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, _attention_of_a_layer)
    AttentionMaskInterface.register(name, _mask_of_a_model)


def _attention_of_a_layer(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Any, None]:
    """What a layer calls: query `[batch, q_heads, q_len, head_dim]`; the result is `[batch, q_len, q_heads, v_dim]`."""
    from crosstile.torch import drawn_dropout

    if output_attentions:
        raise UnsupportedError(
            "output_attentions: crosstile makes no weights; use attn_implementation='eager' for them"
        )
    q, k, v = (array.transpose(1, 2) for array in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "bias": position_bias}
    options |= drawn_dropout(dropout, q)
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        options |= {"causal": causal, "window": (sliding_window - 1, None) if causal and sliding_window else None}
        if packed and position_bias is None and q.shape[0] == 1:
            options["max_seqlen_q"] = int(max_length_q or q.shape[1])
            options["max_seqlen_k"] = int(max_length_k or k.shape[1])
            out = varlen_attention(q[0], k[0], v[0], cu_seq_lens_q, cu_seq_lens_k, **options)
            return out[None], None
    elif hasattr(attention_mask, "mask_mod"):
        options["mask_mod"] = mask_mod_of(attention_mask, q.shape[1], k.shape[1])
    elif "bool" in str(attention_mask.dtype):
        options["mask"] = attention_mask
    else:
        options["bias"] = attention_mask if position_bias is None else attention_mask + position_bias
    if packed:
        options["segment_ids"] = (_sequences(cu_seq_lens_q, q), _sequences(cu_seq_lens_k, k))
    return attention(q, k, v, **options), None


def _sequences(starts: Any, tokens: Any) -> Any:
    """int `[batch, tokens]`: which packed sequence each token is of."""
    import torch

    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.searchsorted(starts.to(positions.dtype), positions, right=True)[None].expand(tokens.shape[0], -1)


def _mask_of_a_model(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> Any:
    """What a model calls, once for each kind of layer, with the same arguments as transformers' own masks.

    None where the layer's own causality says it all, else a BlockMask with the rule, else (for one query, where it is
    no larger than the padding mask, and for rules that cannot be recorded) bool `[batch, 1, q_length, kv_length]`.
    """
    import torch
    from transformers import masking_utils

    mask_function = mask_function or masking_utils.causal_mask_function
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    tracing = torch.compiler.is_compiling()
    if padding is not None and not tracing and bool(padding.all()):
        padding = None
    within_window = local_size is None or kv_length < local_size
    if padding is None and within_window and not isinstance(q_offset, torch.Tensor):
        at_end = q_offset + q_length == kv_offset + kv_length  # where bottom-right is the alignment that is meant
        if allow_is_bidirectional_skip or (allow_is_causal_skip and at_end):
            return None
    if q_length > 1 and not tracing:
        rule = _rule(masking_utils, mask_function, padding, (q_offset, kv_offset), device)
        if _can_be_recorded(rule):
            return _block_mask(rule, batch_size, q_length, kv_length, device)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )


def _rule(masking_utils: Any, function: Callable[..., Any], padding: Any, offsets: Any, device: Any) -> mods.Mod:
    """The mask as a mod. Offsets are arrays, so that a kernel is not compiled anew for each length of a cache."""
    import torch

    if padding is not None:
        function = masking_utils.and_masks(function, masking_utils.padding_mask_function(padding))
    q_start, kv_start = (torch.as_tensor(offset, dtype=torch.int32, device=device).reshape(()) for offset in offsets)
    moved = [not isinstance(offset, int) or offset != 0 for offset in offsets]

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return function(b, h, i + q_start if moved[0] else i, j + kv_start if moved[1] else j)

    return mask_mod


def _can_be_recorded(rule: mods.Mod) -> bool:
    try:
        return len(mods.loads(recorded(rule, "mask_mod"))) < MAX_PLANES
    except UnsupportedError:
        return False


def _block_mask(rule: mods.Mod, batch: int, q_length: int, kv_length: int, device: Any) -> Any:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        torch.ones(batch, 1, 1, dtype=torch.int32, device=device),
        torch.zeros(batch, 1, 1, 1, dtype=torch.int32, device=device),
        BLOCK_SIZE=WHOLE,
        mask_mod=rule,
        seq_lengths=(q_length, kv_length),
    )
