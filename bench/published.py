"""Training speeds that others published for whole pods, to hold predictions beside.

Each is what the source says that a run logged; its own definition of MFU is not used: tokens a second of a device are
the same for everybody.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ici import Pod


@dataclass(frozen=True)
class Published:
    """A run.

    Attributes:
        model: as `models.known` names its shape.
        pod: such as "v6e:16x16".
        batch: sequences of a device.
        seq: tokens of each.
        tokens_per_device: a second, measured by them.
        settings: what of theirs differs.
        source: where it stands.
    """

    model: str
    pod: str
    batch: int
    seq: int
    tokens_per_device: float
    settings: str
    source: str


_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training/trillium"
_OFFLOAD_8B = "MaxText v0.1.4, layers' inputs, q, k, v and attention's output kept in the host's memory"
_OFFLOAD_70B = "MaxText v0.1.4, layers' inputs and q, k, v kept in the host's memory"

PUBLISHED = (
    Published("llama-3-8b", "v6e:2x4", 3, 8192, 7138.9, _OFFLOAD_8B, f"{_RECIPES}/Llama3.1-8B-MaxText/v6e-8"),
    Published("llama-3-8b", "v6e:4x4", 3, 8192, 7243.4, _OFFLOAD_8B, f"{_RECIPES}/Llama3.1-8B-MaxText/v6e-16"),
    Published("llama-3-8b", "v6e:8x8", 5, 8192, 7247.1, _OFFLOAD_8B, f"{_RECIPES}/Llama3.1-8B-MaxText/v6e-64"),
    Published("llama-3-8b", "v6e:16x16", 4, 8192, 7207.3, _OFFLOAD_8B, f"{_RECIPES}/Llama3.1-8B-MaxText/v6e-256"),
    Published("llama-3-70b", "v6e:4x8", 2, 8192, 921.0, _OFFLOAD_70B, f"{_RECIPES}/Llama3.1-70B-MaxText/v6e-32"),
    Published("llama-3-70b", "v6e:16x16", 5, 8192, 960.2, _OFFLOAD_70B, f"{_RECIPES}/Llama3.1-70B-MaxText/v6e-256"),
)


def published(model: str, pod: Pod, seq: int) -> Published | None:
    """The run of that model on that pod with sequences of that length, if one is known."""
    return next((run for run in PUBLISHED if (run.model, run.pod, run.seq) == (model, str(pod), seq)), None)
