"""How a model lies on many devices, as data: which axis of the mesh splits which dimension of which array.

A parameter's dimensions have logical names, and a logical name has mesh axes. Changing how a model is spread changes
these tables, never the model. An axis that does not divide a dimension's count (of heads, not of their elements) does
not split it.

stage     some of the layers each, which microbatches pass one after another (GPipe, arXiv:1811.06965); before the first
          layer and after the last rows of the batch
data      copies of the model, each with other rows of the batch
fsdp      rows of the batch too; parameters, gradients and the optimizer's state lie in shards, gathered layer by layer
          (ZeRO-3, arXiv:1910.02054)
expert    rows of the batch too; each device has some of the experts
context   pieces of each sequence
tensor    heads, columns of the MLP, rows of the vocabulary (Megatron-LM, arXiv:1909.08053)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from .arrays import Tree, tree_map_with_path
from .config import Config
from .shapes import shapes
from .stacking import period

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
CONTEXT_FORMS = ("gather", "ring", "ulysses")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "batch outside layers": ("data", "fsdp", "expert", "stage"),
    "sequence": ("context",),
    "embed": ("fsdp", "context"),
    "embed outside layers": ("fsdp", "context", "stage"),
    "looked_up": ("fsdp", "stage"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "inner": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}

_Logical = tuple[str | None, ...]
PARAMETERS: dict[str, _Logical] = {
    "embedding": ("vocab", "looked_up"),
    "head": ("embed outside layers", "vocab"),
    "head_bias": ("vocab",),
    "wq": ("embed", "heads"),
    "wk": ("embed", "kv_heads"),
    "wv": ("embed", "kv_heads"),
    "wo": ("heads", "embed"),
    "bq": ("heads",),
    "bk": ("kv_heads",),
    "bv": ("kv_heads",),
    "sinks": ("heads",),
    "wq_down": ("embed", None),
    "wq_up": (None, "heads"),
    "wkv_down": ("embed", None),
    "wkv_up": (None, "heads"),
    "w_gate": ("embed", "inner"),
    "w_up": ("embed", "inner"),
    "w_down": ("inner", "embed"),
    "b_gate": ("inner",),
    "b_up": ("inner",),
    "router": ("embed", None),
}
"""Of dense layers; what is not listed (norms, and biases that are added once) lies whole on every device."""

EXPERTS: dict[str, _Logical] = {
    "w_gate": ("experts", "embed", "inner"),
    "w_up": ("experts", "embed", "inner"),
    "w_down": ("experts", "inner", "embed"),
    "b_gate": ("experts", "inner"),
    "b_up": ("experts", "inner"),
    "b_down": ("experts", None),
}


@dataclass(frozen=True)
class Parallel:
    """How many devices each axis of the mesh has.

    Attributes:
        data, fsdp, expert, context, tensor: see the module; their product, with stage, is the number of devices.
        context_form: how attention sees keys of other pieces: "gather" brings all keys and values to each device,
            "ring" passes them on and merges by logsumexp (arXiv:2310.01889), "ulysses" exchanges pieces of the sequence
            for heads (arXiv:2309.14509).
        stage: see the module.
        microbatches: into how many a device's rows are cut, which pass the stages one after another; 0 is as many as
            there are stages.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    context_form: str = "gather"
    stage: int = 1
    microbatches: int = 0

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}; it must be at least 1")
        if self.microbatches < 0 or (self.microbatches > 1 and self.stage == 1):
            raise ValueError(
                f"microbatches: got {self.microbatches} with stage {self.stage}; it must be 0, which is as many as "
                "stages, or at least 1; and with one stage no more, since nothing would overlap"
            )
        if self.context_form not in CONTEXT_FORMS:
            raise ValueError(f"context_form: got {self.context_form!r}; it must be one of {', '.join(CONTEXT_FORMS)}")

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: devices}, the outermost first."""
        return {axis: asdict(self)[axis] for axis in AXES}

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return prod(self.sizes.values())

    @property
    def microbatch_count(self) -> int:
        """Into how many a device's rows are cut; 1 without stages."""
        return self.microbatches or self.stage

    @property
    def batch_devices(self) -> int:
        """Among how many the rows of a batch are dealt."""
        return prod(self.sizes[axis] for axis in RULES["batch"])

    @property
    def batch_parts(self) -> int:
        """What the rows of a batch must be a multiple of; others are filled up with rows that nobody counts."""
        return self.batch_devices * self.microbatch_count

    @property
    def ticks(self) -> int:
        """How long a step takes in times of one microbatch in one stage; each stage is idle in `stage - 1` of them."""
        return self.microbatch_count + self.stage - 1


Split = tuple[tuple[str, ...], ...]  # of each dimension the mesh axes that split it


def parameter_splits(config: Config, parallel: Parallel) -> Tree:
    """Of each parameter of the tree, of each dimension, the mesh axes that split it.

    Raises:
        ValueError: stages that do not divide the layers.
    """
    check_stages(config, parallel)

    def of(path: str, shape: tuple[int, ...]) -> Split:
        name = path.rpartition(".")[2]
        whole = (None,) * len(shape)
        if _is_of_experts(path, config):
            logical = EXPERTS[name]
        else:
            logical = PARAMETERS.get(name.removeprefix("shared_"), whole)
        return split(logical, shape, config, parallel)

    return tree_map_with_path(of, shapes(config))


def check_stages(config: Config, parallel: Parallel) -> None:
    """Raise ValueError where stages would not have as many layers each, and these alike."""
    if parallel.stage == 1:
        return
    periods = config.num_layers // period(config)
    if periods % parallel.stage:
        raise ValueError(
            f"stage: got {parallel.stage} for {config.num_layers} layers, which repeat after {period(config)}; "
            f"it must divide {periods}, as often as they repeat"
        )


def split(logical: _Logical, shape: tuple[int, ...], config: Config, parallel: Parallel) -> Split:
    """Of each dimension the axes of its logical name, as many of them as divide it."""
    counts = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    found: list[tuple[str, ...]] = []
    for name, size in zip(logical, shape, strict=True):
        axes: tuple[str, ...] = ()
        for axis in RULES[name] if name else ():
            together = prod(parallel.sizes[one] for one in (*axes, axis))
            if counts.get(name or "", size) % together == 0:
                axes = (*axes, axis)
        found.append(axes)
    return tuple(found)


def _is_of_experts(path: str, config: Config) -> bool:
    first, *rest = path.split(".")
    return first == "layers" and config.layers[int(rest[0])].experts and rest[1] in EXPERTS
