"""Random masks for inpainting, in the manner of the published trainings.

A quarter of the masks are the whole image, as for Stable Diffusion's inpainting models (their model
cards). The others are rectangles or strokes, half of the time each, as for LaMa (arXiv 2109.07161),
whose sizes are for 256 x 256 pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_WHOLE, _RECTANGLES = 1 / 4, 5 / 8
#: Pixels per side that the sizes below are for.
_SIDE = 256
_RECTANGLE_SIDES, _MOST_RECTANGLES, _MARGIN = (30, 150), 4, 10
_MOST_STROKES, _MOST_TURNS, _LENGTH, _WIDTH, _BEND = 5, 4, 200, 100, 4.0


def random_mask(height: int, width: int, random: torch.Generator) -> Tensor:
    """Return a mask (1, height, width), which is 1 where to fill and 0 elsewhere."""
    kind = float(torch.rand((), generator=random))
    if kind < _WHOLE:
        return torch.ones(1, height, width)
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    scale = min(height, width) / _SIDE
    (_rectangles if kind < _RECTANGLES else _strokes)(pen, width, height, scale, random)
    return torch.from_numpy(np.array(mask))[None].float() / 255


def _rectangles(
    pen: ImageDraw.ImageDraw, width: int, height: int, scale: float, random: torch.Generator
) -> None:
    margin, (least, most) = _MARGIN * scale, _RECTANGLE_SIDES
    for _ in range(_whole(1, _MOST_RECTANGLES, random)):
        sides = [_number(least * scale, most * scale, random) for _ in range(2)]
        left = _number(margin, max(margin, width - margin - sides[0]), random)
        top = _number(margin, max(margin, height - margin - sides[1]), random)
        pen.rectangle((left, top, left + sides[0], top + sides[1]), fill=255)


def _strokes(
    pen: ImageDraw.ImageDraw, width: int, height: int, scale: float, random: torch.Generator
) -> None:
    for _ in range(_whole(1, _MOST_STROKES, random)):
        x, y = _number(0, width, random), _number(0, height, random)
        for turn in range(_whole(1, _MOST_TURNS, random)):
            angle = _number(0.01, _BEND, random) + (math.pi if turn % 2 == 0 else 0)
            length = _number(10 * scale, _LENGTH * scale, random)
            brush = max(1.0, _number(5 * scale, _WIDTH * scale, random))
            end = (
                min(max(x + length * math.sin(angle), 0), width),
                min(max(y + length * math.cos(angle), 0), height),
            )
            pen.line((x, y, *end), fill=255, width=round(brush))
            for cx, cy in ((x, y), end):  # round ends
                r = brush / 2
                pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
            x, y = end


def _number(least: float, most: float, random: torch.Generator) -> float:
    return least + (most - least) * float(torch.rand((), generator=random))


def _whole(least: int, most: int, random: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (), generator=random))
