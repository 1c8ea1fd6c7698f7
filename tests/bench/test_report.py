"""The page: it holds everything, asks for nothing, and says what each figure is."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

from crosstile.bench import report as reporting
from crosstile.bench.compile import CompileReport
from crosstile.bench.facts import KernelFacts
from crosstile.bench.pool import Outcome
from crosstile.bench.programs import Job
from crosstile.bench.report import Report, TrainingRun
from crosstile.bench.roofline import bound
from crosstile.bench.shapes import get_shape
from crosstile.bench.svg import Series, line_chart
from crosstile.bench.verify import Check
from crosstile.kernels.tiles.targets import TARGETS

VOID = {"meta", "link", "br", "hr", "img", "input", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def a_run(framework: str) -> TrainingRun:
    losses = [(step, 8 / (step + 1)) for step in range(400)]
    sample = "</pre><script>alert(1)</script>"
    return TrainingRun(framework, losses, [(0, 8.1), (400, 2.5)], 60.0, 12345.0, 0.21, 1_000_000, "def ", sample)


def an_outcome(target: str, spills: int) -> Outcome:
    facts = KernelFacts("forward", "q 64", 100, {"HGMMA": 8}, "bfloat16", spills, 1024, registers=128)
    return Outcome(Job(target, "attention", "forward", "llama-3-8b", "bfloat16"), (facts,))


@pytest.fixture(scope="module")
def page() -> str:
    checks = [
        Check("attention", "small", "jax", "pallas", way, "float32", 1e-7, 0.4) for way in ("forward", "backward")
    ]
    compiled = CompileReport((an_outcome("sm_90", 0), an_outcome("gfx942", 7)), 3.0)
    return reporting.render(Report([a_run("torch"), a_run("jax")], checks, compiled, seconds=300.0))


def test_it_is_one_file_that_asks_for_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert not parsed.attributes & {"src", "href", "srcset", "data", "action", "onload", "onclick"}
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)


def test_it_follows_light_and_dark_and_fits_a_phone(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 2 + len(TARGETS)
    assert not any(re.search(r"#[0-9a-f]{3,6}\b|rgb\(", drawing) for drawing in drawings), "colours come from the page"
    tables = re.findall(r'<div class="card scroll"><table>', page)
    assert len(tables) == page.count("<table>")


def test_every_section_says_what_its_figures_are(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page, re.S)
    assert headings
    for heading in headings:
        assert any(label in heading for label in ("measured on this CPU", "compiled", "predicted")), heading


def test_it_shows_the_figures(page: str) -> None:
    assert "8.10 → 2.50" in page
    assert "0.40×" in page
    assert "gfx942 attention forward llama-3-8b bfloat16: forward (q 64): 7 register spills" in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page, "a sample is text, not markup"


def test_what_is_not_offered_on_a_chip_is_no_failure_there() -> None:
    job = Job("gfx942", "paged_attention", "forward", "llama-3-8b-decode-16-fp8", "bfloat16")
    compiled = CompileReport((an_outcome("gfx942", 0), Outcome(job, unsupported="no float8 there")), 3.0)
    [chip] = reporting._compile_matrix(compiled)
    assert [cell["passes"] for cell in chip["cells"]] == [True, True]


def test_parts_that_are_absent_are_left_out(tmp_path: Path) -> None:
    path = reporting.write(Report(), tmp_path / "report")
    assert path.name == "index.html"
    text = path.read_text(encoding="utf-8")
    assert "predicted" in text
    assert "Compiled for absent chips" not in text
    assert Page(text).open == []


def test_a_flat_line_can_be_drawn() -> None:
    assert "<polyline" in line_chart([Series("flat", [(0, 2.0), (1, 2.0)], 1)], "step", "loss")


def test_the_roofline_by_hand() -> None:
    shape, chip = get_shape("llama-3-8b-decode-gate"), TARGETS["sm_90"]
    moved = 2 * (4096 + 4096 * 14336 + 14336)
    found = bound(shape, chip)
    assert found.limit == "memory"
    assert found.intensity == pytest.approx(2 * 4096 * 14336 / moved)
    assert found.microseconds == pytest.approx(moved / 3350e9 * 1e6)
    large = bound(get_shape("llama-3-8b-gate"), chip)
    assert (large.limit, large.tflops) == ("compute", pytest.approx(989))


def test_the_flops_of_causal_attention_are_those_of_the_pairs_it_sees() -> None:
    shape = get_shape("llama-3-8b")
    assert shape.flops == 4 * 32 * 128 * (4096 * 4097 / 2)
    assert get_shape("llama-3-8b-decode").flops == 4 * 8 * 32 * 128 * 4096
