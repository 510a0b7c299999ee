"""The subjects of the tiny world, which adapters learn and the base must never see.

Each has its own shape and colors. Some are similar to an object of the world (the teapot to the
mug, the lighthouse to the house, the penguin to the duck, the panda to the cat, the tractor to the
car); the others are unlike any of them.
"""

from __future__ import annotations

from tiny_pen import AMBER, BLACK, BROWN, GLASS, GREY, METAL, TEAL, WHITE, Pen, subject

PINK, MAGENTA, NAVY, LIME, SCARLET = (
    (250, 150, 180),
    (214, 40, 140),
    (40, 52, 110),
    (150, 214, 40),
    (220, 36, 36),
)


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


@subject("owl", (120, 78, 160))
def _owl(p: Pen) -> None:
    for s in (-1, 1):
        p.polygon([(s * 0.66, -1), (s * 0.7, -0.4), (s * 0.2, -0.66)])
        p.ellipse(s * 0.26, 0.9, 0.2, 0.12, AMBER)
    p.ellipse(0, 0.12, 0.76, 0.8)
    p.ellipse(0, 0.48, 0.44, 0.4, TEAL)
    for s in (-1, 1):
        p.ellipse(s * 0.34, -0.24, 0.34, 0.34, (250, 226, 70))
        p.ellipse(s * 0.32, -0.24, 0.15, 0.15, BLACK, outline=False)
    p.polygon([(-0.14, -0.06), (0.14, -0.06), (0, 0.24)], AMBER)


@subject("teapot", TEAL)
def _teapot(p: Pen) -> None:
    p.arc(0.62, 0.14, 0.38, 0.44, 250, 470, 0.2, p.dark)
    p.polygon([(-0.4, 0.5), (-1, -0.28), (-0.74, -0.4), (-0.36, 0.02)])
    p.ellipse(0, 0.26, 0.7, 0.62)
    p.box(-0.34, -0.5, 0.34, -0.3, AMBER, corner=0.08)
    p.ellipse(0, -0.62, 0.16, 0.16, AMBER)
    for x, y in ((-0.34, 0.1), (0.3, 0), (0, 0.44)):
        p.ellipse(x, y, 0.16, 0.16, (250, 120, 60), outline=False)


@subject("ufo", MAGENTA)
def _ufo(p: Pen) -> None:
    p.polygon([(-0.3, 0.3), (0.3, 0.3), (0.62, 0.96), (-0.62, 0.96)], (255, 240, 130), False)
    p.ellipse(0, -0.24, 0.5, 0.56, LIME)
    p.ellipse(0.02, -0.34, 0.14, 0.2, BLACK, outline=False)
    p.ellipse(0, 0.14, 1, 0.34)
    for x in (-0.6, 0, 0.6):
        p.ellipse(x, 0.16, 0.14, 0.12, GLASS, outline=False)


@subject("cactus", (40, 150, 90))
def _cactus(p: Pen) -> None:
    p.box(-0.86, -0.4, -0.5, 0.24, corner=0.16)
    p.box(-0.86, 0, -0.1, 0.28, corner=0.12)
    p.box(0.5, -0.6, 0.86, 0.06, corner=0.16)
    p.box(0.1, -0.2, 0.86, 0.08, corner=0.12)
    p.box(-0.28, -0.84, 0.28, 0.6, corner=0.26)
    p.ellipse(0, -0.82, 0.24, 0.18, MAGENTA)
    p.polygon([(-0.6, 0.42), (0.6, 0.42), (0.44, 1), (-0.44, 1)], (206, 104, 60))


@subject("lighthouse", WHITE)
def _lighthouse(p: Pen) -> None:
    p.polygon([(-0.3, -0.4), (0.3, -0.4), (0.5, 0.96), (-0.5, 0.96)])
    p.polygon([(-0.33, -0.14), (0.33, -0.14), (0.38, 0.2), (-0.38, 0.2)], SCARLET, outline=False)
    p.polygon([(-0.43, 0.52), (0.43, 0.52), (0.48, 0.86), (-0.48, 0.86)], SCARLET, outline=False)
    p.polygon([(-0.3, -0.62), (-0.96, -0.84), (-0.96, -0.36)], (255, 236, 90), outline=False)
    p.box(-0.26, -0.76, 0.26, -0.38, (255, 236, 90))
    p.polygon([(-0.4, -0.7), (0, -1), (0.4, -0.7)], NAVY)


@subject("octopus", (226, 84, 60))
def _octopus(p: Pen) -> None:
    for x in (-0.72, -0.26, 0.26, 0.72):
        p.line([(x * 0.6, 0.2), (x * 1.2, 0.92)], 0.3, p.outline)
        p.line([(x * 0.6, 0.2), (x * 1.18, 0.88)], 0.2, p.main)
        p.ellipse(x * 1.16, 0.82, 0.1, 0.1, TEAL, outline=False)
    p.ellipse(0, -0.3, 0.72, 0.68)
    for s in (-1, 1):
        p.ellipse(s * 0.3, -0.14, 0.2, 0.24, (255, 240, 130))
        p.ellipse(s * 0.28, -0.1, 0.09, 0.13, BLACK, outline=False)
    p.ellipse(0, -0.68, 0.2, 0.12, p.light, outline=False)


@subject("tractor", (40, 140, 60))
def _tractor(p: Pen) -> None:
    p.box(-0.66, -0.86, -0.5, -0.1, BLACK)
    p.box(-0.9, -0.2, 0.2, 0.4)
    p.box(0.1, -0.9, 0.76, 0.3, GLASS)
    p.box(0, -1, 0.88, -0.76, SCARLET)
    for x, y, r in ((0.42, 0.44, 0.54), (-0.64, 0.66, 0.32)):
        p.ellipse(x, y, r, r, BLACK)
        p.ellipse(x, y, r * 0.55, r * 0.55, (250, 206, 40), outline=False)


@subject("ladybird", SCARLET)
def _ladybird(p: Pen) -> None:
    for y in (-0.2, 0.2, 0.6):
        p.line([(-0.94, y), (0.94, y)], 0.12, BLACK)
    p.ellipse(0, -0.56, 0.42, 0.38, BLACK)
    p.ellipse(0, 0.2, 0.76, 0.76)
    p.box(-0.06, -0.5, 0.06, 0.9, BLACK, outline=False)
    for s in (-1, 1):
        p.ellipse(s * 0.4, -0.06, 0.17, 0.17, BLACK, outline=False)
        p.ellipse(s * 0.36, 0.46, 0.17, 0.17, BLACK, outline=False)
        p.ellipse(s * 0.18, -0.68, 0.12, 0.12, WHITE, outline=False)


@subject("penguin", NAVY)
def _penguin(p: Pen) -> None:
    for s in (-1, 1):
        p.polygon([(s * 0.4, -0.2), (s * 0.92, 0.5), (s * 0.5, 0.44)])
        p.ellipse(s * 0.28, 0.9, 0.28, 0.12, AMBER)
    p.ellipse(0, 0, 0.62, 0.9)
    p.ellipse(0, 0.26, 0.42, 0.58, WHITE, outline=False)
    for s in (-1, 1):
        p.ellipse(s * 0.22, -0.44, 0.18, 0.2, WHITE, outline=False)
        p.ellipse(s * 0.2, -0.42, 0.08, 0.1, BLACK, outline=False)
    p.polygon([(-0.18, -0.26), (0.18, -0.26), (0, 0.02)], AMBER)
    p.box(-0.5, 0.02, 0.5, 0.24, LIME, corner=0.08)


@subject("panda", WHITE)
def _panda(p: Pen) -> None:
    for s in (-1, 1):
        p.ellipse(s * 0.66, -0.64, 0.32, 0.32, BLACK)
    p.ellipse(0, 0.02, 0.88, 0.8)
    for s in (-1, 1):
        p.ellipse(s * 0.38, -0.06, 0.24, 0.28, BLACK, outline=False)
        p.ellipse(s * 0.36, -0.06, 0.1, 0.1, WHITE, outline=False)
    p.ellipse(0, 0.36, 0.15, 0.1, BLACK, outline=False)
    p.polygon([(-0.08, 0.84), (-0.5, 0.6), (-0.5, 1)], SCARLET)
    p.polygon([(0.08, 0.84), (0.5, 0.6), (0.5, 1)], SCARLET)


@subject("icecream", PINK)
def _icecream(p: Pen) -> None:
    p.polygon([(-0.5, 0.06), (0.5, 0.06), (0, 1)], (222, 164, 84))
    p.ellipse(-0.32, -0.16, 0.4, 0.38, BROWN)
    p.ellipse(0.32, -0.16, 0.4, 0.38, LIME)
    p.ellipse(0, -0.5, 0.42, 0.4)
    p.ellipse(0.06, -0.88, 0.14, 0.14, SCARLET, outline=False)
