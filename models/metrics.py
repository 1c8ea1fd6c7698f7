"""The metrics of a run: metrics.jsonl, and TensorBoard's files, which are made of the same lines.

A run that goes on after a kill forgets what was measured past its checkpoint, here and there, so no step is told twice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from . import checkpoint


class Metrics:
    """Where they are written; as a context it writes out in the end what waits."""

    def __init__(self, folder: Path, last_step: int, tensorboard: bool, writes: bool) -> None:
        """`writes`: whether this process does, of many that know the same."""
        self._file, self._board, self._writes = folder / "metrics.jsonl", None, writes
        text = self._file.read_text("utf-8") if last_step else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last line of a killed run may be a part of one
        self.kept = [record for record in map(json.loads, lines) if record["step"] <= last_step]
        if not writes:
            return
        checkpoint.write_text(self._file, "".join(json.dumps(record) + "\n" for record in self.kept))
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        if tensorboard:
            self._board = _writer(folder / "tensorboard")
            for record in self.kept:
                self._show(record)

    def history(self) -> tuple[list[float], list[tuple[int, float]]]:
        """The losses and the held-out bits up to the checkpoint."""
        losses = [record["loss"] for record in self.kept if "loss" in record]
        held_out = [(record["step"], record["held_out_bits"]) for record in self.kept if "held_out_bits" in record]
        return losses, held_out

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to both; it has a "step", and numbers by their names."""
        if not self._writes:
            return
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self._show(record)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board:
            self._board.close()

    def _show(self, record: dict[str, Any]) -> None:
        if self._board:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])


def _writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError(
            "metrics.tensorboard: tensorboardX writes its files, and is not here: pip install 'crosstile[train]', or "
            "set metrics.tensorboard to false"
        ) from None
    return SummaryWriter(str(folder))
