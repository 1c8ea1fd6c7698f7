"""From a call's softcap, bias, mask, segment ids and mods to what every kernel takes: two expressions and planes.

The order is: scale, softcap, score_mod, bias, then the masks. A plane is an array beside the scores, `[batch, q_heads,
q_len, kv_len]` with 1 where it does not vary: the bias, the mask, and each look-up that a mod makes, evaluated here for
the indices that it depends on. ALiBi's slopes become `[1, q_heads, 1, 1]`, document ids a column and a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crosstile import dispatch, mods
from crosstile.kernels.attention.spec import MAX_PLANES
from crosstile.kernels.tiles.expressions import (
    INDICES,
    LOGICAL,
    SCORE,
    Expression,
    const,
    evaluate,
    leaves,
    plane,
    replace,
)
from crosstile.kernels.tiles.visibility import Runs
from crosstile.kernels.tiles.visibility import visible_tiles as tiles_of

_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass
class Scores:
    """The expressions and planes of one call, as they are put together.

    Attributes:
        framework: "numpy", "torch" or "jax".
        like: an array of the call, on the device where planes go.
        shape: of the scores, (batch, q_heads, q_len, kv_len).
        gradients: the slots of the planes that may be differentiated.
    """

    framework: str
    like: Any
    shape: tuple[Any, ...]
    score: Expression = SCORE
    mask: Expression | None = None
    weight: Expression | None = None
    planes: list[Any] = field(default_factory=list)
    gradients: tuple[int, ...] = ()
    _found: dict[Expression, Expression] = field(default_factory=dict)  # the plane of each look-up

    def __post_init__(self) -> None:
        self.glue = dispatch.glue(self.framework)

    def scale(self, queries: Any, keys: Any) -> None:
        """The scales of quantised queries and keys, float32 that broadcast to the scores; None for 1."""
        for scales in (queries, keys):
            if scales is not None:
                self.score = ("mul", self.score, self._plane("q_scale, k_scale", scales))

    def weigh(self, values: Any) -> None:
        """The scales of quantised values, float32 that broadcast to the scores, from 0 to 1."""
        self.weight = self._plane("v_scale", values)

    def cap(self, softcap: float) -> None:
        """`softcap * tanh(score / softcap)`."""
        self.score = ("mul", ("tanh", ("mul", self.score, const(1.0 / softcap))), const(softcap))

    def modify(self, mod: mods.Mod) -> None:
        """The user's change of the score."""
        self.score = replace(self._lowered(mods.trace(mod, "score_mod"), "score_mod"), {SCORE: self.score})

    def add(self, bias: Any) -> None:
        """A bias that broadcasts to the scores."""
        self._check_kind("bias", bias, "a float", lambda dtype: dtype in _FLOATS)
        self.score = ("add", self.score, self._plane("bias", self._spread("bias", bias), source=bias))

    def see(self, mask: Any) -> None:
        """A boolean mask that broadcasts to the scores; one of NumPy's is known to the host."""
        mask = self._in_host(mask)
        self._check_kind("mask", mask, "bool", lambda dtype: dtype == "bool")
        self._both(self._plane("mask", self._spread("mask", mask)))

    def see_where(self, mod: mods.Mod) -> None:
        """The user's mask."""
        expression = self._lowered(mods.trace(mod, "mask_mod"), "mask_mod")
        if expression[0] not in (*LOGICAL, "plane", "where") and not isinstance(expression[-1], bool):
            raise TypeError("mask_mod: it returned a number; it must return a truth value, such as a comparison")
        self._both(expression)

    def see_segments(self, queries: Any, keys: Any) -> None:
        """A query sees the keys whose segment id is its own: int [batch, q_len] and [batch, kv_len]."""
        batch, _, q_len, kv_len = self.shape
        queries, keys = self._in_host(queries), self._in_host(keys)
        for name, ids, length in (("segment_ids", queries, q_len), ("segment_ids", keys, kv_len)):
            self._check_kind(name, ids, "an integer", lambda dtype: dtype.startswith(("int", "uint")))
            if tuple(ids.shape) != (batch, length):
                raise ValueError(
                    f"{name}: got {list(ids.shape)}; it must be [batch, length] = [{batch}, {length}], or a pair of "
                    "such arrays, (of the queries, of the keys)"
                )
        column = self._side(queries)[0].as_int32(queries)[:, None, :, None]
        row = self._side(keys)[0].as_int32(keys)[:, None, None, :]
        self._both(("eq", self._plane("segment_ids", column), self._plane("segment_ids", row)))

    def _both(self, seen: Expression) -> None:
        self.mask = seen if self.mask is None else ("and", self.mask, seen)

    def _plane(self, argument: str, array: Any, source: Any = None) -> Expression:
        """A new plane; source is the array that it was made of, if that may be differentiated."""
        if len(self.planes) == MAX_PLANES:
            raise ValueError(
                f"{argument}: one array too many beside the scores; bias, mask, segment_ids (two) and the look-ups of "
                f"the mods may be {MAX_PLANES} together: join some of them"
            )
        slot = len(self.planes)
        self.planes.append(array)
        if source is not None and self.glue.wants_gradient(source):
            self.gradients = (*self.gradients, slot)
        return plane(slot)

    def _check_kind(self, argument: str, array: Any, wanted: str, fits: Callable[[str], bool]) -> None:
        if not (argument in ("mask", "segment_ids") and isinstance(array, np.ndarray)):
            dispatch.framework_of(("q", argument), (self.like, array))
        dtype = getattr(array.dtype, "name", None) or str(array.dtype).removeprefix("torch.")
        if not fits(dtype):
            raise TypeError(f"{argument}: dtype is {dtype}; it must be {wanted}: convert it first")

    def _spread(self, argument: str, array: Any) -> Any:
        """With four dimensions, each 1 or the scores' own."""
        sizes = (1,) * (4 - len(array.shape)) + tuple(array.shape)
        if len(sizes) > 4 or any(size not in (1, whole) for size, whole in zip(sizes, self.shape, strict=True)):
            raise ValueError(
                f"{argument}: got {list(array.shape)}; it must broadcast to [batch, q_heads, q_len, kv_len] = "
                f"{list(self.shape)}"
            )
        side, like = self._side(array)
        return side.as_plane(array.reshape(sizes), like)

    def _in_host(self, array: Any) -> Any:
        return self.glue.in_host(array) if isinstance(array, np.ndarray) else array

    def _side(self, *arrays: Any) -> tuple[Any, Any]:
        """What makes planes of the arrays, and an array like them: on the host where all are NumPy's."""
        if all(isinstance(array, np.ndarray) for array in arrays) and not (
            self.framework == "jax" and any(not isinstance(size, int) for size in self.shape)
        ):
            host: tuple[Any, Any] = self.glue.host(self.like)
            return host
        return self.glue, self.like

    def _lowered(self, expression: Expression, argument: str) -> Expression:
        """The expression with its look-ups evaluated into planes."""
        found = self._found
        arrays = {slot: self.planes[slot[1]] for slot in found.values()}
        for load in mods.loads(expression):
            if load in found:
                continue
            captured, indices = load[1], [_replaced(index, found) for index in load[2:]]
            if any(SCORE in leaves(index) for index in indices):
                raise ValueError(f"{argument}: an array is indexed by the score; it can be by b, h, i and j")
            slot = self._plane(argument, self._look_up(captured.held, indices, arrays), source=captured.held)
            arrays[slot] = self.planes[-1]
            found[load] = slot
        return _replaced(expression, found)

    def _look_up(self, held: Any, indices: list[Expression], arrays: dict[Expression, Any]) -> Any:
        values = dict(arrays)
        side, like = self._side(held, *(arrays[leaf] for index in indices for leaf in leaves(index) if leaf in arrays))
        for axis, name in enumerate(INDICES):
            values[(name,)] = side.index_grid(self.shape[axis], axis, like)
        functions = side.functions()
        return side.look_up(held, [evaluate(index, values, functions) for index in indices], like)


def visible_tiles(
    mask_mod: mods.Mod | None,
    q_len: int,
    kv_len: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    batch: int = 1,
    q_heads: int = 1,
    block_q: int = 128,
    block_kv: int = 128,
) -> Runs:
    """Which tiles of keys each tile of queries sees under a mask: none of it, all of it, or a part.

    By interval arithmetic over the mask's expression, so that a mask of a million tokens takes a fraction of a second
    and a few megabytes; arrays that the mask reads must be NumPy's. A tile that cannot be decided counts as seen in
    part.

    Returns:
        `Runs`: print it for the share of tiles that are hidden and full, or read its compact arrays.

    >>> visible_tiles(mods.sliding_window(1024), 4096, 4096).visited
    252
    """
    shape = (batch, q_heads, q_len, kv_len)
    scores = Scores("numpy", np.zeros((), np.float32), shape)
    if mask_mod is not None:
        scores.see_where(mask_mod)
    left, right = window or (None, None)
    return tiles_of(
        scores.mask,
        q_len,
        kv_len,
        block_q,
        block_kv,
        left=left,
        right=0 if causal else right,
        planes=scores.planes,
        batch=batch,
        heads=q_heads,
    )


def _replaced(expression: Expression, known: dict[Expression, Expression]) -> Expression:
    """`replace` for an expression whose look-ups hold arrays."""
    if expression in known:
        return known[expression]
    if expression[0] == "load":
        return ("load", expression[1], *(_replaced(part, known) for part in expression[2:]))
    if expression[0] in ("const", "plane") or len(expression) == 1:
        return expression
    return (expression[0], *(_replaced(part, known) for part in expression[1:]))
