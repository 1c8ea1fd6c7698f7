"""Compile tokamax's own kernels for the chips on which tokamax measured them, and keep the compiler's bundles.

    python -m crosstile.bench.tokamax_dumps FOLDER --chip v5e --most 100

tokamax (openxla/tokamax, Apache-2.0) ships the timings of its autotuner: arguments, tiles, and five device times of
each. This runs in an environment of its own that has tokamax (Python >= 3.12, `pip install tokamax 'jax[tpu]'`). One
folder an entry: the bundles of every program that the compiler made, and `entry.json` with the measured times. Folders
that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .steering import steering
from .tokamax_calls import call_name, measured_call
from .tpu import as_if_on, environment, one_device

FOLDERS = {"v5e": "tpu_v5_lite", "v5p": "tpu_v5", "v6e": "tpu_v6_lite", "v7x": "tpu7x"}
OPS = {
    "pallas_mosaic_tpu_ragged_dot": ("ragged_dot.pallas_mosaic_tpu", "PallasMosaicTpuRaggedDot"),
    "pallas_mosaic_tpu_flash_attention": ("attention.pallas_mosaic_tpu", "PallasMosaicTpuFlashAttention"),
    "pallas_mosaic_tpu_flash_attention_vjp": ("attention.pallas_mosaic_tpu_vjp", "PallasMosaicTpuFlashAttentionVjp"),
    "pallas_mosaic_tpu_linear_softmax_cross_entropy_loss": (
        "linear_softmax_cross_entropy_loss.pallas_mosaic_tpu",
        "PallasMosaicTpuLinearSoftmaxCrossEntropyLoss",
    ),
    "pallas_mosaic_tpu_linear_softmax_cross_entropy_loss_vjp": (
        "linear_softmax_cross_entropy_loss.pallas_mosaic_tpu",
        "PallasMosaicTpuLinearSoftmaxCrossEntropyLossVjp",
    ),
    "pallas_mosaic_tpu_splash_attention": (
        "experimental.tpu.splash_attention.pallas_mosaic_tpu",
        "PallasMosaicTpuSplashAttention",
    ),
    "pallas_mosaic_tpu_splash_attention_vjp": (
        "experimental.tpu.splash_attention.pallas_mosaic_tpu_vjp",
        "PallasMosaicTpuSplashAttentionVjp",
    ),
}


def entries(chip: str, most: int, seconds: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The op, a name, and the entry of up to `most` measured calls, in an order that a seed fixes, ops in turn.

    Left out are those that tokamax itself needed more than `seconds` to compile.
    """
    import tokamax

    folder = Path(tokamax.__file__).parent / "data" / "autotuning" / FOLDERS[chip]
    by_op = []
    for op in OPS:
        path = folder / f"{op}.json"
        if not path.exists():
            continue
        found = []
        for arguments, configs in json.loads(path.read_text()).items():
            for config, data in configs.items():
                if data.get("evaluation_times_ms") and data["compile_time_ms"] <= seconds * 1000:
                    name = call_name(op, arguments, config)
                    found.append((op, name, {"arguments": arguments, "config": config, "data": data}))
        random.Random(0).shuffle(found)
        by_op.append(found)
    turn, given = 0, 0
    while any(by_op) and given < most:
        found = by_op[turn % len(by_op)]
        turn += 1
        if found:
            given += 1
            yield found.pop()


def compile_entry(op: str, entry: dict[str, Any], chip: str, dump: Path) -> list[tuple[str, dict[int, list[int]]]]:
    """Compile one measured call as tokamax's autotuner did; returns what steers its kernels."""
    import jax
    from jax.sharding import SingleDeviceSharding
    from tokamax._src import numerics

    def as_measured(config: Any) -> Any:
        if chip == "v5e" and '"dot_dimension_numbers":[[[1],[2]]' in entry["arguments"]:
            # Measured with tokamax 0.0.12, whose ragged_dot towards its left side took tile_k and tile_n the other way.
            return replace(config, tile_k=config.tile_n, tile_n=config.tile_k)
        return config

    function, arrays = measured_call(OPS[op], entry, as_measured)
    device = one_device(chip)
    sharding = SingleDeviceSharding(device)
    placed = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in arrays)
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir(parents=True)
    with as_if_on(device):
        traced = jax.jit(function).trace(placed)
        traced.lower(lowering_platforms=("tpu",)).compile()
    integers = [jax.numpy.issubdtype(array.dtype, jax.numpy.integer) for array in arrays]
    values = [numerics.random_initialize(a) if known else a for a, known in zip(arrays, integers, strict=True)]
    return steering(traced.jaxpr, values)


def main() -> None:
    """Compile what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chip", choices=list(FOLDERS), required=True)
    parser.add_argument("--most", type=int, default=100, help="calls")
    parser.add_argument("--seconds", type=float, default=1e9, help="leave out what took longer to compile there")
    options = parser.parse_args()
    if "CROSSTILE_TOKAMAX_DUMP" not in os.environ:  # libtpu reads its environment once, when jax is first imported
        dump = Path(tempfile.mkdtemp(prefix="tokamax-")) / "llo"
        os.execve(
            sys.executable,
            [sys.executable, "-m", "crosstile.bench.tokamax_dumps", *sys.argv[1:]],
            {**os.environ, **environment(dump), "CROSSTILE_TOKAMAX_DUMP": str(dump)},
        )
    dump = Path(os.environ["CROSSTILE_TOKAMAX_DUMP"])
    import absl.flags

    absl.flags.FLAGS(["tokamax"])
    for op, name, entry in entries(options.chip, options.most, options.seconds):
        place = options.folder / options.chip / name
        if place.exists():
            continue
        place.mkdir(parents=True)
        record = {"op": op, "chip": options.chip, **entry}
        try:
            record["steering"] = compile_entry(op, entry, options.chip, dump)
            for path in dump.glob("*"):
                if "final_bundles.txt" in path.name or "per-bundle-utilization" in path.name:
                    shutil.move(path, place / path.name)
        except Exception as error:  # a call that this version refuses is left out, with its reason
            record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        (place / "entry.json").write_text(json.dumps(record))
        print(options.chip, op, name, record.get("error", "")[:150], flush=True)


if __name__ == "__main__":
    main()
