"""Plots as inline SVG, coloured by CSS variables of the page, so that they follow its light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line, drawn in the CSS variable `--series-<colour>`; dots mark its points where asked."""

    name: str
    points: Sequence[Point]
    colour: int
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class _Frame:
    """The plotting area, and how data maps to it."""

    width: float
    height: float
    x_range: Point
    y_range: Point
    scale: Callable[[float], float]
    left: float = 46
    bottom: float = 34
    top: float = 10
    right: float = 12

    def x(self, value: float) -> float:
        low, high = map(self.scale, self.x_range)
        return self.left + (self.scale(value) - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = map(self.scale, self.y_range)
        return (
            self.height
            - self.bottom
            - (self.scale(value) - low) / (high - low) * (self.height - self.top - self.bottom)
        )


def line_chart(series: Sequence[Series], x_label: str, y_label: str, width: int = 760, height: int = 300) -> str:
    """Lines over linear axes, the names at the top right; a width of some 340 reads well on a phone."""
    points = [point for line in series for point in line.points]
    x_ticks = _linear_ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = _linear_ticks(min(y for _, y in points), max(y for _, y in points))
    frame = _Frame(width, height, _span(x_ticks, points, 0), _span(y_ticks, points, 1), float)
    parts = _axes(frame, x_ticks, y_ticks, x_label, y_label)
    parts += [_line(frame, line) for line in series]
    parts.append(_legend(frame, [line for line in series if line.name]))
    return _document(frame, parts, f"{y_label} over {x_label}: {', '.join(line.name for line in series if line.name)}")


def roofline_chart(
    peak: float,
    bandwidth: float,
    points: Sequence[tuple[str, float, float, int]],
    title: str,
    width: int = 320,
    height: int = 220,
) -> str:
    """The roof of a chip (peak in TFLOP/s, bandwidth in GB/s) and named points (intensity, TFLOP/s, colour).

    Both axes are logarithmic.
    """
    x_range, y_range = (0.5, 10_000.0), (0.5, 4_000.0)
    frame = _Frame(width, height, x_range, y_range, log10)
    ridge = peak * 1e3 / bandwidth
    start = max(x_range[0], y_range[0] * 1e3 / bandwidth)
    roof = Series("", [(start, start * bandwidth / 1e3), (ridge, peak), (x_range[1], peak)], 0)
    parts = _axes(frame, [1, 10, 100, 1000, 10_000], [1, 10, 100, 1000], "operations per byte", "TFLOP/s")
    parts.append(_line(frame, roof))
    for name, intensity, tflops, colour in points:
        place = f'cx="{frame.x(intensity):.1f}" cy="{frame.y(tflops):.1f}"'
        label = escape(f"{name}: {intensity:.0f} operations per byte, at most {tflops:.0f} TFLOP/s")
        parts.append(
            f'<circle {place} r="4" class="dot" style="fill:var(--series-{colour})"><title>{label}</title></circle>'
        )
    parts.append(f'<text class="name" x="{frame.left + 8}" y="{frame.top + 12}">{escape(title)}</text>')
    return _document(frame, parts, f"roofline of {title}: {peak:g} TFLOP/s, {bandwidth:g} GB/s")


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> list[str]:
    floor_y, right = frame.height - frame.bottom, frame.width - frame.right
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{frame.x(tick):.1f}" y="{floor_y + 14}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{floor_y}" y2="{floor_y}"/>')
    middle = (frame.left + right) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{frame.height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    centre = (frame.top + floor_y) / 2
    turn = f'transform="rotate(-90 11 {centre})"'
    parts.append(f'<text class="label" x="11" y="{centre}" text-anchor="middle" {turn}>{escape(y_label)}</text>')
    return parts


def _line(frame: _Frame, line: Series) -> str:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    colour = f"var(--series-{line.colour})"
    faint = " faint" if line.faint else ""
    text = f'<polyline class="line{faint}" points="{path}" style="stroke:{colour}"/>'
    if line.dots:
        text += "".join(
            f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" style="fill:{colour}">'
            f"<title>{escape(line.name)}: {y:.3f}</title></circle>"
            for x, y in line.points
        )
    return text


def _legend(frame: _Frame, series: Sequence[Series]) -> str:
    right, parts = frame.width - frame.right - 4, []
    for row, line in enumerate(series):
        y = frame.top + 12 + 16 * row
        parts.append(f'<circle cx="{right - 4}" cy="{y - 4}" r="4" style="fill:var(--series-{line.colour})"/>')
        parts.append(f'<text class="name" x="{right - 14}" y="{y}" text-anchor="end">{escape(line.name)}</text>')
    return "".join(parts)


def _document(frame: _Frame, parts: Sequence[str], description: str) -> str:
    box = f"0 0 {frame.width:g} {frame.height:g}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def _linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover the range."""
    span = max(high - low, 1e-9)
    step = 10 ** floor(log10(span / count))
    step *= next((factor for factor in (1, 2, 5) if span / (step * factor) <= count), 10)
    first = floor(low / step)
    return [round(index * step, 10) for index in range(first, ceil(high / step) + 1)]


def _span(ticks: Sequence[float], points: Sequence[Point], axis: int) -> Point:
    values = [point[axis] for point in points]
    high = max(values) if axis == 0 else ticks[-1]
    return min(ticks[0], *values), max(high, ticks[0] + 1e-9)


def _number(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
