"""The backgrounds of the tiny world, one small drawing function each.

To add one, decorate a function with `@scene("on the moon")`: it paints the whole canvas.
"""

from __future__ import annotations

import random

from PIL import ImageDraw
from tiny_pen import CANVAS, OVERSAMPLING, RGB, WHITE, scene, shade


def _fill(
    draw: ImageDraw.ImageDraw, colour: RGB, rng: random.Random, top: float = 0, bottom: float = 1
) -> None:
    """Fill a horizontal band (fractions of the canvas) with the color, slightly varied."""
    varied = shade(colour, rng.uniform(0.95, 1.04))
    draw.rectangle((0, top * CANVAS, CANVAS, bottom * CANVAS), fill=varied)


def _blob(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
    """Draw an ellipse without outline; all sizes are fractions of the canvas."""
    draw.ellipse([c * CANVAS for c in (x - rx, y - ry, x + rx, y + ry)], fill=colour)


@scene("on a grey background")
def _grey(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (168, 170, 174), rng)


@scene("on a blue background")
def _blue(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (150, 200, 240), rng)


@scene("on grass")
def _grass(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = rng.uniform(0.34, 0.42)
    _fill(draw, (146, 208, 250), rng)
    _fill(draw, (124, 204, 84), rng, top=horizon)


@scene("on the beach")
def _beach(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (170, 224, 250), rng)
    _fill(draw, (44, 140, 206), rng, top=0.26)
    _fill(draw, (240, 212, 142), rng, top=rng.uniform(0.54, 0.6))


@scene("in the snow")
def _snow(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (168, 188, 216), rng)
    draw.rectangle((0, 0.7 * CANVAS, CANVAS, CANVAS), fill=(246, 249, 253))
    for column in range(4):
        for row in range(3):
            x, y = (column + rng.uniform(0.3, 0.7)) / 4, (row + rng.uniform(0.3, 0.7)) * 0.22
            _blob(draw, x, y, 0.024, 0.024, (250, 252, 255))


@scene("at night")
def _night(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (30, 34, 82), rng)
    _fill(draw, (22, 62, 54), rng, top=0.78)
    x = rng.uniform(0.08, 0.14)
    _blob(draw, x, 0.13, 0.085, 0.085, (250, 244, 190))
    for star in range(4):
        _blob(
            draw,
            0.3 + 0.19 * star + rng.uniform(-0.04, 0.04),
            rng.uniform(0.05, 0.3),
            0.015,
            0.015,
            WHITE,
        )


@scene("at sunset")
def _sunset(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for band, colour in enumerate(((246, 150, 90), (250, 178, 100), (252, 206, 130))):
        _fill(draw, colour, rng, top=band * 0.2)
    _blob(draw, rng.choice((0.18, 0.82)), 0.5, 0.15, 0.15, (255, 244, 176))
    _fill(draw, (104, 66, 110), rng, top=0.62)


@scene("on a brick wall")
def _brick(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (188, 104, 76), rng)
    mortar = (222, 196, 178)
    for row in range(5):
        y = row * CANVAS / 4
        draw.line((0, y, CANVAS, y), fill=mortar, width=2 * OVERSAMPLING)
        for column in range(4):
            x = (column + (0.5 if row % 2 else 0.0)) * CANVAS / 3
            draw.line((x, y, x, y + CANVAS / 4), fill=mortar, width=2 * OVERSAMPLING)


@scene("on stripes")
def _stripes(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (252, 242, 214), rng)
    band = CANVAS / 8
    for stripe in range(4):
        draw.rectangle(
            (2 * stripe * band, 0, (2 * stripe + 1) * band, CANVAS), fill=(156, 206, 196)
        )


@scene("on checks")
def _checks(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _fill(draw, (236, 232, 244), rng)
    cell = CANVAS / 4
    for row in range(4):
        for column in range(row % 2, 4, 2):
            corner = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
            draw.rectangle(corner, fill=(178, 160, 204))
