"""The tile of a product on a TPU: what fits, and what brings the fewest bytes."""

import pytest

from crosstile.bench.shapes import SHAPES, get_shape
from crosstile.dispatch import OPS
from crosstile.kernels.matmul.spec import MatmulSpec
from crosstile.kernels.matmul.tiles import MatmulSizes
from crosstile.kernels.matmul.tiles import choose_config as choose_matmul
from crosstile.kernels.tiles import tuned
from crosstile.kernels.tiles.targets import MIB, TARGETS
from crosstile.kernels.tiles.tpu_blocks import best_tile, deepest_step

V6E, V7X, V5E = TARGETS["v6e"], TARGETS["v7x"], TARGETS["v5e"]
ANY = (4096, 4096)


def test_the_largest_that_fits_is_taken():
    assert best_tile(V6E, lambda m, n: 8 * m * n, ANY) == (4096, 2048)
    assert best_tile(V6E, lambda m, n: 16 * m * n, ANY) == (2048, 2048)
    assert best_tile(V6E, lambda m, n: 0, ANY) == (4096, 4096)
    assert best_tile(V6E, lambda m, n: 1 << 40, ANY) == (256, 256)


def test_what_is_brought_more_of_is_brought_less_often():
    needed = lambda m, n: 8 * m * n  # noqa: E731
    assert best_tile(V6E, needed, ANY, rights=3) == (4096, 2048)
    assert best_tile(V6E, needed, ANY, lefts=3) == (2048, 4096)


def test_a_block_is_less_than_twice_as_long_as_its_array():
    for size, block in ((1, 256), (1001, 1024), (1024, 1024), (1025, 2048), (9000, 4096)):
        assert best_tile(V6E, lambda m, n: 0, (size, 256)) == (block, 256)


def test_steps_are_deep_where_all_lengths_are_whole_steps():
    assert deepest_step(V7X, (4096, 14336)) == (1024, 1024)
    assert deepest_step(V7X, (4096, 4608)) == (512, 2048)
    assert deepest_step(V7X, (4096, 100)) == deepest_step(V7X, ()) == (512, 1024)
    assert deepest_step(V6E, (4096,)) == (512, 4096)
    assert deepest_step(V6E, ()) == (512, 2048)
    assert deepest_step(V5E, ()) == (512, 4096)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7x"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_matmuls_blocks_and_results_fit_the_vmem(chip, out_dtype, activation):
    spec = MatmulSpec("bfloat16", out_dtype, activation)
    item = 4 if out_dtype == "float32" else 2
    for sizes in (
        None,
        MatmulSizes(1, 8192, 8192, 8192, False, True, True),
        MatmulSizes(1, 8, 99, 7, True, False, False),
    ):
        config = choose_matmul(spec, TARGETS[chip], sizes)
        m, n, k = config.block_m, config.block_n, config.block_k
        beside = item + 2 * (sizes is None or sizes.residual) + 2 * (activation is not None)
        assert 4 * (m + n) * k + 4 * m * n + 2 * beside * m * n <= TARGETS[chip].on_chip_bytes * 7 // 8
        assert m * n * 4 >= MIB // 4


@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if hasattr(OPS[shape.op].module("tiles"), "fits")], ids=lambda shape: shape.name
)
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7x"])
def test_what_a_heuristic_chooses_fits_and_much_more_does_not(shape, chip):
    declared, target = OPS[shape.op].module("tiles"), TARGETS[chip]
    spec, inputs = shape.prepare("bfloat16")
    sizes = declared.sizes_of(spec, inputs)
    config = declared.choose_config(spec, target, sizes)
    assert declared.fits(spec, target, config, sizes)
    checked = spec.dtype != "float32" and getattr(spec, "format", None) is None
    if checked and all(size >= 2048 for size in large_sizes(sizes)):
        huge = tuned.changed_tiles(config, dict.fromkeys(BLOCK_FIELDS[shape.op], 1 << 15))
        assert not declared.fits(spec, target, huge, sizes)


BLOCK_FIELDS = {
    "matmul": ("block_m", "block_n", "block_k"),
    "glu_matmul": ("dw.block_m", "dw.block_n", "dw.block_k"),
    "grouped_matmul": ("dlhs.block_n", "dlhs.block_k"),
    "linear_cross_entropy": ("dweight.block_tokens", "dweight.block_vocab"),
}


def large_sizes(sizes):
    """The sizes that are lengths of matrices."""
    return [getattr(sizes, name) for name in ("m", "n", "k", "tokens", "vocab") if hasattr(sizes, name)]


def test_grouped_products_of_one_sum_are_widened_where_there_is_room():
    declared = OPS["grouped_matmul"].module("tiles")
    for name, chip, columns in (
        ("qwen3-30b-a3b-down", "v7x", 1024),  # the array has 768
        ("mixtral-8x7b-experts", "v6e", 2048),
        ("mixtral-8x7b-experts", "v7x", 1024),
    ):
        spec, inputs = get_shape(name).prepare("bfloat16")
        config = declared.choose_config(spec, TARGETS[chip], declared.sizes_of(spec, inputs))
        assert config.dlhs.block_n == columns
    assert declared.choose_config(spec, V6E).dlhs.block_n == 1024
