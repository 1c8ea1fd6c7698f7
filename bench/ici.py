"""The links between TPU chips: which tori there are, and how long a collective takes on one.

A chip has two links along each dimension of its torus. A collective of n devices that fill some dimensions runs on all
links of these, both ways, so each device takes in `bytes * (n - 1) / n` over its links at `LINK_SHARE` of the published
bandwidth ("How to Scale Your Model", Austin et al., 2025, has 45 and 90 GB/s a direction, that share of 50 and 100).
Predicted; no pod was timed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from crosstile.kernels.tiles.targets import get_target

LINK_SHARE = 0.9
HOP_SECONDS = 1e-6  # of each step of a ring, beside its bytes


@dataclass(frozen=True)
class PodChip:
    """What a kind of chip brings to a pod.

    Attributes:
        name: as `crosstile.target` knows it.
        topology: as the compiler does.
        link: GB/s of one link in one direction, published.
        dimensions: of its torus.
        wraps: the lengths of a dimension that close to a ring.
        devices: what JAX calls devices, of a chip.
        cores: of a device.
        hbm: GiB of a device that a program may use.
        dollars: an hour of a chip, where a price was seen.
    """

    name: str
    topology: str
    link: float
    dimensions: int
    wraps: int
    devices: int
    cores: int
    hbm: float
    dollars: float | None


# Links and memory: Cloud TPU documentation. Prices: of a chip and hour on demand in the United States, 2025.
POD_CHIPS = {
    chip.name: chip
    for chip in (
        PodChip("v4", "v4", 45, 3, 4, 1, 2, 32, 3.22),
        PodChip("v5e", "v5e", 50, 2, 16, 1, 1, 16, 1.20),
        PodChip("v5p", "v5p", 100, 3, 4, 1, 2, 95, 4.20),
        PodChip("v6e", "v6e", 100, 2, 16, 1, 1, 32, 2.70),
        PodChip("v7x", "tpu7x", 100, 3, 4, 2, 1, 96, None),
    )
}


@dataclass(frozen=True)
class Pod:
    """Chips in a torus.

    Attributes:
        chip: their kind.
        shape: chips along each dimension.
    """

    chip: PodChip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return prod(self.shape)

    @property
    def devices(self) -> int:
        """What JAX calls devices."""
        return self.chips * self.chip.devices

    @property
    def peak(self) -> float:
        """Operations a second of a device, published, in bfloat16."""
        return get_target(self.chip.name).bf16_tflops * 1e12 * self.chip.cores

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a device's HBM, published."""
        return get_target(self.chip.name).bandwidth * 1e9 * self.chip.cores

    @property
    def hbm_bytes(self) -> float:
        """Of a device, that a program may use."""
        return self.chip.hbm * 2**30

    @property
    def topology(self) -> str:
        """The name by which the compiler knows it."""
        return f"{self.chip.topology}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def pod(name: str) -> Pod:
    """Such as "v5e:16x16" or "v5p:8x8x4". Raises ValueError with what would be right."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match.group(1) not in POD_CHIPS:
        raise ValueError(
            f"chips: got {name!r}; it must be one of {', '.join(POD_CHIPS)}, a colon, and a shape: v5e:16x16"
        )
    chip, shape = POD_CHIPS[match.group(1)], tuple(int(size) for size in match.group(2).split("x"))
    if len(shape) != chip.dimensions:
        raise ValueError(f"chips: got {name!r}; chips of {chip.name} lie in {chip.dimensions} dimensions")
    return Pod(chip, shape)


@dataclass(frozen=True)
class Span:
    """What of the torus a group of devices fills.

    Attributes:
        size: devices in the group.
        lengths: chips along each dimension, of those along which there are more than one.
        links: at each chip, in one direction.
        beside: devices of one chip that are in the group, or in others like it; they share its links.
    """

    size: int
    lengths: tuple[int, ...]
    links: int
    beside: int


def span(pod: Pod, places: Sequence[Sequence[int]]) -> Span:
    """Of a group of devices whose chips lie at these places."""
    along = [len({place[dimension] for place in places}) for dimension in range(pod.chip.dimensions)]
    lengths = tuple(length for length in along if length > 1)
    links = 0
    for length, whole in zip(along, pod.shape, strict=True):
        if length > 1:
            closes = length == whole and length % pod.chip.wraps == 0
            links += 2 if closes else 1
    return Span(len(places), lengths, links, pod.chip.devices)


def seconds(pod: Pod, kind: str, bytes_: float, where: Span) -> float:
    """Of a collective whose whole array, on the devices together or reduced, has that many bytes."""
    if where.size < 2:
        return 0.0
    if not where.links:  # two devices of one chip
        return bytes_ / (4 * pod.chip.link * 1e9)
    rate = where.links * pod.chip.link * LINK_SHARE * 1e9 / where.beside
    share = (where.size - 1) / where.size
    hops = sum(where.lengths) * HOP_SECONDS
    if kind == "collective-permute":
        return bytes_ * where.beside / (pod.chip.link * LINK_SHARE * 1e9) + HOP_SECONDS
    if (
        kind == "all-to-all"
    ):  # of what a device has, a piece goes to each other: on a ring an eighth of the way on average
        return bytes_ * share * max(where.lengths) / 4 / rate / max(1, len(where.lengths)) + hops
    return bytes_ * share * (2 if kind == "all-reduce" else 1) / rate + hops


def places_of(devices: Sequence[Any]) -> list[tuple[int, ...]]:
    """Where the chips of devices of JAX lie."""
    return [tuple(device.coords) for device in devices]
