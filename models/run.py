"""The folder of a training run: settings, metrics and checkpoints.

run.json              the settings that the losses depend on
metrics.jsonl         a line a step, and one a measurement of the held-out loss; tensorboard/ says the same
step-000100/          a checkpoint: the weights in the Hugging Face layout, state/ with all that a resumed run needs, as
                      the framework's own library writes it, and checksums.json

A checkpoint is written aside while training goes on. A process may be killed at any moment: what was written last is
then whole, or it does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from . import checkpoint
from .arrays import Tree, tree_map_with_path
from .config import Config
from .processes import as_the_first, is_first
from .recipe import Checkpoints
from .shapes import shapes
from .tokenizer import FILES

_PREFIX = "step-"
_CHECKSUMS = "checksums.json"
_STATE = "state"


class Run:
    """The folder of a run; as a context it waits in the end for the checkpoint that is being written."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool, options: Checkpoints) -> None:
        self.folder, self._options = folder, options
        self._framework = settings["framework"]
        folder.mkdir(parents=True, exist_ok=True)
        self.last_step = as_the_first(self._framework, last_step(folder) if is_first(self._framework) else 0)
        settings = json.loads(json.dumps(settings))
        if self.last_step and not resume:
            raise ValueError(f"out: {folder} holds a run already: resume it, or name another folder")
        if self.last_step:
            before = json.loads((folder / "run.json").read_text("utf-8"))
            odd = [name for name in settings if before.get(name) != settings[name]]
            if odd:
                told = "; ".join(f"{name} was {before.get(name)} and is now {settings[name]}" for name in odd)
                raise ValueError(f"resume: the run in {folder} has other settings: {told}")
        if is_first(self._framework):
            checkpoint.write_text(folder / "run.json", json.dumps(settings, indent=2) + "\n")
        self._states = _states(self._framework)
        self._writing: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.wait(quietly=kind is not None)
        if kind is None:
            as_the_first(self._framework, 0)  # the last checkpoint is there for all

    def state(self, like: Tree) -> Tree:
        """That of the last checkpoint, in the shapes and places of `like`, whatever number of devices wrote it."""
        return self._states.read(like, self._checkpoint(self.last_step) / _STATE)

    def save(self, step: int, state: Tree, config: Config, tokenizer: Path | None) -> None:
        """Begin to write a checkpoint, once the one before is written; the state may change when this returns."""
        self.wait()
        final = self._checkpoint(step)
        part = final.with_name(final.name + ".part")
        if is_first(self._framework):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        as_the_first(self._framework, step)  # the folder is there
        written = self._states.begin_write(state, part / _STATE)
        self._writing = Thread(target=self._finish, args=(written, part, final, config, tokenizer))
        self._writing.start()

    def wait(self, quietly: bool = False) -> None:
        """Until what `save` began is done. Raises what went wrong there, unless `quietly`."""
        if self._writing:
            self._writing.join()
        error, self._writing, self._error = self._error, None, None
        if error and not quietly:
            raise error

    def _finish(
        self, written: Callable[[], Any], part: Path, final: Path, config: Config, tokenizer: Path | None
    ) -> None:
        try:
            written()
            if not is_first(self._framework):
                return
            _write_config(config, part, tokenizer)
            if self._options.weights:
                checkpoint.save(_weights(self._states, part / _STATE, config), config, part)
            files = sorted(file for file in part.rglob("*") if file.is_file())
            sums = {file.relative_to(part).as_posix(): _checksum(file) for file in files}
            checkpoint.write_text(part / _CHECKSUMS, json.dumps(sums, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            for old in _steps(self.folder)[: -self._options.kept]:
                shutil.rmtree(self._checkpoint(old))
        except BaseException as error:  # raised again where the next save or the end waits for this one
            self._error = error

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:06d}"


def last_step(folder: Path, state: bool = True) -> int:
    """The step of the last checkpoint whose files are those that were written, 0 if there is none.

    Without `state` only the files beside it are read, which is enough to generate.
    """
    return next((step for step in reversed(_steps(folder)) if _is_whole(folder / f"{_PREFIX}{step:06d}", state)), 0)


def last_checkpoint(folder: str | Path, state: bool = False) -> Path:
    """The last checkpoint in a run's folder, which `load` reads if it has weights. Raises FileNotFoundError."""
    step = last_step(Path(folder), state)
    if not step:
        raise FileNotFoundError(f"{folder}: has no checkpoint of a run; `crosstile train --out {folder}` makes one")
    return Path(folder) / f"{_PREFIX}{step:06d}"


def export(folder: str | Path, to: str | Path) -> Path:
    """Write the weights of a run's last state in the Hugging Face layout, and return the checkpoint they are from."""
    source = last_checkpoint(folder, state=True)
    framework = json.loads((Path(folder) / "run.json").read_text("utf-8"))["framework"]
    config = Config.from_pretrained(source)
    checkpoint.save(_weights(_states(framework), source / _STATE, config), config, to)
    _copy_tokenizer(source, Path(to))
    return source


def _states(framework: str) -> Any:
    return import_module(f"crosstile.models.state_{framework}")


def _weights(states: Any, folder: Path, config: Config) -> Tree:
    found = states.read_weights(folder, config)
    return tree_map_with_path(lambda path, _: found[path], shapes(config))


def _write_config(config: Config, folder: Path, tokenizer: Path | None) -> None:
    checkpoint.write_text(folder / "config.json", json.dumps(config.to_hugging_face(), indent=2) + "\n")
    if tokenizer:
        _copy_tokenizer(tokenizer, folder)


def _copy_tokenizer(source: Path, to: Path) -> None:
    for name in ("tokenizer.json", "merges.txt", *FILES):
        if (source / name).is_file():
            shutil.copy(source / name, to)


def _is_whole(folder: Path, state: bool) -> bool:
    """Whether every file that was written is there, as it was written."""
    try:
        sums: dict[str, str] = json.loads((folder / _CHECKSUMS).read_text("utf-8"))
        read = [name for name in sums if state or not name.startswith(f"{_STATE}/")]
        return all(_checksum(folder / name) == sums[name] for name in read)
    except (OSError, ValueError):
        return False


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())
