"""The pen that draws the tiny world, its colors, and the registries of its drawings."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import ImageDraw

SIZE = 64  # pixels per side of a finished image
OVERSAMPLING = 4  # images are drawn this many times larger, then box-filtered
CANVAS = SIZE * OVERSAMPLING

RGB = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, RGB] = {
    "red": (222, 40, 40),
    "orange": (248, 140, 24),
    "yellow": (250, 218, 50),
    "green": (50, 165, 62),
    "blue": (40, 96, 222),
    "purple": (140, 62, 190),
    "pink": (248, 140, 186),
    "white": (244, 244, 240),
}
WHITE, CREAM, BLACK, GREY = (250, 250, 250), (250, 232, 200), (28, 26, 32), (120, 124, 134)
BROWN, GLASS, METAL, TEAL = (128, 82, 44), (176, 222, 244), (176, 184, 196), (20, 176, 168)
AMBER, LEAF = (255, 170, 30), (70, 160, 60)


def shade(colour: RGB, factor: float) -> RGB:
    """Darken a color (factor < 1) or lighten it towards white (factor > 1)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(round(c + (255 - c) * (factor - 1)) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws outlined flat shapes in object units: the object fills -1..1 on both axes, y down."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, colour: RGB, centre: Point, radius: float
    ) -> None:
        self.draw, self.centre, self.radius = (
            draw,
            centre,
            radius,
        )  # centre and radius in canvas pixels
        self.main, self.dark, self.light = colour, shade(colour, 0.68), shade(colour, 1.45)
        self.outline = shade(colour, 0.3)
        self.width = 1.5 * OVERSAMPLING  # of outlines, in canvas pixels

    def at(self, x: float, y: float) -> Point:
        return self.centre[0] + x * self.radius, self.centre[1] + y * self.radius

    def polygon(self, points: list[Point], fill: RGB | None = None, outline: bool = True) -> None:
        corners = [self.at(x, y) for x, y in points]
        self.draw.polygon(corners, fill=fill or self.main)
        if outline:
            path = [*corners, corners[0], corners[1]]
            self.draw.line(path, fill=self.outline, width=round(self.width), joint="curve")

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: RGB | None = None,
        outline: bool = True,
    ) -> None:
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        width = round(self.width) if outline else 0
        self.draw.ellipse(box, fill=fill or self.main, outline=self.outline, width=width)

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        fill: RGB | None = None,
        outline: bool = True,
        corner: float = 0.0,
    ) -> None:
        """Draw a rectangle with corners of radius `corner` (object units)."""
        self.draw.rounded_rectangle(
            (*self.at(left, top), *self.at(right, bottom)),
            radius=corner * self.radius,
            fill=fill or self.main,
            outline=self.outline,
            width=round(self.width) if outline else 0,
        )

    def pie(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        fill: RGB | None = None,
    ) -> None:
        """Draw a slice of an ellipse; angles are in degrees, clockwise from three o'clock."""
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        self.draw.pieslice(
            box, start, end, fill=fill or self.main, outline=self.outline, width=round(self.width)
        )

    def arc(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        width: float,
        fill: RGB,
    ) -> None:
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        self.draw.arc(box, start, end, fill=fill, width=round(width * self.radius))

    def line(self, points: list[Point], width: float, fill: RGB | None = None) -> None:
        corners = [self.at(x, y) for x, y in points]
        line_width = round(width * self.radius)
        self.draw.line(corners, fill=fill or self.outline, width=line_width, joint="curve")


Drawing = Callable[[Pen], None]
Scenery = Callable[[ImageDraw.ImageDraw, random.Random], None]
OBJECTS: dict[str, Drawing] = {}
SUBJECTS: dict[str, tuple[RGB, Drawing]] = {}
BACKGROUNDS: dict[str, Scenery] = {}


def thing(name: str) -> Callable[[Drawing], Drawing]:
    """Register an object of the training world under the noun in its captions."""

    def register(function: Drawing) -> Drawing:
        if name in OBJECTS:
            raise ValueError(f"object {name!r} is registered twice")
        OBJECTS[name] = function
        return function

    return register


def subject(name: str, colour: RGB) -> Callable[[Drawing], Drawing]:
    """Register a subject that the base must never see."""

    def register(function: Drawing) -> Drawing:
        SUBJECTS[name] = (colour, function)
        return function

    return register


def scene(phrase: str) -> Callable[[Scenery], Scenery]:
    """Register a background under the phrase that ends a caption."""

    def register(function: Scenery) -> Scenery:
        BACKGROUNDS[phrase] = function
        return function

    return register
