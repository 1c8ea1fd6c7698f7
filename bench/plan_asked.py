"""What is planned: a step of a model on a mesh."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crosstile.models.config import Config
from crosstile.models.sharding import Parallel, check_stages

STEPS = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Asked:
    """A step of a model on a mesh.

    Attributes:
        config: of the model.
        step: one of `STEPS`.
        parallel: the mesh.
        batch: sequences of all devices together.
        seq: tokens of each; of decoding, those in the cache.
        remat: the policy of training.
    """

    config: Config
    step: str
    parallel: Parallel
    batch: int
    seq: int
    remat: str = "full"

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"step: got {self.step!r}; it must be one of {', '.join(STEPS)}")
        rows = self.parallel.batch_parts
        if self.batch < 1 or self.batch % rows:
            raise ValueError(
                f"batch: got {self.batch}; it must be a multiple of {rows}, the devices among which rows are dealt"
                + (f" times {self.parallel.microbatch_count} microbatches" if self.parallel.stage > 1 else "")
            )
        if self.parallel.stage > 1 and self.step != "train":
            raise ValueError(f"stage: got {self.parallel.stage}; {self.step} has no pipeline, so it must be 1")
        check_stages(self.config, self.parallel)
        if self.seq % self.parallel.context:
            raise ValueError(f"seq: got {self.seq}; it must be a multiple of the context axis, {self.parallel.context}")

    def of_layers(self, count: int) -> Asked:
        """The same with the first layers alone."""
        return replace(self, config=replace(self.config, layers=self.config.layers[:count]))
