"""Curves over the steps of runs, as SVG in the colors of the page. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from gralora_diffusion.adapters.placement.layer_config import is_finite_number
from gralora_diffusion.io.templates import for_html

_WIDTH, _HEIGHT = 360, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 352, 10, 126
#: Points of a curve at most; a curve is not wider in pixels.
_MOST_POINTS = 300
#: Larger numbers are not drawn: their sums and differences are not finite.
_MOST = 1e300


@dataclass(frozen=True)
class Curve:
    """Points (step, value) of one run; ``number`` chooses the color."""

    label: str
    points: Sequence[tuple[float, float]]
    number: int = 0


def numbers_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return (step, number) for the steps that have a finite number of this name.

    Numbers beyond what can be drawn are left out.

    Args:
        name: a key of a row, or of its "performance".
    """
    found = []
    for row in rows:
        performance = row.get("performance")
        inner = performance.get(name) if isinstance(performance, Mapping) else None
        value = row.get(name, inner)
        if is_finite_number(value) and abs(value) <= _MOST:
            found.append((float(row["step"]), float(value)))
    return found


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the means over the last twentieth of all points, as in the run's own plot."""
    width = max(1, len(points) // 20)
    sums = [0.0, *accumulate(value for _, value in points)]
    return [
        (step, (sums[end] - sums[max(0, end - width)]) / (end - max(0, end - width)))
        for end, (step, _) in enumerate(points, start=1)
    ]


def plot(title: str, curves: Sequence[Curve], faint: Sequence[Curve] = ()) -> Markup:
    """Draw curves with their last values; ``faint`` ones are drawn behind them."""
    points = [point for curve in (*curves, *faint) for point in curve.points]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(ys), max(ys)
    if y_high - y_low < 1e-12 * max(abs(y_high), 1e-300):
        room = abs(y_high) * 0.1 or 1.0
        y_low, y_high = y_low - room, y_high + room

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_RIGHT - _LEFT)
        down = _BOTTOM - (y - y_low) / (y_high - y_low) * (_BOTTOM - _TOP)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for share in (0.0, 0.5, 1.0):
        value = y_low + share * (y_high - y_low)
        level = _BOTTOM - share * (_BOTTOM - _TOP)
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{level}" y2="{level}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{level + 4}" class="end">{_short(value)}</text>')
    for x, side in ((x_low, "start"), (x_high, "end")):
        where = _LEFT if side == "start" else _RIGHT
        parts.append(f'<text x="{where}" y="{_BOTTOM + 16}" class="{side}">{x:g}</text>')
    middle = (_LEFT + _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_BOTTOM + 16}" class="middle">step</text>')
    for curve, kind in [*((c, "faint") for c in faint), *((c, "curve") for c in curves)]:
        if len(curve.points) == 1:  # a line to itself is a dot
            curve, kind = replace(curve, points=[*curve.points] * 2), f"{kind} point"
        line = " ".join(place(x, y) for x, y in _thinned(curve.points))
        parts.append(f'<polyline points="{line}" class="{kind} c{curve.number % 4}"/>')
    last = Markup(", ").join(
        Markup('<b class="c{}">{}</b>').format(c.number % 4, _short(c.points[-1][1]))
        for c in curves
        if c.points
    )
    head = Markup("{} {}").format(title, last)
    view = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
    body = Markup("".join(parts))  # numbers only
    return Markup("<figure class='plot'><figcaption>{}</figcaption>").format(head) + Markup(
        f"<svg {view} aria-label='{for_html(title)}'>{body}</svg></figure>"
    )


def legend(labels: Sequence[str]) -> Markup:
    """Return the names of several runs in the colors of their curves."""
    items = [
        Markup('<span class="key c{}">{}</span>').format(n % 4, for_html(label))
        for n, label in enumerate(labels)
    ]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the smallest and the largest of each part, so that no peak is lost."""
    size = math.ceil(len(points) / (_MOST_POINTS / 2))
    if size <= 1:
        return list(points)
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def _short(value: float) -> str:
    return f"{value:.3g}"
