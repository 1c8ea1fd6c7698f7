"""Plans of the Triton matmul kernels run on NumPy arrays, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
from matmul_problems import OPERANDS, Problem

from crosstile.kernels.matmul import triton as kernels
from crosstile.kernels.matmul.spec import MatmulSpec
from crosstile.kernels.matmul.tiles import MatmulConfig, choose_config
from crosstile.kernels.tiles.launch import Array
from crosstile.kernels.tiles.targets import INTERPRET
from crosstile.kernels.tiles.triton_interpreter import run


def describe(array: np.ndarray | None) -> Array | None:
    """The array as a plan knows it."""
    if array is None:
        return None
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Array(array.shape, array.dtype.name, strides, array.ctypes.data % 16 == 0)


def forward(spec: MatmulSpec, arrays: dict, config: MatmulConfig, file: Any = kernels) -> tuple[np.ndarray, ...]:
    """What the plan of the forward writes."""
    inputs = {name: arrays[name] for name in OPERANDS if name in arrays}
    return run(file.forward(spec, config, *(describe(inputs.get(name)) for name in OPERANDS)), inputs)


def forward_and_backward(
    problem: Problem, arrays: dict, config: MatmulConfig | None = None, file: Any = kernels
) -> dict[str, np.ndarray]:
    """out and the gradients, by name."""
    config = config or choose_config(problem.spec, INTERPRET)
    out, *preactivation = forward(problem.spec, arrays, config, file)
    saved = preactivation[0] if preactivation else None
    inputs = tuple(describe(arrays.get(name)) for name in OPERANDS)
    outputs, gradients = (describe(out), describe(saved)), (describe(arrays["dout"]), None)
    plan = file.backward(problem.spec, config, inputs, outputs, gradients)
    named = {**arrays, "preactivation": saved}
    results = run(plan, {name: named[name] for name in plan.inputs})
    return {"out": out, **dict(zip(plan.outputs, results, strict=True))}


def native(problem: Problem) -> dict[str, np.ndarray]:
    """The problem's arrays in its dtypes."""
    arrays = {name: array.astype(problem.dtype) for name, array in problem.exact_arrays.items()}
    return {**arrays, "dout": arrays["dout"].astype(problem.spec.out_dtype)}
