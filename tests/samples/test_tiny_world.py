"""The drawn world behind the bundled samples, and the subjects' images as they are bundled."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_base_models
import tiny_instances
import tiny_pen
import tiny_world
from PIL import Image
from tiny_pen import Pen

from tests import ROOT

SUBJECTS = ROOT / "samples" / "subjects"
COMBINATIONS = [(o, c) for o in tiny_world.OBJECTS for c in tiny_world.COLOURS]


def pixels(path: Path) -> np.ndarray:
    image = Image.open(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)


def test_the_world_is_as_wide_as_is_said() -> None:
    assert len(tiny_world.OBJECTS) == 27
    assert len(tiny_world.COLOURS) == 8
    assert len(tiny_world.BACKGROUNDS) == 10
    assert len(tiny_world.SUBJECTS) == 12


def test_no_subject_is_an_object() -> None:
    assert not set(tiny_world.SUBJECTS) & set(tiny_world.OBJECTS)


def test_each_object_and_colour_lacks_one_background_and_all_backgrounds_lack_as_much() -> None:
    lacking = Counter(tiny_world.left_out(*pair) for pair in COMBINATIONS)
    assert set(lacking) == set(tiny_world.BACKGROUNDS)
    assert sum(lacking.values()) == len(COMBINATIONS)
    assert max(lacking.values()) - min(lacking.values()) <= 2


def test_training_never_shows_what_is_left_out_and_shows_all_else() -> None:
    shown = {tiny_world.combination(random.Random(seed)) for seed in range(40_000)}
    every = {(*pair, phrase) for pair in COMBINATIONS for phrase in tiny_world.BACKGROUNDS}
    assert every - shown == {(*pair, tiny_world.left_out(*pair)) for pair in COMBINATIONS}


def test_a_picture_follows_from_its_seed_alone() -> None:
    one, two, other = (tiny_world.sample(random.Random(seed)) for seed in (5, 5, 6))
    assert one.caption == two.caption
    assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))


@pytest.mark.parametrize("name", tiny_world.OBJECTS)
def test_an_object_has_the_colour_of_its_caption_and_keeps_to_its_place(name: str) -> None:
    """Drawn in two colours on plain white: they differ where it is, the margin stays white."""
    drawn = []
    for colour in ("red", "blue"):
        canvas = Image.new("RGB", (256, 256), "white")
        draw = tiny_world.ImageDraw.Draw(canvas)
        pen = Pen(draw, tiny_world.COLOURS[colour], (128, 128), 0.36 * 256)
        tiny_world.OBJECTS[name](pen)
        drawn.append(np.asarray(canvas).astype(float))
        assert (drawn[-1] == tiny_world.COLOURS[colour]).all(axis=-1).mean() > 0.03
    changed = np.abs(drawn[0] - drawn[1]).max(axis=-1) > 40
    assert changed.mean() > 0.1
    margin = np.ones((256, 256), dtype=bool)
    margin[20:-20, 20:-20] = False
    assert (drawn[0][margin] == 255).all()


def silhouette(name: str) -> np.ndarray:
    """Where a drawing differs from the plain ground, on a 64x64 grid."""
    canvas = Image.new("RGB", (256, 256), (1, 2, 3))
    pen = Pen(tiny_world.ImageDraw.Draw(canvas), (200, 60, 60), (128, 128), 0.4 * 256)
    tiny_world.OBJECTS[name](pen)
    return (np.asarray(canvas) != (1, 2, 3)).any(axis=-1)


def test_objects_differ_in_their_silhouettes() -> None:
    outlines = {name: silhouette(name) for name in tiny_world.OBJECTS}
    names = sorted(outlines)
    overlaps = {
        (a, b): (outlines[a] & outlines[b]).sum() / (outlines[a] | outlines[b]).sum()
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    closest = max(overlaps, key=overlaps.__getitem__)
    assert overlaps[closest] < 0.85, closest


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = tiny_base_models.build_tokenizer()
    captions = [tiny_world.caption(c, o, tiny_world.left_out(o, c)) for o, c in COMBINATIONS]
    captions += [
        tiny_world.caption(tiny_world.RARE_TOKEN, tiny_world.CLASS_NOUN, phrase)
        for phrase in tiny_world.BACKGROUNDS
    ]
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2
        assert tokenizer.decode(ids[1:-1]) == caption


def test_an_instance_keeps_its_shape_in_other_colours() -> None:
    for seed in range(20):
        views = []
        for paint in (1, 1, 2):
            drawing, colour = tiny_instances.instance(random.Random(seed), random.Random(paint))
            phrase = "on a grey background"
            image = tiny_world.compose(drawing, colour, phrase, random.Random(0))
            views.append(np.asarray(image).astype(float))
        assert np.array_equal(views[0], views[1])
        assert np.abs(views[0] - views[2]).max() > 20
        outside = [np.abs(view - view[0, 0]).max(axis=-1) < 3 for view in views]
        assert (outside[0] == outside[2]).mean() > 0.9


@pytest.mark.parametrize("name", tiny_world.SUBJECTS)
def test_the_bundled_pictures_of_a_subject_are_what_the_script_draws(
    name: str, tmp_path: Path
) -> None:
    tiny_world.write_subject(name, tmp_path)
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert drawn == sorted(path.relative_to(SUBJECTS) for path in (SUBJECTS / name).rglob("*.*"))
    assert len(drawn) == 2 * (5 + 8)
    for path in drawn:
        if path.suffix == ".png":
            assert np.abs(pixels(tmp_path / path) - pixels(SUBJECTS / path)).max() <= 2
        else:
            assert (tmp_path / path).read_text() == (SUBJECTS / path).read_text()


@pytest.mark.parametrize("name", tiny_world.SUBJECTS)
def test_a_subject_is_held_out_on_backgrounds_it_is_not_trained_on(name: str) -> None:
    captions = {
        split: {path.read_text().strip() for path in (SUBJECTS / name / split).glob("*.txt")}
        for split in ("train", "held_out")
    }
    assert len(captions["train"]) == 5
    assert len(captions["held_out"]) == 5
    assert not captions["train"] & captions["held_out"]
    assert captions["train"] | captions["held_out"] == {
        f"a sks toy {phrase}" for phrase in tiny_world.BACKGROUNDS
    }


def test_masks_are_where_the_robot_is() -> None:
    """Outside of it, its images have nothing of its colors."""
    folder = ROOT / "samples" / "masks" / "robot"
    assert [path.name for path in sorted(folder.iterdir())] == [f"{n:02d}.png" for n in range(5)]
    for path in folder.iterdir():
        mask = np.asarray(Image.open(path))
        image = pixels(SUBJECTS / "robot" / "train" / path.name)
        assert mask.shape == image.shape[:2]
        teal = np.abs(image - tiny_pen.TEAL).max(axis=-1) < 8
        assert teal.sum() > 100
        assert (mask[teal] == 255).all()
        assert 0.2 < (mask > 127).mean() < 0.45
