"""The curve of a run's loss.

It is drawn with Pillow, which is imported anyway: a plotting library takes two seconds of processor
time to import, a third of what a run needs besides its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

CURVE_NAME = "training_curve.png"
#: Width and height in pixels; left, top, right and bottom of the axes.
_SIZE, _AXES = (840, 480), (80, 20, 820, 420)
#: It is drawn larger by this factor and reduced, because Pillow's lines have hard edges.
_FINER = 2
_LINE, _FAINT, _GRID, _INK = "#1f77b4", "#c7dced", "#dddddd", "#222222"

Point = tuple[float, float]


def plot_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the loss over the steps: each step faintly, with a running mean on top.

    Args:
        rows: at least one, each with "step" and "loss", a finite number.
    """
    # a damaged file may hold numbers of any size
    steps = [max(0, min(row["step"], 2**53)) for row in rows]
    losses = [min(float(row["loss"]), 1e300) for row in rows]
    width = max(1, len(rows) // 20)
    sums = [0.0, *accumulate(losses)]
    starts = [max(0, end - width) for end in range(1, len(sums))]
    means = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
    plot = _Plot(min(steps), max(steps), 1.05 * max(losses))
    plot.line(steps, losses, _FAINT, 1)
    plot.line(steps, means, _LINE, 2)
    plot.legend([("each step", _FAINT, 1), (f"mean of the last {width}", _LINE, 2)])
    plot.image.reduce(_FINER).save(path)


class _Plot:
    """An image with axes: steps from ``first`` to ``last``, losses from 0 to ``top``."""

    def __init__(self, first: int, last: int, top: float) -> None:
        self.first, self.steps = first, max(1, last - first)
        self.top = top if top > 1e-300 else 1.0
        self.image = Image.new("RGB", (_SIZE[0] * _FINER, _SIZE[1] * _FINER), "white")
        self.draw = ImageDraw.Draw(self.image)
        left, up, right, down = _AXES
        for tick in _ticks(0, self.top):
            y = self.place(first, tick)[1]
            self._stroke([(left, y), (right, y)], _GRID, 1)
            self._text((left - 8, y), f"{tick:.4g}", "rm")
        for tick in _ticks(first, first + self.steps):
            if tick == floor(tick):
                x = self.place(tick, 0)[0]
                self._stroke([(x, up), (x, down)], _GRID, 1)
                self._text((x, down + 8), f"{tick:.0f}", "mt")
        self._stroke([(left, up), (right, up), (right, down), (left, down), (left, up)], _INK, 1)
        self._text(((left + right) / 2, _SIZE[1] - 10), "optimizer step", "mb")
        self._text((left, 4), "training loss", "lt")

    def place(self, step: float, loss: float) -> Point:
        """Return where a value lies, in pixels; what is below zero lies on the axis."""
        left, up, right, down = _AXES
        height = max(0.0, loss / self.top) * (down - up)
        return left + (step - self.first) / self.steps * (right - left), down - height

    def line(self, steps: Sequence[int], losses: Sequence[float], color: str, width: int) -> None:
        points = [self.place(*point) for point in zip(steps, losses, strict=True)]
        self._stroke(points if len(points) > 1 else points * 2, color, width)
        if len(points) == 1:
            x, y = points[0]
            self._stroke([(x - 3, y), (x + 3, y)], color, 4)

    def legend(self, entries: Sequence[tuple[str, str, int]]) -> None:
        right, up = _AXES[2] - 200, _AXES[1] + 16
        for number, (name, color, width) in enumerate(entries):
            y = up + 20 * number
            self._stroke([(right, y), (right + 28, y)], color, width)
            self._text((right + 36, y), name, "lm")

    def _stroke(self, points: Sequence[Point], color: str, width: int) -> None:
        finer = [(x * _FINER, y * _FINER) for x, y in points]
        self.draw.line(finer, color, width * _FINER, joint="curve")

    def _text(self, place: Point, text: str, anchor: str) -> None:
        font = ImageFont.load_default(14 * _FINER)
        self.draw.text((place[0] * _FINER, place[1] * _FINER), text, _INK, font, anchor)


def _ticks(low: float, high: float) -> list[float]:
    """Return up to nine round numbers from ``low`` to ``high``, which is more."""
    rough = (high - low) / 8
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(ceil(low / step), floor(high / step) + 1)]
