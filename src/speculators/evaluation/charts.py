"""Draws panels of lines as SVG, each with its figures as a table, for readers that see no pictures. Returns HTML.

A panel has 360 x 240 units, which a phone shows at its own size and a wide screen side by side. Colours and widths are
the page's (`page.html`), by class: s0 to s7 are the styles of series, which differ in the shape of their marks too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from speculators.evaluation.statistics import Estimate
from speculators.utils.report import visible

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 240, 40, 12, 10, 36
NUM_STYLES = 8
LETTER = 7
"""Width of a digit."""
SWATCH = '<rect class="share" width="18" height="14"/>'


def text(value: object) -> str:
    return escape(visible(str(value)))


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, x: float, found: Estimate) -> Point:
        return cls(x, found.value, found.low, found.high)


@dataclass(frozen=True)
class Series:
    name: str
    style: int
    points: Sequence[Point]
    is_model: bool = False
    """Drawn as a broken line without marks."""
    best: float | None = None
    """The x of the point with a ring."""


@dataclass(frozen=True)
class Panel:
    title: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    reference: float | None = None
    x_is_log: bool = False

    @property
    def points(self) -> list[Point]:
        return [point for series in self.series for point in series.points]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    raw = max(high - low, 1e-9) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= raw)
    first = math.floor(low / step + 1e-9)
    return [round((first + n) * step, 10) for n in range(math.ceil(high / step - 1e-9) - first + 1)]


def marker(style: int, x: float, y: float) -> str:
    """Marks differ in shape as well as in colour."""
    shapes = (
        f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
        f'<path class="mark" d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>',
        f'<path class="mark" d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"/>',
    )
    return shapes[style % len(shapes)]


@dataclass(frozen=True)
class Axes:
    """The ticks of a panel, and where values lie in it, in units of the figure from its left and upper edges."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_of: Callable[[float], float]
    y_of: Callable[[float], float]


def axes_of(panel: Panel) -> Axes:
    points = panel.points
    ends = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    ends += [] if panel.reference is None else [panel.reference]
    y_ticks = ticks(min(ends), max(ends))
    x_values = sorted({point.x for point in points})
    x_ticks = x_values if len(x_values) <= 8 else x_values[:: math.ceil(len(x_values) / 8)]
    scale: Callable[[float], float] = math.log if panel.x_is_log else float
    first, last = scale(x_values[0]), scale(x_values[-1])
    margin = (last - first or 1.0) * 0.06
    scaled_x_of = line(first - margin, last + margin, LEFT, WIDTH - RIGHT)
    y_of = line(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    return Axes(x_ticks, y_ticks, lambda value: scaled_x_of(scale(value)), y_of)


def draw(panel: Panel) -> str:
    """Draws the figure of a panel, with its text alternative."""
    axes = axes_of(panel)
    parts = [*drawn_axes(panel, axes), *(part for series in panel.series for part in drawn_series(series, axes))]
    told = f"{panel.y_name} against {panel.x_name}: " + "; ".join(f"{s.name} {spoken(s)}" for s in panel.series)
    rows = [[s.name, f"{p.x:,g}", figure(p)] for s in panel.series for p in s.points]
    return (
        f'<figure><h3>{text(panel.title)}</h3><p class="faint">{text(panel.y_name)}</p>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(told)}">{"".join(parts)}</svg>'
        f"<details><summary>Figures</summary>{table(('line', panel.x_name, panel.y_name), rows)}</details></figure>"
    )


def drawn_axes(panel: Panel, axes: Axes) -> list[str]:
    """Draws the grid, the names of ticks and of the x axis, and the line of reference."""
    parts = []
    for value in axes.y_ticks:
        y = axes.y_of(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    free_from = 0.0
    for value in axes.x_ticks:
        x, name = axes.x_of(value), f"{value:,g}"
        if x - LETTER * len(name) / 2 >= free_from:  # else it would run into the one before
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{name}</text>'
            )
            free_from = x + LETTER * (len(name) / 2 + 1)
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{text(panel.x_name)}</text>'
    )
    if panel.reference is not None:
        parts.append(f'<path class="reference" d="M{LEFT} {axes.y_of(panel.reference):.1f}H{WIDTH - RIGHT}"/>')
    return parts


def drawn_series(series: Series, axes: Axes) -> list[str]:
    """Draws the line, the intervals and marks of its points, and the ring round the best."""
    places = [(axes.x_of(p.x), axes.y_of(p.y), p) for p in sorted(series.points, key=lambda p: p.x)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
    parts = [f'<g class="s{series.style % NUM_STYLES}"><path class="line{" model" * series.is_model}" d="{path}"/>']
    for x, y, point in places:
        if point.low is not None and point.high is not None:
            parts.append(f'<path class="bar" d="M{x:.1f} {axes.y_of(point.low):.1f}V{axes.y_of(point.high):.1f}"/>')
        if not series.is_model:
            parts.append(marker(series.style, x, y))
    parts += [f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>' for x, y, p in places if p.x == series.best]
    return [*parts, "</g>"]


def line(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Returns the straight line that takes `low` to `start` and `high` to `end`."""
    return lambda value: start + (value - low) / (high - low or 1.0) * (end - start)


def spoken(series: Series) -> str:
    return ", ".join(f"{point.y:.2f} at {point.x:g}" for point in series.points)


def figure(point: Point) -> str:
    return f"{point.y:.2f}" if point.low is None else f"{point.y:.2f} ({point.low:.2f} to {point.high:.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Cells are text."""
    body = "".join(
        f'<tr><th scope="row">{text(r[0])}</th>{"".join(f"<td>{text(c)}</td>" for c in r[1:])}</tr>' for r in rows
    )
    heading = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    label = text(caption or "figures of the chart")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{named}'
        f"<thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def legend(styles: Mapping[str, int], label: str, *, are_marks: bool = True) -> str:
    """A list of names with the marks of series, or the colours of parts."""
    items = "".join(
        f'<li class="s{style % NUM_STYLES}"><svg viewBox="0 0 18 14" aria-hidden="true">'
        f"{marker(style, 9, 7) if are_marks else SWATCH}</svg>{text(name)}</li>"
        for name, style in styles.items()
    )
    return f'<ul class="legend" aria-label="{text(label)}">{items}</ul>' if styles else ""


def stacked_bar(label: str, shares: Mapping[str, float], styles: Mapping[str, int]) -> str:
    """A bar of parts that make a whole of 1."""
    start, parts = 0.0, []
    for name, style in styles.items():
        width = 100 * shares.get(name, 0.0)
        parts.append(f'<g class="s{style}"><rect class="share" x="{start:.2f}" width="{width:.2f}" height="6"/></g>')
        start += width
    told = f"{label}: " + ", ".join(f"{name} {shares.get(name, 0.0):.0%}" for name in styles)
    return (
        f'<p class="note share-label">{text(label)}</p><svg class="shares" viewBox="0 0 100 6" '
        f'preserveAspectRatio="none" role="img" aria-label="{text(told)}">{"".join(parts)}</svg>'
    )
