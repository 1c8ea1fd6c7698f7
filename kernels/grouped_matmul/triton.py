"""grouped_matmul and its gate for GPUs: the plans of their launches.

A product is one kernel over a list of tiles that another makes from the sizes of the groups, on the device. With the
matrices turned round by their strides it is dlhs too. drhs sums over the rows of each group. Of a gate dz, the
gradients of both products, come first, from one elementwise kernel. Quantised matrices have kernels of their own, and
no gradient.
"""

from __future__ import annotations

from typing import Any

from ..tiles.formats import FORMATS, bytes_of
from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.reasons import triton_reasons
from ..tiles.targets import Target
from ..tiles.triton_gate import dz_launch
from ..tiles.triton_products import transposed
from .spec import INPUTS, GroupedMatmulSpec
from .tiles import GroupedMatmulConfig
from .triton_drhs import drhs_launches
from .triton_quantized import dlhs_launch, product_launch
from .triton_rows import fit_rows, gated_launch, rows_launch
from .triton_schedule import schedule_launch


def supports(spec: GroupedMatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Why these kernels cannot run it, () where they can. The backward asks for nothing that the forward does not."""
    return tuple(triton_reasons(target, dtype=spec.dtype))


def forward(
    spec: GroupedMatmulSpec,
    config: GroupedMatmulConfig,
    lhs: Array,
    rhs: Array,
    rhs_up: Array | None,
    sizes: Array,
    *scales_and_zeros: Array | None,
) -> Plan:
    """The launches that write out, and the preactivations where the spec asks for them."""
    (batch, tokens, _), n = lhs.shape, rhs.shape[3]
    block_m = fit_rows(config.forward, tokens, rhs.shape[1])
    schedule, tiles = schedule_launch("tiles", sizes, tokens, block_m, every=False)
    outputs = {"out": contiguous((batch, tokens, n), spec.dtype)}
    if spec.save_preactivations:
        outputs["preactivations"] = contiguous((batch, 2, tokens, n), spec.dtype)
    inputs = {"lhs": lhs, "rhs": rhs}
    if spec.format is not None:
        inputs |= _matrices(rhs, rhs_up, scales_and_zeros)
        product = product_launch(spec, config.forward, block_m, tiles, inputs, "tiles")
    elif spec.activation is None or rhs_up is None:
        product = rows_launch(config.forward, block_m, tiles, {"lhs": lhs}, {"rhs": rhs}, ("tiles", "out"))
    else:
        inputs["rhs_up"] = rhs_up
        product = gated_launch(
            config.forward, block_m, tiles, inputs, "tiles", spec.activation, spec.save_preactivations
        )
    return Plan((schedule, product), {**inputs, "group_sizes": sizes}, outputs, {"tiles": tiles})


def backward(
    spec: GroupedMatmulSpec,
    config: GroupedMatmulConfig,
    inputs: tuple[Any, ...],
    outputs: tuple[Array, Array | None],
    gradients: tuple[Array, None],
) -> Plan:
    """Launches that write dlhs and, of matrices that are not quantised, drhs, and drhs_up where rhs_up is there."""
    lhs, rhs, rhs_up, sizes, *scales_and_zeros = inputs
    dout = gradients[0]
    passed = {"lhs": lhs, "rhs": rhs, "group_sizes": sizes, "dout": dout}
    results = {"dlhs": contiguous(lhs.shape, spec.dtype)}
    if spec.format is None:
        results["drhs"] = contiguous(rhs.shape, spec.dtype)
    scratch: dict[str, Array] = {}
    launches: list[Launch] = []
    grads, weights = {"dout": dout}, {"rhs": transposed(rhs)}
    if spec.activation is not None and rhs_up is not None and outputs[1] is not None:
        dz = contiguous(dout.shape, spec.dtype)
        scratch |= {"dz_gate": dz, "dz_up": dz}
        grads, weights = dict(scratch), {**weights, "rhs_up": transposed(rhs_up)}
        passed |= {"rhs_up": rhs_up, "preactivations": outputs[1]}
        if spec.format is None:
            results["drhs_up"] = contiguous(rhs_up.shape, spec.dtype)
        launches.append(dz_launch(spec.activation, dout))

    block_m = fit_rows(config.dlhs, lhs.shape[1], rhs.shape[1])
    schedule, scratch["tiles"] = schedule_launch("tiles", sizes, lhs.shape[1], block_m, every=False)
    launches.append(schedule)
    if spec.format is not None:
        matrices = _matrices(rhs, rhs_up, tuple(scales_and_zeros))
        launches.append(dlhs_launch(spec, config.dlhs, block_m, scratch["tiles"], grads, matrices, lhs, "tiles"))
        return Plan(tuple(launches), passed | matrices, results, scratch)
    launches.append(rows_launch(config.dlhs, block_m, scratch["tiles"], grads, weights, ("tiles", "dlhs")))
    of_drhs, its_scratch = drhs_launches(config.drhs, sizes, {"lhs": lhs}, grads)
    return Plan((*launches, *of_drhs), passed, results, scratch | its_scratch)


def completed(
    spec: GroupedMatmulSpec, config: GroupedMatmulConfig, target: Target, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The inputs with float8 codes as bytes, for not every GPU's compiler knows float8, and reading needs no more."""
    if spec.format is None or FORMATS[spec.format].storage != "float8_e4m3fn":
        return inputs
    return tuple(
        bytes_of(array) if name in ("rhs", "rhs_up") and array is not None else array
        for name, array in zip(INPUTS, inputs, strict=True)
    )


def _matrices(rhs: Array, rhs_up: Array | None, scales_and_zeros: tuple[Array | None, ...]) -> dict[str, Array]:
    """What there is of quantised matrices, by name."""
    named = zip(INPUTS[4:], scales_and_zeros, strict=True)
    found = {"rhs": rhs, "rhs_up": rhs_up, **dict(named)}
    return {name: array for name, array in found.items() if array is not None}
