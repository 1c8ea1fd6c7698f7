"""The folder of a training run: settings, metrics and checkpoints.

run.json              the settings that the losses depend on
metrics.jsonl         a line a step, and one a measurement of the held-out loss
step-000100/          a checkpoint in the Hugging Face layout, with optimizer.safetensors and checksums.json beside

A process may be killed at any moment: what was written last is then whole, or it does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint
from .config import Config

_KEPT = 2  # checkpoints
_PREFIX = "step-"
_CHECKSUMS = "checksums.json"


class Run:
    """The folder of a run."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.last_step = last_step(folder)
        settings = json.loads(json.dumps(settings))
        if self.last_step and not resume:
            raise ValueError(f"out: {folder} holds a run already: resume it, or name another folder")
        if self.last_step:
            before = json.loads((folder / "run.json").read_text("utf-8"))
            odd = [name for name in settings if before.get(name) != settings[name]]
            if odd:
                told = "; ".join(f"{name} was {before.get(name)} and is now {settings[name]}" for name in odd)
                raise ValueError(f"resume: the run in {folder} has other settings: {told}")
        checkpoint.write_text(folder / "run.json", json.dumps(settings, indent=2) + "\n")
        self._metrics = folder / "metrics.jsonl"
        text = self._metrics.read_text("utf-8") if self.last_step else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last line of a killed run may be a part of one
        self._kept = [line for line in lines if json.loads(line)["step"] <= self.last_step]
        checkpoint.write_text(self._metrics, "".join(line + "\n" for line in self._kept))

    def history(self) -> tuple[list[float], list[tuple[int, float]]]:
        """The losses and the held-out bits up to the checkpoint."""
        records = [json.loads(line) for line in self._kept]
        losses = [record["loss"] for record in records if "loss" in record]
        return losses, [(record["step"], record["held_out_bits"]) for record in records if "held_out_bits" in record]

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self._folder / f"{_PREFIX}{step:06d}"

    def optimizer_state(self, step: int) -> dict[str, np.ndarray]:
        """What the learner gave to `save`."""
        return checkpoint.read_tensors(self.checkpoint(step) / "optimizer.safetensors", "numpy")

    def save(self, step: int, params: Any, config: Config, optimizer_state: dict[str, np.ndarray]) -> None:
        """Write a checkpoint, which appears whole or not at all, and drop all but the last ones."""
        final = self.checkpoint(step)
        part = final.with_name(final.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        checkpoint.save(params, config, part)
        checkpoint.write_tensors(part / "optimizer.safetensors", optimizer_state)
        sums = {file.name: _checksum(file) for file in sorted(part.iterdir())}
        checkpoint.write_text(part / _CHECKSUMS, json.dumps(sums, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in _steps(self._folder)[:-_KEPT]:
            shutil.rmtree(self.checkpoint(old))


def last_step(folder: Path) -> int:
    """The step of the last checkpoint in a run's folder whose files are those that were written, 0 if there is none."""
    return next((step for step in reversed(_steps(folder)) if _is_whole(folder / f"{_PREFIX}{step:06d}")), 0)


def last_checkpoint(folder: str | Path) -> Path:
    """The last checkpoint in a run's folder, which `load` reads. Raises FileNotFoundError."""
    step = last_step(Path(folder))
    if not step:
        raise FileNotFoundError(f"{folder}: has no checkpoint of a run; `crosstile train --out {folder}` makes one")
    return Path(folder) / f"{_PREFIX}{step:06d}"


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file that was written is there, as it was written."""
    try:
        sums = json.loads((checkpoint / _CHECKSUMS).read_text("utf-8"))
        return all(_checksum(checkpoint / name) == wanted for name, wanted in sums.items())
    except (OSError, ValueError):
        return False


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())
