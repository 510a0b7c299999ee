"""The drawn pairs: what an edit changes, and what it leaves alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_edits
from PIL import Image

from gralora_diffusion.training.data.controls import ControlPlaces
from gralora_diffusion.training.data.image_folder import find_examples


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("kind", tiny_edits.KINDS)
def test_an_edit_changes_only_what_it_says(kind: str) -> None:
    for seed in range(20):
        edit = tiny_edits.sample(random.Random(seed), kind)
        before, after = (pixels(scene.draw()) for scene in (edit.before, edit.after))
        changed = np.abs(before - after).max(axis=2) > 0
        rows = np.flatnonzero(changed.any(axis=1))
        if kind == "background":
            assert edit.instruction == f"put it {edit.after.background}"
            assert changed[:4].any()
            assert not changed[36:40, 30:34].all()  # the object stays
        elif kind == "colour":
            assert edit.instruction == f"make it {edit.after.colour}"
            assert changed.any()
            assert not changed[:4].any()
        else:
            assert edit.instruction == "add a hat"
            assert 2 < rows.min() < rows.max() < 32


def test_lessons_are_tested_on_other_objects() -> None:
    learned, tested = (set(tiny_edits.lesson_objects(held_out)) for held_out in (False, True))
    assert learned & tested == set()
    assert learned | tested == set(tiny_edits.OBJECTS)
    assert len(tested) == 9


@pytest.mark.parametrize(
    ("lesson", "least", "most"), [("glasses", 0.01, 0.2), ("space", 0.5, 0.95)]
)
def test_pairs_are_a_training_folder(
    lesson: str, least: float, most: float, tmp_path: Path
) -> None:
    """Images before the edit have the same names, as ``--control_data_dir`` reads them."""
    tiny_edits.write_lesson(lesson, tmp_path, 3, 2)
    for split, count in (("train", 3), ("held_out", 2)):
        places = ControlPlaces((tmp_path / split / "control",))
        examples = find_examples(tmp_path / split / "images", controls=places)
        assert [example.caption for example in examples] == [tiny_edits.LESSONS[lesson]] * count
        for example in examples:
            before, after = pixels(example.controls[0].load()), pixels(example.load())
            changed = np.abs(before - after).max(axis=2) > 0
            assert least < changed.mean() < most
