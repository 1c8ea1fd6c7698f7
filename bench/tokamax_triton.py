"""Lower tokamax's Pallas-Triton kernels for the GPUs on which tokamax measured them, and keep their Triton IR.

    python -m crosstile.bench.tokamax_triton FOLDER --chip h100 --most 100

tokamax (openxla/tokamax, Apache-2.0) ships the timings of its autotuner for an A100, an H100 and a B200. Its Triton
kernels lower to Triton IR on a machine without a GPU; its Mosaic GPU kernels do not, since they need CUDA's compiler.
This runs in an environment of its own that has tokamax (Python >= 3.12, `pip install tokamax`). One folder an entry:
`N.ttir` for each kernel and `entry.json` with launches, measured times and what XLA puts around the kernels.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from .tokamax_calls import call_name, measured_call


@dataclass(frozen=True)
class Measured:
    """A device that tokamax measured: its folder of timings, JAX's name for it and the target it is an example of."""

    folder: str
    kind: str
    target: str
    processors: int


CHIPS = {
    "a100": Measured("nvidia_a100-sxm4-40gb", "NVIDIA A100-SXM4-40GB", "sm_80", 108),
    "h100": Measured("nvidia_h100_80gb_hbm3", "NVIDIA H100 80GB HBM3", "sm_90", 132),
    "b200": Measured("nvidia_b200", "NVIDIA B200", "sm_100", 148),
}
OPS = {
    "pallas_triton_flash_attention": ("attention.pallas_triton", "PallasTritonFlashAttention"),
    "pallas_triton_flash_attention_vjp": ("attention.pallas_triton_vjp", "PallasTritonFlashAttentionVjp"),
    "pallas_triton_gated_linear_unit": ("gated_linear_unit.pallas_triton", "PallasTritonGatedLinearUnit"),
    "pallas_triton_normalization": ("normalization.pallas_triton", "PallasTritonNormalization"),
    "pallas_triton_normalization_vjp": ("normalization.pallas_triton_vjp", "PallasTritonNormalizationVjp"),
    "pallas_triton_ragged_dot": ("ragged_dot.pallas_triton", "PallasTritonRaggedDot"),
}
_TARGET = "__gpu$xla.gpu.triton"
_FREE = ("reshape", "constant", "return", "func", "call", "bitcast_convert", "custom_call")


def entries(chip: str, most: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The op, a name and the entry of up to `most` measured calls, ops in turn, in an order that a seed fixes.

    A call that was measured with several tiles comes with all of them, one after the other.
    """
    import tokamax

    folder = Path(tokamax.__file__).parent / "data" / "autotuning" / CHIPS[chip].folder
    by_op: list[list[list[tuple[str, str, dict[str, Any]]]]] = []
    for op in OPS:
        path = folder / f"{op}.json"
        found = []
        for arguments, configs in _timings(path).items():
            call = []
            for config, data in configs.items():
                if data.get("evaluation_times_ms"):
                    name = call_name(op, arguments, config)
                    call.append((op, name, {"arguments": arguments, "config": config, "data": data}))
            if call:
                found.append(call)
        random.Random(0).shuffle(found)
        found.sort(key=len)  # those with several tiles last, so that they are taken first
        by_op.append(found)
    given = 0
    while any(by_op) and given < most:
        for found in by_op:
            for entry in found.pop() if found else ():
                given += 1
                yield entry


def _timings(path: Path) -> dict[str, Any]:
    text = path.read_text() if path.exists() else ""
    return json.loads(text) if text.strip() else {}


def lower_entry(op: str, entry: dict[str, Any], chip: Measured, folder: Path) -> dict[str, Any]:
    """Lower one measured call as tokamax's autotuner did; writes the IR and returns the launches."""
    import jax
    from jax._src.interpreters import mlir
    from jax._src.pallas.triton import lowering
    from jax.sharding import AbstractDevice, AbstractMesh

    function, arrays = measured_call(OPS[op], entry)
    texts: list[str] = []
    launches: list[dict[str, Any]] = []
    lower, call = lowering.lower_jaxpr_to_triton_module, mlir.custom_call

    def keep_text(*args: Any, **options: Any) -> Any:
        result = lower(*args, **options)
        texts.append(str(result.module.operation.get_asm()))
        return result

    def keep_launch(*args: Any, **options: Any) -> Any:
        if options.get("call_target_name") == _TARGET:
            config = options["backend_config"]
            grid = [config[f"grid_{axis}"].value for axis in "xyz"]
            sizes = [_bytes(str(operand.type)) for operand in options["operands"]]
            results = [_bytes(str(kind)) for kind in options["result_types"]]
            numbers = {key: config[key].value for key in ("num_warps", "num_stages")}
            launches.append({"grid": grid, "inputs": sizes, "outputs": results, **numbers})
        return call(*args, **options)

    told = AbstractDevice(device_kind=chip.kind, num_cores=chip.processors, platform="gpu")
    with (
        patch.object(lowering, "lower_jaxpr_to_triton_module", keep_text),
        patch.object(mlir, "custom_call", keep_launch),
        patch.object(jax, "devices", lambda *_: [SimpleNamespace(core_count=chip.processors, platform="gpu")]),
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=told)),
    ):
        lowered = jax.jit(function).trace(arrays).lower(lowering_platforms=("cuda",))
    for number, text in enumerate(texts):
        (folder / f"{number}.ttir").write_text(text)
    words = re.findall(r"\b(?:stablehlo|chlo|func)\.(\w+)", lowered.as_text())
    return {"launches": launches, "around": dict(Counter(word for word in words if word not in _FREE))}


def _bytes(kind: str) -> int:
    """Of `tensor<8x128xbf16>`."""
    match = re.search(r"tensor<((?:\d+x)*)[a-z]+(\d+)", kind)
    if not match:
        return 0
    return prod(map(int, match.group(1).split("x")[:-1])) * max(int(match.group(2)), 8) // 8


def main() -> None:
    """Lower what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chip", choices=list(CHIPS), required=True)
    parser.add_argument("--most", type=int, default=100, help="calls")
    options = parser.parse_args()
    import absl.flags

    absl.flags.FLAGS(["tokamax"])
    for op, name, entry in entries(options.chip, options.most):
        place = options.folder / options.chip / name
        if (place / "entry.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        record = {"op": op, "chip": options.chip, **entry}
        try:
            record |= lower_entry(op, entry, CHIPS[options.chip], place)
        except Exception as error:  # a call that this version refuses is left out, with its reason
            record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        (place / "entry.json").write_text(json.dumps(record))
        print(options.chip, op, name, record.get("error", "")[:200], record.get("around", ""), flush=True)


if __name__ == "__main__":
    main()
