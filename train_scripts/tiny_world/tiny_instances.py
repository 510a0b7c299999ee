"""Any number of things that are not objects of the tiny world, each drawn from seeds.

They teach the autoencoder to keep any shape and color, and the encoders that evaluate images to
tell things apart. None of them is a subject.
"""

from __future__ import annotations

import random

from tiny_pen import BLACK, OBJECTS, RGB, WHITE, Drawing, Pen


def any_colour(rng: random.Random) -> RGB:
    """Return any color."""
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def random_shapes(p: Pen, rng: random.Random, paint: random.Random | None = None) -> None:
    """Draw seven to thirteen shapes of any kind and color, later ones smaller, as in toys.

    The colors come from `paint`, or from the same source as the shapes.
    """
    count = rng.randint(7, 13)
    for index in range(count):
        x, y = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8)
        big = 1 - 0.8 * index / count
        rx, ry = (max(0.16, rng.uniform(0.35, 0.95) * big) for _ in range(2))
        fill, outlined = any_colour(paint or rng), rng.random() < 0.7
        kind = rng.randrange(7)
        if kind == 0:
            p.ellipse(x, y, rx, rng.choice((rx, ry)), fill, outlined)
        elif kind in (1, 2):
            corner = rng.choice((0, 0.06, 0.1))
            p.box(x - rx, y - ry, x + rx, y + ry, fill, outlined, corner)
        elif kind == 3:
            points = [(x + rng.uniform(-1, 1) * rx, y + rng.uniform(-1, 1) * ry) for _ in range(3)]
            p.polygon(points, fill, outlined)
        elif kind == 4:
            p.line([(x, y), (x + rng.choice((-rx, rx, 0)), y + ry)], rng.uniform(0.08, 0.16), fill)
        elif kind == 5:  # a bar, such as a mouth
            p.box(x - rx, y - 0.05, x + rx, y + 0.05, rng.choice((fill, BLACK)), outline=False)
        else:  # eyes or buttons
            size, gap = rng.uniform(0.12, 0.24), rng.uniform(0.44, 0.7)
            for side in range(rng.choice((1, 2, 2))):
                p.ellipse(x + side * gap, y, size, size, rng.choice((WHITE, fill)), outlined)
                p.ellipse(x + side * gap, y, size * 0.5, size * 0.5, BLACK, outline=False)


def random_figure(p: Pen, rng: random.Random, paint: random.Random) -> None:
    """Draw a symmetric figure in four colors, with limbs, a body, a head and details."""
    palette = [any_colour(paint) for _ in range(4)]

    def part(x: float, y: float, rx: float, ry: float, kind: int, fill: RGB) -> None:
        for side in (-1, 1) if x else (1,):
            middle = side * x
            if kind == 0:
                p.ellipse(middle, y, rx, ry, fill)
            elif kind == 1:
                p.box(middle - rx, y - ry, middle + rx, y + ry, fill, corner=0.08)
            elif kind == 2:
                p.polygon([(middle - rx, y + ry), (middle, y - ry), (middle + rx, y + ry)], fill)
            else:
                p.polygon([(middle - rx, y - ry), (middle, y + ry), (middle + rx, y - ry)], fill)

    for _ in range(rng.randint(1, 3)):  # limbs, ears, wheels
        rx, ry = rng.uniform(0.14, 0.36), rng.uniform(0.14, 0.4)
        x, y = rng.uniform(0.3, 0.85), rng.uniform(-0.8, 0.8)
        part(x, y, rx, ry, rng.randrange(4), rng.choice(palette[:2]))
    height = rng.uniform(-0.3, 0.4)
    part(0, height, rng.uniform(0.4, 0.85), rng.uniform(0.4, 0.7), rng.randrange(4), palette[0])
    if rng.random() < 0.6:
        part(0, height - 0.6, rng.uniform(0.3, 0.6), 0.36, rng.randrange(3), rng.choice(palette))
    for _ in range(rng.randint(1, 4)):  # bellies, bands, buttons, windows
        x, y = rng.choice((0, 0, rng.uniform(0.2, 0.5))), height + rng.uniform(-0.5, 0.5)
        part(x, y, rng.uniform(0.1, 0.4), rng.uniform(0.1, 0.26), rng.randrange(4), palette[2])
    if rng.random() < 0.6:
        x, y, size = rng.uniform(0.18, 0.4), height + rng.uniform(-0.6, 0), rng.uniform(0.12, 0.26)
        part(x, y, size, size, 0, rng.choice((WHITE, palette[3])))
        for side in (-1, 1):
            p.ellipse(side * x, y, size / 2, size / 2, BLACK, outline=False)


def instance(shape: random.Random, paint: random.Random) -> tuple[Drawing, RGB]:
    """Return a drawing and its main color: an object in any color, a figure, or any shapes.

    `shape` determines the outline and `paint` the colors, so that two things may share one of them.
    """
    kind, seed, paint_seed = shape.randrange(4), shape.getrandbits(48), paint.getrandbits(48)
    if kind == 0:
        return OBJECTS[shape.choice(sorted(OBJECTS))], any_colour(paint)
    draw = random_shapes if kind == 1 else random_figure
    return lambda p: draw(p, random.Random(seed), random.Random(paint_seed)), any_colour(paint)
