"""The comparison with other packages' kernels: launches are captured, and the page is what the CSV gives."""

from pathlib import Path

import pytest

from crosstile.bench.captured import capture, memory_bytes, tiles_in_words
from crosstile.bench.gpu_peers import BEGIN, END, read_csv, tables, write_csv

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_csv_gives(tmp_path: Path) -> None:
    found = read_csv(DOCS / "gpu_standings.csv")
    page = (DOCS / "gpu_standings.md").read_text()
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == tables(found)
    write_csv(found, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == (DOCS / "gpu_standings.csv").read_text()


def test_launches_are_kept_and_not_run() -> None:
    torch, triton = pytest.importorskip("torch"), pytest.importorskip("triton")
    from .plans import product

    a = torch.zeros(64, 64, dtype=torch.float16)
    tuned = triton.autotune([triton.Config({"BLOCK": size}, num_warps=2) for size in (32, 64)], key=[])(product)

    def run() -> None:
        product[(1,)](a, a, a, 64, BLOCK=64)
        tuned[lambda meta: (64 // meta["BLOCK"],)](a, a, a, 64)

    first, *choices = capture(run, "sm_90")
    assert (first.launch.options, first.integers) == ({}, {})
    assert (first.launch.grid, first.launch.constants, first.launch.numbers) == ((1,), {"BLOCK": 64}, {"stride": 64})
    assert memory_bytes(first) == 3 * 64 * 64 * 2
    assert [(item.call, item.launch.grid, item.launch.num_warps) for item in choices] == [(2, (2,), 2), (2, (1,), 2)]
    assert tiles_in_words(first.launch) == "BLOCK 64, 4 warps, 3 stages"


def test_a_tuner_prunes_and_its_options_reach_the_compiler() -> None:
    torch, triton = pytest.importorskip("torch"), pytest.importorskip("triton")
    from .plans import product

    a, where = torch.zeros(64, 64, dtype=torch.float16), torch.arange(3)
    configs = [triton.Config({"BLOCK": size, "waves_per_eu": 2}, maxnreg=64) for size in (32, 64)]

    def few(configs: list[object], arguments: dict[str, object], **given: object) -> list[object]:
        assert arguments["stride"] == 64
        return configs[1:]

    tuned = triton.autotune(configs, key=[], prune_configs_by={"early_config_prune": few})(product)
    (kept,) = capture(lambda: tuned[(1,)](a, a, where, 64), "sm_90")
    assert kept.launch.constants == {"BLOCK": 64}
    assert kept.launch.options == {"waves_per_eu": 2, "maxnreg": 64}
    assert {name: list(values) for name, values in kept.integers.items()} == {kept.launch.inputs[2]: [0, 1, 2]}
