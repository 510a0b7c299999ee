"""Every object, background and subject of the tiny world, each one small drawing function.

To add an object, write a function that takes a `Pen` and decorate it with `@thing("name")`: the
object fills -1..1 on both axes (y down), `p.main` is the colour its caption names. To add a
background, decorate a function with `@scene("on the moon")`: it paints the whole canvas. Captions
and sampling follow from the registries.
"""

from __future__ import annotations

import random

from PIL import ImageDraw
from tiny_pen import (
    BLACK,
    BROWN,
    CANVAS,
    CREAM,
    GLASS,
    GREY,
    METAL,
    OVERSAMPLING,
    RGB,
    TEAL,
    WHITE,
    Pen,
    scene,
    shade,
    subject,
    thing,
)


@thing("car")
def _car(p: Pen) -> None:
    p.polygon([(-0.6, -0.02), (-0.36, -0.56), (0.34, -0.56), (0.62, -0.02)])
    p.polygon([(-0.4, -0.06), (-0.26, -0.42), (-0.04, -0.42), (-0.04, -0.06)], GLASS, outline=False)
    p.polygon([(0.08, -0.06), (0.08, -0.42), (0.26, -0.42), (0.42, -0.06)], GLASS, outline=False)
    p.box(-1, -0.08, 1, 0.42, corner=0.18)
    p.box(-0.9, 0.2, 0.9, 0.34, p.dark, outline=False)
    p.ellipse(0.86, 0.08, 0.1, 0.1, CREAM, outline=False)
    for x in (-0.54, 0.54):
        p.ellipse(x, 0.42, 0.28, 0.28, BLACK)
        p.ellipse(x, 0.42, 0.12, 0.12, METAL, outline=False)


@thing("cat")
def _cat(p: Pen) -> None:
    for s in (-1, 1):
        p.polygon([(s * 0.86, -0.98), (s * 0.86, -0.05), (s * 0.2, -0.55)])
        p.polygon([(s * 0.7, -0.7), (s * 0.7, -0.35), (s * 0.42, -0.5)], p.dark, outline=False)
    p.ellipse(0, 0.12, 0.92, 0.78)
    p.ellipse(0, 0.5, 0.46, 0.3, p.light, outline=False)
    for s in (-1, 1):
        p.ellipse(s * 0.4, -0.02, 0.19, 0.24, WHITE)
        p.ellipse(s * 0.4, 0.02, 0.09, 0.17, BLACK, outline=False)
    p.polygon([(-0.13, 0.3), (0.13, 0.3), (0, 0.46)], BLACK, outline=False)


@thing("house")
def _house(p: Pen) -> None:
    p.box(0.38, -0.95, 0.64, -0.3, p.dark)
    p.box(-0.76, -0.2, 0.76, 0.95, CREAM)
    p.polygon([(-1, -0.1), (0, -0.98), (1, -0.1)])
    p.box(-0.2, 0.32, 0.24, 0.93)
    p.box(-0.62, 0.12, -0.32, 0.44, GLASS)
    p.box(0.36, 0.12, 0.64, 0.44, GLASS)


@thing("mushroom")
def _mushroom(p: Pen) -> None:
    p.box(-0.36, -0.1, 0.36, 0.95, CREAM, corner=0.2)
    p.pie(0, 0.1, 0.98, 1.05, 180, 360)
    p.ellipse(0, -0.56, 0.24, 0.22, WHITE, outline=False)
    p.ellipse(-0.56, -0.2, 0.2, 0.18, WHITE, outline=False)
    p.ellipse(0.56, -0.2, 0.2, 0.18, WHITE, outline=False)


@thing("rocket")
def _rocket(p: Pen) -> None:
    p.polygon([(-0.26, 0.6), (0, 1), (0.26, 0.6)], (255, 170, 30), outline=False)
    for s in (-1, 1):
        p.polygon([(s * 0.3, 0.02), (s * 0.76, 0.5), (s * 0.72, 0.86), (s * 0.3, 0.6)], p.dark)
    p.polygon(
        [
            (0, -1),
            (0.26, -0.68),
            (0.42, -0.2),
            (0.4, 0.62),
            (-0.4, 0.62),
            (-0.42, -0.2),
            (-0.26, -0.68),
        ]
    )
    p.ellipse(0, -0.18, 0.24, 0.24, GLASS)
    p.box(-0.36, 0.36, 0.36, 0.54, WHITE, outline=False)


@thing("boat")
def _boat(p: Pen) -> None:
    p.line([(0, -0.98), (0, 0.3)], 0.12, BROWN)
    p.polygon([(0.1, -0.9), (0.1, 0.16), (0.84, 0.16)], WHITE)
    p.polygon([(-0.12, -0.7), (-0.12, 0.16), (-0.7, 0.16)], p.light)
    p.polygon([(-1, 0.32), (1, 0.32), (0.62, 0.92), (-0.62, 0.92)])
    p.polygon([(-0.78, 0.62), (0.78, 0.62), (0.6, 0.84), (-0.6, 0.84)], p.dark, outline=False)


@thing("tree")
def _tree(p: Pen) -> None:
    p.box(-0.17, 0.2, 0.17, 1, BROWN)
    for x, y in ((-0.44, 0.02), (0.44, 0.02), (0, -0.42)):
        p.ellipse(x, y, 0.52, 0.5)
    p.ellipse(0, -0.06, 0.5, 0.4, outline=False)
    p.ellipse(0.36, 0.18, 0.3, 0.2, p.dark, outline=False)
    p.ellipse(-0.1, -0.56, 0.22, 0.18, p.light, outline=False)


@thing("umbrella")
def _umbrella(p: Pen) -> None:
    p.line([(0, -0.2), (0, 0.74)], 0.13, BROWN)
    p.arc(0.18, 0.72, 0.25, 0.25, 0, 180, 0.13, BROWN)
    p.pie(0, 0.1, 1, 1, 180, 360)
    p.pie(0, 0.1, 0.42, 1, 180, 360, p.light)


@thing("star")
def _star(p: Pen) -> None:
    tips = [(0, -1), (0.95, -0.31), (0.59, 0.81), (-0.59, 0.81), (-0.95, -0.31)]
    dips = [(0.3, -0.4), (0.47, 0.16), (0, 0.5), (-0.47, 0.16), (-0.3, -0.4)]
    p.polygon([corner for pair in zip(tips, dips, strict=True) for corner in pair])
    p.ellipse(-0.1, -0.12, 0.16, 0.16, p.light, outline=False)


@thing("heart")
def _heart(p: Pen) -> None:
    upper = [(0, -0.5), (0.22, -0.76), (0.5, -0.84), (0.78, -0.72), (0.95, -0.4), (0.92, -0.08)]
    lower = [(0.6, 0.36), (0, 0.92)]
    right = upper + lower
    p.polygon(right + [(-x, y) for x, y in reversed(right[1:-1])])
    p.ellipse(-0.46, -0.4, 0.2, 0.18, p.light, outline=False)


def _fill(
    draw: ImageDraw.ImageDraw, colour: RGB, rng: random.Random, top: float = 0, bottom: float = 1
) -> None:
    """Fill a horizontal band (fractions of the canvas) with the colour, slightly varied."""
    varied = shade(colour, rng.uniform(0.95, 1.04))
    draw.rectangle((0, top * CANVAS, CANVAS, bottom * CANVAS), fill=varied)


def _blob(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
    """An ellipse without outline; everything in fractions of the canvas."""
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


@subject("robot", METAL)
def _robot(p: Pen) -> None:
    orange = (250, 120, 20)
    p.ellipse(0, -0.84, 0.17, 0.17, orange)
    for s in (-1, 1):
        p.box(min(s * 0.56, s * 0.92), 0.1, max(s * 0.56, s * 0.92), 0.6, orange, corner=0.1)
        p.box(min(s * 0.1, s * 0.46), 0.66, max(s * 0.1, s * 0.46), 1, GREY)
    p.box(-0.52, 0, 0.52, 0.74)
    p.box(-0.78, -0.74, 0.78, 0.06, TEAL, corner=0.1)
    for s in (-1, 1):
        p.ellipse(s * 0.36, -0.36, 0.25, 0.25, WHITE, outline=False)
        p.ellipse(s * 0.36, -0.36, 0.12, 0.12, BLACK, outline=False)
    p.ellipse(0, 0.38, 0.2, 0.2, orange)
