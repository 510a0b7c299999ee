"""The objects of the tiny world, one small drawing function each.

To add one, write a function that takes a `Pen` and decorate it with `@thing("name")`. The object
fills -1..1 on both axes (y down), and `p.main` is the color in its caption. Captions and sampling
follow from the registry. A new object should differ from the others in its silhouette, because at
64 pixels such a small base learns outlines sooner than details.
"""

from __future__ import annotations

import math

from tiny_pen import AMBER, BLACK, BROWN, CREAM, GLASS, LEAF, METAL, WHITE, Pen, thing


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


@thing("fish")
def _fish(p: Pen) -> None:
    p.polygon([(0.3, 0), (1, -0.62), (0.84, 0), (1, 0.62)], p.dark)
    p.polygon([(-0.34, -0.4), (0.1, -0.86), (0.4, -0.3)], p.dark)
    p.ellipse(-0.26, 0.04, 0.74, 0.56)
    p.pie(0, 0.1, 0.34, 0.3, -60, 60, p.light)
    p.ellipse(-0.62, -0.1, 0.17, 0.17, WHITE, outline=False)
    p.ellipse(-0.64, -0.1, 0.09, 0.09, BLACK, outline=False)


@thing("flower")
def _flower(p: Pen) -> None:
    p.box(-0.11, 0, 0.11, 1, LEAF, outline=False)
    p.ellipse(-0.4, 0.76, 0.36, 0.2, LEAF)
    p.ellipse(0.4, 0.62, 0.36, 0.2, LEAF)
    for petal in range(6):
        angle = math.radians(60 * petal)
        p.ellipse(0.44 * math.sin(angle), -0.28 - 0.44 * math.cos(angle), 0.3, 0.3)
    p.ellipse(0, -0.28, 0.28, 0.28, BROWN)


@thing("moon")
def _moon(p: Pen) -> None:
    """Draw a crescent as an outer arc and an inner one in the other direction."""
    outer = [math.radians(50 + 13 * step) for step in range(21)]
    inner = [math.radians(290 - 11 * step) for step in range(21)]
    p.polygon(
        [(0.2 + 0.98 * math.cos(a), 0.98 * math.sin(a)) for a in outer]
        + [(0.5 + 0.74 * math.cos(a), 0.74 * math.sin(a)) for a in inner]
    )
    p.ellipse(-0.5, -0.1, 0.13, 0.13, p.dark, outline=False)
    p.ellipse(-0.24, 0.56, 0.12, 0.12, p.dark, outline=False)


@thing("hat")
def _hat(p: Pen) -> None:
    p.polygon([(-0.64, -0.86), (0.64, -0.86), (0.52, 0.6), (-0.52, 0.6)])
    p.box(-0.54, 0.12, 0.54, 0.44, p.dark, outline=False)
    p.ellipse(0, -0.82, 0.64, 0.16, p.light)
    p.box(-1, 0.44, 1, 0.8, corner=0.18)


@thing("duck")
def _duck(p: Pen) -> None:
    p.polygon([(0.5, 0.3), (1, -0.22), (0.9, 0.56)])
    p.polygon([(-0.62, -0.54), (-1, -0.36), (-0.62, -0.22)], AMBER)
    p.ellipse(0.1, 0.42, 0.8, 0.5)
    p.ellipse(-0.34, -0.44, 0.44, 0.44)
    p.ellipse(-0.16, 0.06, 0.28, 0.2, outline=False)
    p.ellipse(0.24, 0.36, 0.4, 0.24, p.dark, outline=False)
    p.ellipse(-0.48, -0.52, 0.1, 0.12, BLACK, outline=False)


@thing("ghost")
def _ghost(p: Pen) -> None:
    dome = [
        (0.78 * math.cos(math.radians(a)), -0.2 + 0.78 * math.sin(math.radians(a)))
        for a in range(180, 361, 15)
    ]
    p.polygon([*dome, (0.78, 0.96), (0.4, 0.64), (0, 0.96), (-0.4, 0.64), (-0.78, 0.96)])
    for s in (-1, 1):
        p.ellipse(s * 0.32, -0.26, 0.17, 0.24, BLACK, outline=False)
    p.ellipse(0, 0.2, 0.2, 0.16, BLACK, outline=False)


@thing("balloon")
def _balloon(p: Pen) -> None:
    """Draw a hot-air balloon."""
    for s in (-1, 1):
        p.line([(s * 0.5, 0.2), (s * 0.2, 0.7)], 0.08, BROWN)
    p.ellipse(0, -0.32, 0.8, 0.66)
    p.ellipse(0, -0.32, 0.36, 0.66, p.light)
    p.box(-0.3, 0.6, 0.3, 1, BROWN, corner=0.08)


@thing("butterfly")
def _butterfly(p: Pen) -> None:
    for s in (-1, 1):
        p.line([(0, -0.4), (s * 0.3, -0.92)], 0.1, BLACK)
        p.ellipse(s * 0.44, 0.5, 0.36, 0.4, p.dark)
        p.ellipse(s * 0.54, -0.22, 0.46, 0.5)
        p.ellipse(s * 0.6, -0.26, 0.2, 0.22, p.light, outline=False)
    p.ellipse(0, 0.1, 0.15, 0.66, BLACK)


@thing("crown")
def _crown(p: Pen) -> None:
    p.polygon([(-0.8, 0.8), (-1, -0.5), (-0.46, 0), (0, -0.76), (0.46, 0), (1, -0.5), (0.8, 0.8)])
    p.box(-0.8, 0.42, 0.8, 0.8, p.dark)
    for x, y in ((-0.92, -0.56), (0, -0.8), (0.92, -0.56)):
        p.ellipse(x, y, 0.17, 0.17, p.light)
    p.ellipse(0, 0.16, 0.16, 0.16, WHITE, outline=False)


@thing("bell")
def _bell(p: Pen) -> None:
    p.ellipse(0, 0.76, 0.22, 0.22, p.dark)
    p.ellipse(0, -0.82, 0.17, 0.17, p.dark)
    p.polygon(
        [
            (-0.3, -0.72),
            (0.3, -0.72),
            (0.56, -0.4),
            (0.62, 0.3),
            (0.94, 0.7),
            (-0.94, 0.7),
            (-0.62, 0.3),
            (-0.56, -0.4),
        ]
    )
    p.box(-0.62, 0.2, 0.62, 0.36, p.dark, outline=False)
    p.box(-0.36, -0.46, -0.18, 0.06, p.light, outline=False)


@thing("apple")
def _apple(p: Pen) -> None:
    p.line([(0, -0.4), (0.08, -1)], 0.15, BROWN)
    p.ellipse(0.42, -0.76, 0.32, 0.17, LEAF)
    for s in (-1, 1):
        p.ellipse(s * 0.34, 0.2, 0.58, 0.7)
    p.ellipse(0, 0.22, 0.5, 0.56, outline=False)
    p.ellipse(-0.46, -0.04, 0.15, 0.22, p.light, outline=False)


@thing("mug")
def _mug(p: Pen) -> None:
    p.arc(0.5, 0.1, 0.5, 0.48, 270, 450, 0.32, p.outline)
    p.arc(0.5, 0.1, 0.44, 0.42, 270, 450, 0.2, p.main)
    p.box(-0.9, -0.7, 0.5, 0.86, corner=0.14)
    p.ellipse(-0.2, -0.66, 0.7, 0.2, BROWN)
    p.box(-0.86, 0.14, 0.46, 0.42, p.light, outline=False)


@thing("key")
def _key(p: Pen) -> None:
    p.box(-0.1, -0.18, 1, 0.18)
    for x in (0.34, 0.74):
        p.box(x, 0.06, x + 0.26, 0.62)
    p.box(0.3, -0.12, 0.94, 0.12, outline=False)
    p.arc(-0.46, 0, 0.56, 0.56, 0, 360, 0.4, p.outline)
    p.arc(-0.46, 0, 0.49, 0.49, 0, 360, 0.26, p.main)


@thing("snail")
def _snail(p: Pen) -> None:
    for x in (-0.9, -0.6):
        p.line([(-0.72, 0.3), (x, -0.36)], 0.12, BLACK)
        p.ellipse(x, -0.36, 0.14, 0.14, BLACK, outline=False)
    p.box(-0.94, 0.02, -0.5, 0.9, CREAM, corner=0.2)
    p.box(-0.94, 0.56, 1, 0.9, CREAM, corner=0.16)
    p.ellipse(0.24, 0, 0.7, 0.68)
    p.ellipse(0.24, 0.04, 0.46, 0.44, p.dark, outline=False)
    p.ellipse(0.3, 0.02, 0.28, 0.26, p.light, outline=False)


@thing("shirt")
def _shirt(p: Pen) -> None:
    right = [(0.3, -0.82), (0.58, -0.82), (1, -0.2), (0.72, 0.04), (0.54, -0.16), (0.54, 0.9)]
    p.polygon(right + [(-x, y) for x, y in reversed(right)])
    p.pie(0, -0.82, 0.32, 0.28, 0, 180, p.dark)
    p.box(-0.51, 0.16, 0.51, 0.44, p.light, outline=False)


@thing("plane")
def _plane(p: Pen) -> None:
    p.polygon([(0.58, -0.1), (0.7, -0.74), (1, -0.74), (0.96, 0.1)], p.dark)
    p.polygon([(-0.2, -0.1), (0.16, -0.66), (0.36, -0.66), (0.26, -0.1)], p.light)
    p.ellipse(0, 0, 1, 0.32)
    p.pie(-0.62, -0.06, 0.28, 0.16, 180, 360, GLASS)
    p.polygon([(-0.24, 0.06), (0.34, 0.06), (0.56, 0.76), (0.28, 0.76)], p.dark)


@thing("gift")
def _gift(p: Pen) -> None:
    for s in (-1, 1):
        p.polygon([(0, -0.48), (s * 0.28, -0.96), (s * 0.62, -0.7)], p.light)
    p.box(-0.8, -0.1, 0.8, 0.96)
    p.box(-0.94, -0.5, 0.94, -0.06)
    p.box(-0.18, -0.46, 0.18, 0.92, p.light, outline=False)
