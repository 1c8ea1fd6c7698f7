"""Linear cross-entropy in NumPy, forward and backward: the definition that every kernel is held to.

It builds the logits. float64 inputs are computed in float64, all others in float32.
"""

from __future__ import annotations

import numpy as np

from .spec import IGNORED, LinearCrossEntropySpec

Statistics = tuple[np.ndarray | None, ...]


def forward(
    spec: LinearCrossEntropySpec, hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """lse and target_logit [batch, tokens], and logit_sum where the spec asks for it."""
    counted = targets != IGNORED
    logits, _ = _logits(spec, hidden, weight, counted)
    peak = logits.max(axis=2)
    lse = peak + np.log(np.exp(logits - peak[..., None]).sum(axis=2))
    target_logit = np.where(_is_target(targets, weight), logits, 0).sum(axis=2)
    logit_sum = np.where(counted, logits.sum(axis=2), 0) if spec.sums else None
    return np.where(counted, lse, 0), target_logit, logit_sum


def backward(
    spec: LinearCrossEntropySpec,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    outputs: Statistics,
    gradients: Statistics,
) -> tuple[np.ndarray, np.ndarray, None]:
    """dhidden and dweight; targets have no gradient. A gradient of a statistic that is None counts as 0."""
    hidden, weight, targets = inputs
    counted = targets != IGNORED
    logits, slope = _logits(spec, hidden, weight, counted)
    lse = outputs[0]
    assert lse is not None, "the backward reads the logsumexp of the forward"
    dlse, dtarget, dsum = (0 if gradient is None else gradient[..., None] for gradient in gradients)
    dlogits = dlse * np.exp(logits - lse[..., None]) + np.where(_is_target(targets, weight), dtarget, 0) + dsum
    dlogits = np.where(counted[..., None], dlogits * slope, 0)
    dhidden = dlogits @ weight.astype(logits.dtype)
    dweight = dlogits.swapaxes(1, 2) @ np.where(counted[..., None], hidden, 0).astype(logits.dtype)
    return dhidden.astype(hidden.dtype), dweight.astype(weight.dtype), None


def _logits(
    spec: LinearCrossEntropySpec, hidden: np.ndarray, weight: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray | float]:
    """The logits [batch, tokens, vocab], and their slope: by how much they grow with the raw product."""
    dtype = np.float64 if hidden.dtype == np.float64 else np.float32
    rows: np.ndarray = np.where(counted[..., None], hidden, 0).astype(dtype)
    logits: np.ndarray = rows @ weight.astype(dtype).swapaxes(1, 2)
    if spec.softcap is None:
        return logits, 1.0
    tanh = np.tanh(logits / spec.softcap)
    return spec.softcap * tanh, 1 - tanh * tanh


def _is_target(targets: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """bool [batch, tokens, vocab]; no row for a target elsewhere."""
    return targets[..., None] == np.arange(weight.shape[1])
