"""Checkpoints in the Hugging Face layout: `config.json` and safetensors, one file or sharded with an index.

`names` says where each parameter lies in the tensors, and how.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import crosstile

from .arrays import (
    FRAMEWORKS,
    Array,
    Tree,
    framework_of,
    from_numpy,
    namespace,
    to_numpy,
    tree_leaves,
    tree_map_with_path,
)
from .config import Config
from .families import FAMILIES
from .names import Place, places
from .shapes import shapes
from .stored_codes import decode, method_of, parts_of
from .transformer import quantizable

WEIGHTS = "model.safetensors"
KEPT = "correction_bias"  # never cast: a rounded one would choose other experts
_INDEX = "model.safetensors.index.json"


def load(
    folder: str | Path,
    framework: str = "torch",
    dtype: str | None = None,
    device: Any = None,
    *,
    quantize: str | bool | None = None,
    group_size: int | None = None,
    family: str | None = None,
) -> tuple[Tree, Config]:
    """Read a checkpoint.

    Args:
        folder: with `config.json` and `*.safetensors`.
        framework: "numpy", "torch" or "jax".
        dtype: "float32", "bfloat16", ...; None keeps each tensor's own (NumPy has no bfloat16 and reads float32), as
            the bias by which experts are chosen always does.
        device: of torch or JAX; None is the framework's default.
        quantize: keep the layers' matrices in that format of `crosstile.quantize`, each as soon as it is read. None
            leaves them as they are stored: those of an MXFP4 or FP8 checkpoint are `Quantized` without a loss. False
            makes numbers of these, of `dtype`.
        group_size: of that format.
        family: read the checkpoint as of this family, whatever its model_type says; see `families.FAMILIES`.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a family or an option that the model does not have, a missing or unexpected tensor, a wrong shape.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework: got {framework!r}; it must be one of {', '.join(FRAMEWORKS)}")
    config = Config.from_pretrained(folder, family)
    fields = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    method, files, wanted = method_of(fields), _files_of_tensors(Path(folder)), places(config)
    stored = _without_drafts(_text_part(files), config, fields.get("num_nextn_predict_layers") or 0)
    parts = {name: parts_of(name, method, stored) for place in wanted for name in place.names}
    _check_names([part for names in parts.values() for part in names], stored, config)
    _check_files(files)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        reader = _Reader(files, framework, stack)
        for place in wanted:
            tensors = [[reader.read(stored[part]) for part in parts[name]] for name in place.names]
            if method and len(tensors[0]) > 1:
                read: dict[str, Any] = decode(tensors, place, method, dtype or "float32")
            else:
                _check_shapes(place, [tensor for (tensor,) in tensors])
                read = place.split([tensor for (tensor,) in tensors])
            for path, array in read.items():
                found[path] = _import(path, array, framework, dtype, device, quantize, group_size)
    return tree_map_with_path(lambda path, _: found[path], shapes(config)), config


def save(params: Tree, config: Config, folder: str | Path) -> None:
    """Write a checkpoint that `load` and the transformers library read; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves, wanted = tree_leaves(params), tree_leaves(shapes(config))
    if set(leaves) != set(wanted):
        odd = sorted(set(leaves) ^ set(wanted))
        raise ValueError(
            f"params: {', '.join(odd)} should be in both the parameters and the config's model, or in neither"
        )
    for path, array in leaves.items():
        if isinstance(array, crosstile.Quantized):
            raise ValueError(f"params: {path} is quantised; save the weights that it was made from")
    fields = config.to_hugging_face()
    tensors: dict[str, Array] = {}
    for place in places(config):
        tensors |= place.join(leaves)
    write_tensors(folder / WEIGHTS, tensors)
    write_text(folder / "config.json", json.dumps(fields, indent=2) + "\n")


def read_tensors(file: Path, framework: str, names: list[str] | None = None) -> dict[str, Array]:
    """Tensors of a safetensors file: torch's for torch, else NumPy's; all of them without `names`."""
    from safetensors import safe_open

    if framework != "torch":
        _teach_numpy_bfloat16()
    with safe_open(file, framework="pt" if framework == "torch" else "np") as tensors:
        try:
            return {name: tensors.get_tensor(name) for name in (tensors.keys() if names is None else names)}
        except TypeError as error:
            raise ValueError(f"{file}: NumPy does not know its dtype ({error}): pip install ml_dtypes") from None


def write_tensors(file: Path, tensors: Mapping[str, Array]) -> None:
    """Write arrays of one framework to a safetensors file, whole or not at all."""
    if all(framework_of(array) == "torch" for array in tensors.values()):
        from safetensors.torch import save

        data = save({name: array.detach().contiguous() for name, array in tensors.items()}, {"format": "pt"})
    else:
        from safetensors.numpy import save as save_numpy

        data = save_numpy({name: np.asarray(array, order="C") for name, array in tensors.items()}, {"format": "pt"})
    _replace(file, data)


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    _replace(file, text.encode())


def _replace(file: Path, data: bytes) -> None:
    part = file.with_name(file.name + ".part")
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    from safetensors import safe_open

    index = folder / _INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: has neither {WEIGHTS} nor {_INDEX}")
    with safe_open(file, framework="np") as tensors:
        return dict.fromkeys(tensors.keys(), file)


class _Reader:
    """The tensors of some files, each file opened once."""

    def __init__(self, files: Mapping[str, Path], framework: str, stack: ExitStack) -> None:
        self._files, self._framework, self._stack = files, framework, stack
        self._open: dict[Path, Any] = {}
        if framework != "torch":
            _teach_numpy_bfloat16()

    def read(self, name: str) -> Array:
        """That tensor: torch's for torch, else NumPy's."""
        from safetensors import safe_open

        file = self._files[name]
        if file not in self._open:
            kind = "pt" if self._framework == "torch" else "np"
            self._open[file] = self._stack.enter_context(safe_open(file, framework=kind))
        try:
            return self._open[file].get_tensor(name)
        except AttributeError:
            return _read_float8(file, name)
        except TypeError as error:
            raise ValueError(f"{file}: NumPy does not know its dtype ({error}): pip install ml_dtypes") from None


def _read_float8(file: Path, name: str) -> np.ndarray:
    """A tensor of float8_e4m3fn, which safetensors looks for in NumPy; it lies where the file's JSON header says."""
    import ml_dtypes

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
        if entry["dtype"] != "F8_E4M3":
            raise ValueError(f"{name}: its dtype is {entry['dtype']}, which NumPy does not know; load it with torch")
        begin, end = entry["data_offsets"]
        stream.seek(8 + length + begin)
        return np.frombuffer(stream.read(end - begin), ml_dtypes.float8_e4m3fn).reshape(entry["shape"])


def _text_part(files: Mapping[str, Path]) -> dict[str, str]:
    """How the tensors are stored, by their names in a model of text alone; of one with pictures the text part's."""
    start = "language_model."
    if not any(name.startswith(f"{start}model.") for name in files):
        return {name: name for name in files}
    return {name.removeprefix(start): name for name in files if name.startswith((start, "lm_head."))}


def _without_drafts(stored: Mapping[str, str], config: Config, count: int) -> dict[str, str]:
    """Without the layers past the last, which draft further tokens (DeepSeek-V3's prediction of several)."""
    start, last = FAMILIES[config.family].layers_at, config.num_layers
    drafts = tuple(f"{start}.{last + number}." for number in range(count))
    return {name: where for name, where in stored.items() if not name.startswith(drafts)}


def _check_names(wanted: list[str], stored: Mapping[str, str], config: Config) -> None:
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:4])}{' ...' if missing[4:] else ''}")
    known, family = set(wanted), FAMILIES[config.family]
    ignored = (*family.ignored, *([str(family.model_names["head"])] if config.tie_embeddings else []))
    odd = [name for name in stored if name not in known and not name.endswith(ignored)]
    if odd:
        raise ValueError(f"the checkpoint has {', '.join(odd[:4])}{' ...' if odd[4:] else ''}, which the model has not")


def _check_files(files: Mapping[str, Path]) -> None:
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the index names it, and it is not there")


def _check_shapes(place: Place, tensors: list[Array]) -> None:
    for name, tensor in zip(place.names, tensors, strict=True):
        if tuple(tensor.shape) != place.shape:
            raise ValueError(
                f"{name}: got {list(tensor.shape)}; config.json makes it {list(place.shape)}, "
                f"of {', '.join(place.paths)}"
            )


def _import(
    path: str,
    array: Any,
    framework: str,
    dtype: str | None,
    device: Any,
    quantize: str | bool | None,
    group_size: int | None,
) -> Any:
    """A parameter as it was read, in its framework, dtype and place, quantised if it is to be."""
    in_codes = path.startswith("layers.") and quantizable(path.rpartition(".")[2])
    if path.endswith(KEPT):
        dtype = None
    if isinstance(array, crosstile.Quantized):
        if in_codes and quantize is None:
            values, scales = (_place(part, framework, None, device) for part in (array.values, array.scales))
            return replace(array, values=values, scales=scales)
        array = array.dequantize()
    placed = _place(array, framework, dtype, device)
    return crosstile.quantize(placed, str(quantize), group_size=group_size) if in_codes and quantize else placed


def _place(array: Array, framework: str, dtype: str | None, device: Any) -> Array:
    if framework == "torch":
        # A CPU multiplies one row fastest by a matrix stored by columns, as in the files, and aligned, as a copy is.
        array = array.to(device, getattr(namespace(array), dtype) if dtype else None, copy=True)
        return array if array.device.type == "cpu" else array.contiguous()
    if framework == "numpy":
        array = to_numpy(array)
    return from_numpy(array, framework, dtype, device)


def _teach_numpy_bfloat16() -> None:
    with suppress(ImportError):  # it is needed only where a tensor is bfloat16
        import ml_dtypes  # noqa: F401  (registers the dtype's name with NumPy)
