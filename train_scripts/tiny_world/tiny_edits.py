"""Pairs of images of the tiny world that show an edit: recolor the object, change the background,
add a hat.

Both images of a pair have the same object in the same place, and everything that the instruction
does not name is the same, pixel by pixel. `LESSONS` are edits that the tiny edit base never sees,
for an adapter to learn. This command writes the pairs of one as a training folder:

    python train_scripts/tiny_world/tiny_edits.py space runs/space
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_world
from PIL import Image, ImageDraw
from tiny_pen import BACKGROUNDS, BLACK, CANVAS, COLOURS, OBJECTS, OVERSAMPLING, WHITE, Drawing, Pen

#: Edits that the tiny edit base is trained on.
KINDS = ("colour", "background", "hat")
#: Name of an edit that no base has seen -> its instruction.
LESSONS = {"glasses": "add glasses", "space": "put it in space"}
_SCARLET = (206, 30, 44)


@dataclass(frozen=True)
class Scene:
    """An object on a background. Seed and description determine every pixel.

    Attributes:
        seed: of the background's details and of the object's place.
        extras: what is drawn over the object, in its own coordinates.
    """

    name: str
    colour: str
    background: str
    seed: str
    extras: tuple[Drawing, ...] = ()

    def draw(self) -> Image.Image:
        """Draw the scene as a 64x64 RGB image."""
        image = Image.new("RGB", (CANVAS, CANVAS))
        draw = ImageDraw.Draw(image)
        painters = {**BACKGROUNDS, "in space": space}
        painters[self.background](draw, random.Random(f"{self.seed}/background"))
        place = random.Random(f"{self.seed}/place")
        radius = CANVAS * place.uniform(0.3, 0.34)  # smaller than alone: a hat needs room
        centre = (CANVAS * place.uniform(0.46, 0.54), CANVAS * place.uniform(0.56, 0.6))
        for drawing in (OBJECTS[self.name], *self.extras):
            drawing(Pen(draw, COLOURS[self.colour], centre, radius))
        return image.reduce(OVERSAMPLING)


@dataclass(frozen=True)
class Edit:
    """A pair of scenes and the instruction that leads from one to the other."""

    before: Scene
    after: Scene
    instruction: str


def hat(p: Pen) -> None:
    """Draw a black top hat with a red band on the object."""
    p.box(-0.34, -1.36, 0.34, -0.66, BLACK)
    p.box(-0.34, -0.92, 0.34, -0.74, _SCARLET, outline=False)
    p.box(-0.62, -0.76, 0.62, -0.6, BLACK)


def glasses(p: Pen) -> None:
    """Draw round glasses with white lenses on the object."""
    for side in (-1, 1):
        p.ellipse(side * 0.36, -0.1, 0.33, 0.33, BLACK)
        p.ellipse(side * 0.36, -0.1, 0.21, 0.21, WHITE, outline=False)
    p.box(-0.08, -0.16, 0.08, -0.04, BLACK, outline=False)


def space(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """Paint a violet sky full of stars, with a ringed planet in a corner."""
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=(52, 20, 84))

    def ellipse(x: float, y: float, rx: float, ry: float, **colours: Any) -> None:
        draw.ellipse([c * CANVAS for c in (x - rx, y - ry, x + rx, y + ry)], **colours)

    for number in range(24):
        x, y = (number % 6 + rng.uniform(0.2, 0.8)) / 6, (number // 6 + rng.uniform(0.2, 0.8)) / 4
        ellipse(x, y, 0.014, 0.014, fill=(255, 240, 200))
    x, y = rng.choice((0.14, 0.86)), rng.uniform(0.1, 0.16)
    ellipse(x, y, 0.09, 0.09, fill=(60, 200, 190))
    ellipse(x, y, 0.14, 0.035, outline=(250, 170, 80), width=CANVAS // 40)


def scene(rng: random.Random) -> Scene:
    """Return a random scene of the training world."""
    return Scene(*tiny_world.combination(rng), f"{rng.getrandbits(48)}")


def sample(rng: random.Random, kind: str | None = None) -> Edit:
    """Return a random edit of one of the `KINDS`."""
    before, kind = scene(rng), kind or rng.choice(KINDS)
    if kind == "colour":
        colour = rng.choice(sorted(set(COLOURS) - {before.colour}))
        return Edit(before, replace(before, colour=colour), f"make it {colour}")
    if kind == "background":
        phrase = rng.choice(sorted(set(BACKGROUNDS) - {before.background}))
        return Edit(before, replace(before, background=phrase), f"put it {phrase}")
    return Edit(before, replace(before, extras=(hat,)), "add a hat")


def lesson(rng: random.Random, name: str, objects: Sequence[str]) -> Edit:
    """Return a pair of a lesson, with one of the `objects`."""
    before = replace(scene(rng), name=rng.choice(objects))
    changes = {"extras": (glasses,)} if name == "glasses" else {"background": "in space"}
    return Edit(before, replace(before, **changes), LESSONS[name])


def lesson_objects(held_out: bool) -> list[str]:
    """Return the objects that an adapter learns a lesson with, or those it is tested with."""
    return sorted(OBJECTS)[1::3] if held_out else sorted(set(OBJECTS) - set(sorted(OBJECTS)[1::3]))


def write_lesson(name: str, folder: Path, count: int, held_out: int, seed: int = 0) -> None:
    """Write `count` pairs to train on into `train`, and `held_out` of other objects beside it.

    Images before the edit are in `control`, under the same names.
    """
    for split, pairs in (("train", count), ("held_out", held_out)):
        rng = random.Random(f"{seed}/{split}")
        for part in ("images", "control"):
            (folder / split / part).mkdir(parents=True, exist_ok=True)
        for number in range(pairs):
            edit = lesson(rng, name, lesson_objects(split == "held_out"))
            target = folder / split / "images" / f"{number:02d}.png"
            edit.after.draw().save(target, optimize=True)
            target.with_suffix(".txt").write_text(edit.instruction + "\n", encoding="utf-8")
            edit.before.draw().save(folder / split / "control" / target.name, optimize=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lesson", choices=sorted(LESSONS))
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--count", type=int, default=64, help="pairs to train on")
    parser.add_argument("--held_out", type=int, default=16, help="pairs of other objects")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    write_lesson(args.lesson, args.output_dir, args.count, args.held_out)


if __name__ == "__main__":
    main()
