"""Matmul with its epilogue inside, for NVIDIA and AMD GPUs.

One kernel does every product (`triton_product.py`). Forward it computes `activation(a @ b + bias) + residual`; backward
it is called again with the strides of `a` and `b` swapped, `da = dz @ b^T` and `db = a^T @ dz`, so no operand is ever
copied or transposed in memory. dz, the gradient of `a @ b + bias`, comes first, from one elementwise kernel.
"""

from __future__ import annotations

from ..tiles.launch import Array, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_epilogue import epilogue_gradient
from ..tiles.triton_products import transposed
from .spec import MatmulSpec
from .tiles import MatmulConfig
from .triton_launches import Product

PRECISIONS = {"cuda": ("tf32", "tf32x3", "bf16x3", "bf16x6"), "rocm": ("bf16x3", "bf16x6")}


def supports(spec: MatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    reasons = triton_reasons(target, dtype=spec.dtype, out_dtype=spec.out_dtype)
    there = PRECISIONS.get(target.platform, PRECISIONS["cuda"])
    if spec.precision is not None and spec.precision not in there:
        reasons.append(
            f"precision: got {spec.precision}; {target.name} multiplies float32 as {', '.join(there)} or None"
        )
    return tuple(reasons)


def forward(
    spec: MatmulSpec, config: MatmulConfig, a: Array, b: Array, bias: Array | None, residual: Array | None
) -> Plan:
    """Launches that write out, and the preactivation where the spec asks for it."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    outputs = {"out": contiguous(shape, spec.out_dtype)}
    if spec.save_preactivation:
        outputs["preactivation"] = contiguous(shape, spec.dtype)
    product = Product(("a", a), ("b", b), tuple(outputs)[::-1], bias, residual, spec.activation, spec.precision)
    launches, scratch = product.launches(config)
    return Plan(launches, _present(a=a, b=b, bias=bias, residual=residual), outputs, scratch)


def backward(
    spec: MatmulSpec,
    config: MatmulConfig,
    inputs: tuple[Array, Array, Array | None, Array | None],
    outputs: tuple[Array, Array | None],
    gradients: tuple[Array, None],
) -> Plan:
    """Launches that write da, db and, where the input was there, dbias and dresidual."""
    a, b, bias, residual = inputs
    preactivation, dout = outputs[1], gradients[0]
    of_epilogue = epilogue_gradient(spec.dtype, spec.activation, dout, bias, residual)
    dz = (of_epilogue.name, of_epilogue.dz)
    launches, scratch = list(of_epilogue.launches), of_epilogue.scratch
    for product in (
        Product(dz, ("b", transposed(b)), ("da",), precision=spec.precision),
        Product(("a", transposed(a)), dz, ("db",), precision=spec.precision),
    ):
        of_product, parts = product.launches(config)
        launches.extend(of_product)
        scratch = scratch | parts
    results = {"da": contiguous(a.shape, spec.dtype), "db": contiguous(b.shape, spec.dtype), **of_epilogue.outputs}
    read = _present(a=a, b=b, dout=dout, preactivation=preactivation if spec.activation else None)
    return Plan(tuple(launches), read, results, scratch)


def _present(**arrays: Array | None) -> dict[str, Array]:
    return {name: array for name, array in arrays.items() if array is not None}
