"""A roofline of a step on a pod, to choose what to compile: never a prediction that is shown as one."""

from __future__ import annotations

from dataclasses import dataclass

from crosstile.models.config import Config

from .ici import LINK_SHARE, Pod
from .plan_asked import Asked

_REACHED = 0.75  # of the peak, by products
_MARGIN = 1.1  # of memory
_AGAIN = {"none": 0.0, "products": 0.05, "full": 1 / 3, "offload": 1 / 3}  # of a training step's operations, done again


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step, the bytes that a device needs, and whether it has them."""

    seconds: float
    bytes: float
    fits: bool
    seconds_per_token: float


def estimate(asked: Asked, pod: Pod) -> Estimate:
    """Of one step."""
    mesh, config = asked.parallel, asked.config
    training = asked.step == "train"
    tokens = asked.batch * (1 if asked.step == "decode" else asked.seq) / pod.devices
    peak = pod.peak * _REACHED
    operations = config.flops_per_token(asked.seq) * tokens
    compute = operations * (1 + _AGAIN[asked.remat]) / peak if training else operations / 3 / peak
    links = 2 * pod.chip.dimensions * pod.chip.link * LINK_SHARE * 1e9 / pod.chip.devices
    weights = 2 * config.num_params / mesh.tensor
    gathered = 4 * weights / links if training and mesh.fsdp > 1 else 0.0
    rows = tokens * mesh.tensor * config.hidden_size * 2
    summed = 0.0 if mesh.tensor == 1 else config.num_layers * (6 if training else 2) * 2 * rows / (links / 2)
    read = (weights + _cache(asked)) / pod.bandwidth if asked.step == "decode" else 0.0
    compute *= mesh.ticks / mesh.microbatch_count
    seconds = max(compute, gathered, read) + summed
    needed = _MARGIN * _bytes(asked, tokens)
    return Estimate(seconds, needed, needed <= pod.hbm_bytes, seconds / (tokens * pod.devices))


def _bytes(asked: Asked, tokens: float) -> float:
    config, mesh = asked.config, asked.parallel
    if asked.step != "train":
        return 2 * config.num_params / mesh.tensor + _cache(asked)
    shards = mesh.stage * mesh.fsdp * mesh.context * mesh.tensor
    state = 12 * config.num_params / shards
    gradients = 2 * config.num_params / shards
    layer = 2 * config.num_params / config.num_layers / mesh.tensor
    return state + gradients + 2 * layer + 2 * _saved(asked, config) * tokens


def _saved(asked: Asked, config: Config) -> float:
    """Elements that a token leaves for the backward."""
    tensor = asked.parallel.tensor
    stream = config.hidden_size * tensor  # of a device's tokens, each of which all devices of the axis have
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    kept = {"offload": 0, "full": stream, "products": 3 * stream + heads + 3 * config.intermediate_size}
    kept["none"] = kept["products"] + 4 * stream + 2 * heads + 3 * config.intermediate_size
    return config.num_layers * kept[asked.remat] + 6 * config.intermediate_size


def _cache(asked: Asked) -> float:
    """Bytes of a device's keys and values."""
    config, mesh = asked.config, asked.parallel
    rows = asked.batch / mesh.batch_devices
    heads = config.num_kv_heads / (mesh.tensor if config.num_kv_heads % mesh.tensor == 0 else 1)
    return 2.0 * rows * asked.seq * config.num_layers * heads * (config.head_dim + config.v_dim)
