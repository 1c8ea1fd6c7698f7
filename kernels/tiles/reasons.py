"""Why a kernel file cannot run on a target in some dtypes: the reasons that the ops' `supports` begin with."""

from __future__ import annotations

from .targets import Target

TRITON_DTYPES = ("float32", "float16", "bfloat16")
PALLAS_DTYPES = ("float32", "bfloat16")  # what the TPU's compiler takes; interpreted, float16 too


def triton_reasons(target: Target, **dtypes: str) -> list[str]:
    """Of a Triton file, for dtypes by the names that the caller knows them by."""
    reasons = [
        f"{name}: got {dtype}; the Triton kernels take {', '.join(TRITON_DTYPES)}"
        for name, dtype in dtypes.items()
        if dtype not in TRITON_DTYPES
    ]
    if target.is_tpu:
        reasons.append(f"target: {target.name} is a TPU; the Triton kernels run on GPUs and in the interpreter")
    return reasons


def pallas_reasons(target: Target, **dtypes: str) -> list[str]:
    """Of a Pallas file."""
    reasons = []
    if target.is_gpu:
        reasons.append(f"target: got {target.name}; Pallas kernels here are for TPUs, use implementation='triton'")
    for name, dtype in dtypes.items():
        if dtype == "float16" and target.is_tpu:
            reasons.append(f"{name}: got float16, which the compiler of TPU {target.name} does not take; use bfloat16")
        elif dtype not in (*PALLAS_DTYPES, "float16"):
            reasons.append(f"{name}: got {dtype}; it must be one of {', '.join(PALLAS_DTYPES)}")
    return reasons
