"""How one product of matmul becomes launches: its tiles, whether its sums are cut, and how tiles are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

from ..tiles.launch import Array, Launch, contiguous
from ..tiles.triton_epilogue import constants_of, numbers_of, operands_of
from ..tiles.triton_products import has_descriptor, has_runs, shrink, strides, turned, wide
from .tiles import MatmulConfig, of_rows, parts_of_sums, shrunk
from .triton_product import add_parts, matmul

PIECE_M, PIECE_N = 16, 32  # of a tile, whose parts one program adds: small, so that there are many programs
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Product:
    """`activation(a @ b + bias) + residual` of arrays by name, and what its launches are made of.

    Attributes:
        a, b: name and array, of any strides.
        outputs: (out,) or (preactivation, out), by name.
    """

    a: tuple[str, Array]
    b: tuple[str, Array]
    outputs: tuple[str, ...]
    bias: Array | None = None
    residual: Array | None = None
    activation: str | None = None
    precision: str | None = None

    def launches(self, config: MatmulConfig) -> tuple[tuple[Launch, ...], dict[str, Array]]:
        """The launches in order, and the scratch between them."""
        (batch, m, k), n = self.a[1].shape, self.b[1].shape[2]
        if config.matrix_size not in (0, 16, 32):
            raise ValueError(f"config: matrix_size is {config.matrix_size}; it must be 16 or 32, or 0")
        config = self._fitted(config)
        tiles = batch * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        whole, parts = parts_of_sums(config, m, tiles, triton.cdiv(k, config.block_k))
        if whole == tiles:
            return (self._multiply(config, 0, tiles, 1, self.outputs),), {}
        scratch = f"{self.outputs[-1]}_parts"
        cut = contiguous(((tiles - whole) * parts, config.block_m, config.block_n), "float32")
        launches = [
            self._multiply(config, whole, tiles - whole, parts, (scratch,)),
            self._add(config, whole, tiles - whole, parts, scratch),
        ]
        if whole:
            launches.insert(0, self._multiply(config, 0, whole, 1, self.outputs))
        return tuple(launches), {scratch: cut}

    def _fitted(self, config: MatmulConfig) -> MatmulConfig:
        """The tiles for these sizes and strides."""
        (_, m, k), n = self.a[1].shape, self.b[1].shape[2]
        config = of_rows(config, m)
        block_m, block_n = shrink("block_m", config.block_m, m), shrink("block_n", config.block_n, n)
        block_k = shrink("block_k", config.block_k, k)
        config = replace(shrunk(config, m, block_m, block_n, triton.cdiv(k, block_k)), block_k=block_k)
        if all(map(has_runs, (self.a[1], self.b[1], contiguous((1, m, n), "")))):
            return config
        # Each element has an address of its own: those of a large step do not fit the registers, nor does a large tile
        # fit the shared memory on its way to the store; more warps have more registers.
        block_m, block_n = min(block_m, 128), min(block_n, 64 if self.a[1].dtype == "float32" else 128)
        num_warps = max(config.num_warps, 8 if block_m * block_n == 128 * 128 else 0)
        return replace(config, block_m=block_m, block_n=block_n, block_k=16, num_warps=num_warps)

    def _multiply(self, config: MatmulConfig, first: int, tiles: int, parts: int, outputs: tuple[str, ...]) -> Launch:
        """The launch of `tiles` tiles from the first on: whole, or each as so many parts of its sum."""
        (a_name, a), (b_name, b) = self.a, self.b
        (_, m, k), n = a.shape, b.shape[2]
        whole = parts == 1
        bias, residual, activation = (self.bias, self.residual, self.activation) if whole else (None, None, None)
        items = tiles * parts
        persistent = bool(config.persistent) and 0 < config.processors < items
        size = ITEM_BYTES[a.dtype]
        by_descriptors = bool(config.descriptors) and has_descriptor(a, size) and has_descriptor(b, size)
        specialize = bool(config.specialize) and by_descriptors
        result = contiguous((1, m, n), "")  # of two bytes a number, or four
        described = by_descriptors and whole and has_descriptor(result, 2)
        return Launch(
            matmul,
            (config.processors if persistent else items,),
            inputs=(a_name, b_name, *operands_of(bias, residual, outputs)),
            outputs=outputs,
            numbers={
                "m": m,
                "n": n,
                "k": k,
                "first": first,
                "tiles": tiles,
                "parts": parts,
                **strides("a", a),
                **strides("b", b),
                **numbers_of(bias, residual),
            },
            constants={
                **constants_of(bias, residual, outputs, activation),
                "PRECISION": self.precision or "ieee",
                "PARTS": not whole,
                "PERSISTENT": persistent,
                "SPECIALIZE": specialize,
                "DESCRIPTORS": by_descriptors,
                "TURNED_A": by_descriptors and turned(a, size),
                "TURNED_B": by_descriptors and turned(b, size),
                "DESCRIBED": described,
                "EVEN_K": k % config.block_k == 0,
                "ALIGNED_M": a.strides[1] == 1 and m % 16 == 0,  # loads of a run along m only then
                "WIDE": self._wide(config),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            dot_dtype=a.dtype,
            options={"matrix_instr_nonkdim": config.matrix_size} if config.matrix_size else {},
            without_memory=dict.fromkeys(("DESCRIPTORS", "SPECIALIZE", "DESCRIBED"), False) if by_descriptors else {},
        )

    def _add(self, config: MatmulConfig, first: int, tiles: int, parts: int, scratch: str) -> Launch:
        """The launch that adds the parts of those tiles."""
        rows, cols = min(PIECE_M, config.block_m), min(PIECE_N, config.block_n)
        saves = len(self.outputs) == 2
        written = ("" if not saves else self.outputs[0], self.outputs[-1]) if first else ("", "")
        inputs = (scratch, "bias" if self.bias else "", "residual" if self.residual else "", *written)
        pieces = config.block_m // rows * (config.block_n // cols)
        return Launch(
            add_parts,
            (tiles * pieces,),
            inputs=inputs if saves else (*inputs, ""),
            outputs=self.outputs,
            numbers={
                "m": self.a[1].shape[1],
                "n": self.b[1].shape[2],
                "first": first,
                "parts": parts,
                **numbers_of(self.bias, self.residual),
            },
            constants={
                **constants_of(self.bias, self.residual, self.outputs, self.activation),
                "WIDE": self._wide(config),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "GROUP_M": config.group_m,
                "ROWS": rows,
                "COLS": cols,
            },
        )

    def _wide(self, config: MatmulConfig) -> bool:
        """Whether offsets inside a tile need 64 bits."""
        block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
        (batch, m, _), n = self.a[1].shape, self.b[1].shape[2]
        tiles = [(self.a[1], block_m, block_k), (self.b[1], block_k, block_n)]
        tiles.append((contiguous((batch, m, n), ""), block_m, block_n))
        if self.residual is not None:
            tiles.append((self.residual, block_m, block_n))
        return wide(*tiles)
