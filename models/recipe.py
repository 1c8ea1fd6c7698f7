"""What a training run is, as data: `Recipe`, which `crosstile train --config FILE.toml` reads.

`docs/train.toml` shows every key with its default.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .config import Config
from .data import HELD_OUT
from .packing import PACKINGS
from .remat import POLICIES
from .sharding import Parallel
from .tables import read

FRAMEWORKS = ("torch", "jax")
PRECISIONS = ("float32", "bfloat16")
STANDARD_LIBRARY = "standard library"
DEMO, FIELDS, BYTES = "demo", "config", "bytes"


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        start: "demo"; the folder of a checkpoint, whose weights are trained on; a config.json, to begin anew; or
            "config", to begin anew with the fields of `config`.
        config: fields of `crosstile.models.Config`, its `layers` a list of tables or their number; or, with a
            `model_type`, those of a Hugging Face config.json.
    """

    start: str = DEMO
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.config and self.start != FIELDS:
            raise ValueError(f'start: got {self.start!r}; with a table of fields it must be "{FIELDS}"')
        if self.start == FIELDS and not self.config:
            raise ValueError(f'config: got no fields; start = "{FIELDS}" needs a table [model.config] with them')

    def read(self) -> Config:
        """The shape of the model. Raises ValueError and FileNotFoundError."""
        if self.start == DEMO:
            return Config.demo()
        if self.start == FIELDS:
            return _config(self.config)
        path = Path(self.start)
        if path.suffix == ".json":
            if not path.is_file():
                raise ValueError(f"model.start: there is no {path}")
            return Config.from_hugging_face(json.loads(path.read_text("utf-8")))
        if not path.is_dir():
            raise ValueError(
                f'model.start: there is no folder {path}; it must be "{DEMO}", the folder of a checkpoint, a '
                f'config.json, or "{FIELDS}"'
            )
        return Config.from_pretrained(path)

    @property
    def checkpoint(self) -> Path | None:
        """The folder whose weights are trained on; None begins anew."""
        return None if self.start in (DEMO, FIELDS) or self.start.endswith(".json") else Path(self.start)


@dataclass(frozen=True)
class Data:
    """What it is trained on.

    Attributes:
        sources: "standard library", or files and folders of .txt, .md, .py and .jsonl. A file is a document, and each
            line of a .jsonl.
        field: of a line of .jsonl, which holds its text.
        tokenizer: "bytes", or a folder with a tokenizer's files.
        batch: rows a step, of all devices and micro-batches together.
        seq: tokens a row.
        packing: "windows": rows begin anywhere in the text, whatever document it is; "segments": whole documents and
            pieces of long ones share a row, and see themselves alone; "pad": a document a row, its rest cut off.
        held_out: one document in so many is kept to evaluate on, chosen by its name; of a single one its last part.
    """

    sources: tuple[str, ...] = (STANDARD_LIBRARY,)
    field: str = "text"
    tokenizer: str = BYTES
    batch: int = 8
    seq: int = 128
    packing: str = "windows"
    held_out: int = HELD_OUT

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch", "seq")
        _at_least(self, 2, "held_out")
        _one_of(self, packing=PACKINGS)
        if not self.sources:
            raise ValueError(f'sources: got none; it must name files or folders, or "{STANDARD_LIBRARY}"')
        if STANDARD_LIBRARY in self.sources and (len(self.sources) > 1 or self.tokenizer != BYTES):
            raise ValueError(f'sources: "{STANDARD_LIBRARY}" goes with no other and with tokenizer = "{BYTES}"')


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv:1711.05101) with a linear warm-up and a cosine.

    Attributes:
        learning_rate: its peak.
        warmup: steps up to it; at most a fifth of all.
        floor: the share of the peak at the end.
        betas: decays of the means of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: of the matrices; vectors do not decay.
        clip: gradients are scaled down to this norm; 0 leaves them.
        z_loss: the weight of the mean square of the logsumexp (arXiv:2204.02311).
        accumulate: into how many micro-batches a step's batch is cut, one after another in memory.
    """

    learning_rate: float = 4e-3
    warmup: int = 50
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    z_loss: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        _at_least(self, 1, "accumulate")
        _at_least(self, 0, "learning_rate", "warmup", "eps", "weight_decay", "clip", "z_loss")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: got {self.floor}; it must be from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {list(self.betas)}; each must be from 0 to below 1")


@dataclass(frozen=True)
class Checkpoints:
    """What is kept of a run.

    Attributes:
        every: steps between checkpoints.
        kept: how many of the last stay.
        weights: whether each holds the weights in the Hugging Face layout too, to generate with; else
            `crosstile export` writes them.
    """

    every: int = 100
    kept: int = 2
    weights: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "kept")


@dataclass(frozen=True)
class Metrics:
    """What is measured.

    Attributes:
        evaluate_every: steps between measurements of the held-out loss.
        evaluated: how many batches of held-out documents it reads.
        tensorboard: whether metrics go to TensorBoard's files, beside metrics.jsonl.
    """

    evaluate_every: int = 100
    evaluated: int = 16
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "evaluate_every", "evaluated")


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        framework: "torch" or "jax".
        steps: of the whole schedule.
        seed: of the weights and the order of the data.
        precision: in which the model computes, "float32" or "bfloat16"; the weights and the optimizer's state are
            float32.
        remat: what a layer computes again in its backward: "none", "products", "full" or "offload"; see `remat`.
        compile: whether torch compiles the layers; JAX always does.
        model: see `Model`; and so are the others their classes.

    >>> Recipe().optimizer.betas
    (0.9, 0.95)
    """

    framework: str = "torch"
    steps: int = 600
    seed: int = 0
    precision: str = "float32"
    remat: str = "none"
    compile: bool = False
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        if self.framework == "numpy":
            raise ValueError("framework: got 'numpy'; it must be torch or jax; NumPy takes no gradients")
        _one_of(self, framework=FRAMEWORKS, precision=PRECISIONS, remat=POLICIES)
        _at_least(self, 1, "steps")
        _at_least(self, 0, "seed")
        if self.framework == "torch" and self.parallel.stage > 1:
            raise ValueError(
                f"parallel.stage: got {self.parallel.stage} in torch; it must be 1 there: "
                'shard the layers over parallel.fsdp instead, or set framework = "jax"'
            )
        if self.data.batch % self.optimizer.accumulate:
            raise ValueError(
                f"optimizer.accumulate: got {self.optimizer.accumulate}; data.batch {self.data.batch} must be a "
                "multiple of it"
            )


_FREE = ("remat", "compile", "parallel", "checkpoint", "metrics")


def settings(recipe: Recipe) -> dict[str, Any]:
    """What the losses depend on beyond rounding, by dotted names: a run that is resumed must have the same."""
    parts = {name: part for name, part in asdict(recipe).items() if name not in _FREE}
    parts["optimizer"].pop("accumulate")
    flat: dict[str, Any] = {}
    for name, part in parts.items():
        flat |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {name: part}
    return flat


def read_recipe(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, with `section.key=value` in the place of what it says.

    Raises:
        ValueError: the file is not TOML, or a key or a value is not one; the message names it.
        FileNotFoundError: there is no such file.

    >>> read_recipe(overrides=["data.seq=64", "framework=jax"]).data.seq
    64
    """
    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(Path(file).read_text("utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{file}: it is not TOML: {error}") from None
    for override in overrides:
        _override(table, override)
    return read(Recipe, table)


def _override(table: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        raise ValueError(f"--set: got {override!r}; it must be section.key=value")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set: got {override!r}; {section} is no section")
    try:
        table[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:  # a text without its quotes, which a shell takes away
        table[key] = text.strip()


def _config(fields: dict[str, Any]) -> Config:
    if "model_type" in fields:
        return Config.from_hugging_face(fields)
    layers = fields.get("layers")
    table = {name: value for name, value in fields.items() if name != "layers"}
    if type(layers) is not int:
        return read(Config, fields, "model.config")
    return read(Config, {**table, "layers": [{}] * layers}, "model.config")


def _at_least(part: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(part, name) < least:
            raise ValueError(f"{name}: got {getattr(part, name)}; it must be at least {least}")


def _one_of(part: Any, **choices: tuple[str, ...]) -> None:
    for name, known in choices.items():
        if getattr(part, name) not in known:
            raise ValueError(f"{name}: got {getattr(part, name)!r}; it must be {' or '.join(known)}")
