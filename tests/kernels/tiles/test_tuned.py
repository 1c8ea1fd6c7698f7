"""Which entry of the tuned tables a call gets, and when none."""

import json
from dataclasses import replace
from types import ModuleType

import pytest

from crosstile.dispatch import OPS
from crosstile.kernels.matmul import tiles as matmul_tiles
from crosstile.kernels.matmul.spec import MatmulSpec
from crosstile.kernels.matmul.tiles import MatmulSizes, choose_config
from crosstile.kernels.tiles import tuned
from crosstile.kernels.tiles.targets import INTERPRET, TARGETS
from crosstile.kernels.tiles.tuned import Entry

SPEC = MatmulSpec("bfloat16", "bfloat16")
V6E = TARGETS["v6e"]
SIZES = MatmulSizes(1, 4096, 4096, 4096, False, False, False)


def entry(block_m: int, sizes: MatmulSizes = SIZES, spec: MatmulSpec = SPEC, **tiles: int) -> Entry:
    times = {"forward": 1.0}
    tiles = {"block_m": block_m, **tiles}
    return Entry(matmul_tiles.kinds_of(spec), sizes._asdict(), tiles, times, times, "predicted", f"shape-{block_m}")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes entries to the package's or the user's table, which are empty without."""
    monkeypatch.setenv("CROSSTILE_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuned, "package_table", lambda op, chip: tmp_path / "package" / op / f"{chip}.json")

    def write(*entries: Entry, user: bool = False, chip: str = "v6e") -> None:
        place = tuned.user_table if user else tuned.package_table
        tuned.write_table(place("matmul", chip), "matmul", chip, entries)
        tuned.forget()

    tuned.forget()
    yield write
    monkeypatch.undo()
    tuned.forget()


def heuristic(sizes: MatmulSizes | None = SIZES, spec: MatmulSpec = SPEC, target=V6E):
    return choose_config(spec, target, sizes)


def chosen(sizes: MatmulSizes = SIZES, spec: MatmulSpec = SPEC, target=V6E):
    return tuned.choose("matmul", matmul_tiles, spec, target, sizes)


def test_an_entry_of_the_call_is_taken(table):
    table(entry(128), entry(256, SIZES._replace(m=8192)))
    config, origin = chosen()
    assert config == replace(heuristic(), block_m=128)
    assert origin == "the tuned table for v6e: its own entry, predicted for shape-128"


def test_the_nearest_entry_is_taken(table):
    table(entry(128), entry(256, SIZES._replace(m=16384)))
    near, origin = chosen(SIZES._replace(m=32768))
    assert near.block_m == 256
    assert "1 octaves away" in origin
    assert chosen(SIZES._replace(m=1024, n=2048)).config.block_m == 128


def test_of_two_as_near_the_first_in_the_order_of_the_table_is_taken(table):
    table(entry(256, SIZES._replace(m=16384)), entry(128))
    assert chosen(SIZES._replace(m=8192)).config.block_m == 128


@pytest.mark.parametrize(
    "sizes", [SIZES._replace(m=4096 << 4), SIZES._replace(k=4096 >> 4), SIZES._replace(residual=True), None]
)
def test_what_is_far_away_or_unlike_or_unknown_gets_the_heuristic(table, sizes):
    table(entry(128))
    config, origin = chosen(sizes)
    assert config == heuristic(sizes)
    assert "heuristic" in origin


def test_octaves_add_up_over_the_sizes(table):
    table(entry(128), entry(256, SIZES._replace(m=4096 << 3)))
    assert chosen(SIZES._replace(m=4096 << 2, n=8192)).config.block_m == 256
    table(entry(128), entry(256, SIZES._replace(m=4096 << 3, n=512)))
    assert chosen(SIZES._replace(m=4096 << 2)).config.block_m == 128


@pytest.mark.parametrize("spec", [replace(SPEC, dtype="float16"), replace(SPEC, activation="silu")])
def test_kinds_match_exactly(table, spec):
    table(entry(128))
    assert chosen(spec=spec).config == heuristic(spec=spec)
    assert chosen(spec=replace(SPEC, save_preactivation=True)).config.block_m == 128


def test_another_chip_and_the_interpreters_do_not_look(table):
    table(entry(128))
    assert chosen(target=TARGETS["v5e"]).config == heuristic(target=TARGETS["v5e"])
    assert chosen(target=INTERPRET).config == heuristic(target=INTERPRET)


def test_the_users_table_goes_before_the_packages_where_both_are_as_near(table):
    table(entry(128))
    table(entry(256), entry(512, SIZES._replace(m=1024)), user=True)
    assert chosen().config.block_m == 256
    assert "your own table" in chosen().origin
    assert chosen(SIZES._replace(m=1024)).config.block_m == 512
    table(entry(512, SIZES._replace(m=1024)), user=True)
    assert chosen().config.block_m == 128


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": [{"kinds": {}}]}', '{"entries": 3}'])
def test_a_users_table_that_cannot_be_read_is_no_error(table, text):
    table(entry(128))
    table(user=True)
    tuned.user_table("matmul", "v6e").write_text(text)
    tuned.forget()
    assert chosen().config.block_m == 128


def test_tiles_that_cannot_be_are_stepped_over(table):
    table(entry(128, block_x=1), entry(256, SIZES._replace(m=8192)))
    assert chosen().config.block_m == 256
    declared = ModuleType("tiles")
    declared.choose_config, declared.kinds_of = choose_config, matmul_tiles.kinds_of
    declared.fits = lambda spec, target, config, sizes: config.block_m != 256
    assert tuned.choose("matmul", declared, SPEC, V6E, SIZES).config == heuristic()


def test_sizes_are_rounded():
    sizes = MatmulSizes(1, 3000, 14336, 0, True, False, True)
    assert tuned.bucketed(sizes) == MatmulSizes(1, 4096, 16384, 1, True, False, True)


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if hasattr(op.module("tiles"), "sizes_of")])
def test_declared_kinds_and_sizes_can_be_written_down(op):
    from crosstile.bench.shapes import SHAPES

    declared = OPS[op].module("tiles")
    for shape in [shape for shape in SHAPES if shape.op == op]:
        spec, inputs = shape.prepare("bfloat16")
        sizes = tuned.bucketed(declared.sizes_of(spec, inputs))
        assert all(type(value) in (int, bool) for value in sizes)
        kinds = declared.kinds_of(spec)
        assert json.loads(json.dumps(kinds)) == kinds
        assert declared.kinds_of(OPS[op].module("spec").saving(spec)) == kinds


def test_linear_cross_entropy_refuses_tiles_that_its_features_make_too_large():
    from crosstile.kernels.linear_cross_entropy import tiles
    from crosstile.kernels.linear_cross_entropy.spec import LinearCrossEntropySpec

    narrow, wide = (LinearCrossEntropySpec("bfloat16", features) for features in (2304, 65536))
    for name in ("v4", "v5e", "v5p", "v6e", "v7x"):
        config = tiles.choose_config(narrow, TARGETS[name])
        assert tiles.fits(narrow, TARGETS[name], config, None)
        assert not tiles.fits(wide, TARGETS[name], config, None)
    assert tiles.fits(wide, TARGETS["sm_90"], tiles.choose_config(wide, TARGETS["sm_90"]), None)
