"""Which mesh axis splits which dimension of an op's arrays: a table of roles, and `sharded`, which says what they mean.

A compiler cannot partition a kernel, so a call on many devices runs the kernel on each device's part of its arrays.
Each dimension of each array has a role, such as "batch" or "heads", and `sharded` gives a role mesh axes. What a role
has not, what an axis does not divide, and a dimension of size 1 are whole on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from crosstile import dispatch

CONTEXT_FORMS = ("gather", "ring", "ulysses")

Roles = tuple[str | None, ...]


@dataclass(frozen=True)
class OpRoles:
    """The roles of one public function.

    Attributes:
        arguments: of each array its roles; by rank where that may vary; two where the argument may be a pair.
        results: the same of what it returns, by the rank of the first argument.
    """

    arguments: Mapping[str, Any]
    results: tuple[Any, ...]


def _ending(*roles: str | None) -> dict[int, Roles]:
    """By rank, of an array that broadcasts: its dimensions are the last ones."""
    return {count: roles[len(roles) - count :] for count in range(len(roles) + 1)}


_QUERIES: Roles = ("batch", "sequence", "heads", None)
_KEYS: Roles = ("batch", "keys", "kv_heads", None)
_SCORES = _ending("batch", "heads", "sequence", "keys")
_ROWS: dict[int, Roles] = {1: (None,), 2: ("batch", None), 3: ("batch", "rows", None), 4: _QUERIES}
_INPUT: dict[int, Roles] = {1: (None,), 2: ("batch", None), 3: ("batch", "sequence", None)}
_GATED: dict[int, Roles] = {1: ("columns",), 2: ("batch", "columns"), 3: ("batch", "sequence", "columns")}

ROLES: Mapping[str, OpRoles] = {
    "attention": OpRoles(
        {
            "q": _QUERIES,
            "k": _KEYS,
            "v": _KEYS,
            "bias": _SCORES,
            "mask": _SCORES,
            "segment_ids": (("batch", "sequence"), ("batch", "keys")),
            "q_lengths": ("batch",),
            "kv_lengths": ("batch",),
            "sinks": ("heads",),
        },
        (_QUERIES, ("batch", "heads", "sequence")),
    ),
    "varlen_attention": OpRoles(
        {
            "q": (None, "heads", None),
            "k": (None, "kv_heads", None),
            "v": (None, "kv_heads", None),
            "cu_seqlens_q": (None,),
            "cu_seqlens_k": (None,),
            "bias": _ending(None, "heads", None, None),
            "mask": _ending(None, "heads", None, None),
            "sinks": ("heads",),
        },
        ((None, "heads", None), ("heads", None)),
    ),
    "paged_attention": OpRoles(
        {
            "q": {3: ("batch", "heads", None), 4: ("batch", None, "heads", None)},
            "k_pages": (None, None, "kv_heads", None),
            "v_pages": (None, None, "kv_heads", None),
            "page_table": ("batch", None),
            "lengths": ("batch",),
            "q_lengths": ("batch",),
            "k_scales": ("kv_heads",),
            "v_scales": ("kv_heads",),
            "sinks": ("heads",),
        },
        (
            {3: ("batch", "heads", None), 4: ("batch", None, "heads", None)},
            {3: ("batch", "heads"), 4: ("batch", "heads", None)},
        ),
    ),
    "rms_norm": OpRoles({"x": _ROWS, "weight": (None,), "residual": _ROWS}, (_ROWS, _ROWS)),
    "layer_norm": OpRoles({"x": _ROWS, "weight": (None,), "bias": (None,), "residual": _ROWS}, (_ROWS, _ROWS)),
    "rotary": OpRoles(
        {"x": (_QUERIES, ("batch", "sequence", "kv_heads", None)), "positions": _ending("batch", "sequence")},
        (_QUERIES, ("batch", "sequence", "kv_heads", None)),
    ),
    "glu_matmul": OpRoles({"x": _INPUT, "w_gate": ("features", "columns"), "w_up": ("features", "columns")}, (_GATED,)),
    "grouped_matmul": OpRoles(
        {"lhs": (None, None), "rhs": (None, None, "columns"), "group_sizes": (None,)}, ((None, "columns"),)
    ),
    "grouped_glu_matmul": OpRoles(
        {
            "x": (None, None),
            "w_gate": (None, None, "columns"),
            "w_up": (None, None, "columns"),
            "group_sizes": (None,),
        },
        ((None, "columns"),),
    ),
    "linear_cross_entropy": OpRoles(
        {
            "hidden": _INPUT,
            "weight": ("vocab", "features"),
            "targets": {0: (), 1: ("batch",), 2: ("batch", "sequence")},
        },
        ({1: (), 2: ("batch",), 3: ("batch", "sequence")},),
    ),
}
"""What is not here is left to the compiler: `matmul` by the framework's own product, and what is not an op."""


@dataclass(frozen=True)
class Sharding:
    """What `sharded` said.

    Attributes:
        mesh: of the framework.
        sizes: {axis: devices} of the mesh.
        axes: {role: the mesh axes that split it, the outermost first}.
        context_form: how attention sees the keys of other pieces of a sequence.
        balanced: whether tokens lie in the order that `balanced_order` says.
    """

    mesh: Any
    sizes: Mapping[str, int]
    axes: Mapping[str, tuple[str, ...]]
    context_form: str = "gather"
    balanced: bool = False

    def dividing(self, role: str, *counts: int) -> tuple[str, ...]:
        """Of a role's axes as many as divide all these sizes."""
        chosen: tuple[str, ...] = ()
        for axis in self.axes.get(role, ()):
            together = self.devices((*chosen, axis))
            if all(count % together == 0 for count in counts):
                chosen = (*chosen, axis)
        return chosen

    def devices(self, axes: tuple[str, ...]) -> int:
        """How many there are along these axes."""
        return prod(self.sizes[axis] for axis in axes)


@contextmanager
def sharded(
    mesh: Any,
    *,
    batch: str | tuple[str, ...] = ("data", "fsdp", "expert"),
    sequence: str | tuple[str, ...] = "context",
    heads: str | tuple[str, ...] = "tensor",
    columns: str | tuple[str, ...] = "tensor",
    vocab: str | tuple[str, ...] = "tensor",
    experts: str | tuple[str, ...] = "expert",
    features: str | tuple[str, ...] = ("fsdp", "context"),
    stages: str | tuple[str, ...] = (),
    context_form: str = "gather",
    balanced: bool = False,
) -> Iterator[None]:
    """Run the ops on JAX arrays inside on all devices of a mesh, each kernel on its device's part of them.

    Like `use` and `target` it is read when an op is called, which under `jax.jit` is when the function is traced. XLA
    places and moves all that lies between the ops. `matmul` is XLA's own product inside, which it partitions and
    overlaps with its collectives.

    Args:
        mesh: a `jax.sharding.Mesh`, of devices that are here or of a topology, or a `jax.sharding.AbstractMesh`; or a
            `DeviceMesh` of torch, whose DTensors say themselves what its axes split, so that of what follows
            context_form and balanced alone count.
        batch: the axes that split rows of the batch. Of this and the others the mesh may have all, some or none; an
            axis that does not divide a dimension leaves it whole in that call.
        sequence: that split sequences, in attention by context_form.
        heads: that split attention's heads; keys' heads are repeated where these axes divide those of queries alone.
        columns: that split what `glu_matmul` makes.
        vocab: that split the vocabulary of `linear_cross_entropy`.
        experts: that split the experts of `moe`.
        features: along which weights lie in shards. Each device gathers these for its call, and the gradient of such a
            weight is summed into shards again, which is half of what a sum that all have would send.
        stages: along which whole calls lie apart, each under a `jax.vmap` with this as its `spmd_axis_name`; they split
            no dimension of an op.
        context_form: "gather" brings all keys to each device; "ring" passes them on and merges by logsumexp
            (arXiv:2310.01889); "ulysses" exchanges pieces of the sequence for heads (arXiv:2309.14509). A call that a
            form cannot run (bias, mask, mods, lengths or cross attention in a ring; heads that the axes do not divide)
            gathers.
        balanced: tokens lie in `balanced_order`, so that causality gives each device as many scores. For "gather" and
            "ring".

    Raises:
        ValueError: an unknown form, or an axis of the mesh that splits nothing; the message names it.
    """
    if context_form not in CONTEXT_FORMS:
        raise ValueError(f"context_form: got {context_form!r}; it must be one of {', '.join(CONTEXT_FORMS)}")
    if balanced and context_form == "ulysses":
        raise ValueError(
            "balanced: got True with context_form='ulysses', where each device has whole sequences already"
        )
    sizes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True) if hasattr(mesh, "mesh_dim_names") else mesh.shape)
    named = {"batch": batch, "sequence": sequence, "heads": heads, "columns": columns, "vocab": vocab}
    named |= {"experts": experts, "features": features, "stages": stages}
    axes = {role: _present(value, sizes) for role, value in named.items()}
    axes |= {"keys": axes["sequence"], "kv_heads": axes["heads"], "rows": (*axes["sequence"], *axes["heads"])}
    idle = [axis for axis, size in sizes.items() if size > 1 and not any(axis in found for found in axes.values())]
    if idle:
        raise ValueError(f"mesh: its axis {idle[0]!r} splits nothing; name it as one of batch, sequence, heads, ...")
    with dispatch.spread_over(Sharding(mesh, sizes, axes, context_form, balanced)):
        yield


def _present(axes: str | tuple[str, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis in sizes)


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """That public function of these arguments, on all devices: of JAX arrays in a `sharded` block."""
    sharding = dispatch.spreading()
    first = next(iter(arguments.values()))
    with dispatch.spread_over(None):
        framework = dispatch.framework_of(("x",), (first[0] if isinstance(first, tuple | list) else first,))
        if framework == "torch":
            from crosstile import dtensor

            return dtensor.call(sharding, function, arguments)
        if framework != "jax":
            return function(**arguments)
        from crosstile import sharding_jax

        return sharding_jax.call(sharding, function, arguments)


def balanced_order(length: int, pieces: int) -> list[int]:
    """Where the tokens of a balanced sequence come from: device r of `pieces` has pieces r and `2 * pieces - 1 - r`.

    Under causality early queries see few keys and late ones many; so each device has some of both.

    >>> balanced_order(8, 2)
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    if length % (2 * pieces):
        raise ValueError(f"length: got {length}; a balanced order needs a multiple of 2 * {pieces}")
    size = length // (2 * pieces)
    order = [piece for rank in range(pieces) for piece in (rank, 2 * pieces - 1 - rank)]
    return [piece * size + at for piece in order for at in range(size)]
