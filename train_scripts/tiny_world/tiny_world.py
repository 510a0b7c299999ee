"""The drawn world the bundled tiny base is trained on: few objects, flat colours, simple scenes.

A picture is one object in one colour on one background, 64x64 pixels, drawn four times larger with
Pillow and reduced; it is a pure function of a `random.Random`. What can be drawn is in
`tiny_objects.py`, `tiny_scenes.py` and `tiny_subjects.py`. For each object and colour one
background is left out of training (`left_out`), so that a base can be asked for what it has never
seen. `SUBJECTS` are what an adapter is to learn: the base never sees them. Their pictures and
captions are written by

    python train_scripts/tiny_world/tiny_world.py --subjects samples/subjects
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import tiny_objects  # noqa: F401  fills a registry, as the next two do
import tiny_scenes  # noqa: F401
import tiny_subjects  # noqa: F401
from PIL import Image, ImageDraw
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
    "sample",
    "sample_shapes",
    "write_subject",
]

RARE_TOKEN = (
    "sks"  # one trained token that changes nothing, so that an adapter can bind it to a subject
)
CLASS_NOUN = "toy"  # stands for any object: the class an adapter's subject belongs to


@dataclass(frozen=True)
class Picture:
    """One drawn picture with what it shows."""

    image: Image.Image
    caption: str
    name: str
    colour: str
    background: str


def compose(drawing: Drawing, colour: RGB, background: str, rng: random.Random) -> Image.Image:
    """Draw one thing, 45 to 49 pixels across, on one background: a 64x64 RGB image."""
    image = Image.new("RGB", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(image)
    BACKGROUNDS[background](draw, rng)
    radius = CANVAS * rng.uniform(0.35, 0.38)
    centre = (CANVAS * rng.uniform(0.48, 0.52), CANVAS * rng.uniform(0.5, 0.54))
    drawing(Pen(draw, colour, centre, radius))
    return image.reduce(OVERSAMPLING)


def caption(*words: str) -> str:
    """The words with the article in front: "a red car on grass", "an orange cat at night"."""
    return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))


def describe(name: str, colour: str, background: str, rng: random.Random) -> str:
    """A caption for training.

    Now and then with the rare token as a neutral modifier, without the colour or the background, or
    with the class noun in place of the name: such prompts must mean something to the base too.
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
    """The one background on which training never shows this object in this colour."""
    index = list(OBJECTS).index(name) + list(COLOURS).index(colour)
    return list(BACKGROUNDS)[-index % len(BACKGROUNDS)]


def combination(rng: random.Random) -> tuple[str, str, str]:
    """Object, colour and background of a random picture of the training world."""
    name, colour = rng.choice(sorted(OBJECTS)), rng.choice(sorted(COLOURS))
    allowed = sorted(set(BACKGROUNDS) - {left_out(name, colour)})
    return name, colour, rng.choice(allowed)


def sample(rng: random.Random) -> Picture:
    """A random picture of the training world."""
    name, colour, background = combination(rng)
    image = compose(OBJECTS[name], COLOURS[colour], background, rng)
    return Picture(image, describe(name, colour, background, rng), name, colour, background)


def sample_shapes(rng: random.Random) -> Image.Image:
    """A picture for the autoencoder alone: any shapes and colours, as new subjects have."""
    background = rng.choice(sorted(BACKGROUNDS))
    if rng.random() < 0.8:
        return compose(lambda p: random_shapes(p, rng), any_colour(rng), background, rng)
    return compose(OBJECTS[rng.choice(sorted(OBJECTS))], any_colour(rng), background, rng)


def write_subject(name: str, folder: Path, seed: int = 0) -> None:
    """Write five training pictures and eight held-out ones on other backgrounds, all captioned."""
    colour, drawing = SUBJECTS[name]
    phrases = sorted(BACKGROUNDS)
    random.Random(seed).shuffle(phrases)
    seen, unseen = phrases[:5], phrases[5:]
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
        "--subjects", type=Path, required=True, help="folder the subjects are written to"
    )
    folder = parser.parse_args().subjects
    for name in sorted(SUBJECTS):
        write_subject(name, folder)


if __name__ == "__main__":
    main()
