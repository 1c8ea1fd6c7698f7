"""Linear cross-entropy problems for the kernels' tests: sizes and options, arrays, and torch's answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import ml_dtypes
import numpy as np
import torch
from oracles import Arrays, rounded

from crosstile.kernels.linear_cross_entropy.spec import ELSEWHERE, IGNORED, OUTPUTS, LinearCrossEntropySpec

GRADIENTS = ("dlse", "dtarget_logit", "dlogit_sum")


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a problem reads as its difference from this one.

    Every fifth token is ignored, and every seventh has its target elsewhere. An offset is added to every logit.
    """

    tokens: int = 40
    vocab: int = 70
    features: int = 40
    batch: int = 1
    softcap: float | None = None
    sums: bool = True
    offset: float = 0.0
    dtype: str = "float32"

    @property
    def spec(self) -> LinearCrossEntropySpec:
        return LinearCrossEntropySpec(self.dtype, self.features, self.softcap, self.sums)

    @cached_property
    def targets(self) -> np.ndarray:
        """int32 [batch, tokens]."""
        drawn = np.random.default_rng(crc32(repr(self).encode()))
        targets = drawn.integers(0, self.vocab, (self.batch, self.tokens)).astype(np.int32)
        number = np.arange(self.tokens)
        targets[:, number % 5 == 3] = IGNORED
        targets[:, number % 7 == 5] = ELSEWHERE
        targets[:, :1], targets[:, 1:2] = self.vocab - 1, 0  # the ends of the vocabulary are there in any case
        return targets

    @cached_property
    def exact(self) -> Arrays:
        """hidden, weight and the gradients of the statistics, in float64, of values that the dtype has."""
        drawn = np.random.default_rng(crc32(repr(self).encode()) + 1)
        lead = (self.batch, self.tokens)
        hidden = drawn.standard_normal((*lead, self.features))
        weight = drawn.standard_normal((self.batch, self.vocab, self.features)) * 2 / max(1, self.features) ** 0.5
        if self.offset:
            hidden[..., 0], weight[..., 0] = self.offset, 1.0
        arrays = {"hidden": rounded(hidden, self.dtype), "weight": rounded(weight, self.dtype)}
        gradients = {name: drawn.standard_normal(lead) for name in GRADIENTS}
        gradients["dlogit_sum"] /= max(1, self.vocab)
        if not self.sums:
            del gradients["dlogit_sum"]
        return arrays | {name: rounded(array, "float32") for name, array in gradients.items()}

    def arrays(self) -> Arrays:
        """The canonical arrays of a call in NumPy; what is ignored holds NaN."""
        native = {name: array.astype(np.float32) for name, array in self.exact.items()}
        kind = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        native |= {name: native[name].astype(kind) for name in ("hidden", "weight")}
        for name in ("hidden", *GRADIENTS):
            if name in native:
                native[name][self.targets == IGNORED] = np.nan
        return native | {"targets": self.targets}

    def answers(self, dtype: str = "float64") -> Arrays:
        """The statistics, dhidden and dweight by torch: logits in `dtype`, all else in float32 or float64."""
        return by_torch({**self.exact, "targets": self.targets}, self.softcap, self.sums, dtype)


def by_torch(arrays: Arrays, softcap: float | None, sums: bool, dtype: str) -> Arrays:
    """The statistics and the gradients by torch's own ops and autograd, in that precision."""
    leaves = [
        torch.from_numpy(arrays[name]).to(getattr(torch, dtype)).requires_grad_() for name in ("hidden", "weight")
    ]
    wide = torch.float64 if dtype == "float64" else torch.float32
    targets = torch.from_numpy(arrays["targets"]).long()
    logits = (leaves[0] @ leaves[1].transpose(1, 2)).to(wide)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    counted = targets != IGNORED
    # as torch's cross_entropy: the logarithms of the softmax, from which the target's is picked
    lse = torch.logsumexp(logits, dim=2)
    picked = torch.gather(logits, 2, targets.clamp(min=0)[..., None])[..., 0]
    found = {
        "lse": torch.where(counted, lse, 0),
        "target_logit": torch.where(targets >= 0, picked, 0),
        "logit_sum": torch.where(counted, logits.sum(dim=2), 0),
    }
    if not sums:
        del found["logit_sum"]
    loss = sum((found[name] * torch.from_numpy(arrays[f"d{name}"]).to(wide)).sum() for name in found)
    gradients = torch.autograd.grad(loss, leaves)
    named = {name: array.detach().double().numpy() for name, array in found.items()}
    return named | {f"d{n}": g.double().numpy() for n, g in zip(("hidden", "weight"), gradients, strict=True)}


def named(statistics: tuple, gradients: tuple) -> dict:
    """Results of forward and backward by name, without those that are absent."""
    results = dict(zip(OUTPUTS, statistics, strict=True)) | {"dhidden": gradients[0], "dweight": gradients[1]}
    return {name: result for name, result in results.items() if result is not None}
