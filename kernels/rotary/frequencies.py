"""How fast each pair of a head turns, in float32 as transformers computes it, so that models meet what they trained on.

`scaling` stretches the frequencies of a model to contexts longer than it was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, floor, isfinite, log, pi
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`: position interpolation (Chen et al., arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, those between interpolated, as Llama 3.1 does.

    Slow and fast are what turns fewer than low_freq_factor and more than high_freq_factor times in
    original_max_position_embeddings positions.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv:2309.00071): slow frequencies divided by `factor`, and cos and sin scaled.

    A frequency is slow or fast as it turns fewer than beta_slow or more than beta_fast times in
    original_max_position_embeddings positions; between them it is interpolated, from bounds that `truncate` rounds to
    whole pairs. attention_factor scales cos and sin; None means `0.1 * log(factor) + 1`, or the quotient of two of
    these, weighed by mscale and mscale_all_dim, where both are given.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


Scaling = LinearScaling | Llama3Scaling | YarnScaling
_KINDS: dict[str, type[Any]] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


def scaling_from(parameters: Mapping[str, Any]) -> Scaling | None:
    """The scaling that a Hugging Face `rope_scaling` or `rope_parameters` says; None where its type is "default".

    Raises ValueError for a type that is not known or a number that is missing. What is not of the scaling, such as
    rope_theta, is left to the caller.

    >>> scaling_from({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6})
    LinearScaling(factor=8.0)
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _KINDS:
        raise ValueError(f"scaling: its rope_type is {kind!r}; it must be default, {', '.join(_KINDS)}")
    known = {field.name: parameters.get(field.name) for field in fields(_KINDS[kind])}
    given = {name: value for name, value in known.items() if value is not None}
    try:
        scaling: Scaling = _KINDS[kind](**given)
    except TypeError:
        needed = ", ".join(name for name in known if name not in given and not hasattr(_KINDS[kind], name))
        raise ValueError(f"scaling: a rope_type of {kind!r} must also give {needed}") from None
    check(scaling)
    return scaling


def check(scaling: Scaling) -> None:
    """Refuse numbers that mean nothing. Raises ValueError."""
    for field in fields(scaling):
        value = getattr(scaling, field.name)
        if field.name in ("truncate", "mscale", "mscale_all_dim") or value is None:
            continue
        if not (isfinite(value) and value > 0):
            raise ValueError(f"scaling: {field.name} is {value}; it must be finite and greater than 0")
    if isinstance(scaling, Llama3Scaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"scaling: low_freq_factor is {scaling.low_freq_factor}; it must be less than high_freq_factor, "
            f"{scaling.high_freq_factor}"
        )


def frequencies_of(rotary_dim: int, base: float, scaling: Scaling | None) -> tuple[tuple[float, ...], float]:
    """The angle by which each of the `rotary_dim / 2` pairs turns from one position to the next, and the factor of cos
    and sin.

    >>> frequencies_of(4, 100.0, None)
    ((1.0, 0.10000000149011612), 1.0)
    """
    powers = np.float32(base) ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim))
    plain = np.float32(1) / powers
    factor = 1.0
    if isinstance(scaling, LinearScaling):
        plain = plain / np.float32(scaling.factor)
    elif isinstance(scaling, Llama3Scaling):
        plain = _llama3(scaling, plain)
    elif scaling is not None:
        plain = _yarn(scaling, powers, rotary_dim, base)
        factor = _attention_factor(scaling)
    return tuple(float(value) for value in plain), factor


def _llama3(scaling: Llama3Scaling, plain: np.ndarray) -> np.ndarray:
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    wavelength = np.float32(2 * pi) / plain
    weight = (np.float32(length) / wavelength - np.float32(low)) / np.float32(high - low)
    slow = plain / np.float32(scaling.factor)
    between = (1 - weight) * slow + weight * plain
    return np.where(wavelength > length / low, slow, np.where(wavelength < length / high, plain, between))


def _yarn(scaling: YarnScaling, powers: np.ndarray, rotary_dim: int, base: float) -> np.ndarray:
    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that turns so many times in the original context."""
        return rotary_dim * log(scaling.original_max_position_embeddings / (times * 2 * pi)) / (2 * log(base))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pairs = np.arange(rotary_dim // 2, dtype=np.float32)
    ramp = (pairs - np.float32(first)) / np.float32(last - first if first != last else 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    return 1 / (np.float32(scaling.factor) * powers) * (1 - kept) + 1 / powers * kept


def _attention_factor(scaling: YarnScaling) -> float:
    def temperature(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
