"""The curve of a run's loss, and of its held-out images.

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

from .metrics import held_out_points, with_loss

CURVE_NAME = "training_curve.png"
#: Width of the image; left and right of the axes, all in pixels.
_WIDTH, _LEFT, _RIGHT = 840, 80, 820
#: Of the loss, and of held-out images below it: the height in pixels, top and bottom of the axes.
_LOSS, _HELD_OUT = (480, 20, 420), (300, 28, 240)
#: It is drawn larger by this factor and reduced, because Pillow's lines have hard edges.
_FINER = 2
_LINE, _FAINT, _GRID, _INK = "#1f77b4", "#c7dced", "#dddddd", "#222222"
_HELD_OUT_LINE, _BAND = "#d62728", "#f3d0d1"
#: Larger numbers are not drawn: their sums and differences are not finite.
_MOST = 1e300

Point = tuple[float, float]


def plot_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the loss over the steps: each step faintly, with a running mean on top.

    Below it, if there are measurements of held-out images, their difference to the frozen base with
    its interval.

    Args:
        rows: each with "step" and "loss", a finite number or None; one of them at least a number.
    """
    trained, measured = with_loss(rows), held_out_points(rows)
    # a damaged file may hold numbers of any size
    steps = [_step(row["step"]) for row in trained]
    losses = [min(float(row["loss"]), _MOST) for row in trained]
    points = [(_step(s), _drawable(m), _drawable(lo), _drawable(hi)) for s, m, lo, hi in measured]
    width = max(1, len(trained) // 20)
    sums = [0.0, *accumulate(losses)]
    starts = [max(0, end - width) for end in range(1, len(sums))]
    means = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
    every = steps + [step for step, *_ in points]
    image = Image.new("RGB", (_WIDTH * _FINER, _height(bool(points)) * _FINER), "white")
    plot = _Plot(image, (min(every), max(every)), (0, 1.05 * max(losses)), _LOSS, "training loss")
    plot.line(steps, losses, _FAINT, 1)
    plot.line(steps, means, _LINE, 2)
    plot.legend([("each step", _FAINT, 1), (f"mean of the last {width}", _LINE, 2)])
    if points:
        _plot_held_out(image, points, (min(every), max(every)))
    image.reduce(_FINER).save(path)


def _plot_held_out(
    image: Image.Image, points: Sequence[tuple[int, float, float, float]], steps: tuple[int, int]
) -> None:
    at, means, lows, highs = (list(values) for values in zip(*points, strict=True))
    # a wide interval of few images would flatten the line; it is cut off instead
    room = 3 * (max([0.0, *means]) - min([0.0, *means])) or max(highs) - min(lows)
    low = max(min([0.0, *lows]), min([0.0, *means]) - room)
    high = min(max([0.0, *highs]), max([0.0, *means]) + room)
    margin = 0.05 * (high - low)
    label = "loss of the held-out images, as a difference to the frozen base"
    values = (low - margin, high + margin)
    plot = _Plot(image, steps, values, _HELD_OUT, label, _LOSS[0])
    plot.band(at, lows, highs, _BAND)
    plot.line(list(steps), [0.0, 0.0], _INK, 1)
    plot.line(at, means, _HELD_OUT_LINE, 2)
    plot.legend([("difference", _HELD_OUT_LINE, 2), ("its 95% interval", _BAND, 8)])


def _height(held_out: bool) -> int:
    return _LOSS[0] + (_HELD_OUT[0] if held_out else 0)


def _step(value: int) -> int:
    return max(0, min(value, 2**53))


def _drawable(value: float) -> float:
    return max(-_MOST, min(value, _MOST))


class _Plot:
    """Axes in an image, of steps and of values.

    Args:
        steps, values: their range.
        place: height of the part of the image; top and bottom of the axes in it.
        offset: where that part begins.
    """

    def __init__(
        self,
        image: Image.Image,
        steps: tuple[int, int],
        values: tuple[float, float],
        place: tuple[int, int, int],
        label: str,
        offset: int = 0,
    ) -> None:
        self.first, self.steps = steps[0], max(1, steps[1] - steps[0])
        self.low, self.range = values[0], values[1] - values[0]
        self.range = self.range if self.range > 1e-300 else 1.0
        self.up, self.down = offset + place[1], offset + place[2]
        self.draw = ImageDraw.Draw(image)
        first, left, right = self.first, _LEFT, _RIGHT
        for tick in _ticks(self.low, self.low + self.range):
            y = self.place(first, tick)[1]
            self._stroke([(left, y), (right, y)], _GRID, 1)
            self._text((left - 8, y), f"{tick:.4g}", "rm")
        for tick in _ticks(first, first + self.steps):
            if tick == floor(tick):
                x = self.place(tick, 0)[0]
                self._stroke([(x, self.up), (x, self.down)], _GRID, 1)
                self._text((x, self.down + 8), f"{tick:.0f}", "mt")
        corners = [(left, self.up), (right, self.up), (right, self.down), (left, self.down)]
        self._stroke([*corners, corners[0]], _INK, 1)
        self._text(((left + right) / 2, offset + place[0] - 10), "optimizer step", "mb")
        self._text((left, self.up - 16), label, "lt")

    def place(self, step: float, value: float) -> Point:
        """Return where a value lies, in pixels; what is outside lies on the edge."""
        height = max(0.0, min(1.0, (value - self.low) / self.range)) * (self.down - self.up)
        return _LEFT + (step - self.first) / self.steps * (_RIGHT - _LEFT), self.down - height

    def line(self, steps: Sequence[int], values: Sequence[float], color: str, width: int) -> None:
        points = [self.place(*point) for point in zip(steps, values, strict=True)]
        self._stroke(points if len(points) > 1 else points * 2, color, width)
        if len(points) == 1:
            x, y = points[0]
            self._stroke([(x - 3, y), (x + 3, y)], color, 4)

    def band(
        self, steps: Sequence[int], lows: Sequence[float], highs: Sequence[float], color: str
    ) -> None:
        """Fill what is between two lines."""
        above = [self.place(*point) for point in zip(steps, highs, strict=True)]
        below = [self.place(*point) for point in zip(steps, lows, strict=True)]
        corners = [*above, *reversed(below)]
        if len(steps) > 1:
            self.draw.polygon([(x * _FINER, y * _FINER) for x, y in corners], color)

    def legend(self, entries: Sequence[tuple[str, str, int]]) -> None:
        right, up = _RIGHT - 200, self.up + 16
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
