"""What a pod runs: the sharded train step, prefill and decoding of a model, with the shapes and places of their arrays.

No array exists here. A program is traced for the devices of a topology, and its arguments say where each would lie.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import crosstile
from crosstile.models import transformer
from crosstile.models.distributed_jax import shardings, state_shardings, train_step
from crosstile.models.shapes import shapes
from crosstile.models.sharding import RULES
from crosstile.models.stacking import period

from .plan_asked import Asked

COMPUTE = "bfloat16"


def program(asked: Asked, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """A jitted step on that mesh, and its arguments as shapes with places."""
    return {"train": _train, "prefill": _prefill, "decode": _decode}[asked.step](asked, mesh)


def _train(asked: Asked, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """AdamW with float32 weights and moments, computing in bfloat16; layers that are alike are one program."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, 0.9, 0.95, weight_decay=0.1))
    step = train_step(asked.config, asked.parallel, mesh, optimizer, precision=COMPUTE, remat=asked.remat)
    params = _parameters(asked, mesh, "float32", stacked=True)
    state = jax.eval_shape(optimizer.init, params)
    places = state_shardings(state, shardings(asked.config, asked.parallel, mesh), mesh)
    state = jax.tree.map(lambda leaf, place: _struct(leaf.shape, leaf.dtype, place), state, places)
    return step, (params, state, _tokens(asked, mesh, asked.seq + 1))


def _prefill(asked: Asked, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    def step(params: Any, tokens: Any, cache: Any) -> tuple[Any, Any]:
        with _spread(asked, mesh):
            return transformer.extend(params, tokens, asked.config, cache, 0, only=tokens.shape[1] - 1)

    arguments = _parameters(asked, mesh, COMPUTE), _tokens(asked, mesh, asked.seq), _cache(asked, mesh)
    return jax.jit(step, donate_argnums=2), arguments


def _decode(asked: Asked, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    def step(params: Any, tokens: Any, cache: Any, position: Any) -> tuple[Any, Any]:
        with _spread(asked, mesh):
            return transformer.extend(params, tokens, asked.config, cache, position)

    position = _struct((), jnp.int32, _sharding(mesh))
    arguments = _parameters(asked, mesh, COMPUTE), _tokens(asked, mesh, 1), _cache(asked, mesh), position
    return jax.jit(step, donate_argnums=2), arguments


def known_values(asked: Asked, arguments: tuple[Any, ...]) -> list[Any]:
    """The leaves of the arguments of decoding, with its position: the last of the cache. [] where no value is known."""
    if asked.step != "decode":
        return []
    *leaves, _ = jax.tree.leaves(arguments)
    return [*leaves, np.int32(asked.seq - 1)]


def _spread(asked: Asked, mesh: Mesh) -> Any:
    return crosstile.sharded(mesh, context_form=asked.parallel.context_form)


def _parameters(asked: Asked, mesh: Mesh, dtype: str, stacked: bool = False) -> Any:
    tree, repeats = shapes(asked.config), asked.config.num_layers // period(asked.config)
    stacked = stacked and repeats > 1
    if stacked:
        once = tree["layers"][: period(asked.config)]
        layers = [{name: (repeats, *shape) for name, shape in layer.items()} for layer in once]
        tree = {**tree, "layers": layers}
    places = shardings(asked.config, asked.parallel, mesh, stacked)
    is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
    return jax.tree.map(lambda shape, place: _struct(shape, dtype, place), tree, places, **is_shape)


def _tokens(asked: Asked, mesh: Mesh, length: int) -> Any:
    return _struct((asked.batch, length), jnp.int32, _sharding(mesh, RULES["batch"]))


def _cache(asked: Asked, mesh: Mesh) -> Any:
    config = asked.config
    heads = RULES["kv_heads"] if config.num_kv_heads % asked.parallel.tensor == 0 else ()
    place = _sharding(mesh, RULES["batch"], heads, (), ())

    def zeros(dim: int) -> Any:
        return _struct((asked.batch, config.num_kv_heads, asked.seq, dim), COMPUTE, place)

    return [{"k": zeros(config.head_dim), "v": zeros(config.v_dim)} for _ in config.layers]


def _sharding(mesh: Mesh, *splits: tuple[str, ...]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(split or None for split in splits)))


def _struct(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
