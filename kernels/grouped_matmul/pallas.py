"""grouped_matmul and its gate for TPUs.

Blocks of rows are visited once for each group that has rows in them (`pallas_schedule.py`). `rows` is every product
whose result has these rows: the forward, with one matrix or two and the gate in its last step, and dlhs, with the
matrices contracted along their other axis, which for a gate sums two products. `drhs` sums over the rows of each
group. dz, the gradients of both products of a gate, come from one elementwise kernel. Quantised matrices have a
kernel of their own for the forward and dlhs, and no gradient.

A visit multiplies all rows of its block, and only those of its group are stored; the visits of a block follow each
other, and its part of the result stays in VMEM between them. In drhs rows of other groups are set to 0, on both sides:
a NaN there, or past the last row, would else reach the sums. Along k the last step reads no further than k.
"""

from __future__ import annotations

from typing import Any

import jax

from ..tiles.pallas_gate import dz_of_gate
from ..tiles.reasons import pallas_reasons
from ..tiles.targets import Target
from .pallas_drhs import drhs
from .pallas_quantized import Matrix, quantized_rows
from .pallas_rows import rows
from .spec import INPUTS, GroupedMatmulSpec
from .tiles import GroupedMatmulConfig


def supports(spec: GroupedMatmulSpec, target: Target, needs_grad: bool) -> tuple[str, ...]:
    """Reasons why these kernels cannot run, with what would mend it; () if they can. Forward and backward are alike."""
    return tuple(pallas_reasons(target, dtype=spec.dtype))


def forward(
    spec: GroupedMatmulSpec,
    config: GroupedMatmulConfig,
    target: Target,
    lhs: jax.Array,
    rhs: jax.Array,
    rhs_up: jax.Array | None,
    sizes: jax.Array,
    *scales_and_zeros: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """out, and the preactivations where the spec asks for them."""
    if spec.format is not None:
        matrices = _matrices(rhs, rhs_up, *scales_and_zeros)
        return quantized_rows(spec, config.forward, target, [lhs], matrices, sizes)
    rights = [rhs] if rhs_up is None else [rhs, rhs_up]
    return rows(config.forward, target, [lhs], rights, sizes, spec.activation, spec.save_preactivations)


def backward(
    spec: GroupedMatmulSpec,
    config: GroupedMatmulConfig,
    target: Target,
    inputs: tuple[Any, ...],
    outputs: tuple[jax.Array, jax.Array | None],
    gradients: tuple[jax.Array, None],
) -> tuple[jax.Array | None, ...]:
    """dlhs, and of matrices that are not quantised drhs, and drhs_up where rhs_up is there."""
    lhs, rhs, rhs_up, sizes, *scales_and_zeros = inputs
    others = (None,) * (len(INPUTS) - 3)
    grads, rights = [gradients[0]], [rhs]
    if spec.activation is not None and rhs_up is not None and outputs[1] is not None:
        grads, rights = list(dz_of_gate(spec.activation, target, gradients[0], outputs[1])), [rhs, rhs_up]
    if spec.format is not None:
        matrices = _matrices(rhs, rhs_up, *scales_and_zeros)
        dlhs, _ = quantized_rows(spec, config.dlhs, target, grads, matrices, sizes, lhs.shape[2])
        return dlhs, None, None, *others
    dlhs, _ = rows(config.dlhs, target, grads, rights, sizes, turned=True)
    of_rights = drhs(config.drhs, target, lhs, grads, sizes)
    return dlhs, of_rights[0], (of_rights[1] if len(of_rights) > 1 else None), *others


def _matrices(rhs: jax.Array, rhs_up: jax.Array | None, *scales_and_zeros: Any) -> list[Matrix]:
    scales, zeros, up_scales, up_zeros = scales_and_zeros
    return [(rhs, scales, zeros)] if rhs_up is None else [(rhs, scales, zeros), (rhs_up, up_scales, up_zeros)]
