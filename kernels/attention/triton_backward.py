"""The gradients of attention on GPUs: of keys and values in one kernel, of queries in another, each in its own tiles.

Both recompute the weights from lse. What every row needs of it is prepared once, by a small kernel before them.
"""

from __future__ import annotations

from math import e, log2, prod

from ..tiles.launch import Array, Launch, Plan, contiguous
from .spec import INPUTS, AttentionInputs, AttentionSpec, needs_exact_delta
from .tiles import AttentionConfig
from .triton_common import (
    arrays_of,
    by_addresses,
    by_descriptors,
    checked,
    names_of,
    programs,
    score_constants,
    score_numbers,
    size_constants,
    slope_of,
    strides_of,
)
from .triton_dkv import dkv_kernel
from .triton_dq import dq_kernel
from .triton_planes import dplane_launches, dsinks_launch, gradient_arrays
from .triton_weights import prepare_launch


def backward(
    spec: AttentionSpec,
    config: AttentionConfig,
    inputs: tuple[Array | None, ...],
    outputs: tuple[Array, Array],
    gradients: tuple[Array, Array | None],
) -> Plan:
    """The gradients of all inputs that have one, each shaped as its input, from those of out and lse (None: zero)."""
    given = AttentionInputs(*inputs)
    out, lse = outputs
    dout, dlse = gradients
    q, k, v = given[:3]
    batch, q_size, q_heads, _ = q.shape
    kv_heads = k.shape[2]
    arrays = {**arrays_of(given), "out": out, "lse": lse, "dout": dout}
    if dlse is not None:
        arrays["dlse"] = dlse
    results = {name: contiguous(array.shape, spec.dtype) for name, array in (("dq", q), ("dk", k), ("dv", v))}
    slots = [slot for slot in spec.plane_gradients if given.planes[slot] is not None]
    exact = needs_exact_delta(spec, given.planes)
    statistics = ("log2_lse", "delta", *(("exact_delta",) if exact else ()))
    scratch = {name: contiguous((batch, q_heads, q_size), "float32") for name in statistics}

    prepare = prepare_launch(spec, given, outputs, gradients)
    before = INPUTS[: INPUTS.index("sinks")]
    after = *INPUTS[INPUTS.index("plane0") :], "dout", "log2_lse"

    def reads(*runs: str, delta: str = "delta") -> tuple[str, ...]:
        return names_of({**arrays, **scratch}, *before, "dropout_seed", *runs, *after, delta)

    numbers = {
        **strides_of(q=q, k=k, v=v, dout=dout),
        **score_numbers(spec, given),
        "scale": spec.softmax_scale,
        "kept_share": 1 - spec.dropout if spec.dropout else None,
        "log2_scale": None if spec.score is not None else spec.softmax_scale * log2(e),
    }
    options = {**score_constants(spec, given), "SLOPE": slope_of(spec)}
    tiles = checked(config.dkv, "dkv")
    grid = programs(spec, tiles, given, by_keys=True)
    constants = {**options, **size_constants(spec, tiles, given, dout, results["dk"], results["dv"])}
    constants |= {"RUNS": given.dkv_runs is not None, "DESCRIPTORS": by_descriptors(tiles, q, k, v, dout)}
    of_order = {"kv_heads": kv_heads, "together": grid[0] if len(grid) == 3 else None}
    how = tiles.num_warps, tiles.num_stages, spec.dtype, by_addresses(constants)
    dkv = Launch(dkv_kernel, (prod(grid),), reads("dkv_runs"), ("dk", "dv"), {**numbers, **of_order}, constants, *how)

    tiles = checked(config.dq, "dq")
    grid = programs(spec, tiles, given, by_keys=False)
    constants = {**options, **size_constants(spec, tiles, given, dout, results["dq"])}
    constants |= {"RUNS": given.dq_runs is not None, "DESCRIPTORS": by_descriptors(tiles, k, v)}
    constants |= {"EXACT": exact, "LONGEST": len(grid) == 3}
    how = tiles.num_warps, tiles.num_stages, spec.dtype, by_addresses(constants)
    subtracted = dlse if exact else None
    dq = Launch(
        dq_kernel,
        grid,
        (*reads("dq_runs"), "dlse" if subtracted else "", *(() if exact else ("",))),
        ("exact_delta", "dq") if exact else ("dq",),
        {**numbers, **strides_of(dlse=subtracted), "q_heads": q_heads},
        constants,
        *how,
    )
    launches = [prepare, dkv, dq]
    if given.sinks is not None:
        launches.append(dsinks_launch(given))
    for slot in slots:
        of_plane, sums = dplane_launches(spec, tiles, given, dout, reads(delta=statistics[-1]), slot)
        launches += of_plane
        scratch |= sums
    return Plan(tuple(launches), arrays, {**results, **gradient_arrays(spec, given)}, scratch)
