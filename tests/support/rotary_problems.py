"""Rotary problems for the kernels' tests: sizes and options, arrays in every layout, and the answers by torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
import torch
from oracles import Arrays, rounded

from crosstile.kernels.rotary.frequencies import frequencies_of
from crosstile.kernels.rotary.spec import RotarySpec

OPERANDS = ("q", "k", "positions", "frequencies")
FLOATS = ("q", "k", "drotated_q", "drotated_k")


@dataclass(frozen=True)
class Problem:
    """One call; every name below is a field, so that a problem reads as its difference from this one."""

    length: int = 19
    q_heads: int = 3
    k_heads: int = 2  # 0 is no k
    head_dim: int = 16
    batch: int = 2
    rotary_dim: int | None = None
    interleaved: bool = False
    factor: float = 1.0
    dtype: str = "float32"
    most: int = 4096  # positions lie below it

    @property
    def spec(self) -> RotarySpec:
        rotary_dim = self.rotary_dim or self.head_dim
        heads = self.q_heads + self.k_heads
        return RotarySpec(self.dtype, self.head_dim, heads, rotary_dim, self.interleaved, self.factor)

    @cached_property
    def exact_arrays(self) -> Arrays:
        """The inputs and the gradients of the results: floats in float64, of values that the dtype has."""
        drawn = np.random.default_rng(crc32(repr(self).encode()))

        def heads(count: int) -> np.ndarray:
            return rounded(drawn.standard_normal((self.batch, self.length, count, self.head_dim)), self.dtype)

        arrays = {"q": heads(self.q_heads), "drotated_q": heads(self.q_heads)}
        if self.k_heads:
            arrays |= {"k": heads(self.k_heads), "drotated_k": heads(self.k_heads)}
        arrays["positions"] = drawn.integers(0, self.most, (self.batch, self.length), np.int32)
        frequencies = np.array(frequencies_of(self.spec.rotary_dim, 10000.0, None)[0], np.float32)
        return arrays | {"frequencies": np.tile(frequencies, (self.batch, 1))}

    def answers(self, dtype: str = "float64", arrays: Arrays | None = None) -> Arrays:
        """rotated_q, rotated_k, dq and dk by torch in that precision."""
        return rotary_by_torch(self.spec, arrays or self.exact_arrays, dtype)


def rotary_by_torch(spec: RotarySpec, arrays: Arrays, dtype: str) -> Arrays:
    """By complex numbers in float64, else as models do, cos and sin rounded to `dtype`; angles are float32."""
    kind = getattr(torch, dtype)
    angles = torch.from_numpy(np.array(arrays["positions"]))[..., None].float()
    angles = angles * torch.from_numpy(np.array(arrays["frequencies"]))[:, None]
    results = {}
    for name in ("q", "k"):
        if name not in arrays:
            continue
        x = torch.from_numpy(np.array(arrays[name], np.float64)).to(kind).requires_grad_()
        exactly = dtype == "float64" and x.numel()
        out = (_by_complex_numbers if exactly else _by_halves)(spec, x, angles[:, :, None])
        results[f"rotated_{name}"] = out.detach().double().numpy()
        if f"drotated_{name}" in arrays:
            gradient = torch.from_numpy(np.array(arrays[f"drotated_{name}"], np.float64)).to(kind)
            results[f"d{name}"] = torch.autograd.grad(out, x, gradient)[0].double().numpy()
    return results


def _by_complex_numbers(spec: RotarySpec, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    angles = angles.double()
    if spec.interleaved:
        pairs = turned.unflatten(-1, (-1, 2))
    else:
        pairs = turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    numbers = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.full_like(angles, spec.factor), angles)
    pairs = torch.view_as_real(numbers)
    pairs = pairs if spec.interleaved else pairs.transpose(-1, -2)
    return torch.cat((pairs.flatten(-2), rest), -1)


def _by_halves(spec: RotarySpec, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    if spec.interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
        swapped = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    else:
        angles = torch.cat((angles, angles), -1)
        swapped = torch.cat((-turned[..., spec.rotary_dim // 2 :], turned[..., : spec.rotary_dim // 2]), -1)
    cos, sin = ((spec.factor * part).to(x.dtype) for part in (angles.cos(), angles.sin()))
    return torch.cat((turned * cos + swapped * sin, rest), -1)
