"""Figures as inline SVG: no script, no network, in the colours of the page around them.

Lines differ by dash and marker as well as by colour (Okabe and Ito's palette without its yellow).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from maestro_pl.errors import escaped

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "currentColor")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 34
MOST_POINTS = 240  # of a line: more are averaged, which nobody sees at this width


@dataclass
class Line:
    """One curve, and the band around it where there is one.

    Attributes:
        name: for the legend.
        xs: ascending.
        ys: as many; NaN leaves a gap.
        low, high: the edges of the band, as many, or None.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass
class Mark:
    """A step to be pointed at, by a number that the text beside the figure explains."""

    x: float
    label: str


def line_chart(
    lines: Sequence[Line], title: str, x_label: str = "policy step", unit: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
) -> Markup:  # fmt: skip
    """Curves over one axis, with a legend that gives their first and last value in words.

    Args:
        lines: a line without any finite value is left out.
        title: above the figure.
        x_label: of the axis.
        unit: the least range of the y axis, such as (0, 1).
        marks: vertical lines.

    Returns:
        A ``<figure>``; a sentence where there is nothing to draw.
    """
    kept = [_thinned(line) for line in lines if any(map(math.isfinite, line.ys))]
    caption = Markup("<figcaption>{}</figcaption>").format(escaped(title))
    if not kept:
        return Markup('<figure class="chart">{}<p class="empty">Nothing recorded yet.</p></figure>').format(caption)
    low, high = _range(kept, unit)
    left, right = min(line.xs[0] for line in kept), max(line.xs[-1] for line in kept)
    right = right if right > left else left + 1
    place = _Place(left, right, low, high)
    body = [_axes(place, x_label)]
    body += [_mark(place, mark) for mark in marks if left <= mark.x <= right]
    body += [_curve(place, line, index) for index, line in enumerate(kept)]
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" font-size="12">{}</svg>').format(
        WIDTH, HEIGHT, escaped(title), Markup("").join(body)
    )
    legend = Markup("").join(_legend(line, index) for index, line in enumerate(kept))
    return Markup('<figure class="chart">{}{}<ul class="legend">{}</ul></figure>').format(caption, svg, legend)


def part_bar(start: float, end: float, low: float, high: float, total: bool = False) -> Markup:
    """One bar of a sum: from where the parts before it ended to where it ends.

    What is added is filled, what is taken off is hollow; a total starts at 0 and is hatched.

    Args:
        start: what the parts before it come to.
        end: what they come to with it.
        low: the lower end of the scale, the same for all bars of a sum; 0 lies on it.
        high: its upper end.
        total: the sum itself.
    """
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return round(1 + 98 * (value - low) / span, 2)

    x, width = min(at(start), at(end)), max(abs(at(end) - at(start)), 0.4)
    kind = "total" if total else "up" if end >= start else "down"
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<line x1="{0}" x2="{0}" y1="0" y2="10" class="zero"/><rect x="{1}" y="1.5" width="{2}" height="7" class="{3}"/></svg>'
    ).format(at(0.0), x, width, kind)


def number(value: float | None) -> str:
    """Three decimals, fewer for large values; a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e5 or 0 < size < 5e-4:
        return f"{value:.2g}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:.0f}"


class _Place:
    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.right, self.low, self.high = left, right, low, high

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / (self.high - self.low), 1)


def _range(lines: Sequence[Line], unit: tuple[float, float] | None) -> tuple[float, float]:
    edges = [side for line in lines for side in (line.ys, line.low, line.high) if side is not None]
    values = [value for side in edges for value in side if math.isfinite(value)] + list(unit or ())
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    if unit is not None and (low, high) == unit:
        return unit
    return low - margin, high + margin


def _thinned(line: Line) -> Line:
    count = len(line.xs)
    if count <= MOST_POINTS:
        return line
    cuts = [round(i * count / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def mean(values: Sequence[float] | None) -> list[float] | None:
        if values is None:
            return None
        finite = [[v for v in values[piece] if math.isfinite(v)] for piece in pieces]
        return [sum(part) / len(part) if part else math.nan for part in finite]

    return Line(line.name, mean(line.xs) or [], mean(line.ys) or [], mean(line.low), mean(line.high))


def _ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(place: _Place, x_label: str) -> Markup:
    parts = []
    for value in _ticks(place.low, place.high, 4):
        y = place.y(value)
        parts.append(
            Markup(
                '<line x1="{}" x2="{}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".15"/>'
                '<text x="{}" y="{}" text-anchor="end" fill="currentColor" fill-opacity=".75">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 5, y + 4, f"{value:g}", y=y)
        )
    for value in _ticks(place.left, place.right, 6):
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle" fill="currentColor" fill-opacity=".75">{}</text>').format(
                place.x(value), HEIGHT - BOTTOM + 15, f"{value:g}"
            )
        )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="end" fill="currentColor" fill-opacity=".75">{}</text>').format(
            WIDTH - RIGHT, HEIGHT - 4, x_label
        )
    )
    return Markup("").join(parts)


def _mark(place: _Place, mark: Mark) -> Markup:
    x = place.x(mark.x)
    return Markup(
        '<line x1="{x}" x2="{x}" y1="{}" y2="{}" stroke="currentColor" stroke-dasharray="3 3" stroke-opacity=".8"/>'
        '<text x="{}" y="{}" text-anchor="middle" fill="currentColor" font-weight="700">{}</text>'
    ).format(TOP + 10, HEIGHT - BOTTOM, min(max(x, LEFT + 6), WIDTH - RIGHT - 6), TOP + 7, escaped(mark.label), x=x)


def _stroke(index: int) -> Markup:
    return Markup('stroke="{}" stroke-dasharray="{}"').format(
        COLOURS[index % len(COLOURS)], DASHES[(index + index // len(COLOURS)) % len(DASHES)]
    )


def _curve(place: _Place, line: Line, index: int) -> Markup:
    colour = COLOURS[index % len(COLOURS)]
    points = [(place.x(x), place.y(y)) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    parts = []
    if line.low is not None and line.high is not None:
        edge = [(place.x(x), place.y(v)) for x, v in zip(line.xs, line.high, strict=True) if math.isfinite(v)]
        back = [(place.x(x), place.y(v)) for x, v in zip(line.xs, line.low, strict=True) if math.isfinite(v)]
        outline = " ".join(f"{x},{y}" for x, y in [*edge, *reversed(back)])
        parts.append(Markup('<polygon points="{}" fill="{}" fill-opacity=".13"/>').format(outline, colour))
    path = " ".join(f"{x},{y}" for x, y in points)
    parts.append(Markup('<polyline points="{}" fill="none" {} stroke-width="2"/>').format(path, _stroke(index)))
    if len(points) <= 60:
        values = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
        name = escape(escaped(line.name))
        parts += [
            Markup('<circle cx="{}" cy="{}" r="2.5" fill="{}"><title>{} at {}: {}</title></circle>').format(
                *point, colour, name, f"{x:g}", number(y)
            )
            for point, (x, y) in zip(points, values, strict=True)
        ]
    return Markup("").join(parts)


def _legend(line: Line, index: int) -> Markup:
    finite = [value for value in line.ys if math.isfinite(value)]
    change = number(finite[0]) if len(finite) == 1 else f"{number(finite[0])} to {number(finite[-1])}"
    swatch = Markup(
        '<svg viewBox="0 0 30 8" width="30" height="8" aria-hidden="true"><line x1="0" x2="30" y1="4" y2="4" {} '
        'stroke-width="2.5"/></svg>'
    ).format(_stroke(index))
    return Markup("<li>{} {} <small>{}</small></li>").format(swatch, escaped(line.name), change)
