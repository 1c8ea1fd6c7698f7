"""The gradients of hidden and weight on a GPU: tiles of logits are computed again, and become tiles of their gradient.

The gradient of the logits is kept for a part of the tokens by a part of the vocabulary, under a hundredth of the whole.
dweight is made a part of the vocabulary at a time, of all tokens at once; dhidden a part of the tokens at a time,
summed in float32 over the parts of the vocabulary. So each sum has one owner and one order. Where the tokens are one
part, both are made of the same gradient of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..tiles.launch import Array, Launch, Plan, contiguous
from ..tiles.triton_products import halves, indices, shrink, strides, warps, wide
from ..tiles.triton_tiles import LOG2_E, advance
from .spec import LinearCrossEntropySpec
from .tiles import LinearCrossEntropyConfig, LinearCrossEntropyTiles
from .triton_common import AT_ONCE, NO_TOKEN, cap, logits_arguments, per_token, products

STATISTICS = ("lse", "dlse", "dtarget_logit", "dlogit_sum")


@dataclass(frozen=True)
class _Part:
    """Some tokens by some rows of weight."""

    first_token: int
    tokens: int
    first_row: int
    rows: int

    def dlogits(self, batch: int, dtype: str) -> Array:
        """The gradient of their logits, [batch, tokens, rows], in the scratch array."""
        return contiguous((batch, self.tokens, self.rows), dtype)


@dataclass(frozen=True)
class _Rows:
    """The rows from `first` on of a contiguous array [batch, count, features]."""

    name: str
    first: int
    count: int


def backward(
    spec: LinearCrossEntropySpec,
    config: LinearCrossEntropyConfig,
    inputs: tuple[Array, Array, Array],
    outputs: tuple[Array, Array | None, Array | None],
    gradients: tuple[Array, Array | None, Array | None],
) -> Plan:
    """Launches that write dhidden and dweight."""
    hidden, weight, targets = inputs
    (batch, tokens, features), vocab = hidden.shape, weight.shape[1]
    rows = dict(zip(STATISTICS, (outputs[0], *gradients), strict=True))
    arrays = {"hidden": hidden, "weight": weight, "targets": targets}
    arrays |= {name: row for name, row in rows.items() if row is not None}
    part_tokens = min(config.part_tokens, tokens)
    part_vocab = min(config.part_vocab, vocab)
    shared = part_tokens == tokens
    width = part_vocab if shared else part_vocab * (tokens // part_tokens)  # of a part of dhidden: as large in memory

    # float32 sums are the result itself
    sums = "dhidden" if spec.dtype == "float32" or width >= vocab else "sums"
    scratch = {"dlogits": contiguous((batch, tokens * part_vocab), spec.dtype)}
    if sums == "sums":
        scratch["sums"] = contiguous((batch, part_tokens, features), "float32")

    launches = []
    for first_row in range(0, vocab, part_vocab):
        part = _Part(0, tokens, first_row, part_vocab)
        launches += [_dlogits_launch(spec, config.forward, arrays, part), _dweight_launch(config.dweight, arrays, part)]
        if shared:
            launches.append(_dhidden_launch(config.dhidden, arrays, part, sums))
    for first_token in () if shared else range(0, tokens, part_tokens):
        for first_row in range(0, vocab, width):
            part = _Part(first_token, part_tokens, first_row, width)
            launches.append(_dlogits_launch(spec, config.forward, arrays, part))
            launches.append(_dhidden_launch(config.dhidden, arrays, part, sums))
    results = {"dhidden": contiguous(hidden.shape, spec.dtype), "dweight": contiguous(weight.shape, spec.dtype)}
    return Plan(tuple(launches), arrays, results, scratch)


@triton.jit(do_not_specialize=["tokens", "first_token", "first_row", "part_tokens", "part_rows"])
def _dlogits(
    hidden, weight, targets, lse, dlse, dtarget_logit, dlogit_sum, dlogits,
    tokens, vocab, features, softcap, first_token, first_row, part_tokens, part_rows,
    hidden_batch, hidden_row, hidden_col, weight_batch, weight_row, weight_col, targets_batch, targets_row,
    lse_batch, lse_row, dlse_batch, dlse_row, dtarget_logit_batch, dtarget_logit_row, dlogit_sum_batch, dlogit_sum_row,
    CAPPED: tl.constexpr, TARGETS: tl.constexpr, SUMS: tl.constexpr,
    EVEN_V: tl.constexpr, EVEN_F: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of the raw products; 0 for a token that does not count and past the vocabulary.

    dlogits is contiguous [batch, part_tokens, part_rows], and written whole.
    """
    tiles_v = tl.cdiv(part_rows, BLOCK_V)
    tiles_t = tl.cdiv(part_tokens, BLOCK_T)
    part_col = tl.program_id(0) % tiles_v * BLOCK_V
    part_row = tl.program_id(0) // tiles_v % tiles_t * BLOCK_T
    batch = tl.program_id(0) // (tiles_v * tiles_t)
    row = first_token + part_row
    col = first_row + part_col

    target = per_token(targets, batch, row, tokens, targets_batch, targets_row, NO_TOKEN, BLOCK_T)
    counted = target != NO_TOKEN
    cols = indices(BLOCK_V, WIDE)
    exist = cols < vocab - col
    raw = products(
        advance(advance(hidden, batch, hidden_batch), row, hidden_row),
        advance(advance(weight, batch, weight_batch), col, weight_row),
        counted, exist, features,
        hidden_row, hidden_col, weight_row, weight_col, False, EVEN_F, WIDE, BLOCK_T, BLOCK_V, BLOCK_F,
    )  # fmt: skip
    # A token that does not count has the gradients 0, whatever it was given.
    row_lse = per_token(lse, batch, row, tokens, lse_batch, lse_row, 0.0, BLOCK_T)
    scale = tl.where(counted, per_token(dlse, batch, row, tokens, dlse_batch, dlse_row, 0.0, BLOCK_T), 0.0)
    one = scale
    every = scale
    if TARGETS:
        one = per_token(dtarget_logit, batch, row, tokens, dtarget_logit_batch, dtarget_logit_row, 0.0, BLOCK_T)
    if SUMS:
        every = per_token(dlogit_sum, batch, row, tokens, dlogit_sum_batch, dlogit_sum_row, 0.0, BLOCK_T)
        every = tl.where(counted, every, 0.0)
    dlogits += (tl.cast(batch, tl.int64) * part_tokens + part_row) * part_rows + part_col
    _store_gradient(
        raw, dlogits, row_lse, scale, one, every, target - col, part_tokens - part_row, part_rows,
        part_rows - part_col, vocab - col, softcap, CAPPED, TARGETS, SUMS, WIDE,
    )  # fmt: skip


@triton.jit
def _store_gradient(
    raw, dlogits, lse, scale, one, every, target, rows_left, stride, cols_left, vocab, softcap,
    CAPPED: tl.constexpr, TARGETS: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile of raw products at `dlogits`; what counts columns does so from the tile's first."""
    if raw.shape[1] > AT_ONCE:
        left, right = halves(raw)
        width: tl.constexpr = left.shape[1]
        _store_gradient(
            left, dlogits, lse, scale, one, every, target, rows_left, stride, cols_left, vocab, softcap,
            CAPPED, TARGETS, SUMS, WIDE,
        )  # fmt: skip
        _store_gradient(
            right, dlogits + width, lse, scale, one, every, target - width, rows_left, stride, cols_left - width,
            vocab - width, softcap, CAPPED, TARGETS, SUMS, WIDE,
        )  # fmt: skip
    else:
        rows = indices(raw.shape[0], WIDE)
        cols = indices(raw.shape[1], WIDE)
        logits, bent = cap(raw, softcap, CAPPED)
        gradient = tl.exp2((logits - lse[:, None]) * LOG2_E) * scale[:, None]
        if TARGETS:
            gradient += tl.where(target[:, None] == cols[None, :], one[:, None], 0.0)
        if SUMS:
            gradient += every[:, None]
        if CAPPED:
            gradient *= 1.0 - bent * bent
        gradient = tl.where((cols < vocab)[None, :], gradient, 0.0)
        mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
        tl.store(dlogits + rows[:, None] * stride + cols[None, :], gradient.to(dlogits.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "k", "b_first", "b_count", "out_first", "previous_first"])
def _product(
    a, b, targets, previous, kept, out,
    m, n, k, b_first, b_count, out_first, previous_first,
    a_batch, a_row, a_col, b_batch, b_row, b_col, targets_batch, targets_row, previous_batch, out_batch,
    TARGETS: tl.constexpr, ACCUMULATES: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED_M: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of `a @ b`, added to `previous` if there is one: m rows of `out`, a [m, k], b [k, n] from row b_first.

    b has b_count rows, and what would lie past them counts as 0, as does the row of a token that does not count. `kept`
    is `out` where only a part of it is written: a launch is given what it leaves as it was.
    """
    if ALIGNED_M:
        m = m // 16 * 16  # m is not specialised on: what the plan knows of it keeps loads along m whole
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_m = tl.cdiv(m, BLOCK_M)
    col = tl.program_id(0) % tiles_n * BLOCK_N
    row = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    batch = tl.program_id(0) // (tiles_n * tiles_m)
    rows = indices(BLOCK_M, WIDE)
    cols = indices(BLOCK_N, WIDE)
    inner = indices(BLOCK_K, WIDE)
    rows_exist = rows < m - row
    cols_exist = cols < n - col
    a = advance(advance(a, batch, a_batch), row, a_row)
    b = advance(advance(advance(b, batch, b_batch), b_first, b_row), col, b_col)
    a_offsets = rows[:, None] * a_row + inner[None, :] * a_col  # [BLOCK_M, BLOCK_K]
    b_offsets = inner[:, None] * b_row + cols[None, :] * b_col  # [BLOCK_K, BLOCK_N]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        a_exists = rows_exist[:, None]
        if not EVEN_K:
            a_exists = a_exists & (inner < k - start)[None, :]
        a_tile = tl.load(a + a_offsets, mask=a_exists, other=0.0)
        b_exists = inner < tl.minimum(k, b_count - b_first) - start
        if TARGETS:
            target = per_token(targets, batch, b_first + start, b_count, targets_batch, targets_row, NO_TOKEN, BLOCK_K)
            b_exists = b_exists & (target != NO_TOKEN)
        b_tile = tl.load(b + b_offsets, mask=b_exists[:, None] & cols_exist[None, :], other=0.0)
        sums = tl.dot(a_tile, b_tile, sums, input_precision="ieee")
        a = advance(a, BLOCK_K, a_col)
        b = advance(b, BLOCK_K, b_row)

    if ACCUMULATES:
        previous = advance(previous, batch, previous_batch) + (tl.cast(previous_first + row, tl.int64) * n + col)
    out = advance(out, batch, out_batch) + (tl.cast(out_first + row, tl.int64) * n + col)
    _store_sums(sums, previous, out, m - row, n, n - col, ACCUMULATES, WIDE)


@triton.jit
def _store_sums(sums, previous, out, rows_left, stride, cols_left, ACCUMULATES: tl.constexpr, WIDE: tl.constexpr):
    """Write a tile of sums, with what was there before."""
    if sums.shape[1] > AT_ONCE:
        left, right = halves(sums)
        width: tl.constexpr = left.shape[1]
        _store_sums(left, previous, out, rows_left, stride, cols_left, ACCUMULATES, WIDE)
        if ACCUMULATES:
            previous += width
        _store_sums(right, previous, out + width, rows_left, stride, cols_left - width, ACCUMULATES, WIDE)
    else:
        rows = indices(sums.shape[0], WIDE)
        cols = indices(sums.shape[1], WIDE)
        mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
        offsets = rows[:, None] * stride + cols[None, :]
        if ACCUMULATES:
            sums += tl.load(previous + offsets, mask=mask, other=0.0)
        tl.store(out + offsets, sums.to(out.dtype.element_ty), mask=mask)


def _dlogits_launch(
    spec: LinearCrossEntropySpec, tiles: LinearCrossEntropyTiles, arrays: dict[str, Array], part: _Part
) -> Launch:
    """The launch that writes the gradient of a part of the logits."""
    arguments = logits_arguments(spec, tiles, arrays)
    constants = arguments["constants"]
    block_t, block_v = constants["BLOCK_T"], constants["BLOCK_V"]
    batch = arrays["hidden"].shape[0]
    dlogits = part.dlogits(batch, spec.dtype)
    numbers = {
        "first_token": part.first_token,
        "first_row": part.first_row,
        "part_tokens": part.tokens,
        "part_rows": part.rows,
        **dict(item for name in STATISTICS for item in strides(name, arrays.get(name), "batch", "row").items()),
    }
    flags = {
        "TARGETS": "dtarget_logit" in arrays,
        "SUMS": "dlogit_sum" in arrays,
        "WIDE": constants["WIDE"] or wide((dlogits, block_t, block_v)),
    }
    statistics = (name if name in arrays else "" for name in STATISTICS)
    return Launch(
        _dlogits,
        (batch * triton.cdiv(part.tokens, block_t) * triton.cdiv(part.rows, block_v),),
        inputs=("hidden", "weight", "targets", *statistics),
        outputs=("dlogits",),
        shares={
            "hidden": _share(part.tokens, arrays["hidden"].shape[1]),
            "weight": _share(part.rows, arrays["weight"].shape[1]),
        },
        **arguments | {"numbers": {**arguments["numbers"], **numbers}, "constants": {**constants, **flags}},
    )


def _dweight_launch(tiles: LinearCrossEntropyTiles, arrays: dict[str, Array], part: _Part) -> Launch:
    """The launch that writes dweight of a part of the vocabulary, from all tokens: `dlogits^T @ hidden`."""
    hidden, weight = arrays["hidden"], arrays["weight"]
    dlogits = part.dlogits(hidden.shape[0], hidden.dtype)
    (batch, tokens, rows), (step, row, col) = dlogits.shape, dlogits.strides
    transposed = Array((batch, min(rows, weight.shape[1] - part.first_row), tokens), dlogits.dtype, (step, col, row))
    blocks = (tiles.block_vocab, tiles.block_features, tiles.block_tokens)
    out = _Rows("dweight", part.first_row, weight.shape[1])
    return _product_launch(tiles, blocks, transposed, ("hidden", hidden, 0), out, targets=arrays["targets"])


def _dhidden_launch(tiles: LinearCrossEntropyTiles, arrays: dict[str, Array], part: _Part, sums: str) -> Launch:
    """The launch that adds a part of the vocabulary's `dlogits @ weight` to dhidden of a part of the tokens.

    The sums of one part of the tokens lie in the array of that name, and the last part of the vocabulary ends them.
    """
    hidden, weight = arrays["hidden"], arrays["weight"]
    dlogits = part.dlogits(hidden.shape[0], hidden.dtype)
    rows = min(part.tokens, hidden.shape[1] - part.first_token)
    blocks = (tiles.block_tokens, tiles.block_features, tiles.block_vocab)
    result = _Rows("dhidden", part.first_token, hidden.shape[1])
    between = result if sums == "dhidden" else _Rows(sums, 0, part.tokens)
    return _product_launch(
        tiles,
        blocks,
        Array((hidden.shape[0], rows, part.rows), dlogits.dtype, dlogits.strides),
        ("weight", weight, part.first_row),
        result if part.first_row + part.rows >= weight.shape[1] else between,
        previous=between if part.first_row else None,
    )


def _product_launch(
    tiles: LinearCrossEntropyTiles,
    blocks: tuple[int, int, int],
    a: Array,
    b: tuple[str, Array, int],
    out: _Rows,
    *,
    targets: Array | None = None,
    previous: _Rows | None = None,
) -> Launch:
    """The launch of one product of dlogits, read by the strides of a, and b, a named array from one of its rows on."""
    b_name, b_array, b_first = b
    (batch, m, k), (_, b_count, n) = a.shape, b_array.shape
    names = ("block_tokens or block_vocab", "block_features", "block_vocab or block_tokens")
    block_m, block_n, block_k = map(shrink, names, blocks, (m, n, k))
    return Launch(
        _product,
        (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        inputs=(
            "dlogits",
            b_name,
            "targets" if targets else "",
            previous.name if previous else "",
            out.name if m < out.count else "",
        ),
        outputs=(out.name,),
        numbers={
            "m": m,
            "n": n,
            "k": k,
            "b_first": b_first,
            "b_count": b_count,
            "out_first": out.first,
            "previous_first": previous.first if previous else 0,
            **strides("a", a),
            **strides("b", b_array),
            **strides("targets", targets, "batch", "row"),
            "previous_batch": previous.count * n if previous else 0,
            "out_batch": out.count * n,
        },
        constants={
            "TARGETS": targets is not None,
            "ACCUMULATES": previous is not None,
            "EVEN_K": k % block_k == 0,
            "ALIGNED_M": a.strides[1] == 1 and m % 16 == 0,
            "WIDE": wide((a, block_m, block_k), (b_array, block_k, block_n)),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        shares={b_name: _share(min(k, b_count - b_first), b_count), out.name: _share(m, out.count)},
        num_warps=warps(tiles.num_warps, blocks[0] * blocks[1] // (block_m * block_n)),
        num_stages=tiles.num_stages,
        dot_dtype=a.dtype,
    )


def _share(part: int, whole: int) -> float:
    """Which part of an array that is; a last part may be cut short."""
    return min(1.0, part / whole) if whole else 1.0
