"""What a layer keeps for its backward, and what it computes again: memory for time (arXiv:1604.06174).

none       keeps all that the backward reads
products   keeps what products and attention give; norms, rotary positions and activations are computed again
full       keeps a layer's input alone, and runs the layer once more
offload    the same, and keeps that input in the memory of the host; JAX alone
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .arrays import Array
from .stacking import Run

POLICIES = ("none", "products", "full", "offload")
_INPUT = "layer_input"
_SAVED_BY_JAX = ("dot_general", "ragged_dot_general")
_SAVED_NAMES = tuple(f"crosstile.{op}" for op in ("attention", "matmul", "glu_matmul", "grouped_matmul"))
_SAVED_BY_TORCH = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "crosstile::")


def remat(policy: str, framework: str, run: Run) -> Run:
    """`run`, which computes in its backward what the policy says. Raises ValueError for a policy that is not known."""
    if policy not in POLICIES:
        raise ValueError(f"remat: got {policy!r}; it must be one of {', '.join(POLICIES)}")
    if policy == "none":
        return run
    if policy == "offload" and framework != "jax":
        raise ValueError("remat: got 'offload', which JAX has alone; in torch it must be none, products or full")
    return _in_jax(policy, run) if framework == "jax" else _in_torch(policy, run)


def _in_jax(policy: str, run: Run) -> Run:
    import jax
    from jax.ad_checkpoint import checkpoint_name

    def saveable(primitive: Any, *_: Any, **params: Any) -> bool:
        kept = primitive.name in _SAVED_BY_JAX or (primitive.name == "name" and params["name"] in _SAVED_NAMES)
        return policy == "products" and kept

    kept: Any = saveable
    if policy == "offload":
        kept = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )

    def again(
        weights: Any, x: Array, layer: Any, config: Any, positions: Array, segments: Any, long: bool
    ) -> tuple[Array, Array | None]:
        def of_arrays(weights: Any, x: Array, positions: Array, segments: Any) -> tuple[Array, Array | None]:
            return run(weights, checkpoint_name(x, _INPUT), layer, config, positions, segments, long)

        return jax.checkpoint(of_arrays, policy=kept)(weights, x, positions, segments)  # type: ignore[no-any-return]

    return again


def _in_torch(policy: str, run: Run) -> Run:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def choose(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        kept = str(operator.name()).startswith(_SAVED_BY_TORCH)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "products":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, choose)
    return partial(checkpoint, run, **options)
