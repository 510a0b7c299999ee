"""Plots as inline SVG: points with intervals, scatter, strips, heat maps. Pure.

Colours come from the page (classes ``c0`` to ``c7``, ``ink``, ``faint``), so that they suit light
and dark alike. Plots are as wide as a phone. Nothing in them is shown by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from gralora_diffusion.io.templates import for_html

WIDTH = 400
COLOURS = 8
_MARGIN = 12
_ROW = 36
#: Where the names of a scatter plot begin: as far right as they leave room for, between these.
_NAMES = (204, 268)
#: Axes are no shorter, and logarithmic ones go no further than so many powers of ten either way.
_LEAST, _MOST_POWERS = 1e-290, 250
#: Letters of the plots' size that fit into one pixel of width, about.
_LETTERS = 1 / 6.4


@dataclass(frozen=True)
class Row:
    """One line of an interval plot; ``text`` is what stands at its right."""

    label: str
    mean: float
    low: float | None
    high: float | None
    colour: int
    text: str = ""


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, with intervals where they are known."""

    label: str
    x: float
    y: float
    colour: int
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ForestRow:
    """A difference with its interval; ``dots`` are the values that it is the mean of."""

    label: str
    against: str
    text: str
    mean: float
    low: float | None
    high: float | None
    dots: Sequence[float]
    colour: int


@dataclass(frozen=True)
class Curve:
    """Points (x, y) that are joined in their order."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int


def forest_plot(title: str, rows: Sequence[ForestRow], axis: str, lower: str, upper: str) -> Markup:
    """Draw differences on one axis with a line at zero; names stand above their rows.

    Args:
        lower, upper: what it means to lie left and right of zero.
    """
    values = [v for r in rows for v in (r.mean, r.low, r.high, *r.dots) if v is not None]
    low, high = _range([*values, 0.0])
    place = _linear(low, high, _MARGIN + 4, WIDTH - _MARGIN - 4)
    top, height = 24, 84
    bottom = top + len(rows) * height
    ticks = _ticks(low, high)
    parts = [_text(place(tick), bottom + 14, text, "middle small") for tick, text in ticks]
    parts.append(_text(WIDTH / 2, bottom + 32, axis, "middle"))
    parts.append(_text(_MARGIN, 14, f"← {lower}", "small"))
    parts.append(_text(WIDTH - _MARGIN, 14, f"{upper} →", "end small"))
    room = int((WIDTH - 2 * _MARGIN) * _LETTERS)
    for number, row in enumerate(rows):
        start = top + number * height
        middle = start + 66
        # bold letters are wider
        parts.append(_text(_MARGIN, start + 16, _cut(row.label, int(0.85 * room)), "bold"))
        parts.append(_text(_MARGIN, start + 31, _cut(row.against, room), "small"))
        parts.append(_text(_MARGIN, start + 46, _cut(row.text, room), ""))
        # only beside the values, so that no line runs through a name
        parts += [_line(place(x), middle - 11, place(x), middle + 13, "faint") for x, _ in ticks]
        parts.append(_line(place(0), middle - 11, place(0), middle + 13, "ink dashed"))
        parts += [_dot(place(v), middle, row.colour, 3, f"{v:.4g}", " pale") for v in row.dots]
        parts += _interval(row, place, middle, 6)
        parts.append(_dot(place(row.mean), middle, row.colour, 5, f"{row.label}, {row.against}"))
    return _svg(title, bottom + 40, parts)


def curve_plot(title: str, curves: Sequence[Curve], x_axis: str, y_axis: str) -> Markup:
    """Draw curves; a legend below has their names, for a name on a line would hide it."""
    xs, ys = ([point[i] for c in curves for point in c.points] for i in (0, 1))
    left, right, top, bottom = 44, WIDTH - _MARGIN, 26, 230
    (x_low, x_high), (y_low, y_high) = _range(xs), _range(ys)
    x_place = _linear(x_low, x_high, left + 4, right - 4)
    y_place = _linear(y_low, y_high, bottom - 4, top + 4)
    parts = _x_axis(_ticks(x_low, x_high), x_place, top, bottom, x_axis, (left + right) / 2)
    for tick, text in _ticks(y_low, y_high):
        parts.append(_line(left, y_place(tick), right, y_place(tick), "faint"))
        parts.append(_text(left - 5, y_place(tick) + 4, text, "end small"))
    parts.append(_text(_MARGIN, 14, y_axis, ""))
    for number, curve in enumerate(curves):
        places = [(x_place(x), y_place(y)) for x, y in curve.points]
        parts.append(_joined(places, number, curve.colour))
        parts += [
            _mark(x, y, number, curve.colour, f"{curve.label}: {p[0]:.4g}, {p[1]:.4g}")
            for (x, y), p in zip(places, curve.points, strict=True)
        ]
        level = bottom + 52 + 20 * number
        parts.append(_joined([(left, level), (left + 44, level)], number, curve.colour))
        parts.append(_mark(left + 22, level, number, curve.colour, curve.label))
        room = int((right - left - 54) * _LETTERS)
        parts.append(_text(left + 54, level + 4, _cut(curve.label, room), ""))
    return _svg(title, bottom + 46 + 20 * len(curves), parts)


def interval_plot(title: str, rows: Sequence[Row], axis: str, zero: bool = False) -> Markup:
    """Draw a point and its interval for each row, all on one axis; with ``zero``, a line there."""
    values = [v for row in rows for v in (row.mean, row.low, row.high) if v is not None]
    low, high = _range([*values, 0.0] if zero else values)
    place = _linear(low, high, _MARGIN + 4, WIDTH - _MARGIN - 4)
    bottom = len(rows) * _ROW + 8
    parts = _x_axis(_ticks(low, high), place, 4, bottom, axis)
    if zero:
        parts.append(_line(place(0), 4, place(0), bottom, "ink dashed"))
    for number, row in enumerate(rows):
        top, middle = number * _ROW + 16, number * _ROW + 28
        room = int((WIDTH - 2 * _MARGIN) * _LETTERS) - len(row.text) - 1
        parts.append(_text(_MARGIN, top, _cut(row.label, room), "bold halo"))
        parts.append(_text(WIDTH - _MARGIN, top, row.text, "end halo"))
        parts += _interval(row, place, middle, 4)
        parts.append(_dot(place(row.mean), middle, row.colour, 4.5, f"{row.label}: {row.text}"))
    return _svg(title, bottom + 40, parts)


def scatter(
    title: str,
    points: Sequence[Point],
    x_axis: str,
    y_axis: str,
    front: Sequence[str] = (),
    log_x: bool = False,
) -> Markup:
    """Draw labelled points; those named in ``front`` are filled and joined.

    Args:
        log_x: a logarithmic axis; every x must be positive.
    """
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    left, top, bottom = 52, 26, 286
    longest = max(len(p.label) for p in points)
    names = min(max(WIDTH - math.ceil(longest / _LETTERS), _NAMES[0]), _NAMES[1])
    (x_low, x_high), (y_low, y_high) = _log_range(xs) if log_x else _range(xs), _range(ys)
    x_place = (_logarithmic if log_x else _linear)(x_low, x_high, left + 8, names - 24)
    y_place = _linear(y_low, y_high, bottom - 8, top + 8)
    ticks = _log_ticks(x_low, x_high) if log_x else _ticks(x_low, x_high)
    parts = _x_axis(ticks, x_place, top, bottom, x_axis, (left + names - 12) / 2)
    for tick, text in _ticks(y_low, y_high):
        parts.append(_line(left, y_place(tick), names - 12, y_place(tick), "faint"))
        parts.append(_text(left - 5, y_place(tick) + 4, text, "end small"))
    parts.append(_text(_MARGIN, 14, y_axis, ""))
    places = {p.label: (x_place(p.x), y_place(p.y)) for p in points}
    joined = [places[name] for name in front if name in places]
    if len(joined) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in joined)
        parts.append(_markup('<polyline class="front" points="{}"/>', path))
    parts += _labels(points, places, names)
    for p in points:
        x, y = places[p.label]
        if p.x_interval:
            parts.append(_line(*_ends(x_place, p.x_interval, y), f"c{p.colour} pale"))
        if p.y_interval:
            y0, y1 = (y_place(value) for value in p.y_interval)
            parts.append(_line(x, y0, x, y1, f"c{p.colour} pale"))
        hollow = "" if p.label in front else " hollow"
        parts.append(_dot(x, y, p.colour, 5, f"{p.label}: {p.x:g}, {p.y:g}", hollow))
    height = max(bottom, 26 + 15 * len(points)) + 40
    return _svg(title, height, parts)


def strips(
    title: str, rows: Sequence[tuple[str, Sequence[float], int]], axis: str, log: bool = False
) -> Markup:
    """Draw a strip of dots for each row (label, values, colour), and a stroke at their median."""
    values = [value for _, found, _ in rows for value in found]
    low, high = _log_range(values) if log else _range(values)
    place = (_logarithmic if log else _linear)(low, high, _MARGIN + 4, WIDTH - _MARGIN - 4)
    bottom = len(rows) * _ROW + 8
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    parts = _x_axis(ticks, place, 4, bottom, axis)
    for number, (label, found, colour) in enumerate(rows):
        top, middle = number * _ROW + 16, number * _ROW + 28
        middle_one = median(found)
        text = f"median {middle_one:.4g} of {len(found)} layers"
        room = int((WIDTH - 2 * _MARGIN) * _LETTERS) - len(text) - 1
        parts.append(_text(_MARGIN, top, _cut(label, room), "bold halo"))
        parts.append(_text(WIDTH - _MARGIN, top, text, "end small halo"))
        parts += [_dot(place(v), middle, colour, 3, f"{v:.4g}", " pale") for v in found]
        parts.append(
            _line(place(middle_one), middle - 7, place(middle_one), middle + 7, "ink thick")
        )
    return _svg(title, bottom + 40, parts)


def heat_map(title: str, values: Sequence[Sequence[float]], rows: str, columns: str) -> Markup:
    """Draw a k x k map: the darker the more, from zero to the largest; with numbers up to k = 8."""
    k, largest = len(values), max(max(row) for row in values) or 1.0
    left, top, side = 26, 22, 200
    cell = side / k
    parts = [
        _text(left, 14, f"{columns} →", "small"),
        _markup(
            '<g transform="translate(14 {}) rotate(-90)">{}</g>',
            top + side,
            _text(0, 0, f"← {rows}"),
        ),
    ]
    for j, row in enumerate(values):
        for n, value in enumerate(row):
            x, y = left + n * cell, top + j * cell
            parts.append(
                _markup(
                    '<rect class="c0" x="{0:.1f}" y="{1:.1f}" width="{2:.1f}" height="{2:.1f}" '
                    'fill-opacity="{3:.3f}"><title>{4}</title></rect>',
                    x,
                    y,
                    cell,
                    0.04 + 0.56 * value / largest,
                    f"{rows} {j + 1}, {columns} {n + 1}: {value:.4g}",
                )
            )
            if k <= 8:
                text = f"{100 * value:.3g}%" if k <= 4 else f"{100 * value:.2g}"
                size = "middle" if k <= 4 else "middle tiny"
                parts.append(_text(x + cell / 2, y + cell / 2 + 4, text, size))
    return _svg(title, top + side + 8, parts, left + side + 14)


def _markup(template: str, *values: float | str) -> Markup:
    """Fill in a piece of SVG; text is escaped, Markup is not."""
    return Markup(template).format(*(for_html(v) if isinstance(v, str) else v for v in values))


def _svg(title: str, height: float, parts: Sequence[Markup], width: int = WIDTH) -> Markup:
    return _markup(
        '<svg viewBox="0 0 {0} {1:.0f}" role="img" aria-label="{2}" style="max-width:{3:.0f}px">'
        "{4}</svg>",
        width,
        height,
        title,
        1.25 * width,
        Markup("").join(parts),
    )


def _text(x: float, y: float, text: str, style: str = "small") -> Markup:
    return _markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>', style, x, y, text)


def _interval(
    row: Row | ForestRow, place: Callable[[float], float], middle: float, half: float
) -> list[Markup]:
    """A row's interval with bars of twice ``half`` at its ends; empty if it has none."""
    if row.low is None or row.high is None:
        return []
    ends, style = (place(row.low), place(row.high)), f"c{row.colour} thick"
    bars = [_line(x, middle - half, x, middle + half, style) for x in ends]
    return [_line(ends[0], middle, ends[1], middle, style), *bars]


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> Markup:
    return _markup(
        '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>', style, x0, y0, x1, y1
    )


def _dot(x: float, y: float, colour: int, size: float, title: str, style: str = "") -> Markup:
    return _markup(
        '<circle class="c{}{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>',
        colour,
        style,
        x,
        y,
        size,
        title,
    )


#: Dashes and marks, in turn, so that curves differ without colour, too.
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")
_MARKS = ("", "M-4-4H4V4H-4Z", "M0-5.5L5 4H-5Z", "M0-6L5.5 0L0 6L-5.5 0Z")


def _joined(places: Sequence[tuple[float, float]], number: int, colour: int) -> Markup:
    """Draw the line of a curve; nothing for a single point."""
    if len(places) < 2:
        return Markup("")
    return _markup(
        '<polyline class="curve c{}" stroke-dasharray="{}" points="{}"/>',
        colour,
        _DASHES[number % len(_DASHES)],
        " ".join(f"{x:.1f},{y:.1f}" for x, y in places),
    )


def _mark(x: float, y: float, number: int, colour: int, title: str) -> Markup:
    """Draw a point of a curve."""
    path = _MARKS[number % len(_MARKS)]
    if not path:
        return _dot(x, y, colour, 4.5, title)
    return _markup(
        '<path class="c{}" transform="translate({:.1f} {:.1f})" d="{}"><title>{}</title></path>',
        colour,
        x,
        y,
        path,
        title,
    )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def _ends(
    place: Callable[[float], float], interval: tuple[float, float], y: float
) -> tuple[float, float, float, float]:
    return place(interval[0]), y, place(interval[1]), y


def _labels(
    points: Sequence[Point], places: dict[str, tuple[float, float]], left: float
) -> list[Markup]:
    """Names in a column at the right, in the order of the points' heights, a line to each point."""
    parts: list[Markup] = []
    level = -math.inf
    for point in sorted(points, key=lambda p: places[p.label][1]):
        x, y = places[point.label]
        level = max(y, level + 15)
        parts.append(_line(x, y, left - 4, level, f"c{point.colour} thin"))
        shown = _cut(point.label, int((WIDTH - left) * _LETTERS))
        parts.append(_text(left, level + 4, shown, "halo"))
    return parts


def _x_axis(
    ticks: Sequence[tuple[float, str]],
    place: Callable[[float], float],
    top: float,
    bottom: float,
    label: str,
    middle: float = WIDTH / 2,
) -> list[Markup]:
    parts = [_line(place(tick), top, place(tick), bottom, "faint") for tick, _ in ticks]
    parts += [_text(place(tick), bottom + 14, text, "middle small") for tick, text in ticks]
    return [*parts, _text(middle, bottom + 32, label, "middle")]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From least to greatest with some room; never empty."""
    low, high = min(values), max(values)
    rooms = (0.06 * (high - low), 0.05 * abs(high))
    room = next((room for room in rooms if room > _LEAST), 1.0)
    return low - room, high + room


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = _range(list(map(_log10, values)))
    return 10**low, 10**high


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    inner = _linear(math.log10(low), math.log10(high), start, end)
    return lambda value: inner(_log10(value))


def _log10(value: float) -> float:
    return min(max(math.log10(value), -_MOST_POWERS), _MOST_POWERS)


def _ticks(low: float, high: float, wanted: int = 4) -> list[tuple[float, str]]:
    """Round values from low to high, 1, 2 or 5 times a power of ten apart, and their texts."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step), math.floor(high / step)
    ticks = [number * step for number in range(first, last + 1)]
    return [(tick, f"{tick:,.{decimals}f}") for tick in ticks]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = high / low < 30
    ticks = [f * 10.0**power for power in powers for f in ((1, 2, 5) if few else (1,))]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) < 2:
        shown = [tick for tick, _ in _ticks(low, high)]
    return [(tick, _short(tick)) for tick in shown[:: math.ceil(len(shown) / 6)]]


def _short(value: float) -> str:
    for size, trial in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{trial}"
    return f"{value:.3g}"
