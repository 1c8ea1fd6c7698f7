"""Named shapes of attention: plain ones, and one for each feature that models use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from crosstile.kernels.attention.spec import FLOAT8, AttentionInputs

from .shape import Shape, Size


@dataclass(frozen=True)
class AttentionShape(Shape):
    """One attention call: q `[batch, q_len, q_heads, head_dim]` against kv_len keys of kv_heads heads.

    Attributes:
        v_dim: None is head_dim.
        window: how many keys before its own a query sees; None is all.
        bias: full, `[batch, q_heads, q_len, kv_len]`.
        alibi: a score_mod with a slope a head.
        prefix: a mask_mod; all queries see that many first keys.
        segments: documents told apart by segment_ids.
        documents: that many, told apart by a mask_mod that the host can see into.
        lengths: padded sequences, with q_lengths and kv_lengths.
        dropout: the share of the weights that is dropped.
        float8: q, k and v are float8_e4m3fn, with a scale a head; 1, or with one for every so many tokens.
        packed: that many sequences one after the other, by varlen_attention; 0 is a batch.
    """

    op: ClassVar[str] = "attention"
    counts: ClassVar[tuple[str, ...]] = ("q_len", "kv_len")

    q_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int | None = None
    q_len: int = 4096
    kv_len: int = 4096
    batch: int = 1
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    alibi: bool = False
    prefix: int = 0
    segments: bool = False
    documents: int = 0
    lengths: bool = False
    dropout: float = 0.0
    float8: int = 0
    packed: int = 0

    @property
    def function(self) -> str:
        """The public function that is called."""
        return "varlen_attention" if self.packed else "attention"

    @property
    def summary(self) -> str:
        """The sizes and options in a form a table can hold."""
        length = str(self.q_len) if self.q_len == self.kv_len else f"{self.q_len}×{self.kv_len}"
        dim = str(self.head_dim) if self.v_dim is None else f"{self.head_dim}/{self.v_dim}"
        parts = [f"{length} tokens", f"{self.q_heads}/{self.kv_heads} heads", f"d {dim}"]
        parts += [] if self.window is None else [f"window {self.window}"]
        parts += [] if self.softcap is None else [f"softcap {self.softcap:g}"]
        flags = ("sinks", "bias", "alibi", "prefix", "segments", "documents", "lengths", "dropout", "float8", "packed")
        return ", ".join(parts + [name for name in flags if getattr(self, name)])

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two products of the forward, for the pairs that see each other."""
        return 2.0 * (self.head_dim + self._v_dim) * self.batch * self.q_heads * self._pairs

    @property
    def _v_dim(self) -> int:
        return self.head_dim if self.v_dim is None else self.v_dim

    @property
    def _pairs(self) -> int:
        """The pairs of a query and a key that it sees, in one batch item; segments and lengths hide none here."""
        sequences = self.packed or self.documents or 1
        q_len, kv_len = self.q_len // sequences, self.kv_len // sequences
        at = np.arange(q_len) + kv_len - q_len
        end = np.maximum(at + 1, self.prefix) if self.causal or self.prefix else np.full(q_len, kv_len)
        start = np.zeros(q_len, int) if self.window is None else np.maximum(at - self.window, 0)
        return sequences * int((end - start).sum())

    def arrays(self, dtype: str) -> dict[str, tuple[Size, str]]:
        """Size and dtype of every array of the call."""
        lead: Size = () if self.packed else (self.batch,)
        queries, keys = (*lead, self.q_len), (*lead, self.kv_len)
        kind = FLOAT8 if self.float8 else dtype
        found: dict[str, tuple[Size, str]] = {
            "q": ((*queries, self.q_heads, self.head_dim), kind),
            "k": ((*keys, self.kv_heads, self.head_dim), kind),
            "v": ((*keys, self.kv_heads, self._v_dim), kind),
        }
        if self.float8:
            blocks = () if self.float8 == 1 else (self.kv_len // self.float8,)
            for name, heads in (("q_scale", self.q_heads), ("k_scale", self.kv_heads), ("v_scale", self.kv_heads)):
                found[name] = (self.batch, heads, *blocks), "float32"
        if self.packed:
            found |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ((self.packed + 1,), "int32"))
        if self.bias:
            found["bias"] = (self.batch, self.q_heads, self.q_len, self.kv_len), dtype
        if self.sinks:
            found["sinks"] = (self.q_heads,), dtype
        if self.alibi:
            found["slopes"] = (self.q_heads,), "float32"
        if self.segments:
            found["segment_ids"] = queries, "int32"
        if self.lengths:
            found |= dict.fromkeys(("q_lengths", "kv_lengths"), (lead, "int32"))
        return found

    def integers(self) -> dict[str, np.ndarray]:
        """Sequences of one length packed, documents of 1024 tokens, and a batch from a whole sequence to one token."""
        found: dict[str, np.ndarray] = {}
        if self.packed:
            starts = np.arange(self.packed + 1) * (self.q_len // self.packed)
            found |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), starts)
        if self.segments:
            found["segment_ids"] = np.broadcast_to(np.arange(self.q_len) // 1024, (self.batch, self.q_len))
        if self.lengths:
            lengths = np.array([self.q_len, self.q_len // 2, self.q_len // 3, 1])
            found |= dict.fromkeys(("q_lengths", "kv_lengths"), lengths[: self.batch])
        return found

    def leaves(self, dtype: str) -> list[str]:
        """Slopes too, in float32 whatever the others are."""
        return super().leaves(dtype) + (["slopes"] if self.alibi and dtype != "float32" else [])

    def deviation(self, name: str) -> float:
        """Scales of float8, and slopes, are small."""
        return 0.05 if "scale" in name or name == "slopes" else 1.0

    def call(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The public function's arguments by name."""
        from crosstile import mods

        found = {**arrays, "causal": self.causal, "softcap": self.softcap}
        if self.window is not None:
            found["window"] = self.window, None
        if self.alibi:
            found["score_mod"] = mods.alibi(found.pop("slopes"))
        if self.prefix:
            found["mask_mod"] = mods.prefix(self.prefix)
        if self.documents:
            found["mask_mod"] = mods.document(np.arange(self.kv_len, dtype=np.int32) // (self.kv_len // self.documents))
        if self.dropout:
            found |= {"dropout": self.dropout, "dropout_seed": 0}
        if self.float8:
            found["scale_block"] = None if self.float8 == 1 else self.float8
        if self.packed:
            found |= {"max_seqlen_q": self.q_len // self.packed, "max_seqlen_k": self.kv_len // self.packed}
            if self.q_len == self.kv_len:
                found["cu_seqlens_k"] = found["cu_seqlens_q"]
        return found

    def prepare(self, dtype: str) -> tuple[Any, tuple[Any, ...]]:
        """The spec and the kernels' inputs. NumPy asks for no gradients: here planes of floats have theirs."""
        spec, inputs = super().prepare(dtype)
        kinds = enumerate(None if plane is None else plane.dtype.name for plane in AttentionInputs(*inputs).planes)
        floats = () if self.float8 else tuple(slot for slot, kind in kinds if kind in (dtype, "float32"))
        return replace(spec, plane_gradients=floats), inputs


ATTENTION = (
    AttentionShape("llama-3.2-1b", q_heads=32, kv_heads=8, head_dim=64),
    AttentionShape("llama-3-8b", q_heads=32, kv_heads=8, head_dim=128),
    AttentionShape("phi-3-mini", q_heads=32, kv_heads=32, head_dim=96),
    AttentionShape("gemma-2-2b", q_heads=8, kv_heads=4, head_dim=256),
    AttentionShape("llama-3-8b-decode", q_heads=32, kv_heads=8, head_dim=128, q_len=1, batch=8, trains=False),
)

_LLAMA = AttentionShape("llama-3-8b", q_heads=32, kv_heads=8, head_dim=128, everyday=False)

FEATURES = (
    replace(
        _LLAMA, name="gemma-2-2b-window", q_heads=8, kv_heads=4, head_dim=256, softcap=50.0, window=4095,
        q_len=8192, kv_len=8192,
    ),
    replace(_LLAMA, name="mistral-7b", window=4095, q_len=8192, kv_len=8192),
    replace(_LLAMA, name="gpt-oss-20b", q_heads=64, head_dim=64, window=127, sinks=True, everyday=True),
    replace(_LLAMA, name="mpt-7b-alibi", kv_heads=32, alibi=True),
    replace(_LLAMA, name="llama-3-8b-bias", bias=True),
    replace(_LLAMA, name="llama-3-8b-segments", segments=True),
    replace(_LLAMA, name="llama-3-8b-documents", documents=4, known_to_host=True),
    replace(_LLAMA, name="llama-3-8b-prefix", causal=False, prefix=512),
    replace(_LLAMA, name="llama-3-8b-lengths", batch=4, q_len=2048, kv_len=2048, lengths=True),
    replace(_LLAMA, name="llama-3-8b-varlen", q_len=8192, kv_len=8192, packed=8),
    replace(_LLAMA, name="llama-3-8b-dropout", dropout=0.1),
    replace(_LLAMA, name="llama-3.2-1b-dropout", head_dim=64, dropout=0.1),
    replace(_LLAMA, name="llama-3-8b-float8", float8=1, trains=False),
    replace(_LLAMA, name="llama-3-8b-float8-blocks", float8=128, trains=False),
    replace(_LLAMA, name="deepseek-v3", q_heads=128, kv_heads=128, head_dim=192, v_dim=128),
    replace(
        _LLAMA, name="deepseek-v3-latent", q_heads=128, kv_heads=1, head_dim=576, v_dim=512, q_len=128, trains=False
    ),
    replace(_LLAMA, name="causal-4k-mha", q_heads=16, kv_heads=16),
    *(
        replace(_LLAMA, name=f"causal-32k-d{width}", q_heads=8, kv_heads=1, head_dim=width, q_len=32768, kv_len=32768)
        for width in (64, 128, 256)
    ),
    replace(_LLAMA, name="window-1k-of-32k", q_heads=8, kv_heads=1, window=1023, q_len=32768, kv_len=32768),
    replace(_LLAMA, name="varlen-16-of-2k", q_heads=8, kv_heads=1, q_len=32768, kv_len=32768, packed=16),
)  # fmt: skip
