"""Pairs of images of the tiny world that show an edit: recolor the object, change the background,
add a hat.

Both images of a pair have the same object in the same place, and everything that the instruction
does not name is the same, pixel by pixel. `GLASSES` are an edit that the tiny edit base never
sees, for an adapter to learn. This command writes its pairs as a training folder:

    python train_scripts/tiny_world/tiny_edits.py --glasses runs/glasses
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tiny_world
from PIL import Image, ImageDraw
from tiny_pen import BACKGROUNDS, BLACK, CANVAS, COLOURS, OBJECTS, OVERSAMPLING, WHITE, Drawing, Pen

#: Edits that the tiny edit base is trained on.
KINDS = ("colour", "background", "hat")
GLASSES = "add glasses"
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
        BACKGROUNDS[self.background](draw, random.Random(f"{self.seed}/background"))
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


def glasses_edit(rng: random.Random, names: Sequence[str]) -> Edit:
    """Return the edit that no base has seen, on one of the objects `names`."""
    before = replace(scene(rng), name=rng.choice(names))
    return Edit(before, replace(before, extras=(glasses,)), GLASSES)


def glasses_objects(held_out: bool) -> list[str]:
    """Return the objects that an adapter learns the glasses on, or those it is tested on."""
    return sorted(OBJECTS)[1::3] if held_out else sorted(set(OBJECTS) - set(sorted(OBJECTS)[1::3]))


def write_glasses(folder: Path, count: int, seed: int = 0) -> None:
    """Write pairs to train on into `train` and others, on other objects, into `held_out`.

    Images before the edit are in `control`, under the same names.
    """
    for split, held_out in (("train", False), ("held_out", True)):
        rng = random.Random(f"{seed}/{split}")
        for part in ("images", "control"):
            (folder / split / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            edit = glasses_edit(rng, glasses_objects(held_out))
            target = folder / split / "images" / f"{number:02d}.png"
            edit.after.draw().save(target, optimize=True)
            target.with_suffix(".txt").write_text(edit.instruction + "\n", encoding="utf-8")
            edit.before.draw().save(folder / split / "control" / target.name, optimize=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--glasses", type=Path, required=True, help="output folder")
    parser.add_argument("--count", type=int, default=16, help="pairs to train on, and to test")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    write_glasses(args.glasses, args.count)


if __name__ == "__main__":
    main()
