"""Checkpoints in the Hugging Face layout: `config.json` and safetensors, one file or sharded with an index.

There a projection is `[out, in]`, and each expert's is a tensor of its own; the parameters here are `[in, out]`, those
of all experts in one array. So matrices are transposed on the way, and experts stacked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import (
    FRAMEWORKS,
    Array,
    Tree,
    cast,
    framework_of,
    from_numpy,
    namespace,
    to_numpy,
    tree_leaves,
    tree_map_with_path,
)
from .config import Config
from .transformer import shapes

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NAMES = {
    "embedding": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
    "router": "block_sparse_moe.gate",
}
_NAMES_OF_EXPERTS = {
    "w_gate": "block_sparse_moe.experts.{}.w1",
    "w_up": "block_sparse_moe.experts.{}.w3",
    "w_down": "block_sparse_moe.experts.{}.w2",
}


def hugging_face_names(path: str, config: Config) -> tuple[str, ...]:
    """The names there of a parameter's tensors, one for each expert if it has these, else one.

    >>> hugging_face_names("layers.0.wq", Config.demo())
    ('model.layers.0.self_attn.q_proj.weight',)
    """
    *layer, name = path.split(".")
    start = ".".join([*(["model"] if layer else []), *layer, ""])
    if config.num_experts and name in _NAMES_OF_EXPERTS:
        return tuple(f"{start}{_NAMES_OF_EXPERTS[name].format(expert)}.weight" for expert in range(config.num_experts))
    return (f"{start}{_NAMES[name]}.weight",)


def load(
    folder: str | Path, framework: str = "torch", dtype: str | None = None, device: Any = None
) -> tuple[Tree, Config]:
    """Read a checkpoint.

    Args:
        folder: with `config.json` and `*.safetensors`.
        framework: "numpy", "torch" or "jax".
        dtype: "float32", "bfloat16", ...; None keeps each tensor's own (NumPy has no bfloat16 and reads float32).
        device: of torch or JAX; None is the framework's default.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a family or an option that the model does not have, a missing or unexpected tensor, a wrong shape.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework: got {framework!r}; it must be one of {', '.join(FRAMEWORKS)}")
    config = Config.from_pretrained(folder)
    wanted = {name: path for path in tree_leaves(shapes(config)) for name in hugging_face_names(path, config)}
    files = _files_of_tensors(Path(folder))
    _check_names(wanted, files, config)
    tensors: dict[str, Array] = {}
    for file in sorted(set(files.values())):
        names = [name for name in wanted if files[name] == file]
        for name, array in read_tensors(file, framework, names).items():
            tensors[name] = _import(wanted[name], array, framework, dtype, device)

    def place(path: str, shape: tuple[int, ...]) -> Array:
        names = hugging_face_names(path, config)
        one = shape if len(names) == 1 else shape[1:]
        for name in names:
            if tuple(tensors[name].shape) != one:
                got = list(tensors[name].shape)
                raise ValueError(f"{name}: its shape makes {path} {got}; config.json makes it {list(one)}")
        arrays = [tensors.pop(name) for name in names]
        return arrays[0] if len(names) == 1 else namespace(arrays[0]).stack(arrays)

    return tree_map_with_path(place, shapes(config)), config


def save(params: Tree, config: Config, folder: str | Path) -> None:
    """Write a checkpoint that `load` and the transformers library read; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = tree_leaves(params)
    if set(leaves) != set(tree_leaves(shapes(config))):
        odd = sorted(set(leaves) ^ set(tree_leaves(shapes(config))))
        raise ValueError(
            f"params: {', '.join(odd)} should be in both the parameters and the config's model, or in neither"
        )
    tensors: dict[str, Array] = {}
    for path, array in leaves.items():
        names = hugging_face_names(path, config)
        arrays = [array] if len(names) == 1 else list(array)
        tensors |= {name: x.T if _is_projection(path) else x for name, x in zip(names, arrays, strict=True)}
    write_tensors(folder / WEIGHTS, tensors)
    write_text(folder / "config.json", json.dumps(config.to_hugging_face(), indent=2) + "\n")


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


def _check_names(wanted: Mapping[str, str], files: Mapping[str, Path], config: Config) -> None:
    missing = [name for name in wanted if name not in files]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:4])}{' ...' if missing[4:] else ''}")
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    odd = [name for name in files if name not in wanted and name not in ignored and not name.endswith("inv_freq")]
    if odd:
        raise ValueError(f"the checkpoint has {', '.join(odd[:4])}{' ...' if odd[4:] else ''}, which the model has not")
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the index names it, and it is not there")


def _is_projection(path: str) -> bool:
    return path != "embedding" and not path.endswith("norm")


def _import(path: str, array: Array, framework: str, dtype: str | None, device: Any) -> Array:
    if _is_projection(path):
        array = array.T
    if framework == "torch":
        array = array.contiguous().to(device)
        return cast(array, dtype) if dtype else array
    if framework == "numpy":
        array = to_numpy(array)
    return from_numpy(array, framework, dtype, device)


def _teach_numpy_bfloat16() -> None:
    with suppress(ImportError):  # it is needed only where a tensor is bfloat16
        import ml_dtypes  # noqa: F401  (registers the dtype's name with NumPy)
