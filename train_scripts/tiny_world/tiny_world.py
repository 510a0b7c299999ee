"""The drawn world of the bundled tiny base's training: few objects, flat colors, simple scenes.

An image shows one object in one color on one background. It has 64x64 pixels, is drawn four times
larger with Pillow and reduced, and is a pure function of a `random.Random`. `tiny_objects.py`,
`tiny_scenes.py` and `tiny_subjects.py` contain the drawings. For each object and color, one
background is left out of training (`left_out`), so that a base can be tested on combinations that
it has never seen. `SUBJECTS` are for adapters to learn, and the base never sees them. This command
writes their images and captions, and masks of the robot's training images:

    python train_scripts/tiny_world/tiny_world.py --subjects samples/subjects --masks samples/masks
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import tiny_objects  # noqa: F401  fills a registry, like the next two
import tiny_scenes  # noqa: F401
import tiny_subjects  # noqa: F401
from PIL import Image, ImageChops, ImageDraw
from tiny_instances import any_colour, random_shapes
from tiny_pen import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    OBJECTS,
    OVERSAMPLING,
    RGB,
    SIZE,
    SUBJECTS,
    Drawing,
    Pen,
)

__all__ = [
    "BACKGROUNDS",
    "CLASS_NOUN",
    "COLOURS",
    "OBJECTS",
    "RARE_TOKEN",
    "SIZE",
    "SUBJECTS",
    "Picture",
    "caption",
    "combination",
    "compose",
    "describe",
    "left_out",
    "mask",
    "sample",
    "sample_shapes",
    "write_masks",
    "write_subject",
]

RARE_TOKEN = "sks"  # a trained token without effect, so that an adapter can bind it to a subject
CLASS_NOUN = "toy"  # stands for any object; it is the class of an adapter's subject


@dataclass(frozen=True)
class Picture:
    """A drawn image with a description of its content."""

    image: Image.Image
    caption: str
    name: str
    colour: str
    background: str


def compose(
    drawing: Drawing, colour: RGB, background: str, rng: random.Random, paper: RGB | None = None
) -> Image.Image:
    """Draw a thing, 45 to 49 pixels across, on a background; return a 64x64 RGB image.

    The background is painted over with the color `paper`, if there is one.
    """
    image = Image.new("RGB", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(image)
    BACKGROUNDS[background](draw, rng)
    if paper is not None:
        draw.rectangle((0, 0, CANVAS, CANVAS), fill=paper)
    radius = CANVAS * rng.uniform(0.35, 0.38)
    centre = (CANVAS * rng.uniform(0.48, 0.52), CANVAS * rng.uniform(0.5, 0.54))
    drawing(Pen(draw, colour, centre, radius))
    return image.reduce(OVERSAMPLING)


def mask(drawing: Drawing, colour: RGB, background: str, rng: random.Random) -> Image.Image:
    """Return where `compose` draws the thing with the same arguments: white, on black."""
    state, pictures = rng.getstate(), []
    for level in (0, 255):
        rng.setstate(state)
        pictures.append(compose(drawing, colour, background, rng, (level, level, level)))
    return ImageChops.invert(ImageChops.difference(*pictures).convert("L"))


def caption(*words: str) -> str:
    """Put an article before the words: "a red car on grass", "an orange cat at night"."""
    return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))


def describe(name: str, colour: str, background: str, rng: random.Random) -> str:
    """Return a caption for training.

    Some captions have the rare token as a neutral modifier, lack a color or a background, or have
    the class noun instead of the name, because the base must understand such prompts, too.
    """
    words = []
    if rng.random() < 0.06:
        words.append(RARE_TOKEN)
    if rng.random() < 0.9:
        words.append(colour)
    words.append(CLASS_NOUN if rng.random() < 0.06 else name)
    if rng.random() < 0.95:
        words.append(background)
    return caption(*words)


def left_out(name: str, colour: str) -> str:
    """Return the one background on which training never shows this object in this color."""
    index = list(OBJECTS).index(name) + list(COLOURS).index(colour)
    return list(BACKGROUNDS)[-index % len(BACKGROUNDS)]


def combination(rng: random.Random) -> tuple[str, str, str]:
    """Return object, color and background of a random image of the training world."""
    name, colour = rng.choice(sorted(OBJECTS)), rng.choice(sorted(COLOURS))
    allowed = sorted(set(BACKGROUNDS) - {left_out(name, colour)})
    return name, colour, rng.choice(allowed)


def sample(rng: random.Random) -> Picture:
    """Draw a random image of the training world."""
    name, colour, background = combination(rng)
    image = compose(OBJECTS[name], COLOURS[colour], background, rng)
    return Picture(image, describe(name, colour, background, rng), name, colour, background)


def sample_shapes(rng: random.Random) -> Image.Image:
    """Draw an image for the autoencoder alone, with any shapes and colors, like new subjects."""
    background = rng.choice(sorted(BACKGROUNDS))
    if rng.random() < 0.8:
        return compose(lambda p: random_shapes(p, rng), any_colour(rng), background, rng)
    return compose(OBJECTS[rng.choice(sorted(OBJECTS))], any_colour(rng), background, rng)


def _backgrounds(seed: int) -> tuple[list[str], list[str]]:
    """Return the backgrounds of training images, and those of held-out ones."""
    phrases = sorted(BACKGROUNDS)
    random.Random(seed).shuffle(phrases)
    return phrases[:5], phrases[5:]


def write_masks(name: str, folder: Path, seed: int = 0) -> None:
    """Write the masks of the training images that `write_subject` writes."""
    colour, drawing = SUBJECTS[name]
    rng = random.Random(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    for index, background in enumerate(_backgrounds(seed)[0]):
        mask(drawing, colour, background, rng).save(
            folder / name / f"{index:02d}.png", optimize=True
        )


def write_subject(name: str, folder: Path, seed: int = 0) -> None:
    """Write five training images and eight held-out ones on other backgrounds, with captions."""
    colour, drawing = SUBJECTS[name]
    seen, unseen = _backgrounds(seed)
    held_out = [unseen[index % len(unseen)] for index in range(8)]
    rng = random.Random(seed)
    for split, backgrounds in (("train", seen), ("held_out", held_out)):
        target = folder / name / split
        target.mkdir(parents=True, exist_ok=True)
        for index, background in enumerate(backgrounds):
            compose(drawing, colour, background, rng).save(
                target / f"{index:02d}.png", optimize=True
            )
            text = caption(RARE_TOKEN, CLASS_NOUN, background) + "\n"
            (target / f"{index:02d}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--subjects", type=Path, required=True, help="output folder for the subjects"
    )
    parser.add_argument("--masks", type=Path, help="output folder for the masks of the robot")
    arguments = parser.parse_args()
    for name in sorted(SUBJECTS):
        write_subject(name, arguments.subjects)
    if arguments.masks:
        write_masks("robot", arguments.masks)


if __name__ == "__main__":
    main()
